"""Box coders from their formulas, one row at a time, in the precision of their arguments."""

import numpy as np


def _rows(first, second):
    """Pairs of rows of two arrays [..., k] whose leading dimensions broadcast, and the shape of these."""
    shape = np.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    first = np.broadcast_to(first, (*shape, first.shape[-1])).reshape(-1, first.shape[-1])
    second = np.broadcast_to(second, (*shape, second.shape[-1])).reshape(-1, second.shape[-1])
    return zip(first, second, strict=True), shape


def _centre(box):
    x1, y1, x2, y2 = box
    return x1 + (x2 - x1) / 2, y1 + (y2 - y1) / 2, x2 - x1, y2 - y1


def encode_boxes(boxes, anchors, weights=(1, 1, 1, 1)):
    rows, shape = _rows(boxes, anchors)
    deltas = []
    for box, anchor in rows:
        cx, cy, w, h = _centre(box)
        ax, ay, aw, ah = _centre(anchor)
        codes = (cx - ax) / aw, (cy - ay) / ah, np.log(w / aw), np.log(h / ah)
        deltas.append([weight * code for weight, code in zip(weights, codes, strict=True)])
    return np.array(deltas).reshape(*shape, 4)


def decode_boxes(deltas, anchors, weights=(1, 1, 1, 1), clip=4.135166556742356):
    rows, shape = _rows(deltas, anchors)
    boxes = []
    for delta, anchor in rows:
        dx, dy, dw, dh = delta / np.array(weights, dtype=delta.dtype)
        ax, ay, aw, ah = _centre(anchor)
        cx, cy = ax + dx * aw, ay + dy * ah
        w, h = aw * np.exp(np.minimum(dw, clip)), ah * np.exp(np.minimum(dh, clip))
        boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    return np.array(boxes).reshape(*shape, 4)


def _strides(strides, shape):
    return np.broadcast_to(np.float32(1) if strides is None else strides, shape).ravel()


def encode_ltrb(boxes, points, strides=None, max_distance=None):
    rows, shape = _rows(boxes, points)
    distances = []
    for ((x1, y1, x2, y2), (x, y)), stride in zip(rows, _strides(strides, shape), strict=True):
        row = [(x - x1) / stride, (y - y1) / stride, (x2 - x) / stride, (y2 - y) / stride]
        distances.append(row if max_distance is None else [np.clip(value, 0, max_distance) for value in row])
    return np.array(distances).reshape(*shape, 4)


def decode_ltrb(distances, points, strides=None):
    rows, shape = _rows(distances, points)
    boxes = []
    for ((left, top, right, bottom), (x, y)), s in zip(rows, _strides(strides, shape), strict=True):
        boxes.append([x - s * left, y - s * top, x + s * right, y + s * bottom])
    return np.array(boxes).reshape(*shape, 4)


def decode_dfl(logits, dim=-1):
    rows = np.moveaxis(logits, dim, -1)
    means = []
    for row in rows.reshape(-1, rows.shape[-1]):
        weights = np.exp(row - row.max())
        means.append(sum(k * weight for k, weight in enumerate(weights)) / weights.sum())
    return np.array(means).reshape(rows.shape[:-1])


def _sigmoid(t):
    return 1 / (1 + np.exp(-t))


def decode_yolo(raw, anchors, strides, version):
    """Lists of (boxes [N, 4], objectness [N], scores [N, C]), one an image."""
    images = []
    for image in range(len(raw[0])):
        boxes, objectness, scores = [], [], []
        for level, (maps, stride) in enumerate(zip(raw, strides, strict=True)):
            per_anchor = np.split(maps[image], len(anchors[level]))
            for channels, (aw, ah) in zip(per_anchor, anchors[level], strict=True):
                for j in range(channels.shape[1]):
                    for i in range(channels.shape[2]):
                        tx, ty, tw, th, to, *tc = channels[:, j, i]
                        if version == "v3":
                            x, y = i + _sigmoid(tx), j + _sigmoid(ty)
                            w, h = aw * np.exp(tw), ah * np.exp(th)
                        else:
                            x, y = i + 2 * _sigmoid(tx) - 0.5, j + 2 * _sigmoid(ty) - 0.5
                            w, h = aw * (2 * _sigmoid(tw)) ** 2, ah * (2 * _sigmoid(th)) ** 2
                        boxes.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
                        objectness.append(_sigmoid(to))
                        scores.append([_sigmoid(to) * _sigmoid(t) for t in tc])
        classes = raw[0].shape[1] // len(anchors[0]) - 5
        images.append((np.reshape(boxes, (-1, 4)), np.array(objectness), np.reshape(scores, (len(boxes), classes))))
    return images
