"""
SmallShapes: a synthetic data set of small objects that needs no download.

Importing this module registers ``small_shapes_train``, ``small_shapes_val`` and
``small_shapes_test``. The images are drawn on first use (under a minute) into

    $DETECTRON2_DATASETS/small_shapes/<fingerprint of the spec>/
        train/000000.png ...   val/ ...   test/ ...
        annotations/instances_train.json, instances_val.json, instances_test.json

an ordinary COCO-format folder, for detectors of boxes, masks and keypoints:

* ``bbox``: ``[x, y, width, height]`` in pixels, and ``area`` is the box's: what counts as small is
  the same for boxes, masks and keypoints. (On COCO itself, ``area`` is the mask's.)
* ``segmentation``: one polygon, the whole outline, also where another shape covers a bit of it. The
  hole of a ring is no part of the mask.
* ``keypoints``: the leftmost, topmost, rightmost and bottommost point of the shape, all with the
  visibility 2. As in COCO they are pixel indices: the continuous coordinates minus 0.5.

The fingerprint changes with every setting and with the version of the drawing and the annotations,
so different data never mix, and data of an older version stay as they are.
"""

import dataclasses
import logging
import os

import numpy as np
from cbbl_d2.data.broken_images import missing_images
from cbbl_d2.data.coco_format import CocoLoader, ComputedPaths
from cbbl_d2.data.coco_writer import CocoWriter, numbered_categories
from cbbl_d2.data.datasets.small_shapes_drawing import SPLITS, SmallShapesSpec, draw_image
from cbbl_d2.data.datasets.small_shapes_geometry import CLASS_NAMES, KEYPOINT_NAMES, Shape
from cbbl_d2.errors import UserError
from cbbl_d2.files import atomic_folder
from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock
from PIL import Image
from tqdm import tqdm

__all__ = ["SmallShapesSpec", "generate_small_shapes", "register_small_shapes"]

logger = logging.getLogger(__name__)

# Pairs of neighboring extreme points, which pictures connect with a line.
_SKELETON = tuple(zip(KEYPOINT_NAMES, KEYPOINT_NAMES[1:] + KEYPOINT_NAMES[:1], strict=True))
_LINE_COLOR = (255, 255, 255)


def register_small_shapes(
    name_prefix: str = "small_shapes",
    spec: SmallShapesSpec | None = None,
    root: str | None = None,
) -> None:
    """
    Register ``{name_prefix}_train``, ``_val`` and ``_test``; nothing is written before first use.

    Registering the same data under the same names again changes nothing.

    Args:
        name_prefix: start of the three names.
        spec: what the images contain; the default spec if None.
        root: folder that gets ``small_shapes/<fingerprint>``. None is Detectron2's data-set root,
            ``$DETECTRON2_DATASETS`` or ``datasets``, looked up at each use.

    Raises:
        UserError: a name is taken by other data.
    """
    spec = SmallShapesSpec() if spec is None else spec
    for split in SPLITS:
        name = f"{name_prefix}_{split}"
        loader = _Loader(name, spec, split, root)
        if name in DatasetCatalog:
            if getattr(DatasetCatalog[name], "identity", None) != loader.identity:
                raise UserError(
                    f"data set name {name} is already registered with other data: "
                    f"choose another name_prefix"
                )
            continue
        MetadataCatalog[name] = ComputedPaths(name=name, paths=loader.paths)
        MetadataCatalog.get(name).set(
            evaluator_type="coco",
            thing_classes=list(CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASS_NAMES))},
            keypoint_names=list(KEYPOINT_NAMES),
            keypoint_flip_map=[("left", "right")],
            keypoint_connection_rules=[(a, b, _LINE_COLOR) for a, b in _SKELETON],
        )
        DatasetCatalog.register(name, loader)


