"""Task-aligned assignment, the target assignment of TOOD and of YOLOv8 and later. Users import from `detops.yolo`."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _library
from ._checks import check_real, check_tensors, integer, is_one_of, number, numbers
from ._library import register_fake
from .iou import box_iou, complete_box_iou


@_library.register_result
class TaskAlignedTargets(NamedTuple):
    """The training targets of every anchor; see `assign_task_aligned`."""

    labels: Tensor
    """[B, A] int64: the class; -1 for background."""
    boxes: Tensor
    """[B, A, 4] in the dtype of `gt_boxes`: the box of the anchor's gt; 0 for background."""
    scores: Tensor
    """[B, A, C], or [B, A] if sparse, in the dtype of `pred_scores`; 0 for background."""
    foreground: Tensor
    """[B, A] bool."""
    gt_indices: Tensor
    """[B, A] int64: the anchor's row of `gt_boxes`; -1 for background."""


@_library.register_result
class TaskAlignedMetrics(NamedTuple):
    """`TaskAlignedTargets` and the metrics that decided them; see `assign_task_aligned(..., with_metrics=True)`."""

    labels: Tensor
    """[B, A] int64: as of `TaskAlignedTargets`."""
    boxes: Tensor
    """[B, A, 4] in the dtype of `gt_boxes`: the same."""
    scores: Tensor
    """[B, A, C], or [B, A] if sparse, in the dtype of `pred_scores`: the same."""
    foreground: Tensor
    """[B, A] bool: the same."""
    gt_indices: Tensor
    """[B, A] int64: the same."""
    metrics: Tensor
    """[B, A] float32 or float64: score^alpha * overlap^beta of the anchor and its gt; 0 for background."""
    overlaps: Tensor
    """[B, A] float32 or float64: max(IoU, 0) of the anchor's predicted box and its gt; 0 for background."""


