"""The RoI ops as modules, with torchvision's constructors."""

import math
from collections.abc import Mapping, Sequence

import torch.fx
from torch import Tensor, nn

from ._checks import check_tensors, kind_of, numbers, sequence
from .roi import _pair, pool_levels, roi_align
from .roi_pooling import ps_roi_align, ps_roi_pool, roi_pool


class _RoIModule(nn.Module):
    """A module that holds the options of an op and shows them."""

    options: tuple[str, ...]

    def extra_options(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_options()})"


class RoIAlign(_RoIModule):
    """`detops.roi_align` as a module, with its options fixed.

    Called with `(input [B, C, H, W], rois)`, where `rois` is a tensor [K, 5] of (image, x1, y1, x2, y2) or a list of B
    tensors [n, 4], it returns [K, C, bins, bins]. The options are those of the function, without `mode`: samples are
    averaged.

    Example:
        >>> RoIAlign(7, 0.25, 2, aligned=True)(torch.rand(1, 256, 50, 50), [torch.tensor([[0.0, 0, 99, 49]])]).shape
        torch.Size([1, 256, 7, 7])
    """

    options: tuple[str, ...] = ("output_size", "spatial_scale", "sampling_ratio", "aligned")

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size: int | tuple[int, int] = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class RoIPool(_RoIModule):
    """`detops.roi_pool` as a module, with its options fixed.

    Called with `(input [B, C, H, W], rois)`, where `rois` is a tensor [K, 5] of (image, x1, y1, x2, y2) or a list of B
    tensors [n, 4], it returns [K, C, bins, bins].
    """

    options: tuple[str, ...] = ("output_size", "spatial_scale")

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size: int | tuple[int, int] = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return roi_pool(input, rois, self.output_size, self.spatial_scale)


class PSRoIAlign(_RoIModule):
    """`detops.ps_roi_align` as a module, with its options fixed.

    Called with `(input [B, C, H, W], rois)`, where `rois` is a tensor [K, 5] of (image, x1, y1, x2, y2) or a list of B
    tensors [n, 4], it returns [K, C / bins^2, bins, bins].
    """

    options: tuple[str, ...] = ("output_size", "spatial_scale", "sampling_ratio")

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size: int | tuple[int, int] = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)


class PSRoIPool(_RoIModule):
    """`detops.ps_roi_pool` as a module, with its options fixed.

    Called with `(input [B, C, H, W], rois)`, where `rois` is a tensor [K, 5] of (image, x1, y1, x2, y2) or a list of B
    tensors [n, 4], it returns [K, C / bins^2, bins, bins].
    """

    options: tuple[str, ...] = ("output_size", "spatial_scale")

    def __init__(self, output_size: int | tuple[int, int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size: int | tuple[int, int] = output_size
        self.spatial_scale = spatial_scale

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)


class MultiScaleRoIAlign(_RoIModule):
    """roi_align over the maps of a pyramid, whose scales follow from the sizes of maps and images.

    Args:
        featmap_names: which maps of the input to use, from fine to coarse.
        output_size: bins along each axis, (height, width) or one number for both.
        sampling_ratio: as of `detops.roi_align`.
        canonical_scale: the side of a box that belongs to `canonical_level`, see `detops.multi_scale_roi_align`.
        canonical_level: see there.

    Called with a dict of maps, boxes [L, 4] for each image and the images' (height, width), it returns
    [K, C, height, width].

    Images are padded by an unknown amount, so the scale of a map is estimated: its longer side divided by that of the
    largest image, rounded to a power of two. Padding matters least on the longer side. The scales of images that are
    mostly padding on that side too, such as 20 x 20 pixels in 32 x 32, come out too large. Where that can happen, give
    the scales to `detops.multi_scale_roi_align`.

    Raises:
        ValueError: there is no image, no map of these names, or a step between the maps is not a half.

    Example:
        >>> pool = MultiScaleRoIAlign(["fine", "coarse"], output_size=7, sampling_ratio=2)
        >>> maps = {"fine": torch.rand(1, 8, 64, 64), "coarse": torch.rand(1, 8, 32, 32)}
        >>> pool(maps, [torch.tensor([[10., 10., 90., 60.]])], [(256, 256)]).shape
        torch.Size([1, 8, 7, 7])

    Source: torchvision.ops.MultiScaleRoIAlign, which goes by the height alone, so that it takes an image of 11 x 100 in
    32 x 128 pixels for one four times as large, and which keeps the scales of its first call.
    """

    options: tuple[str, ...] = ("featmap_names", "output_size", "sampling_ratio")

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int, int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size: tuple[int, int] = _pair("MultiScaleRoIAlign", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return _pool_pyramid(
            x,
            boxes,
            image_shapes,
            self.featmap_names,
            self.output_size,
            self.sampling_ratio,
            self.canonical_scale,
            self.canonical_level,
        )


@torch.fx.wrap
def _pool_pyramid(
    x, boxes, image_shapes, names, output_size, sampling_ratio, canonical_scale, canonical_level
) -> Tensor:
    if not isinstance(x, Mapping):
        raise RuntimeError(f"MultiScaleRoIAlign: x must be a dict of tensors, got {kind_of(x)}")
    names = sequence("MultiScaleRoIAlign", "featmap_names", "names", names)
    check_tensors("MultiScaleRoIAlign", **{f"x[{name}]": map for name, map in x.items() if name in names})
    maps = [map for name, map in x.items() if name in names]
    if not maps:
        raise ValueError(f"MultiScaleRoIAlign: the maps must include some of {list(names)}, got {list(x)}")
    image_shapes = sequence("MultiScaleRoIAlign", "image_shapes", "(height, width)", image_shapes)
    image_shapes = [numbers("MultiScaleRoIAlign", "image_shapes", shape) for shape in image_shapes]
    if not image_shapes:
        raise ValueError("MultiScaleRoIAlign: image_shapes must name at least one image, got none")
    if not all(len(shape) == 2 for shape in image_shapes):
        raise ValueError(f"MultiScaleRoIAlign: image_shapes must be pairs (height, width), got {image_shapes}")
    image = tuple(max(shape[axis] for shape in image_shapes) for axis in (0, 1))
    octaves = [octave_of(map.shape[-2:], image) for map in maps]
    # In maps of few pixels rounding hides a step, and torchvision leaves the last of them unused. With more levels than
    # maps, or none, it returns zeros.
    if not 0 <= octaves[0] - octaves[-1] < len(maps):
        axis = _longer_side(image)
        raise ValueError(
            f"MultiScaleRoIAlign: the maps must each be half as {('high', 'wide')[axis]} as the one before, got "
            f"{('heights', 'widths')[axis]} {[map.shape[axis - 2] for map in maps]} for images of {image[axis]}"
        )
    return pool_levels(
        maps,
        boxes,
        output_size,
        [2.0**octave for octave in octaves],
        sampling_ratio,
        False,
        canonical_scale,
        canonical_level,
    )


def octave_of(map: Sequence[int], image: Sequence[float]) -> int:
    """log2 of the scale of a map of this size, of images padded from this size: the longer side has the answer."""
    axis = _longer_side(image)
    if not map[axis] > 0 or not image[axis] > 0:
        raise ValueError(f"MultiScaleRoIAlign: maps and images must have a pixel, got a map of {list(map)} for {image}")
    return round(math.log2(map[axis] / image[axis]))


def _longer_side(image: Sequence[float]) -> int:
    """Its axis."""
    return 0 if image[0] >= image[1] else 1
