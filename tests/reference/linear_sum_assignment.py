"""Optimal assignments from their definition: by trying all of them."""

import itertools

import numpy as np

from .iou import pair_value


def linear_sum_assignment(cost):
    """(pairs, total) of the best assignments of targets to queries, cost [Q, T]: the largest number of allowed pairs,
    and the least sum that so many can have. For tiny problems with costs whose sums are exact."""
    queries, targets = cost.shape
    rows = cost.T if targets <= queries else cost
    best = (0, 0.0)
    for columns in itertools.permutations(range(max(queries, targets)), min(queries, targets)):
        chosen = np.array([rows[row, column] for row, column in enumerate(columns)], np.float64)
        allowed = chosen[np.isfinite(chosen)]
        found = (-len(allowed), float(allowed.sum()))
        best = min(best, found)
    return -best[0], best[1]


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
    """(pairs, sum) of the pairs of an assignment, cost [Q, T]."""
    pairs = [(query, target) for target, query in enumerate(found) if query >= 0]
    return len(pairs), float(sum(np.float64(cost[query, target]) for query, target in pairs))


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
            giou = pair_value("generalized", cornered(box, fmt), cornered(gt, fmt), 0)
            cost[q, t] = l1_weight * l1 + class_weight * of_class[q, gt_labels[t]] + giou_weight * -giou
    return cost


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
