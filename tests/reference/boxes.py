"""Box utilities from their definition."""

import numpy as np


def pad_ground_truth(boxes, labels):
    """Lists of [n_i, 4] and [n_i] as arrays (boxes [B, M, 4], labels [B, M], valid [B, M]), M = max n_i.

    Rows past n_i hold box 0, label -1 and valid False.
    """
    rows = max((len(image_labels) for image_labels in labels), default=0)
    out_boxes = np.zeros((len(boxes), rows, 4), boxes[0].dtype if boxes else np.float32)
    out_labels = np.full((len(boxes), rows), -1, np.int64)
    valid = np.zeros((len(boxes), rows), bool)
    for image, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        for row in range(len(image_labels)):
            out_boxes[image, row] = image_boxes[row]
            out_labels[image, row] = image_labels[row]
            valid[image, row] = True
    return out_boxes, out_labels, valid


def box_area(boxes, fmt="xyxy"):
    """Width times height of each box of [..., K], rounded at every step; of "xyxyxyxy" the first two sides' product."""
    boxes = np.asarray(boxes)
    areas = np.zeros(boxes.shape[:-1], boxes.dtype)
    for i in np.ndindex(areas.shape):
        if fmt == "xyxy":
            x1, y1, x2, y2 = boxes[i]
            areas[i] = (x2 - x1) * (y2 - y1)
        elif fmt == "xyxyxyxy":
            x1, y1, x2, y2, x3, y3 = boxes[i][:6]
            areas[i] = abs((x2 - x1) * (y3 - y2) - (y2 - y1) * (x3 - x2))
        else:
            areas[i] = boxes[i][2] * boxes[i][3]
    return areas


def box_convert(boxes, in_fmt, out_fmt):
    """Each box of [..., K] by way of its corners, rounded at every step; rotated ones by way of their centre."""
    boxes = np.asarray(boxes)
    if in_fmt == out_fmt:
        return boxes.copy()
    length = {"xywhr": 5, "cxcywhr": 5, "xyxyxyxy": 8}.get(out_fmt, 4)
    out = np.zeros((*boxes.shape[:-1], length), boxes.dtype)
    for i in np.ndindex(boxes.shape[:-1]):
        if length == 4:
            out[i] = _from_corners(_to_corners(boxes[i], in_fmt), out_fmt)
        else:
            out[i] = _from_centre(_to_centre(boxes[i].astype(np.float64), in_fmt), out_fmt)
    return out


def _to_corners(box, fmt):
    a, b, c, d = box
    if fmt == "xywh":
        return a, b, a + c, b + d
    if fmt == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return a, b, c, d


def _from_corners(corners, fmt):
    x1, y1, x2, y2 = corners
    if fmt == "xywh":
        return x1, y1, x2 - x1, y2 - y1
    if fmt == "cxcywh":
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return x1, y1, x2, y2


def _turn(x, y, r):
    """The vector (x, y) turned by r degrees, counter-clockwise where y points down."""
    cos, sin = np.cos(np.radians(r)), np.sin(np.radians(r))
    return np.array([x * cos + y * sin, y * cos - x * sin])


def _to_centre(box, fmt):
    """(centre, w, h, r) of a rotated box."""
    if fmt == "xyxyxyxy":
        corners = box.reshape(4, 2)
        across, down = corners[1] - corners[0], corners[2] - corners[1]
        r = np.degrees(np.arctan2(-across[1], across[0]))
        w, h = np.hypot(*across), np.hypot(*down)
        return corners[0] + _turn(w / 2, h / 2, r), w, h, r
    x, y, w, h, r = box
    return np.array([x, y]) + (_turn(w / 2, h / 2, r) if fmt == "xywhr" else 0), w, h, r


def _from_centre(parts, fmt):
    centre, w, h, r = parts
    if fmt == "xyxyxyxy":
        return np.concatenate(
            [centre + _turn(x * w / 2, y * h / 2, r) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        )
    return [*(centre + (_turn(-w / 2, -h / 2, r) if fmt == "xywhr" else 0)), w, h, r]


def clip_boxes_to_image(boxes, size):
    """Every x of [..., 4] into [0, width], every y into [0, height]; NaN stays."""
    height, width = size
    out = np.array(boxes)
    for i in np.ndindex(out.shape):
        limit = height if i[-1] % 2 else width
        if out[i] < 0:
            out[i] = 0
        elif out[i] > limit:
            out[i] = limit
    return out


def remove_small_boxes(boxes, min_size):
    """The rows of [N, 4] whose two sides are at least min_size, in the dtype of the boxes."""
    boxes = np.asarray(boxes)
    least = boxes.dtype.type(min_size)
    rows = [i for i, (x1, y1, x2, y2) in enumerate(boxes) if x2 - x1 >= least and y2 - y1 >= least]
    return np.array(rows, np.int64)


def masks_to_boxes(masks):
    """The extreme columns and rows of the non-zero pixels of each mask of [..., H, W]; zeros where there is none."""
    masks = np.asarray(masks)
    boxes = np.zeros((*masks.shape[:-2], 4), np.float32)
    for i in np.ndindex(boxes.shape[:-1]):
        pixels = [(x, y) for y, row in enumerate(masks[i]) for x, pixel in enumerate(row) if pixel != 0]
        if pixels:
            columns, rows = zip(*pixels, strict=True)
            boxes[i] = min(columns), min(rows), max(columns), max(rows)
    return boxes
