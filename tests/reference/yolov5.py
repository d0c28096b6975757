"""The target assignment of YOLOv5 from its definition, one (cell, anchor, gt) after the other."""

import numpy as np

OFFSETS = ((0, 0), (0.5, 0), (0, 0.5), (-0.5, 0), (0, -0.5))  # of own, left, upper, right and lower cell


def assign_yolov5(gt_boxes, gt_labels, gt_valid, anchors, grid_sizes, ratio_threshold=4.0):
    """For each level rows (label, box, (image, anchor, y, x), gt). Boxes are cxcywh in shares, anchors in cells."""
    dtype = gt_boxes.dtype.type
    levels = []
    for of_level, (height, width) in zip(anchors, grid_sizes, strict=True):
        rows = []
        for number, offset in enumerate(OFFSETS):
            for anchor, sides in enumerate(of_level):
                for image, gt in np.ndindex(*gt_labels.shape):
                    if not gt_valid[image, gt]:
                        continue
                    with np.errstate(all="ignore"):
                        box = gt_boxes[image, gt] * np.array([width, height, width, height], dtype)
                        ratio = box[2:] / sides.astype(dtype)
                        matches = np.isfinite(box).all() and (box[2:] > 0).all() and (sides > 0).all()
                        matches = matches and np.maximum(ratio, 1 / ratio).max() < dtype(ratio_threshold)
                    if not matches or not takes(number, box, width, height, dtype):
                        continue
                    places = box[:2] - np.array(offset, dtype)
                    x, y = (
                        min(max(int(place), 0), size - 1) for place, size in zip(places, (width, height), strict=True)
                    )
                    target = np.concatenate([box[:2] - np.array([x, y], dtype), box[2:]])
                    rows.append((gt_labels[image, gt], target, (image, anchor, y, x), gt))
        levels.append(rows)
    return levels


def takes(number, box, width, height, dtype):
    """Whether the centre is in that half of its cell, and further than 1 from that border."""
    if number == 0:
        return True
    position = {1: box[0], 2: box[1], 3: dtype(width) - box[0], 4: dtype(height) - box[1]}[number]
    with np.errstate(all="ignore"):
        return position > 1 and np.mod(position, dtype(1)) < 0.5
