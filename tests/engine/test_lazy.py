"""Training and evaluation by Lazy configs."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf

from cbbl_d2.engine import CBBLTrainer, load_config
from cbbl_d2.engine.lazy import LazyTrainer, check_lazy_config, evaluate, load_lazy_config
from cbbl_d2.errors import ConfigError, UserError

SMALL = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "SmallShapes")

# What SmallShapes/instant_test.yaml changes.
TINY = {
    "dataloader.train.dataset.names": "small_shapes_mini_train",
    "dataloader.test.dataset.names": "small_shapes_mini_val",
    "dataloader.train.total_batch_size": "2",
    "dataloader.train.mapper.augmentations.0.short_edge_length": "[96]",
    "dataloader.test.mapper.mapper.augmentations.0.short_edge_length": "96",
    "lr_multiplier.warmup_iters": "0",
    "train.max_iter": "4",
    "train.checkpointer.period": "2",
    "train.eval_period": "0",
}


# Command lines, one after the other: to import torch takes longer than to train.
RUN = """
import json, sys
import train_net
from detectron2.engine import default_argument_parser
for arguments in json.load(sys.stdin):
    train_net.run(default_argument_parser().parse_args(arguments))
"""


def words(**changes):
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in {**TINY, **changes}.items()]


def load(name="cbbl", **changes):
    return load_lazy_config(os.path.join(SMALL, f"{name}.py"), words(**changes))


class Interrupt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def train(trainer_of, resume=False, interrupt_at=None):
    seed_all_rng(1)  # as default_setup does
    trainer = trainer_of()
    trainer.resume_or_load(resume=resume)
    seed_all_rng(2)  # both kinds of config make the layers in different orders
    if interrupt_at is None:
        trainer.train()
        return trainer
    trainer.register_hooks([Interrupt(interrupt_at)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def weights(trainer):
    return trainer.model.state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("name", ["cbbl_rpn", "cbbl_keypoint_rcnn"])
def test_trains_as_its_yaml_twin_to_the_last_digit(name, tmp_path):
    """The model, the data with its augmentation, optimizer, schedule and clipping are the same."""
    tiny = os.path.join(SMALL, "instant_test.yaml")
    cfg = load_config(os.path.join(SMALL, f"{name}.yaml"))
    instant = load_config(tiny)
    for node, keys in {
        "SOLVER": ("IMS_PER_BATCH", "WARMUP_ITERS"),
        "DATASETS": ("TRAIN",),
        "INPUT": ("MIN_SIZE_TRAIN", "MIN_SIZE_TEST"),
    }.items():
        for key in keys:
            cfg[node][key] = instant[node][key]
    cfg.DATASETS.TEST = ()
    cfg.SOLVER.MAX_ITER = 3
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "yaml")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    lazy = load(
        name,
        train__device="cpu",
        train__max_iter=3,
        train__init_checkpoint=cfg.MODEL.WEIGHTS,
        train__output_dir=tmp_path / "lazy",
        dataloader__evaluator="null",
    )

    trainers = []
    for make in (lambda: CBBLTrainer(cfg), lambda: LazyTrainer(lazy)):

        def with_the_same_data(make=make):
            trainer = make()
            trainer._trainer.data_loader.load_state_dict({"num_batches": 0, "seed": 3})
            return trainer

        os.makedirs(tmp_path / ("lazy" if trainers else "yaml"))
        trainers.append(train(with_the_same_data))
    expected, found = (
        {
            name: [value for value, _ in history.values()]
            for name, history in trainer.storage.histories().items()
            if "time" not in name
        }
        for trainer in trainers
    )
    assert len(set(expected["lr"])) == 3 and "total_loss" in expected
    assert found == expected
    assert_same(weights(trainers[1]), weights(trainers[0]))


def test_gradients_are_clipped(tmp_path):
    lazy = load(train__output_dir=tmp_path, dataloader__evaluator="null")
    for enabled in (True, False):
        lazy.train.clip_gradients.enabled = enabled
        optimizer = LazyTrainer(lazy)._trainer.optimizer
        parameter = optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.full_like(parameter, 100.0)
        optimizer.step()
        clipped = parameter.grad.norm().item() <= lazy.train.clip_gradients.clip_value * 1.001
        assert clipped == enabled


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    def trainer_in(folder, **changes):
        os.makedirs(folder, exist_ok=True)
        return lambda: LazyTrainer(load(train__output_dir=folder, **changes))

    whole = train(trainer_in(tmp_path / "whole"))
    train(trainer_in(tmp_path / "parts"), interrupt_at=3)
    parts = train(trainer_in(tmp_path / "parts"), resume=True)
    assert parts.start_iter == 2
    assert_same(weights(parts), weights(whole))
    files = set(os.listdir(tmp_path / "parts"))
    assert {"model_0000001.pth", "model_final.pth", "model_best.pth", "metrics.json"} <= files
    assert not [name for name in files if name.endswith(".tmp")]

    # The best model, evaluated on its own, has the AP of the training's evaluation.
    with open(tmp_path / "parts" / "metrics.json") as f:
        rows = [json.loads(line) for line in f]
    logged = next(row for row in reversed(rows) if "bbox/AP" in row)
    best = tmp_path / "parts" / "model_best.pth"
    results = evaluate(load(train__output_dir=tmp_path / "eval", train__init_checkpoint=best))
    assert {f"bbox/{key}": repr(value) for key, value in results["bbox"].items()} == {
        key: repr(value) for key, value in logged.items() if key.startswith("bbox/")
    }
    assert "APvs" in results["bbox"]
    assert "bbox/APvs" in (tmp_path / "eval" / "inference" / "metrics.json").read_text()

    # Another grid does not fit.
    key = "model.roi_heads.box_predictor.box2box_transform.grid.num_intervals"
    with pytest.raises(UserError, match="bbox_pred was trained on the grid"):
        train(trainer_in(tmp_path / "parts", **{key: 8}), resume=True)


def test_old_checkpoints_are_removed_and_the_log_is_as_often_as_asked(tmp_path):
    lazy = load(
        train__output_dir=tmp_path,
        train__max_iter=3,
        train__checkpointer__period=1,
        train__checkpointer__max_to_keep=1,
        train__log_period=1,
        dataloader__evaluator="null",
    )
    train(lambda: LazyTrainer(lazy))
    checkpoints = {name for name in os.listdir(tmp_path) if name.startswith("model_")}
    assert checkpoints == {"model_0000002.pth", "model_final.pth"}
    assert (tmp_path / "metrics.json").read_text().count("total_loss") == 3


# -- what cannot work ------------------------------------------------------------------------------


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.max_iters=3", ["unknown key train.max_iters", "train.max_iter?", "+train.max_it"]),
        ("trian.max_iter=3", ["unknown key trian.max_iter", "did you mean train"]),
        ("train.max_iter", ["key=value"]),
        ("train.max_iter=abc", ["train.max_iter = abc", "of type int, such as 4"]),
        ("train.amp.enabled=3", ["train.amp.enabled = 3", "of type bool, such as False"]),
        ("train.amp=3", ["train.amp = 3", "such as {'enabled': False}"]),
        ("model.pixel_std=3", ["model.pixel_std = 3", "of type list"]),
        ("train.max_iter=[1", ["train.max_iter=[1: "]),
        ("train.max_iter=1,2", ["train.max_iter=1,2"]),
        ("~train.seed=1", ["~train.seed"]),
    ],
)
def test_an_override_that_cannot_be_applied(override, expected):
    with pytest.raises(ConfigError) as error:
        load_lazy_config(os.path.join(SMALL, "cbbl.py"), [*words(), override])
    for part in ["command line: ", *expected]:
        assert part in one_line(error)


def test_a_key_can_be_added_and_names_can_be_several():
    lazy = load_lazy_config(
        os.path.join(SMALL, "cbbl.py"),
        ["+model.backbone.fuse_type=avg", "dataloader.train.dataset.names=[a, b]"],
    )
    assert lazy.model.backbone.fuse_type == "avg"
    assert list(lazy.dataloader.train.dataset.names) == ["a", "b"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, ["no such config file"]),
        ("model = (\n", ["line 1", "not valid Python"]),
        ("x = 1\nmodel = dict(a=y)\n", ["line 2: NameError", "'y'"]),
        ("from .absent import model\n", ["line 1: ImportError", "absent.py"]),
        ("train = dict()\n", ["does not define model, dataloader", "configs/SmallShapes/cbbl.py"]),
    ],
)
def test_a_file_that_is_no_lazy_config(tmp_path, content, expected):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    before = __builtins__["__import__"]
    with pytest.raises(ConfigError) as error:
        load_lazy_config(str(path))
    for part in [str(path), *expected]:
        assert part in one_line(error)
    assert __builtins__["__import__"] is before


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"dataloader.train.dataset.names": "small_shape_mini_train"},
            [
                "dataloader.train.dataset.names: unknown data set small_shape_mini_train",
                "did you mean small_shapes_mini_train",
                "register_coco_format",
            ],
        ),
        ({"model.roi_heads.num_classes": 80}, ["5 classes", "set model.roi_heads.num_classes=5"]),
        ({"train.amp.enabled": True, "train.device": "cpu"}, ["set train.amp.enabled=False"]),
        ({"dataloader.train.total_batch_size": 0}, ["dataloader.train.total_batch_size = 0"]),
        ({"train.clip_gradients.clip_value": 5}, ["train.clip_gradients.clip_value = 5"]),
        ({"train.ddp.find_unused_parameters": True}, ["train.ddp.find_unused_parameters = True"]),
        (
            {"dataloader.test.dataset.names": "[small_shapes_mini_val, small_shapes_mini_test]"},
            ["dataloader.test.dataset.names = ", "one data set"],
        ),
        ({"optimizer": "null"}, ["does not define optimizer"]),
    ],
)
def test_a_config_that_cannot_be_trained(changes, expected):
    with pytest.raises(ConfigError) as error:
        check_lazy_config(load(**changes))
    for part in expected:
        assert part in one_line(error)


def test_number_of_classes_of_a_dense_detector():
    with pytest.raises(ConfigError, match="set model.num_classes=5"):
        check_lazy_config(load("cbbl_fcos", model__num_classes=80))


@pytest.mark.parametrize(
    "name, key",
    [
        ("cbbl", "model.roi_heads.num_classes"),
        ("cbbl_retinanet", "model.num_classes"),
        ("cbbl_fcos", "model.num_classes"),
    ],
)
def test_zero_classes_become_those_of_the_data(name, key):
    data = {
        "dataloader__train__dataset__names": "small_shapes_mini_train",
        "dataloader__test__dataset__names": "small_shapes_mini_val",
    }
    lazy = load(name, **{key.replace(".", "__"): 0}, **data)
    check_lazy_config(lazy)
    assert OmegaConf.select(lazy, key) == 5
    head = lazy.model.roi_heads.box_predictor if name == "cbbl" else lazy.model.head
    assert head.num_classes == 5  # it refers to the other


def test_evaluation_needs_an_evaluator():
    with pytest.raises(ConfigError, match="does not define dataloader.evaluator"):
        check_lazy_config(load(dataloader__evaluator="null"), eval_only=True)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"model.roi_heads.box_predictor.box2box_transform.grid.alpha": -1.0},
            "model: cannot be built: .*alpha must be a finite number > 0",
        ),
        ({"+model.backbone.deep": 1}, "model: cannot be built: .*'deep'"),
        ({"model._target_": "cbbl_d2.Absent"}, "model: cannot be built: .*Absent"),
        (
            {"dataloader.train._target_": "detectron2.data.build_detection_train_loader"},
            "set dataloader.train._target_=cbbl_d2.data.train_loader.ResumableTrainLoader",
        ),
        ({"train.init_checkpoint": "absent.pth"}, "absent.pth: no such weights.*train.init_check"),
    ],
)
def test_a_part_that_cannot_be_built(tmp_path, changes, expected):
    from cbbl_d2.engine import lazy as module

    lazy = load(train__output_dir=tmp_path, **changes)
    with pytest.raises(UserError, match=expected) as error, module._in_lazy_words():
        LazyTrainer(lazy).resume_or_load(resume=False)
    one_line(error)


def test_by_the_command_line(tmp_path):
    """Log, evaluation and errors as of a YAML config."""
    options = words(train__output_dir="out", train__max_iter=2, train__log_period=1)
    config = ["--config-file", os.path.join(SMALL, "cbbl.py")]
    lines = [
        [*config, *options],
        [*config, "--eval-only", *options, "train.init_checkpoint=out/model_best.pth"],
        [*config, "--eval-only", *options],
    ]
    result = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(lines),
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.path.join(SMALL, "..", ".."),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert line.startswith("error: --eval-only needs weights: add train.init_checkpoint=")
    assert "eta: " in result.stdout and "No GPU found: running on the CPU" in result.stdout
    assert "APvs" in result.stdout
    for folder in ("out", "out/inference"):  # training and evaluation
        assert (tmp_path / folder / "metrics.json").read_text().count("bbox/APvs") == 1
    # The evaluation has left config and log of the training as they were.
    assert "init_checkpoint: ''" in (tmp_path / "out" / "config.yaml").read_text()
    assert "model_best.pth" in (tmp_path / "out" / "inference" / "config.yaml").read_text()
