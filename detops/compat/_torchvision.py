"""What runs in place of torchvision's functions, and the switch."""

import contextlib
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

import detops

from .. import _library
from ._redirect import Redirection

_BOXES = "torchvision.ops.boxes"
_DETECTION = "torchvision.models.detection"

# By module and path within it. Each gets torchvision's own function first, for what it leaves to it.
_replacements: dict[tuple[str, str], Callable] = {}


def _instead_of(module: str, path: str) -> Callable[[Callable], Callable]:
    def register(replacement: Callable) -> Callable:
        _replacements[module, path] = replacement
        return replacement

    return register


class Torchvision:
    """Makes torchvision, and all code that uses it, run on detops; or only a block of code.

    >>> with detops.compat.torchvision():
    ...     losses = model(images, targets)
    >>> detops.compat.torchvision.install()  # from here on, everywhere
    >>> detops.compat.torchvision.uninstall()

    These functions of torchvision then call detops, whoever calls them and under whatever name: its own models, built
    before or after, and all other modules, also where they keep a function in a closure or as a default argument.

    - `nms`, `batched_nms`, `clip_boxes_to_image`, `remove_small_boxes`, `box_area`, `box_convert`, `masks_to_boxes`;
    - `box_iou`, `generalized_box_iou`, `distance_box_iou`, `complete_box_iou`, and the three `..._loss` of the same
      names, `sigmoid_focal_loss`;
    - `roi_align`, `roi_pool`, `ps_roi_align`, `ps_roi_pool`, their modules, and `MultiScaleRoIAlign`;
    - of the detection models `Matcher`, `BoxCoder`, `AnchorGenerator`, `DefaultBoxGenerator`, and the post-processing
      of RetinaNet, FCOS and SSD.

    Samplers stay torchvision's: another random stream would change losses.

    Blocks nest, and a block within an installation changes nothing. `install` and `uninstall` may be repeated; after
    `uninstall`, or when the last block ends, also by an exception, everything is as it was. The code inside functions
    is exchanged and not their names, so nothing has to be imported or built again. All threads see the change.

    Results are torchvision's up to rounding. They differ where the docstrings of the functions say so, above all:
    half-precision boxes are computed in float32, `batched_nms` does not merge classes where coordinates are negative, a
    batch index out of range is an error, and IoUs, their losses and the coders have no second derivative.

    torchvision's own code still runs under TorchScript and tracing, in torch.func transforms and forward-mode
    derivatives, for tensors that are quantised or on devices that detops has no kernels for, for arguments that detops
    does not take, and where a subclass or a changed instance has its own way. Not reached are programs scripted,
    exported or traced before, and calls of `torch.ops.torchvision.*`.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: something else has replaced one of these functions; nothing is changed then.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._installed = False
        self._blocks = 0
        self._running: list[Redirection] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Installed within a block; also a decorator."""
        with self._lock:
            self._switch(self._installed, self._blocks + 1)
        try:
            yield
        finally:
            with self._lock:
                self._switch(self._installed, self._blocks - 1)

    def install(self) -> None:
        """Until `uninstall`."""
        with self._lock:
            self._switch(True, self._blocks)

    def uninstall(self) -> None:
        """Undoes `install`; blocks that still run keep what they asked for."""
        with self._lock:
            self._switch(False, self._blocks)

    def __repr__(self) -> str:
        return f"<detops.compat.torchvision: {'in place' if self._running else 'not in place'}>"

    def _switch(self, installed: bool, blocks: int) -> None:
        wanted = installed or blocks > 0
        if wanted and not self._running:
            redirections = _redirections()
            for each in redirections:
                each.start()
            self._running = redirections
        elif not wanted:
            for each in self._running:
                each.stop()
            self._running = []
        self._installed, self._blocks = installed, blocks


torchvision = Torchvision()


def _redirections() -> list[Redirection]:
    try:
        modules = {name: importlib.import_module(name) for name, _ in _replacements}
    except ImportError as error:
        raise ImportError(
            f"detops.compat.torchvision: torchvision must be installed, and could not be imported: {error}"
        ) from error
    return [Redirection(modules[module], path, each) for (module, path), each in _replacements.items()]


# Those that detops has kernels for, or knows shapes on.
_DEVICES = ("cpu", "meta", "cuda") if _library.build_info()["cuda"] else ("cpu", "meta")


