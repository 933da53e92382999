"""The losses on validation data: what they are, and that the training does not notice them."""

import copy
import json
import logging
import math
import os
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cbbl_d2.data import register_coco_format
from cbbl_d2.engine import CBBLTrainer
from cbbl_d2.engine.validation_loss import validation_losses
from cbbl_d2.errors import UserError
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling.roi_heads import keypoint_head
from detectron2.utils.events import EventStorage, get_event_storage
from PIL import Image

from tests.driver import run_scripts
from tests.modeling.detectors import DETECTORS, NUM_CLASSES, NUM_KEYPOINTS, build, config

REPOSITORY = os.path.join(os.path.dirname(__file__), "..", "..")
SIZE = 96
VARIANTS = [(name, stock) for name in DETECTORS for stock in (False, True)]
POINTS = [f"point_{i}" for i in range(NUM_KEYPOINTS)]

slow = pytest.mark.slow


def make_data(folder, name):
    """Four images: with 5 objects, with 2 of which one is a crowd, with none, with 3."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for image, number in enumerate((5, 2, 0, 3)):
        file_name = f"{image}.png"
        pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / file_name)
        images.append({"id": image, "file_name": file_name, "width": SIZE, "height": SIZE})
        for i in range(number):
            x, y, w, h = (float(v) for v in generator.integers((0, 0, 12, 12), (60, 60, 30, 30)))
            points = [v for k in range(NUM_KEYPOINTS) for v in (x + k, y + 2 * k, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": i % NUM_CLASSES + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(number == 2 and i == 1),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": points,
                    "num_keypoints": NUM_KEYPOINTS,
                }
            )
    categories = [{"id": i + 1, "name": f"class_{i}"} for i in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    register_coco_format(name, str(folder / "data.json"), str(folder))
    MetadataCatalog.get(name).set(keypoint_names=POINTS, keypoint_flip_map=[])


@pytest.fixture
def data(tmp_path, new_name):
    name = new_name()
    make_data(tmp_path, name)
    return name


def make_cfg(name, stock, data, **options):
    cfg = config(name, stock, **options)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (data,)
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def rng():
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def other_state(model):
    """What a model holds besides tensors, of each of its modules."""
    plain = (bool, int, float, str)
    return [
        {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        for module in model.modules()
    ]


@pytest.mark.parametrize("name, stock", VARIANTS)
def test_nothing_remains_of_it_and_it_is_the_same_each_time(data, name, stock, monkeypatch):
    cfg, model = make_cfg(name, stock, data), build(name, stock)
    monkeypatch.setattr(keypoint_head, "_TOTAL_SKIPPED", 3)
    for module in model.modules():
        if hasattr(module, "vis_period"):
            module.vis_period = 1
    with EventStorage(7) as storage:
        before = tensors(model), other_state(model), rng()
        losses = validation_losses(cfg, model, data)
        assert not storage.histories() and storage.iter == 7 and not storage._vis_data
        assert get_event_storage() is storage
        after = tensors(model), other_state(model), rng()
        assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
        assert before[1:] == after[1:] and keypoint_head._TOTAL_SKIPPED == 3
        assert all(parameter.grad is None for parameter in model.parameters())

        torch.rand(5), np.random.rand(5), model.eval()
        if hasattr(model, "loss_normalizer"):
            model.loss_normalizer = 1e6
        assert validation_losses(cfg, model, data) == losses
    assert all(map(math.isfinite, losses.values()))
    parts = [value for key, value in losses.items() if key != "total_loss"]
    assert losses["total_loss"] == pytest.approx(sum(parts)) and losses["total_loss"] > 0


def by_hand(model, data, filter_empty):
    """The same means, image by image with the model in training mode but for its batch norms."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(SIZE)],
        image_format="BGR",
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=np.arange(NUM_KEYPOINTS),
    )
    sums, weights = {}, []
    for record in DatasetCatalog.get(data):
        if filter_empty and not record["annotations"]:
            continue
        with EventStorage() as storage, torch.no_grad():
            torch.manual_seed(0)
            losses = model([mapper(record)])
        positives = storage.latest().get("num_pos_anchors", [1])[0]
        weights.append(positives)
        # A dense detector has divided by its moving average.
        factor = getattr(model, "loss_normalizer", 1)
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value.item() * factor
    return {key: value / sum(weights) for key, value in sums.items()}


@pytest.mark.parametrize("filter_empty", (True, False))
@pytest.mark.parametrize("name, stock", VARIANTS)
def test_they_are_the_means_of_the_training_losses(data, name, stock, filter_empty):
    cfg, model = make_cfg(name, stock, data), build(name, stock)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    losses = validation_losses(cfg, model, data)
    losses.pop("total_loss")
    assert losses == pytest.approx(by_hand(model, data, filter_empty), rel=1e-4)


