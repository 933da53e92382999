"""What the COCO configs share: ImageNet weights, 12 epochs in batches of 16."""

from detectron2 import model_zoo

from .parts import without_masks
from .train import train

optimizer = model_zoo.get_config("common/optim.py").SGD
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def coco_model(name):
    """One of Detectron2's models, with the layers of ResNet-50 that its 1x configs freeze."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    model.backbone.bottom_up.freeze_at = 2
    return model
