import logging
import os

import pytest
import torch
from cbbl_d2.engine import CBBLTrainer, load_config
from cbbl_d2.engine.divergence import explain_divergence
from cbbl_d2.errors import UserError
from detectron2.engine import HookBase
from torch import nn


class Break(HookBase):
    """Before one iteration, sets a weight whose path is given to a value."""

    def __init__(self, iteration, name, value):
        self.iteration, self.name, self.value = iteration, name, value

    def before_step(self):
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                dict(self.trainer.model.named_parameters())[self.name].fill_(self.value)


class Overflow(HookBase):
    """From one iteration on, the loss of a finite model is infinite."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            model = self.trainer._trainer.model
            forward = model.forward
            model.forward = lambda batch: {
                name: loss * float("inf") if name == "loss_cls" else loss
                for name, loss in forward(batch).items()
            }


def names_of_batches(trainer):
    """A list that gets the file names of each batch as the model is given it."""
    seen = []
    forward = trainer._trainer.model.forward

    def spy(batch):
        seen.append([item["file_name"] for item in batch])
        return forward(batch)

    trainer._trainer.model.forward = spy
    return seen


def prepared(cfg):
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER = 8
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return CBBLTrainer(cfg)


def test_the_loss_and_the_images_are_named(tiny_cfg, caplog, monkeypatch):
    tiny_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    tiny_cfg.SOLVER.BBOX_PRED_LR_FACTOR = 2.0
    trainer = prepared(tiny_cfg)
    seen = names_of_batches(trainer)
    trainer.register_hooks([Overflow(2)])
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)  # to caplog
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert "\n" not in message
    assert "diverged at iteration 2: loss_cls is inf on the images" in message
    assert ", ".join(seen[2]) in message and not set(seen[1]) & set(message.split(", "))
    assert "lower SOLVER.BASE_LR" in message and "CLIP_GRADIENTS.ENABLED True" in message
    assert "or BBOX_PRED_LR_FACTOR, 2, or set" in message and "ANCHOR_DELTAS" not in message
    # Depending on which test has set the log up, caplog is given it once or twice.
    record, *_ = [r for r in caplog.records if "Training ended" in r.getMessage()]
    assert record.levelno == logging.ERROR and record.exc_info is None
    assert message in record.getMessage()
    assert not [r for r in caplog.records if r.exc_info]  # main logs the error twice


def test_broken_weights_point_to_the_batch_before(tiny_cfg):
    """NaN after the step of iteration 2; in iteration 3 the RPN stops, before any loss."""
    trainer = prepared(tiny_cfg)
    seen = names_of_batches(trainer)
    name = "proposal_generator.rpn_head.objectness_logits.bias"
    trainer.register_hooks([Break(3, name, float("nan"))])
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert "iteration 3: the predicted boxes or scores are not finite" in message
    assert "no longer finite since iteration 2, trained on the images" in message
    assert ", ".join(seen[2]) in message
    assert all(name not in message for name in set(seen[3]) - set(seen[2]))


def test_a_much_too_high_learning_rate(repository, tiny_cfg):
    """No hook: a detector without an RPN that really diverges, on either Detectron2."""
    cfg = load_config(os.path.join(repository, "configs", "SmallShapes", "giou_fcos.yaml"))
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = tiny_cfg.DATASETS.TRAIN, tiny_cfg.OUTPUT_DIR
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2, "SOLVER.CLIP_GRADIENTS.ENABLED", True])
    with pytest.raises(UserError, match="learning rate was 9") as error:
        prepared(cfg).train()
    message = str(error.value)
    assert "no longer finite since iteration 0" in message
    assert "lower SOLVER.CLIP_GRADIENTS.CLIP_VALUE, " in message


def test_other_assertions_stay_what_they_are(tiny_cfg):
    trainer = prepared(tiny_cfg)

    def fail(batch):
        raise AssertionError("a bug")

    trainer._trainer.model.forward = fail
    with pytest.raises(AssertionError, match="a bug"):
        trainer.train()


def explain(text="", cfg=None, model=None, batches=(["a.jpg"], ["b.jpg"]), num_processes=1):
    cfg = cfg or load_config("")
    error = FloatingPointError(text)
    return explain_divergence(error, cfg, 7, model or nn.Linear(1, 1), 0.1, batches, num_processes)


@pytest.mark.parametrize("value", ("nan", "inf", "-inf"))
@pytest.mark.parametrize("number", ("{}", "np.float64({})"))
def test_only_the_losses_that_are_not_finite_are_named(value, number):
    text = f"Loss became infinite!\nloss_dict = {{'loss_a': 0.5, 'loss_b': {number.format(value)}}}"
    assert f"iteration 7: loss_b is {value} on the images b.jpg:" in explain(text)


def test_broken_initial_weights_and_other_processes():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.bias, float("nan"))
    said = explain(model=model, batches=(["a.jpg"],))
    assert "the weights that training started with are not finite" in said and ".jpg" not in said
    norm = nn.BatchNorm2d(1)  # a running mean is no parameter
    norm.running_mean.fill_(float("inf"))
    assert "since iteration 6, trained on the images a.jpg:" in explain(model=norm)
    assert "b.jpg of this process, or on those of the other 3:" in explain(num_processes=4)
