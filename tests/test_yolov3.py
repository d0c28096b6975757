"""assign_yolov3: equal to the definition in reference/yolov3.py, on every device."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import EDGES, edge_boxes, to_numpy
from reference import yolov3 as reference

STRIDES = (8, 16, 32)
ANCHORS = np.array(
    [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]], float
)


def gts_of(images, gts, seed=0, size=128):
    """(gt_boxes, gt_labels, gt_valid): half of them have the shape of an anchor, some lie outside of the image."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(-0.1 * size, 1.1 * size, (images, gts, 2))
    side = np.exp(rng.uniform(np.log(4), np.log(size), centre.shape))
    shapes = ANCHORS.reshape(-1, 2)[rng.integers(0, 9, (images, gts))]
    side = np.where(rng.random((images, gts, 1)) < 0.5, shapes * rng.uniform(0.9, 1.1, side.shape), side)
    boxes = np.concatenate([centre - side / 2, centre + side / 2], 2)
    return boxes, rng.integers(0, 80, (images, gts)), rng.random((images, gts)) < 0.8


def check(device, gts, anchors=ANCHORS, strides=STRIDES, image_size=(128, 128), dtype=torch.float32, **options):
    tensors = [device.put(each, which) for each, which in zip(gts, (dtype, None, None), strict=True)]
    anchors = device.put(anchors)
    targets = detops.assign_yolov3(*tensors, anchors, strides, image_size, **options)
    expected = reference.assign_yolov3(*map(to_numpy, (*tensors, anchors)), strides, image_size, **options)
    assert targets.boxes.dtype == dtype
    for name, ours, theirs in zip(targets._fields, targets, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), theirs, name)
    return targets


@pytest.mark.parametrize("gts", (0, 1, 2, 31, 33, 64, 65, 130))
def test_sizes(device, gts):
    size = device.limit(128, emulated=64)
    targets = check(device, gts_of(2, gts, seed=gts, size=size), image_size=(size, size))
    if gts > 30:
        assert all((targets.gt_indices == code).any() for code in (-2, -1)) and (targets.gt_indices >= 0).any()


@pytest.mark.parametrize("iou_threshold", (0.0, 0.3, 0.7, 1.0, 2.0))
def test_thresholds(device, iou_threshold):
    targets = check(device, gts_of(2, 12, size=64), image_size=(64, 64), iou_threshold=iou_threshold)
    assert (targets.gt_indices >= 0).any()  # the best anchor counts whatever the threshold


def test_image_sizes_and_numbers_of_anchors(device):
    check(device, gts_of(2, 12), image_size=(32, 96))
    check(device, gts_of(0, 12), image_size=(32, 32))
    check(device, gts_of(2, 12), anchors=ANCHORS[:1, :1], strides=(16,), image_size=(48, 64))
    check(device, gts_of(2, 12), anchors=ANCHORS[:1, :0], strides=(16,), image_size=(48, 64))


def test_ties(device):
    # Gts 0 and 1 are the same: the later one gets the best anchor. Anchors 0 and 1 are the same: gt 2 gets both.
    anchors = np.array([[[16.0, 16], [16, 16]]])
    boxes = np.array([[[0.0, 0, 16, 16], [0, 0, 16, 16], [32, 32, 48, 48]]])
    gts = boxes, np.array([[3, 4, 5]]), np.ones((1, 3), bool)
    labels = check(device, gts, anchors=anchors, strides=(16,), image_size=(64, 64)).labels.view(2, 4, 4)
    assert (labels[:, 0, 0] == 4).all() and (labels[:, 2, 2] == 5).all() and (labels >= 0).sum() == 4
    rng = np.random.default_rng(0)
    for seed in range(4):
        boxes, labels, valid = gts_of(2, 20, seed=seed, size=64)
        boxes = np.round(boxes / 16) * 16
        anchors = rng.choice([16.0, 32], (2, 3, 2))
        check(device, (boxes, labels, valid), anchors=anchors, strides=(8, 16), image_size=(64, 64))


