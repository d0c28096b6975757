"""SimOTA from its definition (YOLOX, 2021; and as MMDetection has it), as dense matrices, one image at a time.

Costs are rounded step by step in the compute dtype; probabilities and logarithms are float64, rounded once.
"""

import numpy as np

from .iou import pair_value
from .task_aligned import inside, positive


def assign_simota(
    pred_logits, pred_objectness, pred_boxes, anchor_points, anchor_strides, gt_boxes, gt_labels, gt_valid, *,
    center_radius=None, topk=10, iou_weight=3.0, dense_scores=True, rule="yolox",
):  # fmt: skip
    """(labels, boxes, scores, foreground, gt_indices) of a batch; a gt whose label is no class counts as not valid."""
    dtype = np.result_type(np.float32, pred_logits, pred_boxes, anchor_points, anchor_strides, gt_boxes)
    images, anchors, classes = pred_logits.shape
    labels = np.full((images, anchors), -1, np.int64)
    indices = labels.copy()
    boxes = np.zeros((images, anchors, 4), gt_boxes.dtype)
    values = np.zeros((images, anchors), dtype)
    mmdet = rule == "mmdet"
    if center_radius is None:
        center_radius = 2.5 if mmdet else 1.5
    if pred_objectness is None:
        pred_objectness = np.ones((images, anchors), pred_logits.dtype)
    usable = gt_valid & (gt_labels >= 0) & (gt_labels < classes)
    for image in range(images):
        rows = np.flatnonzero(usable[image])
        gts = gt_boxes[image][rows].astype(dtype)
        near = are_near(gts, anchor_points.astype(dtype), anchor_strides.astype(dtype), center_radius)
        within = inside(gts, anchor_points.astype(dtype), 0)
        candidates = np.flatnonzero((near | within if mmdet else near).any(0))
        favoured = (near & within if mmdet else near)[:, candidates]
        predicted = pred_boxes[image, candidates].astype(dtype)
        ious, costs = np.zeros((2, len(rows), len(candidates)), dtype)
        for gt, row in enumerate(rows):
            ious[gt] = positive(pair_value("iou", gts[gt], predicted, 0))
            target = np.arange(classes) == gt_labels[image, row]
            of_class = class_cost(pred_logits[image, candidates], pred_objectness[image, candidates], target, mmdet)
            of_iou = -np.log((ious[gt] + dtype.type(1e-7 if mmdet else 1e-8)).astype(np.float64)).astype(dtype)
            with np.errstate(all="ignore"):
                costs[gt] = of_class.astype(dtype) + dtype.type(iou_weight) * of_iou
            costs[gt] += np.where(favoured[gt], dtype.type(0), dtype.type(1e5 if mmdet else 1e6))
        costs[np.isnan(costs)] = np.inf
        claims = np.zeros(costs.shape, bool)
        for gt in range(len(rows)):
            k = max(1, int(np.sort(ious[gt].astype(np.float64))[::-1][:topk].sum()))
            claims[gt, np.argsort(costs[gt], kind="stable")[:k]] = True
        for anchor in np.flatnonzero(claims.sum(0) > 1):
            claims[:, anchor] = False
            claims[np.argmin(costs[:, anchor]), anchor] = True
        for gt, candidate in np.argwhere(claims):
            row, anchor = rows[gt], candidates[candidate]
            labels[image, anchor], indices[image, anchor] = gt_labels[image, row], row
            boxes[image, anchor] = gt_boxes[image, row]
            values[image, anchor] = ious[gt, candidate]
    if not dense_scores:
        return labels, boxes, values, indices >= 0, indices
    scores = np.zeros(pred_logits.shape, dtype)
    for image, anchor in np.argwhere(indices >= 0):
        scores[image, anchor, labels[image, anchor]] = values[image, anchor]
    return labels, boxes, scores, indices >= 0, indices


def are_near(boxes, points, strides, center_radius):
    """[M, A]: whether a point is less than center_radius strides from a box's centre along both axes."""
    with np.errstate(all="ignore"):
        centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        radius = (boxes.dtype.type(center_radius) * strides)[:, None]
        return ((points - (centre - radius) > 0) & ((centre + radius) - points > 0)).all(2)


def class_cost(logits, objectness, target, mmdet):
    """[A]: the binary cross-entropy of sqrt(sigmoid(logits) sigmoid(objectness)), or of the product of the two as
    probabilities, and a one-hot target, in float64."""
    with np.errstate(all="ignore"):
        if mmdet:
            p = np.clip(logits.astype(np.float64), 0, 1) * np.clip(objectness.astype(np.float64), 0, 1)[:, None]
        else:
            p = np.sqrt(sigmoid(logits) * sigmoid(objectness)[:, None])
        present, absent = np.maximum(np.log(p), -100), np.maximum(np.log(1 - p), -100)
    return -np.where(target, present, absent).sum(1)


def sigmoid(x):
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        e = np.exp(-np.abs(x))
        return np.where(x < 0, e, 1) / (1 + e)
