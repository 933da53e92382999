import itertools

import numpy as np
import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.data.small_object_augmentation import (
    PastePatches,
    SmallObjectMapper,
    build_train_mapper,
    crop_around,
    paste_copies,
)
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import ConfigError
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

SIZE = (90, 120)  # height, width


def annotation(box, category=0, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **more}


def boxes_of(annotations):
    return torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)


@pytest.fixture
def record(tmp_path):
    """An image of noise, in which every patch is unlike any other."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return {
        "file_name": str(tmp_path / "noise.png"),
        "image_id": 1,
        "height": SIZE[0],
        "width": SIZE[1],
        "annotations": [
            annotation([10, 10, 18.5, 20], 3),
            annotation([40, 30, 110, 80], 5),  # large
        ],
    }


def test_copies_cover_no_box_and_stay_in_the_image():
    originals = [annotation([10, 10, 18.5, 20], 3), annotation([40, 30, 110, 80], 5)]
    for seed in range(20):
        np.random.seed(seed)
        copies, patches = paste_copies(originals, SIZE, 6, 32)
        assert len(copies) == len(patches) > 0
        boxes = boxes_of(originals + copies)
        assert (pairwise_iou(Boxes(boxes), Boxes(boxes)).fill_diagonal_(0) == 0).all()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([120, 90, 120, 90])).all()
        assert all(a["category_id"] == 3 for a in copies)  # the large one is not copied
        size = boxes[2:, 2:] - boxes[2:, :2]
        assert torch.equal(size, torch.tensor([[8.5, 10.0]]).expand_as(size))


def test_what_is_in_the_box_of_a_copy_is_the_object():
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    np.random.seed(1)
    copies, patches = paste_copies([annotation([10, 12, 18, 20])], SIZE, 5, 32)
    pasted = PastePatches(patches).apply_image(image)
    changed = np.ones(SIZE, dtype=bool)
    for a in copies:
        x0, y0, x1, y1 = map(int, a["bbox"])
        assert np.array_equal(pasted[y0:y1, x0:x1], image[12:20, 10:18])
        changed[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = False
    assert len(copies) == 5
    assert np.array_equal(pasted[changed], image[changed])


@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [annotation([10, 10, 60, 60])],  # larger than 32 pixels
        [annotation([10, 10, 20, 20], iscrowd=1)],
        [annotation([10, 10, 20, 20]), annotation([15, 15, 30, 30])],  # each other's neighbor
        [annotation([10, 10, 20, 20]), annotation([0, 0, 120, 90], iscrowd=1)],  # no room
        [annotation([10, 10, 10, 20])],  # no area
    ],
)
def test_nothing_to_copy_or_no_room(annotations):
    assert paste_copies(annotations, SIZE, 5, 32) == ([], [])


@pytest.mark.parametrize("box", ([-3, 40, 10, 56], [112, 40, 121.5, 50], [9, 84, 15, 90.5]))
def test_objects_that_the_edge_of_the_image_cuts_are_not_copied(box):
    assert paste_copies([annotation(box)], SIZE, 5, 32) == ([], [])


def test_boxes_may_be_written_with_width_and_height():
    np.random.seed(0)
    expected = paste_copies([annotation([10, 10, 18, 20])], SIZE, 3, 32)
    np.random.seed(0)
    other = [{"bbox": [10, 10, 8, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    assert paste_copies(other, SIZE, 3, 32) == expected


@pytest.mark.parametrize("box", ([0, 0, 5, 5], [115.2, 84.7, 120, 90], [50.5, 40.5, 60.2, 50.3]))
def test_the_window_holds_the_box(box):
    corners = set()
    for seed in range(200):
        np.random.seed(seed)
        crop = crop_around(np.array(box), (30, 40), SIZE)
        assert crop.w == 40 and crop.h == 30
        assert 0 <= crop.x0 <= box[0] and box[2] <= crop.x0 + 40 <= 120
        assert 0 <= crop.y0 <= box[1] and box[3] <= crop.y0 + 30 <= 90
        corners.add((crop.x0, crop.y0))
    x_range = min(int(box[0]), 80) - max(int(np.ceil(box[2])) - 40, 0) + 1
    assert len({x for x, _ in corners}) == x_range  # every place that holds it comes
    np.random.seed(0)
    assert crop_around(np.array([0, 0, 120, 90.0]), (30, 40), SIZE).w == 40  # larger than it


def test_the_mapper_shows_the_model_copies_in_their_boxes(record, tiny_cfg):
    """Without resizing or flipping: the pixels under each copy's box are those of the object."""
    tiny_cfg.merge_from_list(["INPUT.RANDOM_FLIP", "none", "INPUT.SMALL_OBJECTS.COPY_PASTE", 4])
    tiny_cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (SIZE[0],)])
    before = [dict(a) for a in record["annotations"]]
    np.random.seed(0)
    item = build_train_mapper(tiny_cfg)(record)
    assert record["annotations"] == before
    boxes, classes = item["instances"].gt_boxes.tensor, item["instances"].gt_classes
    assert classes.tolist() == [3, 5, 3, 3, 3, 3]
    image = item["image"]
    for x0, y0, x1, y1 in boxes[2:].int().tolist():
        assert torch.equal(image[:, y0:y1, x0:x1], image[:, 10:20, 10:18])


