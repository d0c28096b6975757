"""The target assignment of YOLOv5. Users import from `detops.yolo`."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import check_floating, check_tensors, height_and_width, integers, kind_of, number
from ._library import register_fake

_MOST_ROWS = 2**31 - 2**16  # kMostRows of csrc/common/check.h


@_library.register_result
class Yolov5Targets(NamedTuple):
    """Rows of positives for each of L levels, of which the first `counts` are used; see `assign_yolov5`."""

    labels: Tensor
    """[L, K] int64: the class; -1 in unused rows."""
    boxes: Tensor
    """[L, K, 4]: the centre relative to the corner of the cell, and the size, in cells; 0 in unused rows."""
    indices: Tensor
    """[L, K, 4] int64: image, anchor, cell y, cell x; -1 in unused rows."""
    gt_indices: Tensor
    """[L, K] int64: the row of the image's `gt_boxes`; -1 in unused rows."""
    counts: Tensor
    """[L] int64."""


def assign_yolov5(
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    image_size: tuple[int, int],
    *,
    ratio_threshold: float = 4.0,
) -> Yolov5Targets:
    """Assigns each ground-truth box to all anchors of similar shape, in the cell of its centre and those next to it.

    An anchor matches if max(r, 1 / r) < ratio_threshold for both r = gt side / anchor side. The cells are that of the
    centre, the left one if the centre lies in the left half of its cell, or the right one if in the right half, and
    the upper or lower one likewise, where they are inside of the grid.

    Args:
        gt_boxes: [B, M, 4] xyxy in pixels, floating.
        gt_labels: [B, M] int64, at least 0; there is no upper limit.
        gt_valid: [B, M] bool: which rows take part; see `pad_ground_truth`.
        anchors: [L, A, 2] widths and heights in pixels.
        strides: of the L levels, in pixels.
        image_size: (height, width), multiples of all strides, at least 0.
        ratio_threshold: above 1.

    Returns:
        `Yolov5Targets(labels [L, K], boxes [L, K, 4], indices [L, K, 4], gt_indices [L, K], counts [L])` with
        K = 5 A B M. Rows are ordered by cell (own, left, upper, right, lower), anchor, image and gt; a gt may have
        several. Computed in float32 (float64 for float64 boxes), the dtype of `boxes`. On a GPU nothing waits.

    A centre in the very middle of its cell belongs to neither half. One on the line between two cells belongs to the
    neighbours on both sides, so that there are up to five cells, and the cell right of (below) the line comes twice, as
    in YOLOv5. One outside of the image gets the cell at the border. Boxes with a side that is 0, negative, infinite or
    NaN, or a centre that is not finite, match nothing. No gradient.

    Raises:
        ValueError: image_size is negative or no multiple of a stride, or ratio_threshold is not above 1.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU a negative label (on a GPU such a gt counts as not
            valid).

    Example:
        >>> targets = assign_yolov5(
        ...     torch.tensor([[[10., 10., 28., 28.]]]), torch.tensor([[5]]), torch.tensor([[True]]),
        ...     torch.tensor([[[16., 16.], [100., 100.]]]), [8], (64, 64),
        ... )
        >>> targets.counts, targets.indices[0, :3].tolist()
        (tensor([3]), [[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 1, 2]])

    Source: YOLOv5 (2020), whose exact rows `yolov5_target_lists` gives.
    """
    op = "assign_yolov5"
    check_tensors(op, gt_boxes=gt_boxes, gt_labels=gt_labels, gt_valid=gt_valid, anchors=anchors)
    strides, (height, width) = integers(op, "strides", strides), height_and_width(op, "image_size", image_size)
    for stride in strides:
        if stride <= 0 or height % stride or width % stride:
            got = f"{height, width}"
            raise ValueError(f"{op}: image_size must be a multiple of the strides {list(strides)}, got {got}")
    if height < 0 or width < 0:
        raise ValueError(f"{op}: image_size must be at least 0, got {height, width}")
    ratio_threshold = _checked_ratio(op, ratio_threshold)
    if gt_boxes.shape[-1:] != (4,):  # what follows would hide it from the op
        raise RuntimeError(f"{op}: gt_boxes must have shape [B, M, 4], got {list(gt_boxes.shape)}")
    if anchors.ndim != 3 or anchors.shape[0] != len(strides) or anchors.shape[2] != 2:
        rule = f"[{len(strides)}, A, 2] as of strides"
        raise RuntimeError(f"{op}: anchors must have shape {rule}, got {list(anchors.shape)}")
    _library.refuse_complex(op, "gt_boxes", gt_boxes)
    if anchors.is_floating_point() and anchors.dtype.itemsize == 1:  # of which torch has no quotient
        got = _library.dtype_name(anchors.dtype)
        raise RuntimeError(f"{op}: anchors must be float16, bfloat16, float32 or float64, got {got}")
    dtype = torch.float64 if gt_boxes.dtype == torch.float64 else torch.float32
    low, high = gt_boxes.detach().to(dtype).split(2, dim=-1)
    size = _library.filled([width, height], gt_boxes, dtype)
    normalized = torch.cat([(low + high) / 2 / size, (high - low) / size], -1)
    of_levels = _library.filled(strides, anchors, dtype)
    indices, gt_indices, labels, boxes, counts = _library.ops.assign_yolov5(
        *(normalized, gt_labels, gt_valid, anchors.detach() / of_levels[:, None, None]),
        *([height // stride for stride in strides], [width // stride for stride in strides], ratio_threshold),
    )
    return Yolov5Targets(labels, boxes, indices, gt_indices, counts)


def yolov5_target_lists(
    targets: Tensor, anchors: Tensor, grid_sizes: Sequence[tuple[int, int]], *, ratio_threshold: float = 4.0
) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor, Tensor, Tensor]], list[Tensor]]:
    """`assign_yolov5` with the arguments, the rows and the order of YOLOv5's own loss.

    Args:
        targets: [n, 6] image, class, centre x, y, width, height, the last four divided by the image's width and height.
            Image and class are at least 0, and truncated to integers.
        anchors: [L, A, 2] widths and heights in cells.
        grid_sizes: (height, width) of the L feature maps, in cells.
        ratio_threshold: above 1.

    Returns:
        For each level: classes [k] int64; boxes [k, 4], the centre relative to the corner of the cell, and the size;
        indices (image, anchor, cell y, cell x), each [k] int64; the anchors' sides [k, 2].

    On a GPU one synchronisation, for the lengths of the lists. No gradient.

    Raises:
        ValueError: ratio_threshold is not above 1, or a grid size is negative.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU an image or class that is NaN, negative or above
            2^31 - 1 (on a GPU such a target matches nothing).

    Example:
        >>> classes, boxes, indices, sides = yolov5_target_lists(
        ...     torch.tensor([[0., 5., 0.3, 0.3, 0.3, 0.3]]), torch.tensor([[[2., 2.]]]), [(8, 8)]
        ... )
        >>> classes[0].tolist(), indices[0][3].tolist()
        ([5, 5, 5], [2, 1, 2])

    Source: the build_targets of YOLOv5's loss.
    """
    op = "yolov5_target_lists"
    check_tensors(op, targets=targets, anchors=anchors)
    _library.refuse_vmap(op, targets, anchors)
    if not isinstance(grid_sizes, Iterable):
        raise ValueError(f"{op}: grid_sizes must be pairs (height, width), got {kind_of(grid_sizes)}")
    grid_sizes = [height_and_width(op, "grid_sizes", size) for size in grid_sizes]
    if targets.ndim != 2 or targets.shape[1] != 6:
        raise RuntimeError(f"{op}: targets must have shape [n, 6], got {list(targets.shape)}")
    check_floating(op, targets=targets, anchors=anchors)
    if anchors.ndim != 3 or anchors.shape[0] != len(grid_sizes) or anchors.shape[2] != 2:
        rule = f"[{len(grid_sizes)}, A, 2] as of grid_sizes"
        raise RuntimeError(f"{op}: anchors must have shape {rule}, got {list(anchors.shape)}")
    rows = 5 * anchors.shape[1] * targets.shape[0]
    if not torch.compiler.is_compiling() and rows > _MOST_ROWS:  # the op checks it too, after more work
        raise RuntimeError(f"{op}: targets must make at most {_MOST_ROWS} rows of 5 cells and A anchors, got {rows}")
    if anchors.device != targets.device:
        raise RuntimeError(f"{op}: anchors must be on the device of targets ({targets.device}), got {anchors.device}")
    ratio_threshold = _checked_ratio(op, ratio_threshold)
    if any(min(size) < 0 for size in grid_sizes):
        raise ValueError(f"{op}: grid_sizes must be at least 0, got {list(grid_sizes)}")
    targets, anchors = targets.detach(), anchors.detach()
    numbers = targets[:, :2]
    known = (numbers >= 0) & (numbers < 2**31)  # of others an integer is not defined
    valid = known.all(dim=1)
    # The op sees to it in any case, by the label: worded here where a value can be looked at.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and not valid.all():
        row = int(valid.int().argmin())
        got = f"{numbers[row].tolist()} in row {row}"
        raise RuntimeError(f"{op}: targets must have an image and a class from 0 to 2147483647, got {got}")
    images, labels = torch.where(valid[:, None], numbers, -1).long().unbind(1)
    indices, gt_indices, labels, boxes, counts = _library.ops.assign_yolov5(
        *(targets[None, :, 2:], labels[None], torch.ones_like(valid)[None], anchors),
        *([height for height, _ in grid_sizes], [width for _, width in grid_sizes], ratio_threshold),
    )
    found = ([], [], [], [])
    for level, count in enumerate(counts.tolist()):
        _, anchor, y, x = indices[level, :count].unbind(1)
        image = images[gt_indices[level, :count]]
        parts = labels[level, :count], boxes[level, :count], (image, anchor, y, x), anchors[level][anchor]
        for each, part in zip(found, parts, strict=True):
            each.append(part)
    return found


def _checked_ratio(op: str, ratio_threshold: float) -> float:
    ratio_threshold = number(op, "ratio_threshold", ratio_threshold)
    if not ratio_threshold > 1:
        raise ValueError(f"{op}: ratio_threshold must be above 1, got {ratio_threshold}")
    return ratio_threshold


@register_fake("assign_yolov5")
def _(
    gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, anchors: Tensor, heights: list[int], widths: list[int],
    ratio_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    levels, capacity = anchors.shape[0], 5 * anchors.shape[1] * gt_labels.shape[0] * gt_labels.shape[1]
    dtype = torch.float64 if gt_boxes.dtype == torch.float64 else torch.float32
    return (
        gt_labels.new_empty(levels, capacity, 4),
        gt_labels.new_empty(levels, capacity),
        gt_labels.new_empty(levels, capacity),
        gt_boxes.new_empty(levels, capacity, 4, dtype=dtype),
        gt_labels.new_empty(levels),
    )
