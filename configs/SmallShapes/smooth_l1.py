# The twin of cbbl.py with Detectron2's own box head, class-agnostic as well.
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_faster_rcnn, train

model = small_faster_rcnn()
model.roi_heads.box_predictor.cls_agnostic_bbox_reg = True

train.output_dir = "output/small_shapes_smooth_l1_lazy"
