"""assign_yolo_grid and decode_yolo_grid: the definition in reference/yolo_grid.py, and one the inverse of the other."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import EDGES, edge_boxes, to_numpy
from reference import yolo_grid as reference

ANCHORS = np.array([[10.0, 13], [33, 23], [30, 61], [116, 90], [30, 30]])


def gts_of(images, gts, seed=0, size=(128, 192)):
    """(gt_boxes, gt_labels, gt_valid), centres in and around the image."""
    rng = np.random.default_rng(seed)
    extent = np.array(size[::-1])
    centre = rng.uniform(-0.1, 1.1, (images, gts, 2)) * extent
    side = np.exp(rng.uniform(np.log(2), np.log(100), centre.shape))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], 2)
    return boxes, rng.integers(0, 4, (images, gts)), rng.random((images, gts)) < 0.8


def check(device, gts, anchors=None, grid_size=(4, 6), image_size=(128, 192), dtype=torch.float32, classes=4):
    tensors = [device.put(each, which) for each, which in zip(gts, (dtype, None, None), strict=True)]
    anchors = None if anchors is None else device.put(anchors)
    options = {"grid_size": grid_size, "image_size": image_size, "num_classes": classes}
    targets = detops.assign_yolo_grid(*tensors, anchors=anchors, **options)
    of_anchors = None if anchors is None else to_numpy(anchors)
    expected = reference.assign_yolo_grid(*map(to_numpy, tensors), of_anchors, grid_size, image_size, classes)
    assert targets.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_array_equal(to_numpy(targets), expected[:, :, :, 0] if anchors is None else expected)
    return targets


@pytest.mark.parametrize("anchors", [None, ANCHORS, ANCHORS[:1], ANCHORS[:0]], ids=["none", "5", "1", "0"])
@pytest.mark.parametrize("gts", (0, 1, 2, 33, 127, 129, 300))
def test_sizes(device, anchors, gts):
    for images in (1, 3):
        check(device, gts_of(images, device.limit(gts, emulated=130), seed=gts), anchors)


def test_grids(device):
    for grid_size, image_size in (
        ((1, 1), (128, 192)),
        ((13, 13), (416, 416)),
        ((12, 20), (96, 640)),
        ((7, 5), (100, 33)),
    ):
        gts = gts_of(2, 30, size=image_size)
        check(device, gts, ANCHORS, grid_size, image_size)
        check(device, gts, None, grid_size, image_size)
    boxes, labels, valid = map(device.put, gts_of(1, 5))
    options = {"image_size": (128, 192), "num_classes": 4}
    square = detops.assign_yolo_grid(boxes, labels, valid, grid_size=7, **options)
    assert torch.equal(square, detops.assign_yolo_grid(boxes, labels, valid, grid_size=(7, 7), **options))


def box_at(x, y, width=8.0, height=8.0):
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def test_centres_on_borders(device):
    # Cells of 32 pixels: on a line the right and lower cell, on the far border the last one, outside nobody.
    centres = [
        (0, 0),
        (32, 64),
        (192, 128),
        (192, 5),
        (31.999998, 5),
        (-1e-3, 5),
        (5, 128.01),
        (192.01, 5),
        (np.nan, 5),
    ]
    cells = [(0, 0), (2, 1), (3, 5), (0, 5), (0, 0), None, None, None, None]
    for centre, cell in zip(centres, cells, strict=True):
        gts = np.array([[box_at(*centre)]]), np.array([[1]]), np.array([[True]])
        targets = check(device, gts)
        assert targets[..., 0].nonzero()[:, 1:].tolist() == ([] if cell is None else [list(cell)])
        assert ((targets[..., 1:3] >= 0) & (targets[..., 1:3] < 1)).all()


def test_objects_in_one_cell(device):
    boxes = np.array([[box_at(50, 50, 30, 30), box_at(52, 50, 30, 30), box_at(54, 50, 30, 30), box_at(56, 50, 30, 30)]])
    gts = boxes, np.array([[0, 1, 2, 3]]), np.ones((1, 4), bool)
    # Without anchors the first one has the cell.
    assert check(device, gts)[0, 1, 1, 5:].tolist() == [1, 0, 0, 0]
    # With three anchors each gets its best free one: 30 x 30, then 33 x 23, then 10 x 13; the fourth none.
    targets = check(device, gts, ANCHORS[[0, 4, 1]])
    assert targets[0, 1, 1, :, 5:].argmax(1).tolist() == [2, 0, 1] and targets[..., 0].sum() == 3
    # Equal anchors: the lower one.
    assert check(device, gts, np.full((3, 2), 20.0))[0, 1, 1, :, 5:].argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", EDGES)
def test_odd_boxes(device, name):
    odd = edge_boxes(name)[None]
    gts = odd, np.zeros(odd.shape[:2], int), np.ones(odd.shape[:2], bool)
    for anchors in (None, ANCHORS):
        for dtype in (torch.float32, torch.float64):
            check(device, gts, anchors, (3, 3), (30, 30), dtype)


def test_dtypes(device, boxes_dtype):
    gts = gts_of(2, 30)
    if boxes_dtype.itemsize == 2:
        half, rest = device.put(gts[0], boxes_dtype), (device.put(gts[1]), device.put(gts[2]))
        options = {"grid_size": 4, "image_size": (128, 192), "num_classes": 4}
        ours, expected = (detops.assign_yolo_grid(each, *rest, **options) for each in (half, half.float()))
        assert torch.equal(ours, expected)
    else:
        check(device, gts, ANCHORS, dtype=boxes_dtype)


def test_rows_that_are_not_valid_have_no_say(device):
    boxes, labels, valid = gts_of(2, 30)
    expected = check(device, (boxes, labels, valid), ANCHORS)
    for filler in (np.nan, np.inf, 0.0, 50.0):
        padded = np.where(valid[..., None], boxes, filler), np.where(valid, labels, -7), valid
        assert torch.equal(check(device, padded, ANCHORS), expected)


@pytest.mark.parametrize("anchors", [None, ANCHORS], ids=["none", "5"])
@pytest.mark.parametrize("size", ((416, 416), (480, 640)))
def test_decode_inverts_assign(device, anchors, size):
    rng = np.random.default_rng(0)
    grid = (13, 17)
    cells = np.stack(np.meshgrid(np.arange(17), np.arange(13)), -1).reshape(-1, 2)
    centre = (cells + rng.uniform(0, 1, cells.shape)) * [size[1] / 17, size[0] / 13]
    centre[-1] = size[::-1]  # on the far border
    side = np.exp(rng.uniform(np.log(2), np.log(400), centre.shape))
    boxes = device.put(np.concatenate([centre - side / 2, centre + side / 2], 1)[None])
    labels = device.put(rng.integers(0, 4, (1, len(cells))))
    anchors = None if anchors is None else device.put(anchors)
    targets = detops.assign_yolo_grid(
        boxes, labels, torch.ones_like(labels).bool(), grid_size=grid, image_size=size, num_classes=4, anchors=anchors
    )
    found = detops.decode_yolo_grid(targets, image_size=size, anchors=anchors)
    objects = found.objectness[0] > 0
    assert objects.sum() == len(cells)
    assert (found.boxes[0, objects] - boxes[0]).abs().max() < 1e-4
    assert torch.equal(found.scores[0, objects].argmax(1), labels[0])
    assert not found.scores[0, ~objects].any()


def test_decode_has_a_gradient_and_checks():
    targets = torch.rand(1, 2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    anchors = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, a: detops.decode_yolo_grid(t, image_size=(64, 96), anchors=a).boxes, (targets, anchors)
    )
    with pytest.raises(
        RuntimeError, match=r"targets must have shape \[B, rows, columns, A, 5 \+ C\], got \[1, 2, 3, 7\]"
    ):
        detops.decode_yolo_grid(targets[:, :, :, 0], image_size=(64, 96), anchors=anchors)
    with pytest.raises(RuntimeError, match=r"anchors must have shape \[2, 2\] as of targets, got \[1, 2\]"):
        detops.decode_yolo_grid(targets, image_size=(64, 96), anchors=anchors[:1])


# Bad input.

GOOD = {
    "gt_boxes": torch.zeros(2, 4, 4),
    "gt_labels": torch.zeros(2, 4).long(),
    "gt_valid": torch.ones(2, 4).bool(),
    "grid_size": 4,
    "image_size": (64, 64),
    "num_classes": 3,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gt_boxes", torch.zeros(2, 4, 5), r"gt_boxes must have shape \[B, M, 4\], got \[2, 4, 5\]"),
        ("gt_labels", torch.zeros(2, 3).long(), r"gt_labels must have shape \[2, 4\] as of gt_boxes, got \[2, 3\]"),
        ("gt_valid", torch.zeros(2, 4), "gt_valid must be bool, got float32"),
        ("anchors", torch.zeros(3, 3), r"anchors must have shape \[A, 2\], got \[3, 3\]"),
        ("anchors", torch.zeros(3, 2).long(), "anchors must be float16, bfloat16, float32 or float64, got int64"),
    ],
)
def test_bad_tensors(device, name, value, message):
    arguments = {key: each.to(device.torch) if torch.is_tensor(each) else each for key, each in GOOD.items()}
    arguments[name] = value.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^assign_yolo_grid: {message}$"):
        detops.assign_yolo_grid(**arguments)


@pytest.mark.parametrize("label", (-1, 4))
def test_label_that_is_no_class(device, label):
    boxes, labels, valid = gts_of(1, 5)
    labels[0, 2], valid[0, 2] = label, True
    if device.name == "cpu":
        with pytest.raises(RuntimeError, match=f"gt_labels must be from 0 to 3 where gt_valid, got {label}$"):
            check(device, (boxes, labels, valid))
    else:  # without a synchronisation it can only be left out
        check(device, (boxes, labels, valid))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grid_size", 0, "grid_size must be positive, got 0"),
        ("grid_size", (3, -1), r"grid_size must be positive, got \(3, -1\)"),
        ("image_size", (0, 64), r"image_size must be positive, got \(0, 64\)"),
        ("num_classes", -1, "num_classes must be at least 0, got -1"),
    ],
)
def test_bad_options(name, value, message):
    with pytest.raises(ValueError, match=f"^assign_yolo_grid: {message}$"):
        detops.assign_yolo_grid(**{**GOOD, name: value})


# A PyTorch citizen.


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (4, -1, "grid_size must be from 0 to 2147418112, got -1"),
        (4, 2**40, "grid_size must be from 0 to 2147418112, got 1099511627776"),
        (6, 0, "image_size must be positive, got 0 x 192"),
        (8, -3, "num_classes must be from 0 to 2147418112, got -3"),
    ],
)
def test_bad_numbers_by_name(device, place, value, message):
    arguments = [*map(device.put, gts_of(1, 3)), None, 4, 6, 128, 192, 4]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"^assign_yolo_grid: {message}$"):
        _library.ops.assign_yolo_grid(*arguments)


def test_opcheck(device):
    tensors = [*map(device.put, gts_of(2, 6))]
    for anchors in (None, device.put(ANCHORS)):
        torch.library.opcheck(_library.ops.assign_yolo_grid, (*tensors, anchors, 4, 6, 128, 192, 4))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    def use(*tensors):
        targets = detops.assign_yolo_grid(*tensors, grid_size=4, image_size=(128, 192), num_classes=4)
        return targets, detops.decode_yolo_grid(targets, image_size=(128, 192)).objectness

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for gts in (6, 11):
        tensors = [*map(device.put, gts_of(2, gts))]
        assert all(map(torch.equal, compiled(*tensors), use(*tensors)))


@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 7), (2, 0, 3, 2, 7), (2, 3, 0, 2, 7), (2, 3, 2, 0, 7), (2, 3, 2, 2, 5)])
def test_decoding_empty_grids(shape):
    boxes, objectness, scores = detops.decode_yolo_grid(
        torch.zeros(shape), image_size=(8, 8), anchors=torch.ones(shape[3], 2)
    )
    places = shape[1] * shape[2] * shape[3]
    assert boxes.shape == (shape[0], places, 4)
    assert objectness.shape == (shape[0], places)
    assert scores.shape == (shape[0], places, shape[4] - 5)


def test_decoding_refuses_what_it_would_truncate():
    decode, targets = detops.decode_yolo_grid, torch.zeros(1, 2, 2, 6)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(RuntimeError, match="^decode_yolo_grid: targets must be float16, .* or float64, got "):
            decode(targets.to(dtype), image_size=(8, 8))
        with pytest.raises(RuntimeError, match="^decode_yolo_grid: anchors must be float16, .* or float64, got "):
            decode(targets[:, :, :, None], image_size=(8, 8), anchors=torch.ones(1, 2).to(dtype))
    for size in ((0, 8), (8, -1), (float("nan"), 8), (8, float("inf"))):
        with pytest.raises(ValueError, match="^decode_yolo_grid: image_size must be positive and finite, got "):
            decode(targets, image_size=size)