@pytest.mark.parametrize("name", EDGES)
def test_odd_boxes(device, name):
    odd = edge_boxes(name)[None]
    gts = odd, np.zeros(odd.shape[:2], int), np.ones(odd.shape[:2], bool)
    for dtype in (torch.float32, torch.float64):
        check(device, gts, image_size=(32, 32), dtype=dtype)


def test_dtypes(device, boxes_dtype):
    gts = gts_of(2, 12, size=64)
    if boxes_dtype.itemsize == 2:
        half, anchors = device.put(gts[0], boxes_dtype), device.put(ANCHORS)
        rest = device.put(gts[1]), device.put(gts[2]), anchors, STRIDES, (64, 64)
        ours, expected = (detops.assign_yolov3(each, *rest) for each in (half, half.float()))
        assert torch.equal(ours.labels, expected.labels) and ours.boxes.dtype == boxes_dtype
        assert torch.equal(ours.boxes.float(), expected.boxes)
    else:
        check(device, gts, image_size=(64, 64), dtype=boxes_dtype)


def test_rows_that_are_not_valid_have_no_say(device):
    boxes, labels, valid = gts_of(2, 20, size=64)
    expected = check(device, (boxes, labels, valid), image_size=(64, 64))
    for filler in (np.nan, np.inf, 0.0, 50.0):
        padded = np.where(valid[..., None], boxes, filler), np.where(valid, labels, -7), valid
        assert all(map(torch.equal, check(device, padded, image_size=(64, 64)), expected))


