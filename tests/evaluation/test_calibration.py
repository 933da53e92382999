import io
import math

import cv2
import numpy as np
import pytest
from cbbl_d2.errors import UserError
from cbbl_d2.evaluation import calibration
from cbbl_d2.evaluation.calibration import MatchedSides
from cbbl_d2.evaluation.calibration_plot import plot_calibration
from pycocotools.coco import COCO


def drawn(num=20000, scale=(1.0, 1.0, 1.0, 1.0), seed=0):
    """Gaussian errors of ``scale`` times the deviations that are told."""
    rng = np.random.default_rng(seed)
    std = rng.uniform(0.3, 5, (num, 4))
    return MatchedSides(
        errors=rng.normal(size=(num, 4)) * std * scale,
        std=std,
        sizes=rng.uniform(4, 60, num),
        in_first_half=np.arange(num) < num // 2,
        num_detections=2 * num,
    )


def test_gaussian_errors_are_calibrated():
    numbers = calibration.summary(drawn())
    assert numbers["coverage of 68 % intervals"] == pytest.approx(0.683, abs=0.01)
    assert numbers["coverage of 95 % intervals"] == pytest.approx(0.95, abs=0.01)
    assert numbers["expected calibration error"] < 0.01
    for scale in (0.5, 2.0):  # too modest, too sure
        assert calibration.calibration_error(drawn(scale=[scale] * 4)) > 0.1


def test_the_fitted_scale_is_that_of_the_errors():
    scale = (0.5, 1.0, 2.0, 3.0)
    first, second = calibration.halves(drawn(scale=scale))
    fitted = calibration.fit_scale(first)
    assert fitted == pytest.approx(scale, rel=0.05)
    before, after = calibration.summary(second), calibration.summary(second.scaled(fitted))
    assert after["expected calibration error"] < 0.01 < before["expected calibration error"]
    assert after["negative log-likelihood"] < before["negative log-likelihood"] - 0.3
    # A scale for each side changes no rank.
    assert after["Spearman"] == pytest.approx(before["Spearman"])


def test_likelihood_by_hand():
    one = MatchedSides(
        np.array([[2.0, np.nan, np.nan, np.nan]]), np.full((1, 4), 2.0), np.ones(1), np.zeros(1), 1
    )
    expected = math.log(2 * math.sqrt(2 * math.pi)) + 0.5
    # The sides on the border are left out of the deviations' logarithm, too.
    assert calibration.negative_log_likelihood(one) == pytest.approx(expected)


def test_rank_correlation():
    matched = drawn(2000)
    ordered = MatchedSides(
        matched.std**3, matched.std, matched.sizes, matched.in_first_half, matched.num_detections
    )
    assert calibration.spearman(ordered) == pytest.approx([1] * 4)
    unrelated = MatchedSides(
        np.random.default_rng(1).normal(size=(2000, 4)), *list(vars(matched).values())[1:]
    )
    assert np.abs(calibration.spearman(unrelated)).max() < 0.1
    # Ties share a rank, as the definition has it: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    a, b = np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])
    assert calibration._rank_correlation(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_bias_is_shown():
    matched = drawn()
    moved = MatchedSides(matched.errors + [1, 0, -2, 0], *list(vars(matched).values())[1:])
    means = [calibration.summary(moved.side(i))["mean error [px]"] for i in range(4)]
    assert means == pytest.approx([1, 0, -2, 0], abs=0.1)
    assert calibration.summary(moved)["mean error [px]"] == pytest.approx(-0.25, abs=0.1)


def test_a_side_alone():
    matched = drawn(scale=(0.5, 1.0, 2.0, 3.0))
    coverages = [calibration.coverage(matched.side(i), 1.0) for i in range(4)]
    expected = [math.erf(1 / x / math.sqrt(2)) for x in (0.5, 1.0, 2.0, 3.0)]
    assert coverages == pytest.approx(expected, abs=0.01)
    assert calibration.coverage(matched, 1.0) == pytest.approx(np.mean(coverages))
    ranks = [calibration.summary(matched.side(i))["Spearman"] for i in range(4)]
    assert ranks == pytest.approx(calibration.spearman(matched))


@pytest.mark.filterwarnings("error")
def test_sides_on_the_border_do_not_count():
    """Not in any number: here they are those of which the head was least sure."""
    expected, clipped = drawn(400), drawn(400)
    border = np.random.default_rng(1).random((400, 4)) < 0.3
    for matched in (expected, clipped):
        matched.errors[border] = np.nan
    clipped.std[border] = 1e6
    assert calibration.summary(clipped) == pytest.approx(calibration.summary(expected))
    clipped.errors[:] = np.nan
    assert all(math.isnan(x) for x in calibration.summary(clipped).values())
    # A side that no number can be told of leaves the mean of the others.
    clipped = drawn(400)
    clipped.std[:, 0] = 1.0
    ranks = calibration.spearman(clipped)
    assert math.isnan(ranks[0])
    assert calibration.summary(clipped)["Spearman"] == pytest.approx(np.mean(ranks[1:]))


def test_too_few_in_a_half():
    # A side that lies on the border in all of them has no scale.
    clipped = drawn(2000)
    clipped.errors[:, 2] = np.nan
    with pytest.raises(UserError, match="0 and 0 of them"):
        calibration.halves(clipped)
    with pytest.raises(UserError, match="^60 of 120 detections match"):
        calibration.halves(drawn(60))


# -- matching --------------------------------------------------------------------------------------


def coco(annotations, images=((1, None), (2, None))):
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": i, "width": 100, "height": 80, **({} if s is None else {"sequence": s})}
            for i, s in images
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
        "annotations": [
            {
                "id": k,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            for k, (image, category, box, crowd) in enumerate(annotations, 1)
        ],
    }
    truth.createIndex()
    return truth


def detection(image, category, box, score=0.9, std=(0.1, 0.1, 0.2, 0.2)):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "score": score,
        "pred_boxes_std": list(std),
    }


