"""Find the 24 coins in a photograph: template matching proposes, non-maximum suppression decides.

A bright disc is slid over the picture at many sizes. Every coin answers at hundreds of neighbouring positions and
sizes, so tens of thousands of windows score well. `detops.nms` keeps the best window of each coin and drops the rest.

    python examples/find_coins.py --output coins.png
"""

import argparse
import time

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from skimage import data
from skimage.feature import match_template

from detops import nms

RADII = range(10, 33)  # pixels


def disc(radius):
    """A bright disc on a dark ground, the ground a third wider than the disc."""
    reach = np.arange(-round(1.3 * radius), round(1.3 * radius) + 1)
    distance = np.hypot(reach, reach[:, None])
    return np.clip(radius + 0.5 - distance, 0, 1)


def propose(image, score_threshold):
    """Every window that looks like a disc: boxes [N, 4] (x1, y1, x2, y2) in pixels and scores [N]."""
    boxes, scores = [], []
    for radius in RADII:
        # The normalised correlation lies in [-1, 1] and ignores local brightness: the photograph's light is uneven.
        correlation = match_template(image, disc(radius), pad_input=True)
        y, x = np.nonzero(correlation > score_threshold)
        boxes.append(np.stack([x - radius, y - radius, x + radius, y + radius], axis=1))
        scores.append(correlation[y, x])
    return torch.from_numpy(np.concatenate(boxes)).float(), torch.from_numpy(np.concatenate(scores)).float()


def draw(image, boxes, scores, path):
    """Write the picture with a box and its score around every detection."""
    figure = Figure(figsize=(image.shape[1] / 40, image.shape[0] / 40), layout="tight")
    axes = figure.subplots()
    axes.imshow(image, cmap="gray")
    axes.set_axis_off()
    for (x1, y1, x2, y2), score in zip(boxes.tolist(), scores.tolist(), strict=True):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="orange", linewidth=2))
        axes.text(x1, y1 - 2, f"{score:.2f}", color="orange")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="coins.png", help="where to write the picture (default: coins.png)")
    parser.add_argument("--score-threshold", type=float, default=0.65, help="least correlation with a disc")
    parser.add_argument("--iou-threshold", type=float, default=0.3, help="windows that overlap more are one coin")
    args = parser.parse_args()

    image = data.coins()
    boxes, scores = propose(image, args.score_threshold)

    start = time.perf_counter()
    keep = nms(boxes, scores, args.iou_threshold)
    milliseconds = 1e3 * (time.perf_counter() - start)

    print(f"{len(boxes):,} windows score above {args.score_threshold}")
    print(f"{len(keep)} coins kept by nms in {milliseconds:.1f} ms")
    draw(image, boxes[keep], scores[keep], args.output)
    print(f"picture written to {args.output}")


if __name__ == "__main__":
    main()