def _takes(*tensors) -> bool:
    """Whether detops serves an op that is one kernel in torchvision too."""
    if torch.jit.is_tracing():
        return False
    for each in tensors:
        if not isinstance(each, Tensor) or each.is_quantized or each.layout != torch.strided:
            return False
        if each.device.type not in _DEVICES:
            return False
    return True


def _takes_composed(*tensors) -> bool:
    """Whether detops serves what torchvision composes of torch's ops: not where transforms look into it."""
    if not _takes(*tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _floating(*tensors: Tensor) -> bool:
    return all(each.is_floating_point() for each in tensors)


@_instead_of(_BOXES, "nms")
def _nms(original, boxes, scores, iou_threshold):
    if _takes(boxes, scores) and iou_threshold >= 0:
        return detops.nms(boxes, scores, iou_threshold)
    return original(boxes, scores, iou_threshold)


@_instead_of(_BOXES, "batched_nms")
def _batched_nms(original, boxes, scores, idxs, iou_threshold):
    if not _takes(boxes, scores, idxs) or not iou_threshold >= 0:
        return original(boxes, scores, idxs, iou_threshold)
    if idxs.is_floating_point():
        idxs = idxs.unique(return_inverse=True)[1]
    return detops.batched_nms(boxes, scores, idxs, iou_threshold)


@_instead_of(_BOXES, "remove_small_boxes")
def _remove_small_boxes(original, boxes, min_size):
    if _takes_composed(boxes) and boxes.ndim == 2 and min_size == min_size:
        return detops.remove_small_boxes(boxes, min_size)
    return original(boxes, min_size)


@_instead_of(_BOXES, "clip_boxes_to_image")
def _clip_boxes_to_image(original, boxes, size):
    if _takes_composed(boxes) and _floating(boxes) and len(size) == 2 and min(size) >= 0:
        return detops.clip_boxes_to_image(boxes, size)
    return original(boxes, size)


@_instead_of(_BOXES, "box_convert")
def _box_convert(original, boxes, in_fmt, out_fmt):
    if _takes_composed(boxes) and _floating(boxes):
        return detops.box_convert(boxes, in_fmt, out_fmt)
    return original(boxes, in_fmt, out_fmt)


@_instead_of(_BOXES, "box_area")
def _box_area(original, boxes, fmt):
    if _takes_composed(boxes) and _floating(boxes):
        return detops.box_area(boxes, fmt)
    return original(boxes, fmt)


@_instead_of(_BOXES, "masks_to_boxes")
def _masks_to_boxes(original, masks):
    if _takes_composed(masks) and masks.ndim == 3 and masks.numel():
        return detops.masks_to_boxes(masks)
    return original(masks)


@_instead_of(_BOXES, "box_iou")
def _box_iou(original, boxes1, boxes2, fmt):
    if _takes_composed(boxes1, boxes2) and fmt in ("xyxy", "xywh", "cxcywh"):
        return detops.box_iou(boxes1, boxes2, fmt)
    return original(boxes1, boxes2, fmt)


@_instead_of(_BOXES, "generalized_box_iou")
def _generalized_box_iou(original, boxes1, boxes2):
    if _takes_composed(boxes1, boxes2):
        return detops.generalized_box_iou(boxes1, boxes2)
    return original(boxes1, boxes2)


@_instead_of(_BOXES, "distance_box_iou")
def _distance_box_iou(original, boxes1, boxes2, eps):
    if _takes_composed(boxes1, boxes2):
        return detops.distance_box_iou(boxes1, boxes2, eps)
    return original(boxes1, boxes2, eps)


@_instead_of(_BOXES, "complete_box_iou")
def _complete_box_iou(original, boxes1, boxes2, eps):
    if _takes_composed(boxes1, boxes2):
        return detops.complete_box_iou(boxes1, boxes2, eps)
    return original(boxes1, boxes2, eps)


def _iou_loss(name: str):
    def loss(original, boxes1, boxes2, reduction, eps):
        if _takes_composed(boxes1, boxes2) and boxes1.shape == boxes2.shape:
            return getattr(detops, name)(boxes1, boxes2, reduction, eps)
        return original(boxes1, boxes2, reduction, eps)

    loss.__name__ = name
    return loss


for _file, _name in (("giou", "generalized"), ("diou", "distance"), ("ciou", "complete")):
    _instead_of(f"torchvision.ops.{_file}_loss", f"{_name}_box_iou_loss")(_iou_loss(f"{_name}_box_iou_loss"))


@_instead_of("torchvision.ops.focal_loss", "sigmoid_focal_loss")
def _sigmoid_focal_loss(original, inputs, targets, alpha, gamma, reduction):
    # With gamma 0 it is torch's cross-entropy, and stays that to the last bit.
    served = _takes_composed(inputs, targets) and _floating(inputs, targets) and gamma > 0
    if served and inputs.shape == targets.shape and not targets.requires_grad:
        return detops.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)
    return original(inputs, targets, alpha, gamma, reduction)


