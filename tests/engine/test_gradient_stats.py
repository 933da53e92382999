"""What the training hook measures, and that training does not notice it."""

import json
import math
import types

import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.engine import CBBLTrainer
from cbbl_d2.engine.gradient_stats import SIZES, GradientStats, feature_gradients
from cbbl_d2.errors import ConfigError
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from tests.modeling.detectors import DETECTORS, batch, build, localization_layers

EVERY = [(name, stock) for name in DETECTORS for stock in (False, True)]


def build_trained(name, stock=False, **options):
    """With predictions that are wrong in many ways: of an untrained layer they are all alike."""
    model = build(name, stock, **options)
    torch.manual_seed(1)
    for layer in localization_layers(name, model):
        nn.init.normal_(layer.weight, std=0.03)
    return model


def step(model, inputs, hook=None, scale=None):
    """
    One training step without the optimizer's.

    Returns:
        losses, gradients of all parameters, latest scalars.
    """
    model.zero_grad()
    torch.manual_seed(0)  # of the sampling of anchors and regions
    with EventStorage() as storage:
        scaler = scale and types.SimpleNamespace(get_scale=lambda: scale)
        if hook is not None:
            hook.trainer = types.SimpleNamespace(
                iter=0,
                storage=storage,
                model=model,
                _trainer=types.SimpleNamespace(grad_scaler=scaler),
            )
            hook.before_step()
        losses = model(inputs)
        (sum(losses.values()) * (scale or 1.0)).backward()
        if hook is not None:
            hook.after_step()
        scalars = {k: v for k, (v, _) in storage.latest().items() if k.startswith("gradients/")}
    return losses, [p.grad for p in model.parameters()], scalars


@pytest.fixture
def logged(monkeypatch):
    """Prefix -> what was measured of every region."""
    values = {}
    original = GradientStats._log

    def log(self, prefix, gradients):
        values[prefix] = gradients
        original(self, prefix, gradients)

    monkeypatch.setattr(GradientStats, "_log", log)
    return values


def separate_input(layer):
    """
    From now on ``layer`` has an input of its own, so that the gradient of this input is what comes
    through this layer alone. Returns the list that the inputs are put into.
    """
    inputs = []

    def separate(module, args):
        inputs.append(args[0].clone())
        inputs[-1].retain_grad()
        return (inputs[-1],)

    layer.register_forward_pre_hook(separate)
    return inputs


@pytest.mark.parametrize("stock", (False, True))
@pytest.mark.parametrize("name", ("faster", "faster_class_specific", "cascade", "res5"))
def test_of_a_region_it_is_the_gradient_that_its_features_get(name, stock, logged):
    model = build_trained(name, stock)
    predictors = model.roi_heads.box_predictor
    heads = {"box": predictors}
    if name == "cascade":
        heads = {f"box_stage{k}": x for k, x in enumerate(predictors)}
    inputs = {head: separate_input(predictor.bbox_pred) for head, predictor in heads.items()}
    _, _, scalars = step(model, batch(3, 0, 2), GradientStats(1))
    for head, (features,) in inputs.items():
        vectors = features.grad[features.grad.norm(dim=1) > 0]
        expected = vectors.norm(dim=1)
        norms, ranges, _ = logged[f"gradients/{head}"]
        assert len(norms) >= 5
        # Smooth-L1's depend on nothing but the signs of the four errors.
        assert stock or norms.std() > 5e-3 * norms.mean()
        assert torch.allclose(norms, expected, rtol=1e-4), head
        for i, size in enumerate(SIZES):
            group, prefix = vectors[ranges == i], f"gradients/{head}/{size}"
            assert scalars[f"{prefix}/count"] == len(group)
            if len(group) > 1:
                lengths = group.norm(dim=1)
                variance, total = lengths.var(), group.var(dim=0).sum()
                square = (lengths**2).mean()
                expected = {
                    "variance": variance / square,
                    "relative_variance": variance / lengths.mean() ** 2,
                    "total_variance": total / square,
                    "relative_total_variance": total / square,
                }
                found = {x: scalars[f"{prefix}/{x}"] for x in ("mean", *expected)}
                assert found.pop("mean") == pytest.approx(lengths.mean().item(), rel=1e-4)
                found["variance"] /= square.item()
                found["total_variance"] /= square.item()
                # Differences of rounded numbers
                assert found == pytest.approx(
                    {k: v.item() for k, v in expected.items()}, rel=1e-3, abs=1e-5
                )


