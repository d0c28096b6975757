"""box_area, box_convert, clip_boxes_to_image and remove_small_boxes: equal to the loops in reference/boxes.py."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import boxes as reference

UNROTATED = ("xyxy", "xywh", "cxcywh")
ROTATED = ("xywhr", "cxcywhr", "xyxyxyxy")
CONVERSIONS = [pair for formats in (UNROTATED, ROTATED) for pair in itertools.product(formats, formats)]
SIZES = (0, 1, 31, 32, 33, 257, 1000)


def boxes_in(fmt, n, seed=0):
    """n boxes as an array [n, K]; sides from tiny to large, rotations beyond a full turn."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-100, 500, (n, 2)), rng.uniform(0.5, 300, (n, 2)), rng.uniform(-400, 400, (n, 1))
    if fmt in UNROTATED:
        return reference.box_convert(np.concatenate(values[:2], axis=1), "xywh", fmt)
    return reference.box_convert(np.concatenate(values, axis=1), "cxcywhr", fmt)


def rounded_to(array, tensor):
    """An array as the reference gives it, rounded once to the dtype of a tensor."""
    return torch.from_numpy(np.array(array)).to(tensor.dtype)


def assert_same(got, expected):
    """Equal, NaN included."""
    assert got.shape == expected.shape and got.is_contiguous()
    assert torch.equal(got.detach().cpu().nan_to_num(nan=-77), expected.nan_to_num(nan=-77))


def check_unrotated(boxes, size=(300, 400), min_size=30.0):
    """All functions equal the reference on boxes [..., 4], which are taken as any format."""
    array = to_numpy(boxes)
    wide = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    for fmt in UNROTATED:
        area = detops.box_area(boxes, fmt)
        assert area.dtype == wide
        assert_same(area, rounded_to(reference.box_area(array, fmt), area))
        for out_fmt in UNROTATED:
            converted = detops.box_convert(boxes, fmt, out_fmt)
            assert converted.dtype == boxes.dtype and converted.data_ptr() != boxes.data_ptr() or not boxes.numel()
            assert_same(converted, rounded_to(reference.box_convert(array, fmt, out_fmt), boxes))
    assert_same(detops.clip_boxes_to_image(boxes, size), rounded_to(reference.clip_boxes_to_image(array, size), boxes))
    keep = detops.remove_small_boxes(boxes, min_size)
    assert keep.dtype == torch.int64 and keep.device == boxes.device
    assert keep.tolist() == reference.remove_small_boxes(array.reshape(-1, 4), min_size).tolist()


@pytest.mark.parametrize("n", SIZES)
def test_any_number_of_boxes(device, boxes_dtype, n):
    n = device.limit(n)
    check_unrotated(device.put(boxes_in("xyxy", n), boxes_dtype))
    check_unrotated(device.put(boxes_in("xyxy", n) / 1e3, boxes_dtype), (0, 1), 0.1)


@pytest.mark.parametrize("name", inputs.EDGES)
def test_odd_boxes(device, name):
    for dtype in (torch.float32, torch.float64):
        with np.errstate(all="ignore"):
            check_unrotated(device.put(inputs.edge_boxes(name), dtype), (7, 9), 10.0)


def test_many_boxes_on_many_threads():
    boxes = to_torch(boxes_in("xyxy", 70_001))
    expected = detops.remove_small_boxes(boxes, 30.0)
    assert torch.equal(expected, ((boxes[:, 2:] - boxes[:, :2]) >= 30).all(1).nonzero().squeeze(1))
    parts = [detops.box_convert(part, "xyxy", "cxcywh") for part in boxes.split(1000)]
    assert torch.equal(detops.box_convert(boxes, "xyxy", "cxcywh"), torch.cat(parts))
    assert torch.equal(detops.box_area(boxes), torch.cat([detops.box_area(part) for part in boxes.split(1000)]))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 0, 4), (0, 4), (1, 1, 5, 4)], ids=str)
