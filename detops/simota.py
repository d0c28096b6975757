"""SimOTA, the target assignment of YOLOX. Users import from `detops.yolo`."""

from typing import NamedTuple

from torch import Tensor

from . import _library
from ._checks import check_optional_tensors, check_tensors, integer, is_one_of, number
from ._library import register_fake

_RADIUS = {"yolox": 1.5, "mmdet": 2.5}


@_library.register_result
class SimOTATargets(NamedTuple):
    """The training targets of every anchor; see `assign_simota`."""

    labels: Tensor
    """[B, A] int64: the class; -1 for background."""
    boxes: Tensor
    """[B, A, 4] in the dtype of `gt_boxes`: the box of the anchor's gt; 0 for background."""
    scores: Tensor
    """[B, A, C], or [B, A] if sparse, in the dtype of `pred_logits`: the IoU with the gt; 0 for background."""
    foreground: Tensor
    """[B, A] bool."""
    gt_indices: Tensor
    """[B, A] int64: the anchor's row of `gt_boxes`; -1 for background."""


def assign_simota(
    pred_logits: Tensor,
    pred_objectness: Tensor | None,
    pred_boxes: Tensor,
    anchor_points: Tensor,
    anchor_strides: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    *,
    center_radius: float | None = None,
    topk: int = 10,
    iou_weight: float = 3.0,
    dense_scores: bool = True,
    rule: str = "yolox",
) -> SimOTATargets:
    """Assigns its cheapest anchors to each ground-truth box: the better predictions overlap it already, the more.

    Candidates are the anchors whose point is less than center_radius strides, along both axes, from the centre of some
    gt. Their cost for a gt is BCE(sqrt(sigmoid(logits) * sigmoid(objectness)), one-hot of the gt's class), summed over
    the classes, + iou_weight * -log(IoU + 1e-8), + 1e6 if it is not this gt's centre that is near. A gt claims the
    k = max(1, floor(sum of its topk largest IoUs)) cheapest candidates. What several gts claim goes to the one of
    lowest cost. The target score is the IoU of predicted box and gt, on the gt's class.

    That is `rule="yolox"`. With MMDetection's rule, "mmdet", candidates are near a gt's centre or inside its box, and
    1e5 is added unless the anchor is both for this gt. Inputs are probabilities; the probability in the cost is the
    class's times the objectness, without the square root, and 1e-7 replaces 1e-8.

    Args:
        pred_logits: [B, A, C] of the classes, floating; any strides. With "mmdet" probabilities, taken as 0 to 1.
        pred_objectness: [B, A] logits, of the same dtype. With "mmdet" probabilities, or None where `pred_logits` has
            them in it already.
        pred_boxes: [B, A, 4] xyxy in pixels.
        anchor_points: [A, 2] x, y in pixels, in any order: the centres of the cells.
        anchor_strides: [A] in pixels.
        gt_boxes: [B, M, 4] xyxy in pixels.
        gt_labels: [B, M] int64, from 0 to C - 1.
        gt_valid: [B, M] bool: which rows take part; see `pad_ground_truth`.
        center_radius: in strides; None is 1.5, with "mmdet" 2.5.
        topk: how many IoUs are summed, the most anchors of a gt; up to 32.
        iou_weight: of the IoU cost, at least 0.
        dense_scores: scores as [B, A, C]; otherwise [B, A], one value an anchor.
        rule: "yolox" or "mmdet", see above.

    Returns:
        `SimOTATargets(labels [B, A], boxes [B, A, 4], scores, foreground [B, A], gt_indices [B, A])`. Costs are
        rounded in float32 (float64 if a floating input is float64), their logarithms taken in float64. No
        [B, M, A, C] or [B, M, A] tensor is made, and on a GPU nothing waits.

    Ties: equal costs go to the lower anchor index, and between gts to the lower gt index. NaN costs count as infinite,
    NaN IoUs as 0. M = 0, and images without any candidate, are ordinary: nothing is assigned. No gradient.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU a label out of range (on a GPU such a gt counts as
            not valid).

    Example:
        >>> points, strides = torch.tensor([[4., 4.], [12., 4.], [20., 4.]]), torch.full((3,), 8.)
        >>> gt = torch.tensor([[[0., 0., 16., 8.]]])
        >>> boxes = torch.tensor([[[0., 0., 16., 8.], [0., 0., 16., 7.], [8., 0., 24., 8.]]])
        >>> assign_simota(
        ...     torch.zeros(1, 3, 2), torch.zeros(1, 3), boxes, points, strides, gt, torch.tensor([[1]]),
        ...     torch.tensor([[True]]),
        ... ).labels
        tensor([[ 1, -1, -1]])

    Source: Ge et al., "YOLOX: Exceeding YOLO Series in 2021", and its code (the defaults), which raises where an image
    has no candidate, and leaves ties open; MMDetection's SimOTAAssigner ("mmdet"), which leaves them open too.
    """
    op = "assign_simota"
    if not is_one_of(rule, _RADIUS):
        raise ValueError(f"{op}: rule must be 'yolox' or 'mmdet', got {rule!r}")
    center_radius = number(op, "center_radius", _RADIUS[rule] if center_radius is None else center_radius)
    topk, iou_weight = integer(op, "topk", topk), number(op, "iou_weight", iou_weight)
    if not 0 < center_radius < float("inf"):
        raise ValueError(f"{op}: center_radius must be finite and above 0, got {center_radius}")
    if not 1 <= topk <= 32:
        raise ValueError(f"{op}: topk must be from 1 to 32, got {topk}")
    if not 0 <= iou_weight < float("inf"):
        raise ValueError(f"{op}: iou_weight must be finite and at least 0, got {iou_weight}")
    check_tensors(op, pred_logits=pred_logits)
    check = check_tensors if rule == "yolox" else check_optional_tensors
    check(op, pred_objectness=pred_objectness)
    check_tensors(
        op, pred_boxes=pred_boxes, anchor_points=anchor_points, anchor_strides=anchor_strides, gt_boxes=gt_boxes,
        gt_labels=gt_labels, gt_valid=gt_valid,
    )  # fmt: skip
    if pred_objectness is None:
        pred_objectness = pred_logits.new_ones(()).expand(pred_logits.shape[:2])
    return SimOTATargets(
        *_library.ops.assign_simota(
            *(each.detach() for each in (pred_logits, pred_objectness, pred_boxes, anchor_points, anchor_strides)),
            *(gt_boxes.detach(), gt_labels, gt_valid, center_radius, topk, iou_weight, dense_scores),
            int(rule == "mmdet"),
        )
    )


@register_fake("assign_simota")
def _(
    pred_logits: Tensor, pred_objectness: Tensor, pred_boxes: Tensor, anchor_points: Tensor, anchor_strides: Tensor,
    gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, center_radius: float, topk: int, iou_weight: float,
    dense_scores: bool, rule: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_anchor = pred_logits.shape[:2]
    return (
        gt_labels.new_empty(per_anchor),
        gt_boxes.new_empty(*per_anchor, 4),
        pred_logits.new_empty(pred_logits.shape if dense_scores else per_anchor),
        gt_valid.new_empty(per_anchor),
        gt_labels.new_empty(per_anchor),
    )
