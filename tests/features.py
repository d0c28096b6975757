"""A small call of every public function whose work is a compiled op, for the tests that ask the same of all of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

import detops


class Call(NamedTuple):
    """`function(*inputs(n))` is the call; another `n`, from 6 on, gives other sizes."""

    function: Callable
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    predicted: int = 1  # so many of the inputs come out of a network, under autocast in low precision
    counts: bool = False  # the number of results depends on the data


def boxes(*shape: int) -> torch.Tensor:
    """Boxes within 32 x 32 pixels."""
    corner = _random(*shape, 2) * 24
    return torch.cat((corner, corner + 1 + _random(*shape, 2) * 7), -1)


def _random(*shape: int) -> torch.Tensor:
    """Numbers in [0, 1) that float16 and bfloat16 hold exactly."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 128, shape, generator=generator) / 128


def _labels(*shape: int) -> torch.Tensor:
    return (_random(*shape) * 3).long()


def _pair(n):
    return boxes(n), boxes(n + 1)


def _aligned(n):
    return boxes(n), boxes(n).flip(0)


def _rotated(*shape):
    return torch.cat((boxes(*shape), _random(*shape, 1)), -1)


def _logits(n):
    return _random(n, 4) * 4 - 2, _random(n, 4)


def _regions(n, channels=4):
    return _random(2, channels, 16, 16), torch.cat((_labels(n, 1) % 2, boxes(n) / 2), -1)


def _points(n):
    return detops.point_anchors([(n, 4)], [8]).points


def _ground_truth(n):
    """Boxes, labels and validity of two images."""
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, 1:] = False
    return boxes(2, n), _labels(2, n), valid


def _matched(n):
    return boxes(n + 8), boxes(2, n), _ground_truth(n)[2]


YOLO_ANCHORS = torch.tensor([[[4.0, 4], [8, 6]], [[12, 10], [16, 20]]])

