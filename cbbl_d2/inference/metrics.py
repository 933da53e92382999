"""AP of predictions on a data set, as train_net.py computes it."""

import contextlib
import io

from cbbl_d2.evaluation import build_coco_evaluator
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from .frames import Frame
from .writers import write_json

# More than any image has: the metric then counts every detection.
_ALL_DETECTIONS = 10**6


class DatasetMetrics:
    """Collects predictions for whole images, and computes their AP and APvs."""

    def __init__(self, cfg: CfgNode, dataset: str, folder: str, sliced: bool = False):
        """
        Args:
            dataset: name of a registered data set.
            folder: for the annotations of a data set that is not in COCO format, in that format.
            sliced: each slice has the model's limit, and an image any number of slices: count all
                the objects that are given.
        """
        if sliced:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.TEST.DETECTIONS_PER_IMAGE = _ALL_DETECTIONS
        has_file = MetadataCatalog.get(dataset).get("json_file", None) is not None
        self._evaluator = build_coco_evaluator(cfg, dataset, None if has_file else folder)
        self._evaluator.reset()

    def take(self, frame: Frame, instances: Instances) -> None:
        """Last of all: Detectron2's evaluator shifts keypoints in place."""
        self._evaluator.process([frame.record], [{"instances": instances}])

    def write(self, path: str) -> dict[str, dict[str, float]]:
        """
        Write the metrics as JSON.

        Returns:
            task ("bbox", ...) -> name -> percent.

        Raises:
            UserError: the file cannot be written.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = self._evaluator.evaluate()
        write_json(path, metrics)
        return metrics
