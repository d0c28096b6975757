"""Boxes: areas, formats, clipping, filtering, the boxes of masks, and ground truth as a batch.

Formats. Lengths are in continuous pixels, r in degrees, counter-clockwise in the image plane:

- "xyxy": two opposite corners x1, y1, x2, y2;  "xywh": corner x1, y1, width, height;  "cxcywh": centre, width, height;
- "cxcywhr": centre, width, height, rotation about the centre;  "xywhr": the rotated first corner instead of the centre;
- "xyxyxyxy": the four corners of a rotated box, from the first (top left where r = 0) by way of the top right.

Floating boxes are float16, bfloat16, float32 or float64; halves are computed in float32 and rounded once. One compiled
kernel does the work of eager code. Where a gradient is wanted, or torch.compile looks on, it is left to torch's ops:
the same values, with autograd's gradients, or fused by the compiler.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import handle_torch_function

from . import _checks, _library
from ._library import register_fake

# In the order of BoxFormat in csrc/boxes/boxes.h, with the number of coordinates.
_COORDINATES = {"xyxy": 4, "xywh": 4, "cxcywh": 4, "xywhr": 5, "cxcywhr": 5, "xyxyxyxy": 8}
_NUMBERS = {fmt: number for number, fmt in enumerate(_COORDINATES)}

# What integers are converted in where their own dtype may not hold the sum of two.
_WIDE = dict.fromkeys((torch.int8, torch.uint8, torch.int16, torch.uint16), torch.int32)
_WIDE |= dict.fromkeys((torch.uint32, torch.uint64), torch.int64)  # in which torch computes nothing


def box_area(boxes: Tensor, fmt: str = "xyxy") -> Tensor:
    """The area of each box: width * height.

    Args:
        boxes: [..., 4], [..., 5] or [..., 8] as `fmt` says, floating or integer.
        fmt: any of the six formats of `detops.boxes`.

    Returns:
        [...] float32, float64 for float64 boxes, int64 for integers.

    Degenerate boxes: nothing is clamped, so a box inverted along one axis has a negative area; NaN gives NaN. The area
    of "xyxyxyxy" is the magnitude of the cross product of its first two sides. Differentiable.

    Raises:
        ValueError: `fmt` is none of the formats.
        RuntimeError: `boxes` has a wrong shape or dtype.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [2., 2., 5., 4.]])
        >>> box_area(boxes)
        tensor([100.,   6.])

    Source: torchvision.ops.box_area, which has no rotated formats, and whose areas of integers wrap beyond int32: there
    the area of [0, 0, 60000, 60000] is negative.
    """
    _check_format("box_area", "fmt", fmt)
    if not isinstance(boxes, Tensor):
        _checks.check_tensors("box_area", boxes=boxes)
        return handle_torch_function(box_area, (boxes,), boxes, fmt)
    if _kernel_serves(boxes):
        return _library.ops.box_area(boxes, _NUMBERS[fmt])
    check_boxes("box_area", boxes, fmt)
    boxes = _widened(boxes) if boxes.is_floating_point() else boxes.long()
    if fmt == "xyxy":
        x1, y1, x2, y2 = boxes.unbind(-1)
        return (x2 - x1) * (y2 - y1)
    if fmt == "xyxyxyxy":
        x1, y1, x2, y2, x3, y3 = boxes[..., :6].unbind(-1)
        return ((x2 - x1) * (y3 - y2) - (y2 - y1) * (x3 - x2)).abs()
    return boxes[..., 2] * boxes[..., 3]


def box_convert(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """Converts boxes from one format to another, of the three without rotation or of the three with it.

    Args:
        boxes: [..., 4], [..., 5] or [..., 8] as `in_fmt` says, floating or integer.
        in_fmt: the format of `boxes`, one of the six of `detops.boxes`.
        out_fmt: the wanted format.

    Returns:
        [..., 4], [..., 5] or [..., 8], a new tensor of the same dtype. Integers become float32 where a centre takes
        part; between rotated formats they are rounded and stay integers. Integers below 32 bits, which may not hold the
        sum of two, become int32 wherever something is computed.

    Degenerate boxes are converted like any other. From corners r is in [-180, 180]. Differentiable; the gradient of a
    side of length 0 given by its corners is NaN.

    Raises:
        ValueError: `in_fmt` or `out_fmt` is none of the formats.
        NotImplementedError: one has a rotation and the other has none.
        RuntimeError: `boxes` has a wrong shape or dtype.

    Example:
        >>> box_convert(torch.tensor([[5., 5., 10., 4.]]), "cxcywh", "xyxy")
        tensor([[ 0.,  3., 10.,  7.]])

    Source: torchvision.ops.box_convert, with its values. (Halves are rounded once here, and at every step there.
    Integers below 32 bits keep their dtype there, and wrap: the corner of uint8 [200, 200, 100, 100] "xywh" is 44, 44.)
    """
    if not isinstance(boxes, Tensor):
        _checks.check_tensors("box_convert", boxes=boxes)
        return handle_torch_function(box_convert, (boxes,), boxes, in_fmt, out_fmt)
    _check_format("box_convert", "in_fmt", in_fmt)
    _check_format("box_convert", "out_fmt", out_fmt)
    rotated = _COORDINATES[in_fmt] > 4
    if rotated != (_COORDINATES[out_fmt] > 4):
        with_or_without = "with" if rotated else "without"
        raise NotImplementedError(
            f"box_convert: out_fmt must be a format {with_or_without} rotation, like in_fmt {in_fmt!r}, got {out_fmt!r}"
        )
    if in_fmt != out_fmt and not rotated and _kernel_serves(boxes):
        return _library.ops.box_convert(boxes, _NUMBERS[in_fmt], _NUMBERS[out_fmt])
    check_boxes("box_convert", boxes, in_fmt)
    if in_fmt == out_fmt:
        return boxes.clone(memory_format=torch.contiguous_format)
    boxes = boxes.to(_WIDE.get(boxes.dtype, boxes.dtype))
    if rotated:
        return _convert_rotated(boxes, in_fmt, out_fmt)
    result = _from_ends(*_to_ends(_widened(boxes), in_fmt), out_fmt)
    return result.to(boxes.dtype) if boxes.is_floating_point() else result


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Moves every coordinate that lies outside the image to its border.

    Args:
        boxes: [..., 4] xyxy, floating or integer.
        size: (height, width) of the image, at least 0.

    Returns:
        [..., 4] of the same dtype, x in [0, width] and y in [0, height]. NaN stays NaN.

    Differentiable: the gradient passes where a coordinate is inside or on the border. Under torch.jit.trace a size that
    is computed from tensors, as that of `images.shape`, stays a value of the graph.

    Raises:
        ValueError: a size is negative or NaN.
        RuntimeError: `boxes` has a wrong shape or dtype.

    Example:
        >>> clip_boxes_to_image(torch.tensor([[-5., 2., 30., 8.]]), (6, 20))
        tensor([[ 0.,  2., 20.,  6.]])

    Source: torchvision.ops.clip_boxes_to_image.
    """
    op = "clip_boxes_to_image"
    if not isinstance(boxes, Tensor) or _is_traced(size):
        _checks.check_tensors(op, boxes=boxes)
        return handle_torch_function(clip_boxes_to_image, (boxes, size, *_parts(size)), boxes, size)
    sides = _checks.numbers(op, "size", size)
    height, width = sides if len(sides) == 2 else (-1, -1)
    traced = isinstance(height, Tensor) or isinstance(width, Tensor)  # by torch.jit.trace
    if not traced and not (height >= 0 and width >= 0):  # so that NaN fails too
        raise ValueError(f"{op}: size must be (height, width), each at least 0, got {sides}")
    if not traced and _kernel_serves(boxes):
        return _library.ops.clip_boxes_to_image(boxes, height, width)
    check_boxes(op, boxes)
    if boxes.is_floating_point():
        wide = _widened(boxes)
    else:  # in integers, which a size may be too large for, and a float too coarse
        wide = boxes.long()
        most = torch.iinfo(boxes.dtype).max
        height, width = (
            side.floor().clamp(max=most).long() if isinstance(side, Tensor) else math.floor(min(side, most))
            for side in (height, width)
        )
    x, y = _clamped(wide[..., 0::2], width), _clamped(wide[..., 1::2], height)
    return torch.stack((x, y), dim=-1).flatten(-2).to(boxes.dtype)


