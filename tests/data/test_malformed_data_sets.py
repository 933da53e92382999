"""
Data sets as users bring them, through loading, training and evaluation: each either comes out right
(a perfect detector has AP 100, every image has its pixels) or ends in one line that names the file
and the cure.
"""

import json
import logging
import math
import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

pytest.importorskip("detectron2")

from cbbl_d2 import add_cbbl_config  # noqa: E402
from cbbl_d2.data import register_coco_format  # noqa: E402
from cbbl_d2.data.broken_images import NameBrokenImage, SkipBrokenImages  # noqa: E402
from cbbl_d2.data.coco_format import read_coco_json  # noqa: E402
from cbbl_d2.data.dataset_checks import check_datasets, set_num_classes  # noqa: E402
from cbbl_d2.data.train_loader import ResumableTrainLoader  # noqa: E402
from cbbl_d2.dataset_report.report import check_images, report_on  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.evaluation import build_coco_evaluator  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import (  # noqa: E402
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
)
from detectron2.data import transforms as T  # noqa: E402
from detectron2.data.datasets import register_coco_instances  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402
from pycocotools import mask as mask_util  # noqa: E402

WIDTH, HEIGHT = 64, 48
GRAY = 90  # of every image, red and green and blue alike


class DataSet:
    """A sound data set on the disk, for a case to spoil."""

    def __init__(self, folder):
        self.folder = folder
        self.images = folder / "images"
        self.json_file = folder / "annotations.json"
        self.text = None  # in the place of the content, str or bytes
        self.content = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
                for i in (1, 2, 3)
            ],
            "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "ship"}],
            "annotations": [
                {"id": 10 * i + k, "image_id": i, "category_id": k, "bbox": box}
                for i in (1, 2, 3)
                for k, box in ((1, [4, 5, 10, 12]), (2, [30.5, 20, 8, 6.25]))
            ],
        }
        self.images.mkdir()
        for i in (1, 2, 3):
            self.save(f"{i}.png", Image.new("RGB", (WIDTH, HEIGHT), (GRAY,) * 3))

    def save(self, name, image, **options):
        (self.images / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(self.images / name, **options)

    def replace_image(self, name, image, **options):
        """Image 2 becomes another one."""
        self.save(name, image, **options)
        self.content["images"][1]["file_name"] = name

    def write(self):
        content = json.dumps(self.content) if self.text is None else self.text
        content = content.encode() if isinstance(content, str) else content
        self.json_file.parent.mkdir(parents=True, exist_ok=True)
        self.json_file.write_bytes(content)


@pytest.fixture
def data(tmp_path):
    return DataSet(tmp_path)


@pytest.fixture
def cfg_of(new_name):
    """``cfg_of(data)``: a config that trains and evaluates on it."""

    def cfg_of(data):
        data.write()
        name = new_name()
        register_coco_format(name, str(data.json_file), str(data.images))
        cfg = get_cfg()
        add_cbbl_config(cfg)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        return cfg

    return cfg_of


def perfect_ap(cfg):
    """AP of a detector that finds exactly the boxes of the data set."""
    (name,) = cfg.DATASETS.TEST
    evaluator = build_coco_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        objects = [x for x in record["annotations"] if not x.get("iscrowd")]
        instances = Instances((record["height"], record["width"]))
        boxes = [
            BoxMode.convert(x["bbox"], BoxMode(x["bbox_mode"]), BoxMode.XYXY_ABS) for x in objects
        ]
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.pred_classes = torch.tensor([x["category_id"] for x in objects]).long()
        instances.scores = torch.full((len(objects),), 0.9)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]["AP"]


def mapper_of(training):
    """It resizes as Detectron2 does; the images of these data sets stay as they are."""
    resize = T.ResizeShortestEdge(HEIGHT, 1333)
    return DatasetMapper(training, augmentations=[resize], image_format="BGR")


# -- data sets that work ---------------------------------------------------------------------------


def names_with_spaces_and_unicode(data):
    data.images = data.images.rename(data.folder / "Bilder & Fotos été")
    data.json_file = data.folder / "mes données" / "étiquettes 图像.json"
    data.replace_image("ordner 1/图 (2) #é%20.png", Image.new("RGB", (WIDTH, HEIGHT), (GRAY,) * 3))
    data.content["categories"][0]["name"] = "véhicule léger 🚗"


