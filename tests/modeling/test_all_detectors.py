"""The laws that every detector with C-BBL obeys."""

import collections
import copy

import pytest
import torch
from cbbl_d2.distribution import two_hot
from cbbl_d2.engine import CBBLCheckpointer
from cbbl_d2.engine.optimizer import build_optimizer
from cbbl_d2.errors import ConfigError
from cbbl_d2.modeling import LocalizationLoss, keep_distributions
from cbbl_d2.modeling.uncertainty import std_in_pixels
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .detectors import (
    DETECTORS,
    batch,
    build,
    config,
    image,
    localization_layers,
    set_score_threshold,
)

pytestmark = pytest.mark.parametrize("name", DETECTORS)

LOCALISATION = ("box_reg", "rpn_loc", "fcos_loc", "uncertainty", "giou")


def train(model, inputs, seed=0):
    """Losses and the scalars of the event storage."""
    torch.manual_seed(seed)  # of the sampling of anchors and regions
    with EventStorage() as storage:
        losses = model(inputs)
    return losses, storage.latest()


@pytest.mark.parametrize("num_objects", ((3, 2), (0, 0), (3, 0)))
def test_training_step(name, num_objects):
    model = build(name)
    losses, scalars = train(model, batch(*num_objects))
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is None or torch.isfinite(value.grad).all(), parameter
    for layer in localization_layers(name, model):
        for parameter in layer.parameters():
            assert (parameter.grad.abs().max() > 0) == any(num_objects)
    for prefix in DETECTORS[name].prefixes:
        for scalar in ("clipped_fraction", "entropy_gap", "offset_l1"):
            assert (f"{prefix}/{scalar}" in scalars) == any(num_objects)


@pytest.mark.parametrize("optimizer", ("SGD", "AdamW"))
@pytest.mark.parametrize("stock", (False, True))
def test_learning_rates_of_the_localization(name, stock, optimizer):
    """Of all layers that predict boxes, stock ones beside C-BBL's among them."""
    model = build(name, stock)
    factors = {"bbox_pred": 4.0, "anchor_deltas": 6.0}
    options = {f"SOLVER__{x.upper()}_LR_FACTOR": f for x, f in factors.items()}
    if name in ("retinanet", "fcos"):
        with pytest.raises(ConfigError, match="ANCHOR_DELTAS_LR_FACTOR = 6.0: must be 1 where"):
            build_optimizer(config(name, stock, **options), model)
        options["SOLVER__ANCHOR_DELTAS_LR_FACTOR"] = 1.0
    cfg = config(name, stock, SOLVER__BASE_LR=0.5, SOLVER__OPTIMIZER=optimizer, **options)
    groups = build_optimizer(cfg, model).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    layers = {layer for detector in DETECTORS.values() for layer in detector.new_layers}
    scaled = set()
    for parameter, value in model.named_parameters():
        if value.requires_grad:
            layer = parameter.rpartition(".")[0]
            factor = factors[layer.rpartition(".")[2]] if layer in layers else 1.0
            assert rates[id(value)] == 0.5 * factor, parameter
            scaled |= {layer} & layers
    assert scaled >= set(DETECTORS[name].new_layers)


