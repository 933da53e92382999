"""Evaluation with Detectron2's test-time augmentation, after training and on its own."""

import json

import numpy as np
import pytest
import torch
from cbbl_d2.engine import CBBLTrainer

import train_net


def _train(cfg):
    torch.manual_seed(0)
    trainer = CBBLTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def _last_metrics(cfg, folder="."):
    with open(f"{cfg.OUTPUT_DIR}/{folder}/metrics.json") as f:
        return json.loads(f.readlines()[-1])


def _detections(cfg, folder):
    """For each image: boxes and scores, shape (R, 5), by score."""
    with open(f"{cfg.OUTPUT_DIR}/{folder}/coco_instances_results.json") as f:
        rows = json.load(f)
    images = {}
    for row in rows:
        images.setdefault(row["image_id"], []).append([row["score"], *row["bbox"]])
    return {image: np.array(sorted(rows)) for image, rows in images.items()}


@pytest.fixture
def augmented_cfg(tiny_cfg):
    tiny_cfg.merge_from_list(["TEST.AUG.ENABLED", True, "SOLVER.MAX_ITER", 1])
    return tiny_cfg


def test_augmentation_by_nothing_changes_nothing(augmented_cfg):
    """Only the size that the images have already, and no flip."""
    augmented_cfg.TEST.AUG.MIN_SIZES = (augmented_cfg.INPUT.MIN_SIZE_TEST,)
    augmented_cfg.TEST.AUG.FLIP = False
    _train(augmented_cfg)
    plain, augmented = (_detections(augmented_cfg, d) for d in ("inference", "inference_TTA"))
    assert plain.keys() == augmented.keys() and len(plain) == 12
    for image in plain:
        np.testing.assert_allclose(augmented[image], plain[image], atol=1e-3)


def test_both_evaluations_are_logged_after_training_and_with_eval_only(augmented_cfg):
    augmented_cfg.TEST.AUG.MIN_SIZES = (96, 128)
    _train(augmented_cfg)
    after_training = _last_metrics(augmented_cfg)
    assert after_training["iteration"] == 1
    plain = {key for key in after_training if key.startswith("bbox/")}
    augmented = {key for key in after_training if key.startswith("bbox_TTA/")}
    assert "bbox/APvs" in plain
    assert augmented == {key.replace("bbox/", "bbox_TTA/") for key in plain}
    detections = (_detections(augmented_cfg, d)[1] for d in ("inference", "inference_TTA"))
    assert not np.array_equal(*detections)

    augmented_cfg.MODEL.WEIGHTS = f"{augmented_cfg.OUTPUT_DIR}/model_final.pth"
    train_net.evaluate(augmented_cfg, resume=False)
    alone = _last_metrics(augmented_cfg, "inference")
    assert _last_metrics(augmented_cfg) == after_training  # that of the training is left alone
    for key in plain | augmented:
        assert repr(alone[key]) == repr(after_training[key]), key  # NaN equals NaN
