"""IoU and its relatives from their definitions.

Boxes are float32 or float64 arrays. In the upright part every operation is one NumPy call on one row of pairs, so that
each step is rounded once in the boxes' dtype. The rotated part works in float64 whatever the dtype.
"""

import numpy as np

KINDS = ("iou", "generalized", "distance", "complete", "efficient", "ioa")


def box_iou(boxes1, boxes2, kind="iou", *, aligned=False, eps=1e-7):
    """[..., N, M] for boxes1 [..., N, 4] and boxes2 [..., M, 4], or aligned: [..., N] for two [..., N, 4]."""
    if aligned:
        return pair_value(kind, boxes1, boxes2, eps)
    batch = np.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    boxes1 = np.broadcast_to(boxes1, (*batch, *boxes1.shape[-2:]))
    boxes2 = np.broadcast_to(boxes2, (*batch, *boxes2.shape[-2:]))
    out = np.empty((*batch, boxes1.shape[-2], boxes2.shape[-2]), boxes1.dtype)
    for image in np.ndindex(*batch):
        for row, box in enumerate(boxes1[image]):
            out[image][row] = pair_value(kind, box, boxes2[image], eps)
    return out


def pair_value(kind, a, b, eps):
    """The value of that kind for boxes a and b, both [..., 4]; the shapes broadcast."""
    assert kind in KINDS
    eps = a.dtype.type(eps)
    with np.errstate(all="ignore"):
        intersection = positive(np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]))
        intersection *= positive(np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]))
        width1, height1 = a[..., 2] - a[..., 0], a[..., 3] - a[..., 1]
        width2, height2 = b[..., 2] - b[..., 0], b[..., 3] - b[..., 1]
        union = width1 * height1 + width2 * height2 - intersection
        iou = intersection / union
        if kind == "iou":
            return iou
        if kind == "ioa":
            return intersection / (width1 * height1)
        around_width = positive(np.maximum(a[..., 2], b[..., 2]) - np.minimum(a[..., 0], b[..., 0]))
        around_height = positive(np.maximum(a[..., 3], b[..., 3]) - np.minimum(a[..., 1], b[..., 1]))
        if kind == "generalized":
            return iou - (around_width * around_height - union) / (around_width * around_height)
        centre_x = (a[..., 0] + a[..., 2]) / 2 - (b[..., 0] + b[..., 2]) / 2
        centre_y = (a[..., 1] + a[..., 3]) / 2 - (b[..., 1] + b[..., 3]) / 2
        diagonal = around_width * around_width + around_height * around_height + eps
        distance = iou - (centre_x * centre_x + centre_y * centre_y) / diagonal
        if kind == "complete":
            # atan is computed in float64, in which its last bits do not matter, and rounded once.
            angle1 = np.arctan((width1 / height1).astype(np.float64)).astype(a.dtype)
            angle2 = np.arctan((width2 / height2).astype(np.float64)).astype(a.dtype)
            v = a.dtype.type(4 / np.pi**2) * ((angle1 - angle2) * (angle1 - angle2))
            distance -= v / (1 - iou + v + eps) * v
        if kind == "efficient":
            wide, high = width1 - width2, height1 - height2
            distance -= wide * wide / (around_width * around_width + eps)
            distance -= high * high / (around_height * around_height + eps)
        return distance


def positive(values):
    """At least 0; NaN stays."""
    return np.maximum(values, 0)


def max_iou(boxes1, boxes2, valid=None):
    """(values, indices), both [N], for boxes1 [N, 4], boxes2 [M, 4] and valid [M].

    The first of the best valid partners; NaN counts as 0; value 0 and index -1 where there is none.
    """
    values, indices = np.zeros(len(boxes1), boxes1.dtype), np.full(len(boxes1), -1)
    for row, box in enumerate(boxes1):
        ious = pair_value("iou", box, boxes2, 0)
        for column in np.flatnonzero(np.ones(len(boxes2)) if valid is None else valid):
            iou = 0 if np.isnan(ious[column]) else ious[column]
            if indices[row] == -1 or iou > values[row]:
                values[row], indices[row] = iou, column
    return values, indices


# Rotated boxes [cx, cy, w, h, r], r in degrees, counter-clockwise as one looks at an image, whose y axis points down.