def unicode_escaped_and_not(data):
    data.content["categories"][0]["name"] = "été"
    data.text = json.dumps(data.content, ensure_ascii=False)


def image_of(mode, name, color, **options):
    def change(data):
        data.replace_image(name, Image.new(mode, (WIDTH, HEIGHT), color), **options)

    return change


def palette(data):
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, GRAY, GRAY, GRAY])
    data.replace_image("2.gif", image)


def sixteen_bits_per_channel(data):
    pixels = np.full((HEIGHT, WIDTH, 3), GRAY * 257, np.uint16)
    (data.images / "2_deep.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    data.content["images"][1]["file_name"] = "2_deep.png"


def sixteen_bits_with_small_values(data):
    data.replace_image("2.tif", Image.fromarray(np.full((HEIGHT, WIDTH), GRAY, np.uint16)))


def exif_turned_and_annotated_as_seen(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    data.replace_image(
        "2.jpg", Image.new("RGB", (HEIGHT, WIDTH), (GRAY,) * 3), exif=exif, quality=100
    )


def absolute_file_names(data):
    for image in data.content["images"]:
        image["file_name"] = str(data.images / image["file_name"])
    data.images = data.folder / "not used"


def category_ids_with_gaps(data):
    for category, id in zip(data.content["categories"], (90_000_000_000, -5)):
        for annotation in data.content["annotations"]:
            if annotation["category_id"] == category["id"]:
                annotation["category_id"] = id
        category["id"] = id


def large_ids(data):
    for image in data.content["images"]:
        image["id"] += 2**60
    for annotation in data.content["annotations"]:
        annotation["image_id"] += 2**60
        annotation["id"] += 2**62


def string_image_ids(data):
    for image in data.content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in data.content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"


def image_without_objects(data):
    del data.content["annotations"][2:4]


def bad_boxes(data):
    sound = data.content["annotations"][0]
    boxes = ([5, 5, -9, 9], [5, 5, 9, -9], [5, 5, 0, 0], [math.nan, 5, 9, 9], [99, 5, 9, 9])
    data.content["annotations"] += [{**sound, "id": 50 + i, "bbox": x} for i, x in enumerate(boxes)]


def box_over_the_edge(data):
    data.content["annotations"][0]["bbox"] = [-4, -4, 20, 20]


def same_file_twice(data):
    data.content["images"][1]["file_name"] = "1.png"


def fields_of_other_tools(data):
    data.content["info"] = None
    data.content["licenses"] = []
    for annotation in data.content["annotations"]:
        annotation.update(attributes={"occluded": False}, segmentation=[], area=None)


def segmentation_of(value):
    """No mask: a box needs none."""

    def change(data):
        for annotation in data.content["annotations"]:
            annotation["segmentation"] = value

    return change


WORKING = [
    *(
        pytest.param(segmentation_of(value), id=f"segmentation {value}")
        for value in (
            [[3, 3, 9, 9]],
            [],
            [[]],
            [[1, 2, 3, 4, 5, 6, 7]],
            [1, 2, 3, 4, 5, 6],
            [[1, 2], [3, 4], [5, 6]],
            [[math.nan] * 6],
            {},
            {"counts": [1]},
            {"size": [HEIGHT, WIDTH], "counts": [1, 2]},
            {"size": [1, 1], "counts": "abc"},
            "",
            "polygon",
            5,
        )
    ),
    names_with_spaces_and_unicode,
    unicode_escaped_and_not,
    pytest.param(image_of("L", "2g.png", GRAY), id="grayscale"),
    pytest.param(image_of("LA", "2a.png", (GRAY, 40)), id="grayscale_with_alpha"),
    pytest.param(image_of("RGBA", "2a.png", (GRAY, GRAY, GRAY, 0)), id="alpha"),
    pytest.param(image_of("CMYK", "2.tif", (0, 0, 0, 255 - GRAY)), id="cmyk"),
    pytest.param(image_of("RGB", "2.JPG", (GRAY,) * 3, format="PNG"), id="wrong_extension"),
    palette,
    sixteen_bits_per_channel,
    sixteen_bits_with_small_values,
    exif_turned_and_annotated_as_seen,
    absolute_file_names,
    category_ids_with_gaps,
    large_ids,
    string_image_ids,
    image_without_objects,
    bad_boxes,
    box_over_the_edge,
    same_file_twice,
    fields_of_other_tools,
]


@pytest.mark.parametrize("change", WORKING)
def test_comes_out_right(data, cfg_of, change):
    change(data)
    before = json.dumps(data.content)
    cfg = cfg_of(data)
    set_num_classes(cfg)
    check_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    (name,) = cfg.DATASETS.TRAIN
    assert len(MetadataCatalog.get(name).thing_classes) == 2
    assert perfect_ap(cfg) == pytest.approx(100)

    dicts = DatasetCatalog.get(name)
    in_training = SkipBrokenImages(DatasetFromList(dicts), mapper_of(True))
    in_evaluation = NameBrokenImage(mapper_of(False))
    for i, record in enumerate(dicts):
        item = in_training[i]
        assert item["image_id"] == record["image_id"]  # it was not skipped
        assert len(item["instances"]) == len(record["annotations"])
        boxes = item["instances"].gt_boxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.numel() == 0 or boxes[:, 2].max() <= WIDTH
        for image in (item["image"], in_evaluation(record)["image"]):
            assert image.shape == (3, HEIGHT, WIDTH)
            assert (image.float() - GRAY).abs().max() <= 1
    assert json.dumps(data.content) == before
    assert sum(len(d["annotations"]) for d in dicts) == (
        4 if change is image_without_objects else 6
    )


# -- files that cannot be loaded -------------------------------------------------------------------


def text(value):
    def change(data):
        data.text = value(data) if callable(value) else value

    return change


def every(key, **values):
    """Each entry of a list gets these values; a callable is given the entry."""

    def change(data):
        for entry in data.content[key]:
            entry.update({k: v(entry) if callable(v) else v for k, v in values.items()})

    return change


def sixteen_bits(data):
    deep = (np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 20).astype(np.uint16)
    for i in (1, 2, 3):
        data.save(f"{i}.png", Image.fromarray(deep))


def float_image(data):
    data.replace_image("2.tif", Image.fromarray(np.full((HEIGHT, WIDTH), 1e4, np.float32)))


def of_pixels(name, pixels):
    """Image 2, or as "*" all of them."""

    def change(data):
        for i in (1, 2, 3) if name[0] == "*" else (2,):
            file_name = name.replace("*", str(i))
            (data.images / file_name).write_bytes(cv2.imencode(name[1:], pixels)[1].tobytes())
            data.content["images"][i - 1]["file_name"] = file_name

    return change


def random_pixels(high, *channels, kind=np.uint16):
    values = np.random.default_rng(0).random((HEIGHT, WIDTH, *channels)) * high
    return values.astype(kind)


def signed(data):
    values = -random_pixels(200, kind=np.int32)
    data.replace_image("2.tif", Image.fromarray(values))


def windows_paths(data):
    for image in data.content["images"]:
        data.save(f"sub/{image['file_name']}", Image.new("RGB", (WIDTH, HEIGHT)))
        image["file_name"] = f"sub\\{image['file_name']}"


def fractions(data):
    for annotation in data.content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def root_category(data):
    """Of some exports: it has the name of the class and no boxes."""
    data.content["categories"].append({"id": 0, "name": "car", "supercategory": "none"})


def duplicate_image_ids(data):
    data.content["images"][2]["id"] = 2


def no_usable_box(data):
    every("annotations", bbox=lambda x: [5, 5, -9, 9])(data)


REFUSED = [
    (text(""), "{json}: not valid JSON at line 1, column 1", "export it again"),
    (text("0 0.5 0.5 0.1 0.1\n"), "{json}: not valid JSON", "export it again"),
    (text(lambda data: json.dumps(data.content)[:-40]), "{json}: not valid JSON", "export"),
    (text(lambda data: json.dumps(data.content).replace("}", ",}", 1)), "{json}: not valid", "exp"),
    (text(lambda data: json.dumps(data.content["annotations"])), "{json}: not a COCO file", "list"),
    (text(lambda data: json.dumps(data.content).encode("utf-16")), "{json}: not a text", "UTF-8"),
    (text(lambda data: json.dumps(data.content).encode("utf-8-sig")), "{json}: .*BOM", "without"),
    (text(b"PK\x03\x04\x9f"), "{json}: not a text file in UTF-8", "give the COCO JSON file"),
    (duplicate_image_ids, "{json}: the id 2 comes twice in", "make the ids unique"),
    (every("annotations", id=lambda x: float(x["id"])), "{json}: .* has the id 11.0", "integer"),
    (every("annotations", id=lambda x: str(x["id"])), "{json}: .* has the id '11'", "integer"),
    (every("annotations", id=lambda x: x["id"] + 10**20), "{json}: .*64 bits", "number the annot"),
    (every("images", id=lambda x: x["id"] * 2**64), "{json}: .*64 bits", "number the images anew"),
    (every("annotations", image_id=lambda x: x["image_id"] + 0.5), "{json}: annot.*1.5", "the id"),
    (every("images", width=math.nan), "{json}: image 1 .1.png. has the width nan", "pixels"),
    (every("images", height=-48), "{json}: image 1 .1.png. has the height -48", "number of pixels"),
    (every("annotations", bbox={"x": 1, "y": 2}), "{json}: annotation 11 has the bbox", "width"),
    (every("annotations", category_id="car"), "{json}: annotation 11 has the category_id", "add"),
    (every("annotations", image_id=77), "{json}: no box that can be used", "right file"),
    (no_usable_box, "{json}: no box that can be used, of 6: 6 of no size", "right file"),
    (fractions, "{json}: all boxes lie between 0 and 1", "multiply"),
    (windows_paths, "{images}: probably the wrong folder", "with / in the place of"),
    (sixteen_bits, "{images}/1.png: has values over 255", "convert the images to 8 bits"),
    (float_image, "{images}/2.tif: has values over 255", "convert the images to 8 bits"),
    (
        of_pixels("*.tif", random_pixels(1, kind=np.float32)),
        "{images}/1.tif: has no value over 1,",
        "8 b",
    ),
    (
        of_pixels("*.png", random_pixels(4095, 3)),
        "{images}/1.png: has 16 bits, but no value",
        "8 b",
    ),
    (
        of_pixels("2.tif", random_pixels(1023, 4)),
        "{images}/2.tif: has 16 bits, but no value",
        "8 b",
    ),
    (signed, "{images}/2.tif: has negative values, which .* black", "8 bits"),
    (
        every("annotations", iscrowd=1),
        "{json}: no box that can be used, 6 marked as crowds",
        "iscr",
    ),
    (
        every("annotations", image_id=lambda x: str(x["image_id"])),
        "{json}: .* a string, .* an int",
        "use one kind",
    ),
    (
        every("images", id=lambda x: str(x["id"])),
        "{json}: .* an integer, .* a string",
        "use one kind",
    ),
    (root_category, "{json}: two categories have the name 'car' .ids 1, 0.", "remove .* id 0"),
]


@pytest.mark.parametrize("change, words, cure", REFUSED)
def test_is_refused_in_one_line_with_file_and_cure(data, cfg_of, error_of, change, words, cure):
    change(data)
    message = error_of(check_datasets, cfg_of(data))
    words = words.format(json=re.escape(str(data.json_file)), images=re.escape(str(data.images)))
    assert re.match(words, message), message
    assert re.search(cure, message)


@pytest.mark.parametrize("change", [case[0] for case in REFUSED])
def test_report_says_it_too(data, change):
    """In one line, as an error or as a warning."""
    change(data)
    data.write()
    json_file, images = str(data.json_file), str(data.images)
    try:
        content = read_coco_json(json_file)
        lines = report_on(content, json_file, images).warnings + check_images(content, images)
        assert any(images in line for line in lines), lines
    except UserError as e:
        lines = [str(e)]
        assert str(e).startswith((json_file, images))
    assert not any("\n" in line for line in lines)


# -- images that cannot be used --------------------------------------------------------------------


def exif_turned_and_annotated_as_stored(data):
    exif = Image.Exif()
    exif[0x0112] = 8
    data.replace_image("2.jpg", Image.new("RGB", (WIDTH, HEIGHT)), exif=exif)


def spoil(content):
    return lambda data: (data.images / "2.png").write_bytes(content(data))


def narrow(data):
    data.save("2.png", Image.new("RGB", (3000, 1)))
    data.content["images"][1].update(width=3000, height=1)
    for annotation in data.content["annotations"][2:4]:
        annotation["bbox"] = [4, 0, 10, 1]


def tiff(bands):
    """A TIFF file with these bands, of 8 bits and of no color, which Pillow cannot identify."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    values = {256: WIDTH, 257: HEIGHT, 258: (8,) * bands, 259: 1, 262: 1, 273: 0, 277: bands}
    for tag, value in {**values, 279: WIDTH * HEIGHT * bands}.items():
        tags[tag] = value
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + bytes(WIDTH * HEIGHT * bands)


BROKEN = [
    (
        spoil(lambda data: tiff(4)),
        "a TIFF of a kind .*4 bands, bits 8, 8, 8, 8.*RGB of 8 b",
        "rest",
    ),
    (spoil(lambda data: tiff(5)), "a TIFF of a kind .*5 bands, bits 8, 8, 8, 8, 8.*RGB", "restore"),
    (spoil(lambda data: b""), "not an image", "restore the file"),
    (spoil(lambda data: b"\0" * 4096), "not an image", "restore the file"),
    (spoil(lambda data: (data.images / "2.png").read_bytes()[:60]), ".", "restore the file"),
    (image_of("RGB", "2s.png", GRAY), None, None),  # sound: what is tested below can fail
    (
        lambda data: data.save("2.png", Image.new("RGB", (WIDTH, HEIGHT + 1))),
        r"got \(64, 49\), expect \(64, 48\)",
        "check the width/height in your annotation",
    ),
    (narrow, "3000x1 pixels, so narrow", "take it out of the annotation file"),
    (exif_turned_and_annotated_as_stored, "EXIF", "annotate the turned image, or remove the EXIF"),
]


@pytest.mark.parametrize("change, words, cure", BROKEN)
def test_broken_image_is_skipped_in_training_and_named_in_evaluation(
    data, cfg_of, caplog, monkeypatch, change, words, cure
):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    change(data)
    cfg = cfg_of(data)
    set_num_classes(cfg)
    check_datasets(cfg)
    dicts = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    file_name = dicts[1]["file_name"]
    in_training = SkipBrokenImages(DatasetFromList(dicts), mapper_of(True))
    in_evaluation = NameBrokenImage(mapper_of(False))
    if words is None:
        assert [in_training[i]["image_id"] for i in range(3)] == [1, 2, 3]
        assert in_evaluation(dicts[1])["image_id"] == 2
        return
    assert [in_training[i]["image_id"] for i in range(3)] == [1, 3, 3]
    # A set: where a tool has set up the logger, pytest records each line twice.
    logged = {r.getMessage() for r in caplog.records if "Skipping the image" in r.getMessage()}
    with pytest.raises(UserError) as error:
        in_evaluation(dicts[1])
    assert len(logged) == 1
    for message in (*logged, str(error.value)):
        assert file_name in message and "\n" not in message
        assert re.search(words, message)
    assert cure in str(error.value)


# -- boxes in another format -----------------------------------------------------------------------


def corners(data):
    for annotation in data.content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + 20, y + 20, x + 20 + w, y + 20 + h]


def in_the_upper_left(data):
    """Larger than their distance from the corner, as corners always are, and all in the image."""
    every("annotations", bbox=lambda x: [1, 1, 10, 10])(data)


def one_over_the_edge(data):
    data.content["annotations"][0]["bbox"] = [60, 40, 10, 12]


def two_corners(data):
    corners(data)
    del data.content["annotations"][2:]
    data.content["annotations"][0]["bbox"] = [50, 30, 60, 40]


def centers(data):
    every("annotations", bbox=lambda x: [57, 40, 12, 14])(data)


def two_boxes_of_which_one_is_over_the_edge(data):
    del data.content["annotations"][2:]
    one_over_the_edge(data)


@pytest.mark.parametrize(
    "change, format",
    [
        (corners, "[x0, y0, x1, y1]"),
        (two_corners, "[x0, y0, x1, y1]"),
        (centers, "[center x, center y, width, height]"),
        (in_the_upper_left, None),
        (one_over_the_edge, None),
        (two_boxes_of_which_one_is_over_the_edge, None),
    ],
)
def test_boxes_in_another_format(data, cfg_of, caplog, monkeypatch, change, format):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    change(data)
    cfg = cfg_of(data)
    set_num_classes(cfg)
    check_datasets(cfg)
    messages = {r.getMessage() for r in caplog.records if "the boxes look like" in r.getMessage()}
    assert len(messages) == (format is not None)
    for message in messages:
        assert message.startswith(f"{data.json_file}: the boxes look like {format}")
        assert "subtract" in message


# -- masks -----------------------------------------------------------------------------------------


TRIANGLE = [[4, 5, 12, 5, 12, 15]]


@pytest.fixture
def masks(data, cfg_of):
    """``masks(values)``: a config that learns masks, from these segmentations in their order."""

    def masks(values):
        for annotation, value in zip(data.content["annotations"], values, strict=True):
            annotation.pop("segmentation", None)
            if value is not None:
                annotation["segmentation"] = value
        cfg = cfg_of(data)
        cfg.MODEL.MASK_ON = True
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH = 3
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TEST = (HEIGHT,)
        set_num_classes(cfg)
        return cfg

    return masks


@pytest.mark.parametrize("value", [None, [], [[]], [[3, 3, 9, 9]], [[1, 2, 3, 4, 5, 6, 7]], 5])
def test_what_has_no_mask_is_left_out_of_training_and_evaluation_alike(
    masks, caplog, monkeypatch, value
):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    cfg = masks([TRIANGLE, value, value, value, [*TRIANGLE, [1, 2]], TRIANGLE])
    check_datasets(cfg)
    messages = {r.getMessage() for r in caplog.records if "have no mask" in r.getMessage()}
    assert len(messages) == 1
    assert "3 of 6 boxes have no mask" in messages.pop()
    batch = next(iter(ResumableTrainLoader(cfg)))
    # Without the second image, which has nothing left.
    assert {item["image_id"] for item in batch} == {1, 3}
    (name,) = cfg.DATASETS.TEST
    truth = build_coco_evaluator(cfg, name)._coco_api
    for item in batch:
        annotations = truth.imgToAnns[item["image_id"]]
        assert len(annotations) == len(item["instances"]) == len(item["instances"].gt_masks)
    assert sorted(truth.anns) == [11, 31, 32]
    assert truth.annToMask(truth.anns[31]).any()


def test_no_masks_at_all(masks, error_of):
    assert "set MODEL.MASK_ON False" in error_of(check_datasets, masks([None] * 6))


@pytest.mark.parametrize("compressed", [False, True])
def test_run_length_masks_need_bitmasks(masks, data, error_of, compressed):
    code = mask_util.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))
    code["counts"] = code["counts"].decode()
    if not compressed:
        ones = np.flatnonzero(np.diff(np.eye(HEIGHT, WIDTH, dtype=np.int8).ravel("F"))) + 1
        counts = np.diff([0, 0, *ones, WIDTH * HEIGHT]).tolist()
        code = {"size": [HEIGHT, WIDTH], "counts": counts}
    cfg = masks([TRIANGLE, code, TRIANGLE, TRIANGLE, TRIANGLE, TRIANGLE])
    message = error_of(check_datasets, cfg)
    assert "1 mask is" in message and "set INPUT.MASK_FORMAT bitmask" in message
    lines = report_on(read_coco_json(str(data.json_file)), str(data.json_file), "").warnings
    assert any("INPUT.MASK_FORMAT bitmask" in line and "12" in line for line in lines)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_datasets(cfg)
    batch = next(iter(ResumableTrainLoader(cfg)))
    assert [len(item["instances"].gt_masks) for item in batch] == [2, 2, 2]
    cfg.MODEL.MASK_ON = False
    cfg.INPUT.MASK_FORMAT = "polygon"
    check_datasets(cfg)


def test_the_report_names_what_is_no_mask(data):
    data.content["annotations"][1]["segmentation"] = [[1, 2, 3]]
    data.content["annotations"][2]["segmentation"] = []
    lines = report_on(data.content, "", "").warnings
    assert any("1 box has a segmentation that is no mask" in x and "12" in x for x in lines)


# -- numbers that are not what they should be ------------------------------------------------------


@pytest.mark.parametrize(
    "value, words",
    [
        (lambda box: WIDTH * HEIGHT, "an area larger than their box"),
        (lambda box: box[2] * box[3] * 1.05 + 1, "an area larger than their box"),
        (lambda box: box[2] * box[3] / (WIDTH * HEIGHT), "an area under a tenth of their box"),
        (lambda box: round(box[2] * box[3]), None),
        (lambda box: box[2] * box[3] * 1.02, None),
        (lambda box: box[2] * box[3] * 0.5, None),
    ],
)
def test_areas_that_are_not_those_of_the_objects(data, cfg_of, caplog, monkeypatch, value, words):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    every("annotations", area=lambda x: value(x["bbox"]))(data)
    cfg = cfg_of(data)
    lines = report_on(data.content, "", "").warnings
    build_coco_evaluator(cfg, cfg.DATASETS.TEST[0])
    logged = [r.getMessage() for r in caplog.records]
    for messages in (lines, logged):
        found = [x for x in messages if "width x height, or leave area out" in x]
        assert bool(found) == (words is not None)
        assert all(words in x and "6 boxes have" in x and "11, 12, 21" in x for x in found)


def test_the_area_of_a_thin_mask_is_fine(data):
    every("annotations", area=1, segmentation=TRIANGLE)(data)
    assert not any("area" in x for x in report_on(data.content, "", "").warnings)


def test_many_crowds_are_named(data, cfg_of, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    for annotation in data.content["annotations"][::2]:
        annotation["iscrowd"] = 1
    lines = report_on(data.content, "", "").warnings
    assert any("3 of 6 boxes are marked as crowds" in x and "11, 21, 31" in x for x in lines)
    caplog.set_level(logging.INFO, "cbbl_d2")
    DatasetCatalog.get(cfg_of(data).DATASETS.TRAIN[0])
    assert any("3 images, 3 boxes and 3 crowds" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("limit, warns", [(1, True), (2, False), (-1, False)])
def test_more_objects_than_detections(data, cfg_of, caplog, monkeypatch, limit, warns):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    cfg = cfg_of(data)
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    set_num_classes(cfg)
    for eval_only in (False, True):
        caplog.clear()
        check_datasets(cfg, eval_only)
        found = {x.getMessage() for x in caplog.records if "DETECTIONS_PER" in x.getMessage()}
        assert len(found) == warns
        assert not warns or "3 images have more objects (up to 2) than" in found.pop()


def test_an_annotation_id_of_zero_under_any_loader(data, cfg_of, new_name):
    """COCO's metric takes it for "no match"."""
    data.content["annotations"][0]["id"] = 0
    cfg = cfg_of(data)
    assert perfect_ap(cfg) == pytest.approx(100)
    name = new_name()
    register_coco_instances(name, {}, str(data.json_file), str(data.images))
    every("annotations", iscrowd=0, area=lambda x: x["bbox"][2] * x["bbox"][3])(data)
    data.write()
    cfg.DATASETS.TEST = (name,)
    assert perfect_ap(cfg) == pytest.approx(100)


def test_all_images_missing_is_an_error_of_the_report_too(data, error_of):
    message = error_of(check_images, data.content, str(data.images / "elsewhere"))
    assert "no such folder, none of the 3 images" in message


def test_images_over_the_limit_of_pillow_name_the_cure(data, cfg_of, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    cfg = cfg_of(data)
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    with pytest.raises(UserError, match="1.png .over Pillow's limit of 18 pixels.*slice_dataset"):
        NameBrokenImage(mapper_of(False))(record)
    (line, *_) = check_images(data.content, str(data.images))
    assert "3 images cannot be used" in line and "predict with --slice" in line