def generate_small_shapes(folder: str, spec: SmallShapesSpec, progress: bool = True) -> None:
    """
    Draw all splits into ``folder``, which appears complete or not at all.

    Processes that generate the same folder at once are safe: one draws, the others wait and use
    its result. An existing folder is left as it is.

    Args:
        folder: where the data set goes, missing parents are created.
        spec: what the images contain.
        progress: show a progress bar on stderr.

    Raises:
        UserError: ``folder`` cannot be written to.
    """
    folder = os.path.abspath(folder)
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with file_lock(folder):
            if os.path.isdir(folder):
                return
            logger.info(f"Drawing the SmallShapes data set into {folder}")
            with atomic_folder(folder) as partial:
                _write_all(partial, spec, progress)
    except OSError as e:
        raise UserError(
            f"cannot write the SmallShapes data set to {folder} ({e.strerror or e}): make room "
            f"or choose a folder you may write to, DETECTRON2_DATASETS for the built-in names"
        ) from e


class _Loader(CocoLoader):
    """Makes the files if needed."""

    def __init__(self, name: str, spec: SmallShapesSpec, split: str, root: str | None):
        super().__init__(name)
        self._spec, self._split, self._root = spec, split, root
        self.identity = (spec.fingerprint, split, root)

    def _folder(self) -> str:
        root = os.getenv("DETECTRON2_DATASETS", "datasets") if self._root is None else self._root
        return os.path.join(os.path.expanduser(root), "small_shapes", self._spec.fingerprint)

    def paths(self) -> tuple[str, str]:
        folder = self._folder()
        return _json_file(folder, self._split), os.path.join(folder, self._split)

    def load(self) -> list[dict]:
        folder = self._folder()
        if not os.path.isdir(folder):
            generate_small_shapes(folder, self._spec)
        try:
            dicts = super().load()
            missing = missing_images(dicts)
            if missing:
                raise UserError(f"{missing[0]} is missing")
        except UserError as e:
            raise UserError(
                f"the SmallShapes data set is damaged: {e}; delete the folder {folder} and run "
                "again, it is then drawn anew"
            ) from e
        return dicts


def _json_file(folder: str, split: str) -> str:
    return os.path.join(folder, "annotations", f"instances_{split}.json")


def _write_all(folder: str, spec: SmallShapesSpec, progress: bool) -> None:
    total = sum(spec.num_images(split) for split in SPLITS)
    with tqdm(
        total=total, desc="SmallShapes", unit="image", mininterval=1, disable=not progress
    ) as bar:
        for split in SPLITS:
            os.makedirs(os.path.join(folder, split))
            writer = CocoWriter(
                _categories(),
                description=f"SmallShapes {split}, synthetic",
                version=spec.fingerprint,
                spec=dataclasses.asdict(spec),
            )
            for index in range(spec.num_images(split)):
                image, shapes = draw_image(spec, split, index)
                name = f"{index:06d}.png"
                # Light compression: noise hardly compresses, and the default takes twice as long.
                Image.fromarray(image).save(os.path.join(folder, split, name), compress_level=1)
                image_id = writer.add_image(name, spec.image_size, spec.image_size)
                for shape in shapes:
                    category_id = CLASS_NAMES.index(shape.class_name) + 1
                    writer.add_annotation(image_id, category_id, iscrowd=0, **_coordinates(shape))
                bar.update()
            writer.write(_json_file(folder, split))


def _categories() -> list[dict]:
    # Numbers of the points, starting at 1.
    skeleton = [[KEYPOINT_NAMES.index(x) + 1 for x in pair] for pair in _SKELETON]
    shape = {"supercategory": "shape", "keypoints": list(KEYPOINT_NAMES), "skeleton": skeleton}
    return [{**category, **shape} for category in numbered_categories(CLASS_NAMES)]


def _coordinates(shape: Shape) -> dict:
    """The fields of an annotation that say where the object is, to 1/1000 of a pixel."""
    x0, y0, x1, y1 = np.array(shape.box).round(3).tolist()
    width, height = round(x1 - x0, 3), round(y1 - y0, 3)
    keypoints = (shape.keypoints - 0.5).round(3)
    return {
        "bbox": [x0, y0, width, height],
        "area": round(width * height, 3),
        "segmentation": [shape.outline.round(3).ravel().tolist()],
        "keypoints": [value for x, y in keypoints.tolist() for value in (x, y, 2)],
        "num_keypoints": len(keypoints),
    }


register_small_shapes()
# Made in a second: for tests, and to see whether a new config runs at all.
register_small_shapes("small_shapes_mini", SmallShapesSpec(num_train=24, num_val=12, num_test=12))