def test_crop_of_the_mapper_keeps_the_small_object(record, tiny_cfg):
    tiny_cfg.merge_from_list(["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"])
    tiny_cfg.merge_from_list(["INPUT.CROP.SIZE", [32, 32], "INPUT.MIN_SIZE_TRAIN", (32,)])
    tiny_cfg.INPUT.SMALL_OBJECTS.KEEP_IN_CROP = True
    check_cbbl_config(tiny_cfg)
    mapper = build_train_mapper(tiny_cfg)
    for _ in range(30):
        instances = mapper(record)["instances"]
        assert instances.image_size == (32, 32)
        kept = instances.gt_boxes.tensor[instances.gt_classes == 3]
        assert (kept[0, 2:] - kept[0, :2]).tolist() == pytest.approx([8.5, 10.0])
    record["annotations"] = record["annotations"][1:]
    assert mapper(record)["image"].shape == (3, 32, 32)  # any window


def test_scale_jitter_has_one_size_and_moves_the_boxes(record, tiny_cfg):
    tiny_cfg.merge_from_list(["INPUT.SMALL_OBJECTS.SCALE_JITTER", (0.5, 1.0)])
    tiny_cfg.merge_from_list(["INPUT.SMALL_OBJECTS.JITTER_SIZE", (180, 240)])
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    check_cbbl_config(tiny_cfg)
    mapper = build_train_mapper(tiny_cfg)
    scales = []
    for _ in range(20):
        item = mapper(record)
        assert item["image"].shape == (3, 180, 240)
        # The image of 90 x 120 fills the size at a factor of 1: it has been magnified by up to 2.
        x0, y0, x1, y1 = item["instances"].gt_boxes.tensor[0].tolist()
        scales.append((x1 - x0) / 8.5)
        assert x0 == pytest.approx(10 * scales[-1], rel=0.02)
        assert (y1 - y0) == pytest.approx(10 * scales[-1], rel=0.02)
    assert 1 - 0.02 <= min(scales) < 1.4 and 1.6 < max(scales) <= 2 + 0.02


def test_without_the_keys_it_is_the_mapper_of_detectron2(tiny_cfg):
    mapper = build_train_mapper(tiny_cfg)
    assert type(mapper) is DatasetMapper
    assert repr(mapper.augmentations) == repr(DatasetMapper(tiny_cfg).augmentations)
    del tiny_cfg.INPUT["SMALL_OBJECTS"]
    assert type(build_train_mapper(tiny_cfg)) is DatasetMapper


def test_a_lazy_config_can_name_the_mapper(record):
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(90, 200)], image_format="RGB"
    )
    item = SmallObjectMapper(mapper, num_copies=2, max_size=16)(record)
    assert len(item["instances"]) == 4
    assert len(mapper.augmentations.augs) == 1  # shared between images, left as it was


def test_resumed_at_its_place_the_loader_makes_the_same_copies(tiny_cfg):
    from cbbl_d2.engine.rng import rng_state, set_rng_state

    tiny_cfg.INPUT.SMALL_OBJECTS.COPY_PASTE = 5
    loader = ResumableTrainLoader(tiny_cfg)
    whole = iter(loader)
    for _ in range(2):
        next(whole)
    state, numbers = loader.state_dict(), rng_state()
    expected = list(itertools.islice(whole, 2))
    resumed = ResumableTrainLoader(tiny_cfg)
    resumed.load_state_dict(state)
    batches = iter(resumed)
    set_rng_state(numbers)
    for batch, other in zip(expected, batches):
        assert [len(a["instances"]) for a in batch] == [len(b["instances"]) for b in other]
        for a, b in zip(batch, other):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


@pytest.mark.parametrize(
    "options, message",
    [
        (["COPY_PASTE", -1], "COPY_PASTE = -1: must be an integer from 0"),
        (["MAX_SIZE", 0.0], "MAX_SIZE = 0.0: must be a number > 0"),
        (["KEEP_IN_CROP", True], "needs INPUT.CROP.ENABLED True"),
        (["SCALE_JITTER", (0.5, 2.0)], r"JITTER_SIZE = \(\): must be \(height, width\)"),
        (["SCALE_JITTER", (2.0, 0.5), "JITTER_SIZE", (9, 9)], "SCALE_JITTER = .* must be"),
        (["SCALE_JITTER", (0.5,), "JITTER_SIZE", (9, 9)], "SCALE_JITTER = .* must be"),
        (["SCALE_JITTER", (0.5, 2.0), "JITTER_SIZE", (9, 0)], "JITTER_SIZE = .* must be"),
    ],
)
def test_impossible_values(tiny_cfg, options, message):
    options[::2] = [f"INPUT.SMALL_OBJECTS.{key}" for key in options[::2]]
    tiny_cfg.merge_from_list(options)
    with pytest.raises(ConfigError, match=message) as error:
        check_cbbl_config(tiny_cfg)
    assert "INPUT.SMALL_OBJECTS" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ("MASK_ON", "KEYPOINT_ON"))
def test_masks_and_keypoints_are_not_copied(tiny_cfg, key):
    tiny_cfg.merge_from_list(["INPUT.SMALL_OBJECTS.COPY_PASTE", 1, f"MODEL.{key}", True])
    with pytest.raises(ConfigError, match=f"copies have boxes only: .* MODEL.{key} False"):
        check_cbbl_config(tiny_cfg)
