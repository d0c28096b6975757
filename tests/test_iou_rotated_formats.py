"""box_iou of rotated boxes: formats, dtypes, shapes, errors, and as a PyTorch op. Values: test_iou_rotated.py."""

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import iou as reference
from test_iou_rotated import check, expected_of, rotated_iou

FORMATS = ("cxcywhr", "xywhr", "xyxyxyxy")


# Formats, dtypes, shapes.


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats(device, fmt):
    boxes1, boxes2 = inputs.rotated_boxes(40), inputs.clustered_rotated_boxes(40, extent=100)
    expected = reference.rotated_box_iou(boxes1, boxes2)
    given = []
    for boxes in (boxes1, boxes2):
        corners = reference.corners(boxes).reshape(-1, 8)
        converted = {"cxcywhr": boxes, "xywhr": np.concatenate([corners[:, :2], boxes[:, 2:]], 1), "xyxyxyxy": corners}
        given.append(converted[fmt])
    # Corners near 100 say less in float32 about a box with sides of 1 than its centre and sides do.
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 1e-6 if fmt == "cxcywhr" else 2e-5)):
        got = rotated_iou(device.put(given[0], dtype), device.put(given[1], dtype), fmt)
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=atol)
        got = rotated_iou(device.put(given[0], dtype), device.put(given[1], dtype), fmt, aligned=True)
        np.testing.assert_allclose(to_numpy(got), expected.diagonal(), rtol=0, atol=atol)


@pytest.mark.parametrize("fmt", FORMATS)
def test_equals_torchvision(torchvision, device, fmt):
    boxes1, boxes2 = to_torch(inputs.rotated_boxes(80)), to_torch(inputs.clustered_rotated_boxes(80, extent=100))
    if fmt != "cxcywhr":
        boxes1, boxes2 = (torchvision.ops.box_convert(each, "cxcywhr", fmt) for each in (boxes1, boxes2))
    try:
        expected = torchvision.ops.box_iou(boxes1, boxes2, fmt=fmt)
    except ValueError:
        pytest.skip("this torchvision has no rotated box_iou")
    got = rotated_iou(boxes1.to(device.torch), boxes2.to(device.torch), fmt).cpu()
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)  # its code rounds in image coordinates


def test_dtypes(device, boxes_dtype):
    boxes1 = device.put(inputs.rotated_boxes(40), boxes_dtype)
    boxes2 = device.put(inputs.rotated_boxes(30, seed=1), boxes_dtype)
    got = check(boxes1, boxes2)
    if boxes_dtype != torch.float64:
        assert torch.equal(got, rotated_iou(boxes1.float(), boxes2.float()))
    assert torch.equal(rotated_iou(boxes1, boxes2.double()), rotated_iou(boxes1.double(), boxes2.double()))
    whole = device.put(np.abs(inputs.rotated_boxes(30)).round() + 1, torch.int64)
    assert torch.equal(rotated_iou(whole, whole), rotated_iou(whole.float(), whole.float()))


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [
        ((2, 5, 5), (2, 7, 5)),
        ((5, 5), (3, 7, 5)),
        ((3, 5, 5), (7, 5)),
        ((3, 1, 5, 5), (2, 7, 5)),
        ((0, 5, 5), (7, 5)),
        ((2, 0, 5), (2, 7, 5)),
        ((2, 5, 5), (2, 0, 5)),
    ],
)
def test_batch_dimensions_broadcast(device, shape1, shape2):
    boxes1 = inputs.rotated_boxes(int(np.prod(shape1[:-1]))).reshape(shape1)
    boxes2 = inputs.rotated_boxes(int(np.prod(shape2[:-1])), seed=1).reshape(shape2)
    check(device.put(boxes1), device.put(boxes2))


@pytest.mark.parametrize(("shape1", "shape2"), [((5,), (5,)), ((2, 3, 5), (2, 3, 5)), ((7, 5), (5,)), ((0, 5), (5,))])
def test_aligned_shapes(device, shape1, shape2):
    boxes1 = inputs.rotated_boxes(int(np.prod(shape1[:-1]))).reshape(shape1)
    boxes2 = inputs.rotated_boxes(int(np.prod(shape2[:-1])), seed=1).reshape(shape2)
    check(device.put(boxes1), device.put(boxes2), aligned=True)


