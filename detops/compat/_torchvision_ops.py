"""detops in place of the functions of torchvision.ops."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

import detops

from .. import _library
from ..roi_modules import octave_of

BOXES = "torchvision.ops.boxes"

# By module and path within it. Each gets torchvision's own function first, for what it leaves to it.
replacements: dict[tuple[str, str], Callable] = {}


def instead_of(module: str, path: str) -> Callable[[Callable], Callable]:
    def register(replacement: Callable) -> Callable:
        replacements[module, path] = replacement
        return replacement

    return register


# Those that detops has kernels for, or knows shapes on.
_DEVICES = ("cpu", "meta", "cuda") if _library.build_info()["cuda"] else ("cpu", "meta")


@torch.compiler.assume_constant_result  # torch 2.10 to 2.12 trace is_exporting() as True in all compiled code
def _exporting() -> bool:
    """torch.export, which that of ONNX goes by; its older one traces."""
    return torch.compiler.is_exporting()


def takes(*tensors) -> bool:
    """Whether detops serves an op that is one kernel in torchvision too."""
    if torch.jit.is_tracing() or _exporting():
        return False
    for each in tensors:
        if not isinstance(each, Tensor) or each.is_quantized or each.layout != torch.strided:
            return False
        if each.device.type not in _DEVICES:
            return False
    return True


def takes_composed(*tensors) -> bool:
    """Whether detops serves what torchvision composes of torch's ops: not where transforms look into it."""
    if not takes(*tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def floating(*tensors: Tensor) -> bool:
    return all(each.is_floating_point() for each in tensors)


def within(least: float, number, largest: float = torch.finfo(torch.float32).max) -> bool:
    """Whether an option is a plain number, and not a tensor, of what detops takes."""
    return isinstance(number, int | float) and least <= number <= largest


def _of_four(boxes: Tensor) -> bool:
    """torchvision reads boxes from longer rows too."""
    return boxes.ndim > 0 and boxes.shape[-1] == 4


@instead_of(BOXES, "nms")
def _nms(original, boxes, scores, iou_threshold):
    if takes(boxes, scores) and within(0, iou_threshold, math.inf):
        return detops.nms(boxes, scores, iou_threshold)
    return original(boxes, scores, iou_threshold)


@instead_of(BOXES, "batched_nms")
def _batched_nms(original, boxes, scores, idxs, iou_threshold):
    if not takes(boxes, scores, idxs) or boxes.ndim != 2 or not within(0, iou_threshold, math.inf):
        return original(boxes, scores, idxs, iou_threshold)
    if idxs.is_floating_point():
        idxs = idxs.unique(return_inverse=True)[1]
    keep = detops.batched_nms(boxes, scores, idxs, iou_threshold)
    loops_over_classes = boxes.numel() > (4000 if boxes.device.type == "cpu" else 100_000)
    return _in_torchs_order(keep, scores) if loops_over_classes and not torch.compiler.is_compiling() else keep


def _in_torchs_order(keep: Tensor, scores: Tensor) -> Tensor:
    """torchvision then orders what it keeps by an unstable sort, which only the same sort repeats.

    Padding gives many proposals the same score; the samplers that come after would draw others.
    """
    kept = scores[keep]
    if not (kept[1:] == kept[:-1]).any():
        return keep
    ascending = keep.sort().values
    return ascending[scores[ascending].sort(descending=True).indices]


@instead_of(BOXES, "remove_small_boxes")
def _remove_small_boxes(original, boxes, min_size):
    if takes_composed(boxes) and boxes.ndim == 2 and _of_four(boxes) and within(-math.inf, min_size, math.inf):
        return detops.remove_small_boxes(boxes, min_size)
    return original(boxes, min_size)


@instead_of(BOXES, "clip_boxes_to_image")
def _clip_boxes_to_image(original, boxes, size):
    served = takes_composed(boxes) and floating(boxes) and _of_four(boxes)
    if served and len(size) == 2 and all(side >= 0 for side in size):
        return detops.clip_boxes_to_image(boxes, size)
    return original(boxes, size)


@instead_of(BOXES, "box_convert")
def _box_convert(original, boxes, in_fmt, out_fmt):
    if takes_composed(boxes) and floating(boxes) and in_fmt != out_fmt:
        return detops.box_convert(boxes, in_fmt, out_fmt)
    return original(boxes, in_fmt, out_fmt)


@instead_of(BOXES, "box_area")
def _box_area(original, boxes, fmt):
    if takes_composed(boxes) and floating(boxes) and _of_four(boxes):
        return detops.box_area(boxes, fmt)
    return original(boxes, fmt)


@instead_of(BOXES, "masks_to_boxes")
def _masks_to_boxes(original, masks):
    if takes_composed(masks) and masks.ndim == 3 and masks.numel():
        return detops.masks_to_boxes(masks)
    return original(masks)


def _takes_pairs(boxes1, boxes2, eps=0.0) -> bool:
    return takes_composed(boxes1, boxes2) and boxes1.ndim > 1 and within(0, eps)


@instead_of(BOXES, "box_iou")
def _box_iou(original, boxes1, boxes2, fmt):
    if _takes_pairs(boxes1, boxes2) and fmt in ("xyxy", "xywh", "cxcywh"):
        return detops.box_iou(boxes1, boxes2, fmt)
    return original(boxes1, boxes2, fmt)


@instead_of(BOXES, "generalized_box_iou")
def _generalized_box_iou(original, boxes1, boxes2):
    if _takes_pairs(boxes1, boxes2):
        return detops.generalized_box_iou(boxes1, boxes2)
    return original(boxes1, boxes2)


@instead_of(BOXES, "distance_box_iou")
def _distance_box_iou(original, boxes1, boxes2, eps):
    if _takes_pairs(boxes1, boxes2, eps):
        return detops.distance_box_iou(boxes1, boxes2, eps)
    return original(boxes1, boxes2, eps)


@instead_of(BOXES, "complete_box_iou")
def _complete_box_iou(original, boxes1, boxes2, eps):
    if _takes_pairs(boxes1, boxes2, eps):
        return detops.complete_box_iou(boxes1, boxes2, eps)
    return original(boxes1, boxes2, eps)


def _iou_loss(name: str):
    def loss(original, boxes1, boxes2, reduction, eps):
        if takes_composed(boxes1, boxes2) and boxes1.shape == boxes2.shape and within(0, eps):
            return getattr(detops, name)(boxes1, boxes2, reduction, eps)
        return original(boxes1, boxes2, reduction, eps)

    loss.__name__ = name
    return loss


for _file, _name in (("giou", "generalized"), ("diou", "distance"), ("ciou", "complete")):
    instead_of(f"torchvision.ops.{_file}_loss", f"{_name}_box_iou_loss")(_iou_loss(f"{_name}_box_iou_loss"))


@instead_of("torchvision.ops.focal_loss", "sigmoid_focal_loss")
def _sigmoid_focal_loss(original, inputs, targets, alpha, gamma, reduction):
    # With gamma 0 it is torch's cross-entropy, and stays that to the last bit.
    plain = within(0, gamma) and gamma > 0 and isinstance(alpha, int | float)
    served = plain and takes_composed(inputs, targets) and floating(inputs, targets)
    if served and inputs.shape == targets.shape and not targets.requires_grad:
        return detops.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)
    return original(inputs, targets, alpha, gamma, reduction)


