"""
Training and evaluation by a Lazy config, one in Python whose parts are built as it says.

A Lazy config has the parts of Detectron2's own ``tools/lazyconfig_train_net.py``: ``model``,
``dataloader.train``, ``dataloader.test``, ``dataloader.evaluator``, ``optimizer``,
``lr_multiplier`` and ``train`` (``configs/common/train.py``). All else, from the checks before to
the checkpoints, is that of the YAML configs: for it the settings that both kinds of config have are
copied into a YAML config, and errors name the key of the Lazy one.
"""

import argparse
import builtins
import contextlib
import copy
import difflib
import logging
import os
import re
import traceback
import warnings
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from cbbl_d2.data.dataset_checks import check_datasets
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.errors import ConfigError, UserError
from cbbl_d2.messages import listed, short

from .cli import load_config
from .config_checks import check_engine_config
from .evaluate import evaluate_weights
from .launch import start_log
from .rng import preserve_rng
from .trainer import CBBLTrainer

__all__ = ["LazyTrainer", "check_lazy_config", "evaluate", "load_lazy_config", "main"]

logger = logging.getLogger(__name__)

# The settings that both kinds of config have. Keys that a Lazy config leaves out keep the default
# of the YAML one.
_SHARED = {
    "train.output_dir": "OUTPUT_DIR",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.device": "MODEL.DEVICE",
    "train.seed": "SEED",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.clip_gradients.enabled": "SOLVER.CLIP_GRADIENTS.ENABLED",
    "train.clip_gradients.clip_type": "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "train.clip_gradients.clip_value": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "train.clip_gradients.norm_type": "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "dataloader.train.dataset.names": "DATASETS.TRAIN",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.test.dataset.names": "DATASETS.TEST",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",  # FCOS has it in the same place
}
# What only errors name.
_NAMED = {
    "optimizer.lr": "SOLVER.BASE_LR",
    "dataloader.evaluator.masks": "MODEL.MASK_ON",
    "dataloader.evaluator.num_keypoints": "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    "dataloader.evaluator.keypoint_oks_sigmas": "TEST.KEYPOINT_OKS_SIGMAS",
}
_OTHER_WORDS = {
    "command line: ": "",
    "MODEL.KEYPOINT_ON False": "dataloader.evaluator.num_keypoints=0",
    "data sets of your own are named in DATASETS.COCO_FORMAT": "register data sets of your own in "
    "the config file, by cbbl_d2.data.register_coco_format(name, json_file, image_folder)",
}
_ALWAYS_NEEDED = ("model", "dataloader", "train")
_NEEDED_FOR_TRAINING = ("optimizer", "lr_multiplier", "dataloader.train")
_ABSENT = object()


# -- reading ---------------------------------------------------------------------------------------


def load_lazy_config(config_file: str, opts: list[str] | None = None) -> DictConfig:
    """
    A Python file in the form of Detectron2's Lazy configs, which is executed, and ``key=value``
    overrides. Where torch finds no GPU, ``train.device`` becomes "cpu".

    Args:
        config_file: path of the file.
        opts: as from the command line. A key must exist, ``+key=value`` adds one.

    Raises:
        ConfigError: no such file, it raises an error, it lacks a part, an override cannot be
            understood, has an unknown key or a value of the wrong type.
    """
    if not os.path.isfile(config_file):
        raise ConfigError(f"{config_file}: no such config file (working directory: {os.getcwd()})")
    original_import = builtins.__import__
    try:
        with warnings.catch_warnings():
            # Of model_zoo; nobody who reads it can do anything about it.
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            lazy = LazyConfig.load(config_file)
    except UserError:
        raise
    except Exception as e:  # whatever the code in the file raises
        raise ConfigError(_explain(e, config_file)) from e
    finally:
        # LazyConfig leaves its own import function in place when the file raises an error.
        builtins.__import__ = original_import
    missing = [name for name in _ALWAYS_NEEDED if name not in lazy]
    if missing:
        raise ConfigError(
            f"{config_file}: does not define {listed(missing)}: a Lazy config has model, "
            "dataloader, optimizer, lr_multiplier and train; see configs/SmallShapes/cbbl.py"
        )
    for override in opts or []:
        _apply(lazy, override)
    if not torch.cuda.is_available() and str(lazy.train.get("device", "cuda")).startswith("cuda"):
        lazy.train.device = "cpu"
    return lazy