def test_inputs_of_any_strides_are_read(device):
    boxes, images = device.put(inputs.rotated_boxes(24)), device.put(inputs.rotated_boxes(24).reshape(4, 6, 5))
    wide = torch.cat([boxes, boxes], 1)
    cases = [(boxes[::2], wide[:, :5]), (boxes.t().contiguous().t(), boxes[:1].expand(9, 5))]
    cases += [(images.transpose(0, 1), boxes), (boxes[:6].expand(4, 6, 5), images), (images[::2], images[1::2])]
    for boxes1, boxes2 in cases:
        check(boxes1, boxes2)
        assert torch.equal(rotated_iou(boxes1, boxes2), rotated_iou(boxes1.contiguous(), boxes2.contiguous()))


# Bad input.

ROTATED = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "aligned", "message"),
    [
        (torch.zeros(3, 4), ROTATED, False, r"boxes1 must have shape \[..., N, 5\], got \[3, 4\]"),
        (ROTATED, torch.zeros(5), False, r"boxes2 must have shape \[..., M, 5\], got \[5\]"),
        (ROTATED, torch.zeros(3, 8), True, r"boxes2 must have shape \[..., 5\], got \[3, 8\]"),
        (ROTATED, torch.zeros(2, 5), True, r"boxes2 must have the shape of boxes1 \(\[3, 5\]\), got \[2, 5\]"),
        (
            *(torch.zeros(2, 3, 5), torch.zeros(3, 3, 5), False),
            r"boxes2 must have the batch dimensions of boxes1 \(\[2, 3, 5\]\), got \[3, 3, 5\]",
        ),
    ],
)
def test_bad_shapes(device, boxes1, boxes2, aligned, message):
    with pytest.raises(RuntimeError, match=f"^box_iou: {message}$"):
        rotated_iou(boxes1.to(device.torch), boxes2.to(device.torch), aligned=aligned)


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_gradient(device, fmt):
    boxes = torch.ones(3, 8 if fmt == "xyxyxyxy" else 5, device=device.torch)
    for boxes1, boxes2 in ((boxes.clone().requires_grad_(), boxes), (boxes, boxes.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match="^box_iou: rotated boxes must not require a gradient, got some that do"):
            rotated_iou(boxes1, boxes2, fmt)
        with torch.no_grad():
            assert not rotated_iou(boxes1, boxes2, fmt).requires_grad


# A PyTorch citizen.


def test_opcheck(device):
    boxes1, boxes2 = device.put(inputs.rotated_boxes(8)), device.put(inputs.rotated_boxes(6, seed=1))
    torch.library.opcheck(_library.ops.rotated_box_iou, (boxes1, boxes2, False))
    torch.library.opcheck(_library.ops.rotated_box_iou, (boxes1.expand(2, 8, 5), boxes2.expand(2, 6, 5), False))
    torch.library.opcheck(_library.ops.rotated_box_iou, (boxes1[:6].double(), boxes2.double(), True))
    torch.library.opcheck(_library.ops.rotated_box_iou, (boxes1[:0], boxes2, False))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("fmt", FORMATS)
def test_compile_in_one_graph(device, fmt):
    torch._dynamo.reset()  # else the formats count as recompilations of one function
    compiled = torch.compile(lambda *boxes: rotated_iou(*boxes, fmt) * 2, fullgraph=True, dynamic=True)
    for rows, columns in ((5, 9), (7, 30)):
        boxes1 = detops.box_convert(device.put(inputs.rotated_boxes(rows)), "cxcywhr", fmt)
        boxes2 = detops.box_convert(device.put(inputs.rotated_boxes(columns, seed=1)), "cxcywhr", fmt)
        torch.testing.assert_close(compiled(boxes1, boxes2), rotated_iou(boxes1, boxes2, fmt) * 2, rtol=0, atol=2e-5)


def test_export_with_any_number_of_boxes():
    class Compare(torch.nn.Module):
        def forward(self, boxes1, boxes2):
            return rotated_iou(boxes1, boxes2)

    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.export.export(
        Compare(), (torch.rand(5, 5), torch.rand(2, 9, 5)), dynamic_shapes=({0: rows}, {1: columns})
    )
    boxes1, boxes2 = to_torch(inputs.rotated_boxes(20)), to_torch(inputs.rotated_boxes(14).reshape(2, 7, 5))
    np.testing.assert_allclose(
        to_numpy(program.module()(boxes1, boxes2)), expected_of(boxes1, boxes2), rtol=0, atol=1e-6
    )


def test_any_number_of_threads_gives_the_same(restore_threads):
    boxes1, boxes2 = to_torch(inputs.rotated_boxes(500)), to_torch(inputs.rotated_boxes(300, seed=1))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(rotated_iou(boxes1, boxes2))
    assert all(torch.equal(result, results[0]) for result in results[1:]) and results[0].any()
