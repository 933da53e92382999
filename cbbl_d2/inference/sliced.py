"""
Sliced inference with sahi (docs/large_images.md): a large image is cut into overlapping slices, the
detector sees each of them, and what it finds is put together. sahi cuts and puts together; here is
the adapter that lets it run the detectors of this project, and any other of Detectron2.

    from sahi.predict import get_sliced_prediction
    model = CBBLDetectionModel(model_path="output/x/model_best.pth", confidence_threshold=0.5)
    get_sliced_prediction("large.jpg", model, slice_height=320, slice_width=320)
"""

from collections.abc import Sequence

import numpy as np
import torch
from cbbl_d2.data.broken_images import large_images
from detectron2.structures import Boxes, Instances
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction

from .classes import find_classes
from .config import load_inference_config
from .predictor import BatchPredictor
from .results import extra_fields

# A box that ends this close to the edge of a slice may go on behind it, pixels.
_TOUCHING = 1.0


class FieldsPrediction(ObjectPrediction):
    """
    sahi's prediction, which knows box, score and class, with the other fields of the model.

    Attributes:
        fields: the row of this object of every other field: ``pred_keypoints`` (K, 3) in pixels of
            the whole image, and those of :func:`cbbl_d2.inference.results.extra_fields`.
    """

    def __init__(self, *args, fields: dict[str, torch.Tensor], **kwargs):
        super().__init__(*args, **kwargs)
        self.fields = fields

    def get_shifted_object_prediction(self) -> ObjectPrediction:
        shifted = super().get_shifted_object_prediction()
        shifted.fields = self.fields
        return shifted


class CBBLDetectionModel(DetectionModel):
    """
    A detector of this project or of Detectron2 as sahi's ``DetectionModel``.

    ``model_path`` is a checkpoint; ``config_path`` its YAML config, by default the one stored
    beside it. ``model`` can be a :class:`BatchPredictor` instead. Its predictions are
    :class:`FieldsPrediction`; sahi's NMS keeps them, and its merging (NMM, GREEDYNMM) makes plain
    ones. Masks are not handed on: a config with ``MODEL.MASK_ON`` is run without its mask head.
    Each slice is resized as the config says for images, unless ``image_size`` (the short side)
    overrides it.

    Attributes:
        min_overlap: by how many pixels neighboring slices overlap, at least. What touches the edge
            of a slice towards a neighbor, and reaches less far into it than this, is a piece of an
            object that the neighbor shows in full, and is left out. 0 (the default) keeps all.
        last_fields: those of :class:`FieldsPrediction` of the last slice, a row for each object.
    """

    min_overlap = 0
    last_fields: dict[str, torch.Tensor] = {}

    def load_model(self) -> None:
        opts = ["MODEL.MASK_ON", "False", "MODEL.DEVICE", str(self.device)]
        if self.image_size is not None:
            opts += ["INPUT.MIN_SIZE_TEST", str(self.image_size)]
        cfg = load_inference_config(
            self.model_path, self.config_path, opts, self.confidence_threshold
        )
        if self.category_mapping is None:
            self.category_mapping = {str(i): x for i, x in enumerate(find_classes(cfg).names)}
        self.set_model(BatchPredictor(cfg))

    def set_model(self, model: BatchPredictor, **kwargs) -> None:
        self.model = model

    def perform_inference(self, image: np.ndarray) -> None:
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[np.ndarray]) -> None:
        # The slices of an image are of one size, unless the image itself is smaller.
        self._original_predictions = self.model(images)
        self._original_shapes = [image.shape for image in images]

    @property
    def category_names(self) -> list[str]:
        return list((self.category_mapping or {}).values())

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list=((0, 0),), full_shape_list=None
    ) -> None:
        # For a single image sahi gives one shift and one shape, else a list of them.
        shifts = np.reshape(shift_amount_list or [[0, 0]], (-1, 2)).tolist()
        shapes = [None] * len(shifts)
        if full_shape_list is not None:
            shapes = np.reshape(full_shape_list, (-1, 2)).tolist()
        per_image = zip(self._original_predictions, shifts, shapes, strict=True)
        self._object_prediction_list_per_image = [self._convert(*x) for x in per_image]

    def _convert(self, instances: Instances, shift: list, shape: list | None) -> list:
        instances = instances[instances.scores >= self.confidence_threshold]
        # A box without area would end in an error of sahi's.
        instances = instances[instances.pred_boxes.nonempty()]
        if shape is not None and self.min_overlap:
            instances = instances[~self._is_piece(instances, shift, shape)]
        fields = extra_fields(instances)
        if instances.has("pred_keypoints"):
            keypoints = instances.pred_keypoints
            fields["pred_keypoints"] = keypoints + keypoints.new_tensor([*shift, 0])
        self.last_fields = fields
        boxes, scores = instances.pred_boxes.tensor.tolist(), instances.scores.tolist()
        names = self.category_mapping or {}
        return [
            FieldsPrediction(
                bbox=boxes[i],
                category_id=category,
                category_name=names.get(str(category), f"class {category}"),
                score=scores[i],
                shift_amount=shift,
                full_shape=shape,
                fields={name: rows[i] for name, rows in fields.items()},
            )
            for i, category in enumerate(instances.pred_classes.tolist())
        ]

    def _is_piece(self, instances: Instances, shift: list, shape: list) -> torch.Tensor:
        """(N,) bool: an edge may cut the object, and the neighbor behind it shows all of it."""
        (height, width), (x, y), (full_height, full_width) = instances.image_size, shift, shape
        x_min, y_min, x_max, y_max = instances.pred_boxes.tensor.unbind(dim=1)
        is_piece = torch.zeros(len(instances), dtype=torch.bool)
        for has_neighbor, distance, reach in (
            (x > 0, x_min, x_max),
            (y > 0, y_min, y_max),
            (x + width < full_width, width - x_max, width - x_min),
            (y + height < full_height, height - y_max, height - y_min),
        ):
            if has_neighbor:
                is_piece |= (distance < _TOUCHING) & (reach < self.min_overlap)
        return is_piece


