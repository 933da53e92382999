import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.visualization import (  # noqa: E402
    ClassStyle,
    contact_sheet,
    draw_boxes,
    draw_instances,
    draw_masks,
    draw_pair,
    enlarge,
    enlargement,
    shrink,
)
from detectron2.data.catalog import Metadata  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402

RED, GREY = (1.0, 0.0, 0.0), 200


def plain(height, width):
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def annotation(box, label=0, **more):
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, **more}


def instances(boxes, classes, scores, size=(100, 100)):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    result.scores = torch.tensor(scores, dtype=torch.float32)
    return result


def has_color(picture, color, tolerance=8):
    difference = np.abs(picture.astype(int) - np.round(np.multiply(color, 255)))
    return (difference.max(axis=2) <= tolerance).any()


@pytest.mark.parametrize(
    "shape, factor",
    [
        ((160, 160), 4),  # 640, and 3 would give 480
        ((480, 640, 3), 2),
        ((600, 900), 1),
        ((599, 900), 2),
        ((3000, 4000), 1),
        ((3000, 9000), 1),
        ((40, 700), 5),  # 15 would be 10500 pixels wide
        ((1, 1), 600),
    ],
)
def test_enlargement(shape, factor):
    assert enlargement(shape) == factor


def test_enlarging_by_a_whole_factor_repeats_the_pixels():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(enlarge(image, 3), image.repeat(3, axis=0).repeat(3, axis=1))
    assert np.array_equal(enlarge(image, 1), image)
    assert enlarge(image, 2.5).shape == (12, 18, 3)
    assert enlarge(image, 0.5).shape == (2, 4, 3)


@pytest.mark.parametrize("scale", [1e5, 1e-3])
def test_an_impossible_scale_is_named(scale):
    with pytest.raises(UserError, match="scale .* makes a picture of"):
        enlarge(plain(20, 30), scale)