def test_leading_dimensions(device, shape):
    boxes = boxes_in("xyxy", int(np.prod(shape[:-1]))).reshape(shape)
    check_unrotated(device.put(boxes))


def test_boxes_of_any_strides(device):
    wide = device.put(boxes_in("xyxy", 60))
    rows = torch.cat([wide, wide[:, :1]], dim=1)
    for boxes in (wide[::2], wide[5:], wide.t().contiguous().t(), rows[:, 1:], wide[:1].expand(7, 4), wide.flip(0)):
        before = boxes.clone()
        check_unrotated(boxes)
        assert torch.equal(boxes, before)


@pytest.mark.parametrize("fmt", ROTATED)
def test_areas_of_rotated_boxes(device, boxes_dtype, fmt):
    boxes = device.put(boxes_in(fmt, 100), boxes_dtype)
    area = detops.box_area(boxes, fmt)
    assert_same(area, rounded_to(reference.box_area(to_numpy(boxes), fmt), area))


@pytest.mark.parametrize(("in_fmt", "out_fmt"), list(itertools.product(ROTATED, ROTATED)))
def test_conversions_of_rotated_boxes(in_fmt, out_fmt):
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        boxes = to_torch(boxes_in(in_fmt, 200), dtype)
        converted = detops.box_convert(boxes, in_fmt, out_fmt)
        expected = reference.box_convert(to_numpy(boxes), in_fmt, out_fmt)
        # Angles are the same a full turn apart.
        difference = to_numpy(converted).astype(np.float64) - expected
        if out_fmt != "xyxyxyxy":
            difference[:, 4] = (difference[:, 4] + 180) % 360 - 180
        assert converted.dtype == dtype and np.abs(difference).max() < tolerance


def test_a_rotation_is_counter_clockwise_as_seen():
    upright = torch.tensor([[10.0, 20, 8, 2, 90]])  # its first side points up, where y is less
    corners = detops.box_convert(upright, "cxcywhr", "xyxyxyxy")
    torch.testing.assert_close(corners, torch.tensor([[9.0, 24, 9, 16, 11, 16, 11, 24]]))


def test_halves_are_rounded_once():
    for dtype, in_fmt in itertools.product((torch.float16, torch.bfloat16), (*UNROTATED, *ROTATED)):
        boxes = to_torch(boxes_in(in_fmt, 50), dtype)
        for out_fmt in UNROTATED if in_fmt in UNROTATED else ROTATED:
            expected = detops.box_convert(boxes.float(), in_fmt, out_fmt).to(dtype)
            assert torch.equal(detops.box_convert(boxes, in_fmt, out_fmt), expected)
            with_gradient = detops.box_convert(boxes.clone().requires_grad_(), in_fmt, out_fmt)
            assert torch.equal(with_gradient, expected) and with_gradient.requires_grad


# Gradients.


def test_the_same_values_with_and_without_gradient(boxes_dtype):
    boxes = to_torch(boxes_in("xyxy", 50), boxes_dtype)
    leaf = boxes.clone().requires_grad_()
    for fmt, out_fmt in itertools.product(UNROTATED, UNROTATED):
        assert torch.equal(detops.box_convert(leaf, fmt, out_fmt), detops.box_convert(boxes, fmt, out_fmt))
        assert torch.equal(detops.box_area(leaf, fmt), detops.box_area(boxes, fmt))
    assert torch.equal(detops.clip_boxes_to_image(leaf, (99, 77)), detops.clip_boxes_to_image(boxes, (99, 77)))
    assert torch.equal(detops.remove_small_boxes(leaf, 9.0), detops.remove_small_boxes(boxes, 9.0))
    with torch.no_grad():
        assert not detops.box_area(leaf).requires_grad


