"""C-BBL once more, by loops in float64 that share no code with the package."""

import math

import torch


def deltas(source, target, weights):
    """Box2BoxTransform.get_deltas of one box."""
    (w, h), (x, y) = _size(source), _center(source)
    (tw, th), (tx, ty) = _size(target), _center(target)
    offsets = ((tx - x) / w, (ty - y) / h, math.log(tw / w), math.log(th / h))
    return [weight * offset for weight, offset in zip(weights, offsets)]


def distances(source, target, weights=None):
    """Box2BoxTransformLinear.get_deltas of one box: left, top, right, bottom in strides."""
    (stride, _), (x, y) = _size(source), _center(source)
    sides = (x - target[0], y - target[1], target[2] - x, target[3] - y)
    return [side / stride for side in sides]


def from_deltas(source, offsets, weights):
    (w, h), (x, y) = _size(source), _center(source)
    dx, dy, dw, dh = (offset / weight for offset, weight in zip(offsets, weights))
    x, y, w, h = x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def from_distances(source, offsets, weights=None):
    (stride, _), (x, y) = _size(source), _center(source)
    left, top, right, bottom = (max(offset, 0) * stride for offset in offsets)
    return [x - left, y - top, x + right, y + bottom]


def expected_offsets(logits, grid):
    """Logits of one box, shape (4 * B,), to four numbers."""
    p = logits.double().view(4, len(grid)).softmax(-1)
    return [sum(p_i * y_i for p_i, y_i in zip(row, grid.tolist())) for row in p.tolist()]


def loss_of_one_box(logits, offsets, grid):
    """
    Returns:
        cross entropy, entropy gap and d(cross entropy)/d(logits), of all four coordinates.
    """
    points = grid.double().tolist()
    p = logits.detach().double().view(4, len(points)).softmax(-1)
    label = torch.zeros_like(p)
    for coordinate, t in enumerate(offsets):
        t = min(max(t, points[0]), points[-1])
        right = next(i for i in range(1, len(points)) if t <= points[i])
        width = points[right] - points[right - 1]
        label[coordinate, right - 1] = (points[right] - t) / width
        label[coordinate, right] = (t - points[right - 1]) / width
    cross_entropy = -(label * p.log()).sum()
    gap = (torch.special.entr(p).sum(-1) - torch.special.entr(label).sum(-1)).abs().sum()
    return cross_entropy.item(), gap.item(), (p - label).flatten()


def dense_loss(logits, anchors, foreground, targets, grid, encode, weights=None):
    """
    Args:
        logits: for each level, shape (N, A, 4 * B).
        foreground, targets: for all levels, shapes (N, sum of A) and (N, sum of A, 4).

    Returns:
        sums over the foreground: cross entropy, entropy gap, and the gradient of the former as a
        tensor of the shape of all logits.
    """
    logits = torch.cat(logits, dim=1)
    anchors = torch.cat([x.tensor for x in anchors]).double().tolist()
    gradient = torch.zeros_like(logits, dtype=torch.float64)
    total = [0.0, 0.0]
    for image, anchor in foreground.nonzero().tolist():
        offsets = encode(anchors[anchor], targets[image][anchor].double().tolist(), weights)
        ce, gap, gradient[image, anchor] = loss_of_one_box(logits[image, anchor], offsets, grid)
        total[0] += ce
        total[1] += gap
    return (*total, gradient)


def _size(box):
    return box[2] - box[0], box[3] - box[1]


def _center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def dense_detections(scores, logits, anchors, threshold, grid, decode, weights=None):
    """
    Every (box, class) pair above the threshold, decoded.

    Args:
        scores: of one image, for each level, shape (A, K).
        logits: the same, shape (A, 4 * B).

    Returns:
        boxes (M, 4) in float32, scores (M,) and classes (M,).
    """
    boxes, kept, classes = [], [], []
    for scores_l, logits_l, anchors_l in zip(scores, logits, anchors):
        sources = anchors_l.tensor.double().tolist()
        for anchor, class_ in (scores_l > threshold).nonzero().tolist():
            offsets = expected_offsets(logits_l[anchor], grid)
            boxes.append(decode(sources[anchor], offsets, weights))
            kept.append(scores_l[anchor, class_])
            classes.append(class_)
    return torch.tensor(boxes), torch.stack(kept), torch.tensor(classes)
