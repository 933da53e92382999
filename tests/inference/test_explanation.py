import cv2
import numpy as np
import pytest
import torch
from cbbl_d2.errors import UserError
from cbbl_d2.inference.explanation import Explanations, Target, check_targets
from cbbl_d2.inference.frames import Frame
from cbbl_d2.inference.names import relative_names
from cbbl_d2.inference.sources import Source
from cbbl_d2.visualization import ClassStyle
from detectron2.structures import Boxes, BoxMode, Instances

DELTAS = ("center x", "center y", "width", "height")


def instances(num=2):
    """The first has the lower score."""
    return Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[10.0, 10, 20, 18], [40, 20, 60, 50]])[:num]),
        scores=torch.tensor([0.6, 0.9])[:num],
        pred_classes=torch.zeros(num, dtype=torch.int64),
        pred_boxes_std=torch.full((num, 4), 0.1),
        offset_probabilities=torch.full((num, 4, 3), 1 / 3),
        offset_coordinates=torch.rand(num, 4, 3, generator=torch.Generator().manual_seed(0)),
    )


def frame(name="a/b.png", record=None, **kwargs):
    return Frame(0, name, np.full((60, 80, 3), 99, dtype=np.uint8), record, **kwargs)


def source(*files):
    return Source([{"file_name": x} for x in files], relative_names(files, "/data"))


def explanations(folder, *targets, files=("/data/a/b.png",), **kwargs):
    targets = [Target.parse(x) for x in targets]
    return Explanations(str(folder), targets, source(*files), DELTAS, ClassStyle(), **kwargs)


@pytest.mark.parametrize("name", ("b.png", "a/b.png", "/data/a/b.png", "/data/x/../a/b.png"))
def test_an_image_by_any_of_its_names(tmp_path, name):
    explained, found = explanations(tmp_path, f"{name}:0", f"{name}:1"), instances()
    explained.take(frame(), found)
    explained.finish()
    assert explained.written == [str(tmp_path / "b_0.png"), str(tmp_path / "b_1.png")]
    pictures = [cv2.imread(x) for x in explained.written]
    assert not np.array_equal(*pictures)
    # What no other format can hold is gone, all else is there.
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_boxes_std"}


def test_the_best_score_is_the_first(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "cbbl_d2.inference.explanation.plot_explanation",
        lambda file, frame, detection, *args: seen.append(detection.scores.item()),
    )
    explanations(tmp_path, "b.png:0", "b.png:1").take(frame(), instances())
    assert seen == pytest.approx([0.9, 0.6])


def test_each_coordinate_has_its_own_distribution(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *args, **kwargs: figures.append(self)
    )
    found = instances()
    found.offset_probabilities = torch.rand(2, 4, 3).softmax(dim=2)
    expected = (
        found.offset_probabilities[1],
        found.offset_coordinates[1] * torch.tensor([[80.0], [60], [80], [60]]),
    )
    explanations(tmp_path, "b.png:0", box_label="voted").take(frame(), found)
    axes = figures[0].axes[1:]
    assert [x.get_title() for x in axes] == list(DELTAS)
    for i, (one, value) in enumerate(zip(axes, (50, 35, 20, 30), strict=True)):
        points, box = one.lines
        assert points.get_ydata() == pytest.approx(expected[0][i].numpy())
        assert points.get_xdata() == pytest.approx(expected[1][i].numpy())
        assert box.get_xdata()[0] == value and box.get_label() == "voted"


def green(path):
    picture = cv2.imread(str(path)).astype(int)
    blue, green, red = np.moveaxis(picture, -1, 0)
    return ((green > 120) & (red < 60) & (blue < 140)).sum()


def test_the_ground_truth_of_a_data_set_is_drawn_where_it_is_the_same_object(tmp_path):
    def record(box):
        bbox = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        return {"file_name": "/data/a/b.png", "annotations": [bbox]}

    counts = []
    for box in ([42, 20, 60, 50], [0, 0, 10, 10]):
        explanations(tmp_path, "b.png:0").take(frame(record=record(box)), instances())
        counts.append(green(tmp_path / "b_0.png"))
    assert counts[0] > 300 and counts[1] == 0


def test_a_frame_of_a_video(tmp_path):
    explained = explanations(tmp_path, "clip/frame_000003.png:0", files=("/data/clip.mp4",))
    for number in range(5):
        name = f"clip/frame_{number:06d}.png"
        explained.take(frame(name, video="/data/clip.mp4"), instances())
    assert explained.written == [str(tmp_path / "clip_frame_000003_0.png")]


def test_errors(tmp_path):
    for text in ("b.png", ":1", "b.png:", "b.png:-1", "b.png:x"):
        with pytest.raises(ValueError):
            Target.parse(text)
    assert Target.parse("C:/a:b.png:12") == Target("C:/a:b.png", 12)

    # The rest is predicted and written first.
    explained = explanations(tmp_path, "b.png:2")
    explained.take(frame(), instances())
    with pytest.raises(UserError, match="b.png:2: a/b.png has 2 detections, counted from 0"):
        explained.finish()
    with pytest.raises(UserError, match="clip/frame_000009.png:0: no such image was read"):
        explanations(tmp_path, "clip/frame_000009.png:0").finish()
    assert not list(tmp_path.iterdir())


def test_images_are_looked_for_before_the_prediction():
    files = ("/data/a/b.png", "/data/c/b.png", "/data/c/d.png")
    for name in ("a/b.png", "/data/c/b.png", "d.png"):
        check_targets([Target.parse(f"{name}:0")], source(*files))
    for name, message in (("b.png", "2 images are called so"), ("e.png", "no such image among")):
        with pytest.raises(UserError, match=message):
            check_targets([Target.parse(f"{name}:0")], source(*files))
    # The frames of a video are counted while it is read.
    check_targets([Target.parse("x/frame_000000.png:0")], source("/data/x.mp4"))
