import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from . import reference
from .detectors import NUM_CLASSES, batch, build

A, B = 3, 11  # anchors of a location, points of the grid
WEIGHTS = (2.0, 1.0, 3.0, 1.5)
STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture
def model():
    return build("retinanet", MODEL__RETINANET__BBOX_REG_WEIGHTS=WEIGHTS)


def raw_predictions(num_images, box_dim=4 * B, shift=0.0):
    """What the head returns for images of 96x96 px."""
    generator = torch.Generator().manual_seed(0)
    sizes = [-(-96 // stride) for stride in STRIDES]

    def random(channels):
        return [
            torch.randn(num_images, channels, size, size, generator=generator) * 2 for size in sizes
        ]

    return [[x + shift for x in random(A * NUM_CLASSES)], random(A * box_dim)]


def features():
    return [torch.zeros(1, 1, -(-96 // stride), -(-96 // stride)) for stride in STRIDES]


def test_loss_equals_a_loop_over_the_positive_anchors(model):
    stock = build("retinanet", stock=True)
    inputs = batch(4, 0, 2)
    anchors = model.anchor_generator(features())
    labels, targets = model.label_anchors(anchors, [x["instances"] for x in inputs])
    cls, logits = model._transpose_dense_predictions(raw_predictions(3), [NUM_CLASSES, 4])
    for x in logits:
        x.requires_grad_()
    foreground = (torch.stack(labels) >= 0) & (torch.stack(labels) < NUM_CLASSES)
    assert foreground.sum() >= 5 and (torch.stack(labels) == -1).any()
    ce, gap, gradient = reference.dense_loss(
        logits,
        anchors,
        foreground,
        targets,
        model.box2box_transform.grid,
        reference.deltas,
        WEIGHTS,
    )
    stand_ins = [torch.randn(*x.shape[:2], 4) for x in logits]
    normalizer = 100  # Detectron2 starts its moving average there
    for _ in range(2):
        with EventStorage():
            losses = model.losses(anchors, cls, labels, logits, targets)
            expected = stock.losses(anchors, cls, labels, stand_ins, targets)
        normalizer = 0.9 * normalizer + 0.1 * foreground.sum().item()
        factor = 0.7 / normalizer  # BBOX_REG_LOSS_WEIGHT
        assert losses["loss_box_reg"].item() == pytest.approx(ce * factor, rel=1e-5)
        assert losses["loss_box_uncertainty"].item() == pytest.approx(0.1 * gap * factor, rel=1e-5)
        gradients = torch.autograd.grad(losses["loss_box_reg"], logits, retain_graph=True)
        assert torch.allclose(torch.cat(gradients, dim=1).double(), gradient * factor, atol=1e-8)
        assert torch.equal(losses["loss_cls"], expected["loss_cls"])


def test_inference_equals_an_independent_decode(model):
    model.eval()
    model.test_score_thresh = 0.3
    raw = raw_predictions(2, shift=-4.0)
    images = ImageList(torch.zeros(2, 3, 96, 96), [(96, 96), (90, 80)])
    with torch.no_grad():
        results = model.forward_inference(images, features(), [[x.clone() for x in p] for p in raw])
    anchors = model.anchor_generator(features())
    for i, result in enumerate(results):
        # (A * C, H, W) of one image to (H * W * A, C)
        cls, logits = (
            [x[i].unflatten(0, (A, -1)).permute(2, 3, 0, 1).flatten(0, 2) for x in p] for p in raw
        )
        boxes, scores, classes = reference.dense_detections(
            [x.sigmoid() for x in cls],
            logits,
            anchors,
            0.3,
            model.box2box_transform.grid,
            reference.from_deltas,
            WEIGHTS,
        )
        keep = batched_nms(boxes, scores, classes, model.test_nms_thresh)
        keep = keep[: model.max_detections_per_image]
        assert 20 < len(keep) < len(boxes) < 1000
        assert torch.equal(result.pred_classes, classes[keep])
        assert torch.equal(result.scores, scores[keep])
        assert torch.allclose(result.pred_boxes.tensor, boxes[keep], rtol=0, atol=1e-3)


def test_one_logit_moves_one_coordinate_of_one_anchor(model):
    """The order of the layer's outputs is that in which they are read."""
    layer = model.head.bbox_pred
    torch.nn.init.zeros_(layer.weight)
    channels = layer.in_channels
    for anchor in range(A):
        for coordinate in range(4):
            torch.nn.init.zeros_(layer.bias)
            layer.bias.data.view(A, 4, B)[anchor, coordinate, -1] = 50.0
            with torch.no_grad():
                raw = model.head([torch.zeros(1, channels, 4, 3)] * len(STRIDES))
                _, logits = model._transpose_dense_predictions(list(raw), [NUM_CLASSES, 4])
            offsets = model.box2box_transform.decode_offsets(logits[0][0])
            expected = torch.zeros(4 * 3, A, 4)
            expected[:, anchor, coordinate] = 2.0  # alpha
            assert torch.allclose(offsets, expected.flatten(0, 1), atol=1e-5)


def test_it_is_configured_by_its_own_keys():
    model = build(
        "retinanet", MODEL__CBBL__RETINANET__ALPHA=3.0, MODEL__CBBL__RETINANET__NUM_INTERVALS=6
    )
    assert model.box2box_transform.grid[-1] == 3 and model.box2box_transform.num_points == 7
    assert model.head.bbox_pred.out_channels == A * 4 * 7
    assert model.head.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)
