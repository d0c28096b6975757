"""Box coders: from boxes to what a head learns, and back.

All functions share these rules, on every device:

- Boxes are xyxy in continuous pixels. Leading dimensions broadcast: anchors or points [A, ...] serve a whole batch
  [B, A, ...], and anchors [N, 1, 4] serve all classes of deltas [N, C, 4], without being copied.
- float16 and bfloat16 are computed in float32 and rounded once. Tensors of different dtypes give the wider one, so that
  half deltas with float32 anchors give float32 boxes.
- Each is one fused pass forward and one backward, the same bits on every device and run. There is no second derivative.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks, _library
from ._gradients import register_gradient
from ._library import register_fake

_CLIP = math.log(1000.0 / 16)
_YOLO_VERSIONS = {"v3": 3, "v5": 5}


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Encodes boxes relative to anchors, as a head learns them: offsets of centres and logarithms of sides.

    With centre and sides (cx, cy, w, h) of a box and (ax, ay, aw, ah) of its anchor:
    (weights[0] (cx - ax) / aw, weights[1] (cy - ay) / ah, weights[2] log(w / aw), weights[3] log(h / ah)).

    Args:
        boxes: [..., 4] xyxy, floating.
        anchors: [..., 4] xyxy, floating; broadcasts with `boxes`.
        weights: four positive numbers.

    Returns:
        [..., 4] deltas, in the wider dtype of the two.

    Degenerate boxes follow the formula: a side of 0 gives -inf, one below NaN; an anchor without a side gives what the
    division gives. Gradient: to both.

    Raises:
        ValueError: `weights` are not four positive numbers.
        RuntimeError: a tensor has a wrong shape, dtype or device.

    Example:
        >>> boxes, anchors = torch.tensor([[0., 0., 20., 10.]]), torch.tensor([[0., 0., 10., 10.]])
        >>> encode_boxes(boxes, anchors)
        tensor([[0.5000, 0.0000, 0.6931, 0.0000]])

    Source: Girshick et al., Rich Feature Hierarchies, CVPR 2014; torchvision's encode_boxes, whose log may differ in
    the last bit.
    """
    op = "encode_boxes"
    weights = _checked_weights(op, weights)
    return _library.ops.encode_boxes(*_share(op, "boxes", boxes, "anchors", anchors), weights)


def decode_boxes(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0), clip: float = _CLIP
) -> Tensor:
    """Decodes what a head predicts for anchors into boxes: the inverse of `encode_boxes`.

    With d = deltas / weights and centre and sides (ax, ay, aw, ah) of an anchor: centre (ax + d0 aw, ay + d1 ah), sides
    (aw exp(min(d2, clip)), ah exp(min(d3, clip))).

    Args:
        deltas: [..., 4], floating. For deltas of every class [N, C, 4] give anchors [N, 1, 4].
        anchors: [..., 4] xyxy, floating; broadcasts with `deltas`.
        weights: four positive numbers, those of encoding.
        clip: the most that goes into exp; inf for no limit.

    Returns:
        [..., 4] xyxy boxes, in the wider dtype of the two.

    NaN gives NaN. Gradient: to both; beyond `clip` there is none.

    Raises:
        ValueError: `weights` are not four positive numbers, or `clip` is NaN.
        RuntimeError: a tensor has a wrong shape, dtype or device.

    Example:
        >>> anchors = torch.tensor([[0., 0., 10., 10.]])
        >>> decode_boxes(torch.tensor([[0.5, 0., math.log(2), 0.]]), anchors)
        tensor([[ 0.,  0., 20., 10.]])

    Source: Girshick et al., Rich Feature Hierarchies, CVPR 2014; torchvision's BoxCoder, which rounds float32 anchors
    to the dtype of half deltas.
    """
    op = "decode_boxes"
    weights = _checked_weights(op, weights)
    clip = _checks.number(op, "clip", clip)
    if clip != clip:
        raise ValueError(f"{op}: clip must be a number, got nan")
    return _library.ops.decode_boxes(*_share(op, "deltas", deltas, "anchors", anchors), weights, clip)