@pytest.mark.parametrize("stock", (False, True))
def test_of_an_anchor_it_is_the_gradient_that_its_place_gets(stock, logged):
    model = build_trained("rpn", stock)
    inputs = separate_input(model.proposal_generator.rpn_head.anchor_deltas)
    # Small enough for one anchor a place to be foreground.
    step(model, batch(2, 1), GradientStats(1))
    expected = torch.cat([x.grad.norm(dim=1).flatten() for x in inputs])
    expected = expected[expected > 0]
    norms = logged["gradients/rpn"].norms
    assert len(norms) >= 3
    found = sum(bool(torch.isclose(norms, e, rtol=1e-3).any()) for e in expected)
    # At a place with two anchors their gradients add up, in each other's way or not.
    assert found >= 0.6 * len(expected)
    if len(norms) == len(expected):
        assert found == len(expected)


@pytest.mark.parametrize("kernel_size, num_groups", ((1, 3), (3, 1), (3, 3)))
def test_of_a_convolution_it_is_the_gradient_under_the_kernel(kernel_size, num_groups):
    torch.manual_seed(0)
    width = 8
    layer = nn.Conv2d(5, num_groups * width, kernel_size, padding=1)
    features = torch.randn(1, 5, 7, 7, requires_grad=True)
    output = layer(features)
    for group in range(num_groups):
        gradient = torch.randn(width)
        at_output = torch.zeros_like(output)
        at_output[0, group * width : (group + 1) * width, 3, 4] = gradient
        (expected,) = torch.autograd.grad(output, features, at_output, retain_graph=True)
        # Anchors are counted place by place: those of the first place, then of the second, ...
        index = torch.tensor([group, group + 5 * num_groups])
        norms, ranges, sums = feature_gradients(
            gradient.repeat(2, 1), layer.weight.detach(), index, torch.tensor([8.0, 20.0])
        )
        assert norms.tolist() == pytest.approx([expected.norm().item()] * 2, rel=1e-5)
        assert ranges.tolist() == [0, 1]
        assert torch.allclose(sums[0].norm(), expected.norm(), rtol=1e-5)
        assert torch.equal(sums[0], sums[1]) and not sums[2:].any()


def test_statistics_of_values_known_beforehand():
    # Outputs of which the first is the only feature, and the second another one
    weight = torch.eye(2)
    gradients = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    sizes = torch.tensor([8.0, 15.9, 16.0, 96.0])
    hook = GradientStats(1)
    with EventStorage() as storage:
        hook.trainer = types.SimpleNamespace(storage=storage)
        hook._log("gradients/box", feature_gradients(gradients, weight, sizes.long() * 0, sizes))
        scalars = {k: v for k, (v, _) in storage.latest().items()}
    assert scalars == pytest.approx(
        {
            "gradients/box/0-16px/count": 2,
            "gradients/box/0-16px/mean": 2.0,
            "gradients/box/0-16px/variance": 2.0,
            "gradients/box/0-16px/relative_variance": 0.5,
            "gradients/box/0-16px/total_variance": 8.0,  # around (-1, 0)
            "gradients/box/0-16px/relative_total_variance": 1.6,
            "gradients/box/16-32px/count": 1,
            "gradients/box/16-32px/mean": 2.0,
            "gradients/box/32-96px/count": 0,
            "gradients/box/over-96px/count": 1,
            "gradients/box/over-96px/mean": 5.0,
        }
    )


