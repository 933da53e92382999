import errno
import io
import logging
import pickle
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data.broken_images import (  # noqa: E402
    BROKEN_IMAGE_ERRORS,
    NameBrokenImage,
    SkipBrokenImages,
    missing_images,
)
from cbbl_d2.errors import UserError  # noqa: E402
from detectron2.data import (  # noqa: E402
    DatasetFromList,
    DatasetMapper,
    build_detection_train_loader,
    detection_utils,
)
from PIL import Image  # noqa: E402

SIZE = 200  # noise of this size fills several chunks of a PNG
LOGGER = "cbbl_d2.data.broken_images"


def _encoded(image_format):
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, image_format)
    return buffer.getvalue()


def _png_with_damaged_chunk():
    data = bytearray(_encoded("PNG"))
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    data[second : second + 4] = b"\x00AAA"
    return bytes(data)


def _of_another_size():
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE + 1)).save(buffer, "PNG")
    return buffer.getvalue()


def _claiming_gigapixels():
    data = bytearray(_encoded("BMP"))
    data[18:26] = struct.pack("<ii", 60000, 60000)
    return bytes(data)


def _ppm_with_damaged_header():
    return _encoded("PPM").replace(b"200", b"2\xaf0", 1)


BROKEN = {
    "missing": (None, FileNotFoundError),
    "empty": (lambda: b"", Image.UnidentifiedImageError),
    "text": (lambda: b"<html>404 Not Found</html>", Image.UnidentifiedImageError),
    "truncated.png": (lambda: _encoded("PNG")[:70000], OSError),
    "truncated.jpg": (lambda: _encoded("JPEG")[:5000], OSError),
    "damaged_chunk.png": (_png_with_damaged_chunk, SyntaxError),
    "other_size.png": (_of_another_size, detection_utils.SizeMismatchError),
    "gigapixels.bmp": (_claiming_gigapixels, Image.DecompressionBombError),
    # Not in BROKEN_IMAGE_ERRORS, as a ValueError can be a bug: found by reading again.
    "damaged_header.ppm": (_ppm_with_damaged_header, ValueError),
}


@pytest.fixture
def mapper():
    return DatasetMapper(False, augmentations=[], image_format="BGR")


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.name == LOGGER]


def write(folder, name, content):
    path = folder / name
    if content is not None:
        path.write_bytes(content)
    return str(path)


def record(file_name, image_id=0):
    return {"file_name": file_name, "image_id": image_id, "width": SIZE, "height": SIZE}


@pytest.fixture
def make_dataset(tmp_path, mapper):
    """``make_dataset("ok", "broken", ...)``: a SkipBrokenImages whose items are such files."""

    def make(*kinds, mapper=mapper):
        good = _encoded("JPEG")
        records = [
            record(write(tmp_path, f"{i}.jpg", good if kind == "ok" else good[:5000]), i)
            for i, kind in enumerate(kinds)
        ]
        return SkipBrokenImages(DatasetFromList(records, copy=False), mapper)

    return make


def test_missing_images(tmp_path):
    there, missing = write(tmp_path, "there.png", b""), str(tmp_path / "missing.png")
    dicts = [record(there), record(missing), record(str(tmp_path)), {"image_id": 3}]
    assert missing_images(dicts) == [missing, str(tmp_path)]


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_broken_image(tmp_path, mapper, log, name):
    make, error = BROKEN[name]
    bad = record(write(tmp_path, name, make and make()), 1)
    good = record(write(tmp_path, "good.png", _encoded("PNG")), 2)
    with pytest.raises(error) as info:
        mapper(bad)
    assert isinstance(info.value, BROKEN_IMAGE_ERRORS) == (name != "damaged_header.ppm")

    dataset = SkipBrokenImages(DatasetFromList([bad, good], copy=False), mapper)
    assert dataset[0]["image_id"] == 2
    (message,) = log()
    assert message.startswith(f"Skipping the image {tmp_path / name}: ")
    assert message.endswith(" (broken images so far: 1)") and "\n" not in message

    with pytest.raises(UserError) as info:
        NameBrokenImage(mapper)(bad)
    message = str(info.value)
    assert message.startswith(f"cannot evaluate without the image {tmp_path / name} (")
    assert "restore the file or take it out of the annotation file" in message
    assert "\n" not in message and " ()" not in message


