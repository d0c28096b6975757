"""assign_yolov5 and yolov5_target_lists: the rows of reference/yolov5.py, in its order."""

import re

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import EDGES, edge_boxes, to_numpy
from reference import yolov5 as reference

STRIDES = (8, 16, 32)
ANCHORS = np.array(
    [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]], float
)


def gts_of(images, gts, seed=0, size=256, on_grid=False):
    """(gt_boxes, gt_labels, gt_valid): centres in and around the image; on the cells' borders and middles if asked."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(-0.1 * size, 1.1 * size, (images, gts, 2))
    side = np.exp(rng.uniform(np.log(2), np.log(size), centre.shape))
    if on_grid:
        centre, side = np.round(centre / 4) * 4, np.ceil(side / 8) * 8
    boxes = np.concatenate([centre - side / 2, centre + side / 2], 2)
    return boxes, rng.integers(0, 80, (images, gts)), rng.random((images, gts)) < 0.8


def shares_of(boxes, image_size):
    """cxcywh divided by the width and height of the image, rounded as detops does."""
    size = np.array(image_size[::-1], boxes.dtype)
    with np.errstate(all="ignore"):
        low, high = boxes[..., :2], boxes[..., 2:]
        return np.concatenate([(low + high) / 2 / size, (high - low) / size], -1).astype(boxes.dtype)


def check(device, gts, anchors=ANCHORS, strides=STRIDES, image_size=(256, 256), dtype=torch.float32, **options):
    boxes, labels, valid = (device.put(each, which) for each, which in zip(gts, (dtype, None, None), strict=True))
    anchors = device.put(anchors)
    targets = detops.assign_yolov5(boxes, labels, valid, anchors, strides, image_size, **options)
    in_cells = to_numpy(anchors) / np.array(strides)[:, None, None]
    grids = [(image_size[0] // stride, image_size[1] // stride) for stride in strides]
    shares = shares_of(to_numpy(boxes), image_size)
    levels = reference.assign_yolov5(shares, to_numpy(labels), to_numpy(valid), in_cells, grids, **options)
    capacity = 5 * anchors.shape[1] * labels.numel()
    assert targets.labels.shape == targets.gt_indices.shape == (len(strides), capacity)
    assert targets.counts.tolist() == list(map(len, levels))
    for level, rows in enumerate(levels):
        count = len(rows)
        assert targets.labels[level, :count].tolist() == [row[0] for row in rows]
        assert targets.indices[level, :count].tolist() == [list(row[2]) for row in rows]
        assert targets.gt_indices[level, :count].tolist() == [row[3] for row in rows]
        expected = np.array([row[1] for row in rows]).reshape(-1, 4)
        np.testing.assert_array_equal(to_numpy(targets.boxes[level, :count]), expected)
        for each in (targets.labels, targets.indices, targets.gt_indices):
            assert (each[level, count:] == -1).all()
        assert (targets.boxes[level, count:] == 0).all()
    return targets


@pytest.mark.parametrize("gts", (0, 1, 2, 31, 33, 128, 130, 300))
def test_sizes(device, gts):
    for images in (1, 2):
        check(device, gts_of(images, device.limit(gts, emulated=130), seed=gts))


@pytest.mark.parametrize("seed", range(4))
def test_centres_on_borders_and_in_the_middle(device, seed):
    check(device, gts_of(2, 40, seed=seed, on_grid=True))


def test_image_sizes_and_numbers_of_anchors(device):
    check(device, gts_of(2, 20), image_size=(64, 192))
    check(device, gts_of(2, 20, size=8), image_size=(32, 32))
    check(device, gts_of(2, 20), anchors=ANCHORS[:1, :1], strides=(8,))
    check(device, gts_of(2, 20), anchors=ANCHORS[:1, :0], strides=(8,))
    check(device, gts_of(2, 20), ratio_threshold=1.2)


def test_no_image_and_no_level(device):
    check(device, gts_of(0, 5))
    boxes, labels, valid = map(device.put, gts_of(1, 5))
    targets = detops.assign_yolov5(boxes, labels, valid, device.put(ANCHORS[:0]), (), (64, 64))
    assert targets.labels.shape == (0, 75) and targets.counts.shape == (0,)


def test_a_centre_on_a_line_takes_the_cells_of_both_sides(device):
    boxes, labels = device.put([[[8.0, 8, 24, 24]]]), device.put([[7]])
    anchors, valid = device.put([[[16.0, 16]]]), device.put([[True]])
    targets = detops.assign_yolov5(boxes, labels, valid, anchors, [8], (64, 64))
    assert targets.indices.tolist() == [[[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 1, 2], [0, 0, 2, 2], [0, 0, 2, 2]]]
    assert targets.counts.tolist() == [5] and targets.labels.tolist() == [[7] * 5]

    rows = device.put([[0, 5, 0.5, 0.45, 0.25, 0.25]])
    *_, [(_, _, y, x)], _ = detops.yolov5_target_lists(rows, device.put([[[2.0, 2]]]), [(8, 8)])
    assert (y.tolist(), x.tolist()) == ([3, 3, 3, 4], [4, 3, 4, 4])


@pytest.mark.parametrize("name", ("v3", "v5", "v7"))
def test_objects_of_whole_pixels_fit_the_result(device, name):
    # An object in the very middle of an image takes five cells on every level; all that match three anchors fill it.
    anchors = to_numpy(detops.yolo_anchors(name))
    half = anchors[:1] / 2
    gts = np.concatenate([320 - half, 320 + half], 2), np.zeros((1, 3), int), np.ones((1, 3), bool)
    targets = check(device, gts, anchors=anchors, image_size=(640, 640), ratio_threshold=1e9)
    assert targets.counts.tolist() == [5 * 3 * 3] * 3
    rng = np.random.default_rng(1)
    low = rng.integers(0, 40, (2, 30, 2)) * 16.0
    boxes = np.concatenate([low, low + rng.integers(1, 20, low.shape) * 16], 2)
    gts = boxes, rng.integers(0, 80, (2, 30)), np.ones((2, 30), bool)
    assert check(device, gts, anchors=anchors, image_size=(640, 640), ratio_threshold=1e9).counts[0] > 4 * 3 * 60


def test_a_centre_has_one_two_or_three_cells(device):
    centres = np.array([[28.0, 28], [26, 28], [30, 28], [26, 30], [2, 2], [62, 62], [-6, 12]])
    gts = np.concatenate([centres - 2, centres + 2], 1)[None], np.arange(7)[None], np.ones((1, 7), bool)
    targets = check(device, gts, anchors=np.array([[[4.0, 4]]]), strides=(8,), image_size=(64, 64))
    cells = [[] for _ in centres]
    for place in range(targets.counts.item()):
        cells[targets.gt_indices[0, place]].append(tuple(targets.indices[0, place, [3, 2]].tolist()))
    # Cells of 8 pixels: the very middle, left, right, left and lower, and two at the border; the last is outside.
    assert cells == [[(3, 3)], [(3, 3), (2, 3)], [(3, 3), (4, 3)], [(3, 3), (2, 3), (3, 4)], [(0, 0)], [(7, 7)],
                     [(0, 1)]]  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_odd_boxes(device, name):
    odd = edge_boxes(name)[None]
    gts = odd, np.zeros(odd.shape[:2], int), np.ones(odd.shape[:2], bool)
    check(device, gts, dtype=torch.float32)
    check(device, gts, dtype=torch.float64)


def test_dtypes(device, boxes_dtype):
    boxes, labels, valid = gts_of(2, 30)
    if boxes_dtype.itemsize == 2:
        half = device.put(boxes, boxes_dtype)
        arguments = device.put(labels), device.put(valid), device.put(ANCHORS), STRIDES, (256, 256)
        ours, expected = (detops.assign_yolov5(each, *arguments) for each in (half, half.float()))
        assert all(map(torch.equal, ours, expected))
    else:
        check(device, (boxes, labels, valid), dtype=boxes_dtype)


def test_rows_that_are_not_valid_have_no_say(device):
    boxes, labels, valid = gts_of(2, 30)
    expected = check(device, (boxes, labels, valid))
    for filler in (np.nan, np.inf, 0.0, 50.0):
        targets = check(device, (np.where(valid[..., None], boxes, filler), np.where(valid, labels, -7), valid))
        assert all(map(torch.equal, targets, expected))


def published(targets, anchors, grid_sizes, threshold):
    """YOLOv5's rows, written with tensors from the description of its loss."""
    results = []
    off = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float32) * 0.5
    for of_level, (height, width) in zip(anchors, grid_sizes, strict=True):
        gain = torch.tensor([width, height, width, height], dtype=torch.float32)
        rows = targets.repeat(len(of_level), 1, 1)
        number = torch.arange(len(of_level))[:, None, None].expand(-1, len(targets), 1)
        rows = torch.cat([rows[..., :2], rows[..., 2:] * gain, number], 2)
        ratio = rows[..., 4:6] / of_level[:, None]
        rows = rows[torch.maximum(ratio, 1 / ratio).amax(2) < threshold]
        low = rows[:, 2:4]
        high = gain[:2] - low
        masks = [torch.ones(len(rows), dtype=torch.bool)]
        masks += [(each % 1 < 0.5) & (each > 1) for each in (low[:, 0], low[:, 1], high[:, 0], high[:, 1])]
        which = torch.cat([torch.full((int(mask.sum()),), i) for i, mask in enumerate(masks)])
        rows = torch.cat([rows[mask] for mask in masks])
        cells = (rows[:, 2:4] - off[which]).long()
        cells = torch.stack([cells[:, 0].clamp(0, width - 1), cells[:, 1].clamp(0, height - 1)], 1)
        boxes = torch.cat([rows[:, 2:4] - cells, rows[:, 4:6]], 1)
        anchor = rows[:, 6].long()
        results.append(
            (rows[:, 1].long(), boxes, (rows[:, 0].long(), anchor, cells[:, 1], cells[:, 0]), of_level[anchor])
        )
    return zip(*results, strict=True)


