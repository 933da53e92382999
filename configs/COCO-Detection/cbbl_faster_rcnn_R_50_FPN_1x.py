from ..common.cbbl import cbbl_box_head
from ..common.coco import coco_model, lr_multiplier, optimizer, train, without_masks
from ..common.data import coco as dataloader

model = coco_model("mask_rcnn_fpn")
without_masks(model)
cbbl_box_head(model)

train.output_dir = "output/coco_cbbl_faster_rcnn_R_50_FPN_1x_lazy"
