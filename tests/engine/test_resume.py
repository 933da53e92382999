"""A run that was interrupted and resumed against one that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from cbbl_d2.engine import CBBLTrainer, load_config
from cbbl_d2.engine.hooks import BestCheckpointer
from cbbl_d2.errors import UserError
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, get_event_storage

# Timings differ from run to run.
NOT_COMPARED = {"time", "data_time", "eta_seconds", "rank_data_time"}


class Interrupt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def metrics(output_dir):
    """iteration -> everything logged for it; of rows written twice the last counts."""
    rows = {}
    with open(os.path.join(output_dir, "metrics.json")) as f:
        for line in f:
            row = json.loads(line)
            rows.setdefault(row["iteration"], {}).update(row)
    return {i: {k: v for k, v in row.items() if k not in NOT_COMPARED} for i, row in rows.items()}


def train(cfg, output_dir, resume=False, interrupt_at=None):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(output_dir)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    # As default_setup does at the start of each process.
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    trainer = CBBLTrainer(cfg)
    # Writes each iteration, after everything else: the default period of 20 compares too little.
    trainer.register_hooks(
        [hooks.PeriodicWriter([JSONWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))], period=1)]
    )
    trainer.resume_or_load(resume=resume)
    if interrupt_at is not None:
        trainer.register_hooks([Interrupt(interrupt_at)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        # The evaluation comes between the checkpoint and the next iteration.
        ["TEST.EVAL_PERIOD", 4, "INPUT.RANDOM_FLIP", "horizontal"]
        + ["SOLVER.BBOX_PRED_LR_FACTOR", 3.0, "SOLVER.ANCHOR_DELTAS_LR_FACTOR", 4.0],
        # Without a fixed seed the data stream still has one, and images wait in two buckets.
        pytest.param(
            ["SEED", -1, "INPUT.MIN_SIZE_TRAIN", (96, 128)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_logs_the_losses_of_an_uninterrupted_one(tiny_cfg, tmp_path, overrides):
    tiny_cfg.merge_from_list(
        ["SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 8, "INPUT.RANDOM_FLIP", "none"]
    )
    tiny_cfg.merge_from_list(overrides)
    if tiny_cfg.SEED < 0:
        # The first part has to be the same run: copy it instead of making it twice.
        train(tiny_cfg, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        (tmp_path / "parts" / "last_checkpoint").write_text("model_0000003.pth")
    else:
        train(tiny_cfg, tmp_path / "whole")
        train(tiny_cfg, tmp_path / "parts", interrupt_at=6)
    trainer = train(tiny_cfg, tmp_path / "parts", resume=True)
    assert trainer.start_iter == 4

    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert set(whole) == set(parts) == set(range(9))
    for iteration in whole:
        assert parts[iteration].keys() == whole[iteration].keys()
        for key, value in whole[iteration].items():
            # repr: also NaN equals NaN
            assert repr(parts[iteration][key]) == repr(value), (iteration, key)
    assert whole[8]["bbox/AP"] == whole[8]["bbox/AP"]  # evaluated, not NaN

    a, b = (
        torch.load(tmp_path / d / "model_final.pth", weights_only=True) for d in ("whole", "parts")
    )
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    states = a["trainer"]["_trainer"]["optimizer"]["state"]
    assert len(states) > 50
    for index, state in states.items():
        other = b["trainer"]["_trainer"]["optimizer"]["state"][index]
        assert all(torch.equal(state[key], other[key]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(
    "name", ("cbbl_retinanet", pytest.param("giou_fcos", marks=pytest.mark.slow))
)
def test_dense_detectors_resume_with_their_normalizer(repository, tiny_cfg, tmp_path, name):
    """To rounding: torch optimizes Detectron2's focal loss, a scripted function, as it runs."""
    cfg = load_config(os.path.join(repository, "configs", "SmallShapes", f"{name}.yaml"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tiny_cfg.DATASETS.TRAIN, ()
    cfg.merge_from_list(
        ["SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.MAX_ITER", 5, "SOLVER.IMS_PER_BATCH", 2]
    )
    whole = train(cfg, tmp_path / "whole")
    train(cfg, tmp_path / "parts", interrupt_at=4)
    resumed = train(cfg, tmp_path / "parts", resume=True)
    assert resumed.start_iter == 3
    assert resumed.model.loss_normalizer == whole.model.loss_normalizer
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    for iteration in (3, 4):
        assert parts[iteration]["total_loss"] == pytest.approx(
            whole[iteration]["total_loss"], rel=1e-4
        )


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command_of(repository):
    config = os.path.join(repository, "configs", "SmallShapes", "instant_test.yaml")
    return [sys.executable, os.path.join(repository, "train_net.py"), "--config-file", config]


def start(command, folder, log):
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)


@pytest.mark.slow
def test_kill_9_and_resume_by_the_command_line(repository, tmp_path):
    """The resumed run logs what an uninterrupted one does; no checkpoint is half written."""
    command = command_of(repository)
    options = ["SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.MAX_ITER", "30", "DATASETS.TEST", "()"]

    def run(*words):
        result = subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    output = tmp_path / "killed"
    with open(tmp_path / "log", "w") as log:
        process = start([*command, *options, "OUTPUT_DIR", "killed"], tmp_path, log)
        deadline = time.time() + 300
        # Then the one before it, of iteration 5, is named in last_checkpoint, too.
        while not (output / "model_0000008.pth").exists():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = (output / "last_checkpoint").read_text()
    iteration = torch.load(output / last, weights_only=True)["iteration"]
    assert 5 <= iteration < 29

    log = run("--resume", *options, "OUTPUT_DIR", "killed")
    assert f"Starting training from iteration {iteration + 1}" in log
    for path in output.glob("*.pth"):
        torch.load(path, weights_only=True)
    run(*options, "OUTPUT_DIR", "whole")
    whole, killed = metrics(tmp_path / "whole"), metrics(output)
    assert set(whole) == {19, 29}  # the writers' period is 20
    for i in whole:
        assert {k: repr(v) for k, v in killed[i].items()} == {
            k: repr(v) for k, v in whole[i].items()
        }


@pytest.mark.slow
def test_twenty_random_kills(repository, tmp_path):
    """By SIGKILL and SIGTERM, whenever they come; the weights are those of a run left in peace."""
    command = [
        *command_of(repository),
        "--resume",
        *("SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "150", "DATASETS.TEST", "()"),
    ]
    draw = random.Random(1)
    kills = 0
    with open(tmp_path / "log", "w") as log:
        while True:
            process = start([*command, "OUTPUT_DIR", "killed"], tmp_path, log)
            if kills == 20:
                assert process.wait() == 0, (tmp_path / "log").read_text()[-2000:]
                break
            checkpoint = tmp_path / "killed" / "last_checkpoint"
            before = checkpoint.read_text() if checkpoint.exists() else ""
            while process.poll() is None and (
                not checkpoint.exists() or checkpoint.read_text() == before
            ):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
            assert process.wait() in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
            kills += 1
    subprocess.run([*command, "OUTPUT_DIR", "whole"], cwd=tmp_path, env=environment(), check=True)
    a, b = (
        torch.load(tmp_path / x / "model_final.pth", weights_only=True)["model"]
        for x in ("whole", "killed")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


class Died(BaseException):
    pass


@pytest.mark.parametrize(
    "dies_at",
    (2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)),
)
def test_best_model_survives_resuming(tiny_cfg, tmp_path, monkeypatch, dies_at):
    """A run dies within one of its evaluations; resumed, it finds the same best model."""
    aps = {1: 30.0, 3: 50.0, 5: 40.0, 8: 20.0}  # by iteration
    calls = []

    def test(cls, cfg, model):
        iteration = get_event_storage().iter
        calls.append(iteration)
        if len(calls) == dies_at:
            raise Died
        return {"bbox": {"AP": aps[iteration]}}

    monkeypatch.setattr(CBBLTrainer, "test", classmethod(test))
    tiny_cfg.merge_from_list(
        ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 2]
    )
    with pytest.raises(Died):
        train(tiny_cfg, tmp_path / "run")
    trainer = train(tiny_cfg, tmp_path / "run", resume=True)
    assert calls.count(2 * dies_at - 1) == 2  # the evaluation that was cut short is done again
    best = next(h for h in trainer._hooks if isinstance(h, BestCheckpointer))
    assert (best.best_metric, best.best_iter) == (max(aps.values()), 3)
    state = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    second = torch.load(tmp_path / "run" / "model_0000003.pth", weights_only=True)
    for name, value in state["model"].items():
        assert torch.equal(value, second["model"][name])


def test_a_run_without_resume_forgets_the_best_model_of_the_folder(tiny_cfg, tmp_path, monkeypatch):
    aps = iter([90.0, 30.0, 40.0])
    monkeypatch.setattr(
        CBBLTrainer, "test", classmethod(lambda cls, cfg, model: {"bbox": {"AP": next(aps)}})
    )
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    train(tiny_cfg, tmp_path / "run")
    train(tiny_cfg, tmp_path / "run")
    assert torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["iteration"] == 2
    # And when the second one is resumed.
    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = train(tiny_cfg, tmp_path / "run", resume=True)
    best = next(h for h in trainer._hooks if isinstance(h, BestCheckpointer))
    assert best.best_metric == 40.0


def test_a_longer_training_knows_the_best_model_of_the_shorter_one(tiny_cfg, tmp_path, monkeypatch):
    aps = iter((30.0, 20.0))
    monkeypatch.setattr(
        CBBLTrainer, "test", classmethod(lambda cls, cfg, model: {"bbox": {"AP": next(aps)}})
    )
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2])
    first = train(tiny_cfg, tmp_path / "run")
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["model"]
    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = train(tiny_cfg, tmp_path / "run", resume=True)
    assert (first.start_iter, trainer.start_iter, trainer.iter) == (0, 2, 4)
    (checkpointer,) = [h for h in trainer._hooks if isinstance(h, BestCheckpointer)]
    assert checkpointer.best_metric == 30.0 and checkpointer.best_iter == 2
    again = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], best[name]) for name in best)


