import dataclasses

import numpy as np
import pytest

pytest.importorskip("detectron2")

from cbbl_d2.dataset_report.object_table import ObjectTable  # noqa: E402
from cbbl_d2.dataset_report.suggestions import (  # noqa: E402
    Suggestion,
    anchor_levels,
    format_yaml,
    suggest_settings,
)
from cbbl_d2.engine import check_model_config, load_config  # noqa: E402
from cbbl_d2.errors import ConfigError  # noqa: E402


def squares(size, number=50, shape=(480, 640)):
    """One image with squares of a size, in pixels of the file, at places of no pattern."""
    corner = np.random.default_rng(0).uniform(0, min(shape) - size, (number, 2))
    boxes = np.hstack([corner, corner + size])
    zeros = np.zeros(number, dtype=np.int64)
    return ObjectTable(boxes, zeros, zeros, np.array([shape], dtype=float))


@pytest.fixture
def config(repository):
    """``config(file, KEY, VALUE, ...)``"""
    return lambda file="Base-CBBL-RCNN-FPN", *opts: load_config(
        f"{repository}/configs/{file}.yaml", list(map(str, opts))
    )


def values_of(suggestions):
    return {key: value for x in suggestions for key, value in x.values.items()}


def suggest(cfg, objects, **kwargs):
    return values_of(suggest_settings(cfg, objects, ["car"], **kwargs))


CONFIGS = [
    "Base-CBBL-RCNN-FPN",
    "COCO-Detection/cbbl_faster_rcnn_R_50_C4_1x",
    "COCO-Detection/cbbl_cascade_rcnn_R_50_FPN_1x",
    "COCO-Detection/cbbl_retinanet_R_50_FPN_1x",
    "COCO-Detection/cbbl_fcos_R_50_FPN_1x",
    "COCO-Detection/smooth_l1_faster_rcnn_R_50_FPN_1x",
    "SmallShapes/cbbl_rpn",
]


@pytest.mark.parametrize("file", CONFIGS)
def test_yaml_can_be_pasted_into_a_config(config, repository, tmp_path, file):
    cfg = config(file)
    names = ["car: a # comment", "two\nlines", "été 'x' \"y\"", "- {z}"]
    suggestions = suggest_settings(cfg, squares(11, number=180), names)
    text = format_yaml(suggestions)
    (tmp_path / "mine.yaml").write_text(f'_BASE_: "{repository}/configs/{file}.yaml"\n{text}\n')
    loaded = load_config(str(tmp_path / "mine.yaml"))
    check_model_config(loaded)
    values = values_of(suggestions)
    assert values["TEST.DETECTIONS_PER_IMAGE"] == 300  # 1.5 * 180, in steps of 50
    for key, value in values.items():
        node = loaded
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert all(x.reason and "\n" not in x.reason for x in suggestions)
    assert all(x.reason in text for x in suggestions)
    (key,) = [key for key in values if key.endswith("NUM_CLASSES")]
    node = {"retinanet": "RETINANET", "fcos": "FCOS"}.get(file.partition("cbbl_")[2].split("_")[0])
    assert key == f"MODEL.{node or 'ROI_HEADS'}.NUM_CLASSES" and values[key] == 4
    assert ("MODEL.ANCHOR_GENERATOR.SIZES" in values) == ("fcos" not in file)


# -- input size ------------------------------------------------------------------------------------


def test_large_enough_objects_keep_the_input_size(config):
    values = suggest(config(), squares(9.7))  # * 800 / 480 = 16.2 px
    assert (values["INPUT.MIN_SIZE_TEST"], values["INPUT.MAX_SIZE_TEST"]) == (800, 1333)
    assert values["INPUT.MIN_SIZE_TRAIN"] == (640, 672, 704, 736, 768, 800)


def test_small_objects_ask_for_a_larger_input(config):
    # 20 px on a short side of 1500: 16 px need 1200, in steps of 32 from 800: 1216.
    values = suggest(config(), squares(20, shape=(1500, 2000)))
    assert values["INPUT.MIN_SIZE_TEST"] == 1216
    assert 1216 * 2000 / 1500 <= values["INPUT.MAX_SIZE_TEST"] < 1216 * 2000 / 1500 + 32
    assert values["INPUT.MIN_SIZE_TRAIN"] == (992, 1024, 1088, 1120, 1184, 1216)
    assert values["INPUT.MAX_SIZE_TRAIN"] >= values["INPUT.MAX_SIZE_TEST"]


