"""Scenes for the tests of the assigners: anchor points, padded ground truth, and what a half-trained head predicts."""

from typing import NamedTuple

import numpy as np


class Scene(NamedTuple):
    """NumPy arrays, floating ones in float64."""

    scores: np.ndarray  # [B, A, C]
    boxes: np.ndarray  # [B, A, 4]
    points: np.ndarray  # [A, 2]
    gt_labels: np.ndarray  # [B, M]
    gt_boxes: np.ndarray  # [B, M, 4]
    gt_valid: np.ndarray  # [B, M]


def grid_points(size, strides=(8, 16, 32)):
    """(points [A, 2], their strides [A]): the centres of the cells of all levels, row by row."""
    points, of_points = [], []
    for stride in strides:
        along = (np.arange(size // stride) + 0.5) * stride
        x, y = np.meshgrid(along, along)
        points.append(np.stack([x.ravel(), y.ravel()], 1))
        of_points.append(np.full(len(points[-1]), float(stride)))
    return np.concatenate(points), np.concatenate(of_points)


def scene(points, gts, images=2, classes=3, seed=0, extent=128.0, size=60.0, noise=0.15, levels=None):
    """Most boxes near the gt that is nearest to their point, gts of sides up to `size` that may leave the image, every
    fifth one not valid.

    With `levels` scores and coordinates take few values, so that metrics tie all the time.
    """
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(0, extent, (images, gts, 2)), rng.uniform(2, size, (images, gts, 2))
    gt_boxes = np.concatenate([centre - side / 2, centre + side / 2], 2)
    pick = rng.integers(0, max(gts, 1), (images, len(points)))
    if gts:
        distances = np.abs(np.asarray(points)[:, None] - centre[:, None]).sum(3)
        pick = np.where(rng.random(pick.shape) < 0.7, distances.argmin(2), pick)
    near = gt_boxes[np.arange(images)[:, None], pick] if gts else rng.uniform(0, extent, (images, len(points), 4))
    boxes = near + noise * np.tile(near[..., 2:] - near[..., :2], 2) * rng.normal(size=near.shape)
    scores = rng.uniform(0, 1, (images, len(points), classes))
    if levels:
        scores = np.ceil(scores * levels) / levels
        gt_boxes, boxes = (np.round(each / 16) * 16 for each in (gt_boxes, boxes))
    labels = rng.integers(0, classes, (images, gts))
    return Scene(scores, boxes, np.asarray(points), labels, gt_boxes, rng.random((images, gts)) < 0.8)