def _clamped(coordinates: Tensor, limit: float | Tensor) -> Tensor:
    """From 0 to a limit."""
    if isinstance(limit, Tensor):
        return torch.minimum(coordinates.clamp(min=0), limit.to(coordinates.device))
    return coordinates.clamp(0, limit)


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """The indices of the boxes whose sides are both at least `min_size`.

    Args:
        boxes: [..., 4] xyxy, floating or integer.
        min_size: in pixels, compared in the dtype in which the sides are computed.

    Returns:
        int64 [k], ascending: rows of `boxes`, and of `boxes.reshape(-1, 4)` where there are more dimensions.

    A box with a NaN side is removed. On a GPU one host synchronisation, for k. No gradient.

    Raises:
        ValueError: `min_size` is NaN.
        RuntimeError: `boxes` has a wrong shape or dtype.

    Example:
        >>> remove_small_boxes(torch.tensor([[0., 0., 9., 1.], [0., 0., 9., 2.]]), 2.0)
        tensor([1])

    Source: torchvision.ops.remove_small_boxes. (It subtracts halves and narrow integers in their own dtype, and of
    batched boxes it gives the first index only.)
    """
    if not isinstance(boxes, Tensor):
        _checks.check_tensors("remove_small_boxes", boxes=boxes)
        return handle_torch_function(remove_small_boxes, (boxes,), boxes, min_size)
    min_size = _checks.number("remove_small_boxes", "min_size", min_size)
    if min_size != min_size:
        raise ValueError("remove_small_boxes: min_size must be a number, got nan")
    check_boxes("remove_small_boxes", boxes)
    if boxes.is_floating_point():
        return _library.ops.remove_small_boxes(boxes, min_size)
    x1, y1, x2, y2 = boxes.reshape(-1, 4).long().unbind(1)
    # As an integer, since torch would compare in its default dtype, in which sides are rounded.
    least = math.ceil(max(-(2.0**63), min(min_size, 2.0**62)))
    return ((x2 - x1 >= least) & (y2 - y1 >= least)).nonzero().squeeze(1)


