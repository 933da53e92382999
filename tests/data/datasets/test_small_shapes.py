import dataclasses
import hashlib
import importlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data.datasets import small_shapes, small_shapes_drawing  # noqa: E402
from cbbl_d2.data.datasets.small_shapes import (  # noqa: E402
    SmallShapesSpec,
    generate_small_shapes,
    register_small_shapes,
)
from cbbl_d2.data.datasets.small_shapes_drawing import (  # noqa: E402
    SPLITS,
    _coverage,
    _rotation,
    draw_image,
)
from cbbl_d2.data.datasets.small_shapes_geometry import CLASS_NAMES, KEYPOINT_NAMES, Shape  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog  # noqa: E402
from detectron2.data.detection_utils import create_keypoint_hflip_indices  # noqa: E402
from detectron2.structures.masks import polygon_area  # noqa: E402
from PIL import Image  # noqa: E402

TINY = SmallShapesSpec(num_train=3, num_val=2, num_test=1, image_size=96)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The data-set root; SmallShapes of TINY size are registered as ``tiny_{train,val,test}``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_small_shapes("tiny", TINY)
    yield tmp_path
    for split in SPLITS:
        DatasetCatalog.remove(f"tiny_{split}")
        MetadataCatalog.remove(f"tiny_{split}")


def make_shapes():
    """One shape of each class, rotated, stretched and off the pixel grid."""
    for i, name in enumerate(CLASS_NAMES):
        cos, sin = _rotation(0.05 + 0.03 * i)
        yield Shape(name, 0.8, 0.4, cos, sin, scale=9.3 + i, cx=40.27 + i / 7, cy=33.61 - i / 9)


each_shape = pytest.mark.parametrize("shape", list(make_shapes()), ids=lambda s: s.class_name)


def draw(spec, split, index):
    """An image with its boxes as annotated (M, 4), XYXY, and its classes (M,)."""
    image, shapes = draw_image(spec, split, index)
    boxes = np.array([shape.box for shape in shapes]).round(3)
    return image, boxes, np.array([CLASS_NAMES.index(shape.class_name) for shape in shapes])


# -- drawing ---------------------------------------------------------------------------------------


def test_pixels_and_boxes_are_the_same_everywhere():
    """If this fails on purpose, raise DRAWING_VERSION; if it fails on one machine only, fix it."""
    digest = hashlib.sha256()
    for split, index in (("train", 0), ("val", 1), ("test", 2), ("train", 1999)):
        image, boxes, classes = draw(SmallShapesSpec(), split, index)
        digest.update(image.tobytes())
        digest.update(np.rint(boxes * 1000).astype("<i8").tobytes())
        digest.update(classes.astype("<i8").tobytes())
    assert digest.hexdigest() == (
        "30420c6aed60aa6f5f2fa6ce8fbfbbd30765dbe50e8765af1ea4ad9459560f39"
    )


