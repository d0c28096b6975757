"""The target assignment of YOLOv3 from its definition, as one matrix an image."""

import numpy as np

from .iou import pair_value
from .task_aligned import positive


def assign_yolov3(gt_boxes, gt_labels, gt_valid, anchors, strides, image_size, iou_threshold=0.5):
    """(gt_indices, labels, boxes) of a batch, anchors in the order (level, anchor, y, x)."""
    dtype = np.result_type(np.float32, gt_boxes)
    places = anchor_boxes(anchors.astype(dtype), strides, image_size)
    images = len(gt_boxes)
    indices = np.full((images, len(places)), -1, np.int64)
    labels, boxes = indices.copy(), np.zeros((images, len(places), 4), gt_boxes.dtype)
    for image in range(images):
        rows = np.flatnonzero(gt_valid[image])
        if not len(rows) or not len(places):
            continue
        gts = gt_boxes[image][rows].astype(dtype)
        ious = np.stack([positive(pair_value("iou", gt, places, 0)) for gt in gts])
        responsible = are_responsible(gts, anchors.shape[1], strides, image_size)
        above = ious.max(0) > iou_threshold
        indices[image] = np.where(above, np.where(responsible, rows[ious.argmax(0)], -2), -1)
        for gt, row in enumerate(rows):
            best = ious[gt, responsible].max(initial=0)
            if best > 0:
                indices[image, responsible & (ious[gt] == best)] = row
        found = indices[image] >= 0
        labels[image] = np.where(found, gt_labels[image, np.maximum(indices[image], 0)], indices[image])
        boxes[image, found] = gt_boxes[image, indices[image, found]]
    return indices, labels, boxes


def anchor_boxes(anchors, strides, image_size):
    """[N, 4] xyxy."""
    half, boxes = anchors.dtype.type(0.5), []
    for sides, stride in zip(anchors, strides, strict=True):
        for width, height in sides:
            for y in range(image_size[0] // stride):
                for x in range(image_size[1] // stride):
                    cx, cy = (anchors.dtype.type(each) + half for each in (x, y))
                    cx, cy = cx * anchors.dtype.type(stride), cy * anchors.dtype.type(stride)
                    boxes.append([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    return np.array(boxes, anchors.dtype).reshape(-1, 4)


def are_responsible(gts, anchors_per_cell, strides, image_size):
    """[N]: whether the cell of the anchor holds the centre of a gt, which counts to the border where it is outside."""
    maps = []
    for stride in strides:
        cells = np.zeros((image_size[0] // stride, image_size[1] // stride), bool)
        for gt in gts:
            with np.errstate(all="ignore"):
                x, y = (gt[0] + gt[2]) / 2 / gts.dtype.type(stride), (gt[1] + gt[3]) / 2 / gts.dtype.type(stride)
            if cells.size:
                cells[cell(y, cells.shape[0]), cell(x, cells.shape[1])] = True
        maps.append(np.tile(cells.ravel(), anchors_per_cell))
    return np.concatenate(maps)


def cell(place, count):
    if np.isnan(place) or np.isinf(place):
        return count - 1 if place > 0 else 0
    return min(max(int(place), 0), count - 1)
