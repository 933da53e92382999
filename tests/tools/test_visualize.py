import dataclasses
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

import cbbl_d2.inference.pictures  # noqa: E402
from cbbl_d2.engine.cli import load_config  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.catalog import Metadata  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import BoxMode, Instances  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/SmallShapes/cbbl.yaml")
TINY = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "8"]
TINY += ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.RPN.CONV_DIMS", "[8]"]
TINY += ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "5"]
DATASET = "cbbl_test_visualize"


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/visualize.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(CONFIG, TINY)).state_dict()}, path)
    return str(path)


@pytest.fixture
def run(tool, weights, tmp_path):
    """``run(arguments)``: the tool with an untrained model; pictures in ``tmp_path/out``."""

    def run(*args, weights=weights, output=tmp_path / "out", opts=()):
        command = ["--config-file", CONFIG, "--weights", weights, "--output", str(output)]
        command += ["--confidence-threshold", "0", "--scale", "2", *map(str, args)]
        tool.main([*command, "--opts", *TINY, *opts])

    return run


@dataclasses.dataclass
class Picture:
    ground_truth: list | None
    predictions: Instances
    metadata: Metadata


@pytest.fixture
def pictures_taken(monkeypatch):
    """A list that gets what is drawn in each picture."""
    taken, draw_pair = [], cbbl_d2.inference.pictures.draw_pair

    def spy(image, *args, **kwargs):
        taken.append(Picture(*args))
        return draw_pair(image, *args, **kwargs)

    monkeypatch.setattr(cbbl_d2.inference.pictures, "draw_pair", spy)
    return taken


