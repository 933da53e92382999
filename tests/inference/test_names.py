import pytest

pytest.importorskip("detectron2")

from cbbl_d2.inference.names import picture_names, relative_names, unique_stems  # noqa: E402


def test_relative_names():
    assert relative_names(["/d/a/x.png", "/d/b/x.png"]) == ["a/x.png", "b/x.png"]
    assert relative_names(["/d/a/x.png"]) == ["x.png"]
    assert relative_names(["/d/a/x.png"], root="/d") == ["a/x.png"]
    assert relative_names(["/e/x.png"], root="/d") == ["x.png"]
    assert relative_names([]) == []


def test_unique_stems():
    assert unique_stems(["a/x.png", "b/x.png"]) == ["a/x", "b/x"]
    assert unique_stems(["x.png", "X.jpg", "y.png"]) == ["x.png", "X.jpg", "y"]
    hard = ["x.png", "x.jpg", "x.png.png", "x.png.jpg", "x.png"]
    assert len({s.lower() for s in unique_stems(hard)}) == len(hard)


def test_picture_names():
    files = ["a/x.png", "b/x.png", "x.png", "x.jpg", "a_x.png", "overview.png"]
    files = [f"/in/{x}" for x in files]
    names = picture_names(files)
    assert names[:2] == ["a_x", "b_x"]
    assert len({x.lower() for x in names}) == len(files)
    same = [files[0]] * 3 + ["/X.png", "/x.png"]
    assert len({x.lower() for x in picture_names(same)}) == 5
    assert picture_names(["/data/1.png", "/data/2.jpg"]) == ["1", "2"]
