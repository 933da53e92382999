from ..common.cbbl import cbbl_box_head
from ..common.coco import coco_model, lr_multiplier, optimizer, train
from ..common.data import coco as dataloader

model = coco_model("mask_rcnn_fpn")
cbbl_box_head(model)

dataloader.train.mapper.use_instance_mask = True
dataloader.evaluator.expected_tasks = ["bbox", "segm"]
train.output_dir = "output/coco_cbbl_mask_rcnn_R_50_FPN_1x_lazy"