def _apply(lazy: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"command line: {override}: overrides of a Lazy config come as key=value, for example "
            "train.max_iter=300"
        )
    adds, key = key.startswith("+"), key.lstrip("+")
    before = OmegaConf.select(lazy, key, default=_ABSENT)
    if before is _ABSENT and not adds:
        raise ConfigError(
            f"command line: unknown key {key}{_near(lazy, key)}; to add it: +{override}"
        )
    before = copy.deepcopy(before)
    try:
        LazyConfig.apply_overrides(lazy, [override])
        after = OmegaConf.select(lazy, key)
    except Exception as e:  # Hydra's parser and OmegaConf have many
        raise ConfigError(f"command line: {override}: {_one_line(e)}") from e
    if before is not _ABSENT and not _same_type(before, after):
        kind = "list" if OmegaConf.is_list(before) else type(before).__name__
        raise ConfigError(
            f"command line: {key} = {text}: must be of type {kind}, such as {short(before)}"
        )


def _same_type(before: Any, after: Any) -> bool:
    """Whether a value may take the place of another one. Names may be one or several."""
    if before is None or after is None:
        return True
    if OmegaConf.is_config(before) or OmegaConf.is_config(after):
        return type(before) is type(after) or (isinstance(before, str) and OmegaConf.is_list(after))
    if isinstance(before, (int, float)) and not isinstance(before, bool):
        return isinstance(after, (int, float)) and not isinstance(after, bool)
    return not isinstance(before, (bool, str)) or isinstance(after, type(before))


def _near(lazy: DictConfig, key: str) -> str:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(lazy, parent, default=None) if parent else lazy
    if not OmegaConf.is_dict(node):
        return _near(lazy, parent) if parent else ""
    near = difflib.get_close_matches(name, [str(key) for key in node], n=3)
    near = [f"{parent}.{name}".lstrip(".") for name in near]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _explain(error: Exception, config_file: str) -> str:
    if isinstance(error, SyntaxError):
        # LazyConfig's own, of the file or one that it imports, whose cause names the line.
        named = re.fullmatch("Config file (.*) has syntax error!", str(error))
        cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        file = named.group(1) if named else cause.filename or config_file
        return f"{file}, line {cause.lineno}: not valid Python: {cause.msg}"
    # The code of a config file stands outside of any function, or in one of a config file.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "<module>" or frame.filename == config_file
    ]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else config_file
    cure = ""
    if getattr(error, "name", None) == "pkg_resources":
        cure = ": this Detectron2 needs it: pip install 'setuptools<81'"
    return f"{place}: {type(error).__name__}: {_one_line(error)}{cure}"


def _one_line(error: Exception) -> str:
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())


# -- what the YAML configs share -------------------------------------------------------------------


def _shared_config(lazy: DictConfig) -> CfgNode:
    values = {yaml_key: OmegaConf.select(lazy, key) for key, yaml_key in _SHARED.items()}
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        values[key] = _names(values[key])
    if lazy.dataloader.get("test") is None or lazy.dataloader.get("evaluator") is None:
        values["DATASETS.TEST"] = ()
    # Which of them has the number of classes.
    is_rcnn = values["MODEL.ROI_HEADS.NUM_CLASSES"] is not None
    values["MODEL.META_ARCHITECTURE"] = "GeneralizedRCNN" if is_rcnn else "RetinaNet"
    with _in_lazy_words():
        return load_config(
            "", [word for pair in values.items() if pair[1] is not None for word in pair]
        )


