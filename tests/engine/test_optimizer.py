import pytest
import torch
from cbbl_d2.engine.optimizer import build_optimizer
from cbbl_d2.errors import ConfigError
from detectron2.solver import build_lr_scheduler


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


@pytest.mark.parametrize("name, kind", [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_config_reaches_the_optimizer(tiny_cfg, name, kind):
    solver = tiny_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR = name, 0.03
    solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM = 0.2, 0.05
    model = small_model()
    optimizer = build_optimizer(tiny_cfg, model)
    assert isinstance(optimizer, kind)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert all(group["lr"] == 0.03 for group in optimizer.param_groups)
    assert [decay[id(p)] for p in model.parameters()] == [0.2, 0.2, 0.05, 0.05]


@pytest.mark.parametrize("name", ("SGD", "AdamW"))
def test_gradients_are_clipped(tiny_cfg, name):
    tiny_cfg.SOLVER.OPTIMIZER = name
    tiny_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = small_model()
    optimizer = build_optimizer(tiny_cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    for p in model.parameters():
        assert p.grad.norm() == pytest.approx(0.5, rel=1e-3)


def test_unknown_optimizer(tiny_cfg):
    tiny_cfg.SOLVER.OPTIMIZER = "Adam"
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER = 'Adam': must be SGD or AdamW"):
        build_optimizer(tiny_cfg, small_model())


@pytest.mark.parametrize("layer", ("bbox_pred", "anchor_deltas"))
def test_a_model_without_the_layer_has_no_other_rate_for_it(tiny_cfg, layer):
    key = f"SOLVER.{layer.upper()}_LR_FACTOR"
    tiny_cfg.merge_from_list([key, 2.0])
    with pytest.raises(ConfigError, match=f"{key} = 2.0: must be 1 for a model without a layer"):
        build_optimizer(tiny_cfg, small_model())


@pytest.mark.parametrize("name", ("SGD", "AdamW"))
def test_a_step_of_the_localization_is_as_many_times_as_long(tiny_cfg, name):
    """Through warm-up and decay, with the same gradients; weight decay, which it scales, is off."""
    solver = tiny_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = name, 0.01, 0.0
    solver.LR_SCHEDULER_NAME, solver.MAX_ITER, solver.WARMUP_ITERS = "WarmupCosineLR", 6, 3

    def moved(factor):
        solver.BBOX_PRED_LR_FACTOR = factor
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {name: torch.nn.Linear(3, 2) for name in ("cls_score", "bbox_pred")}
        )
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(tiny_cfg, model)
        scheduler = build_lr_scheduler(tiny_cfg, optimizer)
        for k in range(solver.MAX_ITER):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 + k)
            optimizer.step()
            scheduler.step()
        return [p.detach() - old for p, old in zip(model.parameters(), start)]

    for k, (a, b) in enumerate(zip(moved(1.0), moved(3.0))):
        assert a.abs().min() > 0.01
        torch.testing.assert_close(b, a * (1.0 if k < 2 else 3.0))
