"""What evaluating weights has in common for both kinds of config."""

import os
from typing import Any, Callable, Dict

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from torch import nn

from .checkpoint import CBBLCheckpointer


def evaluate_weights(
    model: nn.Module,
    weights: str,
    output_dir: str,
    resume: bool,
    test: Callable[[nn.Module], Dict[str, Any]],
) -> Dict[str, Any]:
    """
    Load weights, evaluate, and add the numbers to ``metrics.json``.

    Args:
        weights: path of a checkpoint.
        output_dir: folder of the training.
        resume: take the last checkpoint in ``output_dir`` instead, if there is one.
        test: from the model to results as of Detectron2's ``inference_on_dataset``.

    Raises:
        UserError: the weights cannot be read or lack a weight of the model.
    """
    checkpointer = CBBLCheckpointer(model, output_dir, require_all=True)
    extra = checkpointer.resume_or_load(weights, resume=resume)
    results = test(model)
    if comm.is_main_process():
        # The same file and keys as in training; the iteration is that of the checkpoint.
        with EventStorage(extra.get("iteration", 0)) as storage:
            storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
            writer = JSONWriter(os.path.join(output_dir, "metrics.json"))
            writer.write()
            writer.close()
    return results