def _names(value) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


@contextlib.contextmanager
def _in_lazy_words():
    """Errors that name the keys of a YAML config name those of the Lazy one instead."""
    try:
        yield
    except UserError as e:
        message = str(e)
        for words, other in _OTHER_WORDS.items():
            message = message.replace(words, other)
        for key, yaml_key in {**_SHARED, **_NAMED}.items():
            yaml_key = rf"(?<![\w.]){re.escape(yaml_key)}(?![\w.]\w)"
            message = re.sub(rf"\b(set|use|add) {yaml_key} ([^\s=]+)", rf"\1 {key}=\2", message)
            message = re.sub(yaml_key, key, message)
        if message == str(e):
            raise
        raise type(e)(message) from e


def check_lazy_config(lazy: DictConfig, num_processes: int = 1, eval_only: bool = False) -> None:
    """
    Finds what is wrong with a config and its data sets before time goes into building a model. A
    number of classes of 0 becomes that of the data, in place.

    Args:
        num_processes: on all machines together.
        eval_only: do not check what only training reads.

    Raises:
        UserError: of the kinds that a YAML config is checked for.
    """
    needed = ("dataloader.test", "dataloader.evaluator") if eval_only else _NEEDED_FOR_TRAINING
    missing = [key for key in needed if OmegaConf.select(lazy, key) is None]
    if missing:
        purpose = "evaluation" if eval_only else "training"
        raise ConfigError(f"the config does not define {listed(missing)}, needed for {purpose}")
    stock = {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False}
    for key, value in lazy.train.get("ddp", {}).items():
        if value != stock.get(key, _ABSENT):
            raise ConfigError(f"train.ddp.{key} = {value}: is not supported: leave it out")
    cfg = _shared_config(lazy)
    if len(cfg.DATASETS.TEST) > 1:
        raise ConfigError(
            f"dataloader.test.dataset.names = {short(list(cfg.DATASETS.TEST))}: a Lazy config "
            "evaluates on one data set"
        )
    with _in_lazy_words():
        check_engine_config(cfg, num_processes, eval_only)
        check_datasets(cfg, eval_only=eval_only)
    # A number of classes of 0 has become that of the data.
    is_rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    key = "model.roi_heads.num_classes" if is_rcnn else "model.num_classes"
    if OmegaConf.select(lazy, key) == 0:
        node = cfg.MODEL.ROI_HEADS if is_rcnn else cfg.MODEL.RETINANET
        OmegaConf.update(lazy, key, node.NUM_CLASSES)


# -- building --------------------------------------------------------------------------------------


def _build(lazy: DictConfig, key: str, node: Any = None) -> Any:
    """``instantiate`` of a part of the config, whose impossible values are the user's to mend."""
    try:
        return instantiate(OmegaConf.select(lazy, key) if node is None else node)
    except UserError:
        raise
    except (AssertionError, ImportError, TypeError, ValueError) as e:
        # In what is built, such an error may as well be a bug: its traceback is for developers.
        logger.debug("cannot build %s", key, exc_info=True)
        raise ConfigError(f"{key}: cannot be built: {type(e).__name__}: {_one_line(e)}") from e


def build_model(lazy: DictConfig) -> torch.nn.Module:
    return _build(lazy, "model").to(lazy.train.device)


def do_test(lazy: DictConfig, model: torch.nn.Module) -> dict[str, Any]:
    """
    Evaluate on ``dataloader.test``, and print the results.

    Returns:
        As Detectron2's ``inference_on_dataset``; empty without ``dataloader.evaluator``.
    """
    if lazy.dataloader.get("evaluator") is None:
        return {}
    # Training goes on with the numbers it would have drawn without the evaluation.
    with preserve_rng():
        results = inference_on_dataset(
            model, _build(lazy, "dataloader.test"), _build(lazy, "dataloader.evaluator")
        )
    if comm.is_main_process():
        print_csv_format(results)
    return results


