"""Detectron2's own keys that would fail late, or in many words."""

import difflib

import torch
from cbbl_d2.architectures import anchor_node
from cbbl_d2.devices import device_kind
from cbbl_d2.errors import ConfigError
from cbbl_d2.messages import listed
from cbbl_d2.value_checks import check_values
from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
)

from .config_values import ALWAYS, IN_TRAINING
from .hooks import is_validation_loss


def check_engine_config(cfg: CfgNode, num_processes: int = 1, eval_only: bool = False) -> None:
    """
    Args:
        num_processes: on all machines together.
        eval_only: do not check what only training reads.

    Raises:
        ConfigError: a value that this machine, this number of processes or this model rules out.
    """
    # Detectron2 would take some values without a word, such as a negative weight of a loss.
    check_values(cfg, ALWAYS if eval_only else {**ALWAYS, **IN_TRAINING})
    _check_test_time_augmentation(cfg)
    device = device_kind(cfg.MODEL.DEVICE)
    if num_processes > 1:
        _check_device_of_processes(cfg.MODEL.DEVICE, device, num_processes)
    if eval_only:
        return
    _check_batch_size(cfg, num_processes)
    _check_best_metric(cfg)
    if cfg.SOLVER.AMP.ENABLED and (device != "cuda" or not torch.cuda.is_available()):
        where = "the CPU" if device in ("cpu", "cuda") else device
        raise ConfigError(
            "SOLVER.AMP.ENABLED = True: Detectron2's mixed precision training needs a CUDA GPU, "
            f"and this run is on {where}: set SOLVER.AMP.ENABLED False"
        )


def _check_device_of_processes(name: str, device: str, num_processes: int) -> None:
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE = cpu: {num_processes} processes of a machine with GPUs talk over them; "
            "use MODEL.DEVICE cuda, or hide the GPUs: CUDA_VISIBLE_DEVICES= python ..."
        )
    if device == "cuda" and ":" in name:
        raise ConfigError(
            f"MODEL.DEVICE = {name}: each of {num_processes} processes has a GPU of its own: use "
            "MODEL.DEVICE cuda, and choose the GPUs by CUDA_VISIBLE_DEVICES"
        )
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"MODEL.DEVICE = {name}: Detectron2 starts several processes on CUDA GPUs or on the "
            "CPU alone: leave --num-gpus and --num-machines out"
        )


def check_model_config(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: a part of the model that is not registered, or anchors for another number of
            feature levels.
    """
    model = cfg.MODEL
    is_rcnn = model.META_ARCHITECTURE == "GeneralizedRCNN"
    for key, name, registry in (
        ("META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("BACKBONE.NAME", model.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("PROPOSAL_GENERATOR.NAME", model.PROPOSAL_GENERATOR.NAME, PROPOSAL_GENERATOR_REGISTRY),
        ("ROI_HEADS.NAME", model.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
    ):
        if name in registry or (name == "PrecomputedProposals" and is_rcnn):
            continue
        near = difflib.get_close_matches(name, [known for known, _ in registry], n=2)
        raise ConfigError(
            f"MODEL.{key} = {name}: no model part of this name is registered"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    node = anchor_node(cfg)
    if node is None:
        return
    levels, anchors = model[node].IN_FEATURES, model.ANCHOR_GENERATOR
    for key in ("SIZES", "ASPECT_RATIOS"):
        if len(anchors[key]) not in (1, len(levels)):
            raise ConfigError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(anchors[key])} lists, but "
                f"MODEL.{node}.IN_FEATURES has {len(levels)} levels ({listed(levels)}): give one "
                "list for each, or one for all"
            )


def _check_test_time_augmentation(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if isinstance(architecture, type) and not issubclass(architecture, GeneralizedRCNN):
        raise ConfigError(
            f"TEST.AUG.ENABLED = True: Detectron2's test-time augmentation supports "
            f"GeneralizedRCNN only, not MODEL.META_ARCHITECTURE {name}: set TEST.AUG.ENABLED False"
        )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ConfigError(
                "TEST.AUG.ENABLED = True: Detectron2's test-time augmentation does not support "
                f"MODEL.{key} True: set TEST.AUG.ENABLED False"
            )


def _check_best_metric(cfg: CfgNode) -> None:
    metric, patience = cfg.TEST.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING
    if is_validation_loss(metric) and not cfg.TEST.LOSS:
        raise ConfigError(f"TEST.BEST_METRIC = {metric}: needs TEST.LOSS True, which measures it")
    if patience > 0 and not cfg.DATASETS.TEST:
        raise ConfigError(
            f"SOLVER.EARLY_STOPPING = {patience}: DATASETS.TEST is empty: name a data set to "
            "evaluate on"
        )
    if patience > 0 and cfg.TEST.EVAL_PERIOD == 0:
        raise ConfigError(
            f"SOLVER.EARLY_STOPPING = {patience}: counts evaluations, of which TEST.EVAL_PERIOD 0 "
            "makes none while the model trains: set the number of iterations between them"
        )


def _check_batch_size(cfg: CfgNode, num_processes: int) -> None:
    batch_size, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE
    # Detectron2 multiplies the batch by num_processes / reference, if there is a reference.
    if batch_size < 1 or batch_size % (reference or num_processes):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH = {batch_size}: must be a positive multiple of "
            + (
                f"SOLVER.REFERENCE_WORLD_SIZE, {reference}"
                if reference
                else f"the number of processes, {num_processes}"
            )
        )
