"""What tests/fuzz.py calls, and the arguments that it draws.

The library has one vocabulary: an argument of one name means the same wherever it stands. So a drawer belongs to the
name of an argument; where a function means something else by it, the key is a pattern "function:argument". Options
(`OPTIONS`) are drawn first, then the tensors (`TENSORS`), which may look at them. One or two arguments of some calls
are drawn wrong: an option out of its range or of another type (`wrong_option`), a tensor of another shape, dtype or
content, or no tensor at all (`wrong_tensor`).
"""

import fnmatch
import functools
import inspect
import math
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import detops
import inputs
from detops import _library

INF, NAN = math.inf, math.nan
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
OTHERS = (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn)
EXTREMES = [NAN, INF, -INF, 0.0, -0.0, 1e8, -1e8, 3e38, -3e38, 1e-40, -1e-40, 1e-300, 1e300, -1, 0.5, 2.0**24]
EXTREME_INTEGERS = [-1, -2, 0, 1, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63)]
COUNTS = (0, 1, 2, 3, 5, 8, 31, 32, 33, 64, 65, 100, 257, 1000)
SMALL_COUNTS = (0, 1, 2, 3, 5, 8, 31, 32, 33)


class Target(NamedTuple):
    """`call(**arguments)` calls it; `types` has for each argument what the schema of a compiled op says, else None."""

    name: str
    call: Callable
    types: dict[str, str | None]


def targets() -> dict[str, Target]:
    """Every public function, every class with a method, and every compiled op."""
    found = {}
    for name in detops.__all__:
        value = getattr(detops, name)
        if not inspect.isclass(value):
            found[name] = Target(name, value, dict.fromkeys(inspect.signature(value).parameters))
        elif not issubclass(value, (tuple, Exception)):
            for method in _methods(value):
                found[f"{name}.{method}"] = _method_target(name, value, method)
    for name in _library.op_names():
        schema = getattr(torch.ops.detops, name).default._schema
        types = {argument.name: str(argument.real_type) for argument in schema.arguments}
        found[f"detops::{name}"] = Target(f"detops::{name}", _op(name), types)
    return found


def _named(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind != each.VAR_KEYWORD]


def _methods(value: type) -> list[str]:
    own = [name for name, member in vars(value).items() if callable(member)]
    return [name for name in own if name in ("forward", "__call__") or not name.startswith(("_", "extra_repr"))]


def _method_target(name: str, value: type, method: str) -> Target:
    options = _named(value)
    arguments = _named(getattr(value, method))[1:]  # without self

    def call(**values):
        instance = value(**{each: values[each] for each in options})
        bound = instance if method in ("forward", "__call__") else getattr(instance, method)
        return bound(**{each: values[each] for each in arguments})

    return Target(f"{name}.{method}", call, dict.fromkeys(options + arguments))


def _op(name: str) -> Callable:
    return lambda **values: getattr(_library.ops, name)(**values)  # of the namespace that is in use


