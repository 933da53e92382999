import pytest
import torch
from cbbl_d2.engine.optimizer import build_optimizer
from cbbl_d2.errors import ConfigError


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
