"""Targets on a grid, and their loss, from the definition: one gt, or one number, after the other."""

import math

import numpy as np


def assign_yolo_grid(gt_boxes, gt_labels, gt_valid, anchors, grid_size, image_size, num_classes):
    """[B, rows, columns, A, 5 + C], A = 1 for anchors None. Computed in float64, rounded once."""
    dtype = np.result_type(np.float32, gt_boxes)
    (rows, columns), (height, width) = grid_size, image_size
    sides = np.array([[width / columns, height / rows]]) if anchors is None else anchors.astype(dtype).astype(float)
    targets = np.zeros((len(gt_boxes), rows, columns, len(sides), 5 + num_classes), dtype)
    for image, gt in np.ndindex(*gt_labels.shape):
        label = gt_labels[image, gt]
        if not gt_valid[image, gt] or not 0 <= label < num_classes:
            continue
        x1, y1, x2, y2 = map(float, gt_boxes[image, gt].astype(dtype))
        x, y = place((x1 + x2) / 2, width, columns), place((y1 + y2) / 2, height, rows)
        if x is None or y is None:
            continue
        cell = targets[image, y[0], x[0]]
        free = [anchor for anchor in range(len(sides)) if cell[anchor, 0] == 0]
        if not free:
            continue
        anchor = max(free, key=lambda a: (shape_iou(x2 - x1, y2 - y1, *sides[a]), -a))
        below_one = np.nextafter(dtype.type(1), dtype.type(0))
        with np.errstate(over="ignore"):
            size = np.array([x2 - x1, y2 - y1]) / sides[anchor]
            cell[anchor, :5] = [1, min(dtype.type(x[1]), below_one), min(dtype.type(y[1]), below_one), *size]
        cell[anchor, 5 + label] = 1
    return targets


def place(centre, size, count):
    """(cell, position in it) along one axis; None outside of the image."""
    if not 0 <= centre <= size:
        return None
    position = centre * count / size
    cell = min(math.floor(position), count - 1)
    return cell, position - cell


def shape_iou(width1, height1, width2, height2):
    with np.errstate(all="ignore"):
        intersection = np.float64(min(width1, width2)) * min(height1, height2)
        iou = intersection / (width1 * np.float64(height1) + width2 * height2 - intersection)
    return -1.0 if np.isnan(iou) else iou


def yolo_loss(predictions, targets, lambda_coord=5.0, lambda_noobj=0.5):
    """One loss for each row [5 + C], in float64."""
    losses = np.zeros(predictions.shape[:-1])
    for row in np.ndindex(*losses.shape):
        p, t = predictions[row].astype(float), targets[row].astype(float)
        if not t[0] > 0:
            losses[row] = lambda_noobj * (p[0] - t[0]) ** 2
            continue
        centre = (p[1] - t[1]) ** 2 + (p[2] - t[2]) ** 2
        size = sum((soft_root(p[k]) - soft_root(t[k])) ** 2 for k in (3, 4))
        losses[row] = lambda_coord * (centre + size) + (p[0] - t[0]) ** 2 + ((p[5:] - t[5:]) ** 2).sum()
    return losses


def soft_root(value):
    return value / math.sqrt(abs(value) + 1e-6)