@pytest.mark.parametrize(("in_fmt", "out_fmt"), CONVERSIONS)
def test_gradients_of_conversions(in_fmt, out_fmt):
    boxes = to_torch(boxes_in(in_fmt, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: detops.box_convert(b, in_fmt, out_fmt), boxes)
    if in_fmt in UNROTATED:
        assert torch.autograd.gradgradcheck(lambda b: detops.box_convert(b, in_fmt, out_fmt), boxes)


@pytest.mark.parametrize("fmt", UNROTATED + ROTATED)
def test_gradients_of_areas(fmt):
    boxes = to_torch(boxes_in(fmt, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: detops.box_area(b, fmt), boxes)


def test_gradients_of_clipping():
    boxes = to_torch(boxes_in("xyxy", 20), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: detops.clip_boxes_to_image(b, (300, 200)), boxes)
    border = torch.tensor([[0.0, -1, 200, 301]], requires_grad=True)
    detops.clip_boxes_to_image(border, (300, 200)).sum().backward()
    assert border.grad.tolist() == [[1, 0, 1, 0]]


def test_forward_derivatives():
    boxes, tangent = to_torch(boxes_in("xyxy", 5)), torch.tensor([0.0, 0, 1, 0]).expand(5, 4).contiguous()
    heights = boxes[:, 3] - boxes[:, 1]
    assert torch.equal(torch.func.jvp(detops.box_area, (boxes,), (tangent,))[1], heights)
    with forward_ad.dual_level():
        area = detops.box_area(forward_ad.make_dual(boxes, tangent))
        assert torch.equal(forward_ad.unpack_dual(area).tangent, heights)


# Integers.


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
)
def test_integer_boxes(dtype):
    boxes = torch.tensor([[1, 2, 4, 9], [0, 0, 100, 7]], dtype=dtype)
    area = detops.box_area(boxes)
    assert area.tolist() == [21, 700] and area.dtype == torch.int64
    sides = detops.box_convert(boxes, "xyxy", "xywh")
    assert sides.tolist() == [[1, 2, 3, 7], [0, 0, 100, 7]]
    wide = {torch.int64: torch.int64, torch.uint32: torch.int64, torch.uint64: torch.int64}
    assert sides.dtype == wide.get(dtype, torch.int32)
    centres = detops.box_convert(boxes, "xyxy", "cxcywh")
    assert centres.tolist() == [[2.5, 5.5, 3, 7], [50, 3.5, 100, 7]] and centres.dtype == torch.float32
    clipped = detops.clip_boxes_to_image(boxes, (5, 50))
    assert clipped.tolist() == [[1, 2, 4, 5], [0, 0, 50, 5]] and clipped.dtype == dtype
    assert detops.remove_small_boxes(boxes, 3.5).tolist() == [1]
    assert detops.remove_small_boxes(boxes, float("inf")).tolist() == []
    assert detops.remove_small_boxes(boxes, float("-inf")).tolist() == [0, 1]
    corners = detops.box_convert(torch.tensor([[0, 0, 10, 6, 90]], dtype=torch.int64), "xywhr", "xyxyxyxy")
    assert corners.tolist() == [[0, 0, 0, -10, 6, -10, 6, 0]] and corners.dtype == torch.int64


def test_integer_sides_are_not_rounded():
    boxes = torch.tensor([[0, 0, 2**24, 2**24], [0, 0, 2**24 + 1, 2**24 + 1]])
    assert detops.remove_small_boxes(boxes, 2.0**24 + 1).tolist() == [1]


# Bad input.


def test_bad_options():
    boxes = torch.zeros(2, 4)
    formats = "xyxy, xywh, cxcywh, xywhr, cxcywhr, xyxyxyxy"
    with pytest.raises(ValueError, match=f"^box_area: fmt must be one of {formats}, got 'yxyx'"):
        detops.box_area(boxes, "yxyx")
    with pytest.raises(ValueError, match=f"^box_convert: in_fmt must be one of {formats}, got 'yxyx'"):
        detops.box_convert(boxes, "yxyx", "xyxy")
    with pytest.raises(ValueError, match=f"^box_convert: out_fmt must be one of {formats}, got 'XYXY'"):
        detops.box_convert(boxes, "xyxy", "XYXY")
    with pytest.raises(NotImplementedError, match="^box_convert: out_fmt must be a format without rotation, .*'xywhr'"):
        detops.box_convert(boxes, "xyxy", "xywhr")
    with pytest.raises(NotImplementedError, match="^box_convert: out_fmt must be a format with rotation, .*'cxcywh'"):
        detops.box_convert(torch.zeros(2, 5), "cxcywhr", "cxcywh")
    for size in ((-1, 5), (5, float("nan")), (5,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"^clip_boxes_to_image: size must be \(height, width\), .*, got \("):
            detops.clip_boxes_to_image(boxes, size)
    with pytest.raises(ValueError, match="^remove_small_boxes: min_size must be a number, got nan"):
        detops.remove_small_boxes(boxes, float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_bad_shapes(device, dtype):
    for boxes, shape in ((torch.zeros(3, 5, dtype=dtype), r"\[3, 5\]"), (torch.tensor(1, dtype=dtype), r"\[\]")):
        boxes = boxes.to(device.torch)
        message = rf"boxes must have shape \[\.\.\., 4\], got {shape}"
        for name, arguments in (
            ("box_area", ()),
            ("box_convert", ("xyxy", "xywh")),
            ("box_convert", ("xywh", "xywh")),
            ("clip_boxes_to_image", ((5, 5),)),
            ("remove_small_boxes", (1.0,)),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
                getattr(detops, name)(boxes, *arguments)
    with pytest.raises(RuntimeError, match=r"^box_convert: boxes must have shape \[\.\.\., 5\], got \[2, 4\]"):
        detops.box_convert(torch.zeros(2, 4, dtype=dtype), "xywhr", "cxcywhr")
    with pytest.raises(RuntimeError, match=r"^box_area: boxes must have shape \[\.\.\., 8\], got \[2, 4\]"):
        detops.box_area(torch.zeros(2, 4, dtype=dtype), "xyxyxyxy")


def test_bad_arguments_of_the_ops(device):
    boxes = device.put(boxes_in("xyxy", 2))
    with pytest.raises(RuntimeError, match=r"^box_area: fmt must be in 0\.\.5, got 6"):
        _library.ops.box_area(boxes, 6)
    with pytest.raises(RuntimeError, match=r"^box_convert: in_fmt must be in 0\.\.2, got 3"):
        _library.ops.box_convert(boxes, 3, 0)
    with pytest.raises(RuntimeError, match=r"^box_convert: out_fmt must be in 0\.\.2, got -1"):
        _library.ops.box_convert(boxes, 0, -1)
    with pytest.raises(RuntimeError, match="^clip_boxes_to_image: boxes must be float16, .*, got int32"):
        _library.ops.clip_boxes_to_image(boxes.int(), 5, 5)


# A PyTorch citizen.


@pytest.mark.parametrize("shape", [(0, 4), (5, 4), (2, 3, 4)], ids=str)
def test_opcheck(device, shape):
    boxes = device.put(boxes_in("xyxy", int(np.prod(shape[:-1]))).reshape(shape))
    torch.library.opcheck(_library.ops.box_area, (boxes, 0))
    torch.library.opcheck(_library.ops.box_area, (boxes.double(), 1))
    torch.library.opcheck(_library.ops.box_convert, (boxes.half(), 0, 2))
    torch.library.opcheck(_library.ops.clip_boxes_to_image, (boxes, 200.0, 300.0))
    torch.library.opcheck(_library.ops.remove_small_boxes, (boxes, 20.0))


class Everything(torch.nn.Module):
    def forward(self, boxes):
        clipped = detops.clip_boxes_to_image(detops.box_convert(boxes, "cxcywh", "xyxy"), (300, 400))
        keep = detops.remove_small_boxes(clipped, 5.0)
        rotated = detops.box_convert(torch.cat([boxes, boxes[:, :1]], 1), "cxcywhr", "xyxyxyxy")
        return clipped, detops.box_area(clipped), keep, rotated


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    compiled = torch.compile(Everything(), fullgraph=True)
    for n in (40, 60):  # two sizes: the second makes N dynamic
        boxes = device.put(boxes_in("cxcywh", n))
        torch.testing.assert_close(compiled(boxes), Everything()(boxes), rtol=1e-5, atol=1e-3)


def test_export_with_any_number_of_boxes():
    dynamic = {"boxes": {0: torch.export.Dim("n", min=2)}}
    program = torch.export.export(Everything(), (to_torch(boxes_in("cxcywh", 40)),), dynamic_shapes=dynamic)
    for n in (40, 300):
        boxes = to_torch(boxes_in("cxcywh", n))
        assert all(map(torch.equal, program.module()(boxes), Everything()(boxes)))


# Parity.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_values_and_gradients_of_torchvision(torchvision, dtype, gradient):
    ops = torchvision.ops
    if gradient and not dtype.is_floating_point:
        pytest.skip("integers have no gradient")

    def check_same(name, boxes, *arguments):
        leaves = [boxes.clone().requires_grad_(gradient) for _ in range(2)]
        if name == "box_convert" and dtype == torch.uint8 and len(set(arguments)) == 2:
            leaves[1] = boxes.int()  # as detops widens it; uint8 wraps there
        got, expected = getattr(detops, name)(leaves[0], *arguments), getattr(ops, name)(leaves[1], *arguments)
        if name == "box_area" and not dtype.is_floating_point:
            expected = expected.long()  # int32 there, in which large areas wrap
        assert got.dtype == expected.dtype and torch.equal(got, expected)
        if gradient:
            weights = torch.arange(got.numel(), dtype=dtype).reshape(got.shape).cos()
            (got * weights).sum().backward()
            (expected * weights).sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)

    for shape in ((300,), (2, 7), ()):
        for in_fmt, out_fmt in CONVERSIONS:
            array = np.abs(boxes_in(in_fmt, int(np.prod(shape)))).reshape(*shape, -1) / 3
            boxes = to_torch(array, torch.float64).to(dtype)
            check_same("box_convert", boxes, in_fmt, out_fmt)
            if in_fmt == out_fmt and in_fmt in UNROTATED:
                check_same("box_area", boxes, in_fmt)
                check_same("clip_boxes_to_image", boxes, (99, 77))
    if dtype != torch.uint8:  # which wrap around in torchvision
        boxes = to_torch(boxes_in("xyxy", 500), torch.float64).to(dtype)
        assert torch.equal(detops.remove_small_boxes(boxes, 25.5), ops.remove_small_boxes(boxes, 25.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_areas_of_halves_as_torchvision(torchvision, dtype):
    ops = torchvision.ops
    boxes = to_torch(boxes_in("xyxy", 100), dtype)
    for fmt in UNROTATED:
        assert torch.equal(detops.box_area(boxes, fmt), ops.box_area(boxes, fmt))


def test_narrow_integers_do_not_wrap():
    assert detops.remove_small_boxes(torch.tensor([[50, 50, 10, 10]], dtype=torch.uint8), 5).tolist() == []
    assert detops.remove_small_boxes(torch.tensor([[-100, -100, 100, 100]], dtype=torch.int8), 5).tolist() == [0]
    clipped = detops.clip_boxes_to_image(torch.tensor([[50, 50, 250, 200]], dtype=torch.uint8), (480, 640))
    assert clipped.dtype == torch.uint8 and clipped.tolist() == [[50, 50, 250, 200]]
    large = torch.tensor([[0, 0, 2**24 + 1, 200]])
    assert detops.clip_boxes_to_image(large, (100.7, float("inf"))).tolist() == [[0, 0, 2**24 + 1, 100]]


def test_gradients_pass_vmap():
    boxes = torch.tensor([[0.0, 0, 10, 20], [2, 2, 8, 9]])
    gradient = torch.func.grad(lambda x: torch.vmap(detops.box_area)(x).sum())(boxes)
    assert gradient.tolist() == [[-20, -10, 20, 10], [-7, -6, 7, 6]]
