"""Weights run no code, a good run survives what is refused, what is not finite is not kept."""

import codecs
import collections
import errno
import json
import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.data.dataset_checks import check_proposals  # noqa: E402
from cbbl_d2.engine import CBBLCheckpointer, CBBLTrainer, claimed, config_restored  # noqa: E402
from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.plain_pickle import check_pickle  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 4)


class Code:
    """Leaves a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bombs(path):
    """Objects whose unpickling would write ``path``."""
    text = f"open({path!r}, 'w').write('x')"
    command = f"touch {path}"
    return {
        "eval": Code(eval, text),
        "os.system": Code(os.system, command),
        "subprocess": Code(subprocess.call, command.split()),
        "in an array": np.array([Code(os.system, command)], dtype=object),
        "in a dict": {"model": {"a": np.zeros(3), "b": Code(os.system, command)}},
        "in a set": {Code(os.system, command)},
        "getattr": Code(getattr, dict, "get"),
        "getattr of a mode": Code(getattr, BoxMode, "mro"),
        "a codec": Code(codecs.encode, "x", "rot13"),
    }


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_pass(tmp_path, protocol):
    content = {
        "model": collections.OrderedDict(
            a=np.ones((3, 4), np.float32), b=np.asfortranarray(np.eye(3)), c=np.zeros(0)
        ),
        "numbers": [np.float64(3), np.int64(4), 5, 1.5, True, None, 2j],
        "text": ["é", b"", b"abc", bytearray(b"abc")],
        "sets": [{1, 2}, frozenset((3,))],
        "mode": BoxMode.XYXY_ABS,
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    check_pickle(str(path))


@pytest.mark.parametrize("name", bombs("x"))
@pytest.mark.parametrize("protocol", (0, 2, 5))
def test_code_is_refused_and_does_not_run(tmp_path, name, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(bombs(str(tmp_path / "trace"))[name], protocol=protocol))
    for load in (check_pickle, CBBLCheckpointer(Layers()).load):
        with pytest.raises(UserError, match=f"{path}: holds ") as e:
            load(str(path))
        assert "\n" not in str(e.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"cos\nsystem\n", b"(lp0\n" * 9])
def test_what_is_no_pickle(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        check_pickle(str(path))


@pytest.mark.parametrize("name", ["last.pth", "x.pyth", "x.pkl", "x"])
def test_no_kind_of_weights_runs_code(tmp_path, name):
    """Also where ``last_checkpoint`` names them."""
    bomb = bombs(str(tmp_path / "trace"))["in a dict"]
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tmp_path / name)
    with pytest.raises(UserError):
        CBBLCheckpointer(Layers()).load(str(tmp_path / name))
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match="no checkpoint in it can be resumed"):
        CBBLCheckpointer(Layers(), str(tmp_path)).resume_or_load("", resume=True)
    assert not (tmp_path / "trace").exists()


def test_a_file_of_the_model_zoo_loads(tmp_path):
    """As Detectron2 publishes them: arrays under "model", and an author."""
    weights = {k: v.numpy() + 1 for k, v in Layers().state_dict().items()}
    content = {"model": weights, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    model = Layers()
    CBBLCheckpointer(model).load(str(path))
    assert all(np.array_equal(v.numpy(), weights[k]) for k, v in model.state_dict().items())


def test_proposals_run_no_code(tiny_cfg, tmp_path):
    path = tmp_path / "proposals.pkl"
    cfg = tiny_cfg
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(path),)
    with pytest.raises(UserError, match="proposals cannot be read"):
        check_proposals(cfg)
    sound = {"ids": [1], "boxes": [np.zeros((2, 4))], "objectness_logits": [np.zeros(2)]}
    path.write_bytes(pickle.dumps(sound))
    check_proposals(cfg)
    path.write_bytes(pickle.dumps({**sound, "bbox_mode": bombs(str(tmp_path / "trace"))["eval"]}))
    for read in (check_proposals, CBBLTrainer.build_train_loader):
        with pytest.raises(UserError, match="holds .*eval"):
            read(cfg)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "content",
    [3, None, [], {}, {1: torch.zeros(2)}, {"a": None}, {"a": [1.0]}, {"model": None}]
    + [{"a": torch.zeros(2, dtype=torch.complex64)}, [torch.zeros(2)], "text", torch.zeros(2)],
    ids=str,
)
def test_odd_content_is_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=str(path)) as e:
        CBBLCheckpointer(Layers()).load(str(path))
    assert "\n" not in str(e.value)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_saved_nor_loaded(tmp_path, value):
    model = Layers()
    checkpointer = CBBLCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    torch.nn.init.constant_(model.first.bias, value)
    with pytest.raises(UserError, match="first.bias is not finite.*model_final is not written"):
        checkpointer.save("model_final")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    torch.save({"model": model.state_dict()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth: its first.bias is not finite"):
        CBBLCheckpointer(Layers()).load(str(tmp_path / "bad.pth"))


def test_an_infinite_gradient_in_the_last_iteration(tiny_cfg):
    cfg = tiny_cfg
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 4, 2, 0
    trainer = CBBLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    step = trainer._trainer.optimizer.step

    def explode(*args, **kwargs):
        if trainer.iter == 3:
            parameter.grad.fill_(np.inf)
        return step(*args, **kwargs)

    trainer._trainer.optimizer.step = explode
    with pytest.raises(UserError, match="is not finite, and the checkpoint .* is not written"):
        trainer.train()
    files = sorted(x for x in os.listdir(cfg.OUTPUT_DIR) if x.endswith(".pth"))
    assert files == ["model_0000001.pth"]
    again = CBBLTrainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(run, monkeypatch):
    before = {x.name: x.read_bytes() for x in run.iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    checkpointer = CBBLCheckpointer(Layers(), str(run))
    with pytest.raises(UserError, match="model_0000004 cannot be written .No space left.*--resume"):
        checkpointer.save("model_0000004")
    assert {x.name: x.read_bytes() for x in run.iterdir()} == before


def full_disk(_file):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- damaged checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, the third of them the newest."""
    model = Layers()
    for i in (1, 2, 3):
        torch.nn.init.constant_(model.first.bias, i)
        CBBLCheckpointer(model, str(tmp_path), trainer=model).save(f"model_{i:07d}", iteration=i)
        os.utime(tmp_path / f"model_{i:07d}.pth", (i, i))
    return tmp_path