def test_lists_are_those_of_yolov5(device):
    rng = np.random.default_rng(0)
    for n in (0, 1, 50, 120):
        targets = np.concatenate(
            [rng.integers(0, 4, (n, 1)), rng.integers(0, 80, (n, 1)), rng.uniform(0, 1, (n, 2)),
             np.exp(rng.uniform(-4, 0, (n, 2)))], 1)  # fmt: skip
        anchors = ANCHORS / np.array(STRIDES)[:, None, None]
        grids = [(20, 24), (10, 12), (5, 6)]
        lists = detops.yolov5_target_lists(device.put(targets), device.put(anchors), grids)
        expected = published(torch.as_tensor(targets).float(), torch.as_tensor(anchors).float(), grids, 4.0)
        for ours, theirs in zip(lists, expected, strict=True):
            for level in range(3):
                ours_here, theirs_here = ours[level], theirs[level]
                if isinstance(ours_here, tuple):
                    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours_here, theirs_here, strict=True))
                else:
                    assert torch.equal(ours_here.cpu(), theirs_here)


def test_sides_that_are_not_positive_match_nothing(device):
    boxes = np.array([[[9.0, 9, 3, 3], [9, 9, 9, 3], [9, 9, 9, 9], [9, 3, 3, 9], [0.0, 0, -0.0, -0.0]]])
    gts = boxes, np.zeros((1, 5), int), np.ones((1, 5), bool)
    assert check(device, gts).counts.tolist() == [0, 0, 0]
    assert check(device, gts, anchors=-ANCHORS).counts.tolist() == [0, 0, 0]
    rows = torch.tensor([[0, 0, 0.5, 0.5, side, other] for side in (-0.2, -0.0, 0.2) for other in (-0.2, -0.0)])
    classes, *_ = detops.yolov5_target_lists(rows.to(device.torch), device.put([[[2.0, 2]]]), [(8, 8)])
    assert classes[0].tolist() == []