def masks_to_boxes(masks: Tensor) -> Tensor:
    """The smallest box around the pixels of each mask that are set: not zero.

    Args:
        masks: [..., H, W], bool, integer or floating. NaN is set.

    Returns:
        float32 [..., 4] xyxy: the numbers of the first and last column and row that hold a set pixel, so a single pixel
        has x1 = x2 and y1 = y2. Zeros for a mask without any.

    One pass over the masks, without a temporary of their size, and without host synchronisation. No gradient.

    Raises:
        RuntimeError: `masks` has less than two dimensions, another dtype, or over 2147418112 rows, columns or masks.

    Example:
        >>> masks = torch.zeros(1, 5, 5)
        >>> masks[0, 1:3, 2:5] = 1
        >>> masks_to_boxes(masks)
        tensor([[2., 1., 4., 2.]])

    Source: torchvision.ops.masks_to_boxes. (Masks of size 0 give no rows there, and one row of zeros each here.)
    """
    if not isinstance(masks, Tensor):
        _checks.check_tensors("masks_to_boxes", masks=masks)
        return handle_torch_function(masks_to_boxes, (masks,), masks)
    return _library.ops.masks_to_boxes(masks.detach() if masks.requires_grad else masks)


def _kernel_serves(boxes: Tensor) -> bool:
    """Eager code of floating boxes without gradient; not inside torch.func, whose tensors hide that they have one."""
    if boxes.dtype not in _checks.FLOATING or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    wants_gradient = boxes.requires_grad and torch.is_grad_enabled()
    return not wants_gradient and forward_ad.unpack_dual(boxes).tangent is None


def _check_format(op: str, argument: str, fmt: str) -> None:
    if not _checks.is_one_of(fmt, _COORDINATES):
        raise ValueError(f"{op}: {argument} must be one of {', '.join(_COORDINATES)}, got {fmt!r}")


def check_boxes(op: str, boxes: Tensor, fmt: str = "xyxy", argument: str = "boxes") -> None:
    """What the compiled ops check, where they are not called."""
    if boxes.ndim == 0 or boxes.shape[-1] != _COORDINATES[fmt]:
        raise RuntimeError(f"{op}: {argument} must have shape [..., {_COORDINATES[fmt]}], got {list(boxes.shape)}")
    _checks.check_real(op, **{argument: boxes})