class LazyTrainer(CBBLTrainer):
    """:class:`CBBLTrainer` whose parts are built as a Lazy config says."""

    def __init__(self, lazy: DictConfig):
        """
        Args:
            lazy: from :func:`load_lazy_config`.

        Raises:
            UserError: a part cannot be built.
        """
        self.lazy = lazy
        super().__init__(_shared_config(lazy))

    def build_model(self, cfg):
        model = build_model(self.lazy)
        logger.info(f"Model:\n{model}")
        return model

    def build_optimizer(self, cfg, model):
        node = copy.deepcopy(self.lazy.optimizer)
        node.params.model = model
        return maybe_add_gradient_clipping(cfg, _build(self.lazy, "optimizer", node))

    def build_lr_scheduler(self, cfg, optimizer):
        multiplier = _build(self.lazy, "lr_multiplier")
        return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)

    def build_train_loader(self, cfg):
        loader = _build(self.lazy, "dataloader.train")
        if not isinstance(loader, ResumableTrainLoader):
            raise ConfigError(
                f"dataloader.train: {type(loader).__name__} cannot resume at its place in the "
                "data: set "
                "dataloader.train._target_=cbbl_d2.data.train_loader.ResumableTrainLoader, which "
                "has the arguments of Detectron2's build_detection_train_loader"
            )
        return loader

    def build_hooks(self):
        ret = super().build_hooks()
        train = self.lazy.train
        for hook in ret:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = OmegaConf.select(train, "checkpointer.max_to_keep")
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = train.get("log_period", hook._period)
        return ret

    def run_step(self):
        with _in_lazy_words():  # here and not around it all, as the log has them, too
            super().run_step()

    def test(self, cfg, model):
        return do_test(self.lazy, model)


# -- the command line ------------------------------------------------------------------------------


def load_and_check(args: argparse.Namespace) -> DictConfig:
    """Finds what is wrong with the config and its data sets before anything is written."""
    lazy = load_lazy_config(args.config_file, args.opts)
    if args.eval_only:
        train = lazy.train
        has_last = args.resume and os.path.isfile(f"{train.output_dir}/last_checkpoint")
        if not train.get("init_checkpoint") and not has_last:
            raise UserError(
                "--eval-only needs weights: add train.init_checkpoint=path/to/model_best.pth, or "
                f"--resume for the last checkpoint in train.output_dir, {train.output_dir}"
            )
    check_lazy_config(lazy, max(1, args.num_gpus * args.num_machines), args.eval_only)
    return lazy


def main(args: argparse.Namespace) -> Any:
    """
    Train or evaluate.

    Args:
        args: from Detectron2's ``default_argument_parser``.

    Raises:
        UserError: what the user can mend.
    """
    lazy = load_and_check(args)
    # An evaluation leaves the log and the config of the training as they are.
    log_config = copy.deepcopy(lazy)
    if args.eval_only:
        log_config.train.output_dir = os.path.join(lazy.train.output_dir, "inference")
    start_log(log_config, args, log_config.train.output_dir)
    with _in_lazy_words():
        if args.eval_only:
            return evaluate(lazy, args.resume)
        trainer = LazyTrainer(lazy)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def evaluate(lazy: DictConfig, resume: bool = False) -> dict[str, Any]:
    """
    Evaluate ``train.init_checkpoint``, or the last checkpoint in ``train.output_dir`` with
    ``resume``. The numbers are added to ``inference/metrics.json``.

    Raises:
        UserError: the weights cannot be read or lack a weight of the model.
    """
    train = lazy.train
    return evaluate_weights(
        build_model(lazy),
        train.get("init_checkpoint", ""),
        train.output_dir,
        resume,
        lambda model: do_test(lazy, model),
        _shared_config(lazy).DATASETS.TEST,
    )