class Scene:
    """What the arguments of one call have in common: sizes, dtypes, kinds of values. Draws tensors of them."""

    def __init__(self, rng: np.random.Generator, small: bool = False):
        self.rng, self.small = rng, small
        counts = SMALL_COUNTS if small else COUNTS
        self.images = self.pick((0, 1, 1, 2, 2, 3, 3 if small else 300))
        most = 10**9 if self.images < 10 else 33
        self.n, self.m, self.k = (min(self.pick(counts), most) for _ in range(3))
        self.gts = min(self.pick((0, 1, 2, 3, 5, 31, 32, 33, 100)), 8 if most < 100 else most)
        self.classes = self.pick((0, 1, 2, 3, 3, 8, 20))
        self.lead = self.pick(((), (), (self.images,), (2, self.images)))
        self.channels = self.pick((0, 1, 2, 3, 4, 8, 9, 16, 33))
        self.levels = self.pick((1, 2, 3))
        side = self.pick((1, 2, 4, 6) if small or most < 100 else (1, 2, 4, 6, 10))
        self.grid = (side, self.pick((1, side, side + 2)))  # of the coarsest level
        self.strides = [8 * 2**level for level in range(self.levels)]
        self.anchors = self.pick((1, 2, 3, 3, 9))
        self.dtype = self.pick((*FLOATING, torch.float32, torch.float32))
        self.box_dtype = self.dtype if self.chance(0.7) else self.pick((*FLOATING, *INTEGERS[:5]))
        self.box_kind = self.pick(list(_BOX_KINDS))
        self.gradient = self.chance(0.5)
        self.distribution = self.pick((2, 8, 17))  # so many bins
        self.counts = [int(count) for count in self.rng.integers(0, 6, self.images)]  # for lists with an item an image
        self.with_anchors = self.chance(0.5)  # of a YOLO grid
        # What is drawn already: options first.
        self.target, self.types = "", {}
        self.options: dict[str, object] = {}
        self.arguments: dict[str, object] = {}

    # Decisions.

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def seed(self) -> int:
        return int(self.rng.integers(2**31))

    # Sizes that follow from others.

    @property
    def grids(self) -> list[tuple[int, int]]:
        return [(self.grid[0] * s, self.grid[1] * s) for s in (2**level for level in reversed(range(self.levels)))]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.grids[0][0] * 8, self.grids[0][1] * 8

    @property
    def points(self) -> int:
        return sum(height * width for height, width in self.grids)

    # Tensors.

    def finish(self, values, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the values, laid out in one of the ways that a caller may have it."""
        values = np.asarray(values)
        if not dtype.is_floating_point and values.dtype.kind == "f":
            values = np.nan_to_num(values, nan=0, posinf=100, neginf=-100).clip(-(2.0**62), 2.0**62)
        tensor = self.lay_out(torch.from_numpy(np.array(values)).to(dtype))
        if self.gradient and dtype.is_floating_point and self.chance(0.7):
            tensor = tensor.detach().requires_grad_()
        return tensor

    def lay_out(self, tensor: torch.Tensor) -> torch.Tensor:
        layout = self.pick(("plain",) * 6 + ("steps", "turned", "offset", "expanded", "channels_last"))
        if layout == "steps" and tensor.dim():
            wide = torch.stack([tensor, torch.full_like(tensor, 1)], -1)
            return wide[..., 0]
        if layout == "turned" and tensor.dim() > 1:
            first, second = self.rng.choice(tensor.dim(), 2, replace=False)
            return tensor.transpose(first, second).contiguous().transpose(first, second)
        if layout == "offset":
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        if layout == "expanded" and tensor.dim() and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if layout == "channels_last" and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def boxes(self, *shape: int, unit: float = 1.0, columns: int = 4) -> torch.Tensor:
        count = math.prod(shape)
        kind = self.box_kind if self.chance(0.8) else self.pick(list(_BOX_KINDS))
        boxes = np.asarray(_BOX_KINDS[kind](self, count), np.float64).reshape(count, 4) * unit
        if self.chance(0.2) and count:
            edges = inputs.edge_boxes("everything", self.seed())
            odd = self.rng.random(count) < 0.1
            boxes[odd] = edges[self.rng.integers(0, len(edges), int(odd.sum()))]
        with np.errstate(all="ignore"):
            if columns == 5:
                boxes = self._rotated(boxes)
        return self.finish(boxes.reshape(*shape, columns), self.box_dtype)

    def _rotated(self, boxes: np.ndarray) -> np.ndarray:
        angles = self.rng.uniform(-400, 400, len(boxes))
        if self.chance(0.5):
            angles = self.rng.choice(
                [0, 45, 90, -90, 180, 30, 1e-7, 90.00001, *([NAN, 1e30] * self.chance(0.2))], len(boxes)
            )
        return np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], angles])

    def numbers(self, *shape: int, low=0.0, high=1.0, dtype=None) -> torch.Tensor:
        """Floating values between `low` and `high`: spread, tied, equal, at the ends, and some of them odd."""
        kind = self.pick(("spread", "spread", "tied", "equal", "ends", "odd", "whole"))
        values = self.rng.uniform(low, high, shape)
        if kind == "tied":
            values = low + (high - low) * self.rng.integers(0, 5, shape) / 4
        elif kind == "whole":
            values = np.round(values)
        elif kind == "equal":
            values = np.full(shape, self.pick((low, high, (low + high) / 2, 0.0)))
        elif kind == "ends":
            values = self.rng.choice([low, high], shape)
        elif kind == "odd":
            values = np.where(self.rng.random(shape) < 0.2, self.rng.choice(EXTREMES, shape), values)
        with np.errstate(all="ignore"):
            return self.finish(values, dtype or self.dtype)

    def integers(self, *shape: int, low=0, high=10, dtype=torch.int64) -> torch.Tensor:
        return self.finish(self.rng.integers(low, max(high, low + 1), shape), dtype)

    def mask(self, *shape: int) -> torch.Tensor:
        return self.finish(self.rng.random(shape) < self.pick((0.0, 0.5, 0.9, 1.0)), torch.bool)

    # Groups of arguments.

    def rois(self, columns: int = 4, as_list: bool = False):
        """RoIs as [K, 1 + columns], or as a list with a tensor for each image."""
        if as_list:
            return [
                self.boxes(min(self.k, 33), unit=self.pick((1.0, 0.1)), columns=columns) for _ in range(self.images)
            ]
        boxes = self.boxes(self.k, unit=self.pick((1.0, 0.1)), columns=columns).detach().double().numpy()
        images = self.rng.integers(0, max(1, self.images), (self.k, 1)).astype(np.float64)
        if self.chance(0.1):
            images[self.rng.random((self.k, 1)) < 0.2] = self.pick((-1, -0.5, 0.5, NAN, INF, 1e30, self.images))
        with np.errstate(all="ignore"):
            return self.finish(np.concatenate([images, boxes], 1), self.box_dtype)

    def per_image(self, drawer: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        return [drawer(count) for count in self.counts]

    def map_sizes(self, channels: int, grid: tuple[int, int] | None = None) -> list[int]:
        return [min(self.images, 3) if channels > 64 else self.images, channels, *(grid or self.grids[0])]

    def map(self, channels: int, grid: tuple[int, int] | None = None) -> torch.Tensor:
        return self.numbers(*self.sizes_of_input() or self.map_sizes(channels, grid), low=-2, high=2)

    def sizes_of_input(self) -> list[int] | None:
        """Those that a backward pass is told."""
        return self.options.get("sizes") if self.target.endswith("_backward") else None

    def pyramid(self) -> list[torch.Tensor]:
        if sizes := self.sizes_of_input():
            shapes = [(*sizes[:2], *sizes[i : i + 2]) for i in range(2, len(sizes), 2)]
        else:
            shapes = [self.map_sizes(self.channels, grid) for grid in self.grids]
        return [self.numbers(*shape, low=-2, high=2) for shape in shapes]

    def bins(self) -> int:
        size = self.options.get("output_size", (self.options.get("bins_y", 1), self.options.get("bins_x", 1)))
        height, width = size if isinstance(size, tuple) else (size, size)
        return height * width

    def yolo_anchors(self, *shape: int, unit: float = 1.0) -> torch.Tensor:
        values = self.pick((self.rng.uniform(4, 64, shape), 8.0 * self.rng.integers(1, 9, shape), np.full(shape, 16.0)))
        return self.finish(values * unit, self.pick((self.dtype, self.box_dtype, torch.float32)))

    def labels(self, *shape: int) -> torch.Tensor:
        return self.integers(*shape, high=self.classes)

    def cell_centres(self) -> torch.Tensor:
        centres = [
            (np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) + 0.5) * stride
            for (height, width), stride in zip(self.grids, self.strides, strict=True)
        ]
        return self.finish(np.concatenate(centres), self.pick((self.dtype, self.box_dtype, torch.float32)))

    def stride_of_points(self) -> torch.Tensor:
        values = np.repeat(self.strides, [height * width for height, width in self.grids]).astype(np.float64)
        return self.finish(values, self.pick((self.dtype, torch.float32)))

    def image_list(self):
        tensors = torch.zeros(self.images, 3, *self.image_size)
        return SimpleNamespace(tensors=tensors, image_sizes=[self.image_size] * self.images)


def _on_lines(s: Scene, count: int) -> np.ndarray:
    """Corners and centres on the lines of a grid, and half way between them."""
    corner, size = 4.0 * s.rng.integers(0, 12, (count, 2)), 4.0 * s.rng.integers(1, 9, (count, 2))
    return np.concatenate([corner, corner + size], 1)


def _huge(s: Scene, count: int) -> np.ndarray:
    return s.rng.choice([-1.0, 1.0], (count, 4)) * 10.0 ** s.rng.uniform(8, 38, (count, 4))


def _tiny(s: Scene, count: int) -> np.ndarray:
    return np.sort(s.rng.choice([0, 1e-45, 1e-40, 1e-38, 5e-324, 1e-20, -1e-40], (count, 4)), 1)


def _edges(s: Scene, count: int) -> np.ndarray:
    boxes = inputs.edge_boxes(s.pick(inputs.EDGES), s.seed())
    return boxes[s.rng.integers(0, len(boxes), count)]


def _equal(s: Scene, count: int) -> np.ndarray:
    return np.repeat(_on_lines(s, 1), count, 0)


_BOX_KINDS = {
    "image": lambda s, n: inputs.uniform_boxes(n, s.seed(), extent=max(s.image_size), size=max(s.image_size) / 2),
    "uniform": lambda s, n: inputs.uniform_boxes(n, s.seed()),
    "clustered": lambda s, n: inputs.clustered_boxes(n, s.seed(), extent=100.0),
    "whole": lambda s, n: inputs.uniform_boxes(n, s.seed(), extent=64.0, size=32.0).round(),
    "grid": lambda s, n: inputs.grid_boxes(n, s.seed()),
    "lines": _on_lines,
    "scales": lambda s, n: inputs.boxes_of_all_scales(n, s.seed()),
    "distant": lambda s, n: inputs.distant_boxes(n, s.seed()),
    "unit": lambda s, n: inputs.uniform_boxes(n, s.seed(), extent=1.0, size=0.5),
    "equal": _equal,
    "edges": _edges,
    "huge": _huge,
    "tiny": _tiny,
}

# ---- Options: what is right. A function makes them of the scene. Where an op has a number for a word, it is its index.

BOOLEAN = (False, True)
OUTPUT_SIZES = (1, 2, 7, (3, 2), (1, 14), (7, 7))


def _anchor_sizes(s: Scene) -> list[list[float]]:
    return [[8.0 * 2**level, 12.0][: s.pick((1, 2))] for level in range(s.levels)]


OPTIONS = {
    "iou_threshold": (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.5),
    "score_threshold": (0.05, 0.0, 0.5, 1.0, -INF, -1.0),
    "max_detections": (1, 5, 100, 300),
    "max_candidates": (None, 1, 10, 1000),
    "class_agnostic": BOOLEAN,
    "box_iou:fmt": ("xyxy", "xyxy", "xywh", "cxcywh", "cxcywhr", "xywhr", "xyxyxyxy"),
    "box_area:fmt": ("xyxy", "xywh", "cxcywh", "cxcywhr", "xywhr", "xyxyxyxy"),
    "detops::box_area:fmt": (0, 1, 2, 3, 4, 5),
    "match_detr:fmt": ("cxcywh", "xyxy"),
    "*_fmt": ("xyxy", "xywh", "cxcywh", "cxcywhr", "xywhr", "xyxyxyxy"),
    "aligned": BOOLEAN,
    "*iou*:eps": (1e-7, 1e-9, 0.0),
    "eps": (1e-9, 1e-7),
    "*box_iou*:kind": (0, 1, 2, 3, 4, 5),
    "*iou_loss*:kind": (0, 1, 2, 3, 4, 5),
    "*focal_loss*:kind": (0, 1, 2, 3),
    "clip_boxes_to_image:size": ((20, 30), (64, 64), (0, 0), (1, 1000)),
    "detops::*:height": (20.0, 64.0, 0.0),
    "detops::*:width": (30.0, 64.0, 0.0),
    "detops::assign_yolo_grid:height": lambda s: s.image_size[0],
    "detops::assign_yolo_grid:width": lambda s: s.image_size[1],
    "min_size": (4.0, 0.0, 1e-3, 100.0, None),
    "detops::*:min_size": (4.0, 0.0, -1.0),
    "remove_small_boxes:min_size": (4.0, 0.0, 1e-3, 100.0),
    "reduction": ("none", "mean", "sum"),
    "alpha": (0.25, 0.5, 1.0, 0.0, -1.0),
    "*task_aligned:alpha": (0.5, 1.0, 0.0, 2.5),
    "TaskAlignedAssigner.*:alpha": (0.5, 1.0, 0.0),
    "gamma": (2.0, 0.0, 1.5, 1.0),
    "beta": (2.0, 6.0, 1.0, 0.5),
    "exponent": (2.0, 0.0, 1.5, 1.0),
    "output_size": OUTPUT_SIZES,
    "bins_*": (1, 2, 3, 7),
    "spatial_scale": (1.0, 0.5, 0.25, 1 / 16, 2.0),
    "spatial_scales": lambda s: [1 / stride for stride in s.strides],
    "sampling_ratio": (-1, 0, 1, 2, 3),
    "roi_align:mode": ("avg", "max"),
    "keep_winners": BOOLEAN,
    "channels_last": BOOLEAN,
    "*_wanted": BOOLEAN,
    "canonical_scale": (224, 56, 8),
    "detops::*:canonical_scale": (224.0, 8.0),
    "canonical_level": (4, 2, 0),
    "featmap_names": lambda s: [f"p{level}" for level in range(s.levels)],
    "image_shapes": lambda s: [s.image_size] * s.images,
    "detops::multi_scale_roi_align_backward:sizes": lambda s: [
        *s.map_sizes(s.channels)[:2],
        *(side for grid in s.grids for side in grid),
    ],
    "detops::ps_roi*_backward:sizes": lambda s: s.map_sizes(s.pick((0, 1, 2)) * s.bins()),
    "detops::*_backward:sizes": lambda s: s.map_sizes(s.channels),
    "weights": ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)),
    "clip": (4.135166556742356, INF, 0.0),
    "DefaultBoxGenerator.*:clip": BOOLEAN,
    "bbox_xform_clip": (4.135166556742356, INF),
    "max_distance": (None, 7.0, 0.0, 15.99),
    "dim": (-1, 0, 1, -2),
    "version": ("v3", "v5"),
    "detops::*:version": (3, 5),
    "yolo_anchors:version": ("v2", "v3", "v3-tiny", "v4", "v5", "v7"),
    "dtype": FLOATING,
    "device": ("cpu",),
    "feature_sizes": lambda s: s.grids,
    "grid_sizes": lambda s: s.grids,
    "grid_anchors:strides": lambda s: s.strides,
    "point_anchors:strides": lambda s: s.strides,
    "decode_yolo:strides": lambda s: s.strides,
    "assign_yolov*:strides": lambda s: s.strides,
    "detops::decode_yolo*:strides": lambda s: [float(stride) for stride in s.strides],
    "detops::assign_yolov*:strides": lambda s: s.strides,
    "heights": lambda s: [height for height, _ in s.grids],
    "widths": lambda s: [width for _, width in s.grids],
    "grid_anchors:sizes": _anchor_sizes,
    "AnchorGenerator.*:sizes": _anchor_sizes,
    "aspect_ratios": lambda s: [[0.5, 1.0, 2.0][: s.pick((1, 2, 3))] for _ in range(s.levels)],
    "min_ratio": (0.15, 0.2),
    "max_ratio": (0.9, 0.8),
    "scales": lambda s: s.pick((None, [0.1 * (level + 1) for level in range(s.levels + 1)])),
    "steps": lambda s: s.pick((None, s.strides)),
    "offset": (0.5, 0.0),
    "k": lambda s: s.pick((1, 2, 3, 9, max(1, s.n))),
    "metric": ("iou", "euclidean"),
    "kmeans_anchors:seed": (0, 1, 12345),
    "max_iterations": (300, 1, 10),
    "high_threshold": (0.7, 0.5, 1.0),
    "low_threshold": (0.3, 0.5, 0.0),
    "allow_low_quality_matches": BOOLEAN,
    "low_quality": ("own_argmax", "this_gt"),
    "this_gt": BOOLEAN,
    "low_quality_min_iou": (0.0, 0.3),
    "low_quality_all_ties": BOOLEAN,
    "ignore_threshold": (0.5, 0.0, 1.0),
    "threshold": (0.5, 0.0, 1.0),
    "level_sizes": lambda s: [height * width for height, width in s.grids],
    "topk": (9, 1, 2, 10, 13, 32),
    "topk2": (None, 1, 5),
    "detops::*:topk2": (10, 1, 5),
    "num_classes": lambda s: s.classes,
    "detops::*:classes": lambda s: s.classes,
    "TaskAlignedAssigner.*:stride": lambda s: s.pick((None, [8.0, 16.0, 32.0])),
    "dense_scores": BOOLEAN,
    "promote_scores": BOOLEAN,
    "with_metrics": BOOLEAN,
    "candidates": ("inside", "all"),
    "rule": ("yolox", "mmdet"),
    "invalid": ("forbid", "raise", "last"),
    "complete": BOOLEAN,
    "iou": ("ciou", "iou"),
    "center_radius": (1.5, 2.5, 0.5),
    "iou_weight": (3.0, 0.0),
    "batch_size_per_image": (256, 1, 64, 0),
    "positive_fraction": (0.5, 0.25, 0.0, 1.0),
    "most_positives": (32, 0, 1, 256),
    "generator": (None,),
    "class_cost": ("softmax", "focal"),
    "focal": BOOLEAN,
    "xyxy": BOOLEAN,
    "class_weight": (1.0, 2.0, 0.0),
    "l1_weight": (5.0, 0.0),
    "giou_weight": (2.0, 0.0),
    "ratio_threshold": (4.0, 2.0, 1.5),
    "grid_size": lambda s: s.pick((s.grids[0], s.grids[0][0])),
    "detops::*:rows": lambda s: s.grids[0][0],
    "detops::*:columns": lambda s: s.grids[0][1],
    "image_size": lambda s: s.image_size,
    "lambda_*": (5.0, 0.5, 0.0),
}


# ---- Tensors: what is right.


def _second_boxes(s: Scene) -> torch.Tensor:
    return s.boxes(*s.lead, s.n if s.options.get("aligned") else s.m, columns=_columns(s))


def _columns(s: Scene) -> int:
    fmt = s.options.get("fmt", s.options.get("in_fmt"))
    return 5 if fmt in ("cxcywhr", "xywhr", 3, 4) else 4


def _formatted(s: Scene) -> torch.Tensor:
    """Boxes in the format that the options name."""
    if s.options.get("fmt", s.options.get("in_fmt")) in ("xyxyxyxy", 5):
        return s.numbers(*s.lead, s.n, 8, low=0, high=50)
    return s.boxes(*s.lead, s.n, columns=_columns(s))


def _focal_inputs(s: Scene) -> torch.Tensor:
    return s.numbers(*s.lead, s.n, s.classes, low=-8, high=8)


def _focal_targets(s: Scene) -> torch.Tensor:
    if s.chance(0.5):
        return s.numbers(*s.lead, s.n, s.classes)
    return s.integers(*s.lead, s.n, low=-1, high=s.classes + 1, dtype=s.pick(INTEGERS[:5]))


def _position_sensitive(s: Scene) -> torch.Tensor:
    return s.map(s.pick((0, 1, 2, 3)) * s.bins())


def _anchors_of_points(s: Scene) -> torch.Tensor:
    return s.boxes(*s.pick(((), (s.images,))), s.points)


def _optional(drawer: Callable, share: float = 0.5) -> Callable:
    return lambda s: drawer(s) if s.chance(share) else None


def _matches(s: Scene):
    indices = s.integers(*s.pick(((), (s.images,))), s.points, low=-2, high=s.pick((0, 1, 5)))
    return detops.Matches(indices, torch.zeros(indices.shape)) if s.chance(0.3) else indices


def _yolo_list(s: Scene) -> torch.Tensor:
    rows = [
        *(s.rng.integers(0, max(1, s.images), s.gts), s.rng.integers(0, max(1, s.classes), s.gts)),
        *(s.rng.integers(0, 9, (2, s.gts)) / 8 if s.chance(0.5) else s.rng.random((2, s.gts))),
        *s.rng.uniform(0.01, 1, (2, s.gts)),
    ]
    return s.finish(np.stack(rows, 1), s.dtype)


def _maps_of_yolo(s: Scene) -> list[torch.Tensor]:
    return [s.map(s.anchors * (5 + s.classes), grid) for grid in s.grids]


def _yolo_grid(s: Scene) -> torch.Tensor:
    return s.numbers(s.images, *s.grids[0], *([s.anchors] if s.with_anchors else []), 5 + s.classes)


def _grid_anchors(s: Scene):
    return s.yolo_anchors(s.anchors, 2) if s.with_anchors else None


WINNERS = -1


def _gradient(s: Scene, place: int) -> torch.Tensor:
    """Of the shape of a result of the op: what the forward pass gives."""
    forward = getattr(_library.ops, s.target.removeprefix("detops::").removesuffix("_backward"))
    arguments = {}
    drawn = {**s.arguments, **s.options}  # options as they are before they go wrong
    try:
        for argument in forward._schema.arguments:
            name = argument.name
            arguments[name] = drawn[name] if name in drawn else draw_one(s, name)
        with torch.no_grad():
            found = forward(**{**arguments, "keep_winners": True} if "keep_winners" in arguments else arguments)
    except Exception:  # what the arguments are wrong in, the gradient will see as well
        return s.numbers(s.n, 4)
    like = (found,) if isinstance(found, torch.Tensor) else found
    if place == WINNERS:
        return s.lay_out(like[1]) if isinstance(found, tuple) else s.numbers(s.n)
    dtype = like[place].dtype if like[place].dtype.is_floating_point else torch.float32
    return s.numbers(*like[place].shape, low=-1, high=1, dtype=dtype)


TENSORS = {
    "boxes": lambda s: s.boxes(s.n),
    "*box_area:boxes": _formatted,
    "*box_convert:boxes": _formatted,
    "*clip_boxes_to_image:boxes": lambda s: s.boxes(*s.lead, s.n),
    "pad_ground_truth:boxes": lambda s: s.per_image(s.boxes),
    "pad_ground_truth:labels": lambda s: s.per_image(s.labels),
    "*nms_rotated:boxes": lambda s: s.boxes(s.n, columns=5),
    "*multiclass_nms:boxes": lambda s: s.boxes(s.images, s.n, *([s.classes] if s.chance(0.3) else [])),
    "*multiclass_nms:scores": lambda s: s.numbers(s.images, s.n, s.classes),
    "MultiScaleRoIAlign*:boxes": lambda s: s.rois(as_list=True),
    "detops::*roi*rotated*:boxes": lambda s: s.rois(columns=5),
    "*roi*rotated:boxes": lambda s: s.rois(columns=5, as_list=s.chance(0.3)),
    "detops::*roi*:boxes": lambda s: s.rois(),
    "*roi*:boxes": lambda s: s.rois(as_list=s.chance(0.3)),
    "rois": lambda s: s.rois(as_list=s.chance(0.3)),
    "*match_detr:boxes": lambda s: s.boxes(s.images, s.n, unit=0.01),
    "*match_detr:logits": lambda s: s.numbers(s.images, s.n, s.classes, low=-5, high=5),
    "*encode_*:boxes": lambda s: s.boxes(*s.lead, s.n),
    "BoxCoder.decode:boxes": lambda s: s.per_image(s.boxes),
    "BoxCoder.encode:reference_boxes": lambda s: s.per_image(s.boxes),
    "BoxCoder.encode:proposals": lambda s: s.per_image(s.boxes),
    "reference_boxes": lambda s: s.boxes(s.n),
    "proposals": lambda s: s.boxes(s.n),
    "rel_codes": lambda s: s.numbers(s.n, 4 * s.pick((1, 1, 3)), low=-2, high=2),
    "deltas": lambda s: s.numbers(*s.lead, s.n, 4, low=-3, high=5),
    "distances": lambda s: s.numbers(*s.lead, s.n, 4, low=-1, high=16),
    "*_ltrb*:points": lambda s: s.numbers(s.n, 2, high=64),
    "*_ltrb*:strides": _optional(lambda s: s.numbers(s.n, low=8, high=32)),
    "*decode_dfl*:logits": lambda s: s.numbers(*s.lead, s.n, 4, s.pick((1, 2, 16, 17, 0)), low=-4, high=4),
    "raw": _maps_of_yolo,
    "*code_boxes*:anchors": lambda s: s.boxes(s.n),
    "*decode_yolo_grid:anchors": _grid_anchors,
    "*assign_yolo_grid:anchors": _grid_anchors,
    "yolov5_target_lists:anchors": lambda s: s.yolo_anchors(s.levels, s.anchors, 2, unit=1 / 8),
    "*yolo*:anchors": lambda s: s.yolo_anchors(s.levels, s.anchors, 2),
    "*assign_sizes:anchors": lambda s: s.numbers(s.anchors, 2, low=1, high=64),
    "anchors": _anchors_of_points,
    "*kmeans_anchors:sizes": lambda s: s.numbers(s.n, 2, low=1, high=100),
    "detops::assign_sizes:sizes": lambda s: s.numbers(s.n, 2, low=1, high=100),
    "start": lambda s: s.numbers(min(s.anchors, max(1, s.n)), 2, low=1, high=100),
    "scores": lambda s: s.numbers(s.n),
    "*focal_loss*:scores": lambda s: s.numbers(*s.lead, s.n),
    "idxs": lambda s: s.integers(s.n, high=s.pick((1, 3, 80)), dtype=s.pick(INTEGERS)),
    "*rotated_box_iou:boxes?": lambda s: s.boxes(*s.lead, s.n, columns=5),
    "*iou_loss*:boxes?": lambda s: s.boxes(*s.lead, s.n),
    "boxes1": _formatted,
    "boxes2": _second_boxes,
    "*max_iou:valid": _optional(lambda s: s.mask(*s.lead, s.m)),
    "masks": lambda s: s.pick((s.mask, s.integers, s.numbers))(min(s.n, 33), *s.pick((s.grid, (0, 3), (33, 70)))),
    "*focal_loss*:inputs": _focal_inputs,
    "*sigmoid_focal_loss:targets": _focal_targets,
    "*quality_focal_loss:targets": lambda s: s.integers(*s.lead, s.n, low=-1, high=s.classes + 1),
    "*varifocal_loss:targets": lambda s: s.numbers(*s.lead, s.n, s.classes),
    "*:focal_loss*:targets": _focal_targets,
    "*distribution_focal_loss*:inputs": lambda s: s.numbers(*s.lead, s.n, s.distribution, low=-4, high=4),
    "*distribution_focal_loss*:targets": lambda s: s.numbers(*s.lead, s.n, high=s.distribution - 1.0),
    "*ps_roi*:input": _position_sensitive,
    "PSRoI*:input": _position_sensitive,
    "input": lambda s: s.map(s.channels),
    "features": Scene.pyramid,
    "x": lambda s: {f"p{level}": map for level, map in enumerate(s.pyramid())},
    "image_list": Scene.image_list,
    "feature_maps": Scene.pyramid,
    "gt_boxes": lambda s: s.boxes(s.images, s.gts),
    "gt_bboxes": lambda s: s.boxes(s.images, s.gts),
    "*match_detr:gt_boxes": lambda s: s.boxes(s.images, s.gts, unit=0.01),
    "gt_labels": lambda s: s.labels(s.images, s.gts),
    "TaskAlignedAssigner.*:gt_labels": lambda s: s.labels(s.images, s.gts, 1),
    "mask_gt": lambda s: s.mask(s.images, s.gts, 1),
    "*match*:gt_valid": _optional(lambda s: s.mask(s.images, s.gts), 0.8),
    "*atss:gt_valid": _optional(lambda s: s.mask(s.images, s.gts), 0.8),
    "gt_valid": lambda s: s.mask(s.images, s.gts),
    "ignore_boxes": _optional(lambda s: s.boxes(s.images, 3)),
    "ignore_valid": _optional(lambda s: s.mask(s.images, 3), 0.3),
    "match_quality_matrix": lambda s: s.numbers(s.gts, s.n),
    "pred_scores": lambda s: s.numbers(s.images, s.points, s.classes),
    "pd_scores": lambda s: s.numbers(s.images, s.points, s.classes),
    "pred_logits": lambda s: s.numbers(s.images, s.points, s.classes, low=-5, high=5),
    "pred_objectness": lambda s: s.numbers(s.images, s.points, low=-5, high=5),
    "pred_boxes": lambda s: s.boxes(s.images, s.points),
    "pd_bboxes": lambda s: s.boxes(s.images, s.points),
    "anchor_points": Scene.cell_centres,
    "anc_points": Scene.cell_centres,
    "anchor_strides": Scene.stride_of_points,
    "cost": lambda s: s.numbers(*s.pick(((s.images,), ())), min(s.n, 100), min(s.gts, 65)),
    "num_targets": _optional(lambda s: s.integers(s.images, high=s.gts + 1)),
    "matches": _matches,
    "detops::sample_matches:matches": lambda s: s.integers(s.images, s.points, low=-2, high=3),
    "keys": lambda s: s.integers(s.images, s.points, low=-(2**31), high=2**31 - 1, dtype=torch.int32),
    "yolov5_target_lists:targets": _yolo_list,
    "decode_yolo_grid:targets": _yolo_grid,
    "predictions": lambda s: s.numbers(s.images, *s.grids[0], 5 + s.classes),
    "*yolo_loss*:targets": lambda s: s.numbers(s.images, *s.grids[0], 5 + s.classes),
    "grad_boxes": lambda s: _gradient(s, 0),
    "grad_objectness": lambda s: _gradient(s, 1),
    "grad_scores": lambda s: _gradient(s, 2),
    "grad": lambda s: _gradient(s, 0),
    "winners": lambda s: _gradient(s, WINNERS),
}


# ---- Drawing.


@functools.cache
def drawer_of(target: str, argument: str) -> tuple[dict, str]:
    """The table and the key in it that an argument is drawn by: of those that match, the longest."""
    keys = [(table, key) for table in (OPTIONS, TENSORS) for key in table if _matches_key(key, target, argument)]
    if not keys:
        raise LookupError(f"tests/fuzz_arguments.py has no drawer for the argument {argument} of {target}")
    return max(keys, key=lambda found: len(found[1]))


def _matches_key(key: str, target: str, argument: str) -> bool:
    function, _, name = key.rpartition(":")
    return fnmatch.fnmatchcase(argument, name) and (not function or fnmatch.fnmatchcase(target, function))


def draw_one(s: Scene, argument: str) -> object:
    """A right value of an argument, or a value that would be right in another call."""
    table, key = drawer_of(s.target, argument)
    choices = table[key]
    if table is TENSORS or callable(choices):
        return choices(s)
    place = int(s.rng.integers(len(choices)))
    is_code = s.types.get(argument) == "int" and any(isinstance(choice, str) for choice in choices)
    return place if is_code else choices[place]


def draw(target: Target, seed: int, small: bool = False, right: bool = False) -> tuple[Scene, dict[str, object]]:
    """The arguments of a call: the same for the same seed. In three calls of five all are right, or in all."""
    s = Scene(np.random.default_rng([zlib.crc32(target.name.encode()), seed]), small)
    s.target, s.types = target.name, target.types
    wrong = s.rng.permutation(list(target.types))[: s.pick((0, 0, 0, 1, 1, 2) if target.types and not right else (0,))]
    is_option = {name: drawer_of(target.name, name)[0] is OPTIONS for name in target.types}
    for name in sorted(target.types, key=lambda name: (not is_option[name], name in ("grad", "winners"))):
        value = draw_one(s, name)
        if is_option[name]:
            s.options[name] = value
        if name in wrong:
            value = wrong_option(s, value) if is_option[name] else wrong_tensor(s, value)
            if name == "sampling_ratio" and isinstance(value, int) and value > 64:
                value = 64  # more samples than that take the time that they take
        s.arguments[name] = value
    return s, {name: s.arguments[name] for name in target.types}


def wrong_option(s: Scene, value: object) -> object:
    """In place of an option that is right: mostly one of the same type."""
    if s.chance(0.2) and value != "cpu":
        return s.pick((None, "other", True, 2.5, NAN, np.float32(0.5), 10**400))
    match value:
        case bool():
            return s.pick((2, -1, None, "yes", 0.5))
        case int():
            return s.pick(
                (*EXTREME_INTEGERS, np.int64(value), np.int32(3), torch.tensor(value), 2**64, float(value), 30)
            )
        case float() | None:
            return s.pick((*EXTREMES, np.float32(0.5), torch.tensor(0.5), 10**30, 2**63, 5))
        case "cpu":
            return value
        case str():
            return s.pick((value.upper(), value + " ", "none", "xywh", 0))
        case list() | tuple():
            items = list(value)
            change = s.pick(("none", "short", "long", "longer", "item", "item", "array"))
            if change == "none":
                items = []
            elif change == "short":
                items = items[1:]
            elif change == "long":
                items = items + items[:1]
            elif change == "longer":
                items = items * 17
            elif change == "item" and items:
                place = int(s.rng.integers(len(items)))
                items[place] = wrong_option(s, items[place])
            elif change == "array":
                return np.array(items, dtype=object)
            return tuple(items) if isinstance(value, tuple) else items
        case _:
            return s.pick((None, 0, torch.int64, torch.float8_e4m3fn, torch.complex64))


def wrong_tensor(s: Scene, value: object) -> object:
    """In place of tensors that are right: of another shape, dtype, content or type."""
    match value:
        case torch.Tensor():
            return _wrong_one(s, value)
        case list() | tuple() | dict() if value:
            items = dict(value) if isinstance(value, dict) else list(value)
            if s.chance(0.3) and isinstance(items, list):
                return s.pick((items[1:], items * 2, items[:1] * 40, [], tuple(items), np.array(1.0)))
            place = s.pick(list(items)) if isinstance(items, dict) else int(s.rng.integers(len(items)))
            items[place] = wrong_tensor(s, items[place])
            return items
        case SimpleNamespace():
            return value
        case _:
            return s.pick((s.numbers(3), s.boxes(2), torch.tensor(1.0), 0, "no tensor", [1.0, 2.0]))


def _wrong_one(s: Scene, tensor: torch.Tensor) -> object:
    plain = tensor.detach()
    match s.pick(("dtype", "dtype", "shape", "shape", "content", "content", "content", "type", "vast")):
        case "dtype":
            return plain.to(s.pick((*FLOATING, *INTEGERS, *OTHERS)))
        case "shape":
            return _wrong_shape(s, plain)
        case "content":
            extremes = EXTREMES if plain.is_floating_point() else EXTREME_INTEGERS
            info = None if plain.is_floating_point() or plain.dtype == torch.bool else torch.iinfo(plain.dtype)
            content = plain.clone(memory_format=torch.contiguous_format)
            if content.numel() and content.dtype != torch.bool:
                flat = content.view(-1)
                for place in s.rng.integers(0, flat.numel(), s.pick((1, 1, 3, flat.numel()))):
                    extreme = s.pick(extremes)
                    if info is not None:
                        extreme = max(info.min, min(info.max, extreme))
                    flat[int(place)] = torch.tensor(extreme).to(flat.dtype)
            return content
        case "vast" if plain.dim() and plain.shape[0]:  # memory for one row only
            return plain[:1].expand(s.pick((2**31 - 2**16, 2**31, 2**40)), *plain.shape[1:])
        case _:
            return s.pick((None, plain.tolist(), plain.to("meta"), [plain], "tensor", 1.0, torch.nn.Parameter))


def _wrong_shape(s: Scene, plain: torch.Tensor) -> torch.Tensor:
    changed = [plain[None], plain[..., None], plain.new_zeros(()), plain.flatten(), plain.new_empty(0)]
    for dim in range(plain.dim()):
        length = plain.shape[dim]
        changed += [plain.narrow(dim, 0, 0), torch.cat([plain, plain], dim)]
        if length:
            changed += [plain.select(dim, 0), plain.narrow(dim, 0, length - 1)]
    return s.pick(changed)