def resumed(folder):
    model = Layers()
    CBBLCheckpointer(model, str(folder), trainer=model).resume_or_load("", resume=True)
    return float(model.first.bias[0])


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: torch.save({"model": Layers().state_dict()}, path),
        lambda path: torch.save({"model": {"first.bias": torch.full((4,), np.nan)}}, path),
    ],
    ids=["truncated", "empty", "missing", "weights alone", "nan"],
)
def test_the_newest_good_checkpoint_is_resumed(run, damage, caplog):
    assert resumed(run) == 3
    damage(run / "model_0000003.pth")
    caplog.set_level(logging.WARNING)
    assert resumed(run) == 2
    (message,) = {r.getMessage() for r in caplog.records if "Going on from" in r.getMessage()}
    assert "model_0000002.pth" in message and "model_0000003.pth" in message
    for i in (1, 2):
        (run / f"model_{i:07d}.pth").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in it can be resumed.*another OUTPUT_DIR"):
        resumed(run)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"\n", b"model_0000009.pth", b"../x.pkl", None]
)
def test_last_checkpoint_of_odd_content(run, content):
    path = run / "last_checkpoint"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert resumed(run) == 3


# -- what resuming changes -------------------------------------------------------------------------


def trained(cfg, iterations, resume):
    cfg.SOLVER.MAX_ITER = iterations
    trainer = CBBLTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as f:
        lines = [json.loads(line) for line in f]
    return trainer, [x["lr"] for x in lines if "lr" in x]