def test_a_coarse_finest_level_asks_for_more(config):
    # A RetinaNet begins at P3, stride 8: 32 px.
    values = suggest(config("COCO-Detection/cbbl_retinanet_R_50_FPN_1x"), squares(18))
    assert values["INPUT.MIN_SIZE_TEST"] == 864  # >= 32 / 18 * 480 = 853.3


@pytest.mark.parametrize(
    "shape, expected, words",
    [((500, 600), 1024, "twice the size of the files"), ((3000, 4000), 1600, "tiles")],
)
def test_there_is_an_end_to_it(config, shape, expected, words):
    suggestions = suggest_settings(config(), squares(3, shape=shape), ["car"])
    assert values_of(suggestions)["INPUT.MIN_SIZE_TEST"] == expected
    assert any(words in x.reason for x in suggestions)


def suggestion_of(key, cfg, objects, **kwargs):
    (found,) = [x for x in suggest_settings(cfg, objects, ["car"], **kwargs) if key in x.values]
    return found


@pytest.mark.parametrize(
    "train, test, expected",
    (
        ((256,), 1080, (1080,)),
        ((256,), 100, (100,)),
        ((640, 800), 1200, (960, 1200)),
        ((800, 640), 1200, (960, 1200)),
        ((640, 800), 1000, (640, 800)),  # a little larger at inference
        ((640, 800), 640, (640, 800)),
        ((0,), 1080, (0,)),  # not resized
    ),
)
def test_objects_are_as_large_in_training_as_at_inference(config, train, test, expected):
    sizes = ("INPUT.MIN_SIZE_TRAIN", train, "INPUT.MIN_SIZE_TEST", test)
    cfg = config("Base-CBBL-RCNN-FPN", *sizes, "INPUT.MAX_SIZE_TEST", 2000)
    found = suggestion_of("INPUT.MIN_SIZE_TRAIN", cfg, squares(100), keep_input_size=True)
    assert found.values["INPUT.MIN_SIZE_TRAIN"] == expected
    assert found.values["INPUT.MIN_SIZE_TEST"] == test
    assert ("trained at" in found.reason) == (expected != train)
    least = 2000 if expected != train else 0
    assert found.values["INPUT.MAX_SIZE_TRAIN"] == max(cfg.INPUT.MAX_SIZE_TRAIN, least)


def test_a_long_side_that_ends_before_the_short_one_is_reached(config):
    cfg = config("Base-CBBL-RCNN-FPN", "INPUT.MIN_SIZE_TEST", 1080, "INPUT.MIN_SIZE_TRAIN", (1080,))
    reason = suggestion_of("INPUT.MIN_SIZE_TEST", cfg, squares(100, shape=(1080, 1920))).reason
    assert "MAX_SIZE_TEST 1333 leaves a short side of 750" in reason
    reason = suggestion_of("INPUT.MIN_SIZE_TEST", config(), squares(100)).reason  # 480 x 640
    assert "leaves" not in reason


def test_the_length_of_the_training_in_epochs(config):
    one = squares(100)
    images = np.arange(len(one)) % 10  # 10 of 20 have objects
    objects = dataclasses.replace(one, images=images, shapes=np.repeat(one.shapes, 20, axis=0))
    steps = ("SOLVER.MAX_ITER", 50, "SOLVER.IMS_PER_BATCH", 8)
    for filtered, expected in ((True, (40, 10, 15)), (False, (20, 20, 30))):
        option = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
        found = suggest_settings(config("Base-CBBL-RCNN-FPN", *steps, *option), objects, ["car"])
        (reason,) = [x.reason for x in found if "epochs" in x.reason]
        assert f"is {expected[0]} epochs of {expected[1]} images" in reason
        assert reason.endswith(f"would be {expected[2]}")


def test_the_input_size_can_be_kept(config):
    values = suggest(config(), squares(3), keep_input_size=True)
    assert values["INPUT.MIN_SIZE_TEST"] == 800


def test_images_that_are_not_resized(config):
    values = suggest(config("Base-CBBL-RCNN-FPN", "INPUT.MIN_SIZE_TEST", 0), squares(40))
    assert values["INPUT.MIN_SIZE_TEST"] == 0


# -- anchors ---------------------------------------------------------------------------------------


