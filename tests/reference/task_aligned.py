"""Task-aligned assignment from its definition (TOOD, ICCV 2021), as dense matrices, one image at a time.

Every step is rounded once in the compute dtype, that of `boxes`; powers are taken in float64 and rounded once.
"""

import numpy as np

from .iou import pair_value


def assign_task_aligned(
    pred_scores, pred_boxes, anchor_points, gt_labels, gt_boxes, gt_valid, *,
    topk=10, topk2=None, alpha=0.5, beta=6.0, iou="ciou", min_size=None, eps=1e-9, dense_scores=True,
    candidates="inside", with_metrics=False,
):  # fmt: skip
    """(labels, boxes, scores, foreground, gt_indices) of a batch, and (metrics, overlaps) if asked for.

    A gt whose label is no class counts as not valid. By the rule "all" every anchor has a metric, and a gt keeps those
    of its best whose metric is above 0 and whose point is inside of the box."""
    dtype = np.result_type(np.float32, pred_scores, pred_boxes, anchor_points, gt_boxes)
    images, anchors, classes = pred_scores.shape
    labels = np.full((images, anchors), -1, np.int64)
    indices = labels.copy()
    boxes = np.zeros((images, anchors, 4), gt_boxes.dtype)
    values, of_anchors = np.zeros((images, anchors), dtype), np.zeros((2, images, anchors), dtype)
    every = candidates == "all"
    usable = gt_valid & (gt_labels >= 0) & (gt_labels < classes)
    for image in range(images):
        rows = np.flatnonzero(usable[image])
        gts = gt_boxes[image][rows].astype(dtype)
        held = inside(candidate_regions(gts, min_size), anchor_points.astype(dtype), 0.01 if every else 1e-9)
        metrics, overlaps = np.zeros((2, len(rows), anchors), dtype)
        kind = {"ciou": "complete", "iou": "iou"}[iou]
        for gt, row in enumerate(rows):
            value = pair_value(kind, gts[gt], pred_boxes[image].astype(dtype), 1e-7)
            overlaps[gt] = np.where(held[gt] | every, positive(value), 0)
            score = pred_scores[image, :, gt_labels[image, row]].astype(dtype)
            with np.errstate(all="ignore"):
                metric = power(score, alpha) * power(overlaps[gt], beta)
            metrics[gt] = np.where(held[gt] | every, positive(metric), 0)
        claims = best(metrics, topk) & held
        if every:
            claims &= metrics > 0
        for anchor in np.flatnonzero(claims.sum(0) > 1):
            holders = np.flatnonzero(claims[:, anchor] if every else held[:, anchor])
            claims[:, anchor] = False
            claims[holders[np.argmax(overlaps[holders, anchor])], anchor] = True
        if topk2 is not None and topk2 < topk:
            claims &= best(np.where(claims, metrics, 0), topk2)
        metrics, overlaps = np.where(claims, metrics, 0), np.where(claims, overlaps, 0)
        for gt, anchor in np.argwhere(claims):
            row = rows[gt]
            labels[image, anchor], indices[image, anchor] = gt_labels[image, row], row
            boxes[image, anchor] = gt_boxes[image, row]
            of_anchors[:, image, anchor] = metrics[gt, anchor], overlaps[gt, anchor]
            with np.errstate(all="ignore"):
                score = metrics[gt, anchor] * overlaps[gt].max() / (metrics[gt].max() + dtype.type(eps))
            values[image, anchor] = score
    extra = tuple(of_anchors) if with_metrics else ()
    if not dense_scores:
        return labels, boxes, values, indices >= 0, indices, *extra
    scores = np.zeros(pred_scores.shape, dtype)
    for image, anchor in np.argwhere(indices >= 0):
        scores[image, anchor, labels[image, anchor]] = values[image, anchor]
    return labels, boxes, scores, indices >= 0, indices, *extra


def candidate_regions(boxes, min_size):
    """Boxes with sides of at least `min_size`, about their middle."""
    boxes = boxes.copy()
    if min_size is None:
        return boxes
    for low, high in ((0, 2), (1, 3)):
        with np.errstate(all="ignore"):
            short = boxes[:, high] - boxes[:, low] < boxes.dtype.type(min_size)
            centre = (boxes[:, low] + boxes[:, high]) / 2
        half = boxes.dtype.type(min_size) / 2
        boxes[:, low] = np.where(short, centre - half, boxes[:, low])
        boxes[:, high] = np.where(short, centre + half, boxes[:, high])
    return boxes


def inside(boxes, points, margin):
    """[M, A]: whether the point is inside of the box, by more than `margin`."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    with np.errstate(all="ignore"):
        distances = np.concatenate([points[None] - low, high - points[None]], axis=2)
        return (distances > boxes.dtype.type(margin)).all(2)


def best(values, count):
    """[M, A]: which are among the `count` largest of their row, ties to the lower index."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def power(values, exponent):
    return (values.astype(np.float64) ** exponent).astype(values.dtype)


def positive(values):
    """max(values, 0), with 0 for NaN."""
    return np.where(values > 0, values, values.dtype.type(0))
