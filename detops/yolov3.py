"""The target assignment of YOLOv3. Users import from `detops.yolo`."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import _library
from ._checks import check_tensors, height_and_width, integers, number
from ._library import register_fake


@_library.register_result
class Yolov3Targets(NamedTuple):
    """The training targets of every anchor; see `assign_yolov3`."""

    gt_indices: Tensor
    """[B, N] int64: the anchor's row of `gt_boxes`; -1 for negative, -2 for ignored."""
    labels: Tensor
    """[B, N] int64: the class; -1 for negative, -2 for ignored."""
    boxes: Tensor
    """[B, N, 4] in the dtype of `gt_boxes`: the box of the anchor's gt; 0 where there is none."""


def assign_yolov3(
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_valid: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    image_size: tuple[int, int],
    *,
    iou_threshold: float = 0.5,
) -> Yolov3Targets:
    """Assigns each ground-truth box to its best anchor in the cell of its centre, and ignores others that overlap well.

    On each level the cell that holds a gt's centre is responsible, with its A anchors, which are centred in the cell. A
    responsible anchor goes to the gt of highest IoU if that is above iou_threshold, and to any gt that it is the best
    responsible anchor of, all levels counted. Other anchors are ignored if they have an IoU above iou_threshold with
    some gt, and negative if not.

    Args:
        gt_boxes: [B, M, 4] xyxy in pixels, floating.
        gt_labels: [B, M] int64, at least 0; there is no upper limit.
        gt_valid: [B, M] bool: which rows take part; see `pad_ground_truth`.
        anchors: [L, A, 2] widths and heights in pixels, of up to 8 levels.
        strides: of the L levels, in pixels.
        image_size: (height, width), multiples of all strides, at least 0.
        iou_threshold: at least 0.

    Returns:
        `Yolov3Targets(gt_indices [B, N], labels [B, N], boxes [B, N, 4])` with N = sum of A H W, in the order (level,
        anchor, y, x) of `decode_yolo`. IoUs are float32, float64 for float64 boxes. On a GPU nothing waits.

    Ties: an anchor with equal IoUs goes to the lower gt index; where several gts have the same best anchor, the last
    gets it; a gt with several equally good best anchors gets all. A centre outside of the image counts to the cell at
    the border. A best anchor with IoU 0 is not forced. NaN IoUs count as 0. No gradient.

    Raises:
        ValueError: image_size is negative or no multiple of a stride, or iou_threshold is negative or NaN.
        RuntimeError: wrong shapes, dtypes or devices; on the CPU a negative label (on a GPU such a gt counts as not
            valid).

    Example:
        >>> targets = assign_yolov3(
        ...     torch.tensor([[[0., 0., 8., 8.]]]), torch.tensor([[5]]), torch.tensor([[True]]),
        ...     torch.tensor([[[8., 8.]]]), [8], (16, 16),
        ... )
        >>> targets.labels
        tensor([[ 5, -1, -1, -1]])

    Source: Redmon and Farhadi, "YOLOv3", 2018, as mmdetection's GridAssigner states it.
    """
    op = "assign_yolov3"
    check_tensors(op, gt_boxes=gt_boxes, gt_labels=gt_labels, gt_valid=gt_valid, anchors=anchors)
    strides, (height, width) = integers(op, "strides", strides), height_and_width(op, "image_size", image_size)
    iou_threshold = number(op, "iou_threshold", iou_threshold)
    for stride in strides:
        if stride <= 0 or height % stride or width % stride:
            got = f"{height, width}"
            raise ValueError(f"{op}: image_size must be a multiple of the strides {list(strides)}, got {got}")
    if height < 0 or width < 0:
        raise ValueError(f"{op}: image_size must be at least 0, got {height, width}")
    if not iou_threshold >= 0:
        raise ValueError(f"{op}: iou_threshold must be at least 0, got {iou_threshold}")
    return Yolov3Targets(
        *_library.ops.assign_yolov3(
            *(gt_boxes.detach(), gt_labels, gt_valid, anchors.detach()),
            *([height // stride for stride in strides], [width // stride for stride in strides]),
            *(list(strides), iou_threshold),
        )
    )


@register_fake("assign_yolov3")
def _(
    gt_boxes: Tensor, gt_labels: Tensor, gt_valid: Tensor, anchors: Tensor, heights: list[int], widths: list[int],
    strides: list[int], iou_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count = anchors.shape[1] * sum(height * width for height, width in zip(heights, widths, strict=True))
    shape = gt_boxes.shape[0], count
    return gt_labels.new_empty(shape), gt_labels.new_empty(shape), gt_boxes.new_empty(*shape, 4)
