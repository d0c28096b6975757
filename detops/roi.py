"""Features of regions of interest (RoIs): roi_align, upright and rotated, from one map or a whole pyramid.

Whole pixels and position-sensitive maps: `detops.roi_pooling`. Modules: `detops.roi_modules`.

All functions share these rules, on every device:

- Boxes are xyxy in pixels of the image: a tensor [K, 5] whose first column is the batch index, or a list with one
  tensor [L, 4] for each image. `spatial_scale` brings them onto the map. They are taken as float32 (float64 for
  float64 features), whatever their dtype. In a [K, 5] of half precision the batch index is rounded like the
  coordinates: from image 257 on in bfloat16, and 2,049 in float16, it may name another image. Lists have no such limit.
- Results have the dtype and the memory format of the features: channels_last gives channels_last. float16 and bfloat16
  are computed in float32 and rounded once.
- Gradients go to the features, not to the boxes. They are the same bits on every run, as are the results.
- A RoI with a NaN or an infinite coordinate gives zeros, and zero gradient. Finite ones of any size and place give what
  the formula says; no time is spent on samples off the map, and nothing outside a tensor is read.
- A batch index out of range is an error on the CPU. On a GPU, where raising would need a host synchronisation, such a
  RoI gives zeros.
"""

import math
import operator
from itertools import pairwise

import torch
import torch.fx
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import handle_torch_function

from . import _checks, _library
from ._gradients import is_channels_last, register_gradient
from ._library import register_fake


