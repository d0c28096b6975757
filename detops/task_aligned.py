"""Task-aligned assignment, the target assignment of TOOD and of YOLOv8 and later. Users import from `detops.yolo`."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from ._library import register_fake


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
) -> TaskAlignedTargets:
    """Gives each ground-truth box the `topk` anchors that classify and locate it best, for a whole batch at once.

    An anchor is a candidate of a gt if its point lies inside of the box. With overlap = max(IoU, 0) of the predicted
    box and metric = score^alpha * overlap^beta, of the gt's class, a gt claims its topk anchors of highest metric.
    What several gts claim goes to the one of highest overlap among all gts whose candidate it is. The target score is
    metric * (highest overlap of the gt's anchors) / (their highest metric + 1e-9), on the gt's class.

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

    Returns:
        `TaskAlignedTargets(labels [B, A], boxes [B, A, 4], scores, foreground [B, A], gt_indices [B, A])`. Computed in
        float32, in float64 if a floating input is float64. No [B, M, A] tensor is made, and on a GPU nothing waits.

    Ties: equal metrics go to the lower anchor index; equal overlaps to the lower gt index. Metrics that are NaN or
    negative count as 0. A gt with fewer than topk positive metrics fills up with anchors of metric 0 in index order,
    of which those count that are candidates. M = 0, and boxes that hold no point, are ordinary. No gradient.

    Raises:
        ValueError: topk below 1, alpha, beta or min_size out of range, unknown `iou`.
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

    Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021 (topk 13, alpha 1, beta 6, "iou");
    the assigner of Ultralytics' YOLOv8 (the defaults). Ties are open there, and background rows hold the first gt.
    """
    if iou not in ("ciou", "iou"):
        raise ValueError(f"assign_task_aligned: iou must be 'ciou' or 'iou', got {iou!r}")
    _check_options("assign_task_aligned", topk, alpha, beta, min_size)
    return TaskAlignedTargets(
        *_library.ops.assign_task_aligned(
            *(each.detach() for each in (pred_scores, pred_boxes, anchor_points)),
            *(gt_labels, gt_boxes.detach(), gt_valid),
            *(topk, topk, alpha, beta, iou == "ciou", min_size or 0.0, 1e-9, dense_scores),
        )
    )


class TaskAlignedAssigner(torch.nn.Module):
    """`assign_task_aligned` with the interface of Ultralytics' class of this name, to be assigned in its place.

    Args:
        topk: anchors that a gt may claim.
        num_classes: only used for the labels of batches without ground truth.
        alpha: exponent of the score, at least 0.
        beta: exponent of the complete IoU, above 0.
        stride: the strides of the levels; gt sides below the second one (the first, if it is alone) are enlarged to it
            when candidates are looked for. None means [8, 16, 32].
        eps: keeps the denominator of the target scores positive.
        topk2: how many anchors a gt keeps once conflicts are settled; None means topk.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> assigner = TaskAlignedAssigner(topk=10, num_classes=80, alpha=0.5, beta=6.0)
        >>> assigner.topk
        10

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
        stride: list[float] | None = None,
        eps: float = 1e-9,
        topk2: int | None = None,
    ):
        super().__init__()
        self.topk, self.topk2 = topk, topk if topk2 is None else topk2
        self.num_classes, self.alpha, self.beta, self.eps = num_classes, alpha, beta, eps
        self.stride = [8, 16, 32] if stride is None else stride
        if not len(self.stride):
            raise ValueError("TaskAlignedAssigner: stride must have at least one level, got none")
        self._min_size = float(self.stride[1] if len(self.stride) > 1 else self.stride[0])
        _check_options("TaskAlignedAssigner", topk, alpha, beta, self._min_size)
        if not 1 <= self.topk2:
            raise ValueError(f"TaskAlignedAssigner: topk2 must be at least 1, got {topk2}")

    @torch.no_grad()
    def forward(
        self, pd_scores: Tensor, pd_bboxes: Tensor, anc_points: Tensor, gt_labels: Tensor, gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The targets of every anchor.

        Args:
            pd_scores: [B, A, C] after the sigmoid.
            pd_bboxes: [B, A, 4] xyxy.
            anc_points: [A, 2].
            gt_labels: [B, n, 1], integer or floating.
            gt_bboxes: [B, n, 4] xyxy, zeros where padded.
            mask_gt: [B, n, 1], not 0 where valid.

        Returns:
            (labels [B, A], boxes [B, A, 4], scores [B, A, C], foreground [B, A], gt indices [B, A]). Rows of the
            background have the label, box and index of the image's first row. With n = 0 the labels are
            `num_classes` and the boxes 0, all but `foreground` in the dtype of their prediction.
        """
        if gt_bboxes.shape[1] == 0:
            per_anchor = pd_scores[..., 0]
            return (
                torch.full_like(per_anchor, self.num_classes),
                torch.zeros_like(pd_bboxes),
                torch.zeros_like(pd_scores),
                torch.zeros_like(per_anchor, dtype=torch.bool),
                torch.zeros_like(per_anchor),
            )
        labels, valid = gt_labels.squeeze(-1).long(), mask_gt.squeeze(-1) > 0
        found = TaskAlignedTargets(
            *_library.ops.assign_task_aligned(
                *(pd_scores, pd_bboxes, anc_points, labels, gt_bboxes, valid),
                *(self.topk, self.topk2, self.alpha, self.beta, True, self._min_size, self.eps, True),
            )
        )
        return (
            torch.where(found.foreground, found.labels, labels[:, :1].clamp(min=0)),
            torch.where(found.foreground[..., None], found.boxes, gt_bboxes[:, :1]),
            found.scores,
            found.foreground,
            found.gt_indices.clamp(min=0),
        )


def _check_options(op: str, topk: int, alpha: float, beta: float, min_size: float | None) -> None:
    if topk < 1:
        raise ValueError(f"{op}: topk must be at least 1, got {topk}")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"{op}: alpha must be finite and at least 0, got {alpha}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"{op}: beta must be finite and above 0, got {beta}")
    if min_size is not None and not 0 <= min_size < float("inf"):
        raise ValueError(f"{op}: min_size must be finite and at least 0, got {min_size}")


@register_fake("assign_task_aligned")
def _(
    pred_scores: Tensor, pred_boxes: Tensor, anchor_points: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
    gt_valid: Tensor, topk: int, topk2: int, alpha: float, beta: float, complete: bool, min_size: float, eps: float,
    dense_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_anchor = pred_scores.shape[:2]
    return (
        gt_labels.new_empty(per_anchor),
        gt_boxes.new_empty(*per_anchor, 4),
        pred_scores.new_empty(pred_scores.shape if dense_scores else per_anchor),
        gt_valid.new_empty(per_anchor),
        gt_labels.new_empty(per_anchor),
    )
