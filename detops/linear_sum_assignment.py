"""Optimal one-to-one assignment of queries to targets, and DETR's matching."""

import torch
from torch import Tensor

from . import _library
from ._checks import check_optional_tensors, check_tensors, is_one_of, number
from ._library import register_fake

_INVALID = {"forbid": 0, "raise": 1, "last": 2}


def linear_sum_assignment(cost: Tensor, num_targets: Tensor | None = None, *, invalid: str = "forbid") -> Tensor:
    """Assigns a query to each target so that the sum of costs is least: the Hungarian matching of a whole batch.

    Args:
        cost: [B, Q, T]: of query q for target t. Computed in float64, whatever the dtype. +inf forbids a pair.
        num_targets: [B] int64: only the first so many targets of each problem take part; all T if None. What is beyond
            may hold anything, NaN too.
        invalid: what costs do that are NaN or infinite, on every device alike.
            "forbid": NaN and -inf forbid a pair as +inf does.
            "raise": NaN and -inf raise an error, +inf forbids. It looks at the costs, so that it waits for a GPU and
            does not go into a CUDA graph.
            "last": nothing is forbidden; pairs of such costs are taken where nothing else is left.

    Returns:
        int64 [B, T]: the query of each target; -1 for targets beyond `num_targets`, for those left over where there are
        more targets than queries, and for those that have only forbidden pairs left ("last" forbids none).
        As few pairs as possible are invalid (forbidden, or last); among the ways to do so, the one is taken in which
        the sum of the other costs is least. No large number stands for infinity in that.

    Ties: where several assignments cost the same, the same one is found on every device and every run. No gradient. On
    a GPU there is no host synchronisation but with "raise", and `num_targets` is clamped to [0, T].

    Raises:
        ValueError: unknown `invalid`.
        RuntimeError: wrong shapes, dtypes or devices; with "raise" NaN or -inf costs; on the CPU `num_targets` out of
            range.

    Example:
        >>> cost = torch.tensor([[[1., 2.], [1., 4.], [9., 9.]]])
        >>> linear_sum_assignment(cost)
        tensor([[1, 0]])

    Source: scipy.optimize.linear_sum_assignment, which takes one matrix, returns (rows, columns), and raises where a
    target cannot be matched, at NaN and at -inf. Jonker and Volgenant, "A shortest augmenting path algorithm",
    Computing 38, 1987.
    """
    op = "linear_sum_assignment"
    check_tensors(op, cost=cost)
    check_optional_tensors(op, num_targets=num_targets)
    _library.refuse_complex(op, "cost", cost)
    cost = cost.detach()
    if not cost.is_floating_point():
        cost = cost.to(torch.float64)
    return _library.ops.linear_sum_assignment(cost, num_targets, _invalid(op, invalid))


