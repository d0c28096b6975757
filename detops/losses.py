"""Losses of dense detectors: the focal family for classes, qualities and distributions, and IoU losses for boxes.

All functions share these rules, on every device:

- Each is one fused pass forward and one backward. Nothing as large as the inputs is made but the losses and gradients.
- `reduction` is "none", "mean" or "sum"; the mean of no losses is 0. Sums are made in double, in an order that depends
  neither on threads nor on the processor: results and gradients are the same bits on every run.
- float16 and bfloat16 are computed in float32. Focal losses return the dtype of `inputs`, which autocast makes float32;
  a half-precision sum above 65504 is infinite. IoU losses of half boxes are float32.
- IoU losses and their gradients are finite, with the default eps, for all finite boxes with x1 <= x2 and y1 <= y2. Two
  boxes without area have loss 1 and gradient 0. Inverted boxes follow the formula; NaN gives NaN.
- Where there is a gradient there is no second derivative: asking for one is an error.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from . import _checks, _library
from ._gradients import register_gradient
from ._library import register_fake

# Numbers of the kinds, as csrc/losses/focal_loss.h and csrc/losses/iou_loss.h count them.
_SIGMOID, _QUALITY, _VARIFOCAL = range(3)
_GENERALIZED, _DISTANCE, _COMPLETE, _EFFICIENT, _SCYLLA = range(5)

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Focal loss of binary predictions: those that are right already weigh little.

    With p = sigmoid(inputs), target t and p_t = p t + (1 - p)(1 - t), each loss is
    (alpha t + (1 - alpha)(1 - t)) (1 - p_t)^gamma (-t log(p) - (1 - t) log(1 - p)).

    Args:
        inputs: [..., C] logits, floating; any shape for dense targets.
        targets: dense, floating, in the shape of `inputs`: t in [0, 1]. Or classes, integer, [...] without the last
            dimension: 0 to C-1 a class, C background, -1 ignored (loss and gradient 0). No one-hot copy is made.
            Assigners of detops mark background as -1: `torch.where(labels < 0, C, labels)`.
        alpha: the weight of positives, from 0 to 1; -1 for no weights.
        gamma: at least 0; 0 is the cross-entropy.
        reduction: "none", "mean" or "sum". The mean is over all elements, ignored ones included.

    Returns:
        The shape of `inputs`, or a scalar if reduced, in the dtype of `inputs` (promoted with that of dense targets).

    Gradient: to `inputs`. On a GPU a row whose class is out of range counts as ignored, as raising would need a host
    synchronisation.

    Raises:
        ValueError: `alpha`, `gamma` or `reduction` is none of the above.
        RuntimeError: a tensor has a wrong shape, dtype or device, a class is out of range (on the CPU), or `targets`
            requires a gradient.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0], [0.0, 0.5]])
        >>> sigmoid_focal_loss(logits, torch.tensor([0, 2]), reduction="sum")  # the second row is background
        tensor(0.4305)

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; torchvision.ops.sigmoid_focal_loss, which
    takes dense targets only and gives NaN as the mean of no losses.
    """
    op = "sigmoid_focal_loss"
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        _checks.check_tensors(op, inputs=inputs, targets=targets)
        options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
        return handle_torch_function(sigmoid_focal_loss, (inputs, targets), inputs, targets, **options)
    alpha = _checks.number(op, "alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        raise ValueError(f"Invalid alpha value: {op}: alpha must be from 0 to 1, or -1 for no weights, got {alpha}")
    return _focal_loss(op, _SIGMOID, inputs, targets, None, alpha, "gamma", gamma, reduction)


def quality_focal_loss(
    inputs: Tensor, targets: Tensor, scores: Tensor, beta: float = 2.0, reduction: str = "none"
) -> Tensor:
    """Quality focal loss: one prediction for the class and for how well its box fits.

    With p = sigmoid(inputs), and y the row's score at its class and 0 elsewhere, each loss is
    |y - p|^beta (-y log(p) - (1 - y) log(1 - p)).

    Args:
        inputs: [..., C] logits, floating.
        targets: [...] integer: 0 to C-1 a class, C background, -1 ignored (loss and gradient 0). Assigners of detops
            mark background as -1: `torch.where(labels < 0, C, labels)`.
        scores: [...] floating, in [0, 1]: the quality of each row's box, as its IoU. Not read for background.
        beta: at least 0.
        reduction: "none", "mean" or "sum". The mean is over all elements, ignored ones included.

    Returns:
        [..., C], or a scalar if reduced, in the dtype of `inputs`.

    Gradient: to `inputs`. On a GPU a row whose class is out of range counts as ignored, as raising would need a host
    synchronisation.

    Raises:
        ValueError: `beta` or `reduction` is none of the above.
        RuntimeError: a tensor has a wrong shape, dtype or device, a class is out of range (on the CPU), or `scores`
            requires a gradient.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0], [0.0, 0.5]])
        >>> quality_focal_loss(logits, torch.tensor([0, 2]), torch.tensor([0.8, 0.0]), reduction="sum")
        tensor(0.5768)

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020. mmdetection sums over the classes: `.sum(-1)` gives that.
    """
    return _focal_loss("quality_focal_loss", _QUALITY, inputs, targets, scores, -1.0, "beta", beta, reduction)


def varifocal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.75, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """Varifocal loss: targets are IoUs, positives weigh as much as their IoU, easy negatives little.

    With p = sigmoid(inputs), target t and ce = -t log(p) - (1 - t) log(1 - p), each loss is t ce where t > 0 and
    alpha p^gamma ce elsewhere.

    Args:
        inputs: logits of any shape, floating.
        targets: floating, in the shape of `inputs`: at a row's class the IoU of its box, 0 elsewhere.
        alpha: the weight of negatives, at least 0.
        gamma: at least 0.
        reduction: "none", "mean" or "sum".

    Returns:
        The shape of `inputs`, or a scalar if reduced, in the dtype of `inputs` (promoted with that of `targets`).

    Gradient: to `inputs`.

    Raises:
        ValueError: `alpha`, `gamma` or `reduction` is none of the above.
        RuntimeError: a tensor has a wrong shape, dtype or device, or `targets` requires a gradient.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0], [0.0, 0.5]])
        >>> varifocal_loss(logits, torch.tensor([[0.8, 0.0], [0.0, 0.0]]), reduction="sum")
        tensor(0.8516)

    Source: Zhang et al., VarifocalNet, CVPR 2021.
    """
    op = "varifocal_loss"
    alpha = _check_not_negative(op, "alpha", alpha)
    return _focal_loss(op, _VARIFOCAL, inputs, targets, None, alpha, "gamma", gamma, reduction)


def distribution_focal_loss(inputs: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """Distribution focal loss: the distance of a box side, learnt as a distribution over bins.

    With s = softmax(inputs) and a target y between the bins i and i + 1, each loss is
    -(i + 1 - y) log(s_i) - (y - i) log(s_(i+1)).

    Args:
        inputs: [..., bins] logits, floating, at least 2 bins.
        targets: [...] floating, from 0 to bins - 1: distances in bins.
        reduction: "none", "mean" or "sum".

    Returns:
        [...], or a scalar if reduced, in the dtype of `inputs`. A target that is NaN gives NaN.

    Gradient: to `inputs`. On a GPU a target out of range gives loss and gradient 0, as raising would need a host
    synchronisation.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: a tensor has a wrong shape, dtype or device, a target is out of range (on the CPU), or `targets`
            requires a gradient.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
        >>> distribution_focal_loss(logits, torch.tensor([1.25, 0.0]))
        tensor([0.6576, 0.0949])

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020; mmdetection's, which reads beyond the bins for a target of
    bins - 1.
    """
    op = "distribution_focal_loss"
    number = _number_of(op, reduction)
    _checks.check_tensors(op, inputs=inputs, targets=targets)
    _check_no_gradient(op, "targets", targets)
    _library.refuse_forward_mode(op, inputs)
    return _library.ops.distribution_focal_loss(_for_autocast(inputs), targets, number)


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Loss 1 - GIoU of matching boxes, which also pulls together boxes that do not overlap.

    With intersection I, union U and the area C of the smallest box around both:
    1 - I / (U + eps) + (C - U) / (C + eps).

    Args:
        boxes1: [..., 4] xyxy, any dtype; computed in float32, or in float64 if one of the boxes is float64.
        boxes2: [..., 4], the shape of `boxes1`.
        reduction: "none", "mean" or "sum".
        eps: keeps divisors from 0.

    Returns:
        [...], or a scalar if reduced, float32 or float64.

    Degenerate boxes: see the notes of the module. Gradient: to both; ties of min and max are split equally, and an
    empty intersection has none.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: the shapes differ or do not end in 4, or the devices differ.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> generalized_box_iou_loss(boxes, boxes.flip(0))
        tensor([0.5000, 0.5000])

    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019;
    torchvision.ops.generalized_box_iou_loss, whose loss of two boxes without area grows with their distance.
    """
    return _iou_loss("generalized_box_iou_loss", _GENERALIZED, boxes1, boxes2, reduction, eps)


def distance_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Loss 1 - DIoU of matching boxes, which pulls their centres together.

    With intersection I, union U, the squared distance d of the centres and the sides w, h of the smallest box around
    both: 1 - I / (U + eps) + d / (w^2 + h^2 + eps).

    Args:
        boxes1: [..., 4] xyxy, any dtype; computed in float32, or in float64 if one of the boxes is float64.
        boxes2: [..., 4], the shape of `boxes1`.
        reduction: "none", "mean" or "sum".
        eps: keeps divisors from 0.

    Returns:
        [...], or a scalar if reduced, float32 or float64.

    Degenerate boxes: see the notes of the module. Gradient: to both; ties of min and max are split equally, and an
    empty intersection has none.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: the shapes differ or do not end in 4, or the devices differ.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> distance_box_iou_loss(boxes, boxes.flip(0))
        tensor([0.5312, 0.5312])

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020; torchvision.ops.distance_box_iou_loss, whose loss of two boxes
    without area grows with their distance.
    """
    return _iou_loss("distance_box_iou_loss", _DISTANCE, boxes1, boxes2, reduction, eps)


def complete_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Loss 1 - CIoU of matching boxes: centres as in `distance_box_iou_loss`, and aspect ratios.

    The distance loss plus alpha v, where v = 4 / pi^2 (atan(w1 / h1) - atan(w2 / h2))^2 and
    alpha = v / (1 - I / (U + eps) + v + eps), a constant in the gradient.

    Args:
        boxes1: [..., 4] xyxy, any dtype; computed in float32, or in float64 if one of the boxes is float64.
        boxes2: [..., 4], the shape of `boxes1`.
        reduction: "none", "mean" or "sum".
        eps: keeps divisors from 0.

    Returns:
        [...], or a scalar if reduced, float32 or float64.

    Degenerate boxes: see the notes of the module; v is 0 where one is a point, which has no aspect ratio. Gradient: to
    both; ties of min and max are split equally, and an empty intersection has none.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: the shapes differ or do not end in 4, or the devices differ.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> complete_box_iou_loss(boxes, boxes.flip(0))
        tensor([0.5345, 0.5345])

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020; torchvision.ops.complete_box_iou_loss, which takes 1e-7 for eps
    in the distance loss whatever the argument says, and gives NaN where a box is a point.
    """
    return _iou_loss("complete_box_iou_loss", _COMPLETE, boxes1, boxes2, reduction, eps)


def efficient_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Loss 1 - EIoU of matching boxes: centres as in `distance_box_iou_loss`, and sides.

    With the sides w, h of the smallest box around both, the distance loss plus
    (w1 - w2)^2 / (w^2 + eps) + (h1 - h2)^2 / (h^2 + eps).

    Args:
        boxes1: [..., 4] xyxy, any dtype; computed in float32, or in float64 if one of the boxes is float64.
        boxes2: [..., 4], the shape of `boxes1`.
        reduction: "none", "mean" or "sum".
        eps: keeps divisors from 0.

    Returns:
        [...], or a scalar if reduced, float32 or float64.

    Degenerate boxes: see the notes of the module. Gradient: to both; ties of min and max are split equally, and an
    empty intersection has none.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: the shapes differ or do not end in 4, or the devices differ.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> efficient_box_iou_loss(boxes, boxes.flip(0))
        tensor([0.7812, 0.7812])

    Source: Zhang et al., Focal and Efficient IOU Loss, 2021 (arXiv 2101.08158), without its focal weight.
    """
    return _iou_loss("efficient_box_iou_loss", _EFFICIENT, boxes1, boxes2, reduction, eps)


def siou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """SIoU (SCYLLA-IoU) loss of matching boxes: overlap, angle, distance and shape.

    1 - I / (U + eps) + (distance + shape) / 2. With the offset (dx, dy) of the centres and the sides w, h of the
    smallest box around both:
    angle = sin(2 asin(|dy| / sqrt(dx^2 + dy^2))) = 2 |dx| |dy| / (dx^2 + dy^2 + eps),
    distance = 2 - exp(-(2 - angle) dx^2 / (w^2 + eps)) - exp(-(2 - angle) dy^2 / (h^2 + eps)),
    shape = (1 - exp(-|w1 - w2| / (max(w1, w2) + eps)))^4 + (1 - exp(-|h1 - h2| / (max(h1, h2) + eps)))^4.

    Args:
        boxes1: [..., 4] xyxy, any dtype; computed in float32, or in float64 if one of the boxes is float64.
        boxes2: [..., 4], the shape of `boxes1`.
        reduction: "none", "mean" or "sum".
        eps: keeps divisors from 0.

    Returns:
        [...], or a scalar if reduced, float32 or float64.

    Degenerate boxes: see the notes of the module. Gradient: to both; ties of min and max are split equally, and an
    empty intersection has none.

    Raises:
        ValueError: `reduction` is none of the above.
        RuntimeError: the shapes differ or do not end in 4, or the devices differ.

    Example:
        >>> boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]])
        >>> siou_loss(boxes, boxes.flip(0))
        tensor([0.5707, 0.5707])

    Source: Gevorgyan, SIoU Loss, 2022 (arXiv 2205.12740), with its theta = 4.
    """
    return _iou_loss("siou_loss", _SCYLLA, boxes1, boxes2, reduction, eps)


def _number_of(op: str, reduction: str) -> int:
    if not _checks.is_one_of(reduction, _REDUCTIONS):
        raise ValueError(f"Invalid reduction: {op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return _REDUCTIONS[reduction]


def _check_not_negative(op: str, argument: str, value: float) -> float:
    value = _checks.number(op, argument, value)
    if not 0 <= value <= torch.finfo(torch.float32).max:  # so that NaN fails too
        raise ValueError(f"{op}: {argument} must be at least 0 and finite in float32, got {value}")
    return value


def _check_no_gradient(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise RuntimeError(f"{op}: {argument} must not require a gradient, got requires_grad=True; detach it")


def _for_autocast(inputs: Tensor) -> Tensor:
    """Under autocast losses are computed, and returned, in float32."""
    half = inputs.dtype in (torch.float16, torch.bfloat16)
    if not half or inputs.is_meta:  # of which torch knows no autocast
        return inputs
    return inputs.float() if torch.is_autocast_enabled(inputs.device.type) else inputs


def _focal_loss(op, kind, inputs, targets, scores, alpha, exponent_name, exponent, reduction) -> Tensor:
    number = _number_of(op, reduction)
    exponent = _check_not_negative(op, exponent_name, exponent)
    _checks.check_tensors(op, inputs=inputs, targets=targets)
    if kind == _QUALITY:
        _checks.check_tensors(op, scores=scores)
    _check_no_gradient(op, "targets", targets)
    if scores is not None:
        _check_no_gradient(op, "scores", scores)
    _library.refuse_forward_mode(op, inputs)
    inputs = _for_autocast(inputs)
    if inputs.dtype != targets.dtype and {inputs.dtype, targets.dtype} <= _checks.FLOATING:
        dtype = torch.promote_types(inputs.dtype, targets.dtype)
        inputs, targets = inputs.to(dtype), targets.to(dtype)
    return _library.ops.focal_loss(inputs, targets, scores, kind, alpha, exponent, number)


def _iou_loss(op: str, kind: int, boxes1: Tensor, boxes2: Tensor, reduction: str, eps: float) -> Tensor:
    number = _number_of(op, reduction)
    eps = _check_not_negative(op, "eps", eps)
    _checks.check_tensors(op, boxes1=boxes1, boxes2=boxes2)
    _library.refuse_forward_mode(op, boxes1, boxes2)
    _checks.check_real(op, boxes1=boxes1, boxes2=boxes2)
    dtype = torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32
    return _library.ops.iou_loss(boxes1.to(dtype), boxes2.to(dtype), kind, eps, number)


@register_fake("focal_loss")
def _(inputs, targets, scores, kind, alpha, exponent, reduction) -> Tensor:
    return inputs.new_empty(() if reduction else inputs.shape)


@register_fake("focal_loss_backward")
def _(grad, inputs, targets, scores, kind, alpha, exponent, reduction) -> Tensor:
    return inputs.new_empty(inputs.shape)


@register_fake("distribution_focal_loss")
def _(inputs: Tensor, targets: Tensor, reduction: int) -> Tensor:
    return inputs.new_empty(() if reduction else targets.shape)


@register_fake("distribution_focal_loss_backward")
def _(grad: Tensor, inputs: Tensor, targets: Tensor, reduction: int) -> Tensor:
    return inputs.new_empty(inputs.shape)


@register_fake("iou_loss")
def _(boxes1: Tensor, boxes2: Tensor, kind: int, eps: float, reduction: int) -> Tensor:
    return boxes1.new_empty(() if reduction else boxes1.shape[:-1])


@register_fake("iou_loss_backward")
def _(
    grad: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: int,
    eps: float,
    reduction: int,
    wanted1: bool = True,
    wanted2: bool = True,
) -> tuple[Tensor, Tensor]:
    return boxes1.new_empty(boxes1.shape if wanted1 else 0), boxes2.new_empty(boxes2.shape if wanted2 else 0)


for _name in ("focal_loss", "distribution_focal_loss", "iou_loss"):
    register_gradient(_name)