def _takes_rois(input, boxes) -> bool:
    return _takes(input, *(boxes if isinstance(boxes, list | tuple) else (boxes,)))


@_instead_of("torchvision.ops.roi_align", "roi_align")
def _roi_align(original, input, boxes, output_size, spatial_scale, sampling_ratio, aligned):
    run = detops.roi_align if _takes_rois(input, boxes) else original
    return run(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


@_instead_of("torchvision.ops.roi_pool", "roi_pool")
def _roi_pool(original, input, boxes, output_size, spatial_scale):
    run = detops.roi_pool if _takes_rois(input, boxes) else original
    return run(input, boxes, output_size, spatial_scale)


@_instead_of("torchvision.ops.ps_roi_align", "ps_roi_align")
def _ps_roi_align(original, input, boxes, output_size, spatial_scale, sampling_ratio):
    run = detops.ps_roi_align if _takes_rois(input, boxes) else original
    return run(input, boxes, output_size, spatial_scale, sampling_ratio)


@_instead_of("torchvision.ops.ps_roi_pool", "ps_roi_pool")
def _ps_roi_pool(original, input, boxes, output_size, spatial_scale):
    run = detops.ps_roi_pool if _takes_rois(input, boxes) else original
    return run(input, boxes, output_size, spatial_scale)


@_instead_of("torchvision.ops.poolers", "_multiscale_roi_align")
def _multiscale_roi_align(original, x_filtered, boxes, output_size, sampling_ratio, scales, mapper):
    if not _is_pyramid(x_filtered, boxes, scales, mapper):
        return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
    return detops.multi_scale_roi_align(
        x_filtered,
        boxes,
        output_size,
        spatial_scales=scales,
        sampling_ratio=sampling_ratio,
        canonical_scale=mapper.s0,
        canonical_level=mapper.lvl0,
    )


def _is_pyramid(maps, boxes, scales, mapper) -> bool:
    """Whether the levels are those of detops: each half of the one before, and of one kind."""
    if not scales or mapper is None or not 2 <= len(maps) <= 8 or not boxes or not _takes(*maps, *boxes):
        return False
    levels = [-math.log2(scale) for scale in scales]
    return (
        levels == list(range(mapper.k_min, mapper.k_max + 1))
        and mapper.eps == 1e-6
        and len(scales) == len(maps)
        and all(each.dtype == maps[0].dtype and each.shape[:2] == maps[0].shape[:2] for each in maps)
    )


@_instead_of(f"{_DETECTION}._utils", "Matcher.__call__")
def _match(original, self, match_quality_matrix):
    qualities = match_quality_matrix
    served = _takes(qualities) and _floating(qualities) and qualities.ndim == 2 and qualities.numel() > 0
    if not served or _has_own(self, "Matcher", "set_low_quality_matches_"):
        return original(self, qualities)
    return detops.Matcher(self.high_threshold, self.low_threshold, self.allow_low_quality_matches)(qualities)


def _has_own(instance, ancestor: str, *methods: str) -> bool:
    """Whether a subclass of torchvision's class of that name, or the instance, has methods of its own."""
    (base,) = (each for each in type(instance).__mro__ if each.__name__ == ancestor and _is_torchvisions(each))
    return any(
        name in vars(instance) or getattr(type(instance), name, None) is not getattr(base, name, None)
        for name in methods
    )


def _is_torchvisions(cls: type) -> bool:
    return cls.__module__.startswith("torchvision.")


@_instead_of(f"{_DETECTION}._utils", "BoxCoder.encode_single")
def _encode_single(original, self, reference_boxes, proposals):
    if _takes_composed(reference_boxes, proposals) and _floating(reference_boxes, proposals) and _weighs(self):
        if reference_boxes.shape == proposals.shape and reference_boxes.ndim == 2:
            return detops.encode_boxes(reference_boxes, proposals, self.weights)
    return original(self, reference_boxes, proposals)


@_instead_of(f"{_DETECTION}._utils", "BoxCoder.decode_single")
def _decode_single(original, self, rel_codes, boxes):
    served = _takes_composed(rel_codes, boxes) and _floating(rel_codes, boxes) and _weighs(self)
    if not served or rel_codes.ndim != 2 or rel_codes.shape[1] % 4 or boxes.shape != (rel_codes.shape[0], 4):
        return original(self, rel_codes, boxes)
    deltas = rel_codes.unflatten(1, (-1, 4))
    return detops.decode_boxes(deltas, boxes[:, None], self.weights, self.bbox_xform_clip).flatten(1).to(rel_codes)


def _weighs(coder) -> bool:
    return len(coder.weights) == 4 and all(isinstance(w, int | float) and 0 < w < math.inf for w in coder.weights)


@_instead_of(f"{_DETECTION}.anchor_utils", "AnchorGenerator.forward")
def _generate_anchors(original, self, image_list, feature_maps):
    own = _has_own(self, "AnchorGenerator", "generate_anchors", "grid_anchors", "set_cell_anchors")
    if own or not _makes_anchors_for(feature_maps):
        return original(self, image_list, feature_maps)
    self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)  # as torchvision leaves them
    generator = _agreeing(self, _anchor_generator, self.cell_anchors)
    if generator is None or len(feature_maps) != len(self.cell_anchors):
        return original(self, image_list, feature_maps)
    return [each.clone() for each in generator(image_list, feature_maps)]


