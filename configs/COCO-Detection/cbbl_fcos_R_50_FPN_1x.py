from ..common.cbbl import cbbl_fcos
from ..common.coco import coco_model, lr_multiplier, optimizer, train
from ..common.data import coco as dataloader

model = coco_model("fcos")
cbbl_fcos(model)

optimizer.lr = 0.01
train.output_dir = "output/coco_cbbl_fcos_R_50_FPN_1x_lazy"
