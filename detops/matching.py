"""Matching of anchors to ground-truth boxes, and sampling of the matches.

All functions share these rules, on every device:

- Boxes are xyxy in continuous pixels, unless `fmt` says otherwise. Ground truth is padded: `gt_boxes` [B, M, 4] with
  `gt_valid` [B, M], as `pad_ground_truth` makes it. Rows that are not valid may hold anything, NaN too; M = 0 and
  images without a valid box are ordinary input.
- float16, bfloat16 and integer boxes are computed in float32, float64 boxes in float64. IoUs are those of `box_iou` to
  the bit; an IoU that is NaN counts as 0.
- Ties go to the lower index, unless a function says otherwise. Results are the same on every device.
- No gradient. No host synchronisation on a GPU. No [M, A] matrix is made.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import check_optional_tensors, check_tensors, integer, integers, is_one_of, kind_of, number
from ._library import register_fake
from .linear_sum_assignment import linear_sum_assignment as linear_sum_assignment  # of this family too
from .linear_sum_assignment import match_detr as match_detr


@_library.register_result
class Matches(NamedTuple):
    """Which ground-truth box each anchor of a batch goes to."""

    indices: Tensor
    """[B, A] int64: the row of the box; -1 for background; -2 for an anchor that is neither."""
    ious: Tensor
    """[B, A] float32 or float64: the IoU that was decided on."""


def match_max_iou(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor | None = None,
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = False,
    low_quality: str = "own_argmax",
    low_quality_min_iou: float = 0.0,
    low_quality_all_ties: bool = True,
    ignore_boxes: Tensor | None = None,
    ignore_valid: Tensor | None = None,
    ignore_threshold: float = 0.5,
) -> Matches:
    """Matches each anchor or proposal to the ground-truth box of its best IoU, if that is high enough.

    index = box where IoU >= high_threshold, -1 where IoU < low_threshold, -2 between; all -1 in images without boxes.

    With low-quality matches each box also gets the anchors that have the best IoU with it among all anchors, whatever
    that IoU is, provided that it is at least `low_quality_min_iou`.

    Args:
        anchors: [A, 4] xyxy for all images, or [B, A, 4].
        gt_boxes: [B, M, 4] xyxy.
        gt_valid: [B, M] bool: which boxes take part; all if None.
        high_threshold: at least `low_threshold`. Thresholds are rounded to the dtype of the IoUs, as torch compares.
        low_threshold: below it an anchor is background.
        allow_low_quality_matches: see above.
        low_quality: the box that such an anchor goes to: its own best one ("own_argmax", as torchvision and detectron2
            do it), or the one that it serves ("this_gt", as mmdetection does; of several the last).
        low_quality_min_iou: mmdetection's min_pos_iou. With 0, a box that touches nothing has 0 as its best IoU, and
            all anchors of IoU 0 as its ties: also as in these libraries.
        low_quality_all_ties: all anchors with the best IoU of a box, or only the first one.
        ignore_boxes: [B, I, 4] xyxy: regions to ignore. An anchor of which more than `ignore_threshold` lies in one of
            them (intersection / area of the anchor) gets -2 and never is a low-quality match.
        ignore_valid: [B, I] bool: which regions take part; all if None.
        ignore_threshold: at least 0.

    Returns:
        `Matches(indices [B, A], ious [B, A])`: `ious` are the best IoUs with any valid box, 0 without one.

    Ties, dtypes, NaN: see the notes of the module `detops.matching`. Memory beyond inputs and outputs is O(B (A + M)).

    Raises:
        ValueError: an option out of its range.
        RuntimeError: wrong shapes, dtypes or devices.

    Example:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.], [50., 50., 60., 60.]])
        >>> match_max_iou(anchors, torch.tensor([[[0., 0., 10., 8.]]]), high_threshold=0.7, low_threshold=0.5).indices
        tensor([[ 0, -2, -1]])

    Source: torchvision's box_iou and Matcher, detectron2's Matcher and mmdetection's MaxIoUAssigner. Here anchors in
    ignore regions are ignored in images without boxes too.
    """
    op = "match_max_iou"
    check_tensors(op, anchors=anchors, gt_boxes=gt_boxes)
    check_optional_tensors(op, gt_valid=gt_valid, ignore_boxes=ignore_boxes, ignore_valid=ignore_valid)
    high_threshold, low_threshold = _thresholds(op, high_threshold, low_threshold)
    low_quality_min_iou = number(op, "low_quality_min_iou", low_quality_min_iou)
    ignore_threshold = number(op, "ignore_threshold", ignore_threshold)
    if not is_one_of(low_quality, ("own_argmax", "this_gt")):
        raise ValueError(f"{op}: low_quality must be 'own_argmax' or 'this_gt', got {low_quality!r}")
    if low_quality_min_iou != low_quality_min_iou:
        raise ValueError(f"{op}: low_quality_min_iou must be a number, got nan")
    if not ignore_threshold >= 0:
        raise ValueError(f"{op}: ignore_threshold must be at least 0, got {ignore_threshold}")
    if ignore_boxes is None and ignore_valid is not None:
        raise ValueError(f"{op}: ignore_valid must come with ignore_boxes, got it alone")
    anchors, gt_boxes, ignore_boxes = _share_dtype(op, anchors=anchors, gt_boxes=gt_boxes, ignore_boxes=ignore_boxes)
    return Matches(
        *_library.ops.match_max_iou(
            anchors,
            gt_boxes,
            gt_valid,
            high_threshold,
            low_threshold,
            bool(allow_low_quality_matches),
            low_quality == "this_gt",
            low_quality_min_iou,
            bool(low_quality_all_ties),
            ignore_boxes,
            ignore_valid,
            ignore_threshold,
        )
    )


class Matcher:
    """torchvision's Matcher: matches each column of a quality matrix to the row of its best quality, if high enough.

    index = row where quality >= high_threshold, -1 where quality < low_threshold, -2 between. With
    `allow_low_quality_matches` all columns that have the best quality of a row get their own best row in any case.

    Where the qualities are IoUs, `match_max_iou` gives the same without the matrix.

    Args:
        high_threshold: at least `low_threshold`. Thresholds are rounded to the dtype of the matrix, as torch compares.
        low_threshold: below it a column is background.
        allow_low_quality_matches: see above.

    Called with `match_quality_matrix` [M, N], floating: rows for ground-truth boxes, columns for anchors or proposals.

    Returns:
        int64 [N]. Ties go to the lower row; a NaN counts as 0.

    No gradient. No host synchronisation on a GPU.

    Raises:
        ValueError: `high_threshold` is below `low_threshold`, or one is NaN.
        RuntimeError: the matrix has a wrong shape or dtype.

    Example:
        >>> Matcher(0.7, 0.3)(torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.6, 0.2]]))
        tensor([ 0, -2, -1])

    Source: torchvision.models.detection._utils.Matcher. Where that raises for M = 0, here all columns are background.
    """

    BELOW_LOW_THRESHOLD = -1
    BETWEEN_THRESHOLDS = -2

    def __init__(self, high_threshold: float, low_threshold: float, allow_low_quality_matches: bool = False) -> None:
        self.high_threshold: float
        self.low_threshold: float
        self.high_threshold, self.low_threshold = _thresholds("Matcher", high_threshold, low_threshold)
        self.allow_low_quality_matches: bool = bool(allow_low_quality_matches)

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        if not isinstance(match_quality_matrix, Tensor):
            check_tensors("Matcher", match_quality_matrix=match_quality_matrix)
        return _library.ops.matcher(
            match_quality_matrix.detach(), self.high_threshold, self.low_threshold, self.allow_low_quality_matches
        )


def match_ssd(anchors: Tensor, gt_boxes: Tensor, gt_valid: Tensor | None = None, *, threshold: float = 0.5) -> Matches:
    """SSD's matching: an anchor goes to the box of its best IoU, if that is high enough, and each box gets its best
    anchor in any case.

    index = box where IoU >= threshold, else -1; then for each box in turn index[its best anchor] = box, so that an
    anchor that is the best of several boxes goes to the last of them.

    Args:
        anchors: [A, 4] xyxy for all images, or [B, A, 4]; SSD's default boxes.
        gt_boxes: [B, M, 4] xyxy.
        gt_valid: [B, M] bool: which boxes take part; all if None.
        threshold: rounded to the dtype of the IoUs, as torch compares.

    Returns:
        `Matches(indices [B, A], ious [B, A])`: no index is -2; `ious` are the best IoUs with any valid box.

    A box that touches no anchor gets anchor 0. Ties, dtypes, NaN: see the notes of the module `detops.matching`.

    Raises:
        ValueError: `threshold` is NaN.
        RuntimeError: wrong shapes, dtypes or devices.

    Example:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.], [80., 80., 90., 90.]])
        >>> match_ssd(anchors, torch.tensor([[[0., 0., 10., 9.], [50., 50., 53., 53.]]])).indices
        tensor([[ 0,  1, -1]])

    Source: torchvision's SSDMatcher; Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016.
    """
    check_tensors("match_ssd", anchors=anchors, gt_boxes=gt_boxes)
    check_optional_tensors("match_ssd", gt_valid=gt_valid)
    threshold = number("match_ssd", "threshold", threshold)
    if threshold != threshold:
        raise ValueError("match_ssd: threshold must be a number, got nan")
    return match_max_iou(
        anchors,
        gt_boxes,
        gt_valid,
        high_threshold=threshold,
        low_threshold=threshold,
        allow_low_quality_matches=True,
        low_quality="this_gt",
        low_quality_min_iou=-1.0,
        low_quality_all_ties=False,
    )


def assign_atss(
    anchors: Tensor, level_sizes: Sequence[int], gt_boxes: Tensor, gt_valid: Tensor | None = None, *, topk: int = 9
) -> Matches:
    """Adaptive training sample selection: each box takes the anchors near it whose IoU is high for that box.

    The candidates of a box are, of each level, the `topk` anchors whose centres are nearest to its own. Positive are
    those with IoU >= mean + standard deviation (unbiased) of the IoUs of all candidates of the box, and whose centre is
    inside the box by more than 0.01.

    Args:
        anchors: [A, 4] xyxy for all images, or [B, A, 4]; level after level.
        level_sizes: the number of anchors of each level, at most 32 of them; they add up to A.
        gt_boxes: [B, M, 4] xyxy.
        gt_valid: [B, M] bool: which boxes take part; all if None.
        topk: at least 1; levels with fewer anchors give all.

    Returns:
        `Matches(indices [B, A], ious [B, A])`: no index is -2; `ious` are those with the box that the anchor goes to, 0
        for background. An anchor that is positive for several boxes goes to the one of the highest IoU, then the first.

    Equal distances go to the lower anchor; distances that are NaN are the largest. Mean and deviation are computed in
    float64. A box with one candidate in all has no positives: there is no deviation. dtypes, NaN: see the notes of the
    module `detops.matching`. Memory beyond inputs and outputs is O(B (A + M topk levels)).

    Raises:
        RuntimeError: wrong shapes, dtypes or devices, level sizes that do not add up to A, or `topk` below 1.

    Example:
        >>> anchors = torch.tensor([[0., 0., 8., 8.], [8., 0., 16., 8.], [0., 8., 8., 16.], [0., 0., 16., 16.]])
        >>> assign_atss(anchors, [3, 1], torch.tensor([[[0., 0., 9., 9.]]]), topk=2).indices
        tensor([[ 0, -1, -1, -1]])

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
    Selection", CVPR 2020; mmdetection's ATSSAssigner, which leaves ties of the distance open.
    """
    op = "assign_atss"
    check_tensors(op, anchors=anchors, gt_boxes=gt_boxes)
    check_optional_tensors(op, gt_valid=gt_valid)
    level_sizes, topk = integers(op, "level_sizes", level_sizes), integer(op, "topk", topk)
    anchors, gt_boxes = _share_dtype(op, anchors=anchors, gt_boxes=gt_boxes)
    return Matches(*_library.ops.assign_atss(anchors, level_sizes, gt_boxes, gt_valid, topk))


@_library.register_result
class Samples(NamedTuple):
    """The anchors of each image that a loss is computed for."""

    indices: Tensor
    """[B, S] int64: anchors; the positives first, then the negatives, each by index; -1 in padded places."""
    positive_counts: Tensor
    """[B] int64: how many of an image are positives."""
    counts: Tensor
    """[B] int64: how many there are in all."""


def sample_matches(
    matches: Matches | Tensor,
    batch_size_per_image: int,
    positive_fraction: float,
    *,
    generator: torch.Generator | None = None,
) -> Samples:
    """Draws a balanced random sample of positives and negatives: without replacement, all equally likely.

    Of the positives (index >= 0) at most int(batch_size_per_image * positive_fraction) are drawn; of the negatives (-1)
    as many as then fit. Anchors with any other index are never drawn.

    Args:
        matches: a result of this module, or its indices [B, A] int64.
        batch_size_per_image: S, at least 0.
        positive_fraction: from 0 to 1.
        generator: of the device of `matches`; torch's own if None.

    Returns:
        `Samples(indices [B, S], positive_counts [B], counts [B])`, of fixed shapes.

    The same random state gives the same samples. No gradient. No host synchronisation on a GPU; torch.compile in one
    graph holds without a generator.

    Raises:
        ValueError: `batch_size_per_image` or `positive_fraction` out of range.
        RuntimeError: wrong shape or dtype, or a generator of another device.

    Example:
        >>> samples = sample_matches(torch.tensor([[2, -1, -2, -1, -1]]), 3, 0.5)
        >>> samples.indices[0, 0].item(), samples.counts.tolist()
        (0, [3])

    Source: torchvision's BalancedPositiveNegativeSampler, which returns a mask for each image, and draws other samples
    from the same random state.
    """
    op = "sample_matches"
    indices = matches.indices if isinstance(matches, Matches) else matches
    check_tensors(op, matches=indices)
    batch_size_per_image = integer(op, "batch_size_per_image", batch_size_per_image)
    positive_fraction = number(op, "positive_fraction", positive_fraction)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"{op}: generator must be a torch.Generator or None, got {kind_of(generator)}")
    if batch_size_per_image < 0:
        raise ValueError(f"{op}: batch_size_per_image must be at least 0, got {batch_size_per_image}")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"{op}: positive_fraction must be from 0 to 1, got {positive_fraction}")
    # Without a generator by another overload: with one, torch.export knows no sizes that vary.
    given: dict[str, Any] = {} if generator is None else {"generator": generator}
    keys = torch.randint(-(2**31), 2**31, indices.shape, dtype=torch.int32, device=indices.device, **given)
    most_positives = int(batch_size_per_image * positive_fraction)
    return Samples(*_library.ops.sample_matches(indices, keys, batch_size_per_image, most_positives))


def _thresholds(op: str, high_threshold: float, low_threshold: float) -> tuple[float, float]:
    for name, each in (("high_threshold", high_threshold), ("low_threshold", low_threshold)):
        if isinstance(each, list | tuple):  # detectron2's form
            raise ValueError(f"{op}: {name} must be a number, got {each}")
    high_threshold = number(op, "high_threshold", high_threshold)
    low_threshold = number(op, "low_threshold", low_threshold)
    if not low_threshold <= high_threshold:  # so that NaN fails too
        raise ValueError(
            f"{op}: high_threshold must be at least low_threshold, got {high_threshold} and {low_threshold}"
        )
    return high_threshold, low_threshold


def _share_dtype(op: str, **arguments: Tensor | None) -> list[Any]:
    """All in the dtype of the IoUs, None where an argument is None."""
    for name, each in arguments.items():
        if each is not None:
            _library.refuse_complex(op, name, each)
    boxes = arguments.values()
    double = any(each is not None and each.dtype == torch.float64 for each in boxes)
    dtype = torch.float64 if double else torch.float32
    return [None if each is None else each.detach().to(dtype) for each in boxes]


@register_fake("match_max_iou")
def _(anchors: Tensor, gt_boxes: Tensor, *options) -> tuple[Tensor, Tensor]:
    shape = gt_boxes.shape[0], anchors.shape[-2]
    return anchors.new_empty(shape, dtype=torch.int64), anchors.new_empty(shape)


@register_fake("matcher")
def _(match_quality_matrix: Tensor, *options) -> Tensor:
    return match_quality_matrix.new_empty(match_quality_matrix.shape[1], dtype=torch.int64)


@register_fake("assign_atss")
def _(anchors: Tensor, level_sizes: Sequence[int], gt_boxes: Tensor, *options) -> tuple[Tensor, Tensor]:
    shape = gt_boxes.shape[0], anchors.shape[-2]
    return anchors.new_empty(shape, dtype=torch.int64), anchors.new_empty(shape)


@register_fake("sample_matches")
def _(matches: Tensor, keys: Tensor, batch_size_per_image: int, most_positives: int) -> tuple[Tensor, Tensor, Tensor]:
    images = matches.shape[0]
    return matches.new_empty(images, batch_size_per_image), matches.new_empty(images), matches.new_empty(images)
