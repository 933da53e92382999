"""What a user sees who gives train_net.py something that cannot work."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from tests.driver import run_scripts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZE = 96


def _coco():
    boxes = [[10, 10, 12, 12], [40, 30, 20, 16], [60, 60, 8, 9]]
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": SIZE, "height": SIZE} for i in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "ship"}],
        "annotations": [
            {
                "id": 10 * image_id + i,
                "image_id": image_id,
                "category_id": 1 + i % 2,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for image_id in (1, 2, 3)
            for i, box in enumerate(boxes)
        ],
    }


def _write_files(folder):
    rng = np.random.default_rng(0)
    for name in ("images", "truncated"):
        (folder / name).mkdir()
        for i in (1, 2, 3):
            noise = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{i}.jpg")
    image = folder / "truncated" / "2.jpg"
    image.write_bytes(image.read_bytes()[:1500])
    for name in ("all_truncated", "one_missing"):
        (folder / name).mkdir()
    for i in (1, 2, 3):
        (folder / "all_truncated" / f"{i}.jpg").write_bytes(image.read_bytes())
    for i in (1, 2):
        (folder / "one_missing" / f"{i}.jpg").write_bytes(image.read_bytes())

    unnamed, bad_boxes, no_images = _coco(), _coco(), _coco()
    del unnamed["categories"][1]["name"]
    no_images["images"] = []
    for annotation in bad_boxes["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    for id, box in ((0, [5, 5, 9, 9]), (1, [5, 5, 0, 9]), (2, [5, float("nan"), 9, 9])):
        more = copy.deepcopy(bad_boxes["annotations"][0])
        bad_boxes["annotations"].append({**more, "id": id, "bbox": box})
    files = {
        "good": _coco(),
        "unnamed": unnamed,
        "bad_boxes": bad_boxes,
        "no_images": no_images,
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "malformed.json").write_text(json.dumps(_coco())[:-30])
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, folder / "other.pth")


def _arguments(folder, *flags, json_file="good", images="images", opts=(), output="output"):
    """Command line for training and evaluating on one small data set for two iterations."""
    data = f"[['mine', '{folder / json_file}.json', '{folder / images}']]"
    config = ROOT / "configs" / "SmallShapes" / "instant_test.yaml"
    pairs = {
        "DATASETS.COCO_FORMAT": data,
        "DATASETS.TRAIN": "('mine',)",
        "DATASETS.TEST": "('mine',)",
        "MODEL.ROI_HEADS.NUM_CLASSES": "2",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
        "SOLVER.MAX_ITER": "2",
        "TEST.EVAL_PERIOD": "0",
        "OUTPUT_DIR": str(folder / output),
        **dict(zip(opts[::2], opts[1::2], strict=True)),
    }
    if "DATASETS.TEST" not in opts and "--eval-only" not in flags:
        pairs["DATASETS.TEST"] = "()"
    words = [word for pair in pairs.items() for word in pair]
    return ["--config-file", str(config), *flags, *words]


def _cases(folder):
    weights = ("MODEL.WEIGHTS", str(folder / "output" / "model_final.pth"))
    no_training_data = (
        "DATASETS.COCO_FORMAT",
        f"[['gone', '{folder}/gone.json', '{folder}/gone'], "
        f"['mine', '{folder}/good.json', '{folder}/images']]",
        "DATASETS.TRAIN",
        "('gone',)",
    )

    def line(*args, **kwargs):
        return _arguments(folder, *args, **kwargs)

    return {
        "missing_json": line(json_file="absent"),
        "malformed_json": line(json_file="malformed"),
        "no_images": line(json_file="no_images"),
        "unnamed_category": line(json_file="unnamed"),
        "wrong_folder": line(images="nowhere"),
        "num_classes": line(opts=("MODEL.ROI_HEADS.NUM_CLASSES", "80")),
        "unknown_data_set": line(opts=("DATASETS.TRAIN", "('small_shape_train',)")),
        "malformed_entry": line(opts=("DATASETS.COCO_FORMAT", "['mine', 'x.json']")),
        "unknown_key": line(opts=("SOLVER.MAX_ITERS", "3")),
        "batch_of_64_processes": line("--num-gpus", "64"),
        "amp": line(opts=("SOLVER.AMP.ENABLED", "True")),
        "other_weights": line(opts=("MODEL.WEIGHTS", str(folder / "other.pth"))),
        "all_truncated": line(images="all_truncated", opts=("DATALOADER.NUM_WORKERS", "1")),
        "one_missing": line(images="one_missing", opts=("DATASETS.TEST", "('mine',)")),
        # Writes the weights for those below.
        "train_truncated": line(images="truncated"),
        "eval_truncated": line("--eval-only", images="truncated", opts=weights),
        "eval_truncated_workers": line(
            "--eval-only", images="truncated", opts=(*weights, "DATALOADER.NUM_WORKERS", "2")
        ),
        "eval_bad_boxes": line("--eval-only", json_file="bad_boxes", opts=weights),
        "eval_without_training_data": line("--eval-only", opts=(*weights, *no_training_data)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    _write_files(folder)
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    """``outcome(case)``: exit status, standard output and standard error of train_net.py."""
    cases = [[name, "train_net.py", *words] for name, words in _cases(folder).items()]
    status = run_scripts(cases, folder)

    def get(case):
        read = [(folder / f"{case}.{stream}").read_text() for stream in ("out", "err")]
        return status[case], *read

    return get


@pytest.mark.parametrize(
    "case, words",
    [
        ("missing_json", ["{folder}/absent.json: no such annotation file", "correct the path"]),
        ("malformed_json", ["{folder}/malformed.json: not valid JSON at line 1, column", "export"]),
        ("no_images", ['{folder}/no_images.json: no images: "images" is empty', "right file?"]),
        ("unnamed_category", ["{folder}/unnamed.json: category 2 has no name", 'add "name"']),
        ("wrong_folder", ["{folder}/nowhere: no such folder", "correct the image folder"]),
        ("num_classes", ["mine has 2 classes", "set MODEL.ROI_HEADS.NUM_CLASSES 2"]),
        ("unknown_data_set", ["small_shape_train (did you mean small_shapes_train"]),
        ("malformed_entry", ["DATASETS.COCO_FORMAT: ", "[name, annotation_json, image_folder]"]),
        ("unknown_key", ["SOLVER.MAX_ITERS", "SOLVER.MAX_ITER?"]),
        ("batch_of_64_processes", ["SOLVER.IMS_PER_BATCH = 2", "the number of processes, 64"]),
        ("amp", ["SOLVER.AMP.ENABLED = True", "set SOLVER.AMP.ENABLED False"]),
        ("other_weights", ["{folder}/other.pth: weights of another architecture", "give the"]),
        ("all_truncated", ["3 images in a row", "{folder}/all_truncated/", "check the image fol"]),
        (
            "one_missing",
            ["1 of its 3 images are missing", "{folder}/one_missing/3.jpg", "good.json"],
        ),
        ("eval_truncated", ["{folder}/truncated/2.jpg (", "restore the file"]),
        ("eval_truncated_workers", ["{folder}/truncated/2.jpg (", "restore the file"]),
    ],
)
def test_ends_in_one_clear_line(outcome, folder, case, words):
    status, _, err = outcome(case)
    assert status == 1, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert line.startswith("error: ")
    for word in words:
        assert word.format(folder=folder) in line


def test_training_goes_on_without_a_truncated_image(outcome, folder):
    status, out, err = outcome("train_truncated")
    assert status == 0, err
    assert "error:" not in err and "Traceback" not in err
    skipped = [line for line in out.splitlines() if "Skipping the image" in line]
    assert all(f"{folder}/truncated/2.jpg: " in line for line in skipped)
    assert len(skipped) == 1
    assert (folder / "output" / "model_final.pth").is_file()


def test_evaluation_leaves_out_bad_boxes_and_says_so(outcome):
    status, out, err = outcome("eval_bad_boxes")
    assert status == 0, err
    assert "Traceback" not in err
    assert "2 boxes of the ground truth not counted in the evaluation" in out
    assert "10 boxes without a usable area in the annotation file" in out


def test_evaluation_needs_no_training_data(outcome):
    status, _, err = outcome("eval_without_training_data")
    assert status == 0, err
