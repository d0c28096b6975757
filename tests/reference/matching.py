"""Matching from its definitions: naive loops over one image, with given IoUs.

IoUs are matrices [M, A] of the valid ground-truth boxes and the anchors, float32 or float64; NaN counts as 0.
"""

import numpy as np

from .iou import pair_value

BELOW_LOW, BETWEEN = -1, -2


def iou_matrix(gt_boxes, anchors, kind="iou"):
    """[M, A] in the boxes' dtype; NaN as 0."""
    rows = [pair_value(kind, gt, anchors, 0) for gt in gt_boxes]
    matrix = np.array(rows, anchors.dtype).reshape(len(gt_boxes), len(anchors))
    return np.where(np.isnan(matrix), 0, matrix)


def match_matrix(quality, high, low, allow_low_quality=False, this_gt=False, min_iou=0.0, all_ties=True, ignored=None):
    """(indices, best) of all anchors: the row of the matrix, -1 or -2, and the best quality."""
    gts, count = quality.shape
    dtype = quality.dtype.type
    ignored = np.zeros(count, bool) if ignored is None else ignored
    indices, own, best = np.full(count, BELOW_LOW), np.full(count, -1), np.zeros(count, dtype)
    for a in range(count):
        for g in range(gts):
            if own[a] < 0 or quality[g, a] > best[a]:
                own[a], best[a] = g, quality[g, a]
        if gts and best[a] >= dtype(low):
            indices[a] = own[a] if best[a] >= dtype(high) else BETWEEN
        if ignored[a]:
            indices[a] = BETWEEN
    for g in range(gts if allow_low_quality else 0):
        counted = [a for a in range(count) if not ignored[a]]
        if not counted:
            continue
        top = max(quality[g, a] for a in counted)
        if not top >= dtype(min_iou):
            continue
        tied = [a for a in counted if quality[g, a] == top]
        for a in tied if all_ties else tied[:1]:
            indices[a] = g if this_gt else own[a]
    return indices, best


def Matcher(quality, high, low, allow_low_quality_matches=False):
    """The indices for a given matrix, float32 or float64, whose qualities may be negative too."""
    quality = np.where(np.isnan(quality), 0, quality)
    shift = min(0, quality.min(initial=0))  # the rules above start from 0
    assert quality.size == 0 or shift == 0 or np.array_equal(quality, np.round(quality)), "shifted without rounding"
    return match_matrix(quality - shift, high - shift, low - shift, allow_low_quality_matches)[0]


def match_max_iou(anchors, gt_boxes, gt_valid, high, low, *, ignore_boxes=None, ignore_threshold=0.5, **options):
    """The same for one image, where row numbers count the boxes that are not valid too."""
    rows = np.flatnonzero(gt_valid)
    ignored = np.zeros(len(anchors), bool)
    for region in [] if ignore_boxes is None else ignore_boxes:
        with np.errstate(all="ignore"):
            ignored |= pair_value("ioa", anchors, region, 0) > anchors.dtype.type(ignore_threshold)
    quality = iou_matrix(gt_boxes[rows], anchors)
    indices, best = match_matrix(quality, high, low, ignored=ignored, **options)
    return np.array([rows[i] if i >= 0 else i for i in indices], np.int64), best


def match_ssd(anchors, gt_boxes, gt_valid, threshold=0.5):
    """Each box in turn takes its first best anchor."""
    rows = np.flatnonzero(gt_valid)
    quality = iou_matrix(gt_boxes[rows], anchors)
    indices, best = match_matrix(quality, threshold, threshold)
    for g in range(len(rows)):
        if len(anchors):
            indices[max(range(len(anchors)), key=lambda a: (quality[g, a], -a))] = g
    return np.array([rows[i] if i >= 0 else i for i in indices], np.int64), best


def assign_atss(anchors, level_sizes, gt_boxes, gt_valid, topk=9):
    """(indices, ious) for one image."""
    dtype = anchors.dtype.type
    indices, ious = np.full(len(anchors), -1), np.zeros(len(anchors), dtype)
    with np.errstate(all="ignore"):
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        for row in np.flatnonzero(gt_valid):
            gt = gt_boxes[row]
            apart = centres - (gt[:2] + gt[2:]) / 2
            distances = apart[:, 0] * apart[:, 0] + apart[:, 1] * apart[:, 1]
            distances = np.where(np.isnan(distances), np.inf, distances)
            candidates, first = [], 0
            for size in level_sizes:
                level = range(first, first + size)
                candidates += sorted(level, key=lambda a, distances=distances: (distances[a], a))[:topk]
                first += size
            own = iou_matrix(gt[None], anchors[candidates])[0]
            wide = [float(iou) for iou in own]
            mean = sum(wide) / len(wide)
            deviation = np.sqrt(sum((iou - mean) * (iou - mean) for iou in wide) / np.float64(len(wide) - 1))
            threshold = dtype(mean + deviation)
            for anchor, iou in zip(candidates, own, strict=True):
                inside = np.concatenate([centres[anchor] - gt[:2], gt[2:] - centres[anchor]]) > dtype(0.01)
                if iou >= threshold and inside.all() and (indices[anchor] < 0 or iou > ious[anchor]):
                    indices[anchor], ious[anchor] = row, iou
    return indices, ious


def sample_matches(matches, keys, batch_size_per_image, most_positives):
    """(indices, positive count, count) of one image, the smallest keys first drawn."""
    drawn = []
    for kind, limit in ((matches >= 0, most_positives), (matches == -1, batch_size_per_image)):
        ranked = sorted(np.flatnonzero(kind), key=lambda a: (keys[a], a))
        drawn.append(sorted(ranked[: min(limit, batch_size_per_image - len(sum(drawn, [])))]))
    flat = sum(drawn, [])
    return flat + [-1] * (batch_size_per_image - len(flat)), len(drawn[0]), len(flat)
