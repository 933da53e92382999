"""What to tell the user of a training whose losses or weights are no longer finite numbers."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence

import torch
from cbbl_d2.errors import UserError
from cbbl_d2.messages import listed
from detectron2.config import CfgNode

from .checkpoint import not_finite
from .lost_process import has_lost_process, has_timed_out
from .optimizer import LR_FACTORS

# As Detectron2 writes the losses into its FloatingPointError, with or without NumPy's type.
_LOSS = re.compile(r"'([^']+)': (?:np\.float64\()?(nan|-?inf)")


def is_finite(model: torch.nn.Module) -> bool:
    """Whether all weights and buffers are; waits for the device."""
    return not not_finite([*model.parameters(), *model.buffers()])


def explain_divergence(
    error: Exception,
    cfg: CfgNode,
    iteration: int,
    model: torch.nn.Module,
    learning_rate: float,
    batches: Sequence[list[str]],
    num_processes: int = 1,
) -> str:
    """
    One line: what became infinite or NaN, when, on which images, and the cure. Detectron2 notices
    it in numbers that it has on the CPU anyway; the weights are looked at only here.

    Args:
        error: of the losses or of predicted boxes.
        cfg: ``SOLVER.CLIP_GRADIENTS`` is read.
        iteration: counted from 0, as in ``metrics.json``.
        batches: the file names of the last batches of this process, the newest last.
        num_processes: whose losses Detectron2 has averaged; of the other ones the images are not
            known here.
    """
    losses = [f"{name} is {value}" for name, value in _LOSS.findall(str(error))]
    what = ", ".join(losses) or "the predicted boxes or scores are not finite"
    finite = is_finite(model)
    # With broken weights no input helps: the step before this forward pass has done it.
    index = 1 if finite else 2
    images = f"on the images {listed(batches[-index], limit=16)}" if len(batches) >= index else ""
    if images and num_processes > 1:
        images += f" of this process, or on those of the other {num_processes - 1}"
    if finite:
        where = f" {images}" if images else ""
    elif images:
        since = f"since iteration {iteration - 1}, trained {images}"
        where = f", as the weights are no longer finite {since}"
    else:
        where = ", as the weights that training started with are not finite"
    clip = "set SOLVER.CLIP_GRADIENTS.ENABLED True"
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        clip = f"lower SOLVER.CLIP_GRADIENTS.CLIP_VALUE, {cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE:g}"
    scaled = [key for key in LR_FACTORS.values() if cfg.SOLVER[key] > 1]
    factors = "".join(f"or {key}, {cfg.SOLVER[key]:g}, " for key in scaled)
    return (
        f"training has diverged at iteration {iteration}: {what}{where}: lower SOLVER.BASE_LR (the "
        f"learning rate was {learning_rate:.3g}), {factors}or {clip}; if it is always "
        "the same images, check their annotations with tools/check_dataset.py"
    )


class _UserErrorsInOneLine(logging.Filter):
    """Detectron2 logs what ends a training with a traceback, which is for bugs."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError) or has_timed_out(error) or has_lost_process(error):
            record.msg, record.args = "Training ended: %s", (error,)
            record.exc_info = None
        # Of losses that are not finite main logs a traceback before it raises the same error.
        return not isinstance(error, FloatingPointError)


@contextlib.contextmanager
def user_errors_in_one_line() -> Iterator[None]:
    """In this context Detectron2's log of what ends a training has a traceback for bugs alone."""
    logger, one_line = logging.getLogger("detectron2.engine.train_loop"), _UserErrorsInOneLine()
    logger.addFilter(one_line)
    try:
        yield
    finally:
        logger.removeFilter(one_line)