@overload
def assign_task_aligned(
    pred_scores: Tensor, pred_boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
    gt_valid: Tensor, *, topk: int = ..., alpha: float = ..., beta: float = ..., iou: str = ...,
    min_size: float | None = ..., dense_scores: bool = ..., candidates: str = ..., with_metrics: Literal[False] = ...,
) -> TaskAlignedTargets: ...  # fmt: skip
@overload
def assign_task_aligned(
    pred_scores: Tensor, pred_boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
    gt_valid: Tensor, *, topk: int = ..., alpha: float = ..., beta: float = ..., iou: str = ...,
    min_size: float | None = ..., dense_scores: bool = ..., candidates: str = ..., with_metrics: Literal[True],
) -> TaskAlignedMetrics: ...  # fmt: skip
def assign_task_aligned(
    pred_scores: Tensor,
    pred_boxes: Tensor,
    anchor_points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    iou: str = "ciou",
    min_size: float | None = None,
    dense_scores: bool = True,
    candidates: str = "inside",
    with_metrics: bool = False,
) -> TaskAlignedTargets | TaskAlignedMetrics:
    """Gives each ground-truth box the `topk` anchors that classify and locate it best, for a whole batch at once.

    An anchor is a candidate of a gt if its point lies inside of the box. With overlap = max(IoU, 0) of the predicted
    box and metric = score^alpha * overlap^beta, of the gt's class, a gt claims its topk anchors of highest metric.
    What several gts claim goes to the one of highest overlap among all gts whose candidate it is. The target score is
    metric * (highest overlap of the gt's anchors) / (their highest metric + 1e-9), on the gt's class.

    That is `candidates="inside"`, Ultralytics' rule. By TOOD's, "all", a gt claims its topk anchors of highest metric
    among all anchors, and then gives up those whose metric is 0, or whose point is not inside of the box by more than
    0.01. What several gts claim goes to the one of highest overlap among those that claim it.

    Args:
        pred_scores: [B, A, C], floating, after the sigmoid; any strides.
        pred_boxes: [B, A, 4] xyxy in pixels.
        anchor_points: [A, 2] x, y in pixels, in any order.
        gt_labels: [B, M] int64, from 0 to C - 1.
        gt_boxes: [B, M, 4] xyxy in pixels.
        gt_valid: [B, M] bool: which rows take part; see `pad_ground_truth`.
        topk: anchors that a gt may claim.
        alpha: exponent of the score, at least 0.
        beta: exponent of the overlap, above 0.
        iou: "ciou" (complete IoU, eps 1e-7) or "iou".
        min_size: sides of a gt below it are enlarged to it about their middle, to find candidates only.
        dense_scores: scores as [B, A, C]; otherwise [B, A], one value an anchor.
        candidates: "inside" or "all", the rule: see above.
        with_metrics: give metrics and overlaps too, as a `TaskAlignedMetrics`: for losses that scale them otherwise.

    Returns:
        `TaskAlignedTargets(labels [B, A], boxes [B, A, 4], scores, foreground [B, A], gt_indices [B, A])`. Computed in
        float32, in float64 if a floating input is float64. No [B, M, A] tensor is made, and on a GPU nothing waits.

    Ties: equal metrics go to the lower anchor index; equal overlaps to the lower gt index. Metrics that are NaN or
    negative count as 0. A gt with fewer than topk positive metrics fills up with anchors of metric 0 in index order,
    of which those count that are candidates; by the rule "all" none does. M = 0, and boxes that hold no point, are
    ordinary. No gradient.

    Raises:
        ValueError: topk below 1, alpha, beta or min_size out of range, unknown `iou` or `candidates`.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU a label out of range (on a GPU such a gt counts as
            not valid).

    Example:
        >>> points = torch.tensor([[4., 4.], [12., 4.], [20., 4.]])
        >>> gt = torch.tensor([[[0., 0., 16., 8.]]])
        >>> targets = assign_task_aligned(
        ...     torch.full((1, 3, 2), 0.5), gt.expand(1, 3, 4), points, torch.tensor([[1]]), gt, torch.tensor([[True]])
        ... )
        >>> targets.labels, targets.scores[0, 0]
        (tensor([[ 1,  1, -1]]), tensor([0., 1.]))

    Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021 (topk 13, alpha 1, beta 6, "iou",
    candidates "all"; its eps is 1e-7) and MMDetection's TaskAlignedAssigner; the assigner of Ultralytics' YOLOv8 (the
    defaults). Ties are open in both, and in the latter background rows hold the first gt.
    """
    op = "assign_task_aligned"
    if not is_one_of(iou, ("ciou", "iou")):
        raise ValueError(f"{op}: iou must be 'ciou' or 'iou', got {iou!r}")
    if not is_one_of(candidates, ("inside", "all")):
        raise ValueError(f"{op}: candidates must be 'inside' or 'all', got {candidates!r}")
    topk, alpha, beta, size = _options(op, topk, alpha, beta, min_size)
    tensors = {"pred_scores": pred_scores, "pred_boxes": pred_boxes, "anchor_points": anchor_points}
    check_tensors(op, **tensors, gt_labels=gt_labels, gt_boxes=gt_boxes, gt_valid=gt_valid)
    pred_scores, pred_boxes, anchor_points, gt_boxes = (each.detach() for each in (*tensors.values(), gt_boxes))
    targets = TaskAlignedTargets(
        *_library.ops.assign_task_aligned(
            *(pred_scores, pred_boxes, anchor_points, gt_labels, gt_boxes, gt_valid),
            *(topk, topk, alpha, beta, iou == "ciou", size or 0.0, 1e-9, dense_scores, int(candidates == "all")),
        )
    )
    if not with_metrics:
        return targets
    double = torch.float64 in (pred_scores.dtype, pred_boxes.dtype, anchor_points.dtype, gt_boxes.dtype)
    dtype = torch.float64 if double else torch.float32
    overlaps = (complete_box_iou if iou == "ciou" else box_iou)(
        targets.boxes.to(dtype), pred_boxes.to(dtype), aligned=True
    )
    overlaps = torch.where(targets.foreground & (overlaps > 0), overlaps, 0)  # a NaN is 0
    if pred_scores.shape[2]:
        scores = pred_scores.gather(2, targets.labels.clamp(min=0)[..., None])[..., 0]
    else:
        scores = pred_scores.new_zeros(overlaps.shape)
    # The op multiplies where a power is whole, so its metrics may differ from these in the last bits.
    metrics = scores.double().pow(alpha).to(dtype) * overlaps.double().pow(beta).to(dtype)
    return TaskAlignedMetrics(*targets, torch.where(targets.foreground & (metrics > 0), metrics, 0), overlaps)