def test_an_rpn_alone(data):
    cfg = make_cfg("rpn", False, data)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    losses = validation_losses(cfg, CBBLTrainer.build_model(cfg), data)
    assert {"total_loss", "loss_rpn_cls", "loss_rpn_loc"} <= set(losses)


def test_training_augmentation_does_not_matter(data):
    cfg, model = make_cfg("faster", False, data), build("faster")
    losses = validation_losses(cfg, model, data)
    cfg.merge_from_list(
        ["INPUT.MIN_SIZE_TRAIN", (31,), "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.3, 0.3]]
    )
    assert validation_losses(cfg, model, data) == losses
    cfg.INPUT.MIN_SIZE_TEST = 64
    assert validation_losses(cfg, model, data) != losses


@pytest.mark.parametrize("name", ("faster", "retinanet", "fcos"))
@pytest.mark.parametrize("stock", (False, True))
def test_losses_that_are_not_finite_are_told(data, name, stock, caplog):
    cfg, model = make_cfg(name, stock, data), build(name, stock)
    with torch.no_grad():
        next(model.backbone.bottom_up.parameters()).fill_(math.nan)
    with caplog.at_level(logging.WARNING, "cbbl_d2"):
        losses = validation_losses(cfg, model, data)
    assert math.isnan(losses["total_loss"]) and not any(map(math.isfinite, losses.values()))
    (record,) = [r for r in caplog.records if "not finite" in r.getMessage()]
    assert f"{data}: the losses are not finite on 3 of 3 images" in record.getMessage()


def test_a_broken_image_is_named(data, tmp_path):
    (tmp_path / "3.png").write_bytes(b"nothing")
    cfg, model = make_cfg("faster", False, data), build("faster")
    with pytest.raises(UserError, match="cannot evaluate without the image .*3.png"):
        validation_losses(cfg, model, data)


def _losses_of_a_share(rank, folder):
    torch.set_num_threads(1)
    make_data(folder / str(rank), "shared_data")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", world_size=2, rank=rank
    )
    found = [
        validation_losses(make_cfg(name, False, "shared_data"), build(name), "shared_data")
        for name in ("faster", "retinanet")
    ]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads can abort a process that ends ("without an active exception")


def test_two_processes_find_what_one_finds(data, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_losses_of_a_share, (tmp_path,), nprocs=2)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert other == [{}, {}]
    assert main == [
        validation_losses(make_cfg(name, False, data), build(name), data)
        for name in ("faster", "retinanet")
    ]


def rows(folder, with_val):
    """All that metrics.json says but for timings, with or without losses on validation data."""
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    left_out = ("time", "data_time", "rank_data_time", "eta_seconds")
    return [
        {
            k: repr(v)
            for k, v in row.items()
            if k not in left_out and (with_val or not k.startswith("val/"))
        }
        for row in found
    ]


def train(folder, name):
    """Folders of a training without and with; in processes of their own, as what TorchScript has
    optimized for one training stays for the next."""
    path = os.path.join(REPOSITORY, "configs", "SmallShapes", f"{name}.yaml")
    options = [
        *("SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "100"),
        *("DATASETS.TRAIN", "('small_shapes_mini_train',)", "INPUT.MIN_SIZE_TRAIN", "(96,)"),
        *("DATASETS.TEST", "('small_shapes_mini_val',)", "INPUT.MIN_SIZE_TEST", "96"),
        *("SOLVER.IMS_PER_BATCH", "2"),
    ]
    cases = []
    for output, loss in (("without", "False"), ("with", "True")):
        words = ["OUTPUT_DIR", output, "TEST.LOSS", loss]
        cases.append([output, "train_net.py", "--config-file", path, *options, *words])
    assert run_scripts(cases, folder) == {case[0]: 0 for case in cases}
    return folder / "without", folder / "with"


@pytest.mark.parametrize("name", ("instant_test", pytest.param("cbbl_retinanet", marks=slow)))
def test_the_training_is_the_same_to_the_last_bit(tmp_path, name):
    without, with_ = train(tmp_path, name)
    states = [torch.load(f / "model_final.pth", weights_only=True) for f in (without, with_)]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    local = [s["trainer"]["hooks"]["ResumeState"]["local"][0] for s in states]
    assert torch.equal(local[0]["rng"]["torch"], local[1]["rng"]["torch"])
    assert local[0].get("loss_normalizer") == local[1].get("loss_normalizer")
    assert rows(without, True) == rows(with_, False)
    values = [float(row["val/total_loss"]) for row in rows(with_, True) if "bbox/AP" in row]
    assert len(set(values)) == len(values) == 3 and min(values) > 0
    # Nor does the line of the training in the log say what is none of it.
    log = (with_ / "log.txt").read_text()
    assert " total_loss: " in log and "val/total_loss" not in log