def test_centres_that_are_not_finite_match_nothing(device):
    rows = torch.tensor([[0, 7, 0.5, 0.5, 0.25, 0.25], *[[0, 0, 0.5, 0.5, 0.25, 0.25]] * 5])
    rows[1, 2], rows[2, 3], rows[3, 2], rows[4, 3] = torch.nan, torch.nan, torch.inf, -torch.inf
    rows[5, 4] = torch.nan
    classes, boxes, _, _ = detops.yolov5_target_lists(rows.to(device.torch), device.put([[[2.0, 2]]]), [(8, 8)])
    assert classes[0].tolist() == [7] * 5 and boxes[0][:, 2:].tolist() == [[2, 2]] * 5


def test_negative_labels(device):
    boxes, labels, valid = map(device.put, gts_of(2, 12))
    anchors = device.put(ANCHORS)
    expected = detops.assign_yolov5(boxes, labels, valid & (labels % 3 > 0), anchors, STRIDES, (256, 256))
    labels = torch.where(labels % 3 == 0, -1, labels)
    if device.name == "cpu":
        with pytest.raises(RuntimeError, match="^assign_yolov5: gt_labels must be at least 0 where gt_valid, got -1$"):
            detops.assign_yolov5(boxes, labels, valid, anchors, STRIDES, (256, 256))
    else:
        targets = detops.assign_yolov5(boxes, labels, valid, anchors, STRIDES, (256, 256))
        assert all(map(torch.equal, targets, expected))


