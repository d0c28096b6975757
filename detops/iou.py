"""Intersection over union (IoU) of boxes, and its relatives.

All functions share these rules, on every device:

- Boxes are xyxy in continuous pixels, unless `fmt` says otherwise. Leading batch dimensions broadcast.
- float16, bfloat16 and integer boxes are computed in float32; the result is float32, or float64 for float64 boxes.
- Values are those of torchvision's formulas in float32 and float64. For half boxes they equal the values for their
  float32 copies (torchvision subtracts in half first, which is off by up to 5e-3). A pair of empty boxes gives NaN.
- Gradients go to both arguments, in one fused deterministic pass. Ties of max and min split the gradient equally. There
  is no second derivative.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import _checks, _library
from . import boxes as _boxes
from ._gradients import register_gradient
from ._library import register_fake

# Numbers of the kinds, as csrc/iou/iou.h counts them.
_IOU, _GENERALIZED, _DISTANCE, _COMPLETE, _EFFICIENT, _IOA = range(6)
_NAMES = ("box_iou", *(f"{kind}_box_iou" for kind in ("generalized", "distance", "complete", "efficient")), "box_ioa")

_UPRIGHT = ("xyxy", "xywh", "cxcywh")
_ROTATED = ("cxcywhr", "xywhr", "xyxyxyxy")


def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy", *, aligned: bool = False) -> Tensor:
    """IoU = intersection / union of every pair of boxes, or of matching boxes.

    Args:
        boxes1: [..., N, K]: K is 4, 5 (xywhr, cxcywhr) or 8 (xyxyxyxy).
        boxes2: [..., M, K]; or [..., N, K] if aligned.
        fmt: "xyxy", "xywh", "cxcywh", or a rotated format as `box_convert` defines it: "cxcywhr", "xywhr" (angles in
            degrees, counter-clockwise as one looks at the image) or "xyxyxyxy" (the corners of a rectangle).
        aligned: pair the boxes row by row; rows broadcast as batch dimensions do.

    Returns:
        [..., N, M], or [..., N] if aligned; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`. Rotated boxes have no gradient.
    Identical rotated boxes give exactly 1, those that do not touch exactly 0.

    Raises:
        ValueError: unknown `fmt`.
        RuntimeError: wrong shapes, devices, batch dimensions that do not broadcast, or a gradient of rotated boxes is
            asked for.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> box_iou(boxes, boxes)
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])

    Source: torchvision.ops.box_iou, which has no aligned form. It takes the areas of xywh and cxcywh boxes as w h; here
    they are converted to xyxy first, which differs in the last bits.
    """
    if not (isinstance(boxes1, Tensor) and isinstance(boxes2, Tensor)):
        _checks.check_tensors("box_iou", boxes1=boxes1, boxes2=boxes2)
        return handle_torch_function(box_iou, (boxes1, boxes2), boxes1, boxes2, fmt, aligned=aligned)
    if fmt in _ROTATED:
        return _compare_rotated(boxes1, boxes2, fmt, aligned)
    if not _checks.is_one_of(fmt, _UPRIGHT):
        raise ValueError(f"box_iou: fmt must be one of {', '.join(_UPRIGHT + _ROTATED)}, got {fmt!r}")
    if fmt != "xyxy":
        boxes1, boxes2 = _convert(boxes1, boxes2, fmt, "xyxy")
    return _compare(_IOU, boxes1, boxes2, aligned)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor, *, aligned: bool = False) -> Tensor:
    """Generalized IoU: IoU - (C - U) / C, with the union U and the area C of the smallest box around both.

    Args:
        boxes1: [..., N, 4] xyxy.
        boxes2: [..., M, 4] xyxy; or [..., N, 4] if aligned.
        aligned: pair the boxes row by row.

    Returns:
        [..., N, M], or [..., N] if aligned, in [-1, 1]; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`.

    Raises:
        RuntimeError: wrong shapes, devices, or batch dimensions that do not broadcast.

    Example:
        >>> box1, box2 = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([[2., 0., 3., 1.]])
        >>> generalized_box_iou(box1, box2)
        tensor([[-0.3333]])

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019; torchvision.ops.generalized_box_iou.
    """
    return _compare(_GENERALIZED, boxes1, boxes2, aligned)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, aligned: bool = False) -> Tensor:
    """Distance IoU: IoU - d / (c + eps), with the squared distance d of the centres and the squared diagonal c of the
    smallest box around both.

    Args:
        boxes1: [..., N, 4] xyxy.
        boxes2: [..., M, 4] xyxy; or [..., N, 4] if aligned.
        eps: keeps the denominator positive.
        aligned: pair the boxes row by row.

    Returns:
        [..., N, M], or [..., N] if aligned; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`.

    Raises:
        RuntimeError: wrong shapes, devices, or batch dimensions that do not broadcast.

    Example:
        >>> box1, box2 = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([[2., 0., 3., 1.]])
        >>> distance_box_iou(box1, box2)
        tensor([[-0.4000]])

    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020; torchvision.ops.distance_box_iou.
    """
    return _compare(_DISTANCE, boxes1, boxes2, aligned, eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, aligned: bool = False) -> Tensor:
    """Complete IoU: distance IoU - alpha v, with v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2 and
    alpha = v / (1 - IoU + v + eps).

    Args:
        boxes1: [..., N, 4] xyxy.
        boxes2: [..., M, 4] xyxy; or [..., N, 4] if aligned.
        eps: keeps the denominators positive.
        aligned: pair the boxes row by row.

    Returns:
        [..., N, M], or [..., N] if aligned; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`. alpha is a constant in the
    gradient, as published.

    Raises:
        RuntimeError: wrong shapes, devices, or batch dimensions that do not broadcast.

    Example:
        >>> box1, box2 = torch.tensor([[0., 0., 2., 1.]]), torch.tensor([[0., 0., 1., 2.]])
        >>> complete_box_iou(box1, box2)
        tensor([[0.2371]])

    Source: Zheng et al., "Distance-IoU Loss", AAAI 2020; torchvision.ops.complete_box_iou.
    """
    return _compare(_COMPLETE, boxes1, boxes2, aligned, eps)


def efficient_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7, *, aligned: bool = False) -> Tensor:
    """Efficient IoU: distance IoU - (w1 - w2)^2 / (cw^2 + eps) - (h1 - h2)^2 / (ch^2 + eps), with the width cw and
    height ch of the smallest box around both.

    Args:
        boxes1: [..., N, 4] xyxy.
        boxes2: [..., M, 4] xyxy; or [..., N, 4] if aligned.
        eps: keeps the denominators positive.
        aligned: pair the boxes row by row.

    Returns:
        [..., N, M], or [..., N] if aligned; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`.

    Raises:
        RuntimeError: wrong shapes, devices, or batch dimensions that do not broadcast.

    Example:
        >>> box1, box2 = torch.tensor([[0., 0., 2., 1.]]), torch.tensor([[0., 0., 1., 2.]])
        >>> efficient_box_iou(box1, box2)
        tensor([[-0.2292]])

    Source: Zhang et al., "Focal and Efficient IOU Loss for Accurate Bounding Box Regression", 2021.
    """
    return _compare(_EFFICIENT, boxes1, boxes2, aligned, eps)


def box_ioa(boxes1: Tensor, boxes2: Tensor, *, aligned: bool = False) -> Tensor:
    """Intersection over the area of the first box: how much of it the second one covers. Crowd and ignore regions
    are matched by it.

    Args:
        boxes1: [..., N, 4] xyxy.
        boxes2: [..., M, 4] xyxy; or [..., N, 4] if aligned.
        aligned: pair the boxes row by row.

    Returns:
        [..., N, M], or [..., N] if aligned, in [0, 1]; float32, or float64 for float64 boxes.

    dtypes, degenerate boxes and gradients: see the notes of the module `detops.iou`.

    Raises:
        RuntimeError: wrong shapes, devices, or batch dimensions that do not broadcast.

    Example:
        >>> box1, box2 = torch.tensor([[0., 0., 2., 1.]]), torch.tensor([[0., 0., 1., 2.]])
        >>> box_ioa(box1, box2)
        tensor([[0.5000]])

    Source: the IoF of mmdetection's ignore regions and pycocotools' IoU with crowds.
    """
    return _compare(_IOA, boxes1, boxes2, aligned)


def max_iou(boxes1: Tensor, boxes2: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each box of boxes1, the largest IoU with any box of boxes2 and the index of that box, without the IoU matrix.

    Args:
        boxes1: [..., N, 4] xyxy, such as anchors.
        boxes2: [..., M, 4] xyxy, such as padded ground truth. Batch dimensions broadcast.
        valid: [..., M] bool: which of boxes2 take part; all if None. Rows that are not valid may hold anything.

    Returns:
        (values [..., N], indices [..., N] int64). Ties go to the lower index; NaN IoUs count as 0. A row with no valid
        partner gives value 0 and index -1. Values are float32, or float64 for float64 boxes.

    dtypes: see the notes of the module `detops.iou`. No gradient.

    Raises:
        RuntimeError: wrong shapes, dtypes or devices, or batch dimensions that do not broadcast.

    Example:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.]])
        >>> max_iou(anchors, torch.tensor([[0., 0., 10., 5.], [0., 0., 10., 8.]]))
        (tensor([0.8000, 0.0000]), tensor([1, 0]))

    Source: torchvision's box_iou(...).max(1), with the lower index at ties on every device.
    """
    if not (isinstance(boxes1, Tensor) and isinstance(boxes2, Tensor)):
        _checks.check_tensors("max_iou", boxes1=boxes1, boxes2=boxes2)
        return handle_torch_function(max_iou, (boxes1, boxes2, valid), boxes1, boxes2, valid)
    _checks.check_optional_tensors("max_iou", valid=valid)
    boxes1, boxes2 = _share_batch(*_share_dtype("max_iou", boxes1.detach(), boxes2.detach()))
    if valid is not None and valid.ndim and valid.shape[:-1] != boxes2.shape[:-2]:
        try:
            batch = torch.broadcast_shapes(valid.shape[:-1], boxes1.shape[:-2], boxes2.shape[:-2])
        except RuntimeError:
            return _library.ops.max_iou(boxes1, boxes2, valid)  # which names what does not fit
        boxes1, boxes2 = (each.expand(*batch, *each.shape[-2:]) for each in (boxes1, boxes2))
        valid = valid.expand(*batch, valid.shape[-1])
    return _library.ops.max_iou(boxes1, boxes2, valid)


def _compare(kind: int, boxes1: Tensor, boxes2: Tensor, aligned: bool, eps: float = 0.0) -> Tensor:
    op = _NAMES[kind]
    if not (isinstance(boxes1, Tensor) and isinstance(boxes2, Tensor)):
        _checks.check_tensors(op, boxes1=boxes1, boxes2=boxes2)
        return handle_torch_function(_compare, (boxes1, boxes2), kind, boxes1, boxes2, aligned, eps)
    _library.refuse_forward_mode(op, boxes1, boxes2)
    eps = _checks.number(op, "eps", eps)
    if not eps >= 0:  # so that NaN fails too
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    boxes1, boxes2 = _share_dtype(op, boxes1, boxes2)
    boxes1, boxes2 = _share_rows(boxes1, boxes2) if aligned else _share_batch(boxes1, boxes2)
    return _library.ops.box_iou(boxes1, boxes2, kind, aligned, eps)


def _compare_rotated(boxes1: Tensor, boxes2: Tensor, fmt: str, aligned: bool) -> Tensor:
    if torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad):
        raise RuntimeError("box_iou: rotated boxes must not require a gradient, got some that do: detach them")
    _library.refuse_forward_mode("box_iou", boxes1, boxes2)
    boxes1, boxes2 = _convert(boxes1, boxes2, fmt, "cxcywhr")
    boxes1, boxes2 = _share_rows(boxes1, boxes2) if aligned else _share_batch(boxes1, boxes2)
    return _library.ops.rotated_box_iou(boxes1, boxes2, aligned)


def _convert(boxes1: Tensor, boxes2: Tensor, fmt: str, out_fmt: str) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the result and in another format."""
    boxes1, boxes2 = _share_dtype("box_iou", boxes1, boxes2)
    if fmt == out_fmt:
        return boxes1, boxes2
    _boxes.check_boxes("box_iou", boxes1, fmt, "boxes1")
    _boxes.check_boxes("box_iou", boxes2, fmt, "boxes2")
    return _boxes.box_convert(boxes1, fmt, out_fmt), _boxes.box_convert(boxes2, fmt, out_fmt)


def _share_dtype(op: str, boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the result."""
    _checks.check_real(op, boxes1=boxes1, boxes2=boxes2)
    double = boxes1.dtype == torch.float64 or boxes2.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    return boxes1.to(dtype), boxes2.to(dtype)


def _share_batch(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same leading dimensions, as views."""
    if boxes1.shape[:-2] == boxes2.shape[:-2]:
        return boxes1, boxes2
    return _expand(boxes1, boxes2, 2)


def _share_rows(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same dimensions but for the last, as views."""
    if boxes1.shape[:-1] == boxes2.shape[:-1]:
        return boxes1, boxes2
    return _expand(boxes1, boxes2, 1)


def _expand(boxes1: Tensor, boxes2: Tensor, own: int) -> tuple[Tensor, Tensor]:
    if min(boxes1.ndim, boxes2.ndim) < own:
        return boxes1, boxes2  # the op says so
    try:
        shared = torch.broadcast_shapes(boxes1.shape[:-own], boxes2.shape[:-own])
    except RuntimeError:
        return boxes1, boxes2  # the op names what does not fit
    return boxes1.expand(*shared, *boxes1.shape[-own:]), boxes2.expand(*shared, *boxes2.shape[-own:])


@register_fake("box_iou")
def _(boxes1: Tensor, boxes2: Tensor, kind: int, aligned: bool, eps: float) -> Tensor:
    if aligned:
        return boxes1.new_empty(boxes1.shape[:-1])
    return boxes1.new_empty(*boxes1.shape[:-1], boxes2.shape[-2])


@register_fake("box_iou_backward")
def _(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: int,
    aligned: bool,
    eps: float,
    wanted1: bool = True,
    wanted2: bool = True,
) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape if wanted1 else 0), boxes2.new_empty(boxes2.shape if wanted2 else 0)


@register_fake("rotated_box_iou")
def _(boxes1: Tensor, boxes2: Tensor, aligned: bool) -> Tensor:
    if aligned:
        return boxes1.new_empty(boxes1.shape[:-1])
    return boxes1.new_empty(*boxes1.shape[:-1], boxes2.shape[-2])


@register_fake("max_iou")
def _(boxes1: Tensor, boxes2: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape[:-1]), boxes1.new_empty(boxes1.shape[:-1], dtype=torch.int64)


register_gradient("box_iou")
