import os

import detectron2
import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import retinanet
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage
from torchvision.ops import sigmoid_focal_loss

from . import reference
from .detectors import NUM_CLASSES, batch, build, config

B = 17
STRIDES = (8, 16, 32, 64, 128)
both = pytest.mark.parametrize("stock", (False, True), ids=("C-BBL", "stock"))


@pytest.fixture
def model():
    return build("fcos")


def raw_predictions(num_images, box_dim=4 * B, shift=0.0):
    """What the head returns for images of 96x96 px: class scores, boxes, centerness."""
    generator = torch.Generator().manual_seed(0)
    sizes = [-(-96 // stride) for stride in STRIDES]

    def random(channels):
        return [
            torch.randn(num_images, channels, size, size, generator=generator) * 2 for size in sizes
        ]

    return [[x + shift for x in random(NUM_CLASSES)], random(box_dim), random(1)]


def features():
    return [torch.zeros(1, 1, -(-96 // stride), -(-96 // stride)) for stride in STRIDES]


def as_tensor(boxes):
    """Detectron2 v0.6 hands over Boxes, later versions tensors."""
    return boxes.tensor if isinstance(boxes, Boxes) else boxes


def test_loss_equals_a_loop_over_the_positive_points(model):
    stock = build("fcos", stock=True)
    inputs = batch(4, 0, 2)
    anchors = model.anchor_generator(features())
    labels, targets = model.label_anchors(anchors, [x["instances"] for x in inputs])
    cls, logits, centerness = model._transpose_dense_predictions(
        raw_predictions(3), [NUM_CLASSES, 4, 1]
    )
    for x in logits:
        x.requires_grad_()
    foreground = torch.stack(labels) < NUM_CLASSES
    assert foreground.sum() >= 5
    ce, gap, gradient = reference.dense_loss(
        logits,
        anchors,
        foreground,
        [as_tensor(x) for x in targets],
        model.box2box_transform.grid,
        reference.distances,
    )
    stand_ins = [torch.randn(*x.shape[:2], 4) for x in logits]
    normalizer = 300  # Detectron2 starts its moving average there
    for _ in range(2):
        with EventStorage():
            losses = model.losses(anchors, cls, labels, logits, targets, centerness)
            expected = stock.losses(anchors, cls, labels, stand_ins, targets, centerness)
        normalizer = 0.9 * normalizer + 0.1 * foreground.sum().item()
        factor = 0.7 / normalizer  # BBOX_REG_LOSS_WEIGHT
        assert losses["loss_fcos_loc"].item() == pytest.approx(ce * factor, rel=1e-5)
        assert losses["loss_fcos_uncertainty"].item() == pytest.approx(0.1 * gap * factor, rel=1e-5)
        gradients = torch.autograd.grad(losses["loss_fcos_loc"], logits, retain_graph=True)
        assert torch.allclose(torch.cat(gradients, dim=1).double(), gradient * factor, atol=1e-8)
        for loss in ("loss_fcos_cls", "loss_fcos_ctr"):
            assert torch.equal(losses[loss], expected[loss])


def test_inference_equals_an_independent_decode(model):
    model.eval()
    model.test_score_thresh = 0.2
    raw = raw_predictions(2, shift=-4.0)
    images = ImageList(torch.zeros(2, 3, 96, 96), [(96, 96), (90, 80)])
    with torch.no_grad():
        results = model.forward_inference(images, features(), [[x.clone() for x in p] for p in raw])
    anchors = model.anchor_generator(features())
    for i, result in enumerate(results):
        cls, logits, centerness = (
            [x[i].permute(1, 2, 0).flatten(0, 1) for x in p]
            for p in raw  # (H * W, C)
        )
        boxes, scores, classes = reference.dense_detections(
            [(x.sigmoid() * y.sigmoid()).sqrt() for x, y in zip(cls, centerness)],
            logits,
            anchors,
            0.2,
            model.box2box_transform.grid,
            reference.from_distances,
        )
        keep = batched_nms(boxes, scores, classes, model.test_nms_thresh)
        keep = keep[: model.max_detections_per_image]
        assert 20 < len(keep) < len(boxes) < 1000
        assert torch.equal(result.pred_classes, classes[keep])
        assert torch.allclose(result.scores, scores[keep])
        assert torch.allclose(result.pred_boxes.tensor, boxes[keep], rtol=0, atol=1e-3)


def test_one_logit_moves_one_side(model):
    """The order of the layer's outputs is that in which they are read."""
    layer = model.head.bbox_pred
    torch.nn.init.zeros_(layer.weight)
    start = model.box2box_transform.grid.mean().item()  # of the uniform distribution
    for side in range(4):
        torch.nn.init.zeros_(layer.bias)
        layer.bias.data.view(4, B)[side, -1] = 50.0
        with torch.no_grad():
            raw = model.head([torch.zeros(1, layer.in_channels, 4, 3)] * len(STRIDES))
            _, logits, _ = model._transpose_dense_predictions(list(raw), [NUM_CLASSES, 4, 1])
        offsets = model.box2box_transform.decode_offsets(logits[0][0])
        expected = torch.full((4 * 3, 4), start)
        expected[:, side] = 8.0  # alpha
        assert torch.allclose(offsets, expected, atol=1e-5)


def test_it_is_configured_by_its_own_keys():
    model = build("fcos", MODEL__CBBL__FCOS__ALPHA=6.0, MODEL__CBBL__FCOS__NUM_INTERVALS=6)
    grid = model.box2box_transform.grid
    assert grid[0] == 0 and grid[-1] == 6 and len(grid) == 7
    assert model.head.bbox_pred.out_channels == 4 * 7
    assert model.head.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)


# -- FCOS from a YAML config -----------------------------------------------------------------------


@both
def test_an_image_without_objects_is_background(stock):
    model = build("fcos", stock=stock)
    anchors = model.anchor_generator(features())
    instances = [x["instances"] for x in batch(0, 3)]
    labels, targets = model.label_anchors(anchors, instances)
    assert (labels[0] == NUM_CLASSES).all() and (labels[1] < NUM_CLASSES).any()
    # The other image is labeled as if it were alone.
    alone, its_targets = model.label_anchors(anchors, instances[1:])
    assert torch.equal(labels[1], alone[0])
    assert torch.equal(as_tensor(targets[1]), as_tensor(its_targets[0]))

    labels, targets = model.label_anchors(anchors, instances[:1])
    cls, boxes, centerness = model._transpose_dense_predictions(
        raw_predictions(1, box_dim=4 if stock else 4 * B), [NUM_CLASSES, 4, 1]
    )
    with EventStorage():
        losses = model.losses(anchors, cls, labels, boxes, targets, centerness)
    scores = torch.cat(cls, dim=1)
    background = sigmoid_focal_loss(scores, torch.zeros_like(scores), 0.25, 2.0, reduction="sum")
    expected = background.item() / (0.9 * 300 + 0.1 * 1)
    assert losses.pop("loss_fcos_cls").item() == pytest.approx(expected, rel=1e-5)
    assert all(loss == 0 for loss in losses.values())


def test_the_weight_of_the_stock_loss_acts_on_localization_alone():
    """Each of the two detectors has its own, so that both can be tuned alike."""
    losses = []
    for weight in (1.0, 4.0):
        torch.manual_seed(0)
        model = build("fcos", stock=True, MODEL__FCOS__BBOX_REG_LOSS_WEIGHT=weight).train()
        with EventStorage():
            losses.append(model(batch(3, 2)))
    one, four = losses
    assert one["loss_fcos_loc"] > 0
    for name in one:
        factor = 4 if name == "loss_fcos_loc" else 1
        assert four[name].item() == pytest.approx(factor * one[name].item()), name


@both
def test_group_norm(stock, monkeypatch):
    """The default, as in Detectron2's Lazy config."""
    original = retinanet.get_norm

    def get_norm(norm, channels):
        original(norm, 1)  # Detectron2 v0.6 tries it on one channel, which GN itself refuses
        return original(norm, channels)

    monkeypatch.setattr(retinanet, "get_norm", get_norm)
    head = build_model(config("fcos", stock=stock)).head
    norms = [x for x in head.modules() if isinstance(x, torch.nn.GroupNorm)]
    assert [(x.num_groups, x.num_channels) for x in norms] == [(32, 64)] * 2
    head = build_model(config("fcos", stock=stock, MODEL__FCOS__NORM="")).head
    assert not any(isinstance(x, torch.nn.GroupNorm) for x in head.modules())


def test_it_is_the_fcos_of_the_lazy_config():
    resnet18 = {
        "MODEL__RESNETS__DEPTH": 18,
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
        "MODEL__FPN__OUT_CHANNELS": 32,
        "MODEL__FCOS__NORM": "",
    }
    model = build("fcos", stock=True, **resnet18)
    folder = os.path.join(os.path.dirname(detectron2.__file__), "model_zoo", "configs", "common")
    lazy = LazyConfig.load(os.path.join(folder, "models", "fcos.py")).model
    lazy.backbone.bottom_up.stages.depth = 18
    del lazy.backbone.bottom_up.stages.stride_in_1x1  # of bottlenecks
    lazy.backbone.bottom_up.stages.norm = lazy.backbone.bottom_up.stem.norm = "BN"
    lazy.backbone.out_channels = 32
    lazy.backbone.top_block.in_channels = lazy.backbone.top_block.out_channels = 32
    lazy.num_classes = lazy.head.num_classes = NUM_CLASSES
    lazy.head.input_shape = [LazyCall(ShapeSpec)(channels=32) for _ in STRIDES]
    lazy.head.conv_dims = [32]
    lazy.head.norm = ""
    lazy.pixel_mean = model.pixel_mean.flatten().tolist()
    lazy.pixel_std = model.pixel_std.flatten().tolist()
    twin = instantiate(lazy)
    twin.load_state_dict(model.state_dict())
    for key, value in vars(twin).items():  # thresholds, weights of the losses
        if isinstance(value, (int, float, list)):
            assert getattr(model, key) == value, key

    inputs = batch(3, 2)
    with EventStorage():
        losses, expected = model.train()(inputs), twin.train()(inputs)
    assert losses.keys() == expected.keys()
    for loss in losses:
        assert torch.equal(losses[loss], expected[loss]), loss
