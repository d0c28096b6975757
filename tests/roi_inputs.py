"""Seeded features and RoIs."""

import numpy as np
import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Around packs of 2, 4 and 8 channels, 8 planes at a time, 32 lanes, and 64 channels in registers.
CHANNELS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 72, 130)


def random_map(shape, dtype=torch.float32, layout="contiguous", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def random_rois(n, images, width, height, seed=0):
    """[n, 5]: centres on an image of that size and a little around it, sides up to its size, of any image."""
    rng = np.random.default_rng(seed)
    size = np.array([width, height])
    centre = rng.uniform(-0.1, 1.1, (n, 2)) * size
    side = np.exp(rng.uniform(np.log(0.05), np.log(1), (n, 2))) * size
    return np.concatenate([rng.integers(0, images, (n, 1)), centre - side / 2, centre + side / 2], 1)


def edge_rois():
    """On a map of 6 x 7 pixels: on its edges, off it, tiny, inverted, larger than it, and not finite."""
    nan, inf = np.nan, np.inf
    rois = [
        *[[0, 0, 7, 6], [-1, -1, 8, 7], [-1, -1, -1, -1], [7, 6, 7, 6], [6, 5, 7, 6], [0, 0, 0, 0], [3, 3, 3, 3]],
        *[[-2, -2, -1, -1], [-9, -9, -5, -5], [20, 20, 30, 30], [7.5, 0, 9, 6], [-0.5, -0.5, 0.5, 0.5]],
        *[[2, 2, 2.001, 2.001], [1e-20, 1e-20, 1e-19, 1e-19], [5, 4, 1, 1], [5, 1, 1, 4], [1, 4, 5, 1]],
        *[[-50, -40, 60, 70], [-300, 1, 400, 4], [2, -1000, 4, 900], [-8.25, 0, 8.25, 6], [-0.0, -0.0, 3, 3]],
        *[[nan, 0, 4, 4], [0, nan, 4, 4], [0, 0, nan, 4], [0, 0, 4, nan], [inf, 0, 4, 4], [0, 0, inf, inf]],
        *[[-inf, -inf, inf, inf], [0, 0, 4, -inf], [nan, nan, nan, nan]],
    ]
    rng = np.random.default_rng(0)
    return np.array([[index, *roi] for roi, index in zip(rois, rng.integers(0, 2, len(rois)), strict=True)])


def tolerance(dtype):
    """Of values around 1, rounded once from float32 or float64."""
    return {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
