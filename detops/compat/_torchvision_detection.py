"""detops in place of the parts of torchvision's detection models."""

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import detops

from ..anchors import makes_plain_tensors
from ._torchvision_ops import floating, instead_of, takes, takes_composed, within

_UTILS = "torchvision.models.detection._utils"
_ANCHORS = "torchvision.models.detection.anchor_utils"


@instead_of(_UTILS, "Matcher.__call__")
def _match(original, self, match_quality_matrix):
    qualities = match_quality_matrix
    served = takes(qualities) and floating(qualities) and qualities.ndim == 2 and qualities.numel() > 0
    served = served and self.low_threshold <= self.high_threshold
    if not served or _has_own(self, original.__globals__["Matcher"], "set_low_quality_matches_"):
        return original(self, qualities)
    return detops.Matcher(self.high_threshold, self.low_threshold, self.allow_low_quality_matches)(qualities)


def _has_own(instance, base: type, *methods: str) -> bool:
    """Whether it has other methods than torchvision's class."""
    return not isinstance(instance, base) or any(
        name in vars(instance) or getattr(type(instance), name, None) is not getattr(base, name, None)
        for name in methods
    )


@instead_of(_UTILS, "BoxCoder.encode_single")
def _encode_single(original, self, reference_boxes, proposals):
    if takes_composed(reference_boxes, proposals) and floating(reference_boxes, proposals) and _weighs(self):
        if reference_boxes.shape == proposals.shape == (len(proposals), 4):
            return detops.encode_boxes(reference_boxes, proposals, self.weights)
    return original(self, reference_boxes, proposals)


@instead_of(_UTILS, "BoxCoder.decode_single")
def _decode_single(original, self, rel_codes, boxes):
    served = takes_composed(rel_codes, boxes) and floating(rel_codes, boxes) and _weighs(self)
    if not served or rel_codes.ndim != 2 or rel_codes.shape[1] % 4 or boxes.shape != (rel_codes.shape[0], 4):
        return original(self, rel_codes, boxes)
    deltas = rel_codes.unflatten(1, (-1, 4))
    return detops.decode_boxes(deltas, boxes[:, None], self.weights, self.bbox_xform_clip).flatten(1).to(rel_codes)


def _weighs(coder) -> bool:
    return (
        len(coder.weights) == 4
        and all(within(0, weight) and weight > 0 for weight in coder.weights)
        and within(-math.inf, coder.bbox_xform_clip, math.inf)
    )


@instead_of(_ANCHORS, "AnchorGenerator.forward")
def _generate_anchors(original, self, image_list, feature_maps):
    own = _has_own(
        self, original.__globals__["AnchorGenerator"], "generate_anchors", "grid_anchors", "set_cell_anchors"
    )
    if own or not _makes_anchors_for(feature_maps):
        return original(self, image_list, feature_maps)
    self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)  # as torchvision leaves them
    generator = _agreeing(self, _anchor_generator, self.cell_anchors)
    if generator is None or len(feature_maps) != len(self.cell_anchors):
        return original(self, image_list, feature_maps)
    height, width = image_list.tensors.shape[-2:]
    if any(not 0 < h <= height or not 0 < w <= width for h, w in (each.shape[-2:] for each in feature_maps)):
        return original(self, image_list, feature_maps)  # strides of 0
    return [each.clone() for each in generator(image_list, feature_maps)]


def _anchor_generator(generator):
    ours = detops.AnchorGenerator(generator.sizes, generator.aspect_ratios)
    count = len(ours.sizes)
    cells = detops.grid_anchors([(1, 1)] * count, [1] * count, ours.sizes, ours.aspect_ratios)
    return ours, cells.split(ours.num_anchors_per_location())


@instead_of(_ANCHORS, "DefaultBoxGenerator.forward")
def _generate_default_boxes(original, self, image_list, feature_maps):
    own = _has_own(self, original.__globals__["DefaultBoxGenerator"], "_generate_wh_pairs", "_grid_default_boxes")
    if own or not _makes_anchors_for(feature_maps) or feature_maps[0].dtype not in (torch.float32, torch.float64):
        return original(self, image_list, feature_maps)
    generator = _agreeing(self, _default_box_generator, self._wh_pairs)
    if generator is None or len(feature_maps) != len(self._wh_pairs):
        return original(self, image_list, feature_maps)
    return [each.clone() for each in generator(image_list, feature_maps)]


def _default_box_generator(generator):
    options = {name: getattr(generator, name) for name in ("aspect_ratios", "scales", "steps", "clip")}
    ours = detops.DefaultBoxGenerator(**options)
    single = {"dtype": torch.float32, "device": "cpu"}
    return ours, [torch.tensor(ours._sides(k), **single) for k in range(len(ours.aspect_ratios))]


def _makes_anchors_for(maps) -> bool:
    real = len(maps) > 0 and all(type(each) is Tensor and each.device.type != "meta" for each in maps)
    return real and takes(*maps) and floating(*maps) and makes_plain_tensors()


# By torchvision's generator: the options that were looked at, the tensors with their versions, and ours if they agree.
_known_generators: WeakKeyDictionary = WeakKeyDictionary()


