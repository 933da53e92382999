"""Detectron2's data for COCO, whose AP is also by size."""

from cbbl_d2.compat import has_fast_evaluation
from cbbl_d2.evaluation import SmallObjectCOCOEvaluator
from detectron2 import model_zoo

coco = model_zoo.get_config("common/data/coco.py").dataloader
coco_keypoint = model_zoo.get_config("common/data/coco_keypoint.py").dataloader

for _dataloader in (coco, coco_keypoint):
    _dataloader.evaluator._target_ = SmallObjectCOCOEvaluator
    _dataloader.evaluator.output_dir = "${train.output_dir}/inference"
    _dataloader.evaluator.use_fast_impl = has_fast_evaluation()
    _dataloader.evaluator.expected_tasks = ["bbox"]
coco.train.mapper.use_instance_mask = False
coco_keypoint.evaluator.expected_tasks = ["bbox", "keypoints"]
