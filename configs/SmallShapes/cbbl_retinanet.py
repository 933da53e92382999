from ..common.cbbl import cbbl_retinanet
from ..common.small_shapes import dataloader, lr_multiplier, optimizer, small_dense, train

model = small_dense("retinanet")
cbbl_retinanet(model)

train.output_dir = "output/small_shapes_cbbl_retinanet_lazy"
