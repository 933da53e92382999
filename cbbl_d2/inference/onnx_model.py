"""An ONNX file of tools/export_model.py in the place of a checkpoint and its config."""

from collections.abc import Sequence

import numpy as np
import torch
from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_registered
from cbbl_d2.engine.cli import load_config
from cbbl_d2.errors import UserError
from cbbl_d2.modeling.uncertainty import relative_std
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances, ROIMasks

from .classes import Classes


class OnnxPredictor:
    """
    As :class:`cbbl_d2.inference.BatchPredictor`: the runner that is shipped with the file
    (``cbbl_onnx.py``), with Detectron2's Instances as result. Images are predicted one by one.

    Attributes:
        classes: those of the file.
        score_threshold: the lowest score, see :meth:`config`.
        has_masks: whether it finds masks.
    """

    device = "cpu"

    def __init__(self, path: str):
        """
        Raises:
            UserError: no such file, or not of tools/export_model.py; or onnxruntime is missing.
        """
        try:
            import cbbl_onnx
        except ModuleNotFoundError as e:
            raise UserError(
                f"{path} needs the package {e.name}, which is not installed: pip install -e "
                "'.[onnx]'"
            ) from e
        self._path, self._error = path, cbbl_onnx.OnnxError
        try:
            self._detector = cbbl_onnx.Detector(path, torch.get_num_threads())
        except cbbl_onnx.OnnxError as e:
            raise UserError(str(e)) from e
        names, ids = self._detector.class_names, self._detector.category_ids
        self.classes = Classes(tuple(names), tuple(ids), path, Metadata(thing_classes=names))
        self.score_threshold = self._detector.score_threshold
        self.has_masks = self._detector.has_masks

    def config(
        self,
        opts: Sequence[str] = (),
        score_threshold: float | None = None,
        dataset: str | None = None,
    ) -> CfgNode:
        """
        What the file says of itself, for code that asks a config: the size of images, the number of
        classes and of detections, masks. The data sets of ``opts`` are registered.

        Args:
            opts: ``[key, value, ...]`` of ``DATASETS``; all else is settled in the file.
            score_threshold: lowest score from here on; None: the file's.
            dataset: name of the data set to predict on.

        Raises:
            ConfigError: see :func:`cbbl_d2.engine.load_config`, or an unknown data set.
            UserError: an option that the file has settled, or a threshold below the file's.
        """
        for key in opts[::2]:
            if not key.startswith("DATASETS."):
                raise UserError(
                    f"--opts {key}: settled in {self._path}, where only DATASETS.* can be chosen: "
                    "export the checkpoint again with this option"
                )
        detector = self._detector
        if score_threshold is not None:
            if score_threshold < detector.score_threshold:
                raise UserError(
                    f"--confidence-threshold {score_threshold:g}: {self._path} was exported with "
                    f"{detector.score_threshold:g}, below which it finds nothing: export the "
                    "checkpoint again with a lower one"
                )
            self.score_threshold = score_threshold
        cfg = load_config("", list(opts))
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = self._path, self.device
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(self.classes.names)
        cfg.MODEL.MASK_ON = self.has_masks
        cfg.INPUT.MIN_SIZE_TEST = detector.min_size
        cfg.TEST.DETECTIONS_PER_IMAGE = detector.max_detections
        register_from_config(cfg)
        if dataset is not None:
            check_registered(dataset, "--dataset")
            cfg.DATASETS.TEST = (dataset,)
        return cfg

    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """
        Args:
            images: (H, W, 3) uint8, RGB.

        Returns:
            list[Instances]: one for each image, on the CPU, in pixels of the images as they are
            given, with the fields of the original model.

        Raises:
            UserError: onnxruntime cannot run an image.
        """
        return [self._predict(image) for image in images]

    def _predict(self, image: np.ndarray) -> Instances:
        try:
            found = self._detector(image, self.score_threshold)
        except self._error as e:
            raise UserError(f"{self._path}: {e}") from e
        boxes = Boxes(torch.from_numpy(found.boxes))
        instances = Instances(
            image.shape[:2],
            pred_boxes=boxes,
            scores=torch.from_numpy(found.scores),
            pred_classes=torch.from_numpy(found.classes),
        )
        if found.deviations is not None:
            deviations = torch.from_numpy(found.deviations)
            instances.pred_boxes_std = relative_std(deviations, boxes.tensor)
        if self.has_masks:
            masks = ROIMasks(torch.from_numpy(found.masks))
            instances.pred_masks = masks.to_bitmasks(boxes, *image.shape[:2]).tensor
        return instances