@pytest.mark.parametrize("column", (0, 1))
@pytest.mark.parametrize("value", (-1.0, -0.5, np.nan, 1e30, -np.inf))
def test_images_and_classes_out_of_range(device, column, value):
    rows = torch.tensor([[0, 3, 0.3, 0.3, 0.2, 0.2], [1, 3, 0.3, 0.3, 0.2, 0.2]])
    rows[1, column] = value
    arguments = rows.to(device.torch), device.put([[[2.0, 2]]]), [(8, 8)]
    if device.name == "cuda":
        ours, expected = (detops.yolov5_target_lists(each, *arguments[1:]) for each in (arguments[0], arguments[0][:1]))
        assert torch.equal(ours[0][0], expected[0][0]) and torch.equal(ours[2][0][0], expected[2][0][0])
    else:
        match = r"^yolov5_target_lists: targets must have an image and a class from 0 to 2147483647, got .* in row 1$"
        with pytest.raises(RuntimeError, match=match):
            detops.yolov5_target_lists(*arguments)


def test_grids_without_cells_and_wider_than_float32_counts(device):
    boxes, labels, valid = map(device.put, gts_of(1, 5))
    for size in ((0, 0), (0, 64), (64, 0)):
        targets = detops.assign_yolov5(boxes, labels, valid, device.put(ANCHORS), STRIDES, size)
        assert targets.counts.tolist() == [0, 0, 0] and (targets.indices == -1).all()
    # As a float32, the last of 2^24 + 4 columns is 2^24 + 4.
    wide = 2**24 + 4
    rows = device.put([[0, 0, 1.0, 0.5, 1.0, 1.0]])
    *_, [(_, _, _, x)], _ = detops.yolov5_target_lists(rows, device.put([[[wide, 1.0]]]), [(1, wide)])
    assert set(x.tolist()) == {wide - 1}


def test_no_gradient(device):
    boxes, labels, valid = map(device.put, gts_of(1, 5))
    boxes.requires_grad_()
    targets = detops.assign_yolov5(boxes, labels, valid, device.put(ANCHORS).requires_grad_(), STRIDES, (64, 64))
    assert not any(each.requires_grad for each in targets)


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
        ("gt_labels", torch.zeros(2, 4), "gt_labels must be int64, got float32"),
        ("gt_valid", torch.zeros(2, 4), "gt_valid must be bool, got float32"),
        ("anchors", torch.zeros(3, 3, 3), r"anchors must have shape \[3, A, 2\] as of strides, got \[3, 3, 3\]"),
    ],
)
def test_bad_tensors(device, name, value, message):
    arguments = {key: each.to(device.torch) if torch.is_tensor(each) else each for key, each in GOOD.items()}
    arguments[name] = value.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^assign_yolov5: {message}$"):
        detops.assign_yolov5(**arguments)


def test_bad_options(device):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of the strides \[8, 16, 32\], got \(60, 64\)"):
        detops.assign_yolov5(**{**GOOD, "image_size": (60, 64)})
    with pytest.raises(ValueError, match=r"^assign_yolov5: image_size must be at least 0, got \(-64, 64\)$"):
        detops.assign_yolov5(**{**GOOD, "image_size": (-64, 64)})
    with pytest.raises(ValueError, match="^assign_yolov5: ratio_threshold must be above 1, got 1.0$"):
        detops.assign_yolov5(**GOOD, ratio_threshold=1.0)
    with pytest.raises(RuntimeError, match=r"^yolov5_target_lists: targets must have shape \[n, 6\], got \[2, 5\]$"):
        detops.yolov5_target_lists(torch.zeros(2, 5), GOOD["anchors"], [(8, 8)] * 3)
    rule = r"anchors must have shape \[2, A, 2\] as of grid_sizes, got \[3, 3, 2\]"
    with pytest.raises(RuntimeError, match=f"^yolov5_target_lists: {rule}$"):
        detops.yolov5_target_lists(torch.zeros(2, 6), GOOD["anchors"], [(8, 8)] * 2)
    rule = "targets must be float16, bfloat16, float32 or float64, got int64"
    with pytest.raises(RuntimeError, match=f"^yolov5_target_lists: {rule}$"):
        detops.yolov5_target_lists(torch.zeros(2, 6).long(), GOOD["anchors"], [(8, 8)] * 3)
    rule = "must be float16, bfloat16, float32 or float64, got float8_e4m3fn"
    with pytest.raises(RuntimeError, match=f"^yolov5_target_lists: targets {rule}$"):
        detops.yolov5_target_lists(torch.zeros(2, 6).to(torch.float8_e4m3fn), GOOD["anchors"], [(8, 8)] * 3)
    with pytest.raises(RuntimeError, match=f"^assign_yolov5: anchors {rule}$"):
        detops.assign_yolov5(**{**GOOD, "anchors": GOOD["anchors"].to(torch.float8_e4m3fn)})
    with pytest.raises(
        ValueError, match=r"^yolov5_target_lists: grid_sizes must be pairs .height, width., got an int$"
    ):
        detops.yolov5_target_lists(torch.zeros(2, 6), GOOD["anchors"], 8)
    with pytest.raises(RuntimeError, match=r"^yolov5_target_lists: anchors must be on the device of targets \(meta\)"):
        detops.yolov5_target_lists(torch.zeros(2, 6, device="meta"), GOOD["anchors"], [(8, 8)] * 3)


