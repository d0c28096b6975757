"""Optimal assignments from their definition: by trying all of them."""

import itertools
from fractions import Fraction

import numpy as np

from .iou import pair_value


def linear_sum_assignment(cost):
    """(pairs, total) of the best assignments of targets to queries, cost [Q, T]: the largest number of pairs of finite
    costs, and the least sum that so many can have, exact. For tiny problems."""
    queries, targets = cost.shape
    rows = cost.T if targets <= queries else cost
    best = (0, Fraction(0))
    for columns in itertools.permutations(range(max(queries, targets)), min(queries, targets)):
        chosen = [rows[row, column] for row, column in enumerate(columns)]
        best = min(best, ranked([each for each in chosen if np.isfinite(each)]))
    return -best[0], best[1]


def ranked(costs):
    """What is least of the best assignment, of the finite costs of its pairs."""
    return -len(costs), sum(map(Fraction, map(float, costs)), Fraction(0))


def is_assignment(found, queries, count):
    """True if no query is taken twice and no target beyond the first `count` has one."""
    used = found[found >= 0]
    return (
        len(set(used.tolist())) == len(used)
        and (used < queries).all()
        and (found[count:] == -1).all()
        and (found >= -1).all()
    )


def total_cost(cost, found):
    """(pairs, sum) of the pairs of an assignment that have a finite cost, cost [Q, T]."""
    pairs = [cost[query, target] for target, query in enumerate(found) if query >= 0]
    count, total = ranked([each for each in pairs if np.isfinite(each)])
    return -count, total


def match_detr(
    logits, boxes, gt_boxes, gt_labels, *, class_cost="softmax", weights=(1.0, 5.0, 2.0), alpha=0.25, gamma=2.0,
    fmt="cxcywh",
):  # fmt: skip
    """The costs [Q, M] of one image, all of whose boxes are valid; arrays of float32 or float64. Weights: class, L1,
    GIoU. The class cost is computed in float64 and rounded, the rest step by step in the arrays' dtype."""
    dtype = logits.dtype.type
    class_weight, l1_weight, giou_weight = map(dtype, weights)
    wide = logits.astype(np.float64)
    if class_cost == "softmax":
        exps = np.exp(wide - wide.max(1, keepdims=True))
        of_class = -exps / exps.sum(1, keepdims=True)
    else:
        with np.errstate(over="ignore"):
            p, absent = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
        of_class = alpha * absent**gamma * -np.log(p + 1e-8) - (1 - alpha) * p**gamma * -np.log(absent + 1e-8)
    of_class = of_class.astype(dtype)
    cost = np.empty((len(boxes), len(gt_boxes)), dtype)
    for q, box in enumerate(boxes):
        for t, gt in enumerate(gt_boxes):
            apart = np.abs(centred(box, fmt) - centred(gt, fmt))
            l1 = apart[0] + apart[1] + apart[2] + apart[3]
            giou = generalized(cornered(box, fmt), cornered(gt, fmt))
            cost[q, t] = l1_weight * l1 + class_weight * of_class[q, gt_labels[t]] + giou_weight * -giou
    return cost


def generalized(a, b):
    """The generalized IoU, with IoU 0 of two boxes without area, from which a box around both without area takes
    nothing."""
    sides = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    if sides != [0, 0]:
        return pair_value("generalized", a, b, 0)
    around = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    return a.dtype.type(-1 if around[0] * around[1] > 0 else 0)


def centred(box, fmt):
    if fmt == "cxcywh":
        return box
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]], box.dtype)


def cornered(box, fmt):
    if fmt == "xyxy":
        return box
    return np.array([box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2], box.dtype)


def cheapest(cost):
    """The query of each target for cost [Q, T], all finite, T <= Q, where the best assignment is unique: target after
    target, along the shortest augmenting path in the graph of what is assigned so far (Bellman and Ford)."""
    queries, targets = cost.shape
    cost = cost.astype(np.float64)
    found = np.full(targets, -1)
    for start in range(targets):
        length, through = np.full(queries, np.inf), np.full(queries, -1)  # to a query, by way of which target
        to_target = np.full(targets, np.inf)
        to_target[start] = 0
        for _ in range(targets):
            for target in np.flatnonzero(np.isfinite(to_target)):
                shorter = to_target[target] + cost[:, target] < length - 1e-12  # a cycle of rounding errors is none
                length[shorter], through[shorter] = to_target[target] + cost[shorter, target], target
            for target in np.flatnonzero(found >= 0):
                to_target[target] = length[found[target]] - cost[found[target], target]
        free = np.setdiff1d(np.arange(queries), found)
        query = free[np.argmin(length[free])]
        while query >= 0:
            target = through[query]
            found[target], query = query, found[target]
    return found
