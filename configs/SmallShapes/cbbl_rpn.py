# C-BBL in the RPN and in the box head.
from ..common.cbbl import cbbl_box_head, cbbl_rpn
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_faster_rcnn, train

model = small_faster_rcnn()
cbbl_box_head(model)
cbbl_rpn(model)

train.output_dir = "output/small_shapes_cbbl_rpn_lazy"