class BoxCoder:
    """`encode_boxes` and `decode_boxes` with torchvision's interface.

    Args:
        weights: four positive numbers.
        bbox_xform_clip: the `clip` of `decode_boxes`.

    Example:
        >>> coder = BoxCoder((10., 10., 5., 5.))
        >>> proposals = [torch.tensor([[0., 0., 10., 10.], [5., 5., 9., 9.]])]
        >>> coder.decode(torch.zeros(2, 8), proposals).shape  # two classes
        torch.Size([2, 2, 4])

    Source: torchvision.models.detection._utils.BoxCoder.
    """

    def __init__(self, weights: Sequence[float], bbox_xform_clip: float = _CLIP) -> None:
        self.weights: tuple[float, ...] = _checked_weights("BoxCoder", weights)
        self.bbox_xform_clip: float = _checks.number("BoxCoder", "bbox_xform_clip", bbox_xform_clip)

    def encode(self, reference_boxes: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The deltas [n, 4] of each image's boxes [n, 4] from its proposals [n, 4]."""
        _check_rows("reference_boxes", reference_boxes)
        _check_rows("proposals", proposals)
        counts, others = [len(boxes) for boxes in reference_boxes], [len(boxes) for boxes in proposals]
        if counts != others:
            raise RuntimeError(f"BoxCoder: proposals must be as many as reference_boxes, {counts}, got {others}")
        references = _rows_of_all("reference_boxes", reference_boxes)
        return self.encode_single(references, _rows_of_all("proposals", proposals)).split(counts)

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The deltas [n, 4] of boxes [n, 4] from proposals [n, 4]."""
        _checks.check_tensors("BoxCoder", reference_boxes=reference_boxes, proposals=proposals)
        return encode_boxes(reference_boxes, proposals, self.weights)

    def decode(self, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Boxes [sum n, C, 4] of deltas [sum n, 4 C], in any shape, for the proposals [n, 4] of each image."""
        _checks.check_tensors("BoxCoder", rel_codes=rel_codes)
        _check_rows("boxes", boxes)
        anchors = _rows_of_all("boxes", boxes)
        if len(anchors):
            if rel_codes.numel() % (4 * len(anchors)):
                raise RuntimeError(
                    f"BoxCoder: rel_codes must have shape [{len(anchors)}, 4 C], got {list(rel_codes.shape)}"
                )
            rel_codes = rel_codes.reshape(len(anchors), -1)
        decoded = self.decode_single(rel_codes, anchors)
        return decoded.reshape(len(anchors), -1, 4) if len(anchors) else decoded

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [n, 4 C] of deltas [n, 4 C] for proposals [n, 4]."""
        _checks.check_tensors("BoxCoder", rel_codes=rel_codes, boxes=boxes)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise RuntimeError(f"BoxCoder: boxes must have shape [n, 4], got {list(boxes.shape)}")
        if rel_codes.ndim != 2 or rel_codes.shape[1] % 4:
            raise RuntimeError(f"BoxCoder: rel_codes must have shape [n, 4 C], got {list(rel_codes.shape)}")
        if rel_codes.shape[0] != boxes.shape[0]:
            raise RuntimeError(
                f"BoxCoder: rel_codes must have one row per box ({boxes.shape[0]}), got {list(rel_codes.shape)}"
            )
        deltas = rel_codes.reshape(*rel_codes.shape[:1], rel_codes.shape[1] // 4, 4)
        return decode_boxes(deltas, boxes[:, None], self.weights, self.bbox_xform_clip).flatten(1)


def encode_ltrb(
    boxes: Tensor, points: Tensor, strides: Tensor | None = None, max_distance: float | None = None
) -> Tensor:
    """Distances from points to the left, top, right and bottom sides of boxes.

    ((x - x1) / s, (y - y1) / s, (x2 - x) / s, (y2 - y) / s) for the point (x, y) and its stride s, or s = 1.

    Args:
        boxes: [..., 4] xyxy, floating.
        points: [..., 2] (x, y) in pixels, floating; broadcasts with `boxes`.
        strides: [...] floating: the unit of each point's distances, as `point_anchors` gives them; None for pixels.
        max_distance: if given, distances are clamped to [0, max_distance], as `distribution_focal_loss` needs its
            targets: bins - 1 at most.

    Returns:
        [..., 4] distances, in the wider dtype of the two; negative where the point is outside, unless clamped.

    Gradient: to boxes and points; none where clamped.

    Raises:
        ValueError: `max_distance` is negative or NaN.
        RuntimeError: a tensor has a wrong shape, dtype or device, or `strides` requires a gradient.

    Example:
        >>> encode_ltrb(torch.tensor([[0., 0., 20., 10.]]), torch.tensor([[12., 4.]]), torch.tensor([4.]))
        tensor([[3.0000, 1.0000, 2.0000, 1.5000]])

    Source: Tian et al., FCOS, ICCV 2019. torchvision's BoxLinearCoder divides by the sides of anchors, which for its
    square ones are the strides.
    """
    op = "encode_ltrb"
    if max_distance is not None:
        max_distance = _checks.number(op, "max_distance", max_distance)
    if max_distance is not None and not max_distance >= 0:
        raise ValueError(f"{op}: max_distance must be at least 0, got {max_distance}")
    return _library.ops.encode_ltrb(*_share_points(op, "boxes", boxes, points, strides), max_distance)


def decode_ltrb(distances: Tensor, points: Tensor, strides: Tensor | None = None) -> Tensor:
    """Boxes from points and the distances to their sides: the inverse of `encode_ltrb`.

    (x - s d0, y - s d1, x + s d2, y + s d3) for the point (x, y) and its stride s, or s = 1.

    Args:
        distances: [..., 4] left, top, right, bottom, floating.
        points: [..., 2] (x, y) in pixels, floating; broadcasts with `distances`.
        strides: [...] floating: the unit of each point's distances, as `point_anchors` gives them; None for pixels.

    Returns:
        [..., 4] xyxy boxes, in the wider dtype of the two. Negative distances are taken as they are.

    Gradient: to distances and points.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or `strides` requires a gradient.

    Example:
        >>> decode_ltrb(torch.tensor([[3., 1., 2., 1.5]]), torch.tensor([[12., 4.]]), torch.tensor([4.]))
        tensor([[ 0.,  0., 20., 10.]])

    Source: Tian et al., FCOS, ICCV 2019; mmdetection's distance2bbox, without its clamp to the image.
    """
    return _library.ops.decode_ltrb(*_share_points("decode_ltrb", "distances", distances, points, strides))


def decode_dfl(logits: Tensor, dim: int = -1) -> Tensor:
    """Decodes distributions over bins into distances: the mean bin of each softmax.

    sum_k k softmax(logits)_k over the bins 0, 1, ...

    Args:
        logits: [..., bins] floating, or with the bins in dimension `dim`: a head's map [B, 4 bins, H, W] is
            `logits.view(B, 4, bins, H, W)` with dim=2, of which no transposed copy is made.
        dim: the dimension of the bins.

    Returns:
        [...] without that dimension, in the dtype of `logits`, from 0 to bins - 1. For boxes see `decode_ltrb`.

    Computed without overflow; NaN in a row gives NaN. Gradient: to `logits`.

    Raises:
        RuntimeError: `dim` is no dimension of `logits`, there is no bin, or the dtype is not floating.

    Example:
        >>> decode_dfl(torch.tensor([[0., 0., 0.], [-100., 0., 0.]]))
        tensor([1.0000, 1.5000])

    Source: Li et al., Generalized Focal Loss, NeurIPS 2020: its integral over the distribution.
    """
    _checks.check_tensors("decode_dfl", logits=logits)
    _library.refuse_forward_mode("decode_dfl", logits)
    return _library.ops.decode_dfl(logits, _checks.integer("decode_dfl", "dim", dim))


@_library.register_result
class YoloPredictions(NamedTuple):
    """Decoded outputs of a YOLO head, N rows per image in the order (level, anchor, y, x); see `decode_yolo`."""

    boxes: Tensor
    """[B, N, 4] xyxy in pixels."""
    objectness: Tensor
    """[B, N] in [0, 1]."""
    scores: Tensor
    """[B, N, C] objectness times class probability, as `multiclass_nms` takes them."""


def decode_yolo(raw: Sequence[Tensor], anchors: Tensor, strides: Sequence[float], *, version: str) -> YoloPredictions:
    """Boxes and scores from the maps of an anchor-based YOLO head, all levels at once.

    With s(t) = 1 / (1 + exp(-t)), cell (i, j), stride d and an anchor's sides (aw, ah):
    "v3": centre d (i + s(tx)), d (j + s(ty)), sides aw exp(tw), ah exp(th);
    "v5": centre d (i + 2 s(tx) - 0.5), d (j + 2 s(ty) - 0.5), sides aw (2 s(tw))^2, ah (2 s(th))^2.
    Objectness is s(to), scores are s(to) s(tc). "v5" is also the form of YOLOv7.

    Args:
        raw: for each level a map [B, K (5 + C), H, W], contiguous or channels_last, floating: for each of K anchors tx,
            ty, tw, th, objectness and C classes.
        anchors: [levels, K, 2] widths and heights in pixels, as `yolo_anchors` gives them, on the device of `raw`.
        strides: pixels of a cell of each level.
        version: "v3" or "v5".

    Returns:
        `YoloPredictions(boxes [B, N, 4] xyxy, objectness [B, N], scores [B, N, C])` with N = sum of K H W. Boxes are
        float32, float64 for float64 maps; the rest has the dtype of `raw`. No host synchronisation.

    A large tw of "v3" gives infinite sides, as published. Gradient: to `raw`.

    Raises:
        ValueError: `version` is neither, or a stride is not positive.
        RuntimeError: a tensor has a wrong shape, dtype or device, or `anchors` require a gradient.

    Example:
        >>> raw = [torch.zeros(1, 3 * (5 + 2), 2, 2)]
        >>> found = decode_yolo(raw, torch.tensor([[[10., 13.], [16., 30.], [33., 23.]]]), [8], version="v5")
        >>> found.boxes[0, 0], found.scores.shape
        (tensor([-1.0000, -2.5000,  9.0000, 10.5000]), torch.Size([1, 12, 2]))

    Source: Redmon and Farhadi, YOLOv3, 2018; the v5 form as peers compute it. They give centres and sides in place of
    corners, and class probabilities in place of scores.
    """
    op = "decode_yolo"
    if not _checks.is_one_of(version, _YOLO_VERSIONS):
        raise ValueError(f"{op}: version must be 'v3' or 'v5', got {version!r}")
    strides = list(_checks.numbers(op, "strides", strides))
    if not all(0 < stride < math.inf for stride in strides):
        raise ValueError(f"{op}: strides must be positive, got {strides}")
    if not isinstance(raw, Tensor):
        _checks.check_tensor_list(op, "raw", raw)
    _checks.check_tensors(op, anchors=anchors)
    if anchors.requires_grad:
        raise RuntimeError(f"{op}: anchors must not require a gradient, got requires_grad=True; detach them")
    _checks.check_real(op, anchors=anchors)
    raw = list(raw)
    _library.refuse_forward_mode(op, *raw)
    if raw:
        anchors = anchors.to(torch.float64 if raw[0].dtype == torch.float64 else torch.float32)
    return YoloPredictions(*_library.ops.decode_yolo(raw, anchors, strides, _YOLO_VERSIONS[version]))


def _check_rows(name: str, boxes: Sequence[Tensor]) -> None:
    _checks.check_rows("BoxCoder", name, boxes)
    if len(boxes) == 0:
        raise RuntimeError(f"BoxCoder: {name} must be the boxes of at least one image, got none")
    for each in boxes:
        if each.ndim != 2 or each.shape[1] != 4:
            raise RuntimeError(f"BoxCoder: {name} must have shape [n, 4], got {list(each.shape)}")
        _checks.check_real("BoxCoder", **{name: each})


def _rows_of_all(name: str, boxes: Sequence[Tensor]) -> Tensor:
    for each in boxes:
        _checks.promoted("BoxCoder", f"{name}[0]", boxes[0], name, each)
        _checks.check_same_device("BoxCoder", f"{name}[0]", boxes[0], name, each)
    return torch.cat(list(boxes))


def _checked_weights(op: str, weights: Sequence[float]) -> tuple[float, ...]:
    numbers = _checks.numbers(op, "weights", weights)
    if len(numbers) != 4 or not all(0 < weight < math.inf for weight in numbers):
        raise ValueError(f"{op}: weights must be 4 positive numbers, got {numbers}")
    return numbers


def _share(op: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same leading dimensions, as views, and in dtypes that the op takes together."""
    _checks.check_tensors(op, **{first_name: first, second_name: second})
    _library.refuse_forward_mode(op, first, second)
    if first.dtype != second.dtype:
        _checks.check_real(op, **{first_name: first, second_name: second})
        dtype = _checks.promoted(op, first_name, first, second_name, second)
        second = second.to(dtype)
        if dtype != torch.float32 or not first.is_floating_point():  # a half may be paired with float32
            first = first.to(dtype)
    if first.shape[:-1] == second.shape[:-1]:
        return first, second
    try:
        shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    except RuntimeError:
        raise RuntimeError(
            f"{op}: {second_name} must have leading dimensions that broadcast with {first_name} {list(first.shape)}, "
            f"got {list(second.shape)}"
        ) from None
    return _expanded(first, shape), _expanded(second, shape)


def _expanded(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows if rows.ndim == 0 else rows.expand(*shape, rows.shape[-1])


def _share_points(op: str, first_name: str, first: Tensor, points: Tensor, strides: Tensor | None):
    first, points = _share(op, first_name, first, "points", points)
    if strides is None:
        return first, points, None
    _checks.check_tensors(op, strides=strides)
    if strides.requires_grad:
        raise RuntimeError(f"{op}: strides must not require a gradient, got requires_grad=True; detach them")
    _checks.check_real(op, strides=strides)
    strides = strides.to(points.dtype)
    if strides.shape != points.shape[:-1]:
        try:
            strides = strides.expand(points.shape[:-1])
        except RuntimeError:
            raise RuntimeError(
                f"{op}: strides must have dimensions that broadcast to {list(points.shape[:-1])}, "
                f"got {list(strides.shape)}"
            ) from None
    return first, points, strides


@register_fake("encode_boxes")
def _(boxes: Tensor, anchors: Tensor, weights: list[float]) -> Tensor:
    return anchors.new_empty(boxes.shape)


@register_fake("decode_boxes")
def _(deltas: Tensor, anchors: Tensor, weights: list[float], clip: float) -> Tensor:
    return anchors.new_empty(deltas.shape)


@register_fake("encode_ltrb")
def _(boxes: Tensor, points: Tensor, strides: Tensor | None, max_distance: float | None) -> Tensor:
    return points.new_empty(boxes.shape)


@register_fake("decode_ltrb")
def _(distances: Tensor, points: Tensor, strides: Tensor | None) -> Tensor:
    return points.new_empty(distances.shape)


def _fake_backward(grad: Tensor, first: Tensor, second: Tensor, *options) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), second.new_empty(second.shape if options[-1] else (0,))


_PAIRED = ("encode_boxes", "decode_boxes", "encode_ltrb", "decode_ltrb")
for _name in _PAIRED:
    register_fake(f"{_name}_backward")(_fake_backward)


@register_fake("decode_dfl")
def _(logits: Tensor, dim: int) -> Tensor:
    if not -logits.ndim <= dim < logits.ndim:
        raise RuntimeError(f"decode_dfl: dim must be a dimension of logits {list(logits.shape)}, got {dim}")
    sizes = list(logits.shape)
    del sizes[dim]
    return logits.new_empty(sizes)


@register_fake("decode_dfl_backward")
def _(grad: Tensor, logits: Tensor, dim: int) -> Tensor:
    return logits.new_empty(logits.shape)


@register_fake("decode_yolo")
def _(raw: list[Tensor], anchors: Tensor, strides: list[float], version: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(anchors.shape[1] * level.shape[2] * level.shape[3] for level in raw)
    images, classes = raw[0].shape[0], raw[0].shape[1] // anchors.shape[1] - 5
    return (
        anchors.new_empty(images, rows, 4),
        raw[0].new_empty(images, rows),
        raw[0].new_empty(images, rows, classes),
    )


@register_fake("decode_yolo_backward")
def _(grad_boxes, grad_objectness, grad_scores, raw, anchors, strides, version) -> list[Tensor]:
    return [torch.empty_like(level) for level in raw]


for _name in (*_PAIRED, "decode_dfl", "decode_yolo"):
    register_gradient(_name)
