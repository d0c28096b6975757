"""NMS from its definition: go through the boxes from the best score down; keep a box unless a kept box overlaps it.

Boxes are float32 or float64 arrays (float16 is widened; bfloat16 callers pass their float32 copy). Every operation is
one NumPy call, so that every step is rounded once, as in C++ compiled without contraction.
"""

import numpy as np


def iou(box, others):
    """IoU of one box [4] with each of `others` [..., 4]; NaN where it is 0/0 or where a coordinate is NaN."""
    with np.errstate(all="ignore"):
        width = np.maximum(np.minimum(box[2], others[..., 2]) - np.maximum(box[0], others[..., 0]), 0)
        height = np.maximum(np.minimum(box[3], others[..., 3]) - np.maximum(box[1], others[..., 1]), 0)
        inter = width * height
        area = (box[2] - box[0]) * (box[3] - box[1])
        areas = (others[..., 2] - others[..., 0]) * (others[..., 3] - others[..., 1])
        return inter / (area + areas - inter)


def suppresses(box, others, iou_threshold):
    """Strictly greater, the threshold a double: 0.1 rounded to float32 is above 0.1. False where the IoU is NaN."""
    return iou(box, others).astype(np.float64) > iou_threshold


def ranking(scores):
    """Indices by descending score; NaN first; equal scores (-0.0 equals 0.0) by ascending index."""
    nan = np.isnan(scores)
    numbers = np.flatnonzero(~nan)
    return np.concatenate([np.flatnonzero(nan), numbers[np.argsort(-scores[numbers], kind="stable")]])


def nms(boxes, scores, iou_threshold):
    """Indices of the kept boxes, int64 [K], in the order of `ranking`."""
    order = ranking(scores)
    boxes = _widen(boxes)[order]
    alive = np.ones(len(boxes), dtype=bool)
    keep = []
    for rank in range(len(boxes)):
        if alive[rank]:
            keep.append(order[rank])
            alive[rank + 1 :] &= ~suppresses(boxes[rank], boxes[rank + 1 :], iou_threshold)
    return np.array(keep, dtype=np.int64)


def nms_by_pairs(boxes, scores, iou_threshold):
    """The same, one pair at a time and one kept list, which judges `nms` above on small inputs."""
    boxes = _widen(boxes)
    keep = []
    for candidate in ranking(scores):
        if not any(suppresses(boxes[kept], boxes[candidate], iou_threshold) for kept in keep):
            keep.append(candidate)
    return np.array(keep, dtype=np.int64)


def batched_nms(boxes, scores, idxs, iou_threshold):
    """`nms` of each class by itself; the kept boxes of all classes in the order of `ranking`."""
    kept = np.zeros(len(boxes), dtype=bool)
    for class_id in np.unique(idxs):
        members = np.flatnonzero(idxs == class_id)
        kept[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    order = ranking(scores)
    return order[kept[order]].astype(np.int64)


def multiclass_nms(
    boxes,
    scores,
    *,
    iou_threshold=0.5,
    score_threshold=0.05,
    max_detections=100,
    max_candidates=None,
    class_agnostic=False,
):
    """Arrays (boxes [B, K, 4], scores [B, K], labels [B, K], indices [B, K], counts [B]) with K = max_detections.

    boxes [B, N, 4] or [B, N, C, 4], scores [B, N, C]. The threshold is rounded to the dtype of `scores`; callers who
    pass float32 copies of half scores round it to half themselves.
    """
    batch = scores.shape[0]
    threshold = scores.dtype.type(score_threshold)
    out_boxes = np.zeros((batch, max_detections, 4), boxes.dtype)
    out_scores = np.zeros((batch, max_detections), scores.dtype)
    labels = np.full((batch, max_detections), -1, np.int64)
    indices = np.full((batch, max_detections), -1, np.int64)
    counts = np.zeros(batch, np.int64)
    for image in range(batch):
        # Pairs in the order (index, class), which is what breaks ties.
        index, label = np.nonzero(scores[image] > threshold)
        score = scores[image, index, label]
        best = ranking(score)[:max_candidates]
        index, label, score = index[best], label[best], score[best]
        pair_boxes = boxes[image, index] if boxes.ndim == 3 else boxes[image, index, label]
        group = np.zeros_like(label) if class_agnostic else label
        keep = batched_nms(pair_boxes, score, group, iou_threshold)[:max_detections]
        count = counts[image] = len(keep)
        out_boxes[image, :count] = pair_boxes[keep]
        out_scores[image, :count] = score[keep]
        labels[image, :count] = label[keep]
        indices[image, :count] = index[keep]
    return out_boxes, out_scores, labels, indices, counts


def _widen(boxes):
    return boxes.astype(np.float32) if boxes.dtype == np.float16 else boxes
