"""box_iou and its relatives on upright boxes: values, shapes, dtypes and errors. Gradients: test_iou_gradient.py."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from memory import peak_growth
from reference import iou as reference

FUNCTIONS = {
    "iou": detops.box_iou,
    "generalized": detops.generalized_box_iou,
    "distance": detops.distance_box_iou,
    "complete": detops.complete_box_iou,
    "efficient": detops.efficient_box_iou,
    "ioa": detops.box_ioa,
}
NAMES = {kind: function.__name__ for kind, function in FUNCTIONS.items()}
# Around the GPU's tiles: 32 rows, 128 columns of float32 or 64 of float64, in threads of 4 or 2 columns.
COLUMNS = (0, 1, 2, 3, 4, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)


@pytest.fixture(params=FUNCTIONS)
def kind(request):
    return request.param


def expect_equal(got, expected, kind):
    """Value by value, NaN included. The atan of a complete IoU rounds differently where it is computed in float64."""
    assert got.shape == expected.shape and to_numpy(got).dtype == expected.dtype and got.is_contiguous()
    if kind == "complete" and expected.dtype == np.float64:
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=4e-15)
    else:
        np.testing.assert_array_equal(to_numpy(got), expected)


def check(kind, boxes1, boxes2, aligned=False):
    """The result for these tensors, of one dtype, equals the reference; returns it."""
    got = FUNCTIONS[kind](boxes1, boxes2, aligned=aligned)
    assert got.device == boxes1.device
    expect_equal(got, reference.box_iou(to_numpy(boxes1), to_numpy(boxes2), kind, aligned=aligned), kind)
    return got


def mixed_boxes(n, seed=0):
    """Boxes of all the ordinary kinds, overlapping often."""
    n_each = n // 3
    grid = inputs.grid_boxes(n_each, seed)
    spread = inputs.uniform_boxes(n - 2 * n_each, seed, extent=200)
    return np.concatenate([grid, inputs.clustered_boxes(n_each, seed, extent=200), spread])


# The reference itself.


def cells_of(box):
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def test_reference_equals_counting_cells():
    boxes = [[0, 0, 4, 3], [1, 1, 5, 2], [2, 0, 6, 6], [4, 0, 5, 3], [3, 3, 4, 4], [0, 0, 7, 7], [6, 6, 7, 7]]
    array = np.array(boxes, np.float64)
    found = {kind: reference.box_iou(array, array, kind, eps=0.0) for kind in reference.KINDS}
    for i, first in enumerate(boxes):
        for j, second in enumerate(boxes):
            a, b = cells_of(first), cells_of(second)
            around = cells_of([*map(min, first[:2], second[:2]), *map(max, first[2:], second[2:])])
            iou = Fraction(len(a & b), len(a | b))
            sides = [(box[2] - box[0], box[3] - box[1]) for box in (first, second)]
            width, height = (max(p[k] for p in around) - min(p[k] for p in around) + 1 for k in (0, 1))
            apart = sum(Fraction(first[k] + first[k + 2] - second[k] - second[k + 2], 2) ** 2 for k in (0, 1))
            distance = iou - apart / (width**2 + height**2)
            differences = [sides[0][k] - sides[1][k] for k in (0, 1)]
            efficient = distance - Fraction(differences[0], width) ** 2 - Fraction(differences[1], height) ** 2
            angles = [np.arctan2(*side) for side in sides]
            v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
            complete = float(distance) - (v * v / (1 - float(iou) + v) if v else 0)
            expected = {
                "iou": iou,
                "generalized": iou - Fraction(len(around) - len(a | b), len(around)),
                "distance": distance,
                "complete": complete,
                "efficient": efficient,
                "ioa": Fraction(len(a & b), len(a)),
            }
            for kind, number in expected.items():
                if not (kind == "complete" and i == j):  # 0 / 0 without eps
                    assert found[kind][i, j] == pytest.approx(float(number), abs=1e-15)


# Against the reference.


@pytest.mark.parametrize("columns", COLUMNS)
def test_sizes(device, kind, columns):
    for rows in (0, 1, 5, 33) if columns > 129 else (0, 1, 31, 32, 33, 65):
        for dtype in (torch.float32, torch.float64):
            boxes1, boxes2 = mixed_boxes(rows, rows), mixed_boxes(columns, columns + 1)
            check(kind, device.put(boxes1, dtype), device.put(boxes2, dtype))


@pytest.mark.parametrize("n", [0, 1, 31, 255, 256, 257, 1000, 9000])
def test_aligned_sizes(device, kind, n):
    boxes1, boxes2 = mixed_boxes(n), mixed_boxes(n, seed=1)
    for dtype in (torch.float32, torch.float64):
        check(kind, device.put(boxes1, dtype), device.put(boxes2, dtype), aligned=True)


@pytest.mark.parametrize("layout", inputs.KINDS)
def test_kinds_of_boxes(device, kind, layout):
    boxes1, boxes2 = device.put(inputs.KINDS[layout](150)), device.put(inputs.KINDS[layout](170, seed=1))
    check(kind, torch.cat([boxes1, boxes2[:20]]), torch.cat([boxes2, boxes1[:20]]))


@pytest.mark.parametrize("name", inputs.EDGES)
def test_edges(device, kind, name, boxes_dtype):
    boxes = device.put(inputs.edge_boxes(name), boxes_dtype).float()
    boxes = boxes.double() if boxes_dtype == torch.float64 else boxes
    check(kind, boxes, boxes)
    check(kind, boxes, boxes.roll(3, 0), aligned=True)


def test_written_out(device, kind):
    boxes = device.put([[0, 0, 2, 1], [0, 0, 1, 2], [2, 0, 3, 1], [0, 0, 2, 1]])
    expected = {
        "iou": [1 / 3, 0, 1],
        "generalized": [1 / 3 - 1 / 4, 0, 1],
        "distance": [1 / 3 - 0.5 / 8, -2.25 / 10, 1],
        "efficient": [1 / 3 - 0.5 / 8 - 1 / 4 - 1 / 4, -2.25 / 10 - 1 / 9, 1],
        "ioa": [1 / 2, 0, 1],
    }
    v = 4 / np.pi**2 * (np.arctan(2) - np.arctan([0.5, 1])) ** 2
    shape = v * v / (1 - np.array([1 / 3, 0]) + v)
    expected["complete"] = [*(np.array(expected["distance"][:2]) - shape), 1]
    np.testing.assert_allclose(to_numpy(FUNCTIONS[kind](boxes[:1], boxes[1:])[0]), expected[kind], rtol=2e-6, atol=2e-7)


def test_empty_pairs_and_nan(device):
    boxes = device.put([[0, 0, 10, 10], [5, 5, 5, 5], [20, 20, 20, 30], [np.nan, 0, 10, 10]])
    iou = to_numpy(detops.box_iou(boxes, boxes))
    nan = np.nan
    np.testing.assert_array_equal(iou, [[1, 0, 0, nan], [0, nan, nan, nan], [0, nan, nan, nan], [nan] * 4])


@pytest.mark.parametrize("kind", ["distance", "complete", "efficient"])
def test_eps(device, kind):
    boxes1, boxes2 = device.put(mixed_boxes(20)), device.put(mixed_boxes(30, seed=1))
    for eps in (0.0, 1e-7, 0.5, 1e3):
        expected = reference.box_iou(to_numpy(boxes1), to_numpy(boxes2), kind, eps=eps)
        expect_equal(FUNCTIONS[kind](boxes1, boxes2, eps), expected, kind)
        expect_equal(FUNCTIONS[kind](boxes1, boxes2, eps=eps), expected, kind)
    assert not torch.equal(FUNCTIONS[kind](boxes1, boxes2, 0.5), FUNCTIONS[kind](boxes1, boxes2))


# dtypes.


def test_half_boxes_give_what_their_float32_copies_give(device, kind):
    for dtype in (torch.float16, torch.bfloat16):
        boxes1, boxes2 = device.put(mixed_boxes(40), dtype), device.put(mixed_boxes(50, seed=1), dtype)
        assert check(kind, boxes1, boxes2).dtype == torch.float32
        assert check(kind, boxes1[:30], boxes2[:30], aligned=True).dtype == torch.float32


def test_integer_and_mixed_boxes(device, kind):
    grid1, grid2 = inputs.grid_boxes(40), inputs.grid_boxes(50, seed=1)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        got = FUNCTIONS[kind](device.put(grid1, dtype), device.put(grid2, dtype))
        expect_equal(got, reference.box_iou(grid1.astype(np.float32), grid2.astype(np.float32), kind), kind)
    narrow, wide = device.put(mixed_boxes(40)), device.put(mixed_boxes(50), torch.float64)
    for boxes1, boxes2 in (
        (narrow, wide),
        (wide, narrow),
        (narrow.half(), wide),
        (wide, device.put(grid1, torch.long)),
    ):
        doubles = (to_numpy(boxes).astype(np.float64) for boxes in (boxes1, boxes2))
        expect_equal(FUNCTIONS[kind](boxes1, boxes2), reference.box_iou(*doubles, kind), kind)


# Shapes.


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [
        ((2, 5, 4), (2, 40, 4)),
        ((3, 2, 5, 4), (3, 2, 7, 4)),
        ((5, 4), (3, 7, 4)),
        ((3, 5, 4), (7, 4)),
        ((3, 1, 5, 4), (2, 7, 4)),
        ((1, 5, 4), (3, 130, 4)),
        ((3, 33, 4), (1, 1, 7, 4)),
        ((0, 5, 4), (7, 4)),
        ((2, 0, 4), (2, 7, 4)),
        ((2, 5, 4), (2, 0, 4)),
    ],
)
def test_batch_dimensions_broadcast(device, kind, shape1, shape2):
    boxes1 = mixed_boxes(int(np.prod(shape1[:-1]))).reshape(shape1)
    boxes2 = mixed_boxes(int(np.prod(shape2[:-1])), seed=1).reshape(shape2)
    for dtype in (torch.float32, torch.float64):
        check(kind, device.put(boxes1, dtype), device.put(boxes2, dtype))


@pytest.mark.parametrize(
    ("shape1", "shape2"), [((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((7, 4), (4,)), ((1, 7, 4), (5, 1, 4)), ((0, 4), (4,))]
)
def test_aligned_shapes(device, kind, shape1, shape2):
    boxes1 = mixed_boxes(int(np.prod(shape1[:-1]))).reshape(shape1)
    boxes2 = mixed_boxes(int(np.prod(shape2[:-1])), seed=1).reshape(shape2)
    check(kind, device.put(boxes1), device.put(boxes2), aligned=True)


def test_inputs_of_any_strides_are_read_and_left_alone(device, kind):
    boxes, images = device.put(mixed_boxes(120)), device.put(mixed_boxes(120).reshape(4, 30, 4))
    rows = torch.cat([boxes, boxes[:, :2]], 1)  # a detector's [N, 6] rows
    odd = torch.empty(481, device=boxes.device)[1:].view(120, 4).copy_(boxes)  # not aligned to 16 bytes
    cases = [
        (boxes[::2], boxes[50:]),
        (boxes.t().contiguous().t(), rows[:, :4]),
        (boxes.flip(0), boxes[:1].expand(60, 4)),
        (odd, odd[1:]),
        (images[::2], images[1::2]),
        (images.transpose(0, 1), boxes),
        (boxes[:30].expand(4, 30, 4), images),
        (images, boxes[:30].expand(4, 30, 4)),
        (boxes[:30].expand(4, 30, 4), boxes[30:60].expand(4, 30, 4)),
        (images[:, :, None].transpose(1, 2), boxes[:6].view(3, 2, 4).expand(4, 1, 3, 2, 4)[:, :, 0]),
    ]
    for boxes1, boxes2 in cases:
        before = boxes1.clone(), boxes2.clone()
        check(kind, boxes1, boxes2)
        if boxes1.shape == boxes2.shape:
            check(kind, boxes1, boxes2, aligned=True)
        assert torch.equal(boxes1, before[0]) and torch.equal(boxes2, before[1])


# Against torchvision, which runs on the CPU: its CUDA formulas contract.


@pytest.mark.parametrize("kind", ["iou", "generalized", "distance", "complete"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchvision(torchvision, device, kind, dtype):
    cases = [(mixed_boxes(300), mixed_boxes(200, seed=1)), *[(inputs.edge_boxes(name),) * 2 for name in inputs.EDGES]]
    cases += [(layout(100), layout(120, seed=1)) for layout in inputs.KINDS.values()]
    cases += [(mixed_boxes(60).reshape(3, 1, 20, 4), mixed_boxes(80).reshape(2, 40, 4))]
    for boxes1, boxes2 in cases:
        boxes1, boxes2 = to_torch(boxes1, dtype), to_torch(boxes2, dtype)
        expected = getattr(torchvision.ops, NAMES[kind])(boxes1, boxes2)
        got = FUNCTIONS[kind](boxes1.to(device.torch), boxes2.to(device.torch)).cpu()
        if kind == "complete":  # torch's atan is off by up to 2 units in the last place, and 1 / (1 - iou) magnifies it
            torch.testing.assert_close(got, expected, rtol=0, atol=8 * torch.finfo(dtype).eps, equal_nan=True)
        else:
            assert got.dtype == expected.dtype and torch.equal(got.nan_to_num(-9), expected.nan_to_num(-9))


@pytest.mark.parametrize("fmt", ["xywh", "cxcywh"])
def test_other_upright_formats(torchvision, device, fmt):
    # torchvision computes areas from the sides given, detops from the corners; in powers of two both are exact.
    sides = torch.tensor([[0.0, 0, 4, 8], [2, 2, 2, 2], [1, 3, 8, 1], [4, 0, 4, 4]])
    expected = torchvision.ops.box_iou(sides, sides + 1, fmt=fmt)
    assert torch.equal(detops.box_iou(sides.to(device.torch), sides.to(device.torch) + 1, fmt=fmt).cpu(), expected)


@pytest.mark.parametrize("fmt", ["xywh", "cxcywh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64], ids=str)
def test_other_formats_are_widened_before_they_are_converted(device, fmt, dtype):
    # Sums of these are beyond 255, and round in halves.
    boxes = device.put([[200.3, 201.7, 100.9, 99.1], [151.1, 180.2, 77.7, 120.3]], torch.float64).to(dtype)
    wide = detops.box_convert(boxes.float(), fmt, "xyxy")
    assert torch.equal(detops.box_iou(boxes, boxes, fmt), detops.box_iou(wide, wide))


# Bad input.

BOXES = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "aligned", "message"),
    [
        (torch.zeros(3, 5), BOXES, False, r"boxes1 must have shape \[..., N, 4\], got \[3, 5\]"),
        (torch.zeros(4), BOXES, False, r"boxes1 must have shape \[..., N, 4\], got \[4\]"),
        (torch.tensor(1.0), BOXES, False, r"boxes1 must have shape \[..., N, 4\], got \[\]"),
        (BOXES, torch.zeros(2, 3, 0), False, r"boxes2 must have shape \[..., M, 4\], got \[2, 3, 0\]"),
        (BOXES, torch.zeros(4), False, r"boxes2 must have shape \[..., M, 4\], got \[4\]"),
        (
            *(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), False),
            r"boxes2 must have the batch dimensions of boxes1 \(\[2, 3, 4\]\), got \[3, 3, 4\]",
        ),
        (torch.zeros(3, 5), BOXES, True, r"boxes1 must have shape \[..., 4\], got \[3, 5\]"),
        (BOXES, torch.zeros(3, 1), True, r"boxes2 must have shape \[..., 4\], got \[3, 1\]"),
        (BOXES, torch.tensor(1.0), True, r"boxes2 must have shape \[..., 4\], got \[\]"),
        (BOXES, torch.zeros(2, 4), True, r"boxes2 must have the shape of boxes1 \(\[3, 4\]\), got \[2, 4\]"),
        (BOXES.to(torch.complex64), BOXES, False, "boxes1 must be float16, .* or integer, got complex64"),
        (BOXES, BOXES.to(torch.complex64), True, "boxes2 must be float16, .* or integer, got complex64"),
    ],
)
def test_bad_shapes(device, kind, boxes1, boxes2, aligned, message):
    with pytest.raises(RuntimeError, match=f"^{NAMES[kind]}: {message}$"):
        FUNCTIONS[kind](boxes1.to(device.torch), boxes2.to(device.torch), aligned=aligned)


def test_bad_arguments_of_the_op(device):
    boxes = BOXES.to(device.torch)
    with pytest.raises(RuntimeError, match="^box_iou: boxes1 must be float32 or float64, got float16$"):
        _library.ops.box_iou(boxes.half(), boxes.half(), 0, False, 0.0)
    with pytest.raises(RuntimeError, match=r"^box_ioa: boxes2 must have the dtype of boxes1 \(float32\), got float64$"):
        _library.ops.box_iou(boxes, boxes.double(), 5, False, 0.0)
    with pytest.raises(RuntimeError, match="^box_iou: kind must be from 0 to 5, got 6$"):
        _library.ops.box_iou(boxes, boxes, 6, False, 0.0)
    for shape, dtype, message in (
        ((3, 2), torch.float32, r"shape \[3, 3\] as the result, got \[3, 2\]"),
        ((9,), torch.float32, r"shape \[3, 3\] as the result, got \[9\]"),
        ((3, 3), torch.float64, r"the dtype of boxes1 \(float32\), got float64"),
    ):
        grad = torch.zeros(shape, dtype=dtype, device=device.torch)
        with pytest.raises(RuntimeError, match=f"^box_iou: grad must have {message}$"):
            _library.ops.box_iou_backward(grad, boxes, boxes, 0, False, 0.0, True, True)


@pytest.mark.parametrize("fmt", ["yxyx", "", None])
def test_unknown_format(fmt):
    with pytest.raises(ValueError, match=f"^box_iou: fmt must be one of xyxy, .*xyxyxyxy, got {fmt!r}$"):
        detops.box_iou(BOXES, BOXES, fmt)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device, kind):
    with pytest.raises(
        RuntimeError, match=rf"^{NAMES[kind]}: boxes2 must be on the device of boxes1 \(cuda:0\), got cpu$"
    ):
        FUNCTIONS[kind](BOXES.to(device.torch), BOXES)


# A PyTorch citizen.


def test_opcheck(device):
    # Without empty boxes: opcheck takes NaN results for different ones.
    boxes1, boxes2 = device.put(inputs.uniform_boxes(12)), device.put(inputs.uniform_boxes(9, seed=1), torch.float64)
    for number in range(len(FUNCTIONS)):
        torch.library.opcheck(_library.ops.box_iou, (boxes1, boxes2.float(), number, False, 1e-7))
        batch = boxes2[:4].expand(2, 4, 4), boxes2.expand(2, 9, 4)
        torch.library.opcheck(_library.ops.box_iou, (*batch, number, False, 0.1))
        torch.library.opcheck(_library.ops.box_iou, (boxes1[:9], boxes2.float(), number, True, 1e-7))
    torch.library.opcheck(_library.ops.box_iou, (boxes1[:0], boxes1[:0], 0, False, 0.0))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, kind, dynamic):
    def use(boxes1, boxes2):
        return FUNCTIONS[kind](boxes1 * 2, boxes2) + 1, FUNCTIONS[kind](boxes1, boxes2[: len(boxes1)], aligned=True)

    torch._dynamo.reset()  # else the kinds count as recompilations of one function
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for rows, columns in ((5, 9), (7, 30)):  # the second makes the sizes dynamic
        boxes1, boxes2 = device.put(inputs.uniform_boxes(rows)), device.put(inputs.clustered_boxes(columns))
        for got, expected in zip(compiled(boxes1, boxes2), use(boxes1, boxes2), strict=True):
            assert torch.equal(got, expected)


def test_export_with_any_number_of_boxes(kind):
    class Compare(torch.nn.Module):
        def forward(self, boxes1, boxes2):
            return FUNCTIONS[kind](boxes1, boxes2)

    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    example = torch.rand(5, 4), torch.rand(2, 9, 4)
    program = torch.export.export(Compare(), example, dynamic_shapes=({0: rows}, {1: columns}))
    boxes1, boxes2 = to_torch(mixed_boxes(33)), to_torch(mixed_boxes(80, seed=1).reshape(2, 40, 4))
    expect_equal(program.module()(boxes1, boxes2), reference.box_iou(to_numpy(boxes1), to_numpy(boxes2), kind), kind)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_is_the_output(kind):
    name = NAMES[kind]
    prepare = f"boxes = torch.rand(8000, 4).cumsum(1); detops.{name}(boxes[:99], boxes[:99])"
    output, extra = peak_growth(prepare, f"detops.{name}(boxes, boxes)", "result.nbytes")
    assert output == 256e6 and extra < output + 2e6


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_boxes_that_images_share_are_not_copied():
    prepare = "few, many = torch.rand(64, 1, 4), torch.rand(200_000, 4); detops.box_iou(few[:2], many[:99])"
    output, extra = peak_growth(prepare, "detops.box_iou(few, many)", "result.nbytes")
    assert output == 51.2e6 and extra < output + 8e6  # one set of columns takes 4.8 MB
