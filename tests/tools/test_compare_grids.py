import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402


@pytest.fixture
def tool(load_script):
    return load_script("tools/compare_grids.py")


@pytest.fixture
def run(tool, tiny_cfg, tmp_path, capsys):
    """``run(arguments)``: what the tool prints, with an untrained detector."""

    def run(*args, **keys):
        cfg = tiny_cfg.clone()
        cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1.0, 1000  # some will match
        cfg.merge_from_list([x for pair in keys.items() for x in pair])
        torch.manual_seed(0)
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
        (tmp_path / "config.yaml").write_text(cfg.dump())
        short = ["--steps", "2", "--seeds", "2", "--max-images", "12"]
        tool.main(["--weights", str(tmp_path / "model.pth"), *short, *args])
        return capsys.readouterr().out

    return run


def rows(text, header):
    """First cell -> the others, of the table whose first column is called so."""
    lines = [x.strip("|").split("|") for x in text.splitlines() if x.startswith("|")]
    names = [x[0].strip() for x in lines]
    start = names.index(header)
    table = [[cell.strip() for cell in x] for x in lines[start:]]
    return {x[0]: x[1:] for x in table if len(x) == len(table[0])}


def test_grids_and_smooth_l1_are_compared(run):
    text = run("--grids", "5,5,1", "16,2.5,0")
    offsets = rows(text, "length of the offset")
    assert {"dx", "dy", "dw", "dh"} < set(offsets)
    for name in ("dx", "dy", "dw", "dh"):
        lengths = [float(x) for x in offsets[name]]
        assert lengths == sorted(lengths) and lengths[-1] < 5.01
    table = rows(text, "n, alpha, beta")
    assert {"Smooth-L1", "5,5,1", "16,2.5,0"} < set(table)
    assert table["n, alpha, beta"][:2] == ["IoU", "IoU >= 0.75"]
    mean, spread = table["5,5,1"][0].split(" ± ")
    assert 50 < float(mean) < 100 and float(spread) > 0  # two seeds are not the same
    counts = [int(x) for x in table["proposals"]]
    assert counts[0] == counts[1] == sum(counts[2:])


def test_the_keys_of_the_config_reach_the_branches(tool, run, monkeypatch):
    made, trained = [], []

    class Spy(tool.LocalizationBranch):
        def __init__(self, box_head, *args):
            made.append(args)
            super().__init__(box_head, *args)

    monkeypatch.setattr(tool, "LocalizationBranch", Spy)
    monkeypatch.setattr(tool, "train_branch", lambda *args: trained.append(args))
    keys = {"UNCERTAINTY": "none", "LABEL": "one_hot", "INIT_STD": 0.3, "GIOU_WEIGHT": 2.0}
    head = {"SMOOTH_L1_BETA": 0.5, "BBOX_REG_WEIGHTS": (5.0, 5.0, 2.5, 2.5)}
    keys = {f"MODEL.CBBL.{k}": v for k, v in keys.items()}
    text = run(
        "--grids", "4,3,0", **keys, **{f"MODEL.ROI_BOX_HEAD.{k}": v for k, v in head.items()}
    )
    loss = tool.build_localization_loss(tool.load_inference_config("model.pth"))
    assert (loss.label, loss.giou_weight) == ("one_hot", 2.0)
    for seed, (weights, grid, *others) in enumerate(made):
        assert tuple(weights) == (5.0, 5.0, 2.5, 2.5) and others == [loss, 0.3, 0.5]
        assert grid is None if seed < 2 else grid.tolist() == [-3, -1.5, 0, 1.5, 3]
    assert [(steps, seed) for *_, steps, seed in trained] == [(2, 1), (2, 2)] * 2
    # Nobody has learned anything: all have the boxes of the proposals, but for the last layer's
    # random start.
    table = rows(text, "n, alpha, beta")
    means = [float(table[name][0].split()[0]) for name in ("Smooth-L1", "4,3,0")]
    assert abs(means[0] - means[1]) < 1


def test_a_stock_detector_and_the_grid_of_the_config(run):
    grid = {"MODEL.CBBL.NUM_INTERVALS": 7, "MODEL.CBBL.ALPHA": 4.0, "MODEL.CBBL.BETA": 0.5}
    assert "\n| 7,4,0.5 |" in run(**{"MODEL.ROI_HEADS.NAME": "StandardROIHeads", **grid})


@pytest.mark.parametrize("grid", ["5,5", "5;5;1", "a,5,1", "1,5,1", "5,-1,1", "5,5,nan"])
def test_an_impossible_grid(error, grid):
    assert f"--grids {grid}: must be N,ALPHA,BETA such as 5,5,1" in error("--grids", grid)


@pytest.mark.parametrize("option", ["--train", "--dataset"])
def test_an_unknown_data_set(error, option):
    assert option in error(option, "no_such_set")


def test_the_data_set_of_the_training(error):
    said = error("--dataset", "small_shapes_mini_train")
    assert "small_shapes_mini_train" in said and "--dataset" in said


def test_a_data_set_without_annotations(error, new_name):
    name = new_name()
    record = {"file_name": "x.png", "height": 60, "width": 100, "image_id": 1}
    DatasetCatalog.register(name, lambda: [record])
    said = error("--train", name)
    assert f"{name}: has no annotated object" in said and "--train" in said


def test_keys_that_a_stock_detector_does_not_read_are_checked(error):
    said = error(**{"MODEL.ROI_HEADS.NAME": "StandardROIHeads", "MODEL.CBBL.LABEL": "soft"})
    assert "MODEL.CBBL.LABEL" in said


def test_another_kind_of_detector(error):
    said = error(**{"MODEL.ROI_HEADS.NAME": "CBBLCascadeROIHeads"})
    assert "CBBLCascadeROIHeads" in said and "with FPN" in said
