import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2")

from cbbl_d2.inference.video import video_writer  # noqa: E402


def read(path):
    video = cv2.VideoCapture(str(path))
    fps, frames = video.get(cv2.CAP_PROP_FPS), []
    while True:
        is_read, frame = video.read()
        if not is_read:
            return fps, frames
        frames.append(frame[:, :, ::-1])


def test_what_is_written_can_be_read(tmp_path):
    path = tmp_path / "new/x.mp4"
    red, blue = np.full((2, 33, 47, 3), ((200, 0, 0),), np.uint8), np.zeros((33, 47, 3), np.uint8)
    blue[:, :, 2] = 200
    with video_writer(str(path), 12, blue.shape) as write:
        write(red[0])
        write(blue)
        write(np.zeros((66, 94, 3), np.uint8))  # resized
    fps, frames = read(path)
    assert fps == 12 and [f.shape for f in frames] == [(34, 48, 3)] * 3  # even sides
    assert np.abs(frames[0].mean((0, 1)) - (200, 0, 0)).max() < 20
    assert np.abs(frames[1].mean((0, 1)) - (0, 0, 200)).max() < 20
    assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]


def test_a_video_that_does_not_get_done_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with video_writer(str(tmp_path / "x.mp4"), float("nan"), (32, 32)) as write:
            write(np.zeros((32, 32, 3), np.uint8))
            raise RuntimeError
    assert not list(tmp_path.iterdir())