def _agreeing(generator, make: Callable, held: list[Tensor]):
    """The generator of detops, if what torchvision's holds is what its options say; else None.

    It may hold other anchors: it can be changed, and half precision once rounds them for good.
    """
    options = repr([getattr(generator, name, None) for name in ("sizes", "aspect_ratios", "scales", "steps", "clip")])
    tracked = not any(each.is_inference() for each in held)  # others have no versions
    state = options, [(each, each._version if tracked else 0) for each in held]
    known = _known_generators.get(generator)
    if known is None or not tracked or not _same_state(known[0], state):
        try:
            ours, expected = make(generator)
        except ValueError:
            ours, expected = None, ()
        agree = len(held) == len(expected) and all(
            each.shape == other.shape and torch.equal(each, other.to(each))
            for each, other in zip(held, expected, strict=True)
        )
        known = _known_generators[generator] = state, ours if agree else None
    return known[1]


def _same_state(one, other) -> bool:
    pairs = zip(one[1], other[1], strict=False)
    return (
        one[0] == other[0]
        and len(one[1]) == len(other[1])
        and all(a is b and version == now for (a, version), (b, now) in pairs)
    )


@instead_of("torchvision.models.detection.retinanet", "RetinaNet.postprocess_detections")
def _postprocess_retinanet(original, self, head_outputs, anchors, image_shapes):
    logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    if (
        not takes(*logits, *deltas)
        or not floating(*logits)
        or not _limits_are_plain(self)
        or not 0 < self.score_thresh < 1
    ):
        return original(self, head_outputs, anchors, image_shapes)
    best = [
        _best_of_level(level_deltas, level_logits, self.score_thresh, self.topk_candidates)
        for level_deltas, level_logits in zip(deltas, logits, strict=True)
    ]
    counts = torch.stack([level.counts for level in best]).tolist()
    detections = []
    for image, shape in enumerate(image_shapes):
        parts = [], [], [], []  # gathered from the inputs, which may want gradients
        for level, (found, level_counts) in enumerate(zip(best, counts, strict=True)):
            rows, classes = (each[image, : level_counts[image]] for each in (found.indices, found.labels))
            level_parts = logits[level][image, rows, classes], classes, deltas[level][image, rows]
            for part, each in zip(parts, (*level_parts, anchors[image][level][rows]), strict=True):
                part.append(each)
        image_logits, labels, image_deltas, image_anchors = map(torch.cat, parts)
        scores = image_logits.sigmoid()
        (above,) = torch.where(scores > self.score_thresh)
        if len(above) < len(scores):
            scores, labels = scores[above], labels[above]
            image_deltas, image_anchors = image_deltas[above], image_anchors[above]
        boxes = detops.clip_boxes_to_image(self.box_coder.decode_single(image_deltas, image_anchors), shape)
        keep = detops.batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
    return detections


def _best_of_level(deltas: Tensor, logits: Tensor, score_threshold: float, count: int) -> detops.Detections:
    """The best candidates of each image, at most `count`: all whose score may be above the threshold, by their logits.

    NMS that suppresses nothing. torch.topk would need the scores of all and a copy of those above the threshold, whose
    number the host would have to ask for; this reads the logits once. Of the boxes only their number matters.
    """
    # A score above the threshold is computed in float32 at least, to 4 ulp, and rounding keeps the order: so sigmoid(x)
    # is at least this, and x its logit. Results are those above it strictly, once it is rounded to the logits' dtype,
    # so it is lowered by more than one step of that.
    least = score_threshold * (1 - 2**-21)
    logit = math.log(least / (1 - least))
    return detops.multiclass_nms(
        deltas,
        logits,
        iou_threshold=1.0,
        score_threshold=logit - torch.finfo(logits.dtype).eps * (1 + abs(logit)),
        max_detections=count,
        max_candidates=count,
    )


@instead_of("torchvision.models.detection.ssd", "SSD.postprocess_detections")
def _postprocess_ssd(original, self, head_outputs, image_anchors, image_shapes):
    logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
    if not takes(logits, deltas) or not floating(logits) or not _limits_are_plain(self) or logits.shape[-1] < 2:
        return original(self, head_outputs, image_anchors, image_shapes)
    # Each class stands as an image of its own: it has its own best candidates.
    scores = logits.softmax(-1)[..., 1:].transpose(1, 2).contiguous()
    detections = []
    for image_deltas, class_scores, anchors, shape in zip(deltas, scores, image_anchors, image_shapes, strict=False):
        boxes = detops.clip_boxes_to_image(self.box_coder.decode_single(image_deltas, anchors), shape)
        found = detops.multiclass_nms(
            boxes.expand(len(class_scores), -1, -1),
            class_scores[..., None],
            iou_threshold=self.nms_thresh,
            score_threshold=self.score_thresh,
            max_detections=self.detections_per_img,
            max_candidates=self.topk_candidates,
        )
        label, rank = torch.where(found.labels == 0)
        best = found.scores[label, rank].sort(descending=True, stable=True).indices[: self.detections_per_img]
        label, row = label[best], found.indices[label[best], rank[best]]
        # Gathered from the inputs, which may want gradients.
        detections.append({"boxes": boxes[row], "scores": class_scores[label, row], "labels": label + 1})
    return detections


def _limits_are_plain(model) -> bool:
    limits = model.topk_candidates, model.detections_per_img
    return (
        within(0, model.nms_thresh, math.inf)
        and within(-math.inf, model.score_thresh, math.inf)
        and all(isinstance(limit, int) and limit >= 0 for limit in limits)
    )
