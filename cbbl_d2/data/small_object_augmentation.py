"""
Augmentations for small objects: scale jitter, crops that hold one, and copies of them.

All draw from NumPy's global generator, as Detectron2's own do: a data loader's workers seed it, and
a resumed run restores it.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import Transform

__all__ = ["PastePatches", "SmallObjectMapper", "build_train_mapper", "crop_around", "paste_copies"]

# Background that is copied with an object, in pixels on each side: without it the edges of every
# copy would be those of its box.
_MARGIN = 2
_NUM_TRIALS = 30


def build_train_mapper(cfg: CfgNode) -> Callable[[dict], dict | None]:
    """
    Detectron2's ``DatasetMapper`` for training with what ``INPUT.SMALL_OBJECTS`` adds. With its
    defaults it is a plain ``DatasetMapper``, which draws the same random numbers.
    """
    node = cfg.INPUT.get("SMALL_OBJECTS")  # absent without this project's config keys
    if node is None:
        return DatasetMapper(cfg, is_train=True)
    options = DatasetMapper.from_config(cfg, is_train=True)
    augmentations = options["augmentations"]
    if node.SCALE_JITTER:
        place = next(
            i for i, aug in enumerate(augmentations) if isinstance(aug, T.ResizeShortestEdge)
        )
        augmentations[place : place + 1] = [
            T.ResizeScale(*node.SCALE_JITTER, *node.JITTER_SIZE),
            T.FixedSizeCrop(tuple(node.JITTER_SIZE)),
        ]
    # Detectron2 crops first.
    crop = augmentations.pop(0) if node.KEEP_IN_CROP else None
    mapper = DatasetMapper(**options)
    if crop is None and not node.COPY_PASTE:
        return mapper
    return SmallObjectMapper(mapper, num_copies=node.COPY_PASTE, max_size=node.MAX_SIZE, crop=crop)


class SmallObjectMapper:
    """
    Before another mapper's augmentations, paste copies of small objects and crop around one of
    them. For boxes: masks and keypoints are not copied.
    """

    def __init__(
        self,
        mapper: DatasetMapper,
        *,
        num_copies: int = 0,
        max_size: float = 32,
        crop: T.RandomCrop | None = None,
    ):
        """
        Args:
            num_copies: at most, for each image.
            max_size: the square root of a small object's area, in pixels of the image file.
            crop: gives the size of the window; None: no cropping here.
        """
        self._mapper = mapper
        self._num_copies = num_copies
        self._max_size = max_size
        self._crop = crop

    def __call__(self, record: dict) -> dict | None:
        """
        Args:
            record: Detectron2's dataset dict, with ``width``, ``height`` and ``annotations``. It is
                not changed.
        """
        size = (record["height"], record["width"])
        annotations = record.get("annotations", [])
        added: list[Transform] = []
        if self._num_copies:
            copies, patches = paste_copies(annotations, size, self._num_copies, self._max_size)
            annotations = [*annotations, *copies]
            record = dict(record, annotations=annotations)
            added.append(PastePatches(patches))
        if self._crop is not None:
            small = _small(annotations, self._max_size)
            box = _box(small[np.random.randint(len(small))]) if small else None
            added.append(crop_around(box, self._crop.get_crop_size(size), size))
        # Another list for each image, as Detectron2's augmentations are not shown the boxes.
        mapper = copy.copy(self._mapper)
        mapper.augmentations = T.AugmentationList([*added, *self._mapper.augmentations.augs])
        return mapper(record)


class PastePatches(Transform):
    """Copies rectangles of an image to other places in it. Coordinates stay as they are."""

    def __init__(self, patches: Sequence[tuple[int, int, int, int, int, int]]):
        """
        Args:
            patches: (x0, y0, x1, y1, x, y) in pixels: the rectangle, without its last column x1 and
                row y1, and where its upper left corner goes.
        """
        super().__init__()
        self.patches = list(patches)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        pasted = img.copy()
        for x0, y0, x1, y1, x, y in self.patches:
            pasted[y : y + y1 - y0, x : x + x1 - x0] = img[y0:y1, x0:x1]
        return pasted

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


def paste_copies(
    annotations: Sequence[dict], size: tuple[int, int], number: int, max_size: float
) -> tuple[list[dict], list[tuple[int, int, int, int, int, int]]]:
    """
    Copies of small objects at free places: a copy, with a little background around it, touches no
    other box, so that nothing is covered. Not copied are objects that another box overlaps, because
    a part of the neighbor would come along without a box, and those that reach over the edge of
    the image, of which a part is missing. Where there is no room, fewer are made.

    Args:
        annotations: Detectron2's, of one image.
        size: height, width of the image.
        number: of copies.
        max_size: see :class:`SmallObjectMapper`.

    Returns:
        Annotations of the copies, and patches for :class:`PastePatches`.
    """
    height, width = size
    taken = np.array([_box(a) for a in annotations], dtype=np.float64).reshape(-1, 4)
    sources = []
    for annotation in _small(annotations, max_size):
        box = _box(annotation)
        if (box[:2] < 0).any() or (box[2:] > (width, height)).any():
            continue
        low = np.maximum(np.floor(box[:2]).astype(int) - _MARGIN, 0)
        high = np.minimum(np.ceil(box[2:]).astype(int) + _MARGIN, (width, height))
        if _overlaps((*low, *high), taken).sum() == 1:  # its own box
            sources.append((annotation, box, low, high))
    copies, patches = [], []
    for _ in range(number if sources else 0):
        annotation, box, low, high = sources[np.random.randint(len(sources))]
        extent = high - low
        for _ in range(_NUM_TRIALS):
            corner = np.array(
                [
                    np.random.randint(width - extent[0] + 1),
                    np.random.randint(height - extent[1] + 1),
                ]
            )
            place = (*corner, *(corner + extent))
            if _overlaps(place, taken).any():
                continue
            taken = np.concatenate([taken, [place]])
            moved = box + np.tile(corner - low, 2)
            copies.append(
                {
                    "bbox": moved.tolist(),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": annotation["category_id"],
                    "iscrowd": 0,
                }
            )
            patches.append(tuple(int(v) for v in (*low, *high, *corner)))
            break
    return copies, patches


def crop_around(
    box: np.ndarray | None, crop_size: tuple[int, int], size: tuple[int, int]
) -> T.CropTransform:
    """
    A window at random, such that it holds a box as a whole where it is large enough.

    Args:
        box: x0, y0, x1, y1, or None for any place.
        crop_size, size: height, width of the window and of the image.
    """
    corner = []
    for axis in (0, 1):  # x, y
        window, image = crop_size[1 - axis], size[1 - axis]
        low, high = 0, image - window
        if box is not None and box[axis + 2] - box[axis] <= window:
            low_box = int(np.ceil(box[axis + 2])) - window
            high_box = int(np.floor(box[axis]))
            # A box of the window's own size at a fraction of a pixel fits nowhere.
            if max(low, low_box) <= min(high, high_box):
                low, high = max(low, low_box), min(high, high_box)
        corner.append(np.random.randint(low, high + 1))
    return T.CropTransform(corner[0], corner[1], crop_size[1], crop_size[0])


def _small(annotations: Sequence[dict], max_size: float) -> list[dict]:
    small = []
    for annotation in annotations:
        x0, y0, x1, y1 = _box(annotation)
        area = max(x1 - x0, 0) * max(y1 - y0, 0)
        if 0 < area <= max_size**2 and not annotation.get("iscrowd", 0):
            small.append(annotation)
    return small


def _box(annotation: dict) -> np.ndarray:
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return np.asarray(box, dtype=np.float64)


def _overlaps(box: Sequence[float], others: np.ndarray) -> np.ndarray:
    """(N,) whether the inside of a box meets that of each of the (N, 4) others."""
    x0, y0, x1, y1 = box
    return (others[:, 0] < x1) & (others[:, 2] > x0) & (others[:, 1] < y1) & (others[:, 3] > y0)
