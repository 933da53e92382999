from ..common.cbbl import cbbl_box_head
from ..common.coco import coco_model, lr_multiplier, optimizer, train, without_masks
from ..common.data import coco as dataloader

model = coco_model("cascade_rcnn")
without_masks(model)
model.proposal_generator.post_nms_topk = (2000, 1000)  # as Detectron2's YAML config has it
cbbl_box_head(model)

train.output_dir = "output/coco_cbbl_cascade_rcnn_R_50_FPN_1x_lazy"
