"""Non-maximum suppression (NMS): of boxes that overlap, keep the best-scored.

All functions share these rules, on every device:

- Boxes are xyxy in continuous pixels. A box suppresses a worse one when their IoU is greater than `iou_threshold`,
  strictly. The IoU is computed in float32 (float64 for float64 boxes) and compared with the threshold as a double.
- Order: descending score, ties to the lower index; NaN scores come first, as in torch.sort.
- Boxes that are inverted, of zero area, infinite or NaN are never suppressed and suppress nothing.
- Boxes and scores are float16, bfloat16, float32 or float64, and may differ.
- Results are indices or copies of inputs, in plain tensors: there are no gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import check_optional_tensors, check_tensors, integer, number
from ._library import plain, register_fake


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of one set of boxes.

    Takes the boxes by descending score and keeps each one whose IoU with every box kept before is at most
    `iou_threshold`, where IoU = intersection / (area + area - intersection).

    Args:
        boxes: [N, 4] xyxy, floating.
        scores: [N], floating.
        iou_threshold: at least 0. From 1 on nothing is suppressed: the result is the order, at once.

    Returns:
        int64 [K]: the indices of the boxes that stay, by descending score.

    Ties: to the lower index; NaN scores come first. Boxes that are inverted, of zero area or not finite suppress
    nothing and are not suppressed. Memory beyond the inputs is O(N). On a GPU one host synchronisation, for K. No
    gradient.

    Raises:
        ValueError: `iou_threshold` is negative or NaN.
        RuntimeError: a tensor has a wrong shape, dtype or device, or more than 2147418112 rows.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [1., 0., 10., 10.], [20., 0., 30., 10.]])
        >>> nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5)
        tensor([1, 2])

    Source: torchvision.ops.nms, with the results of its CPU kernel on every device (its CUDA kernel narrows the
    threshold to float32).
    """
    if not (isinstance(boxes, Tensor) and isinstance(scores, Tensor)):
        check_tensors("nms", boxes=boxes, scores=scores)
    return plain(_library.ops.nms(boxes, scores, _checked_threshold("nms", iou_threshold)))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression within each group of boxes of equal id: a class, an image, or both.

    Args:
        boxes: [N, 4] xyxy, floating.
        scores: [N], floating.
        idxs: [N], integer or bool: the group of each box. Any values; they are compared, never added to coordinates.
        iou_threshold: at least 0.

    Returns:
        int64 [K]: the indices of the boxes that stay, by descending score over all groups.

    Ties: to the lower index; NaN scores come first. Boxes that are inverted, of zero area or not finite suppress
    nothing and are not suppressed. Memory beyond the inputs is O(N). On a GPU one host synchronisation, for K. No
    gradient.

    Raises:
        ValueError: `iou_threshold` is negative or NaN.
        RuntimeError: a tensor has a wrong shape, dtype or device, or more than 2147418112 rows.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [1., 0., 10., 10.], [1., 0., 10., 10.]])
        >>> batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]), 0.5)
        tensor([0, 2])

    Source: torchvision.ops.batched_nms, with the results of its per-class loop and ties to the lower index. (It shifts
    the coordinates of each class apart for some inputs, which rounds them and merges classes where some are negative.)
    """
    check_tensors("batched_nms", boxes=boxes, scores=scores, idxs=idxs)
    return plain(_library.ops.batched_nms(boxes, scores, idxs, _checked_threshold("batched_nms", iou_threshold)))


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None) -> Tensor:
    """Greedy non-maximum suppression of rotated boxes, within groups of equal id where ids are given.

    The same decisions as `nms` and `batched_nms`, with the IoU that `box_iou(..., fmt="cxcywhr")` gives.

    Args:
        boxes: [N, 5] (centre x, centre y, width, height, angle), floating; the angle in degrees, counter-clockwise as
            one looks at the image.
        scores: [N], floating.
        iou_threshold: at least 0.
        idxs: [N], integer or bool: the group of each box; all are one group if None.

    Returns:
        int64 [K]: the indices of the boxes that stay, by descending score over all groups.

    Ties: to the lower index; NaN scores come first. Boxes that are inverted, of zero area or not finite suppress
    nothing and are not suppressed. Memory beyond the inputs is O(N). On a GPU one host synchronisation, for K. No
    gradient.

    Raises:
        ValueError: `iou_threshold` is negative or NaN.
        RuntimeError: a tensor has a wrong shape, dtype or device, or more than 2147418112 rows.

    Example:
        >>> boxes = torch.tensor([[0., 0., 4., 2., 0.], [0., 0., 2., 4., 90.], [0., 0., 4., 2., 90.]])
        >>> nms_rotated(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
        tensor([0, 2])

    Source: detectron2's nms_rotated (which suppresses at IoU >= threshold on CPU and > on CUDA; here > on both).
    """
    check_tensors("nms_rotated", boxes=boxes, scores=scores)
    check_optional_tensors("nms_rotated", idxs=idxs)
    return plain(_library.ops.nms_rotated(boxes, scores, _checked_threshold("nms_rotated", iou_threshold), idxs))


@_library.register_result
class Detections(NamedTuple):
    """What `multiclass_nms` keeps of each image, best first, padded to K rows."""

    boxes: Tensor
    """[B, K, 4] in the dtype of the input boxes; 0 in padded rows."""
    scores: Tensor
    """[B, K] in the dtype of the input scores; 0 in padded rows."""
    labels: Tensor
    """[B, K] int64: the class; -1 in padded rows."""
    indices: Tensor
    """[B, K] int64: the row of the input box; -1 in padded rows."""
    counts: Tensor
    """[B] int64: how many rows of each image are detections."""


def multiclass_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    max_detections: int = 100,
    max_candidates: int | None = None,
    class_agnostic: bool = False,
) -> Detections:
    """Turns the raw boxes and class scores of a batch of images into detections, in one call.

    A candidate is a (box, class) pair with `scores > score_threshold`. The result equals, image by image: take the
    candidates, keep the `max_candidates` best, run `batched_nms` by class, and keep the first `max_detections`.

    Args:
        boxes: [B, N, 4] xyxy, or [B, N, C, 4] with a box per class, floating. Views are read as they lie.
        scores: [B, N, C], floating. Views are read as they lie.
        iou_threshold: at least 0.
        score_threshold: rounded to the scores' dtype and compared strictly, as torch compares; NaN scores fail it.
        max_detections: K, the rows of the result for each image.
        max_candidates: at most so many pairs of an image, the best, take part; None for all.
        class_agnostic: any pair can suppress any other, also one of the same box.

    Returns:
        `Detections(boxes [B, K, 4], scores [B, K], labels [B, K], indices [B, K], counts [B])`, rows by descending
        score, ties to the lower (index, class). Padded rows hold boxes 0, scores 0, labels -1, indices -1.

    Boxes that are inverted, of zero area or not finite suppress nothing and are not suppressed. Shapes are fixed by the
    inputs: no host synchronisation, and a CUDA graph can capture the call. Memory beyond inputs and outputs: the
    candidates. No gradient.

    Raises:
        ValueError: a threshold is NaN, `iou_threshold` is negative, or a maximum is negative.
        RuntimeError: a tensor has a wrong shape, dtype or device, or N * C is over 2147418112.

    Example:
        >>> boxes = torch.tensor([[[0., 0., 10., 10.], [1., 0., 10., 10.]]])
        >>> found = multiclass_nms(boxes, torch.tensor([[[0.9, 0.1], [0.8, 0.7]]]), max_detections=3)
        >>> found.labels.tolist(), found.indices.tolist(), found.counts.tolist()
        ([[0, 1, -1]], [[0, 1, -1]], [2])

    Source: the post-processing of common detectors; the padded outputs follow TensorRT's EfficientNMS, whose result has
    no indices.
    """
    check_tensors("multiclass_nms", boxes=boxes, scores=scores)
    iou_threshold = _checked_threshold("multiclass_nms", iou_threshold)
    score_threshold = number("multiclass_nms", "score_threshold", score_threshold)
    if score_threshold != score_threshold:
        raise ValueError("multiclass_nms: score_threshold must be a number, got nan")
    max_detections = integer("multiclass_nms", "max_detections", max_detections)
    if max_detections < 0:
        raise ValueError(f"multiclass_nms: max_detections must be at least 0, got {max_detections}")
    if max_candidates is not None:
        max_candidates = integer("multiclass_nms", "max_candidates", max_candidates)
        if max_candidates < 0:
            raise ValueError(f"multiclass_nms: max_candidates must be None or at least 0, got {max_candidates}")
    results = _library.ops.multiclass_nms(
        boxes.detach(),
        scores.detach(),
        iou_threshold,
        score_threshold,
        max_detections,
        max_candidates,
        bool(class_agnostic),
    )
    return Detections(*map(plain, results))


def _checked_threshold(op: str, threshold: float) -> float:
    threshold = number(op, "iou_threshold", threshold)
    if not threshold >= 0:  # so that NaN fails too
        raise ValueError(f"{op}: iou_threshold must be at least 0, got {threshold}")
    return threshold


@register_fake("nms")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(_library.unknown_length("nms"), dtype=torch.int64)


@register_fake("batched_nms")
def _(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(_library.unknown_length("batched_nms"), dtype=torch.int64)


@register_fake("nms_rotated")
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None) -> Tensor:
    return boxes.new_empty(_library.unknown_length("nms_rotated"), dtype=torch.int64)


@register_fake("multiclass_nms")
def _(boxes, scores, iou_threshold, score_threshold, max_detections, max_candidates, class_agnostic):
    images = scores.shape[0]
    return (
        boxes.new_empty(images, max_detections, 4),
        scores.new_empty(images, max_detections),
        scores.new_empty(images, max_detections, dtype=torch.int64),
        scores.new_empty(images, max_detections, dtype=torch.int64),
        scores.new_empty(images, dtype=torch.int64),
    )
