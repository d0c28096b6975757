"""Anchors: boxes on grids, points on grids, published sets, and k-means on the shapes of boxes.

What lies on a grid is computed once for each shape, dtype and device, and then taken from a cache: generators return
the same tensors again and again. Copy what you mean to change. (A tensor that was changed in place is noticed, and is
made anew for the next caller.)
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from . import _library
from ._checks import (
    FLOATING,
    check_tensor_list,
    check_tensors,
    integer,
    integers,
    is_one_of,
    kind_of,
    number,
    numbers,
    sequence,
)
from ._library import register_fake

# Numbers of the metrics, as csrc/anchors/anchors.h counts them.
_METRICS = {"iou": 0, "euclidean": 1}
_RATIO = 2

_V3 = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))
_V4 = (((12, 16), (19, 36), (40, 28)), ((36, 75), (76, 55), (72, 146)), ((142, 110), (192, 243), (459, 401)))
_YOLO_ANCHORS = {
    "v2": (
        tuple(
            (32 * width, 32 * height)
            for width, height in (
                *((0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778)),
                (9.77052, 9.16828),
            )
        ),
    ),
    "v3": _V3,
    "v3-tiny": (((10, 14), (23, 27), (37, 58)), ((81, 82), (135, 169), (344, 319))),
    "v4": _V4,
    "v5": _V3,
    "v7": _V4,
}


class _Cache:
    """The latest results by key, each with the version of its tensors, so that one changed in place is made anew."""

    def __init__(self, size: int = 32):
        self._size = size
        self._entries: OrderedDict = OrderedDict()

    def get(self, key, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if not makes_plain_tensors():
            return make()
        entry = self._entries.pop(key, None)
        if entry is None or any(t._version != version or t.requires_grad for t, version in zip(*entry, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                made = make()
            entry = made, [t._version for t in made]
        self._entries[key] = entry
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return entry[0]


def makes_plain_tensors() -> bool:
    """Whether torch's factories give tensors that mean the same to everybody: not under a compiler, a tracer, a
    transform of torch.func or a mode, whose tensors are its own, and which takes no others."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    # A default device is a mode too, but all of these calls name their device.
    count = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(place)) is DeviceContext for place in range(count))


_cache = _Cache()


