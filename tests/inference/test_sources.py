import pytest

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference.sources import (  # noqa: E402
    IMAGE_TYPES,
    find_files,
    find_source,
    spread,
)


def test_files_folders_and_patterns(make_image, tmp_path):
    a, b = make_image(tmp_path / "in/a.png"), make_image(tmp_path / "in/B.JPG")
    (tmp_path / "in/notes.txt").write_text("no image")
    c = make_image(tmp_path / "c.png")
    found = find_files([str(c), str(tmp_path / "in"), str(a), str(tmp_path / "in/*.png")])
    assert found == [str(c), str(b), str(a)]


def test_words_that_stand_for_nothing(tmp_path):
    with pytest.raises(UserError, match="no such"):
        find_files([str(tmp_path / "*.png")])
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="no images or videos in this folder"):
        find_files([str(tmp_path / "void")])


def test_spread():
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2] == spread([1, 2], None)


def test_a_source_stays_together_when_it_is_spread(make_image, tmp_path):
    for x in ("a/1.png", "a/2.png", "b/1.png"):
        make_image(tmp_path / x)
    source = find_source([str(tmp_path / "a"), str(tmp_path / "b")]).spread(2)
    assert source.names == ["a/1.png", "a/2.png"]
    assert source.files == [str(tmp_path / x) for x in source.names] and source.takes_videos
    assert not find_source([str(tmp_path / "a")], types=IMAGE_TYPES).spread(1).takes_videos


def test_a_data_set_as_a_source():
    source = find_source(None, "small_shapes_mini_val")
    assert len(source.records) == len(source.names) > 1
    assert all("annotations" in record for record in source.records)
