from ..common.cbbl import cbbl_box_head
from ..common.coco import coco_model, lr_multiplier, optimizer, train
from ..common.data import coco_keypoint as dataloader

model = coco_model("keypoint_rcnn_fpn")
cbbl_box_head(model)

train.output_dir = "output/coco_cbbl_keypoint_rcnn_R_50_FPN_1x_lazy"
