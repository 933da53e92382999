import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.export import compare, detect  # noqa: E402

from tests.export.models import busy_model, images  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return busy_model("mask")


def changed(model, **changes):
    """An "exported" model that differs from the original: field -> function of its tensor."""

    def run(image):
        with torch.no_grad():
            found = detect(model, image)
        return [changes.get(name, lambda x: x)(value.clone()) for name, value in found.items()]

    return run


def first(change):
    """The change, of the first object alone."""

    def apply(x):
        x[0] = change(x[0])
        return x

    return apply


def test_the_same_in_another_order(model):
    order = dict.fromkeys(
        ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_boxes_std"),
        lambda x: x.flip(0),
    )
    agreement = compare(model, changed(model, **order), images())
    assert agreement.num_objects > 40 and agreement.boxes == agreement.scores == 0


def test_how_far_they_are_apart_is_told(model):
    run = changed(model, pred_boxes=first(lambda x: x + 0.005), scores=first(lambda x: x + 5e-5))
    agreement = compare(model, run, images()[:1])
    assert agreement.boxes == pytest.approx(0.005, rel=0.01)
    assert agreement.scores == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"pred_boxes": first(lambda x: x + 0.02)},
        {"pred_boxes": first(lambda x: x * float("nan"))},
        {"scores": first(lambda x: x + 2e-4)},
        {"scores": first(lambda x: x * float("nan"))},
        {"pred_classes": first(lambda x: x + 1)},
        {"pred_boxes_std": first(lambda x: x + 0.02)},
        {"pred_masks": first(lambda x: x + 0.01)},
        {"pred_masks": first(lambda x: x * float("nan"))},
        dict.fromkeys(
            ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_boxes_std"),
            lambda x: x[1:],
        ),
        dict.fromkeys(
            ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_boxes_std"),
            lambda x: x[:0],
        ),
    ],
    ids=lambda x: "-".join(x),
)
def test_a_difference_is_found(model, changes):
    where = "nothing written: on an image of 96x128 px"
    what = (
        r"\d+ of \d+ objects .* no counterpart within 0.01 px of boxes, 0.0001 of scores, 0.01 px "
        "of deviations"
    )
    if list(changes) == ["pred_masks"]:
        what = "the masks of the exported model differ by"
    with pytest.raises(UserError, match=f"{where} {what}"):
        compare(model, changed(model, **changes), images()[:1])


def test_what_became_a_constant_is_found(model):
    """A file that always gives what it gave for the image that was traced."""
    traced = changed(model)(images()[0])
    assert compare(model, lambda image: traced, images()[:1]).num_objects > 5
    with pytest.raises(UserError, match="nothing written: on an image of 64x200 px"):
        compare(model, lambda image: traced, images())


def test_a_model_that_fails_on_another_size(model):
    def run(image):
        if image.shape[1] != 96:
            raise RuntimeError("some context\nshapes do not fit")
        return changed(model)(image)

    with pytest.raises(UserError, match="fails on an image of 64x200 px: shapes do not fit"):
        compare(model, run, images())
