"""Targets on a grid of cells, the textbook form of YOLOv1 and v2, and their loss. Users import from `detops.yolo`."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import (
    check_floating,
    check_optional_tensors,
    check_same_device,
    check_tensors,
    height_and_width,
    integer,
    number,
    numbers,
)
from ._gradients import register_gradient
from ._library import register_fake
from .losses import _check_no_gradient, _check_not_negative, _for_autocast, _number_of


@_library.register_result
class YoloGridBoxes(NamedTuple):
    """The boxes of a grid of targets or predictions; see `decode_yolo_grid`."""

    boxes: Tensor
    """[B, N, 4] xyxy in pixels."""
    objectness: Tensor
    """[B, N]."""
    scores: Tensor
    """[B, N, C], of the classes."""


def assign_yolo_grid(
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    grid_size: int | tuple[int, int],
    image_size: tuple[int, int],
    num_classes: int,
    anchors: Tensor | None = None,
) -> Tensor:
    """Assigns each ground-truth box to the grid cell that holds its centre.

    A target is (1, bx, by, bw, bh, one-hot class): the centre within the cell, in [0, 1), and the sides in sides of
    the cell, or of the anchor of highest shape IoU among those of the cell that are free.

    Args:
        gt_boxes: [B, M, 4] xyxy in pixels, floating.
        gt_labels: [B, M] int64, from 0 to num_classes - 1.
        gt_valid: [B, M] bool: which rows take part; see `pad_ground_truth`.
        grid_size: (rows, columns), or one number for both.
        image_size: (height, width) in pixels.
        num_classes: C.
        anchors: [A, 2] widths and heights in pixels; None for one box a cell.

    Returns:
        [B, rows, columns, 5 + C], or [B, rows, columns, A, 5 + C] with anchors; zeros where there is no object.
        float32, float64 for float64 boxes; computed in float64.

    Gts take their places in the order of their rows; one that finds its cell full gets none. Equal shape IoUs go to
    the lower anchor. A centre on the line between two cells belongs to the right or lower one, on the far border to
    the last one; one outside of the image is nobody's. Sides are taken as they are, also 0. No gradient.

    Raises:
        ValueError: grid_size or image_size is not positive, or num_classes is negative.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU a label out of range (on a GPU such a gt counts as
            not valid).

    Example:
        >>> targets = assign_yolo_grid(
        ...     torch.tensor([[[10., 10., 30., 50.]]]), torch.tensor([[1]]), torch.tensor([[True]]),
        ...     grid_size=2, image_size=(64, 64), num_classes=2,
        ... )
        >>> targets[0, 0, 0]
        tensor([1.0000, 0.6250, 0.9375, 0.6250, 1.2500, 0.0000, 1.0000])

    Source: Redmon et al., "You Only Look Once", CVPR 2016 (where sides are divided by those of the image), with
    sides in cells and anchors as in its textbook form.
    """
    op = "assign_yolo_grid"
    check_tensors(op, gt_boxes=gt_boxes, gt_labels=gt_labels, gt_valid=gt_valid)
    check_optional_tensors(op, anchors=anchors)
    is_pair = isinstance(grid_size, list | tuple) or getattr(grid_size, "ndim", 0) > 0
    sides: Any = grid_size if is_pair else (grid_size, grid_size)
    rows, columns = height_and_width(op, "grid_size", sides)
    height, width = height_and_width(op, "image_size", image_size)
    num_classes = integer(op, "num_classes", num_classes)
    if rows < 1 or columns < 1:
        raise ValueError(f"{op}: grid_size must be positive, got {grid_size}")
    if height < 1 or width < 1:
        raise ValueError(f"{op}: image_size must be positive, got {height, width}")
    if num_classes < 0:
        raise ValueError(f"{op}: num_classes must be at least 0, got {num_classes}")
    anchors = None if anchors is None else anchors.detach()
    return _library.ops.assign_yolo_grid(
        gt_boxes.detach(), gt_labels, gt_valid, anchors, rows, columns, height, width, num_classes
    )


def decode_yolo_grid(targets: Tensor, *, image_size: tuple[int, int], anchors: Tensor | None = None) -> YoloGridBoxes:
    """Decodes a grid of targets, or of predictions in the same form, into boxes: the inverse of `assign_yolo_grid`.

    The centre is (column + bx, row + by) in cells, the sides are bw, bh times those of the cell or of the anchor.

    Args:
        targets: [B, rows, columns, 5 + C], or [B, rows, columns, A, 5 + C] with anchors, floating.
        image_size: (height, width) in pixels.
        anchors: [A, 2] widths and heights in pixels; None for one box a cell.

    Returns:
        `YoloGridBoxes(boxes [B, N, 4], objectness [B, N], scores [B, N, C])` in the dtype of `targets`, N the cells
        times A, row by row. Boxes are computed in float64 and rounded once. A target without object gives a box
        without sides at the corner of its cell.

    Gradient: to `targets` and `anchors`.

    Raises:
        ValueError: image_size is not positive and finite.
        RuntimeError: `targets` or `anchors` has a wrong shape or dtype.

    Example:
        >>> decode_yolo_grid(torch.tensor([[[[1.0, 0.5, 0.5, 2.0, 1.0, 0.9]]]]), image_size=(20, 10)).boxes
        tensor([[[-5.,  0., 15., 20.]]])

    Source: the inverse of the formulas above.
    """
    check_tensors("decode_yolo_grid", targets=targets)
    check_optional_tensors("decode_yolo_grid", anchors=anchors)
    sides = numbers("decode_yolo_grid", "image_size", image_size)
    if len(sides) != 2 or not all(0 < side < math.inf for side in sides):
        raise ValueError(f"decode_yolo_grid: image_size must be positive and finite, got {sides}")
    height, width = sides
    check_floating("decode_yolo_grid", targets=targets)
    if anchors is not None:
        check_floating("decode_yolo_grid", anchors=anchors)
        check_same_device("decode_yolo_grid", "targets", targets, "anchors", anchors)
    dims = 4 if anchors is None else 5
    rule = "[B, rows, columns, 5 + C]" if anchors is None else "[B, rows, columns, A, 5 + C]"
    if targets.ndim != dims or targets.shape[-1] < 5:
        raise RuntimeError(f"decode_yolo_grid: targets must have shape {rule}, got {list(targets.shape)}")
    if anchors is not None and anchors.shape != (targets.shape[3], 2):
        shape = f"[{targets.shape[3]}, 2]"
        raise RuntimeError(
            f"decode_yolo_grid: anchors must have shape {shape} as of targets, got {list(anchors.shape)}"
        )
    if anchors is None:
        targets = targets.unsqueeze(3)
    images, rows, columns, per_cell, values = targets.shape
    places = rows * columns * per_cell
    place = {"dtype": torch.float64, "device": targets.device}
    cell = [width / max(columns, 1), height / max(rows, 1)]  # of an empty grid none is used
    cell = _library.filled(cell, targets, torch.float64)
    y, x = torch.meshgrid(torch.arange(rows, **place), torch.arange(columns, **place), indexing="ij")
    centre = (targets[..., 1:3] + torch.stack([x, y], -1).unsqueeze(2)) * cell
    half = targets[..., 3:5] * (cell if anchors is None else anchors.double()) / 2
    boxes = torch.cat([centre - half, centre + half], -1).to(targets.dtype)
    return YoloGridBoxes(
        boxes.reshape(images, places, 4),
        targets[..., 0].reshape(images, places),
        targets[..., 5:].reshape(images, places, values - 5),
    )


def yolo_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    lambda_coord: float = 5.0,
    lambda_noobj: float = 0.5,
    reduction: str = "sum",
) -> Tensor:
    """The loss of YOLOv1: squared errors over a grid, where places with objects weigh more.

    Where a target's objectness o' is above 0 the loss is lambda_coord ((bx - bx')^2 + (by - by')^2 +
    (s(bw) - s(bw'))^2 + (s(bh) - s(bh'))^2) + (o - o')^2 + sum (p - p')^2 over the classes, elsewhere
    lambda_noobj (o - o')^2. s(v) = v / sqrt(|v| + 1e-6) is the square root with a gradient at 0 and below.

    Args:
        predictions: [..., 5 + C] floating, in the form of the targets.
        targets: [..., 5 + C] floating, as `assign_yolo_grid` gives them.
        lambda_coord: the weight of centres and sizes, at least 0.
        lambda_noobj: the weight of objectness where there is no object, at least 0.
        reduction: "none", "mean" (over places, not images) or "sum".

    Returns:
        [...], or a scalar if reduced, in the dtype of `predictions`. Halves are computed in float32, sums are made in
        double, in an order that depends on nothing but the shape.

    Gradient: to `predictions`, in one fused pass; there is no second derivative.

    Raises:
        ValueError: a weight is negative, or `reduction` is none of the above.
        RuntimeError: wrong shapes, dtypes or devices, or `targets` requires a gradient.

    Example:
        >>> targets = torch.tensor([[1.0, 0.5, 0.5, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
        >>> yolo_loss(torch.full((2, 6), 0.5), targets, reduction="none")
        tensor([1.3579, 0.1250])

    Source: Redmon et al., "You Only Look Once", CVPR 2016, equation 3, with the target 1 for the objectness in place of
    an IoU.
    """
    op = "yolo_loss"
    check_tensors(op, predictions=predictions, targets=targets)
    lambda_coord, lambda_noobj = number(op, "lambda_coord", lambda_coord), number(op, "lambda_noobj", lambda_noobj)
    _check_not_negative(op, "lambda_coord", lambda_coord)
    _check_not_negative(op, "lambda_noobj", lambda_noobj)
    code = _number_of(op, reduction)
    _check_no_gradient(op, "targets", targets)
    _library.refuse_forward_mode(op, predictions)
    return _library.ops.yolo_loss(_for_autocast(predictions), targets, lambda_coord, lambda_noobj, code)


@register_fake("assign_yolo_grid")
def _(
    gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, anchors: Tensor | None, rows: int, columns: int, height: int,
    width: int, classes: int,
) -> Tensor:  # fmt: skip
    dtype = torch.float64 if gt_boxes.dtype == torch.float64 else torch.float32
    per_cell = (5 + classes,) if anchors is None else (anchors.shape[0], 5 + classes)
    return gt_boxes.new_empty(gt_boxes.shape[0], rows, columns, *per_cell, dtype=dtype)


@register_fake("yolo_loss")
def _(predictions: Tensor, targets: Tensor, lambda_coord: float, lambda_noobj: float, reduction: int) -> Tensor:
    return predictions.new_empty(() if reduction else predictions.shape[:-1])


@register_fake("yolo_loss_backward")
def _(
    grad: Tensor, predictions: Tensor, targets: Tensor, lambda_coord: float, lambda_noobj: float, reduction: int
) -> Tensor:
    return predictions.new_empty(predictions.shape)


register_gradient("yolo_loss")
