import csv
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

import cbbl_d2.inference.pictures  # noqa: E402
from cbbl_d2.data.coco_format import register_coco_format  # noqa: E402
from cbbl_d2.engine import load_config  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.FPN.OUT_CHANNELS", "8"]
TINY += ["MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.RPN.CONV_DIMS", "[8]"]
TINY += ["INPUT.MIN_SIZE_TEST", "64", "TEST.DETECTIONS_PER_IMAGE", "5", "DATASETS.TRAIN", "()"]
TINY += ["DATASETS.TEST", "('small_shapes_val',)"]
NAME = "cbbl_test_predict"
FORMATS = ["pictures", "results", "annotations", "csv", "yolo"]


@pytest.fixture(scope="module")
def tool(load_script):
    return load_script("tools/predict.py")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained model.pth with config.yaml beside it, as a training writes them."""
    folder = tmp_path_factory.mktemp("training")
    cfg = load_config(str(ROOT / "configs/SmallShapes/cbbl.yaml"), TINY)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "model.pth")


@pytest.fixture
def run(tool, weights, tmp_path):
    """``run(arguments)``: the tool with a threshold of 0, writing into ``tmp_path/out``."""

    def run(*args, weights=weights, threshold="0", output=tmp_path / "out"):
        command = ["--weights", weights, "--output", str(output), *map(str, args)]
        if threshold is not None:
            command[:0] = ["--score-threshold", threshold]
        tool.main(command)
        return Path(output)

    return run


@pytest.fixture
def dataset(tmp_path):
    """Two images with an object each, registered with the five classes of the model."""
    annotations = [
        {"id": i, "image_id": 10 * i, "category_id": 4, "bbox": [5, 5, 30, 20], "area": 600}
        for i in (1, 2)
    ]
    images = [{"id": 10 * i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    for i in (1, 2):
        make_image(tmp_path / f"set/{i}.png", seed=i)
    categories = [{"id": i, "name": f"name {i}"} for i in (2, 4, 6, 8, 9)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "set.json").write_text(json.dumps(content))
    register_coco_format(NAME, str(tmp_path / "set.json"), str(tmp_path / "set"))
    yield NAME
    DatasetCatalog.pop(NAME)
    MetadataCatalog.pop(NAME)


def make_image(path, height=40, width=60, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), image)
    return path


def make_video(path, frames=3):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 7, (64, 48))
    for i in range(frames):
        rng = np.random.default_rng(i)
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    return path


def files(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


def test_the_checkpoint_alone_is_enough(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    make_image(tmp_path / "in/b.jpg", 50, 70)
    make_video(tmp_path / "in/clip.mp4")
    out = run("--input", tmp_path / "in")
    frames = [f"clip/frame_00000{i}" for i in range(3)]
    labels = [f"yolo/labels/{x}.txt" for x in ["a", "b", *frames]]
    expected = ["annotations.json", "pictures/a.png", "pictures/b.png", "predictions.csv"]
    expected += ["predictions.json", "videos/clip.mp4", "yolo/classes.txt", "yolo/data.yaml"]
    assert files(out) == sorted(expected + labels)
    assert f"in 5 images, written to {out}" in capsys.readouterr().out

    coco = COCO(str(out / "annotations.json"))
    assert [i["file_name"] for i in coco.imgs.values()] == [
        "a.png",
        "b.jpg",
        *(f"{x}.png" for x in frames),
    ]
    assert [(i["width"], i["height"]) for i in coco.imgs.values()] == [
        (60, 40),
        (70, 50),
        *[(64, 48)] * 3,
    ]
    assert coco.cats[1]["name"] == "disk"
    results = json.loads((out / "predictions.json").read_text())
    assert len(results) == len(coco.anns) > 0
    with open(out / "predictions.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == len(results)
    assert sum(len((out / x).read_text().splitlines()) for x in labels) == len(results)

    video = cv2.VideoCapture(str(out / "videos/clip.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and video.get(cv2.CAP_PROP_FPS) == 7


def test_the_batch_size_changes_nothing(run, tmp_path):
    for i, size in enumerate([(40, 60), (60, 40), (40, 60), (50, 50), (40, 60)]):
        make_image(tmp_path / f"in/{i}.png", *size, seed=i)
    results = []
    for n in (1, 2, 5):
        out = run("--input", tmp_path / "in", "--batch-size", n, output=tmp_path / f"{n}")
        results.append(json.loads((out / "predictions.json").read_text()))
    assert len(results[0]) > 5
    for other in results[1:]:
        assert [d["image_id"] for d in other] == [d["image_id"] for d in results[0]]
        for a, b in zip(other, results[0], strict=True):
            assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_the_threshold(run, tmp_path, capsys):
    make_image(tmp_path / "a.png")
    out = run("--input", tmp_path / "a.png", threshold="1")
    assert json.loads((out / "predictions.json").read_text()) == []
    assert (out / "yolo/labels/a.txt").read_text() == ""
    assert "No prediction has a score of 1 or more" in capsys.readouterr().out


def test_a_limit_that_is_reached_is_said(run, tmp_path, capsys):
    make_image(tmp_path / "a.png")
    for limit, is_said in ((5, True), (50, False), (-1, False)):  # -1: no limit
        opts = ["--opts", "TEST.DETECTIONS_PER_IMAGE", limit, "MODEL.RPN.POST_NMS_TOPK_TEST", 9]
        run("--input", tmp_path / "a.png", *opts)
        assert ("TEST.DETECTIONS_PER_IMAGE" in capsys.readouterr().out) == is_said


def test_formats_that_are_not_wanted_are_not_written(run, tmp_path):
    make_image(tmp_path / "a.png")
    assert files(run("--input", tmp_path / "a.png", "--formats", "csv")) == ["predictions.csv"]


def test_files_that_cannot_be_read_are_named_and_counted(run, error, tmp_path, capsys):
    good = make_image(tmp_path / "in/good.png")
    (tmp_path / "in/cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "in/no.mp4").write_bytes(b"no video")
    run("--input", tmp_path / "in")
    out, err = capsys.readouterr()
    assert ", 2 skipped" in out
    skipped = [x for x in err.splitlines() if "skipped: " in x]
    assert len(skipped) == 2 and "cut.png" in skipped[0] and "no.mp4" in skipped[1]
    assert "none of the 1 files" in error("--input", tmp_path / "in/cut.png")


def test_class_names(run, error, tmp_path):
    make_image(tmp_path / "a.png")
    out = run("--input", tmp_path / "a.png", "--formats", "yolo", "--class-names", *"vwxyz")
    assert (out / "yolo/classes.txt").read_text() == "v\nw\nx\ny\nz\n"
    assert "5 classes" in error("--input", tmp_path / "a.png", "--class-names", "v")


def test_class_names_that_are_nowhere_are_numbered_and_said_to_be(run, tmp_path, capsys):
    make_image(tmp_path / "a.png")
    out = run("--input", tmp_path / "a.png", "--formats", "yolo", "--opts", "DATASETS.TEST", "()")
    assert (out / "yolo/classes.txt").read_text().startswith("class 0\nclass 1\n")
    assert "--class-names" in capsys.readouterr().out


def test_a_data_set_gets_the_metrics_of_its_results_file(run, dataset, tmp_path, capsys):
    out = run("--dataset", dataset, threshold=None)
    metrics = json.loads((out / "metrics.json").read_text())["bbox"]
    assert "APvs" in capsys.readouterr().out
    truth = COCO(str(tmp_path / "set.json"))
    results = truth.loadRes(str(out / "predictions.json"))
    assert {r["image_id"] for r in results.anns.values()} == {10, 20}
    assert {r["category_id"] for r in results.anns.values()} <= {2, 4, 6, 8, 9}
    evaluation = COCOeval(truth, results, "bbox")
    for annotation in truth.anns.values():
        annotation["iscrowd"] = 0
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert metrics["AP"] == pytest.approx(100 * evaluation.stats[0])
    assert "pictures" not in os.listdir(out)


def test_a_data_set_with_a_broken_image_gets_no_metrics(error, dataset, tmp_path):
    (tmp_path / "set/2.png").write_bytes(b"")
    assert "1 of its images" in error("--dataset", dataset, threshold=None)
    assert not (tmp_path / "out/metrics.json").exists()
    assert (tmp_path / "out/predictions.json").exists()


def test_ground_truth_beside_the_predictions_of_some_images(run, dataset, tmp_path, capsys):
    options = ["--dataset", dataset, "--num-images", 1, "--scale", 2]
    out = run(*options, threshold=None)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "no AP" in x]
    assert dataset in line and "--num-images" in line
    assert not (out / "metrics.json").exists()
    assert files(out / "pictures") == ["1.png"] and files(out / "yolo/labels") == ["1.txt"]
    assert cv2.imread(str(out / "pictures/1.png")).shape[1] > 2 * 2 * 60
    # Without AP there is no reason to keep what nobody would show.
    detections = json.loads((out / "predictions.json").read_text())
    assert all(x["score"] > 0.5 for x in detections)
    out = run(*options, "--no-ground-truth", output=tmp_path / "alone")
    assert cv2.imread(str(out / "pictures/1.png")).shape[1] == 2 * 60


def test_pictures_of_a_whole_data_set_show_half_sure_objects_alone(run, dataset, monkeypatch):
    """AP counts all that the model lets through."""
    shown, draw_pair = [], cbbl_d2.inference.pictures.draw_pair

    def spy(image, truth, instances, *args, **kwargs):
        shown.extend(instances.scores.tolist())
        assert len(truth) == 1
        return draw_pair(image, truth, instances, *args, **kwargs)

    monkeypatch.setattr(cbbl_d2.inference.pictures, "draw_pair", spy)
    opts = ["--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    out = run("--dataset", dataset, "--formats", *FORMATS, *opts, threshold=None)
    scores = [x["score"] for x in json.loads((out / "predictions.json").read_text())]
    assert len(scores) == 10 and min(scores) < 0.5
    assert sorted(shown) == sorted(x for x in scores if x >= 0.5)
    assert (out / "metrics.json").exists()


def test_spread_over_the_files(run, tmp_path):
    for i in range(4):
        make_image(tmp_path / f"in/{i}.png")
    out = run("--input", tmp_path / "in", "--num-images", 2)
    assert files(out / "pictures") == ["0.png", "2.png"]


def test_an_image_that_cannot_be_drawn_is_predicted_on_all_the_same(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    make_image(tmp_path / "in/b.png", 20, 700)
    out = run("--input", tmp_path / "in", "--scale", 50)
    assert files(out / "pictures") == ["a.png"]
    printed, err = capsys.readouterr()
    assert ", 1 not drawn" in printed and "scale 50 makes a picture" in err
    assert {x["image_id"] for x in json.loads((out / "predictions.json").read_text())} == {1, 2}


def test_slices(run, dataset, tmp_path):
    pytest.importorskip("sahi")
    make_image(tmp_path / "big.png", 150, 200)
    options = ["--slice", 64, "--overlap", 0.25, "--no-whole-image"]
    out = run("--input", tmp_path / "big.png", *options)
    coco = COCO(str(out / "annotations.json"))
    assert coco.imgs[1]["width"] == 200
    boxes = np.array([a["bbox"] for a in coco.anns.values()])
    # More than the model's limit for one image, 5, and from all over the image.
    assert len(boxes) > 5 and (boxes[:, 0] > 130).any() and (boxes[:, 1] > 100).any()
    assert (boxes[:, :2] + boxes[:, 2:] <= (200, 150)).all()
    out = run("--dataset", dataset, *options, threshold=None, output=tmp_path / "second")
    assert "AP" in json.loads((out / "metrics.json").read_text())["bbox"]


def test_slicing_without_sahi(error, tool, tmp_path, monkeypatch):
    import sys

    make_image(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "cbbl_d2.inference.sliced", None)
    line = error("--input", tmp_path / "a.png", "--slice", 64)
    assert "sahi" in line and "pip install --no-deps 'sahi>=0.12.8,<0.13'" in line
    assert "--slice" in error("--input", tmp_path / "a.png", "--overlap", 0.3)


def test_the_files_are_never_overwritten(error, tmp_path):
    image = make_image(tmp_path / "out/pictures/a.png")
    before = image.read_bytes()
    assert "choose another --output" in error("--input", image)
    assert image.read_bytes() == before


def test_lines_for_what_is_not_there(error, weights, tmp_path):
    image = make_image(tmp_path / "a.png")
    assert "no such" in error("--input", tmp_path / "b.png")
    assert "no such weights" in error("--input", image, weights=str(tmp_path / "x.pth"))
    assert "did you mean small_shapes_" in error("--dataset", "small_shape_vall")
    (tmp_path / "file").write_text("")
    assert "cannot be made a folder" in error("--input", image, output=tmp_path / "file/out")


@pytest.mark.parametrize(
    "option, value",
    [("--score-threshold", "50"), ("--batch-size", "0"), ("--overlap", "1"), ("--slice", "x")],
)
def test_impossible_options(tool, capsys, option, value):
    with pytest.raises(SystemExit):
        tool.get_parser().parse_args(["--weights", "x", "--input", "y", option, value])
    assert f"{value}: must be" in capsys.readouterr().err


def test_files_of_an_earlier_prediction_are_said(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    out = run("--input", tmp_path / "in/a.png", "--formats", "yolo")
    assert "earlier prediction" not in capsys.readouterr().out
    make_image(tmp_path / "in/b.png")
    run("--input", tmp_path / "in/b.png", "--formats", "yolo")
    assert f"{out}: yolo/labels has files of an earlier prediction" in capsys.readouterr().out
    assert sorted(x.name for x in (out / "yolo/labels").iterdir()) == ["a.txt", "b.txt"]


# -- uncertainty -----------------------------------------------------------------------------------


def test_uncertainty_and_an_explained_detection(run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    options = ("--input", tmp_path / "in/a.png", "--formats", "pictures", "results")
    plain = run(*options, output=tmp_path / "plain")
    out = run(*options, "--uncertainty", "--explain", "a.png:0", "a.png:3", output=tmp_path / "out")
    assert files(out) == ["explained/a_0.png", "explained/a_3.png", "pictures/a.png"] + [
        "predictions.json"
    ]
    assert "Explained: " in capsys.readouterr().out
    # The distributions are in the figure alone.
    assert (plain / "predictions.json").read_text() == (out / "predictions.json").read_text()
    pictures = [cv2.imread(str(x / "pictures/a.png")) for x in (plain, out)]
    assert pictures[0].shape == pictures[1].shape and not np.array_equal(*pictures)


def test_errors_of_uncertainty(error, run, tmp_path, capsys):
    make_image(tmp_path / "in/a.png")
    options = ("--input", tmp_path / "in/a.png", "--formats", "pictures")
    assert "b.png:0: no such image" in error(*options, "--explain", "b.png:0")
    assert "a.png:9: a.png has 5 detections" in error(*options, "--explain", "a.png:9")
    assert "add pictures" in error("--input", "x.png", "--formats", "csv", "--uncertainty")
    assert "not with --slice" in error(*options, "--explain", "a.png:0", "--slice", 32)
    with pytest.raises(SystemExit):
        run(*options, "--explain", "a.png")
    assert "'a.png' is not IMAGE:INDEX" in capsys.readouterr().err


def test_a_stock_detector_has_no_uncertainty(error, weights, tmp_path):
    make_image(tmp_path / "in/a.png")
    config = str(ROOT / "configs/SmallShapes/smooth_l1.yaml")
    cfg = load_config(config, TINY)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "stock.pth")
    stock = {"weights": str(tmp_path / "stock.pth")}
    options = ("--config-file", config, "--input", tmp_path / "in/a.png", "--formats", "pictures")
    for args, message in (
        (["--uncertainty"], "have no deviations"),
        (
            ["--explain", "a.png:0"],
            "MODEL.ROI_HEADS.NAME StandardROIHeads has no distributions: leave it out",
        ),
    ):
        assert message in error(*options, *args, "--opts", *TINY, **stock)
