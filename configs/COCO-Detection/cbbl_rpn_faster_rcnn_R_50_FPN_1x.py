# C-BBL in the RPN and in the box head.
from ..common.cbbl import cbbl_rpn
from .cbbl_faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

cbbl_rpn(model)

train.output_dir = "output/coco_cbbl_rpn_faster_rcnn_R_50_FPN_1x_lazy"
