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


def two_layers(frozen=False):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {name: torch.nn.Linear(3, 2) for name in ("cls_score", "bbox_pred")}
    )
    model["bbox_pred"].requires_grad_(not frozen)
    return model


@pytest.mark.parametrize("layer", ("bbox_pred", "anchor_deltas"))
@pytest.mark.parametrize("model", (small_model(), two_layers(frozen=True)))
def test_a_layer_that_is_not_trained_has_no_other_rate(tiny_cfg, layer, model):
    key = f"SOLVER.{layer.upper()}_LR_FACTOR"
    tiny_cfg.merge_from_list([key, 2.0])
    with pytest.raises(ConfigError, match=f"{key} = 2.0: must be 1 where no layer"):
        build_optimizer(tiny_cfg, model)


@pytest.mark.parametrize("factor", (0.0, -1.0, float("nan")))
def test_a_rate_must_be_above_zero(tiny_cfg, factor):
    tiny_cfg.SOLVER.BBOX_PRED_LR_FACTOR = factor
    with pytest.raises(ConfigError, match="SOLVER.BBOX_PRED_LR_FACTOR = .*: must be a number > 0"):
        build_optimizer(tiny_cfg, two_layers())


@pytest.mark.parametrize("name", ("SGD", "AdamW"))
def test_a_factor_changes_the_rate_alone(tiny_cfg, name):
    """Not weight decay, the bias's own factor, momentum or clipping."""
    solver = tiny_cfg.SOLVER
    solver.OPTIMIZER, solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS = name, 2.0, 0.0
    solver.WEIGHT_DECAY = 0.2
    solver.CLIP_GRADIENTS.ENABLED, solver.CLIP_GRADIENTS.CLIP_VALUE = True, 0.5
    found = []
    for factor in (1.0, 3.0):
        solver.BBOX_PRED_LR_FACTOR = factor
        model = two_layers()
        optimizer = build_optimizer(tiny_cfg, model)
        names = {id(p): name for name, p in model.named_parameters()}
        settings = {
            names[id(p)]: {k: v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
            for p in group["params"]
        }
        found.append(settings)
        for p in model.parameters():
            p.grad = torch.full_like(p, 100.0)
        optimizer.step()
        assert all(p.grad.norm() == pytest.approx(0.5, rel=1e-3) for p in model.parameters())
    plain, scaled = found
    for parameter, settings in scaled.items():
        factor = 3.0 if parameter.startswith("bbox_pred") else 1.0
        assert settings.pop("lr") == pytest.approx(factor * plain[parameter].pop("lr"))
        assert settings == plain[parameter]
    assert plain["bbox_pred.weight"]["weight_decay"] == 0.2


@pytest.mark.parametrize("name", ("SGD", "AdamW"))
def test_a_step_of_the_localization_is_as_many_times_as_long(tiny_cfg, name):
    """Through warm-up and decay, with the same gradients; weight decay, which it scales, is off."""
    solver = tiny_cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY = name, 0.01, 0.0
    solver.LR_SCHEDULER_NAME, solver.MAX_ITER, solver.WARMUP_ITERS = "WarmupCosineLR", 6, 3

    def moved(factor):
        solver.BBOX_PRED_LR_FACTOR = factor
        model = two_layers()
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
