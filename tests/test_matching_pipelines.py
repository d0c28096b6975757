"""From the boxes of a scene to the full target tensors of the published detectors, against the same pipelines in
NumPy, image by image and anchor by anchor."""

import numpy as np
import pytest
import torch

import detops
from inputs import to_numpy
from reference import coders, matching
from reference import linear_sum_assignment as assignment

CLASSES = 5
HEIGHT, WIDTH = 64, 96


def scene(images=3, gts=6, seed=0):
    """Ground truth of a generated scene, padded: boxes [B, M, 4], labels, valid; one image is empty."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, [WIDTH, HEIGHT], (images, gts, 2))
    sides = np.exp(rng.uniform(np.log(6), np.log(60), (images, gts, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], -1)
    boxes = np.clip(boxes, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
    valid = np.arange(gts) < np.array([gts, 0, *[gts - 2] * images])[:images, None]
    boxes[~valid] = np.nan
    return boxes, np.where(valid, rng.integers(0, CLASSES, (images, gts)), -1), valid


def pyramid(strides=(8, 16, 32), scale=2, ratios=(0.5, 1, 2)):
    """(anchors [A, 4], level sizes)."""
    levels = []
    for stride in strides:
        x, y = np.meshgrid(np.arange(0, WIDTH, stride) + stride / 2, np.arange(0, HEIGHT, stride) + stride / 2)
        half = np.array([[scale * stride / ratio**0.5, scale * stride * ratio**0.5] for ratio in ratios]) / 2
        centres = np.stack([x, y], -1).reshape(-1, 1, 2)
        levels.append(np.concatenate([centres - half, centres + half], -1).reshape(-1, 4))
    return np.concatenate(levels), [len(level) for level in levels]


def put(device, *arrays):
    return [device.put(each) for each in arrays]


def in_numpy(*tensors):
    return [to_numpy(each) for each in tensors]


def take(rows, indices):
    """rows[b, indices[b, i]], with row 0 for negative indices."""
    spread = indices.clamp(min=0)
    return rows.gather(1, spread[..., None].expand(*spread.shape, rows.shape[-1]) if rows.ndim == 3 else spread)


def targets_of(matches, anchors, gt_boxes, gt_labels, background, weights=(1.0, 1.0, 1.0, 1.0)):
    """(classes [B, A], deltas [B, A, 4]): -1 where ignored; deltas are 0 where nothing is matched."""
    classes = torch.where(matches >= 0, take(gt_labels, matches), background)
    classes = torch.where(matches == -2, -1, classes)
    deltas = detops.encode_boxes(take(gt_boxes, matches), anchors, weights)
    return classes, torch.where(matches[..., None] >= 0, deltas, 0)


def expected_targets(matches, anchors, gt_boxes, gt_labels, background, weights=(1, 1, 1, 1)):
    """The same, of one image."""
    classes, deltas = np.full(len(anchors), background), np.zeros((len(anchors), 4), anchors.dtype)
    for a, gt in enumerate(matches):
        if gt == -2:
            classes[a] = -1
        elif gt >= 0:
            classes[a] = gt_labels[gt]
            deltas[a] = coders.encode_boxes(gt_boxes[gt], anchors[a], weights)
    return classes, deltas


def compare(found, expected):
    """Integers exactly, floats to the rounding of a few operations."""
    for got, image in zip(in_numpy(*found), zip(*expected, strict=True), strict=True):
        want = np.stack(image)
        if got.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, want)


def drawn_keys(device, shape, seed):
    """What sample_matches draws with a generator of this seed."""
    generator = torch.Generator(device.torch).manual_seed(seed)
    return to_numpy(torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device.torch, generator=generator))


@pytest.mark.parametrize(("high", "low"), [(0.7, 0.3), (0.5, 0.1)])
def test_rpn(device, high, low):
    """Objectness and offsets of 32 sampled anchors an image."""
    arrays, anchors = scene(), pyramid()[0]
    boxes, labels, valid, anchors = put(device, *arrays, anchors)
    found = detops.match_max_iou(
        *(anchors, boxes, valid), high_threshold=high, low_threshold=low, allow_low_quality_matches=True
    )
    generator = torch.Generator(device.torch).manual_seed(7)
    samples = detops.sample_matches(found, 32, 0.5, generator=generator)
    objectness, deltas = targets_of(found.indices, anchors, boxes, torch.ones_like(labels), 0)
    got = samples.indices, take(objectness, samples.indices), take(deltas, samples.indices), samples.counts

    boxes, valid, anchors = in_numpy(boxes, valid, anchors)
    keys = drawn_keys(device, found.indices.shape, 7)
    expected = []
    for image in range(len(boxes)):
        matches, _ = matching.match_max_iou(anchors, boxes[image], valid[image], high, low, allow_low_quality=True)
        chosen, _, count = matching.sample_matches(matches, keys[image], 32, 16)
        objectness, deltas = expected_targets(matches, anchors, boxes[image], np.ones(len(boxes[image]), int), 0)
        rows = np.maximum(chosen, 0)
        expected.append((chosen, objectness[rows], deltas[rows], count))
    compare(got, expected)
    assert (got[1] == 1).sum() >= valid.sum() and samples.counts.tolist() == [32] * 3


def test_fast_rcnn(device):
    """Classes, background last, and offsets of 16 sampled proposals an image, among them the ground truth itself."""
    boxes, labels, valid = scene()
    rng = np.random.default_rng(1)
    near = np.where(valid[..., None], boxes, [0, 0, 20, 20])[:, rng.integers(0, 6, 60)]
    proposals = near + rng.normal(0, 3, near.shape)
    proposals = np.concatenate([proposals, np.where(valid[..., None], boxes, 0)], 1)
    boxes, labels, valid, proposals = put(device, boxes, labels, valid, proposals)
    weights = (10.0, 10.0, 5.0, 5.0)
    found = detops.match_max_iou(proposals, boxes, valid, high_threshold=0.5, low_threshold=0.5)
    generator = torch.Generator(device.torch).manual_seed(3)
    samples = detops.sample_matches(found, 16, 0.25, generator=generator)
    classes, deltas = targets_of(found.indices, proposals, boxes, labels, CLASSES, weights)
    got = samples.indices, take(classes, samples.indices), take(deltas, samples.indices), samples.positive_counts

    boxes, labels, valid, proposals = in_numpy(boxes, labels, valid, proposals)
    keys = drawn_keys(device, found.indices.shape, 3)
    expected = []
    for image in range(len(boxes)):
        matches, _ = matching.match_max_iou(proposals[image], boxes[image], valid[image], 0.5, 0.5)
        chosen, positives, _ = matching.sample_matches(matches, keys[image], 16, 4)
        classes, deltas = expected_targets(matches, proposals[image], boxes[image], labels[image], CLASSES, weights)
        rows = np.maximum(chosen, 0)
        expected.append((chosen, classes[rows], deltas[rows], positives))
    compare(got, expected)
    assert samples.positive_counts.tolist() == [4, 0, 4]


def test_retinanet(device):
    """The class of every anchor as the focal losses take it: background C, ignored -1; and its offsets."""
    boxes, labels, valid, anchors = put(device, *scene(seed=2), pyramid()[0])
    found = detops.match_max_iou(
        *(anchors, boxes, valid), high_threshold=0.5, low_threshold=0.4, allow_low_quality_matches=True
    )
    got = targets_of(found.indices, anchors, boxes, labels, CLASSES)
    arrays = in_numpy(boxes, labels, valid)
    anchors = to_numpy(anchors)
    expected = []
    for image_boxes, image_labels, image_valid in zip(*arrays, strict=True):
        matches, _ = matching.match_max_iou(anchors, image_boxes, image_valid, 0.5, 0.4, allow_low_quality=True)
        expected.append(expected_targets(matches, anchors, image_boxes, image_labels, CLASSES))
    compare(got, expected)
    assert {-1, CLASSES} < set(got[0].flatten().tolist()) and (got[0][1] == CLASSES).all()


def test_ssd(device):
    """The class of every default box, background first, and its offsets; each object has at least one."""
    boxes, labels, valid, anchors = put(device, *scene(seed=3), pyramid(ratios=(1, 0.4))[0])
    weights = (10.0, 10.0, 5.0, 5.0)
    found = detops.match_ssd(anchors, boxes, valid, threshold=0.5)
    got = targets_of(found.indices, anchors, boxes, labels + 1, 0, weights)
    arrays = in_numpy(boxes, labels, valid)
    anchors = to_numpy(anchors)
    expected = []
    for image_boxes, image_labels, image_valid in zip(*arrays, strict=True):
        matches, _ = matching.match_ssd(anchors, image_boxes, image_valid, 0.5)
        expected.append(expected_targets(matches, anchors, image_boxes, image_labels + 1, 0, weights))
    compare(got, expected)
    assert set(found.indices[0].tolist()) >= set(range(6)) and (got[0] >= 0).all()


def test_atss(device):
    """The class of every anchor, background C, its offsets, and its centre-ness."""
    anchors, sizes = pyramid(scale=4, ratios=(1,))
    boxes, labels, valid, anchors = put(device, *scene(seed=4), anchors)
    found = detops.assign_atss(anchors, sizes, boxes, valid)
    classes, deltas = targets_of(found.indices, anchors, boxes, labels, CLASSES, (10.0, 10.0, 5.0, 5.0))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    left, top, right, bottom = detops.encode_ltrb(take(boxes, found.indices), centres).unbind(-1)
    share = torch.minimum(left, right) / torch.maximum(left, right)
    share = share * (torch.minimum(top, bottom) / torch.maximum(top, bottom))
    centreness = torch.where(found.indices >= 0, share.sqrt(), 0)

    arrays = in_numpy(boxes, labels, valid)
    anchors = to_numpy(anchors)
    expected = []
    for image_boxes, image_labels, image_valid in zip(*arrays, strict=True):
        matches, _ = matching.assign_atss(anchors, sizes, image_boxes, image_valid)
        targets = expected_targets(matches, anchors, image_boxes, image_labels, CLASSES, (10, 10, 5, 5))
        central = np.zeros(len(anchors), np.float32)
        for a, gt in enumerate(matches):
            if gt >= 0:
                x, y = (anchors[a, :2] + anchors[a, 2:]) / 2
                x1, y1, x2, y2 = image_boxes[gt]
                wide = min(x - x1, x2 - x) / max(x - x1, x2 - x)
                central[a] = np.sqrt(wide * (min(y - y1, y2 - y) / max(y - y1, y2 - y)))
        expected.append((*targets, central))
    compare((classes, deltas, centreness), expected)
    assert (centreness[0] > 0).any() and (classes[1] == CLASSES).all()


def test_detr(device):
    """The class of every query, no object last, and its box divided by the width and height of the image."""
    boxes, labels, valid = scene(seed=5)
    shares = detops.box_convert(device.put(boxes), "xyxy", "cxcywh") / device.put([WIDTH, HEIGHT, WIDTH, HEIGHT])
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (3, 20, CLASSES + 1))
    queries = np.concatenate([rng.uniform(0.1, 0.9, (3, 20, 2)), rng.uniform(0.05, 0.6, (3, 20, 2))], -1)
    labels, valid, logits, queries = put(device, labels, valid, logits, queries)
    for options in ({}, {"class_cost": "focal", "class_weight": 2.0}):
        found = detops.match_detr(logits, queries, shares, labels, valid, **options)
        # From the query of each box to the box of each query: rows without a query go to a place that is cut off.
        places = torch.where(found >= 0, found, 20)
        of_query = torch.full((3, 21), -1, device=found.device).scatter(
            1, places, torch.arange(6, device=found.device).expand(3, 6)
        )[:, :20]
        classes = torch.where(of_query >= 0, take(labels, of_query), CLASSES)
        targets = torch.where(of_query[..., None] >= 0, take(shares, of_query), 0)

        expected = []
        for image in range(3):
            rows = np.flatnonzero(to_numpy(valid)[image])
            image_boxes, image_labels = to_numpy(shares)[image][rows], to_numpy(labels)[image][rows]
            cost = assignment.match_detr(
                *(to_numpy(logits)[image], to_numpy(queries)[image], image_boxes, image_labels),
                class_cost=options.get("class_cost", "softmax"),
                weights=(options.get("class_weight", 1.0), 5.0, 2.0),
            )
            want_classes, want_boxes = np.full(20, CLASSES), np.zeros((20, 4), np.float32)
            for row, query in enumerate(assignment.cheapest(cost)):
                want_classes[query], want_boxes[query] = image_labels[row], image_boxes[row]
            expected.append((want_classes, want_boxes))
        compare((classes, targets), expected)
        assert (classes < CLASSES).sum(1).tolist() == [6, 0, 4]
