"""Training and evaluation by Lazy configs, by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

ROOT = Path(__file__).parents[2]
TOOL = "tools/lazyconfig_train_net.py"

# What SmallShapes/instant_test.yaml changes.
TINY = [
    "dataloader.train.dataset.names=small_shapes_mini_train",
    "dataloader.test.dataset.names=small_shapes_mini_val",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "lr_multiplier.warmup_length=0.01",
    "train.max_iter=2",
    "train.log_period=1",
]

# Command lines, one after the other: to import torch takes longer than to train.
RUN = """
import json, runpy, sys
for sys.argv in json.load(sys.stdin):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        print(f"{sys.argv[0]} ended with {e.code}", file=sys.stderr)
"""


def run(folder, *lines):
    """Programs with a config of SmallShapes and their arguments, in ``folder``."""
    configs = ROOT / "configs" / "SmallShapes"
    commands = [
        [str(ROOT / program), "--config-file", str(configs / config), *rest]
        for program, config, *rest in lines
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(commands),
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trains_evaluates_and_resumes(tmp_path):
    out = tmp_path / "out"
    tiny = [*TINY, f"train.output_dir={out}"]
    first = run(tmp_path, (TOOL, "cbbl.py", *tiny))
    trained = rows(out / "metrics.json")
    assert [row["iteration"] for row in trained if "total_loss" in row] == [0, 1]
    assert "bbox/APvs" in trained[-1] and (out / "model_final.pth").is_file()
    assert "No GPU found: running on the CPU" in first.stdout

    names = ("small_shapes_mini_val_per_class.csv", "coco_instances_results.json")
    inference = {name: (out / "inference" / name).read_text() for name in names}
    assert len(json.loads(inference[names[1]])) > 0
    weights = f"train.init_checkpoint={out / 'model_final.pth'}"
    elsewhere = f"train.output_dir={tmp_path / 'elsewhere'}"
    other_grid = "model.roi_heads.box_predictor.box2box_transform.grid.num_intervals=8"
    second = run(
        tmp_path,
        (TOOL, "cbbl.py", "--eval-only", *tiny, elsewhere, weights),
        (TOOL, "cbbl.py", "--eval-only", *tiny, elsewhere),
        (TOOL, "cbbl.py", "--eval-only", *tiny, elsewhere, weights, other_grid),
        (TOOL, "cbbl.py", "--resume", *tiny, "train.max_iter=3"),
        ("train_net.py", "cbbl.py"),
    )
    for name in inference:
        assert (tmp_path / "elsewhere" / "inference" / name).read_text() == inference[name]
    resumed = rows(out / "metrics.json")[len(trained) :]
    assert [row["iteration"] for row in resumed if "total_loss" in row] == [2]

    errors = [line for line in second.stderr.splitlines() if "rror" in line or "ended" in line]
    assert errors[0].startswith("error: --eval-only needs weights: add train.init_checkpoint=")
    assert "bbox_pred was trained on the grid" in errors[2]
    config = ROOT / "configs" / "SmallShapes" / "cbbl.py"
    assert errors[4:] == [
        f"error: {config}: a Lazy config: run python {TOOL} --config-file {config}, or give the "
        "YAML config of the same name",
        f"{ROOT / 'train_net.py'} ended with 1",
    ]


@pytest.mark.parametrize(
    "config",
    [
        "cbbl_keypoint_rcnn.py",
        pytest.param("cbbl_mask_rcnn.py", marks=pytest.mark.slow),
        pytest.param("cbbl_fcos.py", marks=pytest.mark.slow),
    ],
)
def test_metrics_of_masks_and_keypoints(tmp_path, config):
    """Also where nothing was detected: the model may be untrained."""
    run(tmp_path, (TOOL, config, *TINY, f"train.output_dir={tmp_path}", "train.max_iter=1"))
    found = {key.partition("/")[0] for key in rows(tmp_path / "metrics.json")[-1] if "/AP" in key}
    other = {"cbbl_keypoint_rcnn.py": {"keypoints"}, "cbbl_mask_rcnn.py": {"segm"}}
    assert found == {"bbox"} | other.get(config, set())


def test_gradients_are_clipped(monkeypatch):
    import torch
    from detectron2.config import LazyConfig, instantiate

    monkeypatch.syspath_prepend(ROOT / "tools")
    import lazyconfig_train_net as tool

    cfg = LazyConfig.load(str(ROOT / "configs" / "SmallShapes" / "cbbl.py"))
    for enabled in (True, False):
        cfg.train.clip_gradients.enabled = enabled
        optimizer = tool.build_optimizer(cfg, instantiate(cfg.model))
        parameter = optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.full_like(parameter, 100.0)
        optimizer.step()
        clipped = parameter.grad.norm().item() <= cfg.train.clip_gradients.clip_value * 1.001
        assert clipped == enabled


def test_learning_rates_of_the_localization(monkeypatch):
    from detectron2.config import LazyConfig, instantiate

    monkeypatch.syspath_prepend(ROOT / "tools")
    import lazyconfig_train_net as tool

    cfg = LazyConfig.load(str(ROOT / "configs" / "SmallShapes" / "cbbl.py"))
    for factors in ((1.0, 1.0), (4.0, 6.0)):
        cfg.train.bbox_pred_lr_factor, cfg.train.anchor_deltas_lr_factor = factors
        model = instantiate(cfg.model)
        optimizer = tool.build_optimizer(cfg, model)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        box, rpn = model.roi_heads.box_predictor, model.proposal_generator.rpn_head
        other = rates[id(box.cls_score.weight)]
        ratios = [rates[id(x.weight)] / other for x in (box.bbox_pred, rpn.anchor_deltas)]
        assert ratios == pytest.approx(factors)
