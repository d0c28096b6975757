"""nms, batched_nms and multiclass_nms against torchvision, which they replace.

torchvision runs on the CPU: its CUDA kernel narrows the threshold to float32.
"""

import pytest
import torch

import detops
import inputs
from inputs import KINDS, THRESHOLDS, to_torch


@pytest.fixture
def by_class(torchvision):
    """The loop over classes: torchvision's usual path adds offsets, which is where its bugs are."""
    return torchvision.ops.boxes._batched_nms_vanilla


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_nms_equals_torchvision(device, torchvision, kind, dtype):
    n = device.limit(3000)
    boxes = to_torch(KINDS[kind](n), dtype)
    for scores in (inputs.distinct_scores(n), inputs.tied_scores(n, levels=50), inputs.odd_scores(n)):
        scores = to_torch(scores, dtype)
        for iou_threshold in THRESHOLDS:
            expected = torchvision.ops.nms(boxes, scores, iou_threshold).tolist()
            assert detops.nms(boxes.to(device.torch), scores.to(device.torch), iou_threshold).tolist() == expected


@pytest.mark.parametrize("name", inputs.EDGES)
def test_nms_equals_torchvision_at_the_edges(device, torchvision, name):
    boxes = to_torch(inputs.edge_boxes(name))
    scores = to_torch(inputs.distinct_scores(len(boxes)))
    for iou_threshold in THRESHOLDS:
        expected = torchvision.ops.nms(boxes, scores, iou_threshold).tolist()
        assert detops.nms(boxes.to(device.torch), scores.to(device.torch), iou_threshold).tolist() == expected


@pytest.mark.parametrize("iou_threshold", THRESHOLDS)
def test_nms_equals_torchvision_on_the_threshold(torchvision, iou_threshold):
    scores, suppressed = torch.tensor([0.9, 0.8]), 0
    for pair in inputs.pairs_on_threshold(iou_threshold, n=16).reshape(-1, 2, 4):
        expected = torchvision.ops.nms(to_torch(pair), scores, iou_threshold).tolist()
        assert detops.nms(to_torch(pair), scores, iou_threshold).tolist() == expected
        suppressed += expected == [0]
    assert suppressed > 0 or iou_threshold == 1  # the pairs lie on both sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [80, 1000])
def test_batched_nms_equals_torchvision_per_class(device, by_class, classes, kind, dtype):
    n = device.limit(3000)
    boxes, ids = to_torch(KINDS[kind](n), dtype), to_torch(inputs.class_ids(n, classes))
    scores = to_torch(inputs.distinct_scores(n), dtype)
    for iou_threshold in (0.1, 0.5, 0.9):
        expected = by_class(boxes, scores, ids, iou_threshold).tolist()
        keep = detops.batched_nms(boxes.to(device.torch), scores.to(device.torch), ids.to(device.torch), iou_threshold)
        assert keep.tolist() == expected


def test_torchvision_merges_classes_at_negative_coordinates_and_detops_does_not(torchvision):
    # max + 1 is -199, so class 1 is moved by -199 onto class 0.
    boxes = torch.tensor([[-500.0, -500, -400, -400], [-301, -301, -201, -201], [-300, -300, -200, -200]])
    scores, ids = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0, 1, 2])
    assert torchvision.ops.boxes._batched_nms_coordinate_trick(boxes, scores, ids, 0.5).tolist() != [0, 1, 2]
    assert detops.batched_nms(boxes, scores, ids, 0.5).tolist() == [0, 1, 2]


def test_torchvision_loses_precision_with_1000_classes_and_detops_does_not(torchvision, by_class):
    # Offsets of up to 1e6 round the corners.
    boxes = to_torch(inputs.clustered_boxes(2000, per_object=500, jitter=0.3))
    ids, scores = to_torch(inputs.class_ids(2000, 1000)), to_torch(inputs.distinct_scores(2000))
    expected = by_class(boxes, scores, ids, 0.5).tolist()
    assert torchvision.ops.boxes._batched_nms_coordinate_trick(boxes, scores, ids, 0.5).tolist() != expected
    assert detops.batched_nms(boxes, scores, ids, 0.5).tolist() == expected


@pytest.mark.parametrize("boxes_per_class", [False, True])
def test_multiclass_nms_equals_the_loop_over_images(device, by_class, boxes_per_class):
    arrays = inputs.batch(3, device.limit(1000, 40), 10, boxes_per_class=boxes_per_class)
    boxes, scores = (to_torch(array) for array in arrays)
    detections = detops.multiclass_nms(boxes.to(device.torch), scores.to(device.torch), max_detections=200)
    for image in range(3):
        indices, labels = (scores[image] > 0.05).nonzero().unbind(1)
        pairs = boxes[image, indices, labels] if boxes_per_class else boxes[image, indices]
        best = scores[image, indices, labels]
        keep = by_class(pairs, best, labels, 0.5)[:200]
        found = [field[image, : len(keep)].tolist() for field in detections[:4]]
        assert found == [pairs[keep].tolist(), best[keep].tolist(), labels[keep].tolist(), indices[keep].tolist()]
        assert detections.counts[image].item() == len(keep)


def test_results_of_tv_tensors_are_plain_tensors(device, torchvision):
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    corners, scores = to_torch(inputs.clustered_boxes(30), device=device.torch), torch.rand(30, device=device.torch)
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(1000, 1000))
    calls = {
        "nms": lambda boxes: [detops.nms(boxes, scores, 0.5)],
        "batched_nms": lambda boxes: [detops.batched_nms(boxes, scores, scores.long(), 0.5)],
        "nms_rotated": lambda boxes: [detops.nms_rotated(torch.cat([boxes, boxes[:, :1]], 1), scores, 0.5)],
        "multiclass_nms": lambda boxes: detops.multiclass_nms(boxes[None], scores[None, :, None]),
    }
    for name, call in calls.items():
        for kind in ("TVTensor", "Tensor"):
            with tv_tensors.set_return_type(kind):
                results = call(boxes)
            assert [type(each) for each in results] == [torch.Tensor] * len(results), name
            assert all(map(torch.equal, results, call(corners)))
