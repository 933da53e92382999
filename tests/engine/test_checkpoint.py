import os
import pickle

import numpy as np
import pytest
import torch
from cbbl_d2.engine import CBBLCheckpointer, load_weights
from cbbl_d2.engine.checkpoint import BestModelCheckpointer
from cbbl_d2.errors import UserError
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model


class Layers(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = torch.nn.Linear(2, 4)
        self.second = torch.nn.Linear(4, width)


class Unsaveable:
    """A checkpointable that fails when the file is half written."""

    def state_dict(self):
        return {"big": torch.zeros(100_000), "broken": lambda: None}

    def load_state_dict(self, state):
        pass


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    model = Layers()
    CBBLCheckpointer(model, str(tmp_path)).save("model_final", iteration=7)
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(AttributeError):  # a lambda cannot be pickled
        CBBLCheckpointer(model, str(tmp_path), other=Unsaveable()).save("model_final")
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


def test_the_best_model_is_not_the_last_checkpoint(tmp_path):
    model = Layers()
    CBBLCheckpointer(model, str(tmp_path)).save("model_0000009")
    BestModelCheckpointer(model, str(tmp_path)).save("model_best")
    assert (tmp_path / "model_best.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"


def test_layers_of_another_shape_start_anew_in_one_line(tmp_path, caplog):
    source = Layers(width=3)
    CBBLCheckpointer(source, str(tmp_path)).save("stock")
    target = Layers(width=5)
    caplog.set_level("INFO")
    CBBLCheckpointer(target).load(str(tmp_path / "stock.pth"))
    lines = [r.getMessage() for r in caplog.records if "randomly initialized" in r.getMessage()]
    assert len(lines) == 1
    assert "stock.pth" in lines[0] and "1 of 2 layers" in lines[0] and "second" in lines[0]
    assert torch.equal(target.first.weight, source.first.weight)
    with pytest.raises(UserError, match="stock.pth: does not fit.*second"):
        load_weights(target, str(tmp_path / "stock.pth"))


def test_weights_of_another_architecture(tmp_path):
    CBBLCheckpointer(torch.nn.Conv2d(1, 1, 1), str(tmp_path)).save("other")
    with pytest.raises(UserError, match="other.pth: weights of another architecture"):
        CBBLCheckpointer(Layers()).load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("content", (b"", b"not a checkpoint", b"PK\x03\x04" + b"\x00" * 50))
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="weights.pth: not a checkpoint"):
        load_weights(Layers(), str(path))


@pytest.mark.parametrize(
    "content", [{"meta": {"epoch": 1}, "state_dict": {}}, [torch.zeros(1)], {"model": [1]}]
)
def test_a_checkpoint_of_another_framework(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match="weights.pth: not a checkpoint of Detectron2"):
        CBBLCheckpointer(Layers()).load(str(path))


def test_an_array_of_text_is_no_weight(tmp_path):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"first.weight": np.array(["a", "b"])}}))
    with pytest.raises(UserError, match="weights.pkl: not a checkpoint of Detectron2"):
        CBBLCheckpointer(Layers()).load(str(path))


def test_missing_statistics_of_a_batch_norm_are_noticed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    weights = model.state_dict()
    del weights["1.running_mean"]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth: does not fit.* 1;"):
        load_weights(model, str(tmp_path / "weights.pth"))


def test_missing_and_empty_path(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth: no such weights file"):
        load_weights(Layers(), str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="MODEL.WEIGHTS"):
        load_weights(Layers(), "")


def test_stock_weights_whose_shape_happens_to_fit_are_not_taken_for_logits(
    tiny_cfg, tmp_path, caplog
):
    """Six classes times four offsets, and four offsets times six grid points."""
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    stock_cfg = tiny_cfg.clone()
    stock_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock_cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = False
    stock = build_model(stock_cfg)
    DetectionCheckpointer(stock, str(tmp_path)).save("stock")
    model = build_model(tiny_cfg)
    before = model.roi_heads.box_predictor.bbox_pred.weight.clone()
    assert before.shape == stock.roi_heads.box_predictor.bbox_pred.weight.shape
    caplog.set_level("INFO")
    CBBLCheckpointer(model).load(str(tmp_path / "stock.pth"))
    assert torch.equal(model.roi_heads.box_predictor.bbox_pred.weight, before)
    (line,) = [r.getMessage() for r in caplog.records if "randomly initialized" in r.getMessage()]
    assert line.endswith(": roi_heads.box_predictor.bbox_pred")
    with pytest.raises(UserError, match="needs weights for roi_heads.box_predictor.bbox_pred"):
        load_weights(model, str(tmp_path / "stock.pth"))


def test_weights_for_another_grid(tiny_cfg, tmp_path, caplog):
    CBBLCheckpointer(build_model(tiny_cfg), str(tmp_path)).save("narrow")
    path = str(tmp_path / "narrow.pth")
    load_weights(build_model(tiny_cfg), path)
    # As well if another checkpointer has written it.
    DetectionCheckpointer(build_model(tiny_cfg), str(tmp_path)).save("by_detectron2")
    load_weights(build_model(tiny_cfg), str(tmp_path / "by_detectron2.pth"))
    tiny_cfg.MODEL.CBBL.ALPHA = 6.0
    wide = build_model(tiny_cfg)
    with pytest.raises(UserError, match=r"trained on the grid \[-5, .* has \[-6, .*MODEL.CBBL"):
        load_weights(wide, path)
    caplog.set_level("INFO")
    before = wide.roi_heads.box_predictor.bbox_pred.weight.clone()
    CBBLCheckpointer(wide).load(path)
    assert wide.roi_heads.box_predictor.bbox_pred.grid[-1] == 6
    assert torch.equal(wide.roi_heads.box_predictor.bbox_pred.weight, before)
    assert "1 of" in caplog.text and "randomly initialized" in caplog.text
