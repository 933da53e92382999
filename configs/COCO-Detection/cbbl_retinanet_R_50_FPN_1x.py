from ..common.cbbl import cbbl_retinanet
from ..common.coco import coco_model, lr_multiplier, optimizer, train
from ..common.data import coco as dataloader

model = coco_model("retinanet")
cbbl_retinanet(model)

optimizer.lr = 0.01
train.output_dir = "output/coco_cbbl_retinanet_R_50_FPN_1x_lazy"