def test_the_order_of_drawing_does_not_matter():
    forth = [draw(TINY, "train", i) for i in range(3)]
    back = [draw(TINY, "train", i) for i in reversed(range(3))][::-1]
    for a, b in zip(forth, back, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(forth[0][0], forth[1][0])


def test_seed_and_split_change_the_image():
    image = draw(TINY, "train", 0)[0]
    assert not np.array_equal(image, draw(TINY, "val", 0)[0])
    other = dataclasses.replace(TINY, seed=1)
    assert not np.array_equal(image, draw(other, "train", 0)[0])


@each_shape
def test_box_is_the_exact_extent(shape):
    """The box comes from vertices and ellipse formulas; ``contains`` knows nothing of it."""
    step = 1 / 64
    grid = np.arange(0, 80, step) + step / 2
    inside = shape.contains(grid[None, :], grid[:, None])
    columns, rows = grid[inside.any(axis=0)], grid[inside.any(axis=1)]
    extent = [columns[0], rows[0], columns[-1], rows[-1]]
    # A pointed corner is thinner than a sample: it is found up to a few steps late.
    np.testing.assert_allclose(shape.box, extent, atol=4 * step)


@each_shape
def test_coverage_has_the_area_and_place_of_the_shape(shape):
    x0, y0, coverage = _coverage(shape)
    ellipse = math.pi
    area, center_u = {
        "disk": (ellipse, 0),
        "ring": (ellipse * (1 - shape.detail**2), 0),
        "square": (4, 0),
        "triangle": (2, 1 / 3),  # apex at u = -1, base at u = 1
        "cross": (4 - 4 * (1 - shape.detail) ** 2, 0),
    }[shape.class_name]
    area *= shape.aspect * shape.scale**2
    assert coverage.sum() == pytest.approx(area, rel=0.01)
    x = x0 + np.arange(coverage.shape[1]) + 0.5
    y = y0 + np.arange(coverage.shape[0]) + 0.5
    center = [(coverage * x).sum(), (coverage * y[:, None]).sum()] / coverage.sum()
    expected = (
        shape.cx + shape.scale * shape.cos * center_u,
        shape.cy + shape.scale * shape.sin * center_u,
    )
    np.testing.assert_allclose(center, expected, atol=0.05)  # a pixel's half would be 0.5
    assert coverage.min() >= 0 and coverage.max() == 1


@each_shape
def test_outline_has_the_extent_and_area_of_the_shape(shape):
    outline = shape.outline
    extent = [*outline.min(axis=0), *outline.max(axis=0)]
    np.testing.assert_allclose(extent, shape.box, atol=1e-9)
    step = 1 / 32
    grid = np.arange(0, 80, step) + step / 2
    area = shape.contains(grid[None, :], grid[:, None]).sum() * step**2
    assert polygon_area(*outline.T) == pytest.approx(area, rel=0.01)


@each_shape
def test_outline_drawn_by_pycocotools_is_the_shape(shape):
    """Enlarged by 8, so that the rounding of COCO's masks to pixels does not matter."""
    size = 80 * 8
    mask = mask_util.decode(mask_util.frPyObjects([8 * shape.outline.ravel()], size, size))[..., 0]
    grid = (np.arange(size) + 0.5) / 8
    expected = shape.contains(grid[None, :], grid[:, None])
    assert (mask != expected).sum() < 0.02 * expected.sum()
    assert mask[int(8 * shape.cy), int(8 * shape.cx)] == (shape.class_name != "ring")


@each_shape
def test_keypoints_are_the_places_where_the_shape_touches_its_box(shape):
    left, top, right, bottom = shape.keypoints
    np.testing.assert_allclose([left[0], top[1], right[0], bottom[1]], shape.box, atol=1e-9)
    for x, y in shape.keypoints:
        # On the shape: a little towards its middle is within, as much outwards is not. Not the
        # middle of the box, from which the corner of a triangle is seen under a small angle.
        inwards = 0.02 * (shape.outline.mean(axis=0) - (x, y))
        assert shape.contains(x + inwards[0], y + inwards[1])
        assert not shape.contains(x - inwards[0], y - inwards[1])


@pytest.mark.parametrize(
    "class_name, quarter_turns, expected",
    [
        ("square", 0, [(-1, 0), (0, -0.5), (1, 0), (0, 0.5)]),
        ("square", 1, [(-0.5, 0), (0, -1), (0.5, 0), (0, 1)]),
        ("cross", 0, [(-1, 0), (0, -0.5), (1, 0), (0, 0.5)]),
        ("triangle", 0, [(-1, 0), (1, -0.5), (1, 0), (1, 0.5)]),
        ("triangle", 1, [(-0.5, 1), (0, -1), (0.5, 1), (0, 1)]),
        ("disk", 0, [(-1, 0), (0, -0.5), (1, 0), (0, 0.5)]),
    ],
)
def test_where_a_whole_edge_is_extreme_its_middle_is_the_keypoint(
    class_name, quarter_turns, expected
):
    cos, sin = 1.0, 0.0
    for _ in range(quarter_turns):
        cos, sin = -sin, cos
    np.testing.assert_allclose(Shape(class_name, 0.5, 0.3, cos, sin).keypoints, expected, atol=1e-9)


def test_images_hold_what_the_spec_says():
    spec = SmallShapesSpec()
    sides = []
    for index in range(30):
        image, boxes, classes = draw(spec, "val", index)
        assert image.shape == (160, 160, 3) and image.dtype == np.uint8
        assert len(boxes) == len(classes) <= spec.max_objects
        assert boxes.min() >= 0 and boxes.max() <= 160
        sides.append(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])))
    sides = np.concatenate(sides)
    assert sides.min() > spec.min_side - 0.01 and sides.max() < spec.max_side + 0.01
    # Log-uniform sides: ln(16/6) / ln(40/6) = 52 % lie under 16 pixels.
    assert 0.4 < (sides < 16).mean() < 0.64


def test_objects_stand_out_from_the_background():
    """A box's inside differs from the frame around it, also for the smallest objects."""
    differences = []
    for index in range(20):
        image, boxes, classes = draw(SmallShapesSpec(), "val", index)
        image = image.astype(np.float64)
        for box, class_index in zip(boxes, classes, strict=True):
            if CLASS_NAMES[class_index] in ("ring", "cross"):
                continue  # their background shows within the box
            x0, y0, x1, y1 = box.round().astype(int)
            cx, cy = (x0 + x1) // 2, (y0 + y1) // 2
            frame = image[max(y0 - 3, 0) : y1 + 3, max(x0 - 3, 0) : x1 + 3]
            total = frame.sum(axis=(0, 1)) - image[y0:y1, x0:x1].sum(axis=(0, 1))
            around = total / (frame.shape[0] * frame.shape[1] - (x1 - x0) * (y1 - y0))
            inside = image[cy - 1 : cy + 1, cx - 1 : cx + 1].mean(axis=(0, 1))
            differences.append(np.abs(inside - around).mean())
    assert len(differences) > 50
    assert np.median(differences) > 35
    assert np.percentile(differences, 5) > 12


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"num_val": 0}, "at least 1 image"),
        ({"min_side": 50.0}, "min_side <= max_side"),
        ({"image_size": 64}, "image_size 64"),
        ({"min_objects": 13}, "min_objects <= max_objects"),
        ({"seed": -1}, "seed"),
    ],
)
def test_spec_rejects_nonsense(fields, words):
    with pytest.raises(UserError, match=words):
        SmallShapesSpec(**fields)