class AnchorGenerator(nn.Module):
    """Anchors of several sizes and aspect ratios at every place of feature maps, with torchvision's interface.

    For each size s and ratio r (height / width) a box of sides s / sqrt(r) and s sqrt(r) around 0, its corners rounded
    to integers, is moved to multiples of the stride: image size // feature map size.

    Args:
        sizes: for each feature map its sizes in pixels; a flat sequence gives one to each.
        aspect_ratios: for each feature map its ratios; a flat sequence serves all.

    Called with `(image_list, feature_maps)`: an object with `tensors` [B, ..., H, W] and `image_sizes`, and the maps
    [B, C, h, w]. Returns a list of B anchors [A, 4] xyxy, ordered by map, row, column, ratio, size, in the dtype and on
    the device of the maps. All images share one cached tensor: copy it before you change it.

    Raises:
        ValueError: `sizes` and `aspect_ratios` differ in length, or a number is not positive and finite.
        RuntimeError: there are not as many feature maps as `sizes`.

    Example:
        >>> generator = AnchorGenerator(sizes=((32,), (64,)), aspect_ratios=((0.5, 1.0, 2.0),) * 2)
        >>> generator.num_anchors_per_location()
        [3, 3]
        >>> from types import SimpleNamespace  # or torchvision's ImageList
        >>> image_list = SimpleNamespace(tensors=torch.zeros(1, 3, 64, 64), image_sizes=[(64, 64)])
        >>> generator(image_list, [torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)])[0].shape
        torch.Size([240, 4])

    Source: torchvision.models.detection.anchor_utils.AnchorGenerator, with its boxes to the bit. For other strides than
    the quotients of sizes see `grid_anchors`.
    """

    def __init__(
        self,
        sizes: Sequence[float] | Sequence[Sequence[float]] = ((128, 256, 512),),
        aspect_ratios: Sequence[float] | Sequence[Sequence[float]] = ((0.5, 1.0, 2.0),),
    ) -> None:
        super().__init__()
        self.sizes: tuple[tuple[float, ...], ...]
        self.aspect_ratios: tuple[tuple[float, ...], ...]
        self.sizes, self.aspect_ratios = _sizes_and_ratios("AnchorGenerator", sizes, aspect_ratios)

    def num_anchors_per_location(self) -> list[int]:
        """The number of anchors at each place, for each feature map."""
        return [len(s) * len(r) for s, r in zip(self.sizes, self.aspect_ratios, strict=True)]

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, aspect_ratios={self.aspect_ratios}"

    def forward(self, image_list: Any, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        height, width = _image_size("AnchorGenerator", image_list)
        grids = _grids_of("AnchorGenerator", feature_maps)
        if not all(h and w for h, w in grids):
            raise RuntimeError(f"AnchorGenerator: feature_maps must not be empty, got maps of {grids}")
        strides = [(height // h, width // w) for h, w in grids]
        first = feature_maps[0]
        anchors = grid_anchors(grids, strides, self.sizes, self.aspect_ratios, dtype=first.dtype, device=first.device)
        return [anchors] * len(image_list.image_sizes)


def grid_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int | tuple[int, int]],
    sizes: Sequence[float] | Sequence[Sequence[float]],
    aspect_ratios: Sequence[float] | Sequence[Sequence[float]] = (0.5, 1.0, 2.0),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The anchors of `AnchorGenerator` from sizes and strides, without images and maps.

    Args:
        feature_sizes: (height, width) of each feature map.
        strides: of each map, in pixels: a number, or (vertical, horizontal).
        sizes: for each map its sizes in pixels; a flat sequence gives one to each.
        aspect_ratios: for each map its ratios height / width; a flat sequence serves all.
        dtype: of the anchors, floating.
        device: of the anchors.

    Returns:
        [A, 4] xyxy, ordered by map, row, column, ratio, size. Cached: copy what you mean to change.

    Raises:
        ValueError: `sizes` and `aspect_ratios` differ in length, or a number is not positive and finite.
        RuntimeError: there are not as many `feature_sizes` or `strides` as `sizes`.

    Example:
        >>> grid_anchors([(1, 2)], [16], sizes=[32], aspect_ratios=[1.0])
        tensor([[-16., -16.,  16.,  16.],
                [  0., -16.,  32.,  16.]])

    Source: torchvision's AnchorGenerator.
    """
    op = "grid_anchors"
    sizes, aspect_ratios = _sizes_and_ratios(op, sizes, aspect_ratios)
    grids, strides = _grids_and_strides(op, feature_sizes, strides)
    if len(grids) != len(sizes):
        raise RuntimeError(f"{op}: feature_sizes must have one entry per sizes ({len(sizes)}), got {len(grids)}")
    _check_floating(op, dtype)
    device = _device_of(device)

    def make() -> tuple[Tensor, ...]:
        levels = []
        for (height, width), pair, scales, ratios in zip(grids, strides, sizes, aspect_ratios, strict=True):
            cell = _cell_anchors(scales, ratios).to(dtype=dtype, device=device)
            # Not in torch's default dtype. Whole pixels are added to halves as torchvision adds them.
            whole = not any(isinstance(stride, float | torch.SymFloat) for stride in pair)
            exact = torch.int32 if whole else torch.promote_types(torch.float32, dtype)
            y, x = (
                torch.arange(count, dtype=exact, device=device) * stride
                for count, stride in zip((height, width), pair, strict=True)
            )
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            levels.append((shifts + cell).to(dtype).view(-1, 4))
        return (torch.cat(levels) if levels else torch.empty(0, 4, dtype=dtype, device=device),)

    return _cache.get((op, grids, strides, sizes, aspect_ratios, dtype, device), make)[0]


class DefaultBoxGenerator(nn.Module):
    """The default boxes of SSD, with torchvision's interface.

    Map k of m has the scale s_k = min_ratio + (max_ratio - min_ratio) k / (m - 1) of the image, s_m = 1: at the centre
    of every cell a square of s_k, one of sqrt(s_k s_(k+1)), and for each ratio r boxes of s_k sqrt(r), s_k / sqrt(r)
    and the other way round.

    Args:
        aspect_ratios: for each feature map its ratios, without 1.
        min_ratio: the scale of the first map.
        max_ratio: the scale of the last.
        scales: in place of these, m + 1 scales.
        steps: pixels between the centres of each map; None for the image divided by the map.
        clip: whether sides, divided by those of the image, are clamped to [0, 1].

    Called with `(image_list, feature_maps)`: an object with `tensors` [B, ..., H, W] and `image_sizes`, and the maps
    [B, C, h, w]. Returns a list of B boxes [A, 4] xyxy in pixels, ordered by map, row, column, box; float32, float64
    for float64 maps, on the device of the maps. All images share one cached tensor.

    Raises:
        ValueError: `steps` or `scales` do not fit `aspect_ratios`, or a number is not positive and finite.
        RuntimeError: there are not as many feature maps as `aspect_ratios`.

    Example:
        >>> DefaultBoxGenerator([[2], [2, 3]]).num_anchors_per_location()
        [4, 6]

    Source: Liu et al., SSD, ECCV 2016; torchvision's DefaultBoxGenerator, with its boxes to the bit in float32 (of half
    maps, and where torch's default dtype is a half, it rounds the centres).
    """

    def __init__(
        self,
        aspect_ratios: Sequence[Sequence[float]],
        min_ratio: float = 0.15,
        max_ratio: float = 0.9,
        scales: Sequence[float] | None = None,
        steps: Sequence[float] | None = None,
        clip: bool = True,
    ) -> None:
        super().__init__()
        op = "DefaultBoxGenerator"
        aspect_ratios = tuple(
            numbers(op, "aspect_ratios", ratios) for ratios in sequence(op, "aspect_ratios", "sequences", aspect_ratios)
        )
        min_ratio, max_ratio = number(op, "min_ratio", min_ratio), number(op, "max_ratio", max_ratio)
        count = len(aspect_ratios)
        scales = None if scales is None else numbers(op, "scales", scales)
        steps = None if steps is None else numbers(op, "steps", steps)
        if steps is not None and len(steps) != count:
            raise ValueError(f"{op}: steps must have one entry per map ({count}), got {len(steps)}")
        if scales is None:
            scales = [min_ratio, max_ratio]
            if count > 1:
                span = max_ratio - min_ratio
                scales = [*(min_ratio + span * k / (count - 1.0) for k in range(count)), 1.0]
        if len(scales) < count + 1:
            raise ValueError(f"{op}: scales must be {count + 1} numbers, got {len(scales)}")
        self.aspect_ratios: tuple[tuple[float, ...], ...] = tuple(tuple(map(float, each)) for each in aspect_ratios)
        self.scales: tuple[float, ...] = tuple(map(float, scales))
        self.steps: tuple[float, ...] | None = None if steps is None else tuple(map(float, steps))
        self.clip: bool = bool(clip)
        options = {"aspect_ratios": sum(self.aspect_ratios, ()), "scales": self.scales, "steps": self.steps or ()}
        for argument, values in options.items():
            if not _all_positive(values):
                raise ValueError(f"{op}: {argument} must be positive and finite, got {values}")

    def num_anchors_per_location(self) -> list[int]:
        """The number of boxes at each place, for each feature map."""
        return [2 + 2 * len(ratios) for ratios in self.aspect_ratios]

    def extra_repr(self) -> str:
        return f"aspect_ratios={self.aspect_ratios}, clip={self.clip}, scales={self.scales}, steps={self.steps}"

    def forward(self, image_list: Any, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        image = _image_size("DefaultBoxGenerator", image_list)
        grids = tuple(_grids_of("DefaultBoxGenerator", feature_maps))
        first = feature_maps[0]
        if len(grids) != len(self.aspect_ratios):
            raise RuntimeError(
                f"DefaultBoxGenerator: feature_maps must be {len(self.aspect_ratios)} maps, got {len(grids)}"
            )
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        key = ("default", grids, image, self.aspect_ratios, self.scales, self.steps, self.clip, dtype, first.device)
        (boxes,) = _cache.get(key, lambda: (self._boxes(grids, image, dtype).to(first.device),))
        return [boxes] * len(image_list.image_sizes)

    def _boxes(self, grids, image, dtype: torch.dtype) -> Tensor:
        levels = []
        single = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
        for k, (height, width) in enumerate(grids):
            rows, columns = height, width
            if self.steps is not None:
                rows, columns = image[0] / self.steps[k], image[1] / self.steps[k]
            x = ((torch.arange(width, **single) + 0.5) / columns).to(dtype)
            y = ((torch.arange(height, **single) + 0.5) / rows).to(dtype)
            y, x = torch.meshgrid(y, x, indexing="ij")
            sides = torch.tensor(self._sides(k), **single)
            sides = (sides.clamp(0, 1) if self.clip else sides).to(dtype)
            centres = torch.stack((x, y), dim=-1).view(-1, 1, 2).expand(-1, len(sides), 2)
            levels.append(torch.cat((centres, sides.expand(height * width, -1, 2)), dim=-1).view(-1, 4))
        boxes = torch.cat(levels)
        extent, half = torch.tensor([image[1], image[0]], device="cpu"), 0.5 * boxes[:, 2:]
        return torch.cat(((boxes[:, :2] - half) * extent, (boxes[:, :2] + half) * extent), dim=1)

    def _sides(self, k: int) -> list[tuple[float, float]]:
        scale, between = self.scales[k], math.sqrt(self.scales[k] * self.scales[k + 1])
        sides = [(scale, scale), (between, between)]
        for ratio in self.aspect_ratios[k]:
            width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sides += [(width, height), (height, width)]
        return sides


@_library.register_result
class PointAnchors(NamedTuple):
    """The points of all levels, one after the other; see `point_anchors`."""

    points: Tensor
    """[A, 2] (x, y) in pixels."""
    strides: Tensor
    """[A] the stride of each point's level."""


def point_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int | tuple[int, int]],
    offset: float = 0.5,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PointAnchors:
    """The places of feature maps as points of the image: stride * (column + offset, row + offset).

    Args:
        feature_sizes: (height, width) of each feature map.
        strides: pixels between the points of each map.
        offset: 0.5 for the centres of cells, 0 for their corners.
        dtype: of the results, floating.
        device: of the results.

    Returns:
        `PointAnchors(points [A, 2], strides [A])`, ordered by map, row, column: what `encode_ltrb` and `decode_ltrb`
        take. Cached: copy what you mean to change.

    Raises:
        ValueError: a stride is not positive and finite.
        RuntimeError: there are not as many strides as feature sizes.

    Example:
        >>> point_anchors([(1, 2), (1, 1)], [8, 16])
        PointAnchors(points=tensor([[ 4.,  4.],
                [12.,  4.],
                [ 8.,  8.]]), strides=tensor([ 8.,  8., 16.]))

    Source: Tian et al., FCOS, ICCV 2019; mmdetection's MlvlPointGenerator.
    """
    op = "point_anchors"
    grids, steps = _grids_and_strides(op, feature_sizes, strides)
    if any(down != right for down, right in steps):
        raise ValueError(f"{op}: strides must be one number per map, got {list(steps)}")
    offset, device = float(number(op, "offset", offset)), _device_of(device)
    if not math.isfinite(offset):
        raise ValueError(f"{op}: offset must be finite, got {offset}")
    _check_floating(op, dtype)
    if any(stride > torch.finfo(dtype).max for stride, _ in steps):
        raise ValueError(f"{op}: strides must be numbers of {_library.dtype_name(dtype)}, got {[*strides]}")

    def make() -> tuple[Tensor, ...]:
        points, lengths = [torch.empty(0, 2, dtype=dtype, device=device)], [torch.empty(0, dtype=dtype, device=device)]
        for (height, width), (stride, _) in zip(grids, steps, strict=True):
            x = (torch.arange(width, dtype=dtype, device=device) + offset) * stride
            y = (torch.arange(height, dtype=dtype, device=device) + offset) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            points.append(torch.stack((x, y), dim=-1).view(-1, 2))
            lengths.append(torch.full((height * width,), stride, dtype=dtype, device=device))
        return torch.cat(points), torch.cat(lengths)

    return PointAnchors(*_cache.get((op, grids, steps, offset, dtype, device), make))


def yolo_anchors(version: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The published anchors of a YOLO, in pixels.

    Args:
        version: "v2" (COCO), "v3", "v3-tiny", "v4", "v5" (P5) or "v7" (P5).
        dtype: of the anchors, floating.
        device: of the anchors.

    Returns:
        [levels, K, 2] widths and heights, by ascending stride: 8, 16, 32; 16, 32 for "v3-tiny"; 32 for "v2".

    Raises:
        ValueError: `version` is none of these.

    Example:
        >>> yolo_anchors("v3")[0]
        tensor([[10., 13.],
                [16., 30.],
                [33., 23.]])

    Source: the configurations that their authors published. v2 gives its anchors in cells of 32 pixels.
    """
    if not is_one_of(version, _YOLO_ANCHORS):
        raise ValueError(f"yolo_anchors: version must be one of {', '.join(_YOLO_ANCHORS)}, got {version!r}")
    _check_floating("yolo_anchors", dtype)
    return torch.tensor(_YOLO_ANCHORS[version], dtype=dtype, device=device)


@_library.register_result
class KMeansAnchors(NamedTuple):
    """Anchors that fit a set of box sizes; see `kmeans_anchors`."""

    anchors: Tensor
    """[k, 2] widths and heights, by ascending area."""
    mean_iou: float
    """The mean over all sizes of the IoU with the best anchor, one corner in common."""
    best_possible_recall: float
    """The share of sizes of which some anchor differs in both sides by less than a factor of 4."""


def kmeans_anchors(
    sizes: Tensor, k: int, *, metric: str = "iou", seed: int = 0, max_iterations: int = 300
) -> KMeansAnchors:
    """Anchors for a data set: k-means on the shapes of its boxes.

    The start is greedy k-means++. "euclidean" is Lloyd's algorithm on (width, height). "iou" assigns by IoU (one corner
    in common), moves anchors to means, and then climbs: the lower bound of the mean IoU that is linear in each box's
    intersection and union is raised side by side, whose best value is a weighted quantile of the sides.

    Args:
        sizes: [N, 2] widths and heights, positive, floating; computed in float32. The largest is at most 2^50 / N times
            the smallest: a million times for a billion boxes.
        k: the number of anchors, from 1 to min(N, 1024).
        metric: "iou" or "euclidean".
        seed: of the start. Equal arguments give equal results, on every device.
        max_iterations: of Lloyd's algorithm, and of climbing.

    Returns:
        `KMeansAnchors(anchors [k, 2] in the dtype of sizes, mean_iou, best_possible_recall)`.

    Fewer than k different sizes give anchors that are equal. Synchronises with the host. No gradient.

    Raises:
        ValueError: `k`, `metric` or `max_iterations` is none of the above.
        RuntimeError: `sizes` has a wrong shape or dtype, or one that is not positive and finite, or a wider range.

    Example:
        >>> sizes = torch.tensor([[10., 10.], [12., 10.], [100., 50.], [100., 54.]])
        >>> kmeans_anchors(sizes, 2, metric="euclidean").anchors
        tensor([[ 11.,  10.],
                [100.,  52.]])

    Source: Redmon and Farhadi, YOLO9000, CVPR 2017; Arthur and Vassilvitskii, k-means++, SODA 2007. scikit-learn's
    KMeans moves anchors that have lost their sizes, which stay here.
    """
    op = "kmeans_anchors"
    check_tensors(op, sizes=sizes)
    k = integer(op, "k", k)
    seed = int(seed) if isinstance(seed, Integral) else integer(op, "seed", seed)  # up to 2^64 - 1
    max_iterations = integer(op, "max_iterations", max_iterations)
    if not is_one_of(metric, _METRICS):
        raise ValueError(f"{op}: metric must be 'iou' or 'euclidean', got {metric!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must be from -2^63 to 2^64 - 1, got {seed}")
    if max_iterations < 0:
        raise ValueError(f"{op}: max_iterations must be at least 0, got {max_iterations}")
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not sizes.is_floating_point():
        raise RuntimeError(f"{op}: sizes must be floating of shape [N, 2], got {sizes.dtype} {list(sizes.shape)}")
    if not 1 <= k <= min(len(sizes), 1024):
        raise ValueError(f"{op}: k must be from 1 to min(N, 1024) = {min(len(sizes), 1024)}, got {k}")
    if sizes.is_meta:
        raise RuntimeError(f"{op}: sizes must be on a device with data, got meta")
    single = sizes.detach().float()
    least, largest = torch.stack(single.aminmax()).tolist()
    if not 0 < least <= largest < math.inf:
        raise RuntimeError(f"{op}: sizes must be positive and finite, got some from {least} to {largest}")
    most = 2**50 / len(sizes)  # means are those of integers, of which the smallest size has 2^10 then
    if largest / least > most:
        got = f"some from {least} to {largest}"
        raise RuntimeError(f"{op}: sizes must be within a factor of 2^50 / N = {most:.3g} of each other, got {got}")
    exponent = math.frexp(largest)[1]
    unit = _times_power_of_two(single, -exponent)
    start = _start(unit, k, _METRICS[metric], torch.Generator().manual_seed(seed))
    anchors, _ = _library.ops.kmeans_anchors(unit, start, _METRICS[metric], max_iterations)
    if metric == "iou":
        anchors = _climb(unit, anchors, max_iterations)
    anchors = anchors[(anchors[:, 0] * anchors[:, 1]).argsort(stable=True)]
    _, overlaps = _library.ops.assign_sizes(unit, anchors, _METRICS["iou"])
    _, ratios = _library.ops.assign_sizes(unit, anchors, _RATIO)
    return KMeansAnchors(
        _times_power_of_two(anchors, exponent).to(sizes.dtype),
        _total(overlaps).item() / 2**30 / len(sizes),
        (ratios > -4).sum().item() / len(sizes),
    )


def _times_power_of_two(values: Tensor, exponent: int) -> Tensor:
    half = exponent // 2  # the power itself may be no float
    return values * 2.0**half * 2.0 ** (exponent - half)


def _total(values: Tensor) -> Tensor:
    """The sum of values in [0, 1], as an integer of 2^-30: it depends on no order."""
    return (values.double() * 2**30).long().sum()


def _start(sizes: Tensor, k: int, metric: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few sizes drawn by their distance from the anchors so far, the one that serves all best.

    Distances are integers, so that sums and draws are the same on every device.
    """
    trials = 2 + int(math.log(k))

    def distances(size: Tensor) -> Tensor:
        _, affinities = _library.ops.assign_sizes(sizes, size[None], metric)
        distance = 1 - affinities.double() if metric == _METRICS["iou"] else -affinities.double()
        return (distance * 2**30).long()

    draws = torch.rand(k, trials, dtype=torch.float64, generator=generator)
    chosen = [sizes[int(draws[0, 0] * len(sizes))]]
    nearest = distances(chosen[0])
    for draw in draws[1:]:
        heaps = nearest.cumsum(0)
        places = (heaps[-1].double() * draw.to(sizes.device)).long()
        rows = torch.searchsorted(heaps, places, right=True).clamp(max=len(sizes) - 1)
        candidates = [torch.minimum(nearest, distances(sizes[row])) for row in rows]
        best = torch.stack([candidate.sum() for candidate in candidates]).argmin()
        nearest = torch.stack(candidates)[best]
        chosen.append(sizes[rows[best]])
    return torch.stack(chosen)


def _climb(sizes: Tensor, anchors: Tensor, max_iterations: int) -> Tensor:
    """Moves anchors for as long as the mean IoU grows by more than a 32768th.

    With intersection I, union U and r = I / U of the present, sum I / U is raised where sum (I - r U) / U is. In one
    side of an anchor this is concave, and linear between the sides of boxes: the best value is at a weighted quantile.
    """
    orders = sizes.argsort(dim=0, stable=True).unbind(1)
    labels, overlaps = _library.ops.assign_sizes(sizes, anchors, _METRICS["iou"])
    total = _total(overlaps)
    for _ in range(max_iterations):
        moved = anchors
        for axis, order in enumerate(orders):
            moved = _best_sides(sizes, moved, labels, axis, order)
        labels, overlaps = _library.ops.assign_sizes(sizes, moved, _METRICS["iou"])
        reached = _total(overlaps)
        if reached <= total:
            break
        little = reached - total <= total >> 15
        anchors, total = moved, reached
        if little:
            break
    return anchors


def _best_sides(sizes: Tensor, anchors: Tensor, labels: Tensor, axis: int, order: Tensor) -> Tensor:
    own = anchors[labels].double()
    boxes = sizes.double()
    common = torch.minimum(boxes, own)
    area, intersection = own[:, 0] * own[:, 1], common[:, 0] * common[:, 1]
    union = boxes[:, 0] * boxes[:, 1] + area - intersection
    ratio = intersection / union
    # What the longer boxes gain and all boxes lose by a longer side, as integers.
    gain = ((1 + ratio) * common[:, 1 - axis] * own[:, axis] / union * 2**30).long()
    loss = (ratio * area / union * 2**30).long()
    count = len(anchors)
    by_label = order[labels[order].argsort(stable=True)]  # and within a label by length
    ends = torch.bincount(labels, minlength=count).cumsum(0)
    gains = gain[by_label].cumsum(0)
    all_gains = torch.cat((gains.new_zeros(1), gains))[ends]
    losses = torch.zeros(count, dtype=torch.int64, device=sizes.device).index_add_(0, labels, loss)
    # The shortest length beyond which boxes gain no more than all lose.
    places = torch.searchsorted(gains, all_gains - losses).clamp(max=len(sizes) - 1)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    used = ends > starts
    places = torch.minimum(torch.maximum(places, starts), (ends - 1).clamp(min=0))
    sides = torch.where(used, sizes[by_label[places], axis], anchors[:, axis])
    columns = list(anchors.unbind(1))
    columns[axis] = sides
    return torch.stack(columns, dim=1)


def _sizes_and_ratios(op: str, sizes: Sequence, aspect_ratios: Sequence) -> tuple[tuple, tuple]:
    sizes = tuple(
        numbers(op, "sizes", each if _is_sequence(each) else (each,)) for each in sequence(op, "sizes", "sizes", sizes)
    )
    ratios = sequence(op, "aspect_ratios", "numbers", aspect_ratios)
    if not ratios or not _is_sequence(ratios[0]):
        ratios = (ratios,) * len(sizes)
    ratios = tuple(numbers(op, "aspect_ratios", each) for each in ratios)
    if len(sizes) != len(ratios):
        raise ValueError(f"{op}: aspect_ratios must have one entry per sizes ({len(sizes)}), got {len(ratios)}")
    for argument, values in (("sizes", sizes), ("aspect_ratios", ratios)):
        if not _all_positive(value for each in values for value in each):
            raise ValueError(f"{op}: {argument} must be positive and finite, got {values}")
    return sizes, ratios


def _grids_and_strides(op: str, feature_sizes: Sequence, strides: Sequence) -> tuple[tuple, tuple]:
    feature_sizes = sequence(op, "feature_sizes", "(height, width)", feature_sizes)
    strides = sequence(op, "strides", "numbers or pairs", strides)
    grids = tuple(integers(op, "feature_sizes", grid) for grid in feature_sizes)
    if not all(len(grid) == 2 and min(grid) >= 0 for grid in grids):
        raise ValueError(f"{op}: feature_sizes must be pairs of numbers of at least 0, got {list(feature_sizes)}")
    pairs = tuple(numbers(op, "strides", each if _is_sequence(each) else (each, each)) for each in strides)
    if len(pairs) != len(grids):
        raise RuntimeError(f"{op}: strides must have one entry per feature_sizes ({len(grids)}), got {len(pairs)}")
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{op}: strides must be a number or a pair for each map, got {list(strides)}")
    if not _all_positive(stride for pair in pairs for stride in pair):
        raise ValueError(f"{op}: strides must be positive and finite, got {list(strides)}")
    return grids, pairs


def _is_sequence(value) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _image_size(op: str, image_list) -> tuple[int, int]:
    if not hasattr(image_list, "tensors") or not hasattr(image_list, "image_sizes"):
        raise RuntimeError(f"{op}: image_list must have tensors and image_sizes, got {kind_of(image_list)}")
    return tuple(image_list.tensors.shape[-2:])


def _grids_of(op: str, feature_maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    check_tensor_list(op, "feature_maps", feature_maps)
    if len(feature_maps) == 0:
        raise RuntimeError(f"{op}: feature_maps must be at least one map, got none")
    for each in feature_maps:
        if each.ndim < 2:
            raise RuntimeError(f"{op}: feature_maps must have shape [B, C, h, w], got {list(each.shape)}")
    return [(each.shape[-2], each.shape[-1]) for each in feature_maps]


def _device_of(device: torch.device | str) -> torch.device:
    """With its index: which GPU is "cuda" may change between two calls."""
    device = torch.device(device)
    return (
        device if device.index is not None or device.type in ("cpu", "meta") else torch.empty(0, device=device).device
    )


def _all_positive(numbers) -> bool:
    return all(0 < number < math.inf for number in numbers)  # so that NaN fails too


def _check_floating(op: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{op}: dtype must be a torch.dtype, got {kind_of(dtype)}")
    if dtype not in FLOATING:
        raise ValueError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {_library.dtype_name(dtype)}")


def _cell_anchors(scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """[ratios * scales, 4] around 0, as torchvision rounds them."""
    sizes, heights = (torch.tensor(each, dtype=torch.float32, device="cpu") for each in (scales, ratios))
    heights = heights.sqrt()
    widths = (1 / heights)[:, None] * sizes
    heights = heights[:, None] * sizes
    corners = torch.stack((-widths, -heights, widths, heights), dim=-1).view(-1, 4)
    return (corners / 2).round()


@register_fake("assign_sizes")
def _(sizes: Tensor, anchors: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    return sizes.new_empty(sizes.shape[0], dtype=torch.int64), sizes.new_empty(sizes.shape[0])


@register_fake("kmeans_anchors")
def _(sizes: Tensor, start: Tensor, metric: int, max_iterations: int) -> tuple[Tensor, Tensor]:
    return start.new_empty(start.shape), start.new_empty((), dtype=torch.int64)