@pytest.fixture
def dataset():
    """``dataset(files)``: register a data set, each image with one object."""

    def register(files):
        records = [
            {
                "file_name": str(x),
                "image_id": i,
                "height": 40,
                "width": 60,
                "annotations": [
                    {"bbox": [9, 9, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
                ],
            }
            for i, x in enumerate(files)
        ]
        DatasetCatalog.register(DATASET, lambda: records)
        MetadataCatalog.get(DATASET).set(thing_classes=list("abcde"))
        return DATASET

    yield register
    DatasetCatalog.pop(DATASET, None)
    MetadataCatalog.pop(DATASET, None)


def make_image(path, height=40, width=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), image)
    return path


def pictures(folder):
    return sorted(x.name for x in folder.iterdir())


def test_images_folders_and_patterns(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    make_image(tmp_path / "in/b.jpg")
    (tmp_path / "in/notes.txt").write_text("no image")
    make_image(tmp_path / "c.png")
    make_image(tmp_path / "more/d1.bmp")
    make_image(tmp_path / "more/d2.bmp")
    # Named twice, drawn once.
    run("--input", tmp_path / "c.png", tmp_path / "in", tmp_path / "in/a.png", tmp_path / "more/*")
    out = tmp_path / "out"
    names = ["a.png", "b.png", "c.png", "d1.png", "d2.png", "overview.png"]
    assert pictures(out) == names
    assert capsys.readouterr().out.splitlines()[-1] == f"5 pictures written to {out}"
    assert cv2.imread(str(out / "a.png")).shape[1] == 2 * 60


def test_a_data_set_has_ground_truth_beside_predictions(run, dataset, tmp_path):
    name = dataset([make_image(tmp_path / f"in/{i}.png") for i in range(4)])
    run("--dataset", name, "--num-images", 2)
    assert pictures(tmp_path / "out") == ["0.png", "2.png", "overview.png"]
    assert cv2.imread(str(tmp_path / "out/0.png")).shape[1] > 4 * 60
    run("--dataset", name, "--num-images", 1, "--no-ground-truth", output=tmp_path / "alone")
    assert pictures(tmp_path / "alone") == ["0.png"]  # one picture needs no overview
    assert cv2.imread(str(tmp_path / "alone/0.png")).shape[1] == 2 * 60


def test_the_score_threshold(run, pictures_taken, tmp_path):
    run("--input", make_image(tmp_path / "a.png"))
    run("--input", tmp_path / "a.png", "--score-threshold", "1.0")
    counts = [
        x.predictions.scores.min().item() if len(x.predictions) else 2 for x in pictures_taken
    ]
    assert 0 <= counts[0] <= 1 and counts[1] >= 1


def test_the_image_reaches_the_model_and_the_picture_unchanged(run, tmp_path):
    """The channels are in the right order: a red image is red in the picture."""
    red = np.zeros((40, 60, 3), np.uint8)
    red[:, :, 2] = 250  # BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    run("--input", tmp_path / "red.png", "--score-threshold", "1")
    drawn = cv2.imread(str(tmp_path / "out/red.png"))
    assert (drawn[-80:] == red[0, 0]).all()


def test_broken_images_are_skipped_named_and_counted(run, dataset, tmp_path, capsys):
    good = make_image(tmp_path / "in/good.png")
    (tmp_path / "in/broken.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "in/empty.jpg").write_bytes(b"")
    run("--input", tmp_path / "in")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"1 picture written to {tmp_path / 'out'}, 2 skipped"
    skipped = [x for x in err.splitlines() if "skipped: " in x]
    assert len(skipped) == 2 and "broken.png" in skipped[0] and "empty.jpg" in skipped[1]

    # Boxes of a data set mean nothing on an image of another size.
    other = make_image(tmp_path / "in/other.png", height=50)
    run("--dataset", dataset([good, tmp_path / "absent.png", other]), output=tmp_path / "second")
    assert pictures(tmp_path / "second") == ["good.png"]
    err = capsys.readouterr().err
    assert err.count("skipped: ") == 2 and "absent.png" in err and "other.png" in err


def test_nothing_but_broken_images_is_an_error(error, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "none of the 1 images" in error("--input", tmp_path / "broken.png")


def test_equal_names_do_not_overwrite_each_other(run, tmp_path):
    files = ["a/x.png", "b/x.png", "x.png", "x.jpg", "a_x.png", "overview.png"]
    files = [make_image(tmp_path / "in" / x) for x in files]
    run("--input", *files)
    assert len(pictures(tmp_path / "out")) == len(files) + 1


def test_the_images_are_never_overwritten(error, tmp_path):
    image = make_image(tmp_path / "a.png")
    before = image.read_bytes()
    make_image(tmp_path / "a.jpg")
    assert "choose another --output" in error("--input", tmp_path, output=tmp_path)
    assert image.read_bytes() == before


def test_unknown_data_sets_have_their_neighbors_named(error):
    assert "did you mean small_shapes_" in error("--dataset", "small_shape_vall")
    assert "unknown data set 12345" in error("--dataset", "12345")


def test_a_data_set_without_its_files(error):
    def loader():
        raise FileNotFoundError(2, "No such file or directory", "gone.json")

    DatasetCatalog.register(DATASET, loader)
    try:
        assert "gone.json" in error("--dataset", DATASET)
    finally:
        DatasetCatalog.pop(DATASET)


def test_inputs_that_are_not_there(error, tmp_path):
    assert "nowhere.png: no such" in error("--input", tmp_path / "nowhere.png")
    (tmp_path / "void").mkdir()
    assert "no images in this folder" in error("--input", tmp_path / "void")


def test_weights_that_are_missing_or_do_not_fit(error, tmp_path, weights):
    image = make_image(tmp_path / "a.png")
    assert "no weights" in error("--input", image, weights="")
    assert "absent.pth" in error("--input", image, weights=str(tmp_path / "absent.pth"))
    wide = ["MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
    assert "does not fit" in error("--input", image, opts=wide)


def test_an_output_that_is_a_file(error, tmp_path):
    image = make_image(tmp_path / "in/a.png")
    (tmp_path / "file").write_text("")
    assert "cannot be made a folder" in error("--input", image, output=tmp_path / "file")


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "big"])
def test_impossible_scales(tool, scale, capsys):
    with pytest.raises(SystemExit):
        tool.get_parser().parse_args(["--config-file", "x", "--input", "y", "--scale", scale])
    assert f"{scale}: must be a number from 0.01 to 100" in capsys.readouterr().err


def test_class_names_for_plain_images(run, pictures_taken, tmp_path):
    """From the data set that the config evaluates on, where its files are there."""
    image = make_image(tmp_path / "in/a.png")

    def names(*datasets):
        opts = ["DATASETS.TRAIN", "()", "DATASETS.TEST", str(datasets)]
        run("--input", image, opts=opts)
        return pictures_taken[-1].metadata.thing_classes

    assert names("small_shapes_val")[0] == "disk"
    numbered = [f"class {i}" for i in range(5)]
    assert names() == numbered

    def loader():
        raise FileNotFoundError(2, os.strerror(2), "gone.json")

    DatasetCatalog.register(DATASET, loader)
    try:
        assert names(DATASET) == numbered
    finally:
        DatasetCatalog.pop(DATASET)
        MetadataCatalog.pop(DATASET, None)


@pytest.mark.parametrize(
    "option, value",
    [("--score-threshold", "50"), ("--score-threshold", "x"), ("--num-images", "x")],
)
def test_impossible_options(tool, capsys, option, value):
    with pytest.raises(SystemExit):
        tool.get_parser().parse_args(["--config-file", "x", "--input", "y", option, value])
    assert f"{value}: must be" in capsys.readouterr().err


def test_a_hint_where_nothing_is_found(run, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "red.png"), np.zeros((40, 40, 3), np.uint8))
    run("--input", tmp_path / "red.png", "--score-threshold", "1")
    assert "No prediction has a score of 1 or more" in capsys.readouterr().out


def test_the_number_of_classes_of_the_data_set_to_draw(run, dataset, tmp_path, caplog):
    """Not of the config's own test set, whose files need not be there."""
    name = dataset([make_image(tmp_path / "in/a.png")])
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "0", "DATASETS.TEST", "('nowhere',)"]
    run("--dataset", name, opts=opts)
    assert "a.png" in pictures(tmp_path / "out")


def test_a_video_is_a_file_that_cannot_be_read(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    (tmp_path / "in/clip.mp4").write_bytes(b"a video")
    run("--input", tmp_path / "in/*")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"1 picture written to {tmp_path / 'out'}, 1 skipped"
    assert "clip.mp4: not an image" in err


def test_an_image_that_cannot_be_drawn_is_skipped(run, dataset, tmp_path, capsys):
    name = dataset([make_image(tmp_path / f"in/{i}.png") for i in range(2)])
    DatasetCatalog.get(name)[1]["annotations"][0]["bbox"].append(30)  # rotated
    run("--dataset", name)
    assert pictures(tmp_path / "out") == ["0.png"]
    assert ", 1 skipped" in capsys.readouterr().out
