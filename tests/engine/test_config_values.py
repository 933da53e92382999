import glob
import os

import pytest

pytest.importorskip("detectron2")

from cbbl_d2 import add_cbbl_config  # noqa: E402
from cbbl_d2.engine import check_engine_config, load_config  # noqa: E402
from cbbl_d2.engine.trainer import CBBLTrainer  # noqa: E402
from cbbl_d2.errors import ConfigError  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs")
NAN, INF = float("nan"), float("inf")

WRONG = {
    "SOLVER.MAX_ITER": (0, -5),
    "SOLVER.CHECKPOINT_PERIOD": (0, -1),
    "TEST.EVAL_PERIOD": (-1,),
    "SOLVER.BASE_LR": (0.0, -1e-3, NAN, INF),
    "SOLVER.WEIGHT_DECAY": (-1e-4, NAN),
    "SOLVER.MOMENTUM": (-0.1, 1.5),
    "SOLVER.WARMUP_ITERS": (-1,),
    "SOLVER.OPTIMIZER": ("Adam",),
    "SOLVER.LR_SCHEDULER_NAME": ("Cosine",),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("all",),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": (0.0, -1.0, NAN),
    "DATALOADER.NUM_WORKERS": (-1,),
    "DATALOADER.SAMPLER_TRAIN": ("Random",),
    "INPUT.FORMAT": ("HSV", ""),
    "INPUT.MIN_SIZE_TRAIN": ((), (-1,), (1.5,)),
    "INPUT.MAX_SIZE_TRAIN": (0, -1),
    "INPUT.MIN_SIZE_TEST": (-1,),
    "INPUT.MAX_SIZE_TEST": (0,),
    "MODEL.RESNETS.DEPTH": (17,),
    "MODEL.RESNETS.NORM": ("XN",),
    "MODEL.FPN.NORM": ("XN",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("Align",),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": ((0.0, 10.0, 5.0, 5.0), (10.0, 10.0), (-1.0,) * 4),
    "MODEL.RPN.BBOX_REG_WEIGHTS": ((1.0, 1.0, 0.0, 1.0),),
    "MODEL.RPN.LOSS_WEIGHT": (-1.0, NAN),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": (-1.0,),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": (-0.5, INF),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": (-0.1, 1.1),
    "SEED": (10**12,),
}


def config():
    cfg = get_cfg()
    add_cbbl_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("key, value", [(k, v) for k, values in WRONG.items() for v in values])
def test_a_slip_is_one_line(key, value):
    cfg = config()
    *nodes, last = key.split(".")
    node = cfg
    for name in nodes:
        node = node[name]
    node[last] = value
    with pytest.raises(ConfigError) as e:
        check_engine_config(cfg)
    assert str(e.value).startswith(f"{key} = ") and "must be" in str(e.value)
    assert "\n" not in str(e.value)


def test_an_evaluation_does_not_ask_what_training_reads():
    cfg = config()
    cfg.SOLVER.MAX_ITER = 0
    check_engine_config(cfg, eval_only=True)


def test_what_detectron2_and_this_project_have_passes():
    check_engine_config(config())
    paths = glob.glob(os.path.join(CONFIGS, "**", "*.yaml"), recursive=True)
    assert len(paths) > 50
    for path in paths:
        check_engine_config(load_config(path))


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.FPN.IN_FEATURES", "['res2', 'res9']"],
        ["MODEL.ROI_HEADS.IN_FEATURES", "['p9']"],
        ["MODEL.RESNETS.OUT_FEATURES", "['res1']"],
        ["MODEL.PIXEL_MEAN", "[1.0]"],
        ["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7", "MODEL.FPN.OUT_CHANNELS", "-3"],
    ],
)
def test_a_model_that_cannot_be_built(options):
    cfg = load_config(os.path.join(CONFIGS, "SmallShapes", "cbbl.yaml"), options)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ConfigError, match="MODEL: cannot be built from these keys") as e:
        CBBLTrainer.build_model(cfg)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "''"])
def test_a_device_that_is_none(device):
    with pytest.raises(ConfigError, match="MODEL.DEVICE = .* must be a device such as"):
        load_config("", ["MODEL.DEVICE", device])


def test_a_key_without_a_value(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("SOLVER: {MAX_ITER: }\n")
    with pytest.raises(ConfigError, match="x.yaml: SOLVER.MAX_ITER has no value"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="command line: SOLVER.BASE_LR has no value"):
        load_config("", ["SOLVER.BASE_LR", "None"])
