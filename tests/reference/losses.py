"""The losses from their formulas, one at a time, in float64. All give one loss for each element, row or pair of boxes.

Naming follows the papers: p = sigmoid(x), t the target.
"""

import math

import numpy as np


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))), exact to the last digits for large |x| too."""
    return -float(np.logaddexp(0.0, -x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def binary_cross_entropy(x, t):
    """-t log(p) - (1 - t) log(1 - p)."""
    return (-t * log_sigmoid(x) if t != 0 else 0.0) + (-(1 - t) * log_sigmoid(-x) if t != 1 else 0.0)


def dense(one_loss, inputs, targets):
    """one_loss(x, t) for all elements of arrays of one shape."""
    losses = [one_loss(float(x), float(t)) for x, t in zip(inputs.ravel(), targets.ravel(), strict=True)]
    return np.array(losses, dtype=np.float64).reshape(inputs.shape)


def by_class(one_loss, inputs, classes, scores=None):
    """The same for class targets: the target is 1, or the row's score, at its class, and rows of class -1 lose 0."""
    losses = np.zeros(inputs.shape, dtype=np.float64)
    for row in np.ndindex(classes.shape):
        for c in range(inputs.shape[-1]):
            target = (1.0 if scores is None else float(scores[row])) if classes[row] == c else 0.0
            if classes[row] != -1:
                losses[row][c] = one_loss(float(inputs[row][c]), target)
    return losses


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2):
    def one_loss(x, t):
        p, q = sigmoid(x), sigmoid(-x)
        weight = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0
        return weight * (p * (1 - t) + q * t) ** gamma * binary_cross_entropy(x, t)

    return (by_class if np.issubdtype(targets.dtype, np.integer) else dense)(one_loss, inputs, targets)


def quality_focal_loss(inputs, targets, scores, beta=2.0):
    def one_loss(x, t):
        return abs(t - sigmoid(x)) ** beta * binary_cross_entropy(x, t)

    return by_class(one_loss, inputs, targets, scores)


def varifocal_loss(inputs, targets, alpha=0.75, gamma=2.0):
    def one_loss(x, t):
        return (t if t > 0 else alpha * sigmoid(x) ** gamma) * binary_cross_entropy(x, t)

    return dense(one_loss, inputs, targets)


def distribution_focal_loss(inputs, targets):
    losses = np.zeros(targets.shape, dtype=np.float64)
    for row in np.ndindex(targets.shape):
        x, y = inputs[row].astype(np.float64), float(targets[row])
        log_s = x - np.logaddexp.reduce(x)
        left = min(math.floor(y), len(x) - 2)
        losses[row] = -(left + 1 - y) * log_s[left] - (y - left) * log_s[left + 1]
    return losses


# Boxes. `one_loss` gets two boxes as float64 scalars, which divide by 0 as IEEE 754 says.


def by_pair(one_loss, boxes1, boxes2, eps):
    """The loss of two boxes without area is 1."""
    losses = np.zeros(boxes1.shape[:-1], dtype=np.float64)
    with np.errstate(all="ignore"):
        for pair in np.ndindex(losses.shape):
            a, b = boxes1[pair].astype(np.float64), boxes2[pair].astype(np.float64)
            losses[pair] = 1 if has_no_area(a) and has_no_area(b) else one_loss(a, b, eps)
    return losses


def has_no_area(box):
    return np.isfinite(box).all() and (box[0] == box[2] or box[1] == box[3])


def is_point(box):
    return box[0] == box[2] and box[1] == box[3]


def areas(a, b):
    """(intersection, union); boxes that only touch do not intersect."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = width * height if width > 0 and height > 0 else np.float64(0)
    return intersection, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection


def one_minus_iou(a, b, eps):
    intersection, union = areas(a, b)
    return 1 - intersection / (union + eps)


def sides_around(a, b):
    return max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])


def offset(a, b):
    return (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2


def generalized_box_iou_loss(boxes1, boxes2, eps=1e-7):
    def one_loss(a, b, eps):
        width, height = sides_around(a, b)
        return one_minus_iou(a, b, eps) + (width * height - areas(a, b)[1]) / (width * height + eps)

    return by_pair(one_loss, boxes1, boxes2, eps)


def one_distance_loss(a, b, eps):
    (width, height), (dx, dy) = sides_around(a, b), offset(a, b)
    return one_minus_iou(a, b, eps) + (dx**2 + dy**2) / (width**2 + height**2 + eps)


def distance_box_iou_loss(boxes1, boxes2, eps=1e-7):
    return by_pair(one_distance_loss, boxes1, boxes2, eps)


def complete_box_iou_loss(boxes1, boxes2, eps=1e-7):
    def one_loss(a, b, eps):
        if is_point(a) or is_point(b):  # which has no aspect ratio
            return one_distance_loss(a, b, eps)
        angles = [np.arctan((box[2] - box[0]) / (box[3] - box[1])) for box in (a, b)]
        v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
        return one_distance_loss(a, b, eps) + v / (one_minus_iou(a, b, eps) + v + eps) * v

    return by_pair(one_loss, boxes1, boxes2, eps)


def efficient_box_iou_loss(boxes1, boxes2, eps=1e-7):
    def one_loss(a, b, eps):
        loss = one_distance_loss(a, b, eps)
        for axis, around in enumerate(sides_around(a, b)):
            loss += ((a[axis + 2] - a[axis]) - (b[axis + 2] - b[axis])) ** 2 / (around**2 + eps)
        return loss

    return by_pair(one_loss, boxes1, boxes2, eps)


def siou_loss(boxes1, boxes2, eps=1e-7):
    def one_loss(a, b, eps):
        offsets = offset(a, b)
        squared = offsets[0] ** 2 + offsets[1] ** 2
        angle = np.sin(2 * np.arctan2(abs(offsets[1]), abs(offsets[0]))) * squared / (squared + eps)
        distance = shape = 0
        for axis, around in enumerate(sides_around(a, b)):
            distance += 1 - np.exp(-(2 - angle) * offsets[axis] ** 2 / (around**2 + eps))
            sides = a[axis + 2] - a[axis], b[axis + 2] - b[axis]
            shape += (1 - np.exp(-abs(sides[0] - sides[1]) / (max(sides) + eps))) ** 4
        return one_minus_iou(a, b, eps) + (distance + shape) / 2

    return by_pair(one_loss, boxes1, boxes2, eps)
