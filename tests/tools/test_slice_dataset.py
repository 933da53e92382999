import json

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("sahi")

from cbbl_d2.data.coco_format import load_coco_format  # noqa: E402


@pytest.fixture(scope="module")
def main(load_script):
    return load_script("tools/slice_dataset.py").main


@pytest.fixture
def image(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / "in/sub/x.png"), pixels)
    return pixels


@pytest.fixture
def cut(main, tmp_path):
    """``cut(annotations, options)``: slices of 60 with an overlap of 20: at x = 0 and x = 40."""

    def cut(annotations, *options, images=None):
        images = images or [{"id": 5, "file_name": "sub/x.png", "width": 100, "height": 60}]
        categories = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
        annotations = [{"id": i, "image_id": 5, **a} for i, a in enumerate(annotations, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "x.json").write_text(json.dumps(content))
        out = tmp_path / "out"
        arguments = ["--annotations", str(tmp_path / "x.json"), "--images", str(tmp_path / "in")]
        arguments += ["--output", str(out), "--slice", "60", "--overlap", "0.34"]
        main([*arguments, *map(str, options)])
        return json.loads((out / "annotations.json").read_text())

    return cut


def boxes(coco):
    """(number of the slice, box) of each annotation."""
    return [(a["image_id"], [round(x, 6) for x in a["bbox"]]) for a in coco["annotations"]]


def test_slices_are_the_pixels_of_the_image(cut, image, tmp_path):
    coco = cut([{"bbox": [5, 5, 9, 9], "category_id": 3}])
    assert [(i["id"], i["width"], i["height"]) for i in coco["images"]] == [
        (1, 60, 60),
        (2, 60, 60),
    ]
    for entry, x in zip(coco["images"], (0, 40)):
        pixels = cv2.imread(str(tmp_path / "out/images" / entry["file_name"]))
        assert (pixels == image[:, x : x + 60]).all()
    assert not list(tmp_path.glob("out.*"))


def test_boxes_keep_their_fractions_and_their_fields(cut, image):
    polygon = [[10.3, 5.2, 14.9, 5.2, 14.9, 9.9]]
    box = {"bbox": [10.3, 5.2, 4.6, 4.7], "category_id": 7, "area": 13.1, "note": "x"}
    coco = cut([{**box, "segmentation": polygon}])
    assert boxes(coco) == [(1, [10.3, 5.2, 4.6, 4.7])]
    (annotation,) = coco["annotations"]
    assert annotation["category_id"] == 7 and annotation["note"] == "x"
    assert annotation["area"] == pytest.approx(13.1)
    assert "segmentation" not in annotation


def test_a_box_across_an_edge(cut, image):
    # 10 wide: [55, 65]. The first slice ends at 60, the second has it at 15.
    (first, second) = cut([{"bbox": [55, 5, 10, 4], "category_id": 3}])["annotations"]
    assert (first["image_id"], first["bbox"], first["area"]) == (1, [55, 5, 5, 4], 20)
    assert (second["image_id"], second["bbox"], second["area"]) == (2, [15, 5, 10, 4], 40)


@pytest.mark.parametrize("ratio, kept", [(0.0, 2), (0.29, 2), (0.31, 1), (1.0, 1)])
def test_the_share_of_a_small_box_that_must_be_seen(cut, image, ratio, kept):
    # 0.9 of 3 pixels are in the first slice: areas of 2.7 and 9, which sahi would round.
    coco = cut([{"bbox": [59.1, 5, 3, 3], "category_id": 3}], "--min-area-ratio", ratio)
    assert boxes(coco)[-1] == (2, [19.1, 5, 3, 3])
    assert len(coco["annotations"]) == kept


def test_crowd_regions_stay_crowd_regions(cut, image):
    coco = cut(
        [
            {"bbox": [5, 5, 9, 9], "category_id": 3, "iscrowd": 1, "area": 81},
            {"bbox": [5, 5, 9, 9], "category_id": 3, "iscrowd": 0, "area": 81},
        ]
    )
    assert [a["iscrowd"] for a in coco["annotations"]] == [1, 0]


def test_a_crowd_region_larger_than_a_slice_stays_in_each(cut, image):
    """A small share of it may fill the slice: what is found there must be ignored."""
    region = {"bbox": [0, 0, 61, 40], "category_id": 3, "iscrowd": 1, "area": 61 * 40}
    object_ = {"bbox": [5, 50, 9, 9], "category_id": 3}
    pieces = cut([region, object_], "--min-area-ratio", 1.0)["annotations"]
    assert sorted((a["image_id"], a["iscrowd"]) for a in pieces) == [(1, 0), (1, 1), (2, 1)]


def test_the_result_is_a_data_set(cut, image, tmp_path):
    cut([{"bbox": [5, 5, 9, 9], "category_id": 3}, {"bbox": [70, 9, 9.5, 9], "category_id": 7}])
    out = tmp_path / "out"
    dicts = load_coco_format(str(out / "annotations.json"), str(out / "images"), "test_sliced")
    assert [[a["category_id"] for a in d["annotations"]] for d in dicts] == [[0], [1]]


def test_what_cannot_be_used_is_left_out(cut, image, tmp_path, capsys):
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    images = [
        {"id": 5, "file_name": "sub/x.png", "width": 100, "height": 60},
        {"id": 6, "file_name": "broken.png", "width": 100, "height": 60},
    ]
    coco = cut(
        [
            {"bbox": [5, 5, 9, 9], "category_id": 3},
            {"bbox": [5, 5, 0, 9], "category_id": 3},
            {"bbox": [5, 5, 0.5, 0.5], "category_id": 3},
            {"bbox": [5, 5, 9, 9], "category_id": 3, "image_id": 6},
        ],
        images=images,
    )
    out, err = capsys.readouterr()
    assert len(coco["annotations"]) == 1 and len(coco["images"]) == 2
    assert "broken.png" in err and "1 image and 3 boxes left out" in out


def test_a_folder_that_exists_is_left_alone(cut, image, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        cut([{"bbox": [5, 5, 9, 9], "category_id": 3}])
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_image_ids_that_are_strings(cut, image):
    entry = {"id": "x", "file_name": "sub/x.png", "width": 100, "height": 60}
    coco = cut([{"bbox": [5, 5, 9, 9], "category_id": 3, "image_id": "x"}], images=[entry])
    assert boxes(coco) == [(1, [5, 5, 9, 9])]


def test_images_over_the_limit_of_pillow(cut, image, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 60 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        Image.open("in/sub/x.png")
    assert boxes(cut([{"bbox": [5, 5, 9, 9], "category_id": 3}])) == [(1, [5, 5, 9, 9])]
    assert Image.MAX_IMAGE_PIXELS == 100 * 60 // 2 - 1