class BoxFormatError(RuntimeError, AssertionError):
    """Raised for boxes that are neither [K, 5] nor a list of [L, 4]. torchvision raises AssertionError here."""


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """Pools each RoI to a fixed size: the mean, or the largest, of bilinear samples in each bin.

    A RoI is divided into bins of equal size, and each bin is sampled at the centres of a regular grid of n x n cells.
    A sample weighs its four pixels bilinearly; one more than a pixel off the map counts as 0.

    Args:
        input: [N, C, H, W] features, floating.
        boxes: [K, 5] (batch index, x1, y1, x2, y2) or a list of N tensors [L, 4] (x1, y1, x2, y2).
        output_size: bins along each axis, (height, width) or one number for both.
        spatial_scale: pixels of `input` per pixel of the image.
        sampling_ratio: n, at most 4096; if not positive, as many as a bin is pixels long, rounded up, for each axis.
        aligned: take pixel centres at half-integers, which the box convention asks for. If False, coordinates are off
            by half a pixel and RoIs are at least 1 x 1 pixel, as in the first Mask R-CNNs.
        mode: "avg" or "max".

    Returns:
        [K, C, height, width] in the dtype and memory format of `input`.

    Inverted boxes have no samples under adaptive sampling, and give zeros. Ties of samples go to the first in reading
    order, and to samples on the map; the first NaN wins over all. Gradient: to `input`, for "max" to the pixels of the
    winning sample; twice differentiable for "avg".

    Raises:
        ValueError: `output_size` or `spatial_scale` is not positive, `sampling_ratio` above 4096, or `mode` unknown.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: a wrong shape, dtype or device, or a batch index out of range (on the CPU).

    Example:
        >>> features = torch.arange(16.0).view(1, 1, 4, 4)
        >>> roi_align(features, [torch.tensor([[0., 0., 4., 4.]])], 2, aligned=True)
        tensor([[[[ 2.5000,  4.5000],
                  [10.5000, 12.5000]]]])

    Source: He et al., Mask R-CNN, ICCV 2017; torchvision.ops.roi_align, which has no maximum; mmcv.ops.roi_align, which
    has.
    """
    op = "roi_align"
    if stays_a_call(op, input, boxes):
        options = {"output_size": output_size, "spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio}
        options |= {"aligned": aligned, "mode": mode}
        return handle_torch_function(roi_align, (input, boxes), input, boxes, **options)
    if not _checks.is_one_of(mode, ("avg", "max")):
        raise ValueError(f"{op}: mode must be 'avg' or 'max', got {mode!r}")
    bins_y, bins_x = _pair(op, output_size)
    spatial_scale = _scale(op, "spatial_scale", spatial_scale)
    sampling_ratio = _samples(op, sampling_ratio)
    aligned = bool(aligned)
    rows = _rows(op, boxes, input)
    if mode == "max":
        keep = _needs_gradient(input)
        return _library.ops.roi_align_max(input, rows, spatial_scale, bins_y, bins_x, sampling_ratio, aligned, keep)[0]
    return _library.ops.roi_align(input, rows, spatial_scale, bins_y, bins_x, sampling_ratio, aligned)


def roi_align_rotated(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """roi_align of rotated boxes: the mean of bilinear samples in each bin, on a grid that is rotated with the box.

    Args:
        input: [N, C, H, W] features, floating.
        boxes: [K, 6] (batch index, cx, cy, width, height, angle) or a list of N tensors [L, 5] (cx, cy, width, height,
            angle), the angle in degrees, counter-clockwise as one looks at the image.
        output_size: bins along each axis, (height, width) or one number for both.
        spatial_scale: pixels of `input` per pixel of the image.
        sampling_ratio: as of `roi_align`.

    Returns:
        [K, C, height, width] in the dtype and memory format of `input`.

    Pixel centres are at half-integers, as in `roi_align` with aligned=True. Boxes of negative width or height have no
    samples under adaptive sampling, and give zeros. Gradient: to `input`; twice differentiable.

    Raises:
        ValueError: `output_size` or `spatial_scale` is not positive.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: a wrong shape, dtype or device, or a batch index out of range (on the CPU).

    Example:
        >>> features = torch.arange(16.0).view(1, 1, 4, 4)
        >>> roi_align_rotated(features, [torch.tensor([[2., 2., 4., 4., 90.]])], 2)
        tensor([[[[10.5000,  2.5000],
                  [12.5000,  4.5000]]]])

    Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals, 2018; detectron2's
    ROIAlignRotated, which runs for ever or crashes on boxes that are not finite.
    """
    op = "roi_align_rotated"
    if stays_a_call(op, input, boxes):
        options = {"output_size": output_size, "spatial_scale": spatial_scale, "sampling_ratio": sampling_ratio}
        return handle_torch_function(roi_align_rotated, (input, boxes), input, boxes, **options)
    bins_y, bins_x = _pair(op, output_size)
    spatial_scale = _scale(op, "spatial_scale", spatial_scale)
    sampling_ratio = _samples(op, sampling_ratio)
    rows = _rows(op, boxes, input, coordinates=5)
    return _library.ops.roi_align_rotated(input, rows, spatial_scale, bins_y, bins_x, sampling_ratio)


def multi_scale_roi_align(
    features: list[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    *,
    spatial_scales: list[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """roi_align over the maps of a pyramid: each RoI is pooled from the map that fits its size, all in one pass.

    A box of area A belongs to level floor(canonical_level + log2(sqrt(A) / canonical_scale) + 1e-6), where the map of
    spatial scale 2^-k is level k; boxes beyond the first or last map belong to that one.

    Args:
        features: 1 to 8 maps [N, C, H, W] of one dtype, from fine to coarse.
        boxes: as of `roi_align`.
        output_size: as of `roi_align`.
        spatial_scales: that of each map: powers of two, each half of the one before, or any number of one map alone.
        sampling_ratio: as of `roi_align`.
        aligned: as of `roi_align`.
        canonical_scale: the side of a box that belongs to `canonical_level`.
        canonical_level: see there.

    Returns:
        [K, C, height, width] in the dtype and memory format of the first map.

    Gradient: to `features`; twice differentiable.

    Raises:
        ValueError: `output_size`, a spatial scale or `canonical_scale` is not positive, or the scales of several maps
            are not as above.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: wrong shapes, dtypes or devices, maps that differ in N, C or dtype, or a batch index out of range
            (on the CPU).

    Example:
        >>> features = [torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 32, 32)]
        >>> boxes = torch.tensor([[0, 10., 10., 50., 50.], [0, 10., 10., 250., 250.]])
        >>> multi_scale_roi_align(features, boxes, 1, spatial_scales=[1 / 4, 1 / 8], canonical_level=3).flatten()
        tensor([0.0000, 1.0000])

    Source: Lin et al., Feature Pyramid Networks, CVPR 2017; torchvision.ops.MultiScaleRoIAlign, which pools each level
    by itself.
    """
    op = "multi_scale_roi_align"
    spatial_scales = [
        _scale(op, "spatial_scales", scale) for scale in _checks.numbers(op, "spatial_scales", spatial_scales)
    ]
    for scale, next_scale in pairwise(spatial_scales):
        if next_scale != scale / 2 or not math.log2(scale).is_integer():
            raise ValueError(
                f"{op}: spatial_scales must be powers of two, each half of the one before, got {spatial_scales}"
            )
    return pool_levels(
        features, boxes, output_size, spatial_scales, sampling_ratio, aligned, canonical_scale, canonical_level
    )


def pool_levels(
    features: list[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    """`multi_scale_roi_align` of maps of which the i-th is that of the i-th level, whatever its scale.

    There are as many levels as there are octaves from the first scale to the last: maps beyond them go unused.
    """
    op = "multi_scale_roi_align"
    bins_y, bins_x = _pair(op, output_size)
    canonical_scale = _scale(op, "canonical_scale", canonical_scale)
    canonical_level = _checks.integer(op, "canonical_level", canonical_level)
    sampling_ratio = _samples(op, sampling_ratio)
    aligned = bool(aligned)
    _checks.check_tensor_list(op, "features", features)
    if not features:
        raise ValueError(f"{op}: features must be 1 to 8 maps, got none")
    _library.refuse_forward_mode(op, *features)
    rows = _rows(op, boxes, features[0])
    return _library.ops.multi_scale_roi_align(
        features, rows, spatial_scales, bins_y, bins_x, sampling_ratio, aligned, canonical_scale, canonical_level
    )


_MOST_BINS = 2**31 - 2**16  # of a RoI


def stays_a_call(op: str, input: Tensor, boxes: Tensor | list[Tensor]) -> bool:
    """Whether torch.fx.symbolic_trace is to see the op and nothing of what it does."""
    if isinstance(input, Tensor):
        return isinstance(boxes, torch.fx.Proxy)
    _checks.check_tensors(op, input=input)
    return True


def _pair(op: str, output_size) -> tuple[int, int]:
    sizes = _whole_numbers(output_size)
    if len(sizes) != 2 or not all(size >= 1 for size in sizes):
        raise ValueError(f"{op}: output_size must be one or two positive whole numbers, got {output_size!r}")
    if sizes[0] * sizes[1] > _MOST_BINS:
        raise ValueError(f"{op}: output_size must make at most {_MOST_BINS} bins, got {output_size!r}")
    return sizes


def _whole_numbers(output_size) -> tuple:
    """One number twice, or each of a sequence; of numbers all that `operator.index` takes."""
    if isinstance(output_size, int | torch.SymInt):
        return output_size, output_size
    if isinstance(output_size, tuple | list) and all(isinstance(size, int | torch.SymInt) for size in output_size):
        return tuple(output_size)
    try:
        size = operator.index(output_size)  # pyright: ignore[reportArgumentType]: it may be of any kind
        return size, size
    except TypeError:
        pass
    try:
        return tuple(size if isinstance(size, torch.SymInt) else operator.index(size) for size in output_size)
    except TypeError:
        return ()


_MOST_SAMPLES = 4096  # along each axis of a bin: 16 million in all, which takes a while but ends


def _samples(op: str, sampling_ratio) -> int:
    sampling_ratio = _checks.integer(op, "sampling_ratio", sampling_ratio)
    if sampling_ratio > _MOST_SAMPLES:
        raise ValueError(f"{op}: sampling_ratio must be at most {_MOST_SAMPLES}, got {sampling_ratio}")
    return sampling_ratio


def _scale(op: str, name: str, scale) -> float:
    scale = _checks.number(op, name, scale)
    if not 0 < scale < math.inf:  # so that NaN fails too
        raise ValueError(f"{op}: {name} must be positive and finite, got {scale}")
    return scale


def _rows(op: str, boxes: Tensor | list[Tensor], input: Tensor, coordinates: int = 4) -> Tensor:
    """RoIs as one tensor [K, 1 + coordinates] in the dtype of the computation, batch index first."""
    _library.refuse_forward_mode(op, input)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != coordinates + 1:
            raise BoxFormatError(f"{op}: boxes must have shape [K, {coordinates + 1}], got {list(boxes.shape)}")
        _library.refuse_complex(op, "boxes", boxes)
        return boxes.detach().to(dtype)
    for each in boxes if isinstance(boxes, list | tuple) else (boxes,):
        if not isinstance(each, Tensor) or each.ndim != 2 or each.shape[1] != coordinates:
            got = list(each.shape) if isinstance(each, Tensor) else _checks.kind_of(each)
            raise BoxFormatError(
                f"{op}: boxes must be a tensor [K, {coordinates + 1}] or a list of tensors [L, {coordinates}], "
                f"got {got}"
            )
        _library.refuse_complex(op, "boxes", each)
        if each.device != boxes[0].device:
            raise RuntimeError(f"{op}: boxes must be on one device, got {boxes[0].device} and {each.device}")
    # Compiled code would be bound to a batch of this size or more; there the op itself looks at the indices.
    more = () if torch.compiler.is_compiling() or input.ndim == 0 else boxes[input.shape[0] :]
    if more and any(len(each) for each in more):
        raise BoxFormatError(
            f"{op}: boxes must be a list of one tensor for each of the {input.shape[0]} images at most, "
            f"got {len(boxes)} tensors"
        )
    if len(boxes) == 0:
        return input.new_zeros(0, coordinates + 1, dtype=dtype)
    # The image's number stands beside the boxes only once they have the dtype of the computation: it would not fit
    # into half precision.
    alike = (each if each.dtype == dtype else each.to(dtype) for each in boxes)
    return torch.cat([pad(each, (1, 0), value=i) for i, each in enumerate(alike)]).detach()


def _needs_gradient(input: Tensor) -> bool:
    return torch.is_grad_enabled() and input.requires_grad


def _empty(like: Tensor, sizes, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _empty_max(input: Tensor, sizes, keep_winners: bool) -> tuple[Tensor, Tensor]:
    """The result of a maximum, and the winners' positions, which are kept for the gradient only."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    out = _empty(input, sizes, is_channels_last(input))
    return out, input.new_empty((2 if keep_winners else 0, out.numel()), dtype=dtype)


@register_fake("roi_align")
def _(input: Tensor, boxes: Tensor, spatial_scale, bins_y, bins_x, sampling_ratio, aligned) -> Tensor:
    return _empty(input, (boxes.shape[0], input.shape[1], bins_y, bins_x), is_channels_last(input))


@register_fake("roi_align_backward")
def _(grad, boxes, sizes, spatial_scale, bins_y, bins_x, sampling_ratio, aligned, channels_last) -> Tensor:
    return _empty(grad, sizes, channels_last)


@register_fake("roi_align_max")
def _(input, boxes, spatial_scale, bins_y, bins_x, sampling_ratio, aligned, keep_winners) -> tuple[Tensor, Tensor]:
    return _empty_max(input, (boxes.shape[0], input.shape[1], bins_y, bins_x), keep_winners)


@register_fake("roi_align_max_backward")
def _(
    grad, winners, boxes, sizes, spatial_scale, bins_y, bins_x, sampling_ratio, aligned, channels_last
):  # fmt: skip
    return _empty(grad, sizes, channels_last)


@register_fake("roi_align_rotated")
def _(input: Tensor, boxes: Tensor, spatial_scale, bins_y, bins_x, sampling_ratio) -> Tensor:
    return _empty(input, (boxes.shape[0], input.shape[1], bins_y, bins_x), is_channels_last(input))


@register_fake("roi_align_rotated_backward")
def _(grad, boxes, sizes, spatial_scale, bins_y, bins_x, sampling_ratio, channels_last) -> Tensor:
    return _empty(grad, sizes, channels_last)


@register_fake("multi_scale_roi_align")
def _(features, boxes, spatial_scales, bins_y, bins_x, sampling_ratio, aligned, canonical_scale, canonical_level):
    return _empty(features[0], (boxes.shape[0], features[0].shape[1], bins_y, bins_x), is_channels_last(features[0]))


@register_fake("multi_scale_roi_align_backward")
def _(
    grad, boxes, sizes, spatial_scales, bins_y, bins_x, sampling_ratio, aligned, canonical_scale, canonical_level,
    channels_last,
):  # fmt: skip
    return [_empty(grad, (*sizes[:2], *sizes[i : i + 2]), channels_last) for i in range(2, len(sizes), 2)]


# An average is linear in the features.
for _name in ("roi_align", "roi_align_rotated", "multi_scale_roi_align"):
    register_gradient(_name, linear=True)
register_gradient("roi_align_max")

torch.fx.wrap("multi_scale_roi_align")  # whose maps are in a list
