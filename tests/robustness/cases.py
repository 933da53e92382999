"""
Bad input of every kind, as command lines. Each must end in one line, in time, without a traceback,
without running code of the input, and without a change to the folder of a good training.
"""

import dataclasses
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "SmallShapes" / "instant_test.yaml"


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    name: str
    words: tuple[str, ...]
    """the script, relative to the repository, and its arguments"""
    succeeds: bool = False
    """it is right to go on, having said what is left out"""


class Bomb:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


def train(run: Path, *pairs: str, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    defaults = {
        "DATASETS.TRAIN": "('small_shapes_mini_train',)",
        "DATASETS.TEST": "()",
        "SOLVER.MAX_ITER": "2",
        "TEST.EVAL_PERIOD": "0",
        "OUTPUT_DIR": str(run),
    }
    defaults.update(zip(pairs[::2], pairs[1::2], strict=True))
    words = [word for pair in defaults.items() for word in pair]
    return "train_net.py", "--config-file", str(CONFIG), *flags, *words


def weights(folder: Path) -> Iterator[tuple[str, Path]]:
    bomb = {"model": {"a": np.zeros(2)}, "b": Bomb(folder / "bomb_went_off")}
    contents = {
        "three": 3,
        "none": None,
        "list": [torch.zeros(2)],
        "numbered": {1: torch.zeros(2)},
        "nested list": {"a": [1.0]},
        "no tensors": {"model": {}},
        "complex": {"a": torch.zeros(2, dtype=torch.complex64)},
        "other": {"model": {"layer.weight": torch.zeros(2)}},
        "nan": {"model": {"layer.weight": torch.full((2,), torch.nan)}},
        "code": bomb,
    }
    for name, content in contents.items():
        path = folder / f"{name}.pth"
        torch.save(content, path)
        yield name, path
    for suffix in ("pkl", "pth", "pyth", "bin"):
        path = folder / f"pickle.{suffix}"
        path.write_bytes(pickle.dumps(bomb))
        yield f"a pickle as .{suffix}", path
    for name, data in (
        ("empty", b""),
        ("text", b"hello"),
        ("binary", bytes(range(256)) * 9),
        ("truncated", (folder / "other.pth").read_bytes()[:300]),
    ):
        path = folder / f"{name}.pth"
        path.write_bytes(data)
        yield name, path
    path = folder / "zip.pth"
    with zipfile.ZipFile(path, "w") as f:
        f.writestr("a", "b")
    yield "another zip", path
    yield "a folder", folder
    yield "missing", folder / "nothing.pth"


def configs(folder: Path) -> Iterator[tuple[str, Path]]:
    laughs = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    contents = {
        "cycle": "_BASE_: cycle.yaml\n",
        "base is a folder": "_BASE_: .\n",
        "base is missing": "_BASE_: nothing.yaml\n",
        "base is a number": "_BASE_: 3\n",
        "empty": "",
        "text": "hello",
        "list": "- 1\n- 2\n",
        "deep": "MODEL: " + "[" * 2000 + "]" * 2000,
        "laughs": laughs,
        "refers to itself": "MODEL: &a {b: *a}\n",
        "integer key": "3: 4\n",
        "integer key below": "MODEL: {3: 4}\n",
        "key twice": "SOLVER: {MAX_ITER: 3}\nSOLVER: {BASE_LR: 0.1}\n",
        "node is a number": "MODEL: 3\n",
        "node is null": "MODEL:\n",
        "value is null": "SOLVER: {MAX_ITER: }\n",
        "value is a node": "SOLVER: {MAX_ITER: {a: 1}}\n",
        "unknown key": "MODEL: {CBBL: {ALPA: 3}}\n",
        "code": "OUTPUT_DIR: !!python/object/apply:os.getcwd []\n",
        "tab": "MODEL:\n\tMASK_ON: True\n",
        "binary": "\x00\x01\x02",
    }
    for name, content in contents.items():
        path = folder / f"{name}.yaml"
        path.write_text(content)
        yield name, path
    (folder / "utf16.yaml").write_bytes("MODEL: {}".encode("utf-16"))
    yield "utf-16", folder / "utf16.yaml"
    yield "a folder", folder
    yield "missing", folder / "nothing.yaml"


VALUES = {
    "SOLVER.MAX_ITER": ("0", "-1", "1.5", "many"),
    "SOLVER.CHECKPOINT_PERIOD": ("0", "-1"),
    "TEST.EVAL_PERIOD": ("-1",),
    "SOLVER.BASE_LR": ("-0.1", "0.0", "float('nan')", "1e999"),
    "SOLVER.IMS_PER_BATCH": ("0", "-2"),
    "SOLVER.OPTIMIZER": ("Adam",),
    "SOLVER.LR_SCHEDULER_NAME": ("Cosine",),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("-1.0",),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("some",),
    "DATALOADER.NUM_WORKERS": ("-1",),
    "DATALOADER.SAMPLER_TRAIN": ("Some",),
    "INPUT.FORMAT": ("HSV",),
    "INPUT.MIN_SIZE_TRAIN": ("()", "(-5,)"),
    "MODEL.DEVICE": ("gpu", "cuda:many", "meta"),
    "MODEL.RESNETS.DEPTH": ("17",),
    "MODEL.RESNETS.NORM": ("XN",),
    "MODEL.BACKBONE.NAME": ("build_nothing",),
    "MODEL.ROI_HEADS.NAME": ("Nothing",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("Align",),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ("(0.0, 1.0, 1.0, 1.0)", "(1.0,)"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": ("-1.0",),
    "MODEL.RPN.LOSS_WEIGHT": ("-1.0",),
    "MODEL.ROI_HEADS.IN_FEATURES": ("['p9']",),
    "MODEL.FPN.IN_FEATURES": ("['res9']",),
    "MODEL.ROI_HEADS.NUM_CLASSES": ("-1", "3"),
    "MODEL.CBBL.ALPHA": ("-1.0", "1e39"),
    "MODEL.CBBL.BETA": ("-1.0", "1e9"),
    "MODEL.CBBL.NUM_INTERVALS": ("0", "10000000"),
    "MODEL.CBBL.INIT_STD": ("1e-30",),
    "MODEL.CBBL.LABEL": ("soft",),
    "MODEL.CBBL.UNCERTAINTY": ("some",),
    "MODEL.CBBL.UNCERTAINTY_WEIGHT": ("-0.1",),
    "SEED": ("1000000000000",),
    "DATASETS.TRAIN": ("('nothing',)", "()"),
    "DATASETS.COCO_FORMAT": ("[['a', 'b']]", "[3]"),
    "DATASETS.PROPOSAL_FILES_TRAIN": ("3",),
}


def pictures(folder: Path) -> None:
    """A folder in which one image is sound."""
    Image.new("RGB", (60, 40), (90, 90, 90)).save(folder / "sound.png")
    Image.new("RGB", (30000, 2)).save(folder / "narrow.png")
    Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((40, 60), 9000, np.uint16)).save(folder / "deep.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    data = (folder / "sound.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    # A header that claims 60000 x 60000 pixels.
    (folder / "huge.png").write_bytes(data[:16] + struct.pack(">II", 60000, 60000) + data[24:])


def build(folder: Path, run: Path) -> list[Case]:
    """
    Args:
        folder: for the files of the cases.
        run: ``OUTPUT_DIR`` of a good training.
    """
    cases = []

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    good = str(run / "model_final.pth")
    for name, path in weights(new("weights")):
        opts = ("MODEL.WEIGHTS", str(path))
        out = folder / "out"
        cases.append(Case("weights, training", name, train(out, *opts)))
        evaluation = train(
            out, *opts, "DATASETS.TEST", "('small_shapes_mini_val',)", flags=("--eval-only",)
        )
        cases.append(Case("weights, evaluation", name, evaluation))
        predict = ("tools/predict.py", "--weights", str(path), "--config-file", str(CONFIG))
        predict += ("--input", str(folder / "pictures" / "sound.png"), "--output", str(out))
        cases.append(Case("weights, prediction", name, predict))
    # Weights of other layers are a start for a training.
    fine = {"no tensors"}
    cases = [c for c in cases if not (c.kind == "weights, training" and c.name in fine)]

    for name, path in configs(new("configs")):
        for script in ("train_net.py", "tools/check_dataset.py"):
            words = (script, "--config-file", str(path))
            if script != "train_net.py":
                words += ("--dataset", "small_shapes_mini_val")
            cases.append(Case("config file", f"{name}, {script}", words))
        study = ("tools/run_study.py", str(path))
        cases.append(Case("study file", name, study))

    for key, values in VALUES.items():
        for value in values:
            # --resume: the folder of the good training must stay as it is.
            words = train(run, key, value, flags=("--resume",))
            cases.append(Case("value", f"{key} {value}", words))

    for name, flags in {
        "num-gpus": ("--num-gpus", "-1"),
        "num-machines": ("--num-machines", "0"),
    }.items():
        cases.append(Case("command line", name, train(folder / "out", flags=flags)))
    cases.append(Case("command line", "no config", ("train_net.py",)))

    blocked = folder / "file"
    blocked.touch()
    for name, path in {"a file": blocked, "below a file": blocked / "x"}.items():
        cases.append(Case("OUTPUT_DIR", name, train(path)))

    pictures(new("pictures"))
    predict = ("tools/predict.py", "--weights", good, "--input", str(folder / "pictures"))
    cases.append(Case("images", "a folder", (*predict, "--output", str(folder / "p")), True))
    for name in ("float.tif", "deep.png", "empty.png", "text.jpg", "cut.png", "huge.png"):
        words = ("tools/predict.py", "--weights", good, "--output", str(folder / "p1"))
        cases.append(Case("images", name, (*words, "--input", str(folder / "pictures" / name))))

    runs = new("runs")
    for name, content in {
        "binary": bytes(range(256)),
        "text": b"hello\n",
        "list": b"[1, 2]\n",
        "deep": b"[" * 5000,
        "mixed": b'{"iteration": 1, "total_loss": 2.0}\n\xff\xfe{]\n',
    }.items():
        (runs / name).mkdir()
        (runs / name / "metrics.json").write_bytes(content)
        (runs / name / "config.yaml").write_text("{}" if name != "list" else "[1]")
        compare = ("tools/compare.py", str(runs / name), str(run))
        cases.append(Case("compare", name, compare, name in ("mixed",)))
    return cases


def good_training(run: Path) -> tuple[str, ...]:
    return train(run)


def state(folder: Path) -> dict[str, bytes]:
    """What a refused command may not change: all but what it logs."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("log.txt", ".lock") and "tfevents" not in p.name
    }


def fault(case: Case, status: int, errors: str) -> str:
    """What is wrong with the end of a command; "" if nothing."""
    if status < 0:
        return f"it was ended by signal {-status}: it hung, or it crashed"
    if "Traceback (most recent call last)" in errors:
        return "a traceback"
    lines = [x for x in errors.splitlines() if x.startswith(("error: ", "usage: "))]
    if case.succeeds:
        return "" if status == 0 else f"refused: {lines}"
    if status == 0:
        return "accepted in silence"
    return "" if len(lines) == 1 else f"{len(lines)} error lines"
