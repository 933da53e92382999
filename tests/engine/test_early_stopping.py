"""A training that does not become better ends early, and as any other one ends."""

import json
import math
import os

import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.engine import CBBLTrainer, check_engine_config
from cbbl_d2.engine.hooks import BestCheckpointer, EarlyStopping
from cbbl_d2.errors import ConfigError, UserError
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage

NAN = math.nan


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.merge_from_list(
        ["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 2]
    )
    tiny_cfg.SOLVER.EARLY_STOPPING = 2
    os.makedirs(tiny_cfg.OUTPUT_DIR)
    return tiny_cfg


class Died(BaseException):
    pass


@pytest.fixture
def evaluations(monkeypatch):
    """
    ``evaluations(values, key="AP", dies_at=None)``: the evaluation of each iteration gives the next
    one of the values, by the number of iterations; returns the list of those that were made.
    """

    def evaluations(values, task="bbox", key="AP", dies_at=None):
        made = []

        def test(cls, cfg, model):
            done = get_event_storage().iter + 1
            if done == dies_at and done not in made:
                made.append(done)
                raise Died
            made.append(done)
            return {task: {key: values[(done - 2) // cfg.TEST.EVAL_PERIOD]}}

        monkeypatch.setattr(CBBLTrainer, "test", classmethod(test))
        monkeypatch.setattr(CBBLTrainer, "run_step", lambda self: None)
        return made

    return evaluations


def train(cfg, resume=False):
    trainer = CBBLTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def lines(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as f:
        return [json.loads(line) for line in f]


def last_checkpoint(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")) as f:
        path = os.path.join(cfg.OUTPUT_DIR, f.read())
    return os.path.basename(path), torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    "values, patience, last",
    [
        ([30, 20, 25, 40, 50, 60], 2, 6),
        ([30, 20, 40, 30, 40, 60], 2, 10),  # as good is not better
        ([30, 20, 40, 30, 35, 60], 3, 12),
        ([10, 20, 30, 40, 50, 60], 1, 12),
        ([NAN, NAN, 30, 40, 50, 60], 2, 4),
        ([NAN, 30, NAN, 40, NAN, NAN], 2, 12),  # the last evaluation is that of the end
    ],
)
def test_it_ends_after_so_many_evaluations_that_were_not_better(
    cfg, evaluations, caplog, values, patience, last
):
    made = evaluations(values)
    cfg.SOLVER.EARLY_STOPPING = patience
    with caplog.at_level("INFO", "cbbl_d2"):
        trainer = train(cfg)
    reasons = [m for m in caplog.messages if m.startswith("Stopped early")]
    name, state = last_checkpoint(cfg)
    assert name == "model_final.pth" and state["iteration"] == last - 1
    assert trainer.iter == trainer.max_iter == last
    assert [made for made in made if made <= last] == list(range(2, last + (last < 12), 2))
    stopped = [line["stopped_early_after"] for line in lines(cfg) if "stopped_early_after" in line]
    if last == 12:
        assert not reasons and not stopped
        return
    assert made[-1] == last and stopped == [last]  # not evaluated once more
    assert f"Stopped early after iteration {last - 1}: bbox/AP was " in reasons[0]
    best = [v for v in values[: last // 2] if math.isfinite(v)]
    if best:
        after = 2 * values.index(max(best)) + 1
        assert f"than the {max(best)} after iteration {after}, whose model is" in reasons[0]
        path = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
        assert torch.load(path, weights_only=True)["iteration"] == after
    else:
        assert "no finite number in 2 evaluations: there is no model_best.pth" in reasons[0]


def test_of_a_loss_the_lowest_value_is_the_best(cfg, evaluations):
    evaluations([3.0, 2.0, 1.5, 1.6, NAN, 1.0], "val", "total_loss")
    cfg.TEST.BEST_METRIC = "val/total_loss"
    assert train(cfg).iter == 10
    path = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
    assert torch.load(path, weights_only=True)["iteration"] == 5


def test_the_ap_of_a_class_is_no_loss(cfg, evaluations):
    evaluations([1.0, 3.0, 2.0, 2.0, 2.0], "bbox", "AP-floss")
    cfg.TEST.BEST_METRIC = "bbox/AP-floss"
    assert train(cfg).iter == 8
    path = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
    assert torch.load(path, weights_only=True)["iteration"] == 3


@pytest.mark.parametrize(
    "metric",
    (
        "val/total_loss",
        pytest.param("bbox/APvs", marks=pytest.mark.slow),
        pytest.param("val/loss_cls", marks=pytest.mark.slow),
    ),
)
def test_a_metric_that_an_evaluation_measures(cfg, metric):
    """With the true evaluation."""
    cfg.merge_from_list(
        ["SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "TEST.LOSS", True, "TEST.BEST_METRIC", metric]
    )
    best = next(h for h in train(cfg)._hooks if isinstance(h, BestCheckpointer))
    values = [line[metric] for line in lines(cfg) if metric in line]
    assert len(values) == 2
    better = min if "loss" in metric else max
    assert best.best_metric == better(values)


def test_a_metric_that_is_nowhere_ends_the_training_in_one_line(cfg, evaluations):
    evaluations([1.0])
    cfg.TEST.BEST_METRIC = "bbox/APvz"
    for patience in (0, 2):
        cfg.SOLVER.EARLY_STOPPING = patience
        with pytest.raises(UserError, match="TEST.BEST_METRIC = bbox/APvz: .* choose .* bbox/AP$"):
            train(cfg)


def test_of_several_data_sets_the_first_one_counts_unless_named(cfg):
    cfg.DATASETS.TEST = ("a", "b")
    for metric, found in (
        ("bbox/AP", "a/bbox/AP"),
        ("val/total_loss", "a/val/total_loss"),
        ("b/bbox/AP", "b/bbox/AP"),
    ):
        cfg.TEST.BEST_METRIC = metric
        trainer = CBBLTrainer(cfg)
        best = next(h for h in trainer._hooks if isinstance(h, BestCheckpointer))
        assert best.metric == found


@pytest.mark.parametrize("dies_at", (4, 6, 8))
def test_resuming_keeps_the_count(cfg, evaluations, dies_at):
    """Dies in the evaluation, is resumed from the checkpoint before, and ends where it would."""
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    made = evaluations([30, 40, 20, 35, 50, 60], dies_at=dies_at)
    with pytest.raises(Died):
        train(cfg)
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == dies_at - 1
    assert trainer.iter == 8 and made[-1] == 8
    name, state = last_checkpoint(cfg)
    assert name == "model_final.pth" and state["iteration"] == 7


def test_what_has_stopped_early_is_not_trained_on(cfg, evaluations, caplog):
    evaluations([30, 20, 10, 40, 20, 10])
    train(cfg)
    _, before = last_checkpoint(cfg)
    with caplog.at_level("INFO", "cbbl_d2"):
        trainer = train(cfg, resume=True)
    assert trainer.iter == 6 and "has ended this training after 6 iterations" in caplog.text
    _, after = last_checkpoint(cfg)
    assert all(torch.equal(v, after["model"][k]) for k, v in before["model"].items())
    assert lines(cfg)[-1]["stopped_early_after"] == 6
    # With more patience it goes on: 40 is better, 20 and the end are not.
    cfg.SOLVER.EARLY_STOPPING = 3
    trainer = train(cfg, resume=True)
    assert (trainer.start_iter, trainer.iter) == (6, 12)
    assert "stopped_early_after" not in lines(cfg)[-1]


def test_what_comes_at_the_end_alone_comes(cfg, evaluations, monkeypatch):
    made = evaluations([30, 20, 10])
    augmented = []

    def test_with_tta(cls, cfg, model):
        augmented.append(get_event_storage().iter)
        return {"bbox_TTA": {"AP": 31}}

    monkeypatch.setattr(CBBLTrainer, "test_with_TTA", classmethod(test_with_tta))
    cfg.TEST.AUG.ENABLED = True
    train(cfg)
    assert made == [2, 4, 6] and augmented == [6]
    assert lines(cfg)[-1]["bbox_TTA/AP"] == 31


def test_without_early_stopping_it_is_trained_on(cfg, evaluations):
    evaluations([30, 20, 10, 40, 20, 10])
    train(cfg)
    cfg.SOLVER.EARLY_STOPPING = 0
    assert train(cfg, resume=True).iter == 12


def test_another_metric_on_resume_starts_anew(cfg, evaluations, caplog):
    evaluations([30.0, 20.0])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 4, "SOLVER.EARLY_STOPPING", 0])
    train(cfg)
    cfg.merge_from_list(["SOLVER.MAX_ITER", 6, "TEST.BEST_METRIC", "bbox/APvs"])
    evaluations([30.0, 20.0, 5.0], key="APvs")
    with caplog.at_level("INFO", "cbbl_d2"):
        trainer = train(cfg, resume=True)
    best = next(h for h in trainer._hooks if isinstance(h, BestCheckpointer))
    assert best.best_metric == 5.0
    assert "the best model so far was that of bbox/AP; from here on" in caplog.text


@pytest.mark.parametrize(
    "words, message",
    [
        (["TEST.EVAL_PERIOD", 0], "SOLVER.EARLY_STOPPING = 2: .*TEST.EVAL_PERIOD 0 makes none"),
        (["DATASETS.TEST", ()], "SOLVER.EARLY_STOPPING = 2: DATASETS.TEST is empty"),
        (["TEST.BEST_METRIC", "val/loss_cls"], "TEST.BEST_METRIC = val/loss_cls: needs TEST.LOSS"),
        (["SOLVER.EARLY_STOPPING", -1], "SOLVER.EARLY_STOPPING = -1: must be an integer from 0"),
        (["TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC = 'AP': must be the name of a number"),
    ],
)
def test_what_makes_no_sense_is_refused(cfg, words, message):
    cfg.merge_from_list(words)
    with pytest.raises(ConfigError, match=message):
        check_cbbl_config(cfg)
        check_engine_config(cfg)
    check_engine_config(cfg, eval_only=True)


def test_a_data_set_may_be_called_val(cfg):
    cfg.TEST.BEST_METRIC = "val/bbox/AP"
    check_engine_config(cfg)


class _Loop(TrainerBase):
    """A training that does nothing, and stops as CBBLTrainer does."""

    def __init__(self, values):
        super().__init__()
        best = None
        if comm.is_main_process():
            best = BestCheckpointer(1, _checkpointer(), "bbox/AP")
        self.stopping = EarlyStopping(2, 1, best)
        evaluate = _Evaluate(values)
        self.register_hooks([evaluate, *([best] if best else []), self.stopping])

    def run_step(self):
        pass


def _checkpointer():
    return type("Checkpointer", (), {"save": lambda self, name, **kwargs: None})()


class _Evaluate(HookBase):
    def __init__(self, values):
        self._values = values

    def after_step(self):
        if comm.is_main_process():  # as an evaluation, whose results only that one has
            value = self._values[self.trainer.iter]
            self.trainer.storage.put_scalar("bbox/AP", value, smoothing_hint=False)


def _last_iteration(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", world_size=2, rank=rank
    )
    loop = _Loop([10.0, 30.0, 20.0, 25.0, 40.0, 50.0])
    loop.max_iter = 6
    with EventStorage(0) as loop.storage:
        for loop.iter in range(6):
            loop.before_step()
            loop.after_step()
            if loop.stopping.has_stopped:
                break
    (folder / str(rank)).write_text(f"{loop.iter} {loop.max_iter}")
    torch.distributed.barrier()
    os._exit(0)  # see test_validation_loss.py


def test_all_processes_stop_after_the_same_iteration(tmp_path):
    torch.multiprocessing.spawn(_last_iteration, (tmp_path,), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3 4", "3 4"]