def corners(boxes):
    """Top left, top right, bottom right and bottom left, [..., 4, 2] in float64, as if turned back by r."""
    x, y, width, height, angle = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)
    cos, sin = cos_sin(angle)
    along = np.stack([cos, -sin], -1) * width[..., None] / 2  # from the centre to the middle of the right side
    down = np.stack([sin, cos], -1) * height[..., None] / 2
    centre = np.stack([x, y], -1)
    return np.stack([centre - along - down, centre + along - down, centre + along + down, centre - along + down], -2)


def cos_sin(angle):
    """Of degrees; the fmod is exact, so that large angles lose nothing. Quarter turns are exact too."""
    angle = np.fmod(angle, 360)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return np.where(np.mod(angle, 180) == 90, 0, cos), np.where(np.mod(angle, 180) == 0, 0, sin)


def clip_polygon(polygon, start, end):
    """The part of a convex polygon, a list of points, to the right of the line from start to end (y points down)."""
    direction = end - start

    def inside(point):
        return direction[0] * (point[1] - start[1]) - direction[1] * (point[0] - start[0])

    kept = []
    for i, point in enumerate(polygon):
        following = polygon[(i + 1) % len(polygon)]
        here, there = inside(point), inside(following)
        if here >= 0:
            kept.append(point)
        if (here < 0) != (there < 0):
            kept.append(point + here / (here - there) * (following - point))
    return kept


def polygon_area(polygon):
    """The shoelace formula."""
    twice = 0.0
    for i, (x, y) in enumerate(polygon):
        next_x, next_y = polygon[(i + 1) % len(polygon)]
        twice += x * next_y - next_x * y
    return abs(twice) / 2


def rotated_iou(box1, box2):
    """Of two boxes [5] in float64: Sutherland and Hodgman's clipping of one polygon by the sides of the other.

    NaN for NaN or infinite coordinates and for 0 / 0; boxes without a positive width and height intersect nothing.
    """
    box1, box2 = np.array(box1, np.float64), np.array(box2, np.float64)
    if not (np.isfinite(box1).all() and np.isfinite(box2).all()):
        return np.nan
    box2[:2] -= box1[:2]  # the origin is arbitrary, and differences of far-away centres are exact
    box1[:2] = 0
    area1, area2 = box1[2] * box1[3], box2[2] * box2[3]
    intersection = 0.0
    reach = (np.hypot(*box1[2:4]) + np.hypot(*box2[2:4])) / 2  # of the circles around the boxes, to save time
    if min(*box1[2:4], *box2[2:4]) > 0 and np.hypot(*box2[:2]) <= reach:
        polygon, sides = list(corners(box1)), corners(box2)
        for i in range(4):
            polygon = clip_polygon(polygon, sides[i], sides[(i + 1) % 4])
        intersection = min(polygon_area(polygon), area1, area2)
    union = area1 + area2 - intersection
    return intersection / union if union != 0 else np.nan


def rotated_box_iou(boxes1, boxes2, *, aligned=False):
    """float64 [..., N, M] for boxes1 [..., N, 5] and boxes2 [..., M, 5], or aligned: [..., N] for two [..., N, 5]."""
    if not aligned:
        boxes1, boxes2 = boxes1[..., :, None, :], boxes2[..., None, :, :]
    boxes1, boxes2 = np.broadcast_arrays(boxes1, boxes2)
    out = np.empty(boxes1.shape[:-1])
    for pair in np.ndindex(*out.shape):
        out[pair] = rotated_iou(boxes1[pair], boxes2[pair])
    return out


def nms_rotated(boxes, scores, iou_threshold, idxs=None, ious=None):
    """Indices of the kept boxes, int64 [K]. Higher scores rank first, NaN above all, then lower indices.

    `ious` [N, N] are the IoUs of each box with each if they are known, else they are computed in float64.
    """
    ious = rotated_box_iou(boxes, boxes) if ious is None else ious
    order = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -np.nan_to_num(scores[i], nan=0), i))
    keep = []
    for candidate in order:
        rivals = [kept for kept in keep if idxs is None or idxs[kept] == idxs[candidate]]
        if not any(float(ious[kept, candidate]) > iou_threshold for kept in rivals):
            keep.append(candidate)
    return np.array(keep, np.int64)
