import pytest
import torch
from cbbl_d2.engine import check_engine_config, check_model_config
from cbbl_d2.errors import ConfigError


@pytest.mark.parametrize(
    "batch_size, reference, processes, ok",
    [
        (6, 0, 1, True),
        (6, 0, 3, True),
        (6, 0, 4, False),
        (0, 0, 1, False),
        (6, 2, 4, True),  # Detectron2 makes it 12
        (6, 4, 2, False),
    ],
)
def test_the_batch_is_shared_out_evenly(tiny_cfg, batch_size, reference, processes, ok):
    tiny_cfg.SOLVER.IMS_PER_BATCH = batch_size
    tiny_cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    check_engine_config(tiny_cfg, processes, eval_only=True)  # it has no such batch
    if ok:
        check_engine_config(tiny_cfg, processes)
        return
    with pytest.raises(ConfigError, match=f"SOLVER.IMS_PER_BATCH = {batch_size}: must be .* [14]$"):
        check_engine_config(tiny_cfg, processes)


def test_mixed_precision_on_the_cpu(tiny_cfg):
    tiny_cfg.MODEL.DEVICE = "cpu"
    tiny_cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(ConfigError, match="SOLVER.AMP.ENABLED = True: .* GPU"):
        check_engine_config(tiny_cfg)
    check_engine_config(tiny_cfg, eval_only=True)  # a model from a GPU can be evaluated here


@pytest.mark.parametrize("architecture", ("RetinaNet", "CBBLRetinaNet", "ProposalNetwork"))
def test_augmentation_needs_a_generalized_rcnn(tiny_cfg, architecture):
    tiny_cfg.TEST.AUG.ENABLED = True
    check_engine_config(tiny_cfg)
    tiny_cfg.MODEL.META_ARCHITECTURE = architecture
    for eval_only in (False, True):
        with pytest.raises(ConfigError, match=f"TEST.AUG.ENABLED = True: .* {architecture}: set"):
            check_engine_config(tiny_cfg, eval_only=eval_only)
    tiny_cfg.TEST.AUG.ENABLED = False
    check_engine_config(tiny_cfg)


@pytest.mark.parametrize("key", ("KEYPOINT_ON", "LOAD_PROPOSALS"))
def test_augmentation_of_keypoints_and_loaded_proposals(tiny_cfg, key):
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.MODEL[key] = True
    with pytest.raises(ConfigError, match=f"TEST.AUG.ENABLED = True: .* MODEL.{key} True: set"):
        check_engine_config(tiny_cfg)


def test_processes_on_the_cpu_of_a_machine_with_gpus(tiny_cfg, monkeypatch):
    tiny_cfg.MODEL.DEVICE = "cpu"
    check_engine_config(tiny_cfg, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_engine_config(tiny_cfg, 1)
    with pytest.raises(ConfigError, match="MODEL.DEVICE = cpu: .* CUDA_VISIBLE_DEVICES="):
        check_engine_config(tiny_cfg, 2)


@pytest.mark.parametrize("device", ["cuda:1", "mps", "xpu"])
def test_devices_of_one_process(tiny_cfg, device):
    tiny_cfg.MODEL.DEVICE = device
    check_engine_config(tiny_cfg, 1)
    with pytest.raises(ConfigError, match=f"MODEL.DEVICE = {device}: .*processes"):
        check_engine_config(tiny_cfg, 2)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    where = "the CPU" if device == "cuda:1" else device  # there is no GPU
    with pytest.raises(ConfigError, match=f"needs a CUDA GPU, and this run is on {where}: set"):
        check_engine_config(tiny_cfg, 1)


@pytest.mark.parametrize(
    "key, value, near",
    [
        ("META_ARCHITECTURE", "CBBLRetinanet", "CBBLRetinaNet"),
        ("ROI_HEADS.NAME", "CBBLCascadeHeads", "CBBLCascadeROIHeads"),
        ("PROPOSAL_GENERATOR.NAME", "CBBLRpn", "CBBLRPN"),
        ("BACKBONE.NAME", "build_resnet_fpn_backbon", "build_resnet_fpn_backbone"),
    ],
)
def test_parts_of_the_model_that_nobody_registered(tiny_cfg, key, value, near):
    check_model_config(tiny_cfg)
    tiny_cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError) as error:
        check_model_config(tiny_cfg)
    assert str(error.value).startswith(f"MODEL.{key} = {value}: ")
    assert f"did you mean {near}" in str(error.value)


@pytest.mark.parametrize(
    "architecture, node", [("GeneralizedRCNN", "RPN"), ("RetinaNet", "RETINANET")]
)
def test_anchors_for_another_number_of_levels(tiny_cfg, architecture, node):
    tiny_cfg.MODEL.META_ARCHITECTURE = architecture
    tiny_cfg.MODEL[node].IN_FEATURES = ["p2", "p3"]
    with pytest.raises(ConfigError, match=f"SIZES has 5 lists, but MODEL.{node}.IN_FEATURES has 2"):
        check_model_config(tiny_cfg)
    tiny_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8, 16]]  # the same for all
    check_model_config(tiny_cfg)
