import json
import os
import signal

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.engine import CBBLTrainer, one_line_errors  # noqa: E402
from cbbl_d2.engine.stop import StopRequest  # noqa: E402
from cbbl_d2.errors import Stopped  # noqa: E402
from detectron2.engine import HookBase  # noqa: E402
from detectron2.utils.env import seed_all_rng as seed_all  # noqa: E402


class Signal(HookBase):
    """Sends a signal to this process in an iteration."""

    def __init__(self, iteration, number):
        self._iteration, self._number = iteration, number

    def before_step(self):
        if self.trainer.iter == self._iteration:
            os.kill(os.getpid(), self._number)


def train(cfg, hook=None, resume=False):
    trainer = CBBLTrainer(cfg)
    if hook is not None:
        trainer.register_hooks([hook])
    trainer.resume_or_load(resume=resume)
    trainer.train()


def losses(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as f:
        lines = [json.loads(line) for line in f]
    return {x["iteration"]: x["total_loss"] for x in lines if "total_loss" in x}


@pytest.fixture(autouse=True)
def _not_ignored():
    """Also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
    assert request.number == 0


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 21, 100
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SEED = 1
    return tiny_cfg


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(cfg, tmp_path, number):
    whole = cfg.clone()
    whole.OUTPUT_DIR = str(tmp_path / "whole")
    os.makedirs(whole.OUTPUT_DIR)
    os.makedirs(cfg.OUTPUT_DIR)
    seed_all(1)
    train(whole)
    seed_all(1)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped by SIG.* after iteration 5: .*--resume") as e:
        train(cfg, Signal(5, number))
    assert e.value.exit_status == 128 + number and signal.getsignal(number) is before
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "model_0000005.pth"))
    train(cfg, resume=True)
    assert losses(cfg)[20] == losses(whole)[20]


def test_a_signal_in_the_last_iteration_loses_nothing(cfg):
    cfg.SOLVER.MAX_ITER = 2
    with pytest.raises(Stopped, match="after iteration 1"):
        train(cfg, Signal(1, signal.SIGTERM))
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))
    trainer = CBBLTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


def test_an_evaluation_is_not_awaited(cfg, monkeypatch):
    cfg.DATASETS.TEST = ("small_shapes_mini_val",)
    cfg.TEST.EVAL_PERIOD = 3
    ended = []

    def test(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        ended.append(True)

    monkeypatch.setattr(CBBLTrainer, "test", test)
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 2"):
        train(cfg)
    assert not ended
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "model_0000002.pth"))


def test_the_second_signal_acts_at_once(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, handed on
            assert request.number == signal.SIGINT
            request._time -= 2
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it went on")


def test_the_exit_status_is_the_convention(capsys):
    @one_line_errors
    def main():
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM")

    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"