def test_resume_follows_the_rates_of_the_config(tiny_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    caplog.set_level(logging.INFO)
    cfg = tiny_cfg
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0, 0, ()
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1e-3, 1e-4
    trained(cfg, 2, resume=False)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1e-4, 1e-2
    trainer, rates = trained(cfg, 4, resume=True)
    assert rates[-1] == pytest.approx(1e-4)
    groups = trainer._trainer.optimizer.param_groups
    assert max(g["lr"] for g in groups) == pytest.approx(1e-4)
    assert max(g["weight_decay"] for g in groups) == pytest.approx(1e-2)
    (line,) = {r.getMessage() for r in caplog.records if "from here on" in r.getMessage()}
    assert "SOLVER.BASE_LR 0.0001 instead of 0.001" in line and "WEIGHT_DECAY" in line


def test_resume_with_another_optimizer_is_refused(tiny_cfg):
    cfg = tiny_cfg
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SOLVER.OPTIMIZER = "AdamW"
    trained(cfg, 2, resume=False)
    cfg.SOLVER.OPTIMIZER = "SGD"
    with pytest.raises(UserError, match="of another optimizer than SOLVER.OPTIMIZER SGD"):
        trained(cfg, 4, resume=True)


def test_resume_with_another_rate_of_the_localization(tiny_cfg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cbbl_d2"), "propagate", True)
    caplog.set_level(logging.INFO)
    cfg = tiny_cfg
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0, 0, ()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.BASE_LR = "WarmupMultiStepLR", 1e-3
    cfg.SOLVER.BBOX_PRED_LR_FACTOR = 2.0
    trained(cfg, 2, resume=False)
    cfg.SOLVER.BBOX_PRED_LR_FACTOR = 8.0
    trainer, _ = trained(cfg, 3, resume=True)
    groups = trainer._trainer.optimizer.param_groups
    assert {round(g["lr"], 6) for g in groups} == {1e-3, 8e-3}
    line = "SOLVER.BASE_LR times the factors of layers 0.001, 0.008 instead of 0.001, 0.002"
    assert any(line in r.getMessage() for r in caplog.records)
    # The groups of the last one are as many, and as large.
    for factors in ((1.0, 1.0), (8.0, 8.0), (1.0, 8.0)):
        cfg.SOLVER.BBOX_PRED_LR_FACTOR, cfg.SOLVER.ANCHOR_DELTAS_LR_FACTOR = factors
        with pytest.raises(UserError, match="ANCHOR_DELTAS_LR_FACTOR of 1 instead of another"):
            trained(cfg, 4, resume=True)


# -- the output folder -----------------------------------------------------------------------------


def test_a_folder_is_claimed_once(tmp_path):
    folder = str(tmp_path / "a/b")
    code = f"from cbbl_d2.engine import claimed\nwith claimed({folder!r}): print('mine')"
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.path.join(os.path.dirname(__file__), "../..")}
    with claimed(folder):
        other = subprocess.run(run, capture_output=True, text=True, env=environment)
        message = f"OUTPUT_DIR {folder}: another training is writing to it"
        assert other.returncode and message in other.stderr
    # A child of the process that held it lives on.
    code = f"import os, time\n{code.replace('print', 'os.fork() or time.sleep(9); os._exit')}"
    owner = subprocess.Popen([sys.executable, "-c", code.replace("'mine'", "0")], env=environment)
    owner.wait()
    assert subprocess.run(run, capture_output=True, text=True, env=environment).stdout == "mine\n"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match=f"OUTPUT_DIR {folder}: cannot be written to"):
            with claimed(str(folder)):
                pass


def test_a_refusal_leaves_the_config(tmp_path):
    path = tmp_path / "config.yaml"
    for before in (None, "good"):
        if before:
            path.write_text(before)
        with pytest.raises(UserError), config_restored(str(tmp_path)):
            path.write_text("bad")
            raise UserError("refused")
        assert (path.read_text() if path.exists() else None) == before
        with config_restored(str(tmp_path)):
            path.write_text("new")
        assert path.read_text() == "new"
        path.unlink()
