"""Seeded inputs. Builders return NumPy arrays, boxes as xyxy in float64; `to_torch` rounds them once to a dtype.

References are then given `to_numpy(tensor)`, so that both sides see the rounded values.
"""

import numpy as np

THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)


def to_torch(values, dtype=None, device="cpu"):
    """A tensor of an array or list; `dtype` is a torch dtype (None: float32 for floating values, else their own)."""
    import torch

    tensor = torch.from_numpy(np.array(values))  # a copy: builders may hand out views
    if dtype is None and tensor.is_floating_point():
        dtype = torch.float32
    return tensor.to(dtype=dtype, device=device)


def to_numpy(tensor):
    """An array of the same values; float16 and bfloat16 widened to float32."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() == 2:
        tensor = tensor.float()
    return tensor.numpy()


# Boxes in numbers.


def uniform_boxes(n, seed=0, extent=1000.0, size=100.0):
    """Centres uniform in a square of side `extent`, sides uniform in [size / 20, size]."""
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(0, extent, (n, 2)), rng.uniform(size / 20, size, (n, 2))
    return np.concatenate([centre - side / 2, centre + side / 2], axis=1)


def clustered_boxes(n, seed=0, per_object=20, jitter=0.1, extent=1000.0):
    """A detector's output: every object is reported by about `per_object` boxes, off by `jitter` of its size."""
    rng = np.random.default_rng(seed)
    objects = uniform_boxes(max(1, n // per_object), seed + 1, extent)
    boxes = objects[rng.integers(0, len(objects), n)]
    side = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return boxes + rng.uniform(-jitter, jitter, (n, 4)) * side


def boxes_of_all_scales(n, seed=0, smallest=1e-6, largest=1e6):
    """Sides from 1e-6 to 1e6 in one set; each box comes about ten times, off by a tenth of its own size."""
    rng = np.random.default_rng(seed)
    side = np.exp(rng.uniform(np.log(smallest), np.log(largest), (max(1, n // 10), 2)))
    # Small boxes lie near 0, where float32 still resolves them.
    centre = rng.uniform(-3, 3, side.shape) * side
    pick = rng.integers(0, len(side), n)
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1)[pick]
    return boxes + rng.uniform(-0.1, 0.1, (n, 4)) * np.tile(side[pick], 2)


def distant_boxes(n, seed=0):
    """So far from 0 that float32 corners are multiples of 1/2, for boxes with sides of 1 to 8."""
    boxes = np.random.default_rng(seed).uniform(0, 40, (n, 4)).round() / 2
    boxes[:, 2:] = boxes[:, :2] + 1 + boxes[:, 2:] * 0.35
    return boxes.round(1) // 0.5 * 0.5 + [-(2.0**22), 2.0**22, -(2.0**22), 2.0**22]


def grid_boxes(n, seed=0, cells=8):
    """Corners on a small integer grid: touching, identical, nested, zero-area and inverted boxes come all the time."""
    return np.random.default_rng(seed).integers(0, cells, (n, 4)).astype(np.float64)


KINDS = {
    "uniform": uniform_boxes,
    "clustered": clustered_boxes,
    "scales": boxes_of_all_scales,
    "distant": distant_boxes,
}

# Pairs whose IoU is on the threshold or next to it: rows 2k and 2k + 1 are a pair.


def pairs_on_threshold(iou_threshold, dtype=np.float32, n=64, seed=0, reach=4):
    """n pairs for each of -reach..reach units in the last place that one edge is moved off the threshold.

    The IoU computed in `dtype` then takes the threshold itself and its neighbours. Where the threshold is 0 the boxes
    touch, overlap or miss each other by those units.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        width, height = rng.uniform(1, 1000, 2).astype(dtype)
        edge = width * dtype(iou_threshold) if iou_threshold > 0 else width
        for steps in range(-reach, reach + 1):
            moved = _step(edge, steps)
            first = [0, 0, width, height]
            second = [0, 0, moved, height] if iou_threshold > 0 else [moved, 0, width * 2, height]
            pairs += [first, second] if rng.random() < 0.5 else [second, first]
    return np.array(pairs, dtype=np.float64)


def pairs_of_small_ratios(largest=20):
    """Nested pairs with IoU p / q for all p <= q <= largest, in small integers that every dtype holds exactly."""
    ratios = [(p, q) for q in range(1, largest + 1) for p in range(1, q + 1)]
    return np.array([box for p, q in ratios for box in ([0, 0, q, 1], [0, 0, p, 1])], dtype=np.float64)


def _step(value, steps):
    towards = value.dtype.type(np.inf if steps > 0 else -np.inf)
    for _ in range(abs(steps)):
        value = np.nextafter(value, towards)
    return value


# Edges by name. Ordinary boxes stand between the odd ones, so that a wrong suppression is seen in either direction.

NAN, INF = np.nan, np.inf
_ORDINARY = [[0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 6], [20, 20, 30, 30]]
_ODD = {
    "touching": [[10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20], [-10, 0, 0, 10], [30, 20, 40, 30]],
    "identical": [[0, 0, 10, 10]] * 5 + [[20, 20, 30, 30]] * 2,
    "nested": [[1, 1, 9, 9], [2, 2, 8, 8], [3, 3, 7, 7], [4, 4, 6, 6], [-5, -5, 15, 15]],
    "zero_area": [[0, 0, 0, 0], [5, 0, 5, 10], [0, 5, 10, 5], [5, 5, 5, 5], [5, 5, 5, 5], [10, 0, 10, 10]],
    "inverted": [[10, 0, 0, 10], [0, 10, 10, 0], [10, 10, 0, 0], [10, 10, 0, 0], [9, 9, 1, 1], [30, 30, 20, 20]],
    "infinite": [
        *[[0, 0, INF, INF], [0, 0, INF, INF], [-INF, -INF, INF, INF], [-INF, 0, 10, 10], [0, 0, INF, 10]],
        *[[INF, INF, INF, INF], [-INF, -INF, -INF, -INF], [INF, INF, -INF, -INF], [0, 0, INF, 0], [0, 0, INF, -1]],
    ],
    "nan": [
        *[[NAN, 0, 10, 10], [0, NAN, 10, 10], [0, 0, NAN, 10], [0, 0, 10, NAN], [NAN, NAN, NAN, NAN]],
        *[[NAN, NAN, NAN, NAN], [NAN, 0, INF, 10], [-INF, NAN, NAN, INF]],
    ],
    "negative": [[-10, -10, 0, 0], [-9, -9, 1, 1], [-10, -10, -1, -1], [-1000, -1000, -990, -990], [-5, -5, 5, 5]],
    # Within float16's range.
    "huge": [[-60000, -60000, 60000, 60000], [-60000, -60000, 60000, 59000], [50000, 50000, 60000, 60000]],
    # float32 areas of 1e38 are finite, their sum is not, areas of 1e40 are not: such boxes never suppress.
    "overflowing": [
        *[[0, 0, 1.4e19, 1.4e19], [0, 0, 1.4e19, 1.4e19], [0, 0, 1e19, 1e19], [0, 0, 1e19, 1e19]],
        *[[0, 0, 1e20, 1e20], [0, 0, 1e20, 1e20], [-3e38, -3e38, 3e38, 3e38], [-3e38, 0, 3e38, 10]],
    ],
    # float32 areas that are subnormal, or 0 by underflow.
    "tiny": [
        *[[0, 0, 1e-18, 1e-18], [0, 0, 1e-18, 1e-18], [0, 0, 3e-22, 1e-22], [0, 0, 3e-22, 1e-22]],
        *[[0, 0, 1e-25, 1e-25], [0, 0, 1e-25, 1e-25], [0, 0, 1e-40, 1], [0, 0, 1e-40, 1]],
    ],
    "negative_zero": [[-0.0, -0.0, 10, 10], [-10, -0.0, -0.0, 10], [-0.0, -0.0, -0.0, 0.0]],
}
_ODD["everything"] = [box for boxes in _ODD.values() for box in boxes]
EDGES = tuple(_ODD)


def edge_boxes(name, seed=0):
    """The odd boxes of that name, each next to ordinary ones, in a shuffled order."""
    boxes = np.array(_ODD[name] + _ORDINARY + _ODD[name] + _ORDINARY, dtype=np.float64)
    return np.random.default_rng(seed).permutation(boxes)


# Scores and classes.


def distinct_scores(n, seed=0):
    """A shuffled ramp in (0, 1): no ties in float32 or float64."""
    return (np.random.default_rng(seed).permutation(n) + 1) / (n + 1)


def tied_scores(n, seed=0, levels=4):
    """Few values, exact in every dtype."""
    return np.random.default_rng(seed).integers(0, levels, n) / levels


def odd_scores(n, seed=0):
    """NaN, infinities, both zeros and negative scores, each many times."""
    return np.random.default_rng(seed).choice([NAN, INF, -INF, 0.0, -0.0, -1.0, 0.5, 1.0], n)


def class_ids(n, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


# Batches of images, as a detector's head gives them.


def batch(images, n, classes, seed=0, boxes_per_class=False, share=0.2):
    """(boxes [B, N, 4] or [B, N, C, 4], scores [B, N, C]); about `share` of the scores are above 0.05."""
    rng = np.random.default_rng(seed)
    shape = (images, n, classes) if boxes_per_class else (images, n)
    boxes = clustered_boxes(int(np.prod(shape)), seed).reshape(*shape, 4)
    scores = rng.uniform(0, 1, (images, n, classes)) * (rng.random((images, n, classes)) < share)
    return boxes, scores


# Rotated boxes: centre, width, height, and degrees counter-clockwise as one looks at an image.


def rotated_boxes(n, seed=0, extent=100.0, size=100.0, aspect=8.0):
    """Centres uniform in a square, longer sides in [size / 20, size], up to `aspect` times the shorter; any angle."""
    rng = np.random.default_rng(seed)
    longer = rng.uniform(size / 20, size, n)
    sides = np.stack([longer, longer / rng.uniform(1, aspect, n)], 1)
    sides = np.where(rng.random((n, 1)) < 0.5, sides, sides[:, ::-1])
    return np.concatenate([rng.uniform(0, extent, (n, 2)), sides, rng.uniform(-400, 400, (n, 1))], 1)


def clustered_rotated_boxes(n, seed=0, per_object=20, jitter=0.1, extent=1000.0):
    """A detector's output: every object is reported by about `per_object` boxes, a little off in everything."""
    rng = np.random.default_rng(seed)
    boxes = rotated_boxes(max(1, n // per_object), seed + 1, extent)[rng.integers(0, max(1, n // per_object), n)]
    moved = boxes[:, :2] + rng.uniform(-jitter, jitter, (n, 2)) * boxes[:, 2:4]
    return np.column_stack([moved, boxes[:, 2:4] * rng.uniform(1 - jitter, 1 + jitter, (n, 2)),
                            boxes[:, 4] + rng.uniform(-90 * jitter, 90 * jitter, n)])  # fmt: skip
