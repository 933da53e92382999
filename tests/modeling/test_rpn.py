import pytest
import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.utils.events import EventStorage

from . import reference
from .detectors import batch, build

B = 11
WEIGHTS = (2.0, 1.0, 3.0, 1.5)


@pytest.fixture
def rpn():
    return build(
        "rpn_and_faster",
        MODEL__RPN__BBOX_REG_WEIGHTS=WEIGHTS,
        MODEL__RPN__BBOX_REG_LOSS_WEIGHT=0.6,
        MODEL__RPN__LOSS_WEIGHT=0.5,
    ).proposal_generator


def predictions(rpn, num_images, width=4 * B):
    """Anchors, objectness and logits of the five levels for images of 96x96 px."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.zeros(1, 1, 96 // s, 96 // s) for s in (4, 8, 16, 32, 64)]
    anchors = rpn.anchor_generator(features)
    scores = [torch.randn(num_images, len(x), generator=generator) for x in anchors]
    logits = [torch.randn(num_images, len(x), width, generator=generator) * 2 for x in anchors]
    return anchors, scores, logits


def test_loss_equals_a_loop_over_the_positive_anchors(rpn):
    inputs = batch(4, 0, 2)
    anchors, scores, logits = predictions(rpn, 3)
    torch.manual_seed(0)
    labels, targets = rpn.label_and_sample_anchors(anchors, [x["instances"] for x in inputs])
    for x in logits:
        x.requires_grad_()
    with EventStorage():
        losses = rpn.losses(anchors, scores, labels, logits, targets)

    positive = torch.stack(labels) == 1
    assert positive.sum() >= 5 and (torch.stack(labels) == -1).any()
    ce, gap, gradient = reference.dense_loss(
        logits,
        anchors,
        positive,
        targets,
        rpn.box2box_transform.grid,
        reference.deltas,
        WEIGHTS,
    )
    factor = 0.6 * 0.5 / (rpn.batch_size_per_image * 3)
    assert losses["loss_rpn_loc"].item() == pytest.approx(ce * factor, rel=1e-5)
    assert losses["loss_rpn_uncertainty"].item() == pytest.approx(0.1 * gap * factor, rel=1e-5)
    gradients = torch.autograd.grad(losses["loss_rpn_loc"], logits, retain_graph=True)
    assert torch.allclose(torch.cat(gradients, dim=1).double(), gradient * factor, atol=1e-8)

    stock = build("rpn_and_faster", stock=True, MODEL__RPN__LOSS_WEIGHT=0.5).proposal_generator
    stand_ins = [torch.randn(*x.shape[:2], 4) for x in logits]
    with EventStorage():
        expected = stock.losses(anchors, scores, labels, stand_ins, targets)
    assert torch.equal(losses["loss_rpn_cls"], expected["loss_rpn_cls"])


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("pre_nms_topk", (20, 700))  # levels have 1728 to 12 anchors
def test_proposals_are_those_of_decoding_every_anchor(rpn, training, pre_nms_topk):
    rpn.train(training)
    rpn.pre_nms_topk[training] = pre_nms_topk
    anchors, scores, logits = predictions(rpn, 2)
    sizes = [(96, 96), (90, 70)]
    proposals = rpn.predict_proposals(anchors, scores, logits, sizes)
    every = [
        rpn.box2box_transform.apply_deltas(x.flatten(0, 1), a.tensor.repeat(2, 1)).view(2, -1, 4)
        for a, x in zip(anchors, logits)
    ]
    expected = find_top_rpn_proposals(
        every,
        scores,
        sizes,
        rpn.nms_thresh,
        pre_nms_topk,
        rpn.post_nms_topk[training],
        rpn.min_box_size,
        training,
    )
    for a, b in zip(proposals, expected):
        assert len(a) > 20
        assert torch.equal(a.objectness_logits, b.objectness_logits)
        # Not to the last bit: a softmax over more rows is vectorised elsewhere.
        boxes, others = a.proposal_boxes.tensor, b.proposal_boxes.tensor
        assert torch.allclose(boxes, others, rtol=0, atol=1e-4)


def test_proposals_carry_no_gradient_and_divergence_is_noticed(rpn):
    anchors, scores, logits = predictions(rpn, 1)
    for x in (*scores, *logits):
        x.requires_grad_()
    (proposals,) = rpn.predict_proposals(anchors, scores, logits, [(96, 96)])
    assert not proposals.proposal_boxes.tensor.requires_grad
    assert not proposals.objectness_logits.requires_grad
    with torch.no_grad():
        logits[0][0, scores[0].argmax()] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged"):
        rpn.predict_proposals(anchors, scores, logits, [(96, 96)])
    rpn.eval()  # as in Detectron2: such a proposal is left out
    (proposals,) = rpn.predict_proposals(anchors, scores, logits, [(96, 96)])
    assert len(proposals) > 0 and torch.isfinite(proposals.proposal_boxes.tensor).all()


def test_one_logit_moves_one_coordinate_of_one_anchor(monkeypatch):
    """The order of the layer's outputs is that in which they are read."""
    model = build("rpn").eval()
    rpn = model.proposal_generator
    layer = rpn.rpn_head.anchor_deltas
    torch.nn.init.zeros_(layer.weight)
    seen = []
    monkeypatch.setattr(
        rpn, "predict_proposals", lambda anchors, scores, logits, sizes: seen.append(logits)
    )
    images = model.preprocess_image(batch(0))
    for anchor in range(3):
        for coordinate in range(4):
            torch.nn.init.zeros_(layer.bias)
            layer.bias.data.view(3, 4, B)[anchor, coordinate, -1] = 50.0
            with torch.no_grad():
                rpn(images, model.backbone(images.tensor))
            for logits in seen.pop():
                offsets = rpn.box2box_transform.decode_offsets(logits.flatten(0, 1))
                expected = torch.zeros(len(offsets) // 3, 3, 4)
                expected[:, anchor, coordinate] = 2.0  # alpha
                assert torch.allclose(offsets, expected.flatten(0, 1), atol=1e-5)


def test_it_is_configured_by_its_own_keys():
    rpn = build("rpn", MODEL__CBBL__RPN__ALPHA=3.0, MODEL__CBBL__RPN__NUM_INTERVALS=6)
    rpn = rpn.proposal_generator
    assert rpn.box2box_transform.grid[-1] == 3 and rpn.box2box_transform.num_points == 7
    assert rpn.rpn_head.anchor_deltas.out_channels == 3 * 4 * 7
    assert rpn.anchor_generator.box_dim == 4 * 7
    assert rpn.rpn_head.anchor_deltas.weight.std().item() == pytest.approx(0.01, rel=0.1)