def test_resuming_a_finished_run_only_evaluates(tiny_cfg, tmp_path):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    train(tiny_cfg, tmp_path / "run")
    before = metrics(tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.json").read_text().count("\n")
    train(tiny_cfg, tmp_path / "run", resume=True)
    after = metrics(tmp_path / "run")
    assert {i: {k: repr(v) for k, v in row.items()} for i, row in after.items()} == {
        i: {k: repr(v) for k, v in row.items()} for i, row in before.items()
    }
    # The two writers of this test add the evaluation, and nothing else.
    assert (tmp_path / "run" / "metrics.json").read_text().count("\n") == rows + 2


def test_a_warm_up_as_long_as_the_training_warns(tiny_cfg, tmp_path, caplog):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0])
    train(tiny_cfg, tmp_path / "run")
    assert "WARMUP_ITERS" not in caplog.text
    tiny_cfg.SOLVER.WARMUP_ITERS = 1
    train(tiny_cfg, tmp_path / "run")
    assert "SOLVER.WARMUP_ITERS 1 is not less than SOLVER.MAX_ITER 1" in caplog.text


def test_resume_without_a_checkpoint_warns(tiny_cfg, tmp_path, caplog):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 1])
    tiny_cfg.DATASETS.TEST = ()
    train(tiny_cfg, tmp_path / "run", resume=True)
    (record,) = [r for r in caplog.records if "no checkpoint in" in r.getMessage()]
    assert record.levelname == "WARNING" and str(tmp_path / "run") in record.getMessage()


def test_resuming_with_another_grid_is_refused(tiny_cfg, tmp_path):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 1])
    tiny_cfg.DATASETS.TEST = ()
    train(tiny_cfg, tmp_path / "run")
    tiny_cfg.MODEL.CBBL.NUM_INTERVALS = 8
    with pytest.raises(UserError, match="model_final.pth: its .*bbox_pred was trained on the grid"):
        train(tiny_cfg, tmp_path / "run", resume=True)


def test_checkpoints_of_another_program_are_refused(tiny_cfg, tmp_path):
    tiny_cfg.merge_from_list(["SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 1])
    tiny_cfg.DATASETS.TEST = ()
    train(tiny_cfg, tmp_path / "run")
    path = tmp_path / "run" / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trainer"]["_trainer"]  # as stock Detectron2 v0.6 writes it
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="state of the optimizer"):
        train(tiny_cfg, tmp_path / "run", resume=True)