@pytest.mark.parametrize("broken", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_is_left_out(broken):
    """As under mixed precision, whose scale may be too large for a step."""
    model = build("faster")

    def break_one(grad):
        grad = grad.clone()
        grad[grad.abs().sum(dim=1).argmax(), 0] = broken
        return grad

    # Tensor hooks run in the order of registration: this one before the one that measures.
    original = model.roi_heads.box_predictor.forward

    def forward(x):
        scores, deltas = original(x)
        deltas.register_hook(break_one)
        return scores, deltas

    _, _, whole = step(build("faster"), batch(3, 2), GradientStats(1))
    model.roi_heads.box_predictor.forward = forward
    _, _, scalars = step(model, batch(3, 2), GradientStats(1))
    names = [f"gradients/box/{size}/count" for size in SIZES]
    assert sum(scalars[x] for x in names) == sum(whole[x] for x in names) - 1
    assert all(math.isfinite(x) for x in scalars.values())


@pytest.mark.parametrize("name, stock", EVERY)
def test_every_detector_is_measured_and_trains_as_without(name, stock):
    inputs, hook = batch(3, 0, 2), GradientStats(1)
    # torch optimizes Detectron2's focal loss, a scripted function, from run to run.
    with torch.jit.optimized_execution(False):
        losses, gradients, _ = step(build_trained(name, stock), inputs)
        model = build_trained(name, stock)
        measured_losses, measured_gradients, scalars = step(model, inputs, hook)

    assert {k: v.item() for k, v in losses.items()} == {
        k: v.item() for k, v in measured_losses.items()
    }
    for a, b in zip(gradients, measured_gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not any("losses" in vars(module) for module in model.modules())
    assert not hook._measured

    if name.startswith("cascade"):
        heads = {"rpn", "box_stage0", "box_stage1", "box_stage2"}
    else:
        heads = {"box"} if name in ("retinanet", "fcos") else {"rpn", "box"}
    assert {x.split("/")[1] for x in scalars} == heads
    for head in heads:
        # The objects are of 10 to 25 px. Later stages may lose some.
        counts = [scalars[f"gradients/{head}/{x}/count"] for x in ("0-16px", "16-32px")]
        assert sum(counts) >= (1 if "stage" in head else 3)
        for size in ("32-96px", "over-96px"):
            assert scalars[f"gradients/{head}/{size}/count"] == 0
            assert f"gradients/{head}/{size}/mean" not in scalars
        for size, count in zip(("0-16px", "16-32px"), counts):
            if count > 1:
                mean = scalars[f"gradients/{head}/{size}/mean"]
                variance = scalars[f"gradients/{head}/{size}/variance"]
                assert mean > 0 and variance >= 0
                assert scalars[f"gradients/{head}/{size}/relative_variance"] == pytest.approx(
                    variance / mean**2
                )


@pytest.mark.parametrize("name", ("faster", "rpn_and_faster", "retinanet", "fcos"))
@pytest.mark.parametrize("stock", (False, True))
def test_nothing_to_measure(name, stock):
    _, _, scalars = step(build(name, stock), batch(0, 0), GradientStats(1))
    assert not [k for k, v in scalars.items() if v > 0]


def test_the_scale_of_mixed_precision_is_taken_out_and_the_weight_of_the_loss_is_not():
    inputs = batch(3, 2)
    _, _, plain = step(build_trained("faster"), inputs, GradientStats(1))
    _, _, scaled = step(build_trained("faster"), inputs, GradientStats(1), scale=1024.0)
    assert scaled == pytest.approx(plain, rel=1e-3)
    weighted = build_trained(
        "faster", MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_WEIGHT=1.5
    )  # 3 times as much
    _, _, weighted = step(weighted, inputs, GradientStats(1))
    for key, value in plain.items():
        power = {"mean": 3, "variance": 9, "total_variance": 9}.get(key.rpartition("/")[2], 1)
        if not key.startswith("gradients/box/"):
            power = 1
        assert weighted[key] == pytest.approx(power * value, rel=1e-3), key


def test_it_measures_in_its_period_alone():
    model, hook = build("faster"), GradientStats(3)
    for i, wrapped in enumerate((False, False, True, False, False, True)):
        with EventStorage() as storage:
            hook.trainer = types.SimpleNamespace(iter=i, storage=storage, model=model)
            hook.before_step()
            assert ("losses" in vars(model.roi_heads.box_predictor)) == wrapped
            hook.after_step()
            assert not any("losses" in vars(module) for module in model.modules())


def train(cfg, *more_hooks):
    trainer = CBBLTrainer(cfg)
    trainer.register_hooks(more_hooks)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_in_a_training_run(tiny_cfg, tmp_path):
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.MAX_ITER = 20
    assert not any(isinstance(h, GradientStats) for h in CBBLTrainer(tiny_cfg)._hooks)  # default
    tiny_cfg.SOLVER.GRADIENT_STATS_PERIOD = 20
    train(tiny_cfg)
    (line,) = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    values = json.loads(line)
    assert values["iteration"] == 19
    for head in ("rpn", "box"):
        for statistic in ("count", "mean", "variance", "relative_variance"):
            assert values[f"gradients/{head}/0-16px/{statistic}"] > 0


class Boom(Exception):
    pass


class Fail(HookBase):
    """An error between forward and the end of the step."""

    def before_step(self):
        def fail(gradient):
            raise Boom

        self.trainer.model.roi_heads.box_predictor.bbox_pred.weight.register_hook(fail)


def test_a_step_that_raises_leaves_nothing_behind(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.GRADIENT_STATS_PERIOD = 1
    trainer = CBBLTrainer(tiny_cfg)
    trainer.register_hooks([Fail()])
    with pytest.raises(Boom):
        trainer.train()
    (hook,) = [h for h in trainer._hooks if isinstance(h, GradientStats)]
    assert not hook._measured
    assert not any("losses" in vars(module) for module in trainer.model.modules())


@pytest.mark.parametrize("value", (-1, 0.5, True))
def test_an_impossible_period_is_named(tiny_cfg, value):
    tiny_cfg.SOLVER.GRADIENT_STATS_PERIOD = value
    with pytest.raises(
        ConfigError, match=r"^SOLVER.GRADIENT_STATS_PERIOD = .*: must be an integer"
    ):
        check_cbbl_config(tiny_cfg)
