"""Crop boxes of a photograph to one small size, with roi_align and with roi_pool, and show what the two do.

The crops of a detector's second stage are taken from feature maps, where nobody sees the difference; here they are
taken from the pixels themselves. roi_align averages bilinear samples, so that every crop is a small, faithful picture.
roi_pool takes the largest of whole pixels: corners snap to pixels, bright spots spread, and edges become steps. Between
them stands a box that is turned: roi_align_rotated crops it upright.

    python examples/crop_coffee.py --output crops.png
"""

import argparse

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from skimage import data

from detops import roi_align, roi_align_rotated, roi_pool

# x1, y1, x2, y2 in pixels, the last coordinates between pixels
BOXES = {
    "cup": [168.0, 14.0, 415.0, 312.0],
    "handle": [190.3, 222.6, 270.9, 311.2],
    "spoon": [320.5, 60.2, 432.7, 332.4],
    "coffee": [222.4, 88.7, 300.1, 166.4],
}
ROTATED = {"spoon, turned": [391.0, 199.0, 92.0, 276.0, -12.0]}  # cx, cy, w, h, degrees counter-clockwise
SIZE = 28


def corners(box):
    """Of a rotated box, as one looks at the picture, whose y axis points down."""
    x, y, width, height, degrees = box
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = angle.cos().item(), angle.sin().item()
    along, down = torch.tensor([cos, -sin]) * width / 2, torch.tensor([sin, cos]) * height / 2
    centre = torch.tensor([x, y])
    return torch.stack([centre - along - down, centre + along - down, centre + along + down, centre - along + down])


def draw(image, crops, path):
    """The photograph with its boxes, and under it one row of crops for each way to make them."""
    colors = [f"C{i}" for i in range(len(BOXES) + len(ROTATED))]
    figure = Figure(figsize=(11, 11), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1])
    axes = top.subplots()
    axes.imshow(image)
    axes.set_axis_off()
    outlines = [torch.tensor([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) for x1, y1, x2, y2 in BOXES.values()]
    for outline, color in zip([*outlines, *map(corners, ROTATED.values())], colors, strict=True):
        axes.add_patch(Polygon(outline.numpy(), fill=False, edgecolor=color, linewidth=2))
    grid = bottom.subplots(2, len(colors))
    for row, (way, pictures) in zip(grid, crops.items(), strict=True):
        for axes, name, picture, color in zip(row, [*BOXES, *ROTATED], pictures, colors, strict=True):
            if picture is None:
                axes.set_axis_off()
                continue
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(f"{name}\n{way}{'_rotated' if name in ROTATED else ''}", color=color, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="crops.png", help="where to write the picture (default: crops.png)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels of a crop's sides (default: {SIZE})")
    args = parser.parse_args()

    image = data.coffee()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    boxes, rotated = (torch.tensor(list(each.values())) for each in (BOXES, ROTATED))

    averages = roi_align(pixels, [boxes], args.size, aligned=True)
    turned = roi_align_rotated(pixels, [rotated], args.size)
    maxima = roi_pool(pixels, [boxes], args.size)

    for name, average, largest in zip(BOXES, averages, maxima, strict=True):
        print(f"{name}: mean brightness {average.mean():.3f} by roi_align, {largest.mean():.3f} by roi_pool")
    crops = {"roi_align": [*averages, *turned], "roi_pool": [*maxima, *[None] * len(turned)]}
    draw(image, crops, args.output)
    print(f"picture written to {args.output}")


if __name__ == "__main__":
    main()
