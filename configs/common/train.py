"""Detectron2's settings of a training, and those that this project adds."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.update(
    seed=-1,  # of all random numbers; -1: another one each time
    # SOLVER.BBOX_PRED_LR_FACTOR and ANCHOR_DELTAS_LR_FACTOR, for tools/lazyconfig_train_net.py
    bbox_pred_lr_factor=1.0,
    anchor_deltas_lr_factor=1.0,
    # Detectron2's SOLVER.CLIP_GRADIENTS, for tools/lazyconfig_train_net.py. "norm" is that of the
    # gradient of each parameter, not of all together.
    clip_gradients=dict(enabled=False, clip_type="norm", clip_value=1.0, norm_type=2.0),
)
