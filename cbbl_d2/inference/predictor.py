"""From images to predictions, several at a time."""

from typing import Sequence

import numpy as np
import torch
from cbbl_d2.data.dataset_checks import with_num_classes
from cbbl_d2.engine.checkpoint import load_weights
from cbbl_d2.errors import ConfigError, UserError
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances


def check_input_format(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: another ``INPUT.FORMAT`` than RGB or BGR.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError(f"INPUT.FORMAT = {cfg.INPUT.FORMAT!r}: must be RGB or BGR")


class BatchPredictor:
    """
    Detectron2's ``DefaultPredictor`` for batches, with a check that the weights fit the model.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: ``MODEL`` with ``MODEL.WEIGHTS``, ``INPUT.MIN_SIZE_TEST``, ``INPUT.MAX_SIZE_TEST``
                and ``INPUT.FORMAT`` are read; where the number of classes is 0, the data sets.

        Raises:
            ConfigError: another ``INPUT.FORMAT`` than RGB or BGR.
            UserError: the weights cannot be read or do not fit.
        """
        check_input_format(cfg)
        self.model = build_model(with_num_classes(cfg, eval_only=True)).eval()
        load_weights(self.model, cfg.MODEL.WEIGHTS)
        self.device = cfg.MODEL.DEVICE
        self._is_bgr = cfg.INPUT.FORMAT == "BGR"
        short_side = cfg.INPUT.MIN_SIZE_TEST
        self._resize = T.ResizeShortestEdge([short_side, short_side], cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """
        Args:
            images: (H, W, 3) uint8, RGB. Those of one size are predicted as if they were alone;
                where sizes differ, Detectron2 pads the smaller ones, which can move their
                predictions a little.

        Returns:
            list[Instances]: one for each image, on the CPU, in pixels of the images as they are
            given, with every field that the model makes.

        Raises:
            UserError: the model finds no objects, or there is not enough memory on the device.
        """
        if not len(images):
            return []
        try:
            outputs = self.model([self._input(image) for image in images])
        except RuntimeError as e:  # Apple's GPUs have no error of their own for it
            if "out of memory" not in str(e):
                raise
            height, width = images[0].shape[:2]
            raise UserError(
                f"{self.device} has too little memory for {len(images)} images of {width} x "
                f"{height}: lower --batch-size or INPUT.MAX_SIZE_TEST, or use --slice"
            ) from e
        if "instances" not in outputs[0]:
            raise UserError(
                f"this model predicts {', '.join(outputs[0])} and no instances: give the config of "
                "a detector"
            )
        return [output["instances"].to("cpu") for output in outputs]

    def _input(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        if self._is_bgr:
            image = image[:, :, ::-1]
        resize = self._resize.get_transform(image)
        # Of an image a thousand times as long as wide Detectron2 would leave no row at all.
        if isinstance(resize, T.ResizeTransform):  # not with INPUT.MIN_SIZE_TEST 0
            resize.new_h, resize.new_w = max(resize.new_h, 1), max(resize.new_w, 1)
        image = resize.apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)).astype("float32"))
        return {"image": tensor, "height": height, "width": width}
