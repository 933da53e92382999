import logging
import os

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.inference.frames import Frame, batches, count_frames, read_frames  # noqa: E402
from cbbl_d2.inference.sources import Source  # noqa: E402


def read(paths, names=None):
    skipped = []
    records = [{"file_name": str(p)} for p in paths]
    names = names or [os.path.basename(p) for p in paths]
    return list(read_frames(Source(records, names), skipped.append)), skipped


def make_video(path, frames, fps=8):
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    return str(path)


def test_images_are_turned_as_their_exif_data_say(tmp_path):
    """Orientation 6: the rows of the file are the columns of the picture, from the right."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0] = (200, 100, 0)  # RGB; the upper row becomes the right column
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    (frame,), _ = read([tmp_path / "x.png"])
    assert frame.image.shape == (8, 4, 3)
    assert (frame.image[:, -1] == (200, 100, 0)).all() and not frame.image[:, :-1].any()


def test_frames_of_videos_are_numbered_and_in_rgb(tmp_path):
    colors = [(0, 0, 250), (0, 250, 0), (250, 0, 0)]  # BGR
    frames = [np.full((32, 48, 3), color, np.uint8) for color in colors]
    path = make_video(tmp_path / "clip.mp4", frames)
    frames, skipped = read([path])
    assert [f.file_name for f in frames] == [f"clip/frame_00000{i}.png" for i in range(3)]
    for frame, color in zip(frames, colors):
        assert np.abs(frame.image.mean((0, 1)) - color[::-1]).max() < 20
    assert frames[0].fps == 8 and frames[0].video == path and not skipped
    assert count_frames(Source([{"file_name": path}, {"file_name": "x.png"}], ["", ""])) == 4


def test_files_that_cannot_be_read_are_one_line_each(make_image, tmp_path):
    good = make_image(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "no.mp4").write_bytes(b"no video")
    paths = [tmp_path / x for x in ("cut.png", "empty.jpg", "no.mp4", "gone.png", "good.png")]
    frames, skipped = read(paths)
    assert [(f.index, f.file_name) for f in frames] == [(0, "good.png")]
    assert [line.partition(": ")[0] for line in skipped] == [str(p) for p in paths[:4]]
    assert not any("\n" in line for line in skipped)


def test_an_image_of_another_size_than_annotated_is_skipped(make_image, tmp_path):
    path = make_image(tmp_path / "x.png", 40, 60)
    record = {"file_name": str(path), "image_id": 1, "height": 60, "width": 40}
    skipped = []
    assert not list(read_frames(Source([record], ["x.png"]), skipped.append))
    assert len(skipped) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batches_are_of_one_size_and_lose_nothing(batch_size):
    rng = np.random.default_rng(0)
    sizes = [(2 + int(i), 3) for i in rng.integers(0, 6, 50)]
    frames = [Frame(i, "", np.zeros((*size, 3))) for i, size in enumerate(sizes)]
    read_so_far = []

    def reading():
        for frame in frames:
            read_so_far.append(frame)
            yield frame

    given = []
    for batch in batches(reading(), batch_size):
        assert 1 <= len(batch) <= batch_size
        assert len({f.image.shape for f in batch}) == 1
        given += batch
        # What waits is bounded: images can be large.
        assert len(read_so_far) - len(given) <= 4 * batch_size
    assert sorted(f.index for f in given) == list(range(50))
    for size in set(sizes):
        indices = [f.index for f in given if f.image.shape[:2] == size]
        assert indices == sorted(indices)


def test_images_of_more_than_8_bits_are_skipped(tmp_path):
    """Detectron2 reads every value over 255 as white; a file of no bytes is no image at all."""
    deep, shallow, empty = (tmp_path / x for x in ("deep.tif", "shallow.tif", "empty.png"))
    values = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(values * 100).save(deep)
    Image.fromarray(values % 256).save(shallow)  # 16 bits in the file, 8 of them used
    empty.write_bytes(b"")
    frames, skipped = read([deep, shallow, empty])
    assert [f.file_name for f in frames] == ["shallow.tif"]
    assert (frames[0].image[:, :, 0] == values % 256).all()
    assert skipped == [
        f"{deep}: has values over 255, which Detectron2 reads as 255, white: convert the images to "
        "8 bits, values from 0 to 255",
        f"{empty}: not an image",
    ]


def test_a_frame_knows_its_file(make_image, tmp_path):
    """By the place in the source, whatever was skipped, and with what a data set says of it."""
    (tmp_path / "cut.png").write_bytes(b"")
    clip = make_video(tmp_path / "clip.mp4", [np.zeros((32, 48, 3), np.uint8)] * 2)
    record = {"file_name": str(make_image(tmp_path / "a.png")), "annotations": []}
    records = [{"file_name": str(tmp_path / "cut.png")}, {"file_name": clip}, record]
    frames = list(read_frames(Source(records, ["cut.png", "clip.mp4", "a.png"]), [].append))
    assert [f.source_index for f in frames] == [1, 1, 2] and [f.index for f in frames] == [0, 1, 2]
    assert frames[0].record is None and frames[2].record is record


def test_videos_that_are_not_taken_are_files_that_cannot_be_read(tmp_path):
    path = make_video(tmp_path / "clip.mp4", [np.zeros((32, 48, 3), np.uint8)])
    skipped = []
    source = Source([{"file_name": path}], ["clip.mp4"], takes_videos=False)
    assert not list(read_frames(source, skipped.append)) and skipped == [f"{path}: not an image"]
    assert count_frames(source) == 1


def test_the_first_page_is_used_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    pages = [Image.new("RGB", (30, 20), (value,) * 3) for value in (10, 20)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    frames, skipped = read([tmp_path / "x.tif"])
    assert not skipped and (frames[0].image == 10).all()
    assert any("x.tif: has 2 pages, of which the first" in r.getMessage() for r in caplog.records)
