"""Sliced inference as an option: what has to be said before sahi is imported."""

from cbbl_d2.errors import UserError
from detectron2.config import CfgNode

from .onnx_model import OnnxPredictor
from .predictor import BatchPredictor
from .run import Predictor

INSTALL_SAHI = "pip install --no-deps 'sahi>=0.12.8,<0.13'"


def sahi_is_missing(what: str, error: ModuleNotFoundError) -> UserError:
    """
    Args:
        what: needs sahi, the first word of the message.
        error: from the import of sahi, or of something that it requires.
    """
    return UserError(
        f"{what} needs the package sahi, but {error.name} is not installed: run make install, or "
        f"pip install -e '.[dev]' && {INSTALL_SAHI} (see docs/large_images.md)"
    )


def build_sliced_predictor(
    cfg: CfgNode,
    slice_size: int,
    overlap: float,
    whole_image: bool,
    batch_size: int,
    predictor: OnnxPredictor | None = None,
) -> Predictor:
    """
    A :class:`cbbl_d2.inference.sliced.SlicedPredictor`; prints a line where the config resizes the
    slices, or the whole image, to something that is seldom meant.

    Args:
        cfg: with ``MODEL.MASK_ON`` False.
        slice_size: side of the slices, pixels.
        overlap: share of a slice.
        predictor: what is run on each slice; None: the checkpoint of the config.

    Raises:
        UserError: sahi is not installed, or the weights do not fit.
    """
    try:
        from cbbl_d2.inference.sliced import SlicedPredictor
    except ModuleNotFoundError as e:
        raise sahi_is_missing("--slice", e) from e
    short_side = cfg.INPUT.MIN_SIZE_TEST
    if short_side == 0 and whole_image:
        print(
            "--slice with INPUT.MIN_SIZE_TEST 0: the whole image is predicted on at its full size, "
            "too, which takes its memory; --no-whole-image leaves that out"
        )
    if 0 < short_side < slice_size:
        print(
            f"--slice {slice_size}: the config shrinks each slice to {short_side} pixels; "
            f"--slice {short_side}, or --opts INPUT.MIN_SIZE_TEST 0, keeps small objects as they "
            "are"
        )
    return SlicedPredictor(
        predictor or BatchPredictor(cfg), slice_size, overlap, batch_size, whole_image
    )
