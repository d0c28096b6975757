"""Anchors from their definitions, box by box; k-means in float32 with exact sums."""

import math
from fractions import Fraction

import numpy as np


def grid_anchors(feature_sizes, strides, sizes, aspect_ratios):
    anchors = []
    for (height, width), stride, scales, ratios in zip(feature_sizes, strides, sizes, aspect_ratios, strict=True):
        for row in range(height):
            for column in range(width):
                for ratio in ratios:
                    for scale in scales:
                        w, h = scale / math.sqrt(ratio), scale * math.sqrt(ratio)
                        x, y = column * stride, row * stride
                        anchors.append([x + round(-w / 2), y + round(-h / 2), x + round(w / 2), y + round(h / 2)])
    return np.array(anchors, dtype=np.float64).reshape(-1, 4)


def point_anchors(feature_sizes, strides, offset=0.5):
    points = []
    for (height, width), stride in zip(feature_sizes, strides, strict=True):
        for row in range(height):
            for column in range(width):
                points.append([stride * (column + offset), stride * (row + offset), stride])
    points = np.array(points, dtype=np.float64).reshape(-1, 3)
    return points[:, :2], points[:, 2]


def affinity(size, anchor, metric):
    (w, h), (aw, ah) = size, anchor
    if metric == "iou":
        intersection = min(w, aw) * min(h, ah)
        return intersection / (w * h + aw * ah - intersection)
    if metric == "euclidean":
        return -((w - aw) * (w - aw) + (h - ah) * (h - ah))
    return -max(w / aw, aw / w, h / ah, ah / h)


def assign_sizes(sizes, anchors, metric):
    """The nearest anchor of each size, the lower one at ties, and the affinity to it."""
    labels, affinities = [], []
    for size in sizes:
        values = [affinity(size, anchor, metric) for anchor in anchors]
        labels.append(int(np.argmax(values)))
        affinities.append(values[labels[-1]])
    return np.array(labels, dtype=np.int64), np.array(affinities, dtype=sizes.dtype)


def kmeans_anchors(sizes, start, metric, max_iterations):
    """Lloyd's algorithm; means are exact, and rounded to float64 and then float32."""
    anchors, labels = start.copy(), None
    for iteration in range(max_iterations):
        before, labels = labels, assign_sizes(sizes, anchors, metric)[0]
        if before is not None and (before == labels).all():
            return anchors, iteration + 1
        for k in range(len(anchors)):
            own = sizes[labels == k]
            for axis in range(2):
                if len(own):
                    mean = sum(map(Fraction, own[:, axis].tolist())) / len(own)
                    anchors[k, axis] = np.float32(float(mean))
    return anchors, max_iterations