def test_all_truncations_of_an_image_are_recognized(tmp_path, mapper):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "JPEG")
    data = buffer.getvalue()
    for length in range(0, len(data) - 2, 7):  # the last two bytes only mark the end
        path = write(tmp_path, "cut.jpg", data[:length])
        with pytest.raises(UserError, match="cut.jpg"):
            NameBrokenImage(mapper)({"file_name": path, "width": 40, "height": 40})


def test_sound_images_are_mapped_as_without_the_wrapper(make_dataset, mapper, log):
    dataset = make_dataset("ok", "ok")
    assert len(dataset) == 2
    for i in range(2):
        expected = mapper(dataset._dataset[i])
        for item in (dataset[i], NameBrokenImage(mapper)(dataset._dataset[i])):
            assert item.keys() == expected.keys()
            assert torch.equal(item.pop("image"), expected["image"])
            assert all(item[key] == expected[key] for key in item)
    assert not log()


def test_next_image_takes_the_place(make_dataset, log):
    dataset = make_dataset("broken", "ok", "broken", "broken", "ok", "broken")
    for _ in range(2):  # the same each time
        assert [dataset[i]["image_id"] for i in range(6)] == [1, 1, 4, 4, 4, 1]
    # Once for each file, with a running count.
    assert [m.rpartition(" ")[2] for m in log()] == ["1)", "2)", "3)", "4)"]


def test_indices_of_other_integer_types(make_dataset):
    dataset = make_dataset("ok", "broken", "ok")
    assert dataset[np.int64(1)]["image_id"] == 2
    assert dataset[torch.tensor(1)]["image_id"] == 2


def test_all_images_broken(make_dataset):
    with pytest.raises(UserError) as info:
        make_dataset("broken", "broken", "broken")[1]
    message = str(info.value)
    assert message.startswith("3 images in a row cannot be used, the last is ")
    assert "0.jpg (" in message and "truncated" in message.lower() and "\n" not in message


def test_stops_after_a_hundred_in_a_row(make_dataset):
    tried = []

    def mapper(record):
        tried.append(record["image_id"])
        raise OSError("gone")

    with pytest.raises(UserError, match="100 images in a row"):
        make_dataset(*["broken"] * 150, mapper=mapper)[120]
    assert tried == [*range(120, 150), *range(70)]


def test_mapper_that_leaves_items_out(make_dataset, log):
    dataset = make_dataset("ok", "ok", mapper=lambda r: r if r["image_id"] == 1 else None)
    assert dataset[0]["image_id"] == 1
    assert not log()  # nothing is broken
    with pytest.raises(UserError, match="2 images in a row cannot be used.*leaves it out"):
        make_dataset("ok", "ok", mapper=lambda r: None)[0]


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), KeyError("a bug"), OSError(errno.EMFILE, "too many open files")],
)
def test_other_errors_are_not_hidden(make_dataset, error):
    def mapper(record):
        raise error

    dataset = make_dataset("ok", "ok", mapper=mapper)
    with pytest.raises(type(error)) as info:
        dataset[0]
    assert info.value is error
    with pytest.raises(type(error)) as info:
        NameBrokenImage(mapper)(dataset._dataset[0])
    assert info.value is error


def test_a_user_error_of_the_mapper_stays_what_it_is(make_dataset):
    def mapper(record):
        raise UserError("mine")

    with pytest.raises(UserError, match="^mine$"):
        make_dataset("broken", "ok", mapper=mapper)[0]


def test_in_the_workers_of_a_training_loader(make_dataset, tmp_path):
    dataset = make_dataset("ok", "broken", "broken", "ok")
    loader = build_detection_train_loader(
        dataset, mapper=None, total_batch_size=2, num_workers=2, aspect_ratio_grouping=False
    )
    batches = iter(loader)
    ids = {item["image_id"] for _ in range(8) for item in next(batches)}
    assert ids == {0, 3}
    # Counted across processes.
    assert dataset._is_broken.tolist() == [False, True, True, False]


def test_pickles(make_dataset, mapper):
    dataset = pickle.loads(pickle.dumps(make_dataset("broken", "ok")))
    assert dataset[0]["image_id"] == 1
    bad = record("none.png")
    with pytest.raises(UserError, match="none.png"):
        pickle.loads(pickle.dumps(NameBrokenImage(mapper)))(bad)


def test_reason_is_one_line(tmp_path):
    def mapper(record):
        raise OSError("two\n  lines")

    with pytest.raises(UserError, match=r"a.png \(two lines\): restore"):
        NameBrokenImage(mapper)(record(str(tmp_path / "a.png")))