CALLS = {
    # Suppression
    "nms": Call(lambda b, s: detops.nms(b, s, 0.5), lambda n: (boxes(n), _random(n)), predicted=2, counts=True),
    "batched_nms": Call(
        lambda b, s, i: detops.batched_nms(b, s, i, 0.5),
        lambda n: (boxes(n), _random(n), _labels(n)),
        predicted=2,
        counts=True,
    ),
    "multiclass_nms": Call(
        lambda b, s: detops.multiclass_nms(b, s, max_detections=5),
        lambda n: (boxes(2, n), _random(2, n, 3)),
        predicted=2,
    ),
    "nms_rotated": Call(
        lambda b, s: detops.nms_rotated(b, s, 0.5), lambda n: (_rotated(n), _random(n)), predicted=2, counts=True
    ),
    # IoU
    "box_iou": Call(detops.box_iou, _pair),
    "generalized_box_iou": Call(detops.generalized_box_iou, _pair),
    "distance_box_iou": Call(detops.distance_box_iou, _pair),
    "complete_box_iou": Call(detops.complete_box_iou, _pair),
    "efficient_box_iou": Call(detops.efficient_box_iou, _pair),
    "box_ioa": Call(detops.box_ioa, _pair),
    "max_iou": Call(detops.max_iou, _pair, predicted=0),
    # Boxes
    "box_area": Call(detops.box_area, lambda n: (boxes(n),)),
    "box_convert": Call(lambda b: detops.box_convert(b, "xyxy", "cxcywh"), lambda n: (boxes(n),)),
    "clip_boxes_to_image": Call(lambda b: detops.clip_boxes_to_image(b, (20, 20)), lambda n: (boxes(n),)),
    "remove_small_boxes": Call(lambda b: detops.remove_small_boxes(b, 4), lambda n: (boxes(n),), counts=True),
    "masks_to_boxes": Call(detops.masks_to_boxes, lambda n: (_random(n, 7, 8) > 0.75,), predicted=0),
    "pad_ground_truth": Call(
        lambda b, c, bl, cl: detops.pad_ground_truth([b, c], [bl, cl]),
        lambda n: (boxes(n), boxes(n + 1), _labels(n), _labels(n + 1)),
        predicted=2,
    ),
    # Losses
    "generalized_box_iou_loss": Call(detops.generalized_box_iou_loss, _aligned),
    "distance_box_iou_loss": Call(detops.distance_box_iou_loss, _aligned),
    "complete_box_iou_loss": Call(detops.complete_box_iou_loss, _aligned),
    "efficient_box_iou_loss": Call(detops.efficient_box_iou_loss, _aligned),
    "siou_loss": Call(detops.siou_loss, _aligned),
    "sigmoid_focal_loss": Call(detops.sigmoid_focal_loss, _logits),
    "quality_focal_loss": Call(detops.quality_focal_loss, lambda n: (_logits(n)[0], _labels(n), _random(n))),
    "varifocal_loss": Call(detops.varifocal_loss, _logits),
    "distribution_focal_loss": Call(detops.distribution_focal_loss, lambda n: (_random(n, 8) * 4 - 2, _random(n) * 7)),
    # Regions of interest
    "roi_align": Call(lambda x, r: detops.roi_align(x, r, 2), _regions),
    "multi_scale_roi_align": Call(
        lambda x, y, r: detops.multi_scale_roi_align([x, y], r, 2, spatial_scales=[0.5, 0.25], sampling_ratio=2),
        lambda n: (_random(2, 4, 16, 16), _random(2, 4, 8, 8), _regions(n)[1]),
        predicted=2,
    ),
    "roi_align_rotated": Call(
        lambda x, r: detops.roi_align_rotated(x, r, 2),
        lambda n: (_regions(n)[0], torch.cat((_labels(n, 1) % 2, _rotated(n) / 2), -1)),
    ),
    "roi_pool": Call(lambda x, r: detops.roi_pool(x, r, 2), _regions),
    "ps_roi_align": Call(lambda x, r: detops.ps_roi_align(x, r, 2), _regions),
    "ps_roi_pool": Call(lambda x, r: detops.ps_roi_pool(x, r, 2), _regions),
    # Anchors and coders
    "encode_boxes": Call(detops.encode_boxes, _aligned),
    "decode_boxes": Call(detops.decode_boxes, lambda n: (_random(2, n, 4), boxes(n))),
    "encode_ltrb": Call(detops.encode_ltrb, lambda n: (boxes(2, 4 * n), _points(n))),
    "decode_ltrb": Call(detops.decode_ltrb, lambda n: (_random(2, 4 * n, 4), _points(n))),
    "decode_dfl": Call(detops.decode_dfl, lambda n: (_random(n, 4, 8),)),
    "decode_yolo": Call(
        lambda x, y, a: detops.decode_yolo([x, y], a, [8, 16], version="v5"),
        lambda n: (_random(2, 16, n, n), _random(2, 16, n + 1, n), YOLO_ANCHORS),
        predicted=2,
    ),
    # Matching
    "match_max_iou": Call(
        lambda a, g, v: detops.match_max_iou(
            a, g, v, high_threshold=0.5, low_threshold=0.3, allow_low_quality_matches=True
        ),
        _matched,
        predicted=0,
    ),
    "match_ssd": Call(detops.match_ssd, _matched, predicted=0),
    "assign_atss": Call(
        lambda a, g, v: detops.assign_atss(a, [a.shape[0] - 4, 4], g, v, topk=3), _matched, predicted=0
    ),
    "sample_matches": Call(
        lambda indices: detops.sample_matches(indices, 64, 0.5), lambda n: (_labels(2, n) - 1,), predicted=0
    ),
    "linear_sum_assignment": Call(detops.linear_sum_assignment, lambda n: (_random(2, n + 2, n),)),
    "match_detr": Call(
        detops.match_detr, lambda n: (_random(2, n + 4, 3), boxes(2, n + 4) / 32, *_ground_truth(n)), predicted=2
    ),
    # YOLO
    "assign_task_aligned": Call(
        lambda s, b, p, g, c, v: detops.assign_task_aligned(s, b, p, c, g, v),
        lambda n: (_random(2, 4 * n, 3), boxes(2, 4 * n), _points(n), *_ground_truth(3)),
        predicted=2,
    ),
    "assign_simota": Call(
        lambda s, o, b, p, g, c, v: detops.assign_simota(s, o, b, p, torch.full_like(p[:, 0], 8), g, c, v),
        lambda n: (_random(2, 4 * n, 3), _random(2, 4 * n), boxes(2, 4 * n), _points(n), *_ground_truth(3)),
        predicted=3,
    ),
    "assign_yolov5": Call(
        lambda g, c, v, a: detops.assign_yolov5(g, c, v, a, [8, 16], (32, 32)),
        lambda n: (*_ground_truth(n), YOLO_ANCHORS),
        predicted=0,
    ),
    "yolov5_target_lists": Call(
        lambda t, a: detops.yolov5_target_lists(t, a, [(4, 4), (2, 2)]),
        lambda n: (torch.cat((_labels(n, 2) % 2, 0.5 + _random(n, 4) / 4), -1), YOLO_ANCHORS / 8),
        predicted=0,
        counts=True,
    ),
    "assign_yolov3": Call(
        lambda g, c, v, a: detops.assign_yolov3(g, c, v, a, [8, 16], (32, 32)),
        lambda n: (*_ground_truth(n), YOLO_ANCHORS),
        predicted=0,
    ),
    "assign_yolo_grid": Call(
        lambda g, c, v: detops.assign_yolo_grid(g, c, v, grid_size=4, image_size=(32, 32), num_classes=3),
        _ground_truth,
        predicted=0,
    ),
    "decode_yolo_grid": Call(
        lambda t: detops.decode_yolo_grid(t, image_size=(32, 32)), lambda n: (_random(2, n, n, 8),)
    ),
    "yolo_loss": Call(
        detops.yolo_loss,
        lambda n: (
            _random(2, 4, 4, 8),
            detops.assign_yolo_grid(*_ground_truth(n), grid_size=4, image_size=(32, 32), num_classes=3),
        ),
    ),
}