def test_order_is_that_of_decode_yolo(device):
    # With zero maps, version "v3" decodes to the anchors themselves.
    maps = [torch.zeros(1, 3 * 6, 64 // stride, 64 // stride, device=device.torch) for stride in STRIDES]
    found = detops.decode_yolo(maps, device.put(ANCHORS), STRIDES, version="v3")
    places = reference.anchor_boxes(ANCHORS.astype(np.float32), STRIDES, (64, 64))
    np.testing.assert_allclose(to_numpy(found.boxes[0]), places, atol=1e-4)


def test_negative_labels(device):
    boxes, labels, valid = map(device.put, gts_of(2, 12, size=64))
    rest = device.put(ANCHORS), STRIDES, (64, 64)
    expected = detops.assign_yolov3(boxes, labels, valid & (labels % 3 > 0), *rest)
    labels = torch.where(labels % 3 == 0, -1, labels)
    if device.name == "cpu":
        with pytest.raises(RuntimeError, match="^assign_yolov3: gt_labels must be at least 0 where gt_valid, got -1$"):
            detops.assign_yolov3(boxes, labels, valid, *rest)
    else:
        assert all(map(torch.equal, detops.assign_yolov3(boxes, labels, valid, *rest), expected))


def test_levels_without_cells(device):
    gts = [*map(device.put, gts_of(1, 5))]
    for size in ((0, 0), (0, 64), (64, 0)):
        targets = detops.assign_yolov3(*gts, device.put(ANCHORS), STRIDES, size)
        assert targets.labels.shape == (1, 0)
    # By name, one of several levels.
    expected = detops.assign_yolov3(*gts, device.put(ANCHORS[1:2]), STRIDES[1:2], (64, 64))
    for heights in ([0, 4, 0], [8, 4, 0]):
        widths = [0 if heights[0] else 8, 4, 0]
        found = _library.ops.assign_yolov3(*gts, device.put(ANCHORS), heights, widths, [8, 16, 32], 0.5)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_maps_wider_than_float32_counts(device):
    # As a float32, the last of 2^24 + 4 columns is 2^24 + 4.
    wide = 2**24 + 4
    boxes, labels = device.put([[[wide - 2.0, 0, wide + 2, 1]]]), device.put([[5]])
    arguments = labels, labels > 0, device.put([[[4.0, 1]]]), [1], (1, wide)
    assert detops.assign_yolov3(boxes, *arguments).labels[0, -4:].tolist() == [-1, -1, -1, 5]


def test_no_gradient(device):
    boxes, labels, valid = map(device.put, gts_of(1, 5))
    targets = detops.assign_yolov3(boxes.requires_grad_(), labels, valid, device.put(ANCHORS), STRIDES, (64, 64))
    assert not targets.boxes.requires_grad


# Bad input.

GOOD = {
    "gt_boxes": torch.zeros(2, 4, 4),
    "gt_labels": torch.zeros(2, 4).long(),
    "gt_valid": torch.ones(2, 4).bool(),
    "anchors": torch.ones(3, 3, 2),
    "strides": STRIDES,
    "image_size": (64, 64),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gt_boxes", torch.zeros(2, 4, 3), r"gt_boxes must have shape \[B, M, 4\], got \[2, 4, 3\]"),
        ("gt_labels", torch.zeros(2, 3).long(), r"gt_labels must have shape \[2, 4\] as of gt_boxes, got \[2, 3\]"),
        ("gt_valid", torch.zeros(2, 4), "gt_valid must be bool, got float32"),
        ("anchors", torch.zeros(3, 3, 3), r"anchors must have shape \[L, A, 2\], got \[3, 3, 3\]"),
        ("anchors", torch.zeros(2, 3, 2), r"strides must have one entry per level of anchors \(2\), got 3"),
        ("anchors", torch.zeros(9, 3, 2), "anchors must have from 1 to 8 levels, got 9"),
    ],
)
def test_bad_tensors(device, name, value, message):
    arguments = {key: each.to(device.torch) if torch.is_tensor(each) else each for key, each in GOOD.items()}
    arguments[name] = value.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^assign_yolov3: {message}$"):
        detops.assign_yolov3(**arguments)


def test_bad_options():
    with pytest.raises(ValueError, match=r"image_size must be a multiple of the strides \[8, 16, 32\], got \(64, 60\)"):
        detops.assign_yolov3(**{**GOOD, "image_size": (64, 60)})
    with pytest.raises(ValueError, match=r"^assign_yolov3: image_size must be at least 0, got \(-64, 64\)$"):
        detops.assign_yolov3(**{**GOOD, "image_size": (-64, 64)})
    with pytest.raises(ValueError, match="^assign_yolov3: iou_threshold must be at least 0, got nan$"):
        detops.assign_yolov3(**GOOD, iou_threshold=float("nan"))


@pytest.mark.parametrize(
    ("heights", "widths", "message"),
    [
        ([8, 4, -2], [8, 4, -2], "heights must be from 0 to 2147418112, got -2"),
        ([8, 4, 2], [8, 2**33, 2], "widths must be from 0 to 2147418112, got 8589934592"),
        ([8, 2**17, 2], [8, 2**17, 2], "anchors must make at most 2147418112 rows, got 3 x 131072 x 131072"),
    ],
)
def test_bad_grids_by_name(device, heights, widths, message):
    tensors = [GOOD[key].to(device.torch) for key in list(GOOD)[:4]]
    with pytest.raises(RuntimeError, match=f"^assign_yolov3: {message}$"):
        _library.ops.assign_yolov3(*tensors, heights, widths, [8, 16, 32], 0.5)


# A PyTorch citizen.


def test_opcheck(device):
    tensors = [*map(device.put, gts_of(2, 6)), device.put(ANCHORS)]
    torch.library.opcheck(_library.ops.assign_yolov3, (*tensors, [8, 4, 2], [8, 4, 2], [8, 16, 32], 0.5))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    anchors = device.put(ANCHORS)

    def use(*tensors):
        targets = detops.assign_yolov3(*tensors, anchors, STRIDES, (128, 128))
        return targets.labels + 1, targets.boxes * 2

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for gts in (6, 11):
        tensors = [*map(device.put, gts_of(2, gts))]
        assert all(map(torch.equal, compiled(*tensors), use(*tensors)))
