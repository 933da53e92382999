from ..common.cbbl import cbbl_box_head
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_cascade_rcnn, train

model = small_cascade_rcnn()
cbbl_box_head(model)

train.output_dir = "output/small_shapes_cbbl_cascade_rcnn_lazy"
