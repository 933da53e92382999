import math

import pytest
import torch
from cbbl_d2.distribution import cbbl_loss, exponential_grid, two_hot
from cbbl_d2.modeling import CBBLBox2BoxTransform, CBBLFastRCNNOutputLayers, LocalizationLoss
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

K, B = 3, 6
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
GRID = exponential_grid(5.0, 1.0, B - 1)


def head(cls_agnostic_bbox_reg=True, test_score_thresh=0.05, init_std=0.0, loss_weight=1.0, **loss):
    torch.manual_seed(0)
    return CBBLFastRCNNOutputLayers(
        ShapeSpec(channels=16),
        box2box_transform=CBBLBox2BoxTransform(WEIGHTS, GRID),
        localization_loss=LocalizationLoss(**loss),
        num_classes=K,
        cls_agnostic_bbox_reg=cls_agnostic_bbox_reg,
        test_score_thresh=test_score_thresh,
        init_std=init_std,
        loss_weight=loss_weight,
    )


def sample_proposals(num=20, seed=0, image_size=(100, 120)):
    """Proposals of one image: jittered ground truth, a third of them background."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 60
    gt = torch.cat((low, low + 6 + torch.rand(num, 2, generator=generator) * 30), dim=1)
    jitter = (torch.rand(num, 4, generator=generator) - 0.5) * 4
    instances = Instances(image_size)
    instances.proposal_boxes = Boxes(gt + jitter)
    instances.gt_boxes = Boxes(gt)
    instances.gt_classes = torch.arange(num) % (K + 1)  # K is background
    return instances


def random_logits(predictor, num, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    width = predictor.bbox_pred.out_features
    return (
        torch.randn(num, K + 1, generator=generator) * scale,
        torch.randn(num, width, generator=generator) * scale,
    )


@pytest.mark.parametrize("agnostic", (True, False))
def test_loss_equals_a_loop_over_regions(agnostic):
    predictor = head(cls_agnostic_bbox_reg=agnostic, loss_weight={"loss_box_reg": 0.5})
    images = [sample_proposals(20, 0), sample_proposals(7, 1)]
    scores, logits = random_logits(predictor, 27)
    with EventStorage():
        losses = predictor.losses((scores, logits), images)

    ce = gap = 0.0
    row = 0
    for p in images:
        deltas = Box2BoxTransform(WEIGHTS).get_deltas(p.proposal_boxes.tensor, p.gt_boxes.tensor)
        for i in range(len(p)):
            class_ = int(p.gt_classes[i])
            if class_ < K:
                mine = logits[row].view(-1, 4, B)[0 if agnostic else class_]
                a, b = cbbl_loss(mine, deltas[i], GRID)
                ce, gap = ce + a, gap + b
            row += 1
    # Divided by all regions, background included; the weight of the loss acts on both parts.
    assert torch.allclose(losses["loss_box_reg"], 0.5 * ce / 27)
    assert torch.allclose(losses["loss_box_uncertainty"], 0.1 * 0.5 * gap / 27)
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=16), box2box_transform=Box2BoxTransform(WEIGHTS), num_classes=K
    )
    with EventStorage():
        expected = stock.losses((scores, torch.zeros(27, K * 4)), images)["loss_cls"]
    assert torch.equal(losses["loss_cls"], expected)


def test_uncertainty_modes():
    images = [sample_proposals()]
    for mode, keys in (
        ("none", {"loss_cls", "loss_box_reg"}),
        ("entropy", {"loss_cls", "loss_box_reg", "loss_box_uncertainty"}),
    ):
        predictor = head(uncertainty=mode)
        with EventStorage():
            assert set(predictor.losses(random_logits(predictor, 20), images)) == keys


def test_storage_scalars_by_hand():
    predictor = head()
    p = Instances((100, 100))
    p.proposal_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30], [0, 0, 8, 8]]))
    p.gt_boxes = Boxes(torch.tensor([[11.0, 10, 31, 30], [20, -20, 28, -12]]))
    p.gt_classes = torch.tensor([0, 1])
    # Offsets: dx = 10 * 1 / 20 = .5; dx = 10 * 20 / 8 = 25 and dy = -25, outside; five are zero.
    with EventStorage() as storage:
        predictor.losses((torch.zeros(2, K + 1), torch.zeros(2, 4 * B)), [p])
        latest = {k: v[0] for k, v in storage.latest().items()}
    assert latest["cbbl/clipped_fraction"] == pytest.approx(2 / 8)
    assert latest["cbbl/offset_l1"] == pytest.approx(50.5 / 8)
    _, w = two_hot(torch.tensor(0.5), GRID)
    h = -(w * w.log() + (1 - w) * (1 - w).log()).item()
    gaps = [math.log(6) - h] + 2 * [math.log(6)] + 5 * [math.log(6) - math.log(2)]
    assert latest["cbbl/entropy_gap"] == pytest.approx(sum(gaps) / 8, rel=1e-4)

    # The gap has no sign: a head that is surer than its label does not make up for an unsure one.
    sure = torch.zeros(2, 4, B)
    sure[0, 1:, 0] = 100.0
    one_hot = head(label="one_hot")
    for layers, label_entropy in ((predictor, math.log(2)), (one_hot, 0.0)):
        with EventStorage() as storage:
            layers.losses((torch.zeros(2, K + 1), sure.flatten(1)), [p])
            gap = storage.latest()["cbbl/entropy_gap"][0]
        h_dx = h if label_entropy else 0.0
        gaps = [math.log(6) - h_dx] + 3 * [label_entropy] + 2 * [math.log(6)]
        gaps += 2 * [math.log(6) - label_entropy]
        assert gap == pytest.approx(sum(gaps) / 8, rel=1e-4)


@pytest.mark.parametrize("agnostic", (True, False))
@pytest.mark.parametrize("uncertainty", ("entropy_gap", "entropy", "none"))
def test_without_foreground_the_loss_is_zero_and_gradients_live(agnostic, uncertainty):
    for num in (0, 5):
        predictor = head(cls_agnostic_bbox_reg=agnostic, uncertainty=uncertainty)
        p = sample_proposals(num)
        p.gt_classes[:] = K
        with EventStorage() as storage:
            losses = predictor.losses(predictor(torch.randn(num, 16)), [p])
            assert "cbbl/clipped_fraction" not in storage.latest()
        assert losses["loss_box_reg"] == 0
        (losses["loss_box_reg"] + losses.get("loss_box_uncertainty", 0)).backward()
        assert torch.equal(
            predictor.bbox_pred.weight.grad, torch.zeros_like(predictor.bbox_pred.weight)
        )


def test_targets_that_are_not_finite_are_left_out_and_counted():
    predictor = head()
    p = sample_proposals()
    scores, logits = random_logits(predictor, 20)
    broken = p.gt_boxes.tensor.clone()
    broken[0, 2] = math.nan  # class 0: foreground
    broken[1, 2] = broken[1, 0]  # of no width: log(0)
    broken[3] = math.nan  # background: never looked at
    q = Instances(p.image_size, **p.get_fields())
    q.gt_boxes = Boxes(broken)
    without = Instances(p.image_size, **p.get_fields())
    without.gt_classes = p.gt_classes.clone()
    without.gt_classes[:2] = K
    with EventStorage() as storage:
        loss = predictor.losses((scores, logits), [q])["loss_box_reg"]
        assert storage.latest()["cbbl/nonfinite_targets"][0] == 2
    with EventStorage():
        expected = predictor.losses((scores, logits), [without])["loss_box_reg"]
    assert torch.isfinite(loss) and torch.allclose(loss, expected)


@pytest.mark.parametrize("agnostic", (True, False))
@pytest.mark.parametrize("init_std", (0.0, 0.7))
def test_untrained_head_decodes_to_the_proposals(agnostic, init_std):
    predictor = head(cls_agnostic_bbox_reg=agnostic, init_std=init_std)
    torch.nn.init.zeros_(predictor.bbox_pred.weight)  # the bias alone
    p = sample_proposals()
    boxes = predictor.predict_boxes(predictor(torch.randn(20, 16)), [p])[0]
    expected = p.proposal_boxes.tensor.repeat(1, 1 if agnostic else K)
    assert torch.allclose(boxes, expected, atol=1e-4)
    # And with the random weights that training starts from: within a hundredth of 36 px.
    torch.manual_seed(0)
    torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    boxes = predictor.predict_boxes(predictor(torch.randn(20, 16)), [p])[0]
    assert torch.allclose(boxes, expected, atol=0.36)


def test_class_specific_inference_equals_decoding_everything():
    for threshold in (0.0, 0.05, 0.4, 0.99):
        predictor = head(cls_agnostic_bbox_reg=False, test_score_thresh=threshold)
        images = [sample_proposals(30, 0), sample_proposals(0, 1), sample_proposals(12, 2)]
        predictions = random_logits(predictor, 42)
        fast, fast_kept = predictor.inference(predictions, images)
        dense, dense_kept = fast_rcnn_inference(
            predictor.predict_boxes(predictions, images),
            predictor.predict_probs(predictions, images),
            [p.image_size for p in images],
            threshold,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        for a, b, i, j in zip(fast, dense, fast_kept, dense_kept):
            # Not equal to the last bit: a softmax over more rows is vectorised elsewhere.
            assert torch.allclose(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=1e-4)
            assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
            assert torch.equal(i, j)
        if threshold == 0.05:
            assert len(fast[0]) > 5


def test_class_specific_inference_decodes_only_pairs_above_the_threshold(monkeypatch):
    predictor = head(cls_agnostic_bbox_reg=False, test_score_thresh=0.4)
    p = sample_proposals(30)
    scores, logits = random_logits(predictor, 30)
    decoded = []
    original = CBBLBox2BoxTransform.apply_deltas
    monkeypatch.setattr(
        CBBLBox2BoxTransform,
        "apply_deltas",
        lambda self, d, b: decoded.append(d.shape) or original(self, d, b),
    )
    predictor.inference((scores, logits), [p])
    above = int((scores.softmax(-1)[:, :K] > 0.4).sum())
    assert 0 < above < 30
    # And once more the detections, for how sure it is of them.
    assert decoded[0] == (above, 4 * B) and all(n <= above for n, _ in decoded)


@pytest.mark.parametrize("agnostic", (True, False))
def test_inference_without_proposals(agnostic):
    predictor = head(cls_agnostic_bbox_reg=agnostic)
    p = sample_proposals(0)
    results, _ = predictor.inference(predictor(torch.zeros(0, 16)), [p])
    assert len(results) == 1 and len(results[0]) == 0


def test_the_new_layer_starts_like_detectron2_s():
    torch.manual_seed(0)
    predictor = CBBLFastRCNNOutputLayers(
        ShapeSpec(channels=1024),
        box2box_transform=CBBLBox2BoxTransform(WEIGHTS, GRID),
        num_classes=K,
    )
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert (predictor.bbox_pred.bias == 0).all()


@pytest.mark.parametrize("agnostic", (True, False))
def test_a_region_with_nan_logits_is_dropped(agnostic):
    predictor = head(cls_agnostic_bbox_reg=agnostic, test_score_thresh=0.0)
    p = sample_proposals(10)
    scores, logits = random_logits(predictor, 10)
    logits[4] = math.nan
    results, kept = predictor.inference((scores, logits), [p])
    assert len(results[0]) > 0
    assert torch.isfinite(results[0].pred_boxes.tensor).all()


@pytest.mark.parametrize("agnostic", (True, False))
@pytest.mark.parametrize("label", ("two_hot", "one_hot"))
def test_the_head_learns_boxes(agnostic, label):
    """Fitted to 30 regions, it decodes to their ground truth; one-hot labels only to the grid."""
    predictor = head(cls_agnostic_bbox_reg=agnostic, label=label)
    p = sample_proposals(30)
    features = torch.randn(30, 16) * 3
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.05)
    for _ in range(400):
        with EventStorage() as storage:
            losses = predictor.losses(predictor(features), [p])
            error = storage.latest()["cbbl/offset_l1"][0]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    if label == "two_hot":
        assert error < 0.15  # a fiftieth of a proposal's width
    else:
        assert error > 0.15
