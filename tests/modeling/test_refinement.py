"""The refinement: feature maps moved along the gradient of the uncertainty, in every detector."""

import types

import pytest
import torch
from cbbl_d2.config import check_cbbl_config
from cbbl_d2.distribution import exponential_grid
from cbbl_d2.engine.gradient_stats import GradientStats
from cbbl_d2.errors import ConfigError
from cbbl_d2.modeling import CBBLBox2BoxTransform, LocalizationLoss, Refinement
from cbbl_d2.modeling.refinement import Localized, results_of, unchanged_statistics
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils.events import EventStorage

from .detectors import DETECTORS, batch, build, config, localization_layers, set_score_threshold

every_detector = pytest.mark.parametrize("name", DETECTORS)


def build_refined(name, rho=0.5, gamma=0.1, **options):
    """With distributions that differ: those of an untrained layer are all alike."""
    model = build(
        name, MODEL__CBBL__REFINEMENT__GAMMA=gamma, MODEL__CBBL__REFINEMENT__RHO=rho, **options
    )
    torch.manual_seed(1)
    for layer in localization_layers(name, model):
        torch.nn.init.normal_(layer.weight, std=0.03)
    return model


def train(model, inputs):
    torch.manual_seed(0)  # of the sampling of anchors and regions
    with EventStorage() as storage:
        losses = model(inputs)
    return losses, storage.latest()


def refined(losses):
    return {name: loss for name, loss in losses.items() if "refine" in name}


@pytest.fixture
def passes(monkeypatch):
    """
    For each refinement: feature maps as they were, as they were moved to, and the uncertainty on
    both.
    """
    calls = []
    original = Refinement.__call__

    def record(self, features, localize, module):
        maps, uncertainties = [], []

        def localize_and_record(features):
            parts = localize(features)
            maps.append([x.detach() for x in features])
            uncertainties.append(sum(part.uncertainty() for part in parts).item())
            return parts

        losses = original(self, features, localize_and_record, module)
        assert len(maps) == 2
        for x, before, after in zip(features, *maps):
            assert torch.equal(x, before) and x.shape == after.shape
        calls.append((*maps, *uncertainties))
        return losses

    monkeypatch.setattr(Refinement, "__call__", record)
    return calls


def distances(before, after):
    """Of each level and image, shape (levels, N)."""
    return torch.stack([(b - a).double().flatten(1).norm(dim=1) for a, b in zip(before, after)])


# -- the movement ----------------------------------------------------------------------------------