def _takes_rois(input, boxes, output_size, spatial_scale, sampling_ratio=-1, fewest_bins=1) -> bool:
    tensors = input, *(boxes if isinstance(boxes, list | tuple) else (boxes,))
    return takes(*tensors) and _takes_bins(output_size, sampling_ratio, fewest_bins) and _is_scale(spatial_scale)


def _takes_bins(output_size, sampling_ratio, fewest=1) -> bool:
    sizes = output_size if isinstance(output_size, list | tuple) else (output_size, output_size)
    plain = len(sizes) == 2 and all(isinstance(size, int | torch.SymInt) and size >= fewest for size in sizes)
    return plain and sampling_ratio <= 4096


def _is_scale(scale) -> bool:
    return within(0, scale) and scale > 0


@instead_of("torchvision.ops.roi_align", "roi_align")
def _roi_align(original, input, boxes, output_size, spatial_scale, sampling_ratio, aligned):
    run = detops.roi_align if _takes_rois(input, boxes, output_size, spatial_scale, sampling_ratio) else original
    return run(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


@instead_of("torchvision.ops.roi_pool", "roi_pool")
def _roi_pool(original, input, boxes, output_size, spatial_scale):
    run = detops.roi_pool if _takes_rois(input, boxes, output_size, spatial_scale) else original
    return run(input, boxes, output_size, spatial_scale)


# The position-sensitive ops of torchvision end the process where there are no bins, by dividing by 0: detops raises.
@instead_of("torchvision.ops.ps_roi_align", "ps_roi_align")
def _ps_roi_align(original, input, boxes, output_size, spatial_scale, sampling_ratio):
    run = detops.ps_roi_align if _takes_rois(input, boxes, output_size, spatial_scale, sampling_ratio, 0) else original
    return run(input, boxes, output_size, spatial_scale, sampling_ratio)


@instead_of("torchvision.ops.ps_roi_pool", "ps_roi_pool")
def _ps_roi_pool(original, input, boxes, output_size, spatial_scale):
    run = detops.ps_roi_pool if _takes_rois(input, boxes, output_size, spatial_scale, fewest_bins=0) else original
    return run(input, boxes, output_size, spatial_scale)


@instead_of("torchvision.ops.poolers", "_infer_scale")
def _infer_scale(original, feature, original_size):
    if takes(feature) and min(*feature.shape[-2:], *original_size) > 0:
        return 2.0 ** octave_of(feature.shape[-2:], original_size)
    return original(feature, original_size)


@instead_of("torchvision.ops.poolers", "_convert_to_roi_format")
def _convert_to_roi_format(original, boxes):
    # Half precision has no room for the number of every image; roi_align takes boxes of another dtype than its input.
    if boxes and takes(*boxes) and all(each.dtype in (torch.float16, torch.bfloat16) for each in boxes):
        boxes = [each.float() for each in boxes]
    return original(boxes)


@instead_of("torchvision.ops.poolers", "_multiscale_roi_align")
def _multiscale_roi_align(original, x_filtered, boxes, output_size, sampling_ratio, scales, mapper):
    if not _takes_bins(output_size, sampling_ratio) or not _is_pyramid(x_filtered, boxes, scales, mapper):
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
    """Whether the levels are those of detops: each half of the one before, and of one kind; or one map alone."""
    if not scales or mapper is None or not 1 <= len(maps) <= 8 or not boxes or not takes(*maps, *boxes):
        return False
    if not all(map(_is_scale, (*scales, mapper.s0))) or not isinstance(mapper.lvl0, int):
        return False
    if len(maps) == 1:
        return len(scales) == 1
    levels = [-math.log2(scale) for scale in scales]
    return (
        levels == list(range(mapper.k_min, mapper.k_max + 1))
        and mapper.eps == 1e-6
        and len(scales) == len(maps)
        and all(each.dtype == maps[0].dtype and each.shape[:2] == maps[0].shape[:2] for each in maps)
    )
