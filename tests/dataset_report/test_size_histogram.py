import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")

from cbbl_d2.dataset_report.size_histogram import format_sizes, plot_sizes  # noqa: E402


def test_each_object_is_counted_once_in_its_range():
    text = format_sizes({"one": np.array([0.5, 7.99, 8, 15.9, 16, 600, 512])})
    rows = [line.partition("(")[0].split() for line in text.splitlines()[1:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("0", "1"),
        ("4", "1"),
        ("8", "2"),
        ("16", "1"),
        ("512", "2"),
    ]
    assert format_sizes({"none": np.array([])}).count("\n") == 0


def test_table():
    text = format_sizes(
        {"file": np.array([5.0, 20, 20, 600]), "input": np.array([10.0, 40, 40, 900])}
    )
    assert [line.split() for line in text.splitlines()] == [
        ["size", "[px]", "file", "input"],
        ["4", "to", "8", "1", "(", "25.0%)", "0", "(", "0.0%)"],
        ["8", "to", "16", "0", "(", "0.0%)", "1", "(", "25.0%)"],
        ["16", "to", "32", "2", "(", "50.0%)", "0", "(", "0.0%)"],
        ["32", "to", "64", "0", "(", "0.0%)", "2", "(", "50.0%)"],
        ["512", "and", "more", "1", "(", "25.0%)", "1", "(", "25.0%)"],
    ]


@pytest.mark.parametrize("num_objects, num_classes", [(1, 1), (300, 8), (300, 40)])
def test_picture(num_classes, num_objects):
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(1, 5, num_objects))
    classes = rng.integers(0, num_classes, num_objects)
    names = [f"_$ class {i}" for i in range(num_classes)]
    file = io.BytesIO()
    plot_sizes(file, "a $title_", {"one": sizes, "two": 2 * sizes}, classes, names, [8, 16.5])
    picture = np.asarray(Image.open(file).convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 300
    assert (picture != 255).any(axis=2).mean() > 0.01
