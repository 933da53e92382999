import pytest
import torch

pytest.importorskip("detectron2")

from cbbl_d2.inference import to_detections  # noqa: E402


def test_boxes_are_coco_boxes(make_instances):
    (detection,) = to_detections(make_instances([[1, 2, 11, 7]], [0.5], [3]), 9)
    assert detection == {"image_id": 9, "category_id": 3, "bbox": [1, 2, 10, 5], "score": 0.5}
    assert to_detections(make_instances([], [], []), 9) == []


def test_further_fields_are_kept_and_images_are_not(make_instances):
    std = torch.arange(8.0).reshape(2, 4)
    boxes = [[0, 0, 1, 1], [0, 0, 2, 2]]
    heatmaps = torch.zeros(2, 3, 56, 56)
    instances = make_instances(
        boxes, [0.9, 0.8], [0, 0], pred_boxes_std=std, pred_keypoint_heatmaps=heatmaps
    )
    detections = to_detections(instances, 1)
    assert [d["pred_boxes_std"] for d in detections] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "pred_keypoint_heatmaps" not in detections[0]


def test_keypoints_are_pixel_indices_and_the_predictions_stay_as_they_are(make_instances):
    keypoints = torch.tensor([[[4.5, 6.5, 0.9]]])
    instances = make_instances([[0, 0, 9, 9]], [0.5], [0], pred_keypoints=keypoints)
    assert to_detections(instances, 1)[0]["keypoints"][:2] == [4, 6]
    assert instances.pred_keypoints[0, 0, 0] == 4.5
