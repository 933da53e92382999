"""What evaluating weights has in common for both kinds of config."""

import os
from typing import Any, Callable, Dict, Sequence

from cbbl_d2.data.class_names import check_class_names, class_names_beside, read_class_names
from detectron2.data import MetadataCatalog
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
    test_sets: Sequence[str] = (),
) -> Dict[str, Any]:
    """
    Load weights, evaluate, and add the numbers to ``inference/metrics.json``: the weights, the data
    set or the config may be others than the training's, whose ``metrics.json`` stays as it is.

    Args:
        weights: path of a checkpoint.
        output_dir: folder of the training.
        resume: take the last checkpoint in ``output_dir`` instead, if there is one.
        test: from the model to results as of Detectron2's ``inference_on_dataset``.
        test_sets: names of the data sets, loaded already.

    Raises:
        UserError: the weights cannot be read or lack a weight of the model; or a data set has the
            classes of the training in another order.
    """
    checkpointer = CBBLCheckpointer(model, output_dir, require_all=True)
    extra = checkpointer.resume_or_load(weights, resume=resume)
    if resume and checkpointer.has_checkpoint():
        weights = checkpointer.get_checkpoint_file()
    classes_file = class_names_beside(weights)
    for name in test_sets if classes_file else ():
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes:
            check_class_names(read_class_names(classes_file), classes_file, name, classes)
    results = test(model)
    if comm.is_main_process():
        # The same keys as in training; the iteration is that of the checkpoint.
        with EventStorage(extra.get("iteration", 0)) as storage:
            storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
            folder = os.path.join(output_dir, "inference")
            os.makedirs(folder, exist_ok=True)
            writer = JSONWriter(os.path.join(folder, "metrics.json"))
            writer.write()
            writer.close()
    return results
