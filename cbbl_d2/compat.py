"""
Every difference between Detectron2 v0.6 and its main branch that this project meets, told apart by
what is there: both call themselves "0.6". And what neither leaves a clean way for.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pycocotools.coco
import torch
from cbbl_d2.devices import device_kind
from detectron2.engine import DefaultTrainer, defaults
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import keypoint_head
from detectron2.structures import Boxes, Instances


def box_tensors(boxes: Sequence[Boxes | torch.Tensor]) -> list[torch.Tensor]:
    """
    The ground truth that a dense detector hands to its losses, an item for each image: FCOS has
    ``Boxes`` in v0.6 and tensors in main.
    """
    return [x.tensor if isinstance(x, Boxes) else x for x in boxes]


def with_a_box(image: Instances) -> Instances:
    """
    An image's ground truth for ``FCOS.label_anchors``, which in v0.6 fails where there is none: a
    box without inside, in which no point lies, so that all become background.
    """
    if len(image) > 0:
        return image
    device = image.gt_boxes.device
    return Instances(
        image.image_size,
        gt_boxes=Boxes(torch.zeros(1, 4, device=device)),
        gt_classes=torch.zeros(1, dtype=torch.int64, device=device),
    )


def dense_head_norm(name: str) -> str | Callable:
    """
    What an ``FCOSHead`` can take as its ``norm``. v0.6 tries the normalization of its dense heads
    on one channel, which GN refuses: it has 32 groups.

    Args:
        name: as for Detectron2's ``get_norm``.
    """
    if name != "GN":
        return name
    return lambda channels: get_norm("GN" if channels > 1 else "", channels)


def with_optimizer(trainer: DefaultTrainer, state: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of a trainer: v0.6 forgets the optimizer, main has it as "_trainer"."""
    return state if "_trainer" in state else {**state, "_trainer": trainer._trainer.state_dict()}


def load_optimizer(trainer: DefaultTrainer, state: dict[str, Any]) -> None:
    """To be called after ``DefaultTrainer.load_state_dict``, which in v0.6 leaves that part out."""
    if "load_state_dict" not in DefaultTrainer.__dict__:
        trainer._trainer.load_state_dict(state["_trainer"])


def has_fast_evaluation() -> bool:
    """Whether Detectron2's COCO metric in C++ was compiled."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "InstanceAnnotation")


def needs_gpu_to_launch(error: Exception) -> bool:
    """
    Whether several processes could not start because v0.6 wants a GPU for them. It can only be
    learned by trying: it is an assertion inside their first function.
    """
    return not torch.cuda.is_available() and "cuda is not available" in str(error)


@contextlib.contextmanager
def reading_parsed(content: dict) -> Iterator[None]:
    """
    ``load_coco_json`` takes a path alone, and parses the file by ``pycocotools.coco.COCO(path)``:
    gigabytes and half a minute more for a large file that has been parsed for its checks. In this
    context ``COCO(path)`` takes its content.

    Args:
        content: the parsed JSON.
    """
    before = pycocotools.coco.COCO

    def coco(_path: str) -> pycocotools.coco.COCO:
        api = before()
        api.dataset = content
        api.createIndex()
        return api

    pycocotools.coco.COCO = coco
    try:
        yield
    finally:
        pycocotools.coco.COCO = before


@contextlib.contextmanager
def default_trainer_parts(checkpointer: type, device: str) -> Iterator[None]:
    """
    ``DefaultTrainer.__init__`` names the class of its checkpointer and makes the model parallel, on
    the GPU of its rank, in between steps that cannot be taken apart. In this context it uses
    another checkpointer, and leaves a model on the CPU there, for which torch refuses any GPU.

    Args:
        checkpointer: a subclass of ``DetectionCheckpointer``.
        device: ``MODEL.DEVICE``.
    """
    before = defaults.DetectionCheckpointer, defaults.create_ddp_model
    defaults.DetectionCheckpointer = checkpointer
    if device_kind(device) == "cpu":
        defaults.create_ddp_model = functools.partial(before[1], device_ids=None)
    try:
        yield
    finally:
        defaults.DetectionCheckpointer, defaults.create_ddp_model = before


@contextlib.contextmanager
def at_last_iteration(trainer: DefaultTrainer) -> Iterator[None]:
    """
    For a checkpoint that a hook writes after the training. Checkpoints are those of an iteration,
    and at that place Detectron2 has counted on already.
    """
    iteration = trainer.iter
    trainer.iter = iteration - 1
    try:
        yield
    finally:
        trainer.iter = iteration


@contextlib.contextmanager
def skipped_keypoints_not_counted() -> Iterator[None]:
    """
    Detectron2 counts the batches without a visible keypoint in a variable of the module, and logs
    their number. In this context they do not count.
    """
    before = keypoint_head._TOTAL_SKIPPED
    try:
        yield
    finally:
        keypoint_head._TOTAL_SKIPPED = before