def test_fingerprint_follows_every_field_but_not_its_type():
    assert SmallShapesSpec(max_side=40).fingerprint == SmallShapesSpec().fingerprint
    for field in dataclasses.fields(SmallShapesSpec):
        changed = dataclasses.replace(SmallShapesSpec(), **{field.name: field.default + 1})
        assert changed.fingerprint != SmallShapesSpec().fingerprint, field.name


# -- files and registration ------------------------------------------------------------------------


def test_made_on_first_use_and_loaded_like_any_coco_data(root):
    metadata = MetadataCatalog.get("tiny_val")
    assert metadata.thing_classes == list(CLASS_NAMES) and metadata.evaluator_type == "coco"
    assert metadata.json_file.startswith(str(root)) and os.listdir(root) == []

    dicts = DatasetCatalog.get("tiny_val")
    assert [d["image_id"] for d in dicts] == [1, 2]
    assert metadata.image_root == os.path.dirname(dicts[0]["file_name"])
    for index, record in enumerate(dicts):
        image, boxes, classes = draw(TINY, "val", index)
        assert np.array_equal(np.asarray(Image.open(record["file_name"])), image)
        assert [a["category_id"] for a in record["annotations"]] == classes.tolist()
        xywh = np.array([a["bbox"] for a in record["annotations"]])
        np.testing.assert_allclose(xywh[:, :2], boxes[:, :2], atol=1e-9)
        np.testing.assert_allclose(xywh[:, :2] + xywh[:, 2:], boxes[:, 2:], atol=1e-9)
    with open(metadata.json_file) as f:
        for annotation in json.load(f)["annotations"]:
            assert annotation["id"] > 0  # pycocotools takes 0 for "no match"
            width, height = annotation["bbox"][2:]
            assert annotation["area"] == pytest.approx(width * height, abs=1e-3)


def test_masks_and_keypoints_of_the_files_agree_with_the_boxes(root):
    for record in DatasetCatalog.get("tiny_train"):
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            box = [x, y, x + width, y + height]
            (polygon,) = annotation["segmentation"]
            points = np.reshape(polygon, (-1, 2))
            extent = [*points.min(axis=0), *points.max(axis=0)]
            np.testing.assert_allclose(extent, box, atol=1e-2)
            # Detectron2 has added the 0.5 that COCO's keypoints are short of.
            left, top, right, bottom = np.reshape(annotation["keypoints"], (4, 3))
            touched = [left[0], top[1], right[0], bottom[1]]
            np.testing.assert_allclose(touched, box, atol=1e-2)
            assert left[2] == top[2] == right[2] == bottom[2] == 2
    with open(MetadataCatalog.get("tiny_train").json_file) as f:
        coco = json.load(f)
    assert all(a["num_keypoints"] == len(a["keypoints"]) / 3 == 4 for a in coco["annotations"])
    for category in coco["categories"]:
        assert category["keypoints"] == list(KEYPOINT_NAMES)
        assert sorted(sum(category["skeleton"], [])) == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("flip", ["none", "horizontal"])
def test_training_gets_masks_and_keypoints(root, flip):
    """Of a flipped image, too, the first keypoint is the leftmost one, at the left of the box."""
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("tiny_train",)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (2 * TINY.image_size,)
    cfg.INPUT.RANDOM_FLIP = flip
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(0)  # what the flips are drawn from
    flipped = set()
    for record in DatasetCatalog.get("tiny_train") * 4:
        instances = mapper(record)["instances"]
        assert len(instances) == len(record["annotations"])
        x = 2 * record["annotations"][0]["bbox"][0]
        flipped.add(abs(instances.gt_boxes.tensor[0, 0].item() - x) > 0.01)
        boxes, keypoints = instances.gt_boxes.tensor, instances.gt_keypoints.tensor
        touched = keypoints[:, [0, 1, 2, 3], [0, 1, 0, 1]]  # x of left, y of top, ...
        np.testing.assert_allclose(touched, boxes, atol=0.02)
        np.testing.assert_allclose(instances.gt_masks.get_bounding_boxes().tensor, boxes, atol=0.02)
        masks = instances.gt_masks.crop_and_resize(boxes, 28)
        share = instances.gt_masks.area() / instances.gt_boxes.area()
        np.testing.assert_allclose(masks.float().mean(dim=(1, 2)), share, atol=0.06)
        is_ring = instances.gt_classes == CLASS_NAMES.index("ring")
        assert torch.equal(masks[:, 14, 14], ~is_ring)
    assert flipped == ({False} if flip == "none" else {False, True})