class SlicedPredictor:
    """
    As :class:`BatchPredictor`, with sahi's slices: each image is cut into overlapping squares,
    which make up the batches, and the whole image can be one more of them.

    What an edge of a slice has cut off is left out where another slice shows the whole object.
    Then duplicates are removed by NMS over "intersection over the smaller area", in each class: the
    IoU of a piece with the whole object can be small.
    """

    def __init__(
        self,
        predictor: BatchPredictor,
        slice_size: int,
        overlap: float = 0.2,
        batch_size: int = 1,
        whole_image: bool = True,
        match_threshold: float = 0.5,
        match_metric: str = "IOS",
        drop_pieces: bool = True,
    ):
        """
        Args:
            predictor: what is run on each slice, resized as its config says for images. Masks are
                not put together, so ``MODEL.MASK_ON`` should be False.
            slice_size: side of the slices, pixels of the image.
            overlap: of neighboring slices, relative to their side; objects that are smaller than
                the overlap are whole in at least one slice.
            batch_size: slices that the model gets at once.
            whole_image: also predict on the whole image, for objects larger than a slice.
            match_threshold: a detection is dropped if ``match_metric`` with a better one of its
                class is above this.
            match_metric: "IOS" or "IOU".
            drop_pieces: leave out what an edge has cut off, see
                :attr:`CBBLDetectionModel.min_overlap`.
        """
        self._model = CBBLDetectionModel(
            model=predictor, device=predictor.device, confidence_threshold=0.0
        )
        if drop_pieces:
            self._model.min_overlap = int(overlap * slice_size)  # as sahi rounds it
        self._options = {
            "slice_height": slice_size,
            "slice_width": slice_size,
            "overlap_height_ratio": overlap,
            "overlap_width_ratio": overlap,
            "perform_standard_pred": whole_image,
            "postprocess_type": "NMS",
            "postprocess_match_metric": match_metric,
            "postprocess_match_threshold": match_threshold,
            "force_postprocess_type": True,  # sahi would take IOU for a threshold as low as ours
            "batch_size": batch_size,
            "verbose": 0,
        }

    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """
        Args:
            images: (H, W, 3) uint8, RGB.

        Returns:
            list[Instances]: one for each image, on the CPU, best score first: ``pred_boxes``,
            ``scores``, ``pred_classes``, and the other fields of the model but masks.
        """
        return [self._predict(image) for image in images]

    def _predict(self, image: np.ndarray) -> Instances:
        with large_images():  # sahi lifts Pillow's limit and leaves it so
            found = get_sliced_prediction(image, self._model, **self._options)
        found = found.object_prediction_list
        found = sorted(found, key=lambda x: -x.score.value)
        instances = Instances(image.shape[:2])
        boxes = torch.tensor([x.bbox.to_xyxy() for x in found], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.scores = torch.tensor([x.score.value for x in found], dtype=torch.float32)
        instances.pred_classes = torch.tensor([x.category.id for x in found], dtype=torch.int64)
        for name, last in self._model.last_fields.items():
            rows = [x.fields[name] for x in found]
            instances.set(name, torch.stack(rows) if rows else last[:0])
        return instances
