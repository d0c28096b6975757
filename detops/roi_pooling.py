"""Features of regions of interest over whole pixels (roi_pool), and from position-sensitive maps.

The rules of `detops.roi` hold here too.
"""

from torch import Tensor
from torch.overrides import handle_torch_function

from . import _library
from ._gradients import is_channels_last, register_gradient
from ._library import register_fake
from .roi import (
    _empty,
    _empty_max,
    _needs_gradient,
    _pair,
    _rows,
    _samples,
    _scale,
    stays_a_call,
)


def roi_pool(
    input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0
) -> Tensor:
    """Pools each RoI to a fixed size: the largest pixel of each bin.

    Corners are rounded to whole pixels, halves away from zero, and both belong to the RoI, so that it has at least
    one pixel. Bins are rounded outwards and may share pixels; what lies off the map is left out.

    Args:
        input: [N, C, H, W] features, floating.
        boxes: [K, 5] (batch index, x1, y1, x2, y2) or a list of N tensors [L, 4] (x1, y1, x2, y2).
        output_size: bins along each axis, (height, width) or one number for both.
        spatial_scale: pixels of `input` per pixel of the image.

    Returns:
        [K, C, height, width] in the dtype and memory format of `input`; 0 for bins without a pixel.

    Ties go to the first pixel in reading order, and the first NaN wins over all. Gradient: to that pixel of `input`.

    Raises:
        ValueError: `output_size` or `spatial_scale` is not positive.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: a wrong shape, dtype or device, or a batch index out of range (on the CPU).

    Example:
        >>> features = torch.arange(16.0).view(1, 1, 4, 4)
        >>> roi_pool(features, [torch.tensor([[0., 0., 3., 3.]])], 2)
        tensor([[[[ 5.,  7.],
                  [13., 15.]]]])

    Source: Girshick, Fast R-CNN, ICCV 2015; torchvision.ops.roi_pool, which passes over NaN.
    """
    op = "roi_pool"
    if stays_a_call(op, input, boxes):
        return handle_torch_function(roi_pool, (input, boxes), input, boxes, output_size, spatial_scale)
    bins_y, bins_x = _pair(op, output_size)
    spatial_scale = _scale(op, "spatial_scale", spatial_scale)
    rows = _rows(op, boxes, input)
    return _library.ops.roi_pool(input, rows, spatial_scale, bins_y, bins_x, _needs_gradient(input))[0]


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """Position-sensitive roi_align: each bin averages samples of maps of its own.

    Bin (p, q) of result channel c reads channel (c * height + p) * width + q of `input`, at the samples of
    `roi_align` with aligned=True.

    Args:
        input: [N, C * height * width, H, W] features, floating.
        boxes: as of `roi_pool`.
        output_size: as of `roi_pool`.
        spatial_scale: as of `roi_pool`.
        sampling_ratio: samples of a bin along each axis; if not positive, as many as it is pixels long, rounded up.

    Returns:
        [K, C, height, width] in the dtype and memory format of `input`.

    RoIs without area have no samples under adaptive sampling, and give zeros. Gradient: to `input`; twice
    differentiable.

    Raises:
        ValueError: `output_size` or `spatial_scale` is not positive.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: a wrong shape, dtype or device, a number of channels that does not fit `output_size`, or a batch
            index out of range (on the CPU).

    Example:
        >>> features = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 4)
        >>> ps_roi_align(features, [torch.tensor([[0., 0., 4., 4.]])], 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])

    Source: Li et al., Light-Head R-CNN, 2017; torchvision.ops.ps_roi_align, which gives NaN for RoIs without samples.
    """
    op = "ps_roi_align"
    if stays_a_call(op, input, boxes):
        return handle_torch_function(
            ps_roi_align, (input, boxes), input, boxes, output_size, spatial_scale, sampling_ratio
        )
    bins_y, bins_x = _pair(op, output_size)
    spatial_scale = _scale(op, "spatial_scale", spatial_scale)
    sampling_ratio = _samples(op, sampling_ratio)
    rows = _rows(op, boxes, input)
    return _library.ops.ps_roi_align(input, rows, spatial_scale, bins_y, bins_x, sampling_ratio)