class TaskAlignedAssigner(torch.nn.Module):
    """`assign_task_aligned` with the interface of Ultralytics' class of this name, for use in its place.

    Args:
        topk: anchors that a gt may claim.
        num_classes: only used for the labels of batches without ground truth.
        alpha: exponent of the score, at least 0.
        beta: exponent of the complete IoU, above 0.
        stride: the strides of the levels; gt sides below the second one (the first, if it is alone) are enlarged to it
            when candidates are looked for. None means [8, 16, 32].
        eps: keeps the denominator of the target scores positive.
        topk2: how many anchors a gt keeps once conflicts are settled; None means topk.
        min_size: enlarge to this size instead; 0 leaves all gts as they are, as Ultralytics before 8.4 does. (8.4.0
            enlarges to the first stride.)

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> TaskAlignedAssigner(topk=10, num_classes=80, alpha=0.5, beta=6.0)
        TaskAlignedAssigner(topk=10, num_classes=80, alpha=0.5, beta=6.0, stride=[8, 16, 32], eps=1e-09, topk2=10)

    Source: ultralytics.utils.tal.TaskAlignedAssigner. Where metrics tie it leaves open which anchor wins. An anchor
    whose claimants all have overlap 0 goes to gt 0 there, to the first gt that holds it here. Its gts go through
    centre and size when candidates are looked for, so that a point on an edge may count as inside there.
    """

    def __init__(
        self,
        topk: int = 13,
        num_classes: int = 80,
        alpha: float = 1.0,
        beta: float = 6.0,
        stride: Sequence[float] | None = None,
        eps: float = 1e-9,
        topk2: int | None = None,
        *,
        min_size: float | None = None,
    ):
        super().__init__()
        name = "TaskAlignedAssigner"
        self.stride: Sequence[float] = [8, 16, 32] if stride is None else stride
        strides = numbers(name, "stride", self.stride)
        if not strides:
            raise ValueError(f"{name}: stride must have at least one level, got none")
        self.min_size = min_size
        size = strides[min(1, len(strides) - 1)] if min_size is None else min_size
        self.topk: int
        self.alpha: float
        self.beta: float
        self.topk, self.alpha, self.beta, self._size = _options(name, topk, alpha, beta, size)
        self.topk2: int = self.topk if topk2 is None else integer(name, "topk2", topk2)
        if self.topk2 < 1:
            raise ValueError(f"{name}: topk2 must be at least 1, got {topk2}")
        self.num_classes: int = integer(name, "num_classes", num_classes)
        self.eps: float = number(name, "eps", eps)
        if not 0 <= self.num_classes < 2**31:
            raise ValueError(f"{name}: num_classes must be from 0 to 2147483647, got {num_classes}")

    def extra_repr(self) -> str:
        names = ("topk", "num_classes", "alpha", "beta", "stride", "eps", "topk2")
        names += () if self.min_size is None else ("min_size",)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @torch.no_grad()
    def forward(
        self, pd_scores: Tensor, pd_bboxes: Tensor, anc_points: Tensor, gt_labels: Tensor, gt_bboxes: Tensor,
        mask_gt: Tensor, **extra: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The targets of every anchor.

        Args:
            pd_scores: [B, A, C] after the sigmoid.
            pd_bboxes: [B, A, 4] xyxy.
            anc_points: [A, 2].
            gt_labels: [B, n, 1], integer or floating.
            gt_bboxes: [B, n, 4] xyxy, zeros where padded.
            mask_gt: [B, n, 1], not 0 where valid.
            extra: accepted and not used, as trainers pass to all of Ultralytics' assigners what one of them needs.

        Returns:
            (labels [B, A], boxes [B, A, 4], scores [B, A, C], foreground [B, A], gt indices [B, A]). Rows of the
            background have the label, box and index of the image's first row. Scores have the dtype of
            `pd_scores * pd_bboxes`. With n = 0 the labels are `num_classes` and the boxes 0,
            all but `foreground` in the dtype of their prediction.
        """
        check_tensors(
            "TaskAlignedAssigner", pd_scores=pd_scores, pd_bboxes=pd_bboxes, anc_points=anc_points,
            gt_labels=gt_labels, gt_bboxes=gt_bboxes, mask_gt=mask_gt,
        )  # fmt: skip
        check_real("TaskAlignedAssigner", pd_scores=pd_scores, gt_labels=gt_labels)
        if mask_gt.dtype != torch.bool:
            check_real("TaskAlignedAssigner", mask_gt=mask_gt)
        for name, each in (("pd_scores", pd_scores), ("gt_bboxes", gt_bboxes)):
            if each.ndim != 3 or not each.is_floating_point():
                fact = f"{list(each.shape)} of {_library.dtype_name(each.dtype)}"
                raise RuntimeError(f"TaskAlignedAssigner: {name} must have 3 dimensions and be floating, got {fact}")
        if gt_bboxes.shape[1] == 0:
            per_anchor = pd_scores.shape[:2]
            return (
                pd_scores.new_full(per_anchor, self.num_classes),
                torch.zeros_like(pd_bboxes),
                torch.zeros_like(pd_scores),
                pd_scores.new_zeros(per_anchor, dtype=torch.bool),
                pd_scores.new_zeros(per_anchor),
            )
        labels, valid = gt_labels.squeeze(-1).long(), mask_gt.squeeze(-1) > 0
        found = TaskAlignedTargets(
            *_library.ops.assign_task_aligned(
                *(pd_scores, pd_bboxes, anc_points, labels, gt_bboxes, valid),
                *(self.topk, self.topk2, self.alpha, self.beta, True, self._size, self.eps, True, 0, True),
            )
        )
        return (
            torch.where(found.foreground, found.labels, labels[:, :1].clamp(min=0)),
            torch.where(found.foreground[..., None], found.boxes, gt_bboxes[:, :1]),
            found.scores,
            found.foreground,
            found.gt_indices.clamp(min=0),
        )


def _options(
    op: str, topk: int, alpha: float, beta: float, min_size: float | None
) -> tuple[int, float, float, float | None]:
    topk, alpha, beta = integer(op, "topk", topk), number(op, "alpha", alpha), number(op, "beta", beta)
    if topk < 1:
        raise ValueError(f"{op}: topk must be at least 1, got {topk}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"{op}: alpha must be finite and at least 0, got {alpha}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"{op}: beta must be finite and above 0, got {beta}")
    size = None if min_size is None else number(op, "min_size", min_size)
    if size is not None and not 0 <= size < float("inf"):
        raise ValueError(f"{op}: min_size must be finite and at least 0, got {size}")
    return topk, alpha, beta, size


@register_fake("assign_task_aligned")
def _(
    pred_scores: Tensor, pred_boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
    gt_valid: Tensor, topk: int, topk2: int, alpha: float, beta: float, complete: bool, min_size: float, eps: float,
    dense_scores: bool, candidates: int = 0, promote_scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_anchor = pred_scores.shape[:2]
    dtype = torch.promote_types(pred_scores.dtype, pred_boxes.dtype) if promote_scores else pred_scores.dtype
    return (
        gt_labels.new_empty(per_anchor),
        gt_boxes.new_empty(*per_anchor, 4),
        pred_scores.new_empty(pred_scores.shape if dense_scores else per_anchor, dtype=dtype),
        gt_valid.new_empty(per_anchor),
        gt_labels.new_empty(per_anchor),
    )