def test_anchors_are_for_the_suggested_input(config):
    cfg = config("SmallShapes/cbbl", "INPUT.MIN_SIZE_TEST", 240, "INPUT.MIN_SIZE_TRAIN", "(240,)")
    objects = squares(9, shape=(480, 480))
    larger = suggest(cfg, objects)
    assert larger["INPUT.MIN_SIZE_TEST"] == 864  # 9 px become 16.2
    kept = suggest(cfg, objects, keep_input_size=True)
    assert 16 in sum(larger["MODEL.ANCHOR_GENERATOR.SIZES"], [])
    assert min(sum(kept["MODEL.ANCHOR_GENERATOR.SIZES"], [])) in (4, 5)  # 4.5 px


def test_levels_are_those_of_the_model(config):
    levels = anchor_levels(config())
    assert list(levels.strides) == [4, 8, 16, 32, 64] and levels.divisor == 32
    assert levels.sizes == [[32], [64], [128], [256], [512]]
    assert levels.aspect_ratios == [[0.5, 1.0, 2.0]] * 5
    levels = anchor_levels(config("COCO-Detection/cbbl_faster_rcnn_R_50_C4_1x"))
    assert list(levels.strides) == [16] and levels.sizes == [[32, 64, 128, 256, 512]]
    levels = anchor_levels(config("COCO-Detection/cbbl_retinanet_R_50_FPN_1x"))
    assert list(levels.strides) == [8, 16, 32, 64, 128]
    assert anchor_levels(config("COCO-Detection/cbbl_fcos_R_50_FPN_1x")) is None


def test_a_level_that_the_backbone_lacks(config):
    cfg = config("Base-CBBL-RCNN-FPN", "MODEL.RPN.IN_FEATURES", "['p2', 'p9']")
    with pytest.raises(ConfigError, match="no feature level p9: choose among p2, p3"):
        anchor_levels(cfg)


# -- grids -----------------------------------------------------------------------------------------


def remarks(cfg, objects):
    """Of the grids: the last remark is on the length of the training."""
    return [x.reason for x in suggest_settings(cfg, objects, ["car"]) if not x.values][:-1]


def test_grid_of_the_box_head_is_no_matter_of_the_data(config):
    (remark,) = remarks(config(), squares(40))
    assert "MODEL.CBBL.ALPHA 5" in remark and "offsets of at most 5," in remark
    (remark,) = remarks(config("COCO-Detection/cbbl_cascade_rcnn_R_50_FPN_1x"), squares(40))
    assert "0.5, 0.6, 0.7" in remark and "5, 6.67, 6.43" in remark  # 20 / 3 and 45 / 7
    assert not remarks(config("COCO-Detection/smooth_l1_faster_rcnn_R_50_FPN_1x"), squares(40))


def test_grid_of_the_rpn_is_widened_where_it_has_to_be(config):
    objects = squares(40)
    assert suggest(config("SmallShapes/cbbl_rpn"), objects)["MODEL.CBBL.RPN.ALPHA"] == 2.0
    narrow = config("SmallShapes/cbbl_rpn", "MODEL.CBBL.RPN.ALPHA", 0.01)
    alpha = suggest(narrow, objects)["MODEL.CBBL.RPN.ALPHA"]
    assert 0.25 <= alpha <= 2 and alpha % 0.25 == 0
    assert "MODEL.CBBL.RPN.ALPHA" not in suggest(config(), objects)


# -- detections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, expected", [(1, 100), (66, 100), (67, 150), (300, 450)])
def test_room_for_the_detections_of_the_fullest_image(config, number, expected):
    values = suggest(config(), squares(40, number=number))
    assert values["TEST.DETECTIONS_PER_IMAGE"] == expected
    assert "MODEL.RPN.POST_NMS_TOPK_TEST" not in values  # 1000
    values = suggest(config("SmallShapes/cbbl"), squares(40, number=number))  # 100
    assert values.get("MODEL.RPN.POST_NMS_TOPK_TEST", 100) == expected


def test_yaml_joins_keys_of_a_node():
    values = [({"A.B.C": 1}, "one"), ({}, "remark"), ({"A.D": (2,)}, "two")]
    text = format_yaml([Suggestion(*x) for x in values])
    assert text == "A:\n  B:\n    # one\n    C: 1\n  # two\n  D: (2,)\n# remark"
