"""Detectron2's data for COCO, whose training resumes exactly and whose AP is also by size."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from cbbl_d2.data.broken_images import NameBrokenImage
from cbbl_d2.data.train_loader import ResumableTrainLoader
from cbbl_d2.engine.lazy_parts import coco_evaluator

coco = model_zoo.get_config("common/data/coco.py").dataloader
coco_keypoint = model_zoo.get_config("common/data/coco_keypoint.py").dataloader

for _dataloader in (coco, coco_keypoint):
    _dataloader.train._target_ = ResumableTrainLoader
    # Absolute: one level deeper a relative reference would miss.
    _dataloader.test.mapper.image_format = "${dataloader.train.mapper.image_format}"
    _dataloader.test.mapper = L(NameBrokenImage)(mapper=_dataloader.test.mapper)
    _dataloader.evaluator = L(coco_evaluator)(
        dataset_name="${dataloader.test.dataset.names}",
        output_folder="${train.output_dir}/inference",
        masks=False,
    )
coco.train.mapper.use_instance_mask = False
coco_keypoint.evaluator.num_keypoints = 17