def _anchor_generator(generator):
    ours = detops.AnchorGenerator(generator.sizes, generator.aspect_ratios)
    count = len(ours.sizes)
    cells = detops.grid_anchors([(1, 1)] * count, [1] * count, ours.sizes, ours.aspect_ratios)
    return ours, cells.split(ours.num_anchors_per_location())


@_instead_of(f"{_DETECTION}.anchor_utils", "DefaultBoxGenerator.forward")
def _generate_default_boxes(original, self, image_list, feature_maps):
    own = _has_own(self, "DefaultBoxGenerator", "_generate_wh_pairs", "_grid_default_boxes")
    if own or not _makes_anchors_for(feature_maps) or feature_maps[0].dtype not in (torch.float32, torch.float64):
        return original(self, image_list, feature_maps)
    generator = _agreeing(self, _default_box_generator, self._wh_pairs)
    if generator is None or len(feature_maps) != len(self._wh_pairs):
        return original(self, image_list, feature_maps)
    return [each.clone() for each in generator(image_list, feature_maps)]


def _default_box_generator(generator):
    options = {name: getattr(generator, name) for name in ("aspect_ratios", "scales", "steps", "clip")}
    ours = detops.DefaultBoxGenerator(**options)
    return ours, [torch.tensor(ours._sides(k)) for k in range(len(ours.aspect_ratios))]


def _makes_anchors_for(maps) -> bool:
    real = len(maps) > 0 and all(type(each) is Tensor and each.device.type != "meta" for each in maps)
    return real and _takes(*maps) and _floating(*maps) and not torch.compiler.is_compiling()


# By torchvision's generator: the options that were looked at, the tensors with their versions, and ours if they agree.
_known_generators: WeakKeyDictionary = WeakKeyDictionary()


def _agreeing(generator, make: Callable, held: list[Tensor]):
    """The generator of detops, if what torchvision's holds is what its options say; else None.

    It may hold other anchors: it can be changed, and half precision once rounds them for good.
    """
    options = repr([getattr(generator, name, None) for name in ("sizes", "aspect_ratios", "scales", "steps", "clip")])
    state = options, [(each, 0 if each.is_inference() else each._version) for each in held]
    known = _known_generators.get(generator)
    if known is None or not _same_state(known[0], state):
        try:
            ours, expected = make(generator)
        except ValueError:
            ours, expected = None, ()
        agree = len(held) == len(expected) and all(
            each.shape == other.shape and torch.equal(each, other.to(each))
            for each, other in zip(held, expected, strict=True)
        )
        known = _known_generators[generator] = state, ours if agree else None
    return known[1]


def _same_state(one, other) -> bool:
    pairs = zip(one[1], other[1], strict=False)
    return (
        one[0] == other[0]
        and len(one[1]) == len(other[1])
        and all(a is b and version == now for (a, version), (b, now) in pairs)
    )