def test_without_masks_and_keypoints_training_gets_boxes_alone(root):
    mapper = DatasetMapper(get_cfg(), is_train=True)
    fields = mapper(DatasetCatalog.get("tiny_train")[0])["instances"].get_fields()
    assert set(fields) == {"gt_boxes", "gt_classes"}


def test_metadata_of_the_keypoints(root):
    metadata = MetadataCatalog.get("tiny_train")
    names = metadata.keypoint_names
    flipped = [names[i] for i in create_keypoint_hflip_indices(("tiny_train", "tiny_val"))]
    assert names == list(KEYPOINT_NAMES) and flipped == ["right", "top", "left", "bottom"]
    for a, b, color in metadata.keypoint_connection_rules:
        assert {a, b} <= set(names) and len(color) == 3


def test_data_of_an_older_version_are_left_alone(root, monkeypatch):
    fingerprints = {TINY.fingerprint}
    for version in ("DRAWING_VERSION", "ANNOTATION_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(small_shapes_drawing, version, 0)
            fingerprints.add(TINY.fingerprint)
            old = root / "small_shapes" / TINY.fingerprint / "annotations"
        old.mkdir(parents=True)
        DatasetCatalog.get("tiny_val")
        assert os.listdir(old) == []
    assert len(fingerprints) == 3


def test_finished_data_is_used_again(root, monkeypatch):
    DatasetCatalog.get("tiny_train")
    monkeypatch.setattr(small_shapes, "draw_image", None)  # drawing again would fail
    assert len(DatasetCatalog.get("tiny_train")) == 3
    assert len(DatasetCatalog.get("tiny_test")) == 1


def test_interrupted_generation_is_redone(root, monkeypatch):
    def interrupted(spec, split, index):
        if split == "val":
            raise KeyboardInterrupt
        return draw_image(spec, split, index)

    monkeypatch.setattr(small_shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DatasetCatalog.get("tiny_train")
    assert [p for p in root.rglob("*.png")] == []
    monkeypatch.undo()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    assert len(DatasetCatalog.get("tiny_train")) == 3


def test_two_at_once_draw_once(tmp_path, monkeypatch):
    drawn = []

    def counted(spec, split, index):
        drawn.append((split, index))
        return draw_image(spec, split, index)

    monkeypatch.setattr(small_shapes, "draw_image", counted)
    folder = str(tmp_path / "shapes")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: generate_small_shapes(folder, TINY, progress=False), range(3)))
    assert len(drawn) == len(set(drawn)) == 6
    assert sorted(os.listdir(folder)) == ["annotations", "test", "train", "val"]


@pytest.mark.parametrize("victim", ["annotations/instances_val.json", "val/000001.png", "val"])
def test_damage_is_one_clear_line(root, victim):
    DatasetCatalog.get("tiny_val")
    folder = root / "small_shapes" / TINY.fingerprint
    (folder / victim).rename(root / "elsewhere")
    with pytest.raises(UserError, match="is damaged: .*; delete the folder") as e:
        DatasetCatalog.get("tiny_val")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_cut_off_annotations_are_damage(root):
    DatasetCatalog.get("tiny_val")
    path = MetadataCatalog.get("tiny_val").json_file
    with open(path) as f:
        text = f.read()
    with open(path, "w") as f:
        f.write(text[: len(text) // 2])
    with pytest.raises(UserError, match="instances_val.json: not valid JSON .*delete the folder"):
        DatasetCatalog.get("tiny_val")


def test_root_that_cannot_be_written(root, monkeypatch):
    (root / "file").touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "file"))
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        DatasetCatalog.get("tiny_val")


def test_default_names_are_registered_and_survive_a_reload():
    importlib.reload(small_shapes)
    for split in SPLITS:
        metadata = MetadataCatalog.get(f"small_shapes_{split}")
        assert f"small_shapes_{split}" in DatasetCatalog.list()
        assert os.path.basename(metadata.json_file) == f"instances_{split}.json"


def test_a_taken_name_is_refused(root):
    register_small_shapes("tiny", TINY)  # the same again is no conflict
    with pytest.raises(UserError, match="tiny_train"):
        register_small_shapes("tiny", dataclasses.replace(TINY, seed=1))
    with pytest.raises(UserError, match="tiny_train"):
        register_small_shapes("tiny", TINY, root=str(root))