def test_what_matches():
    truth = coco(
        [
            (1, 3, [10, 10, 20, 10], 0),
            (1, 5, [50, 50, 10, 10], 0),
            (2, 3, [0, 20, 10, 10], 0),
            (2, 5, [60, 60, 20, 20], 1),
        ]
    )
    found = [
        detection(1, 3, [11, 10, 20, 12]),
        detection(1, 3, [10, 10, 20, 10], 0.5),  # the object is taken
        detection(1, 3, [50, 50, 10, 10]),  # of another class
        detection(2, 3, [0.2, 20, 10, 9]),  # on the left border
        detection(2, 5, [62, 62, 10, 10]),  # in a crowd
        detection(2, 3, [40, 20, 10, 10]),  # elsewhere
    ]
    matched = calibration.match_sides(truth, found)
    assert len(matched) == 2 and matched.num_detections == 6
    assert matched.errors == pytest.approx(
        np.array([[1, 0, 1, 2], [np.nan, 0, 0.2, -1]]), nan_ok=True
    )
    # Relative to the width and height of the detection.
    assert matched.std == pytest.approx(np.array([[2, 1.2, 4, 2.4], [1, 0.9, 2, 1.8]]))
    assert matched.sizes == pytest.approx([math.sqrt(200), 10])
    # Where the best one is too far off, the next may have the object.
    assert (calibration.match_sides(truth, found, iou=0.85).errors[0] == 0).all()


def test_halves_share_no_sequence_and_depend_on_the_data_set_alone():
    images = [(i, f"sequence {i % 7}") for i in range(1, 141)]
    truth = coco([(i, 3, [10, 10, 20, 10], 0) for i, _ in images for _ in range(2)], images)
    found = [detection(i, 3, [10, 10, 20, 10]) for i, _ in images]
    parts = calibration.halves(calibration.match_sides(truth, found))
    assert [len(part) for part in parts] == [80, 60]
    halves = []
    for chosen in (found, found[::3]):
        matched = calibration.match_sides(truth, chosen)
        of_image = {d["image_id"]: h for d, h in zip(chosen, matched.in_first_half)}
        halves.append(of_image)
        of_sequence = {}
        for image, half in of_image.items():
            assert of_sequence.setdefault(dict(images)[image], half) == half
    assert halves[1].items() <= halves[0].items()


def test_nothing_found_and_no_deviations():
    truth = coco([(1, 3, [10, 10, 20, 10], 0)])
    nothing = calibration.match_sides(truth, [])
    assert len(nothing) == 0
    assert math.isnan(calibration.summary(nothing)["Spearman"])
    with pytest.raises(UserError, match="0 of 0 detections"):
        calibration.halves(nothing)
    without = detection(1, 3, [10, 10, 20, 10])
    del without["pred_boxes_std"]
    with pytest.raises(UserError, match="no pred_boxes_std"):
        calibration.match_sides(truth, [without])
    sure = detection(1, 3, [10, 10, 20, 10], std=(0, 0, 0, 0))
    numbers = calibration.summary(calibration.match_sides(truth, [sure]))
    assert math.isfinite(numbers["negative log-likelihood"])


def test_the_picture_shows_both_versions():
    matched = drawn(300)
    images = []
    for versions in ({"one": matched}, {"one": matched, "two": matched.scaled([2] * 4)}):
        file = io.BytesIO()
        plot_calibration(file, "a $ title", versions)
        data = np.frombuffer(file.getvalue(), np.uint8)
        images.append(cv2.imdecode(data, cv2.IMREAD_COLOR).astype(int))
    assert images[0].shape == images[1].shape
    blue = [((x[..., 0] > 150) & (x[..., 2] < 60)).sum() for x in images]
    assert blue[0] == 0 and blue[1] > 500
