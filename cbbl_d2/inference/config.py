"""The config of a checkpoint: Detectron2 writes it beside the checkpoints of a training."""

import os
from typing import Sequence

import yaml
from cbbl_d2.architectures import set_score_threshold
from cbbl_d2.data.coco_format import register_from_config
from cbbl_d2.data.dataset_checks import check_registered, set_num_classes
from cbbl_d2.engine.cli import load_config
from cbbl_d2.errors import UserError
from detectron2.config import CfgNode

CONFIG_NAME = "config.yaml"


def find_config(weights: str) -> str:
    """
    The config that a training has stored beside its checkpoints.

    Args:
        weights: path of a checkpoint.

    Returns:
        the path of ``config.yaml`` in the folder of the checkpoint.

    Raises:
        UserError: there is no such file, or it is a Lazy config.
    """
    path = os.path.join(os.path.dirname(weights), CONFIG_NAME)
    if "://" in weights or not os.path.isfile(path):
        raise UserError(
            f"{weights}: no {CONFIG_NAME} beside it, which a training writes there: give the "
            "config of the training with --config-file"
        )
    if _is_lazy(path):
        raise UserError(
            f"{path}: a Lazy config, which only tools/lazyconfig_train_net.py takes: give the YAML "
            "config of the same model with --config-file"
        )
    return path


def load_inference_config(
    weights: str | None,
    config_file: str | None = None,
    opts: Sequence[str] = (),
    score_threshold: float | None = None,
    dataset: str | None = None,
) -> CfgNode:
    """
    The config to run a checkpoint with. The data sets that it names are registered, but their files
    need not exist, unless the number of classes is 0, "from the data".

    Args:
        weights: path of a checkpoint; becomes ``MODEL.WEIGHTS``. None: that of ``config_file``.
        config_file: a YAML config; None: the one stored beside the checkpoint.
        opts: ``[key, value, ...]``, on top of it.
        score_threshold: lowest score of a prediction; None: the config's.
        dataset: name of the data set to predict on, in place of ``DATASETS.TEST``.

    Raises:
        ConfigError: see :func:`cbbl_d2.engine.load_config` and
            :func:`cbbl_d2.data.dataset_checks.set_num_classes`, or the data set is not registered.
        UserError: see :func:`find_config`, or there are no weights.
    """
    if config_file is None:
        if "://" not in weights and not os.path.isfile(weights):
            raise UserError(f"{weights}: no such weights file (--weights)")
        config_file = find_config(weights)
    cfg = load_config(config_file, list(opts))
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: give --weights, e.g. --weights OUTPUT_DIR/model_final.pth")
    if score_threshold is not None:
        set_score_threshold(cfg, score_threshold)
    register_from_config(cfg)
    if dataset is not None:
        check_registered(dataset, "--dataset")
        cfg.DATASETS.TEST = (dataset,)
    set_num_classes(cfg, eval_only=True)
    return cfg


def _is_lazy(path: str) -> bool:
    """Whether a stored config is that of a Lazy training, whose keys are others."""
    try:
        with open(path, encoding="utf-8") as f:
            # Lazy configs may hold tags of Python objects: compose() reads no more than the keys.
            node = yaml.compose(f, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return False  # load_config says what is wrong with it
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    keys = {key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)}
    return "model" in keys and "MODEL" not in keys
