import shutil

import pytest

pytest.importorskip("detectron2")

from cbbl_d2.errors import UserError  # noqa: E402
from cbbl_d2.inference import find_config, load_inference_config  # noqa: E402


def test_the_stored_config_is_enough(checkpoint):
    cfg = load_inference_config(checkpoint)
    assert cfg.MODEL.WEIGHTS == checkpoint
    assert cfg.MODEL.FPN.OUT_CHANNELS == 8  # of the tiny model, no default
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.05


def test_overrides_and_the_threshold_come_on_top(checkpoint):
    opts = ["INPUT.MIN_SIZE_TEST", "99"]
    cfg = load_inference_config(checkpoint, None, opts, 0.25)
    assert cfg.INPUT.MIN_SIZE_TEST == 99
    for node in ("ROI_HEADS", "RETINANET", "FCOS"):
        assert cfg.MODEL[node].SCORE_THRESH_TEST == 0.25


def test_another_config_can_be_given(checkpoint, repository):
    path = f"{repository}/configs/SmallShapes/cbbl.yaml"
    assert load_inference_config(checkpoint, path).MODEL.FPN.OUT_CHANNELS != 8


def test_no_config_beside_the_checkpoint(checkpoint, tmp_path):
    alone = shutil.copy(checkpoint, tmp_path)
    with pytest.raises(UserError, match="--config-file"):
        find_config(alone)
    with pytest.raises(UserError, match="--config-file"):
        find_config("https://example.org/model.pth")


def test_a_lazy_config_is_named_as_such(checkpoint, tmp_path):
    alone = shutil.copy(checkpoint, tmp_path)
    lazy = "model:\n  _target_: a.B\n  x: !!python/tuple [1, 2]\ntrain: {max_iter: 3}\n"
    (tmp_path / "config.yaml").write_text(lazy)
    with pytest.raises(UserError, match="Lazy"):
        find_config(alone)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such weights"):
        load_inference_config(str(tmp_path / "model.pth"))