class NoDoubles(TorchDispatchMode):
    """As on Apple's GPUs, which have no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
        return results


def test_no_float64(name):
    with pytest.raises(AssertionError), NoDoubles():
        torch.zeros(1, dtype=torch.float64)
    model, inputs = build(name), batch(3, 0)
    set_score_threshold(model, 0.0)
    with NoDoubles():
        losses, _ = train(model, inputs)
        sum(losses.values()).backward()
        with torch.no_grad():
            (found, _) = model.eval()([{"image": x["image"]} for x in inputs])
    assert len(found["instances"]) > 0


def test_names_of_the_losses(name):
    model = build(name)
    stock, _ = train(build(name, stock=True), batch(2))
    for uncertainty, giou_weight in (("none", 0.0), ("entropy", 0.0), ("entropy_gap", 1.0)):
        for module in model.modules():
            if hasattr(module, "localization_loss"):
                module.localization_loss = LocalizationLoss(
                    uncertainty=uncertainty, giou_weight=giou_weight
                )
        losses, _ = train(model, batch(2))
        more = [x for x in losses if x not in stock]
        assert set(losses) == {*stock, *more}
        num_layers = len(DETECTORS[name].new_layers)
        expected = {
            "uncertainty": num_layers * (uncertainty != "none"),
            "giou": num_layers * (giou_weight > 0),
        }
        for term, number in expected.items():
            assert sum(term in x for x in more) == number
        assert len(more) == sum(expected.values())


def test_stock_weights_load_and_the_other_losses_are_the_stock_ones(name, tmp_path, caplog):
    stock, model = build(name, stock=True), build(name)
    torch.manual_seed(1)
    for parameter in stock.parameters():  # initialized alike otherwise
        parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    CBBLCheckpointer(stock, str(tmp_path)).save("stock")
    caplog.set_level("INFO")
    CBBLCheckpointer(model).load(str(tmp_path / "stock.pth"))

    new_layers = DETECTORS[name].new_layers
    (line,) = [r.getMessage() for r in caplog.records if "randomly initialized" in r.getMessage()]
    assert sorted(line.rpartition(": ")[2].split(", ")) == sorted(new_layers)
    for key, value in model.state_dict().items():
        is_new = key.rpartition(".")[0] in new_layers
        assert torch.equal(value, before[key] if is_new else stock.state_dict()[key]), key

    expected, _ = train(stock, batch(3, 0))
    losses, _ = train(model, batch(3, 0))
    for loss in DETECTORS[name].same_losses:
        assert torch.equal(losses[loss], expected[loss]), loss


@pytest.mark.parametrize("init_std", (0.0, 0.7))
def test_an_untrained_layer_decodes_to_its_source_boxes(name, init_std, decoded):
    keys = ("", "RPN__", "RETINANET__")
    model = build(name, **{f"MODEL__CBBL__{key}INIT_STD": init_std for key in keys}).eval()
    for layer in localization_layers(name, model):
        torch.nn.init.zeros_(layer.weight)
    set_score_threshold(model, 0.0)
    with torch.no_grad():
        model(batch(0, 0))
    assert sum(len(boxes) for boxes, _ in decoded) >= 60
    for source, boxes in decoded:
        boxes = boxes.view(len(source), -1, 4)
        source = source[:, None].expand_as(boxes)
        if name == "fcos":  # distances are positive: a box around the point
            point, stride = source.unflatten(-1, (2, 2)).mean(-2), source[..., 2:] - source[..., :2]
            assert (boxes[..., :2] < point).all() and (point < boxes[..., 2:]).all()
            size = (boxes[..., 2:] - boxes[..., :2]) / stride
            alpha = model.box2box_transform.grid[-1]
            assert (size > 1).all() and (size < 2 * alpha).all()
        else:
            assert torch.allclose(boxes, source, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pixels", ("zeros", "noise"))
def test_inference(name, pixels):
    model = build(name).eval()
    inputs = batch(0, 0)
    if pixels == "zeros":
        for x in inputs:
            x["image"].zero_()
    set_score_threshold(model, 0.0)
    with torch.no_grad():
        results = model(inputs)
    for x, result in zip(inputs, results):
        instances = result["instances"]
        assert len(instances) > 10
        boxes = instances.pred_boxes.tensor
        _, height, width = x["image"].shape
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert instances.has("pred_masks") == (name == "mask")
        assert instances.has("pred_keypoints") == (name == "keypoint")
        assert instances.has("pred_boxes_std") == (name != "rpn")  # its boxes are Smooth-L1's
        if name != "rpn":
            assert instances.pred_boxes_std.shape == (len(instances), 4)
            assert torch.isfinite(instances.pred_boxes_std).all()
            assert (instances.pred_boxes_std > 0).all()

    set_score_threshold(model, 1.0)
    with torch.no_grad():
        results = model(inputs)
    assert [len(x["instances"]) for x in results] == [0, 0]


def test_the_deviation_is_that_of_the_distributions_of_the_same_box(name, monkeypatch):
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    model = build(name).eval()
    torch.manual_seed(0)
    for layer in localization_layers(name, model):  # offsets that leave the image
        torch.nn.init.normal_(layer.weight, std=0.1)
    decoded = []

    for transform in {type(layer.box2box_transform) for layer in _decoders(model)}:

        def record(self, logits, boxes, original=transform.apply_deltas):
            decoded.append((self, logits, boxes, original(self, logits, boxes)))
            return decoded[-1][-1]

        monkeypatch.setattr(transform, "apply_deltas", record)
    set_score_threshold(model, 0.0)
    x = image(0, 96, 80)
    # At the size of the network's input, so that no box is scaled.
    with torch.no_grad():
        (result,) = model([x])
    monkeypatch.undo()
    # Box in the image -> for each that became it: was it clipped, and the deviations of its sides.
    sources = collections.defaultdict(list)
    for transform, logits, boxes, found in decoded:
        if found.shape[1] == 4:
            clipped = Boxes(found.clone())
            clipped.clip((96, 80))
            changed = (clipped.tensor != found).any(dim=1).tolist()
            deviations = transform.side_deviations(logits, boxes)
            for box, source in zip(clipped.tensor.tolist(), zip(changed, deviations)):
                sources[tuple(box)].append(source)
    compared = {False: 0, True: 0}
    instances = result["instances"]
    for box, std in zip(instances.pred_boxes.tensor.tolist(), instances.pred_boxes_std):
        size = torch.tensor([box[2] - box[0], box[3] - box[1]]).repeat(2)
        candidates = sources[tuple(box)]
        if candidates:
            matching = [c for c, x in candidates if torch.allclose(std, x / size, rtol=1e-4)]
            assert matching
            compared[matching[0]] += 1
    assert sum(compared.values()) > 3
    if not hasattr(model, "roi_heads"):  # whose boxes are clipped later
        assert compared[True] > 0


def test_the_deviation_holds_at_any_size_of_the_image(name):
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    model = build(name).eval()
    set_score_threshold(model, 0.0)
    x = image(0, 96, 80)
    with torch.no_grad():
        small, large = (model([{**x, "height": 96 * k, "width": 80 * k}])[0] for k in (1, 3))
    small, large = small["instances"], large["instances"]
    assert len(small) == len(large) > 10
    assert torch.allclose(large.pred_boxes.tensor, 3 * small.pred_boxes.tensor, atol=1e-3)
    assert torch.equal(large.pred_boxes_std, small.pred_boxes_std)


@pytest.mark.parametrize("away", (0, 1))
def test_the_deviation_is_that_of_boxes_whose_offsets_were_drawn(name, away):
    """
    Of labels with noise the head learns the mean code: its deviation has to be the noise's.
    Around an offset of zero, and around one that changes the size of the box.
    """
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    generator = torch.Generator().manual_seed(0)
    for layer in _decoders(build(name)):
        transform = layer.box2box_transform
        grid = transform.grid
        one_sided = grid[0] >= 0
        point = len(grid) // 2 + away
        mean = grid[point].item() if one_sided or away else 0.0
        left = point - 1 if away else two_hot(torch.tensor(mean), grid)[0]
        std = max(0.5 * (grid[left + 1] - grid[left]).item(), 0.01 * grid[-1].item())
        offsets = mean + std * torch.randn(20000, 4, generator=generator)
        left, right = two_hot(offsets, grid)
        code = torch.zeros(20000, 4, len(grid)).scatter_(2, left[..., None], 1 - right[..., None])
        code.scatter_add_(2, left[..., None] + 1, right[..., None])
        logits = code.mean(dim=0).log().reshape(1, -1)
        box = torch.tensor([[40.0, 40, 72, 72]])  # an anchor of FCOS is square
        found = transform.side_deviations(logits, box)
        base = Box2BoxTransformLinear() if one_sided else Box2BoxTransform(transform.weights)
        drawn = base.apply_deltas(offsets, box.repeat(20000, 1))
        assert torch.allclose(found, drawn.std(dim=0)[None], rtol=0.05)


def test_std_scale_multiplies_the_deviation_and_nothing_else(name):
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    scale = (2.0, 3.0, 0.5, 1.0)
    models = [
        build(name).eval(),
        build(name, MODEL__CBBL__STD_SCALE=scale).eval(),
    ]
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for model in models:
        set_score_threshold(model, 0.0)
        with torch.no_grad():
            results.append(model(batch(0))[0]["instances"])
    assert len(results[0]) > 3
    for field in ("scores", "pred_classes"):
        assert torch.equal(results[0].get(field), results[1].get(field))
    assert torch.equal(results[0].pred_boxes.tensor, results[1].pred_boxes.tensor)
    expected = results[0].pred_boxes_std * torch.tensor(scale)
    assert torch.allclose(results[1].pred_boxes_std, expected, rtol=1e-5)


def test_voting_moves_boxes_and_nothing_else(name):
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    models = [build(name, MODEL__CBBL__VOTING_SIGMA=sigma).eval() for sigma in (0.0, 5.0)]
    results = []
    for model in models:
        torch.manual_seed(0)
        for layer in localization_layers(name, model):
            torch.nn.init.normal_(layer.weight, std=0.05)
        set_score_threshold(model, 0.0)
        with torch.no_grad():
            results.append(model(batch(0))[0]["instances"])
    plain, voted = results
    assert len(plain) > 10
    for field in ("scores", "pred_classes"):
        assert torch.equal(plain.get(field), voted.get(field))
    std = [std_in_pixels(x.pred_boxes_std, x.pred_boxes.tensor) for x in results]
    assert torch.allclose(*std, rtol=1e-4)
    moved = (plain.pred_boxes.tensor - voted.pred_boxes.tensor).abs()
    assert 0.1 < moved.max() < 48  # pixels
    assert torch.isfinite(voted.pred_boxes.tensor).all()


def test_voting_is_the_mean_of_the_candidates_that_overlap(name, monkeypatch):
    """
    An independent slow reference: the candidates are the detections without NMS. Variances are
    those that these carry: voting's own, which are others, have tests of their own.
    """
    if name == "rpn":
        pytest.skip("its boxes are Smooth-L1's")
    sigma, models = 0.5, []
    for module in ("fast_rcnn", "dense_detector"):
        monkeypatch.setattr(
            f"cbbl_d2.modeling.{module}.voting_variances", lambda variances, boxes: variances
        )
    monkeypatch.setattr(
        "cbbl_d2.modeling.box_regression._GridDecoder.side_variances",
        lambda self, *args: self.side_deviations(*args) ** 2,
    )
    # ROI heads clip before they vote, dense detectors after it.
    monkeypatch.setattr(Boxes, "clip", lambda *args: None)
    for voting_sigma in (sigma, 0.0):
        torch.manual_seed(0)
        models.append(build(name, MODEL__CBBL__VOTING_SIGMA=voting_sigma).eval())
        for layer in localization_layers(name, models[-1]):
            torch.nn.init.normal_(layer.weight, std=0.1)
        set_score_threshold(models[-1], 0.0)
    for decoder in _decoders(models[1]):
        decoder.test_nms_thresh = 1.0
        for limit in ("test_topk_per_image", "max_detections_per_image"):
            if hasattr(decoder, limit):
                setattr(decoder, limit, 100000)
    models[1].load_state_dict(models[0].state_dict())
    (x,) = batch(0)
    with torch.no_grad():
        voted, candidates = (model([x])[0]["instances"] for model in models)
    assert 10 < len(voted) < len(candidates)
    moved, unequal = 0, 0
    boxes = candidates.pred_boxes.tensor.double()
    variances = std_in_pixels(candidates.pred_boxes_std.double(), boxes) ** 2
    for i in range(0, len(voted), 7):
        # NMS keeps one of each score and class: the detection is found again by these.
        same = candidates.pred_classes == voted.pred_classes[i]
        (own,) = (same & (candidates.scores == voted.scores[i])).nonzero()[0]
        closeness = torch.zeros(len(boxes), dtype=torch.float64)
        for j in same.nonzero()[:, 0].tolist():
            corner = torch.maximum(boxes[own, :2], boxes[j, :2])
            size = torch.minimum(boxes[own, 2:], boxes[j, 2:]) - corner
            intersection = size.clamp(min=0).prod()
            areas = [(b[2:] - b[:2]).prod() for b in (boxes[own], boxes[j])]
            iou = intersection / (sum(areas) - intersection)
            if iou > 0:
                closeness[j] = candidates.scores[j] * torch.exp(-((1 - iou) ** 2) / sigma)
        weights = closeness[:, None] / variances
        expected = (weights * boxes).sum(dim=0) / weights.sum(dim=0)
        found = voted.pred_boxes.tensor[i].double()
        assert torch.allclose(found, expected, atol=1e-2)
        moved = max(moved, (expected - boxes[own]).abs().max().item())
        equal = (closeness[:, None] * boxes).sum(dim=0) / closeness.sum()
        unequal = max(unequal, (expected - equal).abs().max().item())
    assert moved > 0.5 and unequal > 0.1  # pixels


def test_inference_leaves_nothing_on_the_model_that_another_thread_would_find(name, monkeypatch):
    model = build(name, MODEL__CBBL__VOTING_SIGMA=0.0 if name == "rpn" else 0.5).eval()
    set_score_threshold(model, 0.0)
    (x,) = batch(0)
    with torch.no_grad():
        model([x])
        before = [set(vars(module)) for module in model.modules()]
        monkeypatch.setattr(
            torch.nn.Module,
            "__setattr__",
            lambda self, key, value: pytest.fail(f"{type(self).__name__}.{key} was set"),
        )
        model([x])
    assert before == [set(vars(module)) for module in model.modules()]


def _decoders(model):
    """The modules that decode boxes of detections."""
    if not hasattr(model, "roi_heads"):
        return [model]
    predictor = model.roi_heads.box_predictor
    return list(predictor) if isinstance(predictor, torch.nn.ModuleList) else [predictor]


@pytest.fixture
def given(monkeypatch):
    """
    ``given(model, inputs)``: from now on the model gets these features and proposals, computed in
    float32. What half precision does to a backbone is not the heads' affair.
    """

    def freeze(model, inputs):
        with torch.no_grad():
            images = model.preprocess_image(inputs)
            features = model.backbone(images.tensor)
            monkeypatch.setattr(model.backbone, "forward", lambda images: features)
            if hasattr(model, "proposal_generator"):
                model.proposal_generator.eval()
                proposals, _ = model.proposal_generator(images, features)
                model.proposal_generator.train()
                monkeypatch.setattr(
                    model.proposal_generator, "predict_proposals", lambda *args: proposals
                )

    return freeze


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(name, dtype, given):
    model, inputs = build(name), batch(3, 2)
    torch.manual_seed(0)
    for layer in localization_layers(name, model):  # logits that are no longer all alike
        torch.nn.init.normal_(layer.weight, std=0.1)
    given(model, inputs)
    # A copy: dense detectors normalize by a moving average over the calls.
    exact, _ = train(copy.deepcopy(model), inputs)
    with torch.autocast("cpu", dtype=dtype):
        half, _ = train(model, inputs)
    assert set(half) == set(exact)
    for loss in half:
        assert torch.isfinite(half[loss]), loss
        if any(x in loss for x in LOCALISATION):
            assert half[loss].dtype == torch.float32
            if loss.endswith(("_stage1", "_stage2")):
                continue  # of other regions: rounded boxes of the stage before may match otherwise
            assert half[loss].item() == pytest.approx(exact[loss].item(), rel=0.01, abs=1e-6), loss
    sum(half.values()).backward()
    for layer in localization_layers(name, model):
        assert torch.isfinite(layer.weight.grad).all()


def test_the_loss_is_in_float32_under_autocast(name, monkeypatch):
    """Half-precision logits, whatever computed them, cost their own rounding and nothing else."""
    calls = []
    original = LocalizationLoss.__call__
    monkeypatch.setattr(
        LocalizationLoss,
        "__call__",
        lambda self, transform, logits, *args, **kwargs: (
            calls.append((self, transform, logits.shape, args))
            or original(self, transform, logits, *args, **kwargs)
        ),
    )
    train(build(name), batch(3, 2))
    assert len(calls) == len(DETECTORS[name].new_layers)
    for loss, transform, shape, boxes in calls:
        logits = (torch.randn(shape) * 3).bfloat16()
        with EventStorage():
            expected = original(loss, transform, logits.float(), *boxes)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                terms = original(loss, transform, logits, *boxes)
        assert terms.dtype == torch.float32
        assert torch.allclose(terms, expected, rtol=1e-5)


def test_detections_carry_their_distributions_where_asked_to(name):
    model = build(name).eval()
    set_score_threshold(model, 0.0)
    inputs = [image(0, 160, 96)]  # whose sides differ
    with torch.no_grad():
        (plain,) = model(inputs)
    names = keep_distributions(model)
    if name == "rpn":
        assert names == ()
        return
    with torch.no_grad():
        (found,) = model(inputs)
    plain, found = plain["instances"], found["instances"]
    assert len(found) > 3 and not plain.has("offset_probabilities")
    for field in ("scores", "pred_boxes_std"):
        assert torch.equal(plain.get(field), found.get(field))
    p, points = found.offset_probabilities, found.offset_coordinates
    assert p.shape == points.shape == (len(found), 4, p.shape[2])
    assert torch.allclose(p.sum(dim=2), torch.ones(len(found), 4))
    # Where a coordinate is linear in its offset, that of the box is the mean of the points.
    height, width = found.image_size
    means = (p * points).sum(dim=2) * torch.tensor([width, height, width, height])
    boxes = found.pred_boxes.tensor
    inside = (boxes > 0).all(dim=1) & (boxes < torch.tensor([width, height] * 2)).all(dim=1)
    assert inside.any()
    if names[0] == "left":
        assert torch.allclose(means[inside], boxes[inside], atol=1e-2)
    else:
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert torch.allclose(means[inside, :2], centers[inside], atol=1e-2)