@pytest.mark.parametrize(
    ("heights", "widths", "message"),
    [
        ([8], [8, 8, 8], r"heights and widths must have one entry per level of anchors \(3\), got 1"),
        ([8, 8, -1], [8, 8, 8], "heights must be from 0 to 2147418112, got -1"),
        ([8, 8, 8], [8, 2**62, 8], "widths must be from 0 to 2147418112, got 4611686018427387904"),
    ],
)
def test_bad_grids_by_name(device, heights, widths, message):
    boxes, labels, valid, anchors = (GOOD[key].to(device.torch) for key in list(GOOD)[:4])
    with pytest.raises(RuntimeError, match=f"^assign_yolov5: {message}$"):
        _library.ops.assign_yolov5(boxes, labels, valid, anchors, heights, widths, 4.0)


def test_too_many_rows_by_name(device):
    boxes, labels = torch.zeros(1, 1, 4, device=device.torch), torch.zeros(1, 1, device=device.torch).long()
    anchors = torch.ones(1, 1, 2, device=device.torch).expand(1, 2**61, 2)
    with pytest.raises(
        RuntimeError, match="^assign_yolov5: gt_boxes must make at most 2147418112 rows, got 5 x 23058430"
    ):
        _library.ops.assign_yolov5(boxes, labels, labels == 0, anchors, [8], [8], 4.0)


# A PyTorch citizen.


def test_opcheck(device):
    boxes, labels, valid = map(device.put, gts_of(2, 6))
    arguments = (boxes / 256, labels, valid, device.put(ANCHORS / 8), [32, 16, 8], [32, 16, 8], 4.0)
    torch.library.opcheck(_library.ops.assign_yolov5, arguments)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    anchors = device.put(ANCHORS)

    def use(boxes, labels, valid):
        targets = detops.assign_yolov5(boxes, labels, valid, anchors, STRIDES, (256, 256))
        return targets.counts.sum(), targets.labels + 1, targets.boxes

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for gts in (6, 11):
        boxes, labels, valid = map(device.put, gts_of(2, gts, on_grid=True))
        ours, theirs = compiled(boxes, labels, valid), use(boxes, labels, valid)
        assert all(map(torch.equal, ours[:2], theirs[:2])) and torch.allclose(ours[2], theirs[2])


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2), (2, 3, 1), (3, 3, 2), (2, 1, 3, 2)])
def test_anchors_are_not_broadcast_over_levels(shape):
    boxes, labels = torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[1]])
    match = rf"^assign_yolov5: anchors must have shape \[2, A, 2\] as of strides, got {re.escape(str(list(shape)))}$"
    with pytest.raises(RuntimeError, match=match):
        detops.assign_yolov5(boxes, labels, labels > 0, torch.ones(shape), [8, 16], (64, 64))


def test_complex_boxes_and_negative_grids_are_refused():
    boxes, labels = torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[1]])
    with pytest.raises(RuntimeError, match="^assign_yolov5: gt_boxes must be real, got complex64$"):
        detops.assign_yolov5(boxes.to(torch.complex64), labels, labels > 0, torch.ones(1, 1, 2), [8], (64, 64))
    with pytest.raises(ValueError, match=r"^yolov5_target_lists: grid_sizes must be at least 0, got \[\(2, -1\)\]$"):
        detops.yolov5_target_lists(torch.full((1, 6), 0.5), torch.ones(1, 1, 2), [(2, -1)])
