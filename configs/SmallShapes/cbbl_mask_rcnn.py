from ..common.cbbl import cbbl_box_head
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_mask_rcnn, train

model = small_mask_rcnn(dataloader)
cbbl_box_head(model)

train.output_dir = "output/small_shapes_cbbl_mask_rcnn_lazy"