def _is_traced(size: Any) -> bool:
    """Whether it, or a side of it, stands for a value under torch.fx.symbolic_trace."""
    return isinstance(size, torch.fx.Proxy) or any(isinstance(side, torch.fx.Proxy) for side in _parts(size))


def _parts(size: Any) -> tuple:
    return tuple(size) if isinstance(size, list | tuple) else ()


def _widened(boxes: Tensor) -> Tensor:
    """Halves as float32."""
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def _to_ends(boxes: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """The corners (x1, y1) and (x2, y2)."""
    first, second = boxes.split(2, dim=-1)
    if fmt == "xywh":
        return first, first + second
    if fmt == "cxcywh":
        half = 0.5 * second
        return first - half, first + half
    return first, second


def _from_ends(low: Tensor, high: Tensor, fmt: str) -> Tensor:
    if fmt == "xywh":
        return torch.cat((low, high - low), dim=-1)
    if fmt == "cxcywh":
        return torch.cat(((low + high) / 2, high - low), dim=-1)
    return torch.cat((low, high), dim=-1)


def _convert_rotated(boxes: Tensor, in_fmt: str, out_fmt: str) -> Tensor:
    """By way of "xywhr". torch's own sine, cosine and arc tangent leave a kernel little to save."""
    result = _widened(boxes)
    for fmt, step in ((in_fmt, _TO_XYWHR), (out_fmt, _FROM_XYWHR)):
        if fmt != "xywhr":
            result = step[fmt](result)
            if not boxes.is_floating_point():
                result = result.round().to(boxes.dtype)
    return result.to(boxes.dtype)


def _cos_sin(r: Tensor) -> tuple[Tensor, Tensor]:
    radians = r * torch.pi / 180.0
    return radians.cos(), radians.sin()


def _centre_to_corner(boxes: Tensor) -> Tensor:
    cx, cy, w, h, r = boxes.unbind(-1)
    cos, sin = _cos_sin(r)
    x, y = cx - w / 2 * cos - h / 2 * sin, cy - h / 2 * cos + w / 2 * sin
    return torch.stack((x, y, w, h, r), dim=-1)


def _corner_to_centre(boxes: Tensor) -> Tensor:
    x, y, w, h, r = boxes.unbind(-1)
    cos, sin = _cos_sin(r)
    cx, cy = x + w / 2 * cos + h / 2 * sin, y - w / 2 * sin + h / 2 * cos
    return torch.stack((cx, cy, w, h, r), dim=-1)


def _corner_to_corners(boxes: Tensor) -> Tensor:
    x1, y1, w, h, r = boxes.unbind(-1)
    cos, sin = _cos_sin(r)
    x2, y2 = x1 + w * cos, y1 - w * sin
    # Products of their own for each corner: the gradients then add up in torchvision's order.
    x3, y3 = x2 + h * sin, y2 + h * cos
    x4, y4 = x1 + h * sin, y1 + h * cos
    return torch.stack((x1, y1, x2, y2, x3, y3, x4, y4), dim=-1)


def _corners_to_corner(boxes: Tensor) -> Tensor:
    x1, y1, x2, y2, x3, y3 = boxes[..., :6].unbind(-1)
    r = torch.atan2(y1 - y2, x2 - x1) * 180 / torch.pi
    w = ((x2 - x1) ** 2 + (y1 - y2) ** 2).sqrt()
    h = ((x3 - x2) ** 2 + (y3 - y2) ** 2).sqrt()
    return torch.stack((x1, y1, w, h, r), dim=-1)


_TO_XYWHR = {"cxcywhr": _centre_to_corner, "xyxyxyxy": _corners_to_corner}
_FROM_XYWHR = {"cxcywhr": _corner_to_centre, "xyxyxyxy": _corner_to_corners}


@register_fake("box_area")
def _(boxes: Tensor, fmt: int) -> Tensor:
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    return boxes.new_empty(boxes.shape[:-1], dtype=dtype)


@register_fake("box_convert")
def _(boxes: Tensor, in_fmt: int, out_fmt: int) -> Tensor:
    return boxes.new_empty(boxes.shape)


@register_fake("clip_boxes_to_image")
def _(boxes: Tensor, height: float, width: float) -> Tensor:
    return boxes.new_empty(boxes.shape)


@register_fake("remove_small_boxes")
def _(boxes: Tensor, min_size: float) -> Tensor:
    return boxes.new_empty(_library.unknown_length("remove_small_boxes"), dtype=torch.int64)


@register_fake("masks_to_boxes")
def _(masks: Tensor) -> Tensor:
    return masks.new_empty((*masks.shape[:-2], 4), dtype=torch.float32)


@_library.register_result
class GroundTruth(NamedTuple):
    """The annotated boxes of a batch of images, padded to the same number; see `pad_ground_truth`."""

    boxes: Tensor
    """[B, M, 4] in the dtype of the inputs; 0 in padded rows."""
    labels: Tensor
    """[B, M] int64; -1 in padded rows."""
    valid: Tensor
    """[B, M] bool; False in padded rows."""


def pad_ground_truth(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> GroundTruth:
    """Pads per-image ground truth to one batch, the form that all batched ops of detops take.

    M is the largest number of boxes of an image. Rows that are not valid never influence a result of detops.

    Args:
        boxes: for each of B images a tensor [n, 4], or an empty one, all of one dtype and device.
        labels: for each image an integer tensor [n]: the classes of its boxes.

    Returns:
        `GroundTruth(boxes [B, M, 4], labels [B, M] int64, valid [B, M] bool)` on the device of the inputs. An empty
        list gives B = M = 0; images without boxes are ordinary. The rows of an image keep their order.

    Gradients pass to `boxes`. No host synchronisation.

    Raises:
        ValueError: the lists differ in length.
        RuntimeError: a tensor has a wrong shape, dtype or device.

    Example:
        >>> boxes = [torch.tensor([[0., 0., 8., 8.], [2., 2., 6., 6.]]), torch.zeros(0, 4)]
        >>> truth = pad_ground_truth(boxes, [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64)])
        >>> truth.labels.tolist()
        [[3, 1], [-1, -1]]
    """
    op = "pad_ground_truth"
    _checks.check_rows(op, "boxes", boxes)
    _checks.check_rows(op, "labels", labels)
    _library.refuse_vmap(op, *boxes, *labels)
    if len(boxes) != len(labels):
        raise ValueError(f"{op}: labels must have one tensor per image ({len(boxes)}), got {len(labels)}")
    for image, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        if image_boxes.numel() and (image_boxes.ndim != 2 or image_boxes.shape[1] != 4):
            raise RuntimeError(f"{op}: boxes[{image}] must have shape [n, 4], got {list(image_boxes.shape)}")
        if image_labels.numel() != image_boxes.numel() // 4 or image_labels.ndim != 1:
            raise RuntimeError(
                f"{op}: labels[{image}] must have shape [n] with n = {image_boxes.numel() // 4}, "
                f"got {list(image_labels.shape)}"
            )
        _checks.check_real(op, **{f"boxes[{image}]": image_boxes})
        if image_boxes.dtype != boxes[0].dtype:
            raise RuntimeError(
                f"{op}: boxes[{image}] must have the dtype of boxes[0] ({_library.dtype_name(boxes[0].dtype)}), "
                f"got {_library.dtype_name(image_boxes.dtype)}"
            )
        if image_labels.numel() and image_labels.dtype not in _checks.INTEGERS | {torch.bool}:
            raise RuntimeError(f"{op}: labels[{image}] must be integer, got {_library.dtype_name(image_labels.dtype)}")
        for name, each in ((f"boxes[{image}]", image_boxes), (f"labels[{image}]", image_labels)):
            if each.device != boxes[0].device:
                raise RuntimeError(
                    f"{op}: {name} must be on the device of boxes[0] ({boxes[0].device}), got {each.device}"
                )
    if len(boxes) == 0:
        return GroundTruth(
            torch.zeros(0, 0, 4), torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
        )
    return GroundTruth(
        pad_sequence([image_boxes.reshape(-1, 4) for image_boxes in boxes], batch_first=True),
        pad_sequence([image_labels.long() for image_labels in labels], batch_first=True, padding_value=-1),
        # Built on the device: lengths known to the host would have to be copied there.
        pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in labels], batch_first=True),
    )