def test_a_box_changes_the_pixels_along_its_edges_alone():
    x0, y0, x1, y1 = 100, 60, 180, 120
    drawn = draw_boxes(plain(200, 300), np.array([[x0, y0, x1, y1]]), [" "], [RED])
    changed = (drawn != GREY).any(axis=2)
    changed[: y0 - 3, :] = False  # where the label may be
    near = np.zeros_like(changed)
    near[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = True
    near[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] = False
    assert not changed[~near].any()
    for y, x in [(y0, 140), (y1, 140), (90, x0), (90, x1)]:
        # A line is two pixels wide or so: its middle lies between two of them.
        assert has_color(drawn[y - 1 : y + 1, x - 1 : x + 1], RED, tolerance=60)


def test_nothing_is_drawn_for_no_boxes():
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert np.array_equal(draw_boxes(image, np.zeros((0, 4)), [], []), image)


def test_labels_cover_neither_objects_nor_each_other():
    """On a grid with room above every object, all that changes inside the objects is the edge."""
    boxes = np.array([[x, y, x + 30, y + 30] for y in (40, 140, 240) for x in (10, 120, 260)])
    drawn = draw_boxes(plain(300, 300), boxes, ["object 99%"] * 9, [RED] * 9)
    for x0, y0, x1, y1 in boxes:
        assert (drawn[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] == GREY).all()
        assert (drawn[y0 - 15 : y0 - 5, max(x0 - 30, 0) : x1] < 100).any()  # the label's ground


def test_labels_of_equal_boxes_have_places_of_their_own():
    drawn = draw_boxes(plain(200, 200), np.array([[60, 80, 140, 120]] * 3), ["abc"] * 3, [RED] * 3)
    drawn[76:124, 56:144] = GREY
    # The ground of one label has the value 40; where two lie on each other it is 8.
    assert (drawn < 50).any() and drawn.min() > 30


def test_labels_without_room_are_left_out():
    boxes = np.array([[x, y, x + 9, y + 9] for y in range(0, 100, 10) for x in range(0, 100, 10)])
    drawn = draw_boxes(plain(100, 100), boxes, ["a long label"] * 100, [RED] * 100)
    without = draw_boxes(plain(100, 100), boxes, [" "] * 100, [RED] * 100)
    assert np.array_equal(drawn, without)


def test_a_pair_has_both_panels_at_the_scaled_positions():
    metadata = Metadata(thing_classes=["a", "b"])
    style = ClassStyle(metadata)
    box, other = [10.0, 20.0, 30.0, 50.0], [60.0, 60.0, 90.0, 80.0]
    picture = draw_pair(
        plain(100, 100),
        [annotation(box, 0)],
        instances([other], [1], [0.9]),
        metadata,
        scale=4,
        name="x.png",
    )
    gap = picture.shape[1] - 2 * 400
    caption = picture.shape[0] - 400
    assert 0 < gap < 40 and 20 < caption < 100
    truth, found = picture[caption:, :400], picture[caption:, -400:]
    for panel, (x0, y0, x1, y1), label in [(truth, box, 0), (found, other, 1)]:
        for y, x in [(y0, (x0 + x1) / 2), (y1, (x0 + x1) / 2), ((y0 + y1) / 2, x0)]:
            y, x = int(4 * y), int(4 * x)
            assert has_color(panel[y - 1 : y + 1, x - 1 : x + 1], style.color(label), 60)
        assert not has_color(panel, style.color(1 - label))
    assert (truth[240:320, 240:360] == GREY).all() and (found[80:200, 40:120] == GREY).all()
    # The captions' squares have the same colors.
    assert has_color(picture[:caption, :400], style.color(0))
    assert has_color(picture[:caption, -400:], style.color(1))


def test_a_pair_takes_its_boxes_in_any_mode_and_enlarges_by_itself():
    image = plain(150, 200)
    as_corners = [annotation([10, 20, 30, 50])]
    as_size = [{"bbox": [10, 20, 20, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    first, second = (draw_pair(image, a, None) for a in (as_corners, as_size))
    assert np.array_equal(first, second)
    assert first.shape[1] == 4 * 200 and first.shape[0] > 4 * 150


def test_predictions_alone_are_the_panel_of_a_pair():
    found = instances([[10, 20, 30, 50]], [1], [0.9])
    found.pred_masks = torch.from_numpy(ring_mask())[None]
    found.pred_keypoints = torch.tensor(POINTS).reshape(1, 4, 3)
    image = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    for scale, height in ((None, 700), (1.5, 150)):
        drawn = draw_instances(image, found, POINTS_METADATA, scale)
        assert len(drawn) == height
        pair = draw_pair(image, None, found, POINTS_METADATA, scale)
        assert np.array_equal(pair[-height:], drawn)


def test_a_side_that_is_not_there_is_left_out():
    image, found = plain(100, 100), instances([], [], [])
    assert draw_pair(image, None, found, scale=1).shape[1] == 100
    assert draw_pair(image, [], None, scale=1).shape[1] == 100
    assert draw_pair(image, [], found, scale=1).shape[1] > 200
    with pytest.raises(ValueError, match="neither"):
        draw_pair(image, None, None)


RING = [[20, 20, 80, 20, 80, 80, 20, 80, 20, 20, 40, 40, 40, 60, 60, 60, 60, 40, 40, 40]]
POINTS = [20.0, 50.0, 2, 50.0, 20.0, 2, 80.0, 50.0, 2, 0.0, 0.0, 0]  # the last one is not labeled
POINTS_METADATA = Metadata(
    keypoint_names=list("abcd"),
    keypoint_connection_rules=[("a", "b", (0, 0, 255)), ("c", "d", (0, 0, 255))],
)


def ring_mask(size=100):
    mask = np.zeros((size, size), dtype=bool)
    mask[20:80, 20:80] = True
    mask[40:60, 40:60] = False
    return mask


def test_masks_tint_their_own_pixels_alone():
    mask = ring_mask()
    drawn = draw_masks(plain(200, 200), [mask, None], [RED, RED])
    inside = mask.repeat(2, axis=0).repeat(2, axis=1)
    assert (drawn[~inside] == GREY).all() and (drawn[inside] != GREY).all()
    assert (drawn[40, 40:160] == (255, 0, 0)).all()  # the edge is solid
    assert 100 < drawn[60, 60, 1] < GREY - 50  # within, the image can be seen
    assert (plain(200, 200) == GREY).all()


@pytest.mark.parametrize("as_polygons", [True, False])
def test_masks_of_both_sides_are_drawn_with_their_hole(as_polygons):
    segmentation = RING
    if not as_polygons:
        segmentation = mask_util.encode(np.asfortranarray(ring_mask().astype(np.uint8)))
    found = instances([[20, 20, 80, 80]], [0], [0.9])
    found.pred_masks = torch.from_numpy(ring_mask())[None]
    truth = [annotation([20, 20, 80, 80], segmentation=segmentation), annotation([1, 1, 9, 9])]
    picture = draw_pair(plain(100, 100), truth, found, scale=2)
    expected = ring_mask().repeat(2, axis=0).repeat(2, axis=1)
    clear = np.zeros_like(expected)
    clear[45:155, 45:155] = True  # off the box, its label and the small object
    for panel in (picture[-200:, :200], picture[-200:, -200:]):
        tinted = (panel != GREY).any(axis=2)
        assert (tinted[clear] == expected[clear]).mean() > 0.97
        assert not tinted[90:110, 90:110].any()


def test_keypoints_of_both_sides_are_drawn_and_connected():
    found = instances([[20, 20, 80, 80]], [0], [0.9])
    found.pred_keypoints = torch.tensor(POINTS).reshape(1, 4, 3)
    found.pred_keypoints[:, :, 2] *= 0.01  # the model is not sure, and they are drawn all the same
    truth = [annotation([20, 20, 80, 80], keypoints=POINTS), annotation([1, 1, 9, 9])]
    picture = draw_pair(plain(100, 100), truth, found, POINTS_METADATA, scale=4)
    for panel in (picture[-400:, :400], picture[-400:, -400:]):
        for x, y in ((20, 50), (50, 20), (80, 50)):
            assert has_color(panel[4 * y - 2 : 4 * y + 2, 4 * x - 2 : 4 * x + 2], RED)
        assert has_color(panel[135:145, 135:145], (0, 0, 1), 80)  # halfway between the first two
        assert (panel[210:310, 90:310] == GREY).all()


def test_masks_and_keypoints_are_drawn_where_the_model_predicts_them():
    plain_truth = [annotation([20, 20, 80, 80])]
    truth = [annotation([20, 20, 80, 80], segmentation=RING, keypoints=POINTS)]
    found = instances([], [], [])
    of_boxes, same = (draw_pair(plain(100, 100), x, found, scale=2) for x in (plain_truth, truth))
    assert np.array_equal(of_boxes, same)
    alone = draw_pair(plain(100, 100), truth, None, scale=2)
    assert not np.array_equal(alone, of_boxes[:, :200])
    found.pred_masks = torch.zeros(0, 100, 100, dtype=torch.bool)
    found.pred_keypoints = torch.zeros(0, 4, 3)
    assert np.array_equal(draw_pair(plain(100, 100), truth, found, scale=2)[:, :200], alone)


def test_very_wide_images_are_stacked():
    picture = draw_pair(plain(50, 300), [], instances([], [], []), scale=2)
    assert picture.shape[1] == 600 and picture.shape[0] > 200


def test_crowd_regions_are_dashed():
    plain_box, crowd = (
        draw_pair(plain(200, 200), [annotation([50, 50, 150, 150], iscrowd=c)], None, scale=1)
        for c in (0, 1)
    )
    edge = slice(-51, -49)  # the lower edge of the box, from below
    ink = [(p[edge, 55:145] != GREY).any(axis=(0, 2)).mean() for p in (plain_box, crowd)]
    assert ink[0] == 1 and 0.2 < ink[1] < 1


def test_rotated_boxes_are_refused():
    annotations = [annotation([10, 10, 5, 5, 30])]
    with pytest.raises(UserError, match="x.png: only axis-aligned"):
        draw_pair(plain(20, 20), annotations, None, name="x.png")


@pytest.mark.parametrize("name", ["100$ and 200$", r"$\frac$", "a" * 300, "", "日本"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text_and_nothing_else(name):
    metadata = Metadata(thing_classes=[name])
    picture = draw_pair(plain(40, 60), [annotation([5, 5, 15, 15])], None, metadata, 2, name=name)
    assert picture.shape[1] == 120


def test_class_style():
    style = ClassStyle(Metadata(thing_classes=["a", "b"]))
    assert [style.name(i) for i in range(3)] == ["a", "b", "class 2"]
    assert ClassStyle().name(0) == "class 0"
    assert len({ClassStyle().color(i) for i in range(10)}) == 10
    assert style.color(0) == ClassStyle().color(0)

    names = [str(i) for i in range(12)]
    colors = [(i, 0, 255) for i in range(12)]
    metadata = Metadata(thing_classes=names, thing_colors=colors)
    assert ClassStyle(metadata).color(3) == (3 / 255, 0, 1)
    assert metadata.as_dict() == {"thing_classes": names, "thing_colors": colors}
    many = ClassStyle(Metadata(thing_classes=names))
    assert len({many.color(i) for i in range(12)}) == 12


def test_shrink_never_enlarges():
    assert shrink(plain(30, 60), 30).shape == (15, 30, 3)
    assert shrink(plain(30, 60), 90).shape == (30, 60, 3)


@pytest.mark.parametrize("number", [1, 2, 5, 12])
def test_a_contact_sheet_holds_every_picture(number):
    shades = [20 * i for i in range(number)]
    pictures = [np.full((60 + 5 * i, 130, 3), s, np.uint8) for i, s in enumerate(shades)]
    sheet = contact_sheet(pictures)
    assert max(sheet.shape) <= 3000
    for picture, shade in zip(pictures, shades, strict=True):
        assert (sheet == shade).all(axis=2).sum() == picture.shape[0] * picture.shape[1]


def test_a_contact_sheet_has_a_sensible_size():
    sheet = contact_sheet([plain(690, 1290)] * 40 + [plain(3000, 20000), plain(3, 2)], 1000)
    height, width, _ = sheet.shape
    assert 900 < max(height, width) <= 1000 and 0.5 < width / height < 1.2
    assert (sheet == GREY).all(axis=2).mean() > 0.8


def test_bands_of_the_deviations():
    image = np.zeros((100, 200, 3), dtype=np.uint8)
    red = (1.0, 0.0, 0.0)
    box = np.array([[50.0, 30, 150, 70]])
    plain = draw_boxes(image, box, [""], [red]).astype(int)
    banded = draw_boxes(image, box, [""], [red], deviations=np.array([[20.0, 10, 5, 15]])).astype(
        int
    )
    tinted = np.abs(banded - plain).sum(axis=2) > 20
    rows, columns = np.nonzero(tinted)
    # Out by a deviation, and in.
    assert (columns.min(), columns.max() + 1) == pytest.approx((30, 155), abs=1)
    assert (rows.min(), rows.max() + 1) == pytest.approx((20, 85), abs=1)
    assert not tinted[42:53, 72:143].any()
    assert tinted[50, 33:47].all() and tinted[50, 53:68].all()
    # Of detections they are relative to the width and height of the box.
    found = instances(box.tolist(), [0], [0.9], (100, 200))
    found.pred_boxes_std = torch.tensor([[0.2, 0.25, 0.05, 0.375]])
    drawn, expected = (
        draw_instances(image, found, Metadata(), scale=1, uncertainty=True),
        draw_boxes(
            image,
            box,
            [f"{ClassStyle(Metadata()).name(0)} 90%"],
            [ClassStyle(Metadata()).color(0)],
            deviations=np.array([[20.0, 10, 5, 15]]),
        ),
    )
    assert np.array_equal(drawn, expected)
    # As wide as the box: nothing is left out in the middle.
    wide = draw_boxes(image, box, [""], [red], deviations=np.full((1, 4), 60.0)).astype(int)
    assert (np.abs(wide - image)[35:65, 60:140].sum(axis=2) > 20).all()
    nothing = np.zeros((0, 4))
    assert np.array_equal(draw_boxes(image, nothing, [], [], deviations=nothing), image)