def ps_roi_pool(
    input: Tensor, boxes: Tensor | list[Tensor], output_size: int | tuple[int, int], spatial_scale: float = 1.0
) -> Tensor:
    """Position-sensitive RoI pooling: each bin averages whole pixels of maps of its own.

    Corners are rounded to whole pixels, halves away from zero, the lower right one excluded; RoIs are at least 1 x 1.
    Bins are rounded outwards. Bin (p, q) of result channel c reads channel (c * height + p) * width + q of `input`.

    Args:
        input: [N, C * height * width, H, W] features, floating.
        boxes: as of `roi_pool`.
        output_size: as of `roi_pool`.
        spatial_scale: as of `roi_pool`.

    Returns:
        [K, C, height, width] in the dtype and memory format of `input`; 0 for bins without a pixel.

    The last row and column of `input` are never read, as in the original. Gradient: to `input`; twice differentiable.

    Raises:
        ValueError: `output_size` or `spatial_scale` is not positive.
        BoxFormatError: `boxes` is none of the above, or a list of more tensors with boxes than there are images.
        RuntimeError: a wrong shape, dtype or device, a number of channels that does not fit `output_size`, or a batch
            index out of range (on the CPU).

    Example:
        >>> features = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 5, 5)
        >>> ps_roi_pool(features, [torch.tensor([[0., 0., 4., 4.]])], 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])

    Source: Dai et al., R-FCN, 2016; torchvision.ops.ps_roi_pool, whose gradient reaches pixels that the result does not
    read.
    """
    op = "ps_roi_pool"
    if stays_a_call(op, input, boxes):
        return handle_torch_function(ps_roi_pool, (input, boxes), input, boxes, output_size, spatial_scale)
    bins_y, bins_x = _pair(op, output_size)
    spatial_scale = _scale(op, "spatial_scale", spatial_scale)
    return _library.ops.ps_roi_pool(input, _rows(op, boxes, input), spatial_scale, bins_y, bins_x)


@register_fake("roi_pool")
def _(input, boxes, spatial_scale, bins_y, bins_x, keep_winners) -> tuple[Tensor, Tensor]:
    return _empty_max(input, (boxes.shape[0], input.shape[1], bins_y, bins_x), keep_winners)


@register_fake("roi_pool_backward")
def _(grad, winners, boxes, sizes, spatial_scale, bins_y, bins_x, channels_last) -> Tensor:
    return _empty(grad, sizes, channels_last)


def _empty_position_sensitive(input: Tensor, boxes: Tensor, bins_y, bins_x) -> Tensor:
    sizes = (boxes.shape[0], input.shape[1] // (bins_y * bins_x), bins_y, bins_x)
    return _empty(input, sizes, is_channels_last(input))


@register_fake("ps_roi_align")
def _(input, boxes, spatial_scale, bins_y, bins_x, sampling_ratio) -> Tensor:
    return _empty_position_sensitive(input, boxes, bins_y, bins_x)


@register_fake("ps_roi_align_backward")
def _(grad, boxes, sizes, spatial_scale, bins_y, bins_x, sampling_ratio, channels_last) -> Tensor:
    return _empty(grad, sizes, channels_last)


@register_fake("ps_roi_pool")
def _(input, boxes, spatial_scale, bins_y, bins_x) -> Tensor:
    return _empty_position_sensitive(input, boxes, bins_y, bins_x)


@register_fake("ps_roi_pool_backward")
def _(grad, boxes, sizes, spatial_scale, bins_y, bins_x, channels_last) -> Tensor:
    return _empty(grad, sizes, channels_last)


register_gradient("roi_pool")
register_gradient("ps_roi_align", linear=True)
register_gradient("ps_roi_pool", linear=True)
