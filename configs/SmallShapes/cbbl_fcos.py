from ..common.cbbl import cbbl_fcos
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_dense, train

model = small_dense("fcos")
cbbl_fcos(model)

train.output_dir = "output/small_shapes_cbbl_fcos_lazy"
