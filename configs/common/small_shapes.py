"""
Data, schedule and detectors of SmallShapes (160x160, objects of 6 to 40 px), as in
SmallShapes/Base-R_18.yaml: minutes on a laptop. All but the localization, see cbbl.py.
"""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from .data import coco as dataloader
from .parts import box_parts, without_masks
from .train import train

_NUM_CLASSES = 5
_CHANNELS = 64  # of the feature pyramid
_FC_DIM = 256
_NUM_KEYPOINTS = 4  # leftmost, topmost, rightmost and bottommost point of a shape

dataloader.train.dataset.names = "small_shapes_train"
dataloader.test.dataset.names = "small_shapes_val"
dataloader.train.mapper.augmentations[0].short_edge_length = (160,)
dataloader.test.mapper.augmentations[0].short_edge_length = 160
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 0

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=1e-3,
    weight_decay=1e-4,
)

train.max_iter = 2400
train.eval_period = 400
train.checkpointer.period = 200
train.clip_gradients.update(enabled=True, clip_value=5.0)
train.seed = 1

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=100 / train.max_iter,  # a share of the training
    warmup_method="linear",
)


def small_rcnn(name="mask_rcnn_fpn"):
    """One of Detectron2's models with ResNet-18 from scratch and smaller heads."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    model.pixel_std = [57.375, 57.120, 58.395]  # Detectron2's 1 is for Caffe's weights
    model.backbone.bottom_up.stem.norm = "BN"
    model.backbone.bottom_up.stages = L(ResNet.make_default_stages)(depth=18, norm="BN")
    model.backbone.out_channels = _CHANNELS

    rpn = model.proposal_generator
    rpn.head.update(in_channels=_CHANNELS, conv_dims=[64])
    rpn.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
    rpn.pre_nms_topk = (500, 300)
    rpn.post_nms_topk = (300, 100)

    roi_heads = model.roi_heads
    roi_heads.num_classes = _NUM_CLASSES
    roi_heads.batch_size_per_image = 64
    roi_heads.box_pooler.sampling_ratio = 2
    for head in box_parts(roi_heads, "box_head"):
        head.input_shape = ShapeSpec(channels=_CHANNELS, height=7, width=7)
        head.fc_dims = [_FC_DIM, _FC_DIM]
    for predictor in box_parts(roi_heads, "box_predictor"):
        predictor.input_shape = ShapeSpec(channels=_FC_DIM)
    return model


def small_faster_rcnn():
    return without_masks(small_rcnn())


def small_cascade_rcnn():
    return without_masks(small_rcnn("cascade_rcnn"))


def small_mask_rcnn(dataloader):
    """Also has ``dataloader`` load and evaluate masks."""
    model = small_rcnn()
    model.roi_heads.mask_pooler.sampling_ratio = 2
    model.roi_heads.mask_head.input_shape = ShapeSpec(channels=_CHANNELS, height=14, width=14)
    model.roi_heads.mask_head.conv_dims = [64, 64, 64]
    dataloader.train.mapper.use_instance_mask = True
    dataloader.evaluator.expected_tasks = ["bbox", "segm"]
    return model


def small_keypoint_rcnn(dataloader):
    """Also has ``dataloader`` load and evaluate keypoints."""
    model = small_rcnn("keypoint_rcnn_fpn")
    model.roi_heads.keypoint_pooler.sampling_ratio = 2
    model.roi_heads.keypoint_head.update(
        input_shape=ShapeSpec(channels=_CHANNELS, height=14, width=14),
        num_keypoints=_NUM_KEYPOINTS,
        conv_dims=[64, 64],
    )
    dataloader.train.dataset.min_keypoints = 1
    dataloader.train.mapper.use_keypoint = True
    dataloader.train.mapper.keypoint_hflip_indices = L(create_keypoint_hflip_indices)(
        dataset_names="${dataloader.train.dataset.names}"
    )
    dataloader.evaluator.expected_tasks = ["bbox", "keypoints"]
    dataloader.evaluator.kpt_oks_sigmas = [0.05] * _NUM_KEYPOINTS
    return model


def small_dense(name):
    """RetinaNet or FCOS; with P2, which they usually lack, because objects start at 6 px."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    rcnn = small_rcnn()
    model.backbone = rcnn.backbone
    model.pixel_std = rcnn.pixel_std
    model.num_classes = _NUM_CLASSES
    model.head_in_features = ["p2", "p3", "p4", "p5", "p6"]
    model.head.input_shape = [ShapeSpec(channels=_CHANNELS)] * 5
    model.head.conv_dims = [_CHANNELS, _CHANNELS]
    if "anchor_generator" in model:
        model.anchor_generator.sizes = [
            [round(size * 2 ** (i / 3), 2) for i in range(3)] for size in (8, 16, 32, 64, 128)
        ]
        model.anchor_generator.strides = [4, 8, 16, 32, 64]
    return model