def match_detr(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor | None = None,
    *,
    class_cost: str = "softmax",
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    fmt: str = "cxcywh",
    invalid: str = "forbid",
) -> Tensor:
    """DETR's bipartite matching: assigns to each ground-truth box the query to predict it, at the least total cost.

    cost = l1_weight * L1 + class_weight * class - giou_weight * GIoU, with the L1 distance of (cx, cy, w, h) and
    class = -softmax(logits)[label] ("softmax"), or with p = sigmoid(logit of the label)
    class = alpha (1 - p)^gamma (-log(p + 1e-8)) - (1 - alpha) p^gamma (-log(1 - p + 1e-8)) ("focal"). Two boxes without
    area have IoU 0 here; their GIoU is 0 where the smallest box around both has no area either, else -1.

    Args:
        logits: [B, Q, C], floating. With "softmax" C counts the class "no object" too.
        boxes: [B, Q, 4] in `fmt`, of any unit; DETR's are divided by the width and height of the image.
        gt_boxes: [B, M, 4] in the same format and unit.
        gt_labels: [B, M] integer, from 0 to C - 1.
        gt_valid: [B, M] bool: which boxes take part; all if None. Other rows may hold anything.
        class_cost: "softmax" as in DETR, or "focal" as in Deformable DETR and RT-DETR (there with class_weight=2).
        class_weight, l1_weight, giou_weight: of the parts of the cost.
        alpha, gamma: of the focal cost; gamma at least 0.
        fmt: "cxcywh" or "xyxy".
        invalid: what becomes of pairs whose cost is NaN or infinite, as of a NaN logit: "forbid", "raise" or "last", as
            in `linear_sum_assignment`; with "last" as Hugging Face's matchers have it.

    Returns:
        int64 [B, M]: the query of each box; -1 for rows that are not valid, for the boxes left over where there are
        more than queries, and for those that only forbidden pairs are left for.

    Half inputs are computed in float32; the class cost is computed in float64 and rounded. Ties as
    `linear_sum_assignment`. No gradient. On a GPU there is no host synchronisation but with "raise": a box with a label
    out of range counts as not valid there.

    Raises:
        ValueError: unknown `class_cost`, `fmt` or `invalid`, a weight that is not finite, or gamma below 0.
        RuntimeError: wrong shapes, dtypes or devices; with "raise" costs that are NaN or -inf; on the CPU labels out of
            range.

    Example:
        >>> logits = torch.tensor([[[4., 0., 0.], [0., 4., 0.], [0., 0., 4.]]])
        >>> boxes = torch.tensor([[[.2, .2, .2, .2], [.7, .7, .2, .2], [.5, .5, .9, .9]]])
        >>> match_detr(logits, boxes, boxes[:, [1, 0]], torch.tensor([[1, 0]]))
        tensor([[1, 0]])

    Source: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, HungarianMatcher; Zhu et al.,
    "Deformable DETR", ICLR 2021. They build the costs across all images of a batch and solve image by image on the CPU.
    """
    op = "match_detr"
    if not is_one_of(class_cost, ("softmax", "focal")):
        raise ValueError(f"{op}: class_cost must be 'softmax' or 'focal', got {class_cost!r}")
    if not is_one_of(fmt, ("cxcywh", "xyxy")):
        raise ValueError(f"{op}: fmt must be 'cxcywh' or 'xyxy', got {fmt!r}")
    weights = {"class_weight": class_weight, "l1_weight": l1_weight, "giou_weight": giou_weight, "alpha": alpha}
    weights = {name: number(op, name, weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        if not -float("inf") < weight < float("inf"):
            raise ValueError(f"{op}: {name} must be finite, got {weight}")
    gamma = number(op, "gamma", gamma)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{op}: gamma must be finite and at least 0, got {gamma}")
    tensors = {"logits": logits, "boxes": boxes, "gt_boxes": gt_boxes, "gt_labels": gt_labels}
    check_tensors(op, **tensors)
    check_optional_tensors(op, gt_valid=gt_valid)
    for name, each in tensors.items():
        _library.refuse_complex(op, name, each)
    double = torch.float64 in (logits.dtype, boxes.dtype, gt_boxes.dtype)
    dtype = torch.float64 if double else torch.float32
    logits, boxes, gt_boxes = (each.detach().to(dtype) for each in (logits, boxes, gt_boxes))
    if not gt_labels.is_floating_point():
        gt_labels = gt_labels.long()
    return _library.ops.match_detr(
        *(logits, boxes, gt_boxes, gt_labels, gt_valid, class_cost == "focal"),
        *(*weights.values(), gamma, fmt == "xyxy", _invalid(op, invalid)),
    )


def _invalid(op: str, invalid: str) -> int:
    if not is_one_of(invalid, _INVALID):
        raise ValueError(f"{op}: invalid must be 'forbid', 'raise' or 'last', got {invalid!r}")
    return _INVALID[invalid]


@register_fake("linear_sum_assignment")
def _(cost: Tensor, num_targets: Tensor | None, *options) -> Tensor:
    return cost.new_empty(cost.shape[0], cost.shape[2], dtype=torch.int64)


@register_fake("match_detr")
def _(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, *options) -> Tensor:
    return gt_labels.new_empty(gt_labels.shape)