def brute_force_uncertainty(logits, targets, grid, kind):
    """In plain words, in double precision, for a loop of finite differences."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        for coordinate in range(4):
            values = row[coordinate * len(grid) : (coordinate + 1) * len(grid)]
            p = torch.tensor(values, dtype=torch.float64).exp()
            p = p / p.sum()
            entropy = -(p * p.log()).sum().item()
            if kind == "entropy_gap":
                right = next(i for i, y in enumerate(grid.tolist()) if y > target[coordinate])
                weight = (target[coordinate] - grid[right - 1]) / (grid[right] - grid[right - 1])
                label = -(weight * weight.log() + (1 - weight) * (1 - weight).log()).item()
                entropy = abs(label - entropy)
            total += entropy
    return total


@pytest.mark.parametrize("kind", ("entropy_gap", "entropy", "none"))
def test_each_map_of_each_image_is_moved_by_rho_along_the_gradient_of_the_uncertainty(kind):
    """Against finite differences, number by number."""
    generator = torch.Generator().manual_seed(0)
    grid = exponential_grid(5.0, 1.0, 4)
    transform = CBBLBox2BoxTransform((10.0, 10.0, 5.0, 5.0), grid=grid)
    levels = [torch.randn(2, 1, 2, 3, generator=generator), torch.randn(2, 2, 1, 1)]
    matrices = [torch.randn(4 * len(grid), x[0].numel(), generator=generator) for x in levels]
    features = [x.double().requires_grad_() for x in levels]
    # Boxes of (level, image); none on the second level of the second image.
    boxes = [(0, 0), (0, 1), (1, 0), (0, 1)]
    proposals = torch.tensor([[10.0, 10, 30, 40]]).repeat(4, 1)
    objects = proposals + torch.randn(4, 4, generator=generator)
    loss = LocalizationLoss(uncertainty=kind, uncertainty_weight=0.3, giou_weight=0.5)
    seen = []

    def logits_of(features):
        return torch.stack(
            [matrices[level].double() @ features[level][image].flatten() for level, image in boxes]
        )

    def localize(features):
        seen.append(features)
        return [Localized(loss, transform, logits_of(features), proposals, objects)]

    (total,) = Refinement(gamma=0.2, rho=0.5)(features, localize, torch.nn.Identity())
    moved = [x.detach().clone().requires_grad_() for x in seen[1]]

    targets = transform.get_deltas(proposals, objects)
    step = 1e-4
    for level, x in enumerate(features):
        gradient = torch.zeros_like(x)
        for index in range(x.numel()):
            sides = []
            for sign in (1, -1):
                maps = [m.detach().clone() for m in features]
                maps[level].view(-1)[index] += sign * step
                sides.append(brute_force_uncertainty(logits_of(maps), targets, grid.double(), kind))
            gradient.view(-1)[index] = (sides[0] - sides[1]) / (2 * step)
        for image in range(2):
            expected = gradient[image] / gradient[image].norm().clamp(min=1e-9) * 0.5
            assert (expected.norm() > 0) == ((level, image) in boxes)
            movement = moved[level][image] - x[image]
            assert torch.allclose(movement, expected, atol=1e-5), (level, image)

    # The loss is that of the moved maps, and the movement a constant in it.
    with EventStorage():
        plain = 0.2 * loss(transform, logits_of(moved), proposals, objects).sum()
    assert torch.allclose(total, plain, rtol=1e-6)
    for got, expected in zip(
        torch.autograd.grad(total, features, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(plain, moved, allow_unused=True, materialize_grads=True),
    ):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-9)


@every_detector
def test_the_maps_of_every_detector_are_moved_by_rho_or_not_at_all(name, passes):
    model = build_refined(name)
    for module in model.modules():  # lets images see each other, in the head of "res5"
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    train(model, batch(3, 0, 2))
    assert len(passes) == 1 + (name == "rpn_and_faster")
    for before, after, _, _ in passes:
        moved = distances(before, after)
        assert ((moved - 0.5).abs() < 1e-4).logical_or(moved == 0).all(), moved
        assert (moved.amax(dim=0) > 0).tolist() == [True, False, True]  # images with objects


@every_detector
def test_the_uncertainty_grows(name, passes):
    train(build_refined(name, rho=0.1), batch(3, 2))
    for *_, before, after in passes:
        assert after > before * (1 + 1e-6)


# -- the loss --------------------------------------------------------------------------------------


@every_detector
def test_without_a_movement_it_is_gamma_times_the_localization_loss(name):
    """With its normalization, its weight, and all of its terms, in each part of the detector."""
    losses, _ = train(build_refined(name, rho=1e-9, gamma=0.3), batch(3, 0, 2))
    found = refined(losses)
    assert len(found) == len(DETECTORS[name].new_layers)
    for loss, value in found.items():
        first = loss.replace("box_refine", "box_reg").replace("refine", "loc")
        terms = (first, loss.replace("refine", "uncertainty"), loss.replace("refine", "giou"))
        expected = 0.3 * sum(losses[term].item() for term in terms if term in losses)
        assert expected > 0 and value.item() == pytest.approx(expected, rel=1e-4), loss


@every_detector
def test_all_else_is_as_without_it(name):
    """Losses, what is logged, random numbers, parameters and detections."""
    plain, model = build_refined(name, gamma=0.0), build_refined(name)
    assert not [m for m in plain.modules() if getattr(m, "refinement", None) is not None]
    expected, expected_scalars = train(plain, batch(3, 0, 2))
    expected_random = torch.rand(1)
    losses, scalars = train(model, batch(3, 0, 2))
    assert torch.equal(torch.rand(1), expected_random)
    assert scalars == expected_scalars
    assert set(losses) == {*expected, *refined(losses)} and not refined(expected)
    for loss, value in expected.items():
        assert torch.equal(losses[loss], value), loss
    assert not [m for m in model.modules() if types.FunctionType in map(type, vars(m).values())]

    # The statistics of batch norms are among them.
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in plain.state_dict().items())
    results = []
    for detector in (plain.eval(), model.eval()):
        set_score_threshold(detector, 0.0)
        with torch.no_grad():
            results.append(detector(batch(0))[0]["instances"])
    assert len(results[0]) == len(results[1]) > 10
    assert torch.equal(results[0].pred_boxes.tensor, results[1].pred_boxes.tensor)
    assert torch.equal(results[0].scores, results[1].scores)


@every_detector
@pytest.mark.parametrize("num_objects", ((3, 2), (0, 0)))
def test_every_parameter_gets_a_finite_gradient(name, num_objects):
    model = build_refined(name)
    losses, _ = train(model, batch(*num_objects))
    sum(refined(losses).values()).backward(retain_graph=True)
    for layer in localization_layers(name, model):
        for parameter in layer.parameters():
            assert (parameter.grad.abs().max() > 0) == any(num_objects)
    reaches = [p.grad is not None and p.grad.abs().max() > 0 for p in model.backbone.parameters()]
    assert any(reaches) == any(num_objects)  # the maps stay connected to what computed them
    sum(losses.values()).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and torch.isfinite(value.grad).all(), parameter


@every_detector
def test_a_frozen_backbone_changes_nothing(name):
    expected, _ = train(build_refined(name), batch(3, 0, 2))
    model = build_refined(name)
    model.backbone.requires_grad_(False)
    losses, _ = train(model, batch(3, 0, 2))
    for loss, value in expected.items():
        assert torch.equal(losses[loss], value), loss
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    for layer in localization_layers(name, model):
        assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ("cascade", "rpn_and_faster", "retinanet", "fcos", "res5"))
@pytest.mark.parametrize("num_objects", ((3, 2), (0, 0)))
def test_a_loss_that_nobody_differentiates(name, num_objects):
    """As where a validation loss is computed; and with a model that is frozen as a whole."""
    expected, _ = train(build_refined(name), batch(*num_objects))
    with torch.no_grad():
        losses, _ = train(build_refined(name), batch(*num_objects))
    frozen, _ = train(build_refined(name).requires_grad_(False), batch(*num_objects))
    for loss, value in expected.items():
        assert torch.equal(losses[loss], value) and torch.equal(frozen[loss], value), loss


@every_detector
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_does_not_round_the_movement_away(name, dtype, passes):
    model = build_refined(name)
    halves = []
    forward = model.backbone.forward

    def in_half(images):
        features = {level: x.to(dtype) for level, x in forward(images).items()}
        halves.extend(features.values())
        return features

    model.backbone.forward = in_half  # as on a GPU; on the CPU batch norm gives float32
    with torch.autocast("cpu", dtype=dtype):
        losses, _ = train(model, batch(3, 2))
    assert all(x.dtype == dtype for x in halves)
    for before, after, *_ in passes:
        moved = distances(before, after)
        assert (moved.amax(dim=0) - 0.5).abs().max() < 1e-4
        assert ((moved - 0.5).abs() < 1e-4).logical_or(moved == 0).all()
    for loss, value in refined(losses).items():
        assert value.dtype == torch.float32 and torch.isfinite(value) and value > 0, loss
    sum(losses.values()).backward()
    for layer in localization_layers(name, model):
        assert torch.isfinite(layer.weight.grad).all()


def test_broken_boxes_are_left_out():
    expected, _ = train(build_refined("retinanet"), batch(3, 2))
    model = build_refined("retinanet")
    original = model.box2box_transform.get_deltas

    def get_deltas(sources, targets):
        offsets = original(sources, targets)
        offsets[0] = float("nan")
        return offsets

    model.box2box_transform.get_deltas = get_deltas
    losses, scalars = train(model, batch(3, 2))
    assert scalars["cbbl/nonfinite_targets"][0] == 1
    assert 0 < losses["loss_box_refine"] < expected["loss_box_refine"]


def test_regions_are_the_proposals_where_masks_are_trained_on_predicted_boxes():
    expected, _ = train(build_refined("mask"), batch(3, 2))
    on_predicted = build_refined("mask", MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True)
    losses, _ = train(on_predicted, batch(3, 2))
    assert not torch.equal(losses["loss_mask"], expected["loss_mask"])
    assert torch.equal(losses["loss_box_refine"], expected["loss_box_refine"])


@every_detector
def test_gradient_statistics_are_those_of_the_first_pass(name):
    scalars = []
    for gamma in (0.0, 0.1):
        model, hook = build_refined(name, gamma=gamma), GradientStats(1)
        torch.manual_seed(0)
        with EventStorage() as storage:
            hook.trainer = types.SimpleNamespace(iter=0, storage=storage, model=model)
            hook.before_step()
            sum(model(batch(3, 2)).values()).backward()
            hook.after_step()
        scalars.append({k: v for k, v in storage.latest().items() if k.startswith("gradients/")})
    assert scalars[0] and scalars[0] == scalars[1]


# -- the config ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("faster", "cascade", "retinanet", "fcos", "res5"))
def test_stock_detectors_refuse_it(name):
    cfg = config(name, stock=True)
    check_cbbl_config(cfg)
    cfg.MODEL.CBBL.REFINEMENT.GAMMA = 0.1
    with pytest.raises(ConfigError, match="GAMMA = 0.1: must be 0 for MODEL.META") as error:
        check_cbbl_config(cfg)
    part = cfg.MODEL.META_ARCHITECTURE
    if part == "GeneralizedRCNN":
        part = f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}"
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "heads, proposals, refused",
    [
        ("CBBLROIHeads", "RPN", True),  # an architecture without ROI heads does not read them
        ("StandardROIHeads", "CBBLRPN", False),
    ],
)
def test_what_an_architecture_does_not_build_does_not_count(heads, proposals, refused):
    cfg = config("faster", MODEL__META_ARCHITECTURE="ProposalNetwork")
    cfg.MODEL.CBBL.REFINEMENT.GAMMA = 0.1
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.PROPOSAL_GENERATOR.NAME = heads, proposals
    if refused:
        with pytest.raises(ConfigError, match="nothing in them localizes by C-BBL"):
            check_cbbl_config(cfg)
    else:
        check_cbbl_config(cfg)


def test_results_of_a_method_and_then_the_method_as_it_was():
    module = torch.nn.Linear(2, 3)
    with results_of(module, "extra_repr") as results:
        text = module.extra_repr()
    assert results == [text] and "extra_repr" not in vars(module)
    module.extra_repr = replaced = lambda: "mine"
    with pytest.raises(RuntimeError), results_of(module, "extra_repr"):
        raise RuntimeError
    assert vars(module)["extra_repr"] is replaced


def test_synchronized_norms_of_detectron2_keep_their_statistics(monkeypatch):
    """As if there were two processes, which it does not ask torch about."""
    module = "detectron2.layers.batch_norm"
    monkeypatch.setattr(f"{module}.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.dist.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{module}.differentiable_all_reduce", lambda x: 2 * x)
    norm = NaiveSyncBatchNorm(3)
    x = torch.randn(2, 3, 4, 4)
    with unchanged_statistics(norm):
        inside = norm(x)
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    assert torch.equal(norm(x), inside)
    assert not norm.running_mean.eq(0).any()


@pytest.mark.parametrize(
    "name, options",
    (
        (
            "faster",
            {
                "MODEL__ROI_BOX_HEAD__NUM_CONV": 1,
                "MODEL__ROI_BOX_HEAD__CONV_DIM": 8,
                "MODEL__ROI_BOX_HEAD__NORM": "BN",
            },
        ),
        ("fcos", {"MODEL__FCOS__NORM": "BN"}),
        ("res5", {}),
    ),
)
def test_batch_norms_see_no_moved_feature_map(name, options):
    statistics = []
    for gamma in (0.0, 0.1):
        model = build_refined(name, gamma=gamma, rho=1e3, **options)
        before = {k: x.clone() for k, x in model.named_buffers()}
        losses, _ = train(model, batch(3, 2))
        sum(losses.values()).backward()
        statistics.append({k: x for k, x in model.named_buffers() if not torch.equal(x, before[k])})
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all(norm.track_running_stats and norm.momentum == 0.1 for norm in norms)
    in_head = [key for key in statistics[0] if "head" in key and key.endswith("running_var")]
    assert in_head, statistics[0].keys()
    assert statistics[0].keys() == statistics[1].keys()
    assert all(torch.equal(x, statistics[1][key]) for key, x in statistics[0].items())
