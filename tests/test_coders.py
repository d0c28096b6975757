"""encode_boxes, decode_boxes, encode_ltrb, decode_ltrb and BoxCoder: equal to the loops in reference/coders.py."""

import math

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import NAN, to_numpy, to_torch
from reference import coders as reference

SIZES = (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OPS = ("encode_boxes", "decode_boxes", "encode_ltrb", "decode_ltrb")
# Of the result; the coordinates that go into it count too, see `check`.
RELATIVE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
OPTIONS = {
    "encode_boxes": [{}, {"weights": WEIGHTS}],
    "decode_boxes": [{}, {"weights": WEIGHTS}, {"clip": 0.3}, {"clip": math.inf}],
    "encode_ltrb": [{}, {"max_distance": 7.0}],
    "decode_ltrb": [{}],
}


def boxes_of(*shape, seed=0):
    return inputs.uniform_boxes(int(np.prod(shape)), seed).reshape(*shape, 4)


def points_of(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1000, (*shape, 2))


def strides_of(*shape, seed=0):
    return np.random.default_rng(seed).choice([8.0, 16.0, 32.0], shape)


def first_of(op, *shape, seed=0):
    if op.startswith("encode"):
        return boxes_of(*shape, seed=seed)
    if op == "decode_ltrb":
        return np.random.default_rng(seed).uniform(-1, 16, (*shape, 4))
    return np.random.default_rng(seed).normal(0, 1, (*shape, 4))


def arguments(op, shape, second_shape=None, seed=0):
    """Arrays; the second and third of `second_shape`."""
    second_shape = shape if second_shape is None else second_shape
    first = first_of(op, *shape, seed=seed)
    if op.endswith("boxes"):
        return first, boxes_of(*second_shape, seed=seed + 1)
    return first, points_of(*second_shape, seed=seed + 1), strides_of(*second_shape, seed=seed + 1)


def put(device, arrays, dtype=torch.float32):
    return tuple(device.put(array, dtype) for array in arrays)


def check(op, tensors, **options):
    """The result equals the reference's, and on every device that of the CPU's kernels to the bit; returns it."""
    result = getattr(detops, op)(*tensors, **options)
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    assert result.dtype == dtype and result.device == tensors[0].device and result.is_contiguous()
    arrays = [to_numpy(tensor).astype(np.float64) for tensor in tensors]
    expected = getattr(reference, op)(*arrays, **options)
    magnitude = max((np.abs(array[np.isfinite(array)]).max(initial=0) for array in arrays), default=0)
    if op == "encode_boxes":  # of quotients, up to the largest offset over the smallest side
        sides = np.abs(arrays[1][..., 2:] - arrays[1][..., :2])
        magnitude = magnitude / sides.min(initial=1) * max(options.get("weights", [1]))
    single = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(
        result.double().cpu(),
        to_torch(expected, torch.float64),
        rtol=RELATIVE[dtype],
        atol=RELATIVE[single] * magnitude,
        equal_nan=True,
    )
    if result.is_cuda or _library.ops.decode_boxes is not torch.ops.detops.decode_boxes.default:
        with _library.use_namespace("detops"):
            on_cpu = getattr(detops, op)(*(tensor.cpu() for tensor in tensors), **options)
        assert torch.equal(on_cpu.nan_to_num(nan=-77), result.cpu().nan_to_num(nan=-77))
    return result


# Values.


def test_written_out(device):
    boxes, anchors = device.put([[0.0, 0, 20, 10]]), device.put([[0.0, 0, 10, 10]])
    deltas = check("encode_boxes", (boxes, anchors), weights=(10, 10, 5, 5))
    np.testing.assert_allclose(to_numpy(deltas), [[5, 0, 5 * np.log(2), 0]], rtol=1e-6)
    assert check("decode_boxes", (device.put([[0.5, -1, 0, 0]]), anchors)).tolist() == [[5, -10, 15, 0]]
    points, strides = device.put([[12.0, 4]]), device.put([4.0])
    assert check("encode_ltrb", (boxes, points, strides)).tolist() == [[3, 1, 2, 1.5]]
    assert check("encode_ltrb", (boxes, points, strides), max_distance=1.75).tolist() == [[1.75, 1, 1.75, 1.5]]
    assert check("decode_ltrb", (device.put([[3, 1, 2, 1.5]]), points, strides)).tolist() == [[0, 0, 20, 10]]
    assert check("decode_ltrb", (device.put([[3, 1, 2, 1.5]]), points)).tolist() == [[9, 3, 14, 5.5]]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_sizes(device, op, n):
    for options in OPTIONS[op]:
        check(op, put(device, arguments(op, (device.limit(n, 300),))), **options)


@pytest.mark.parametrize("op", OPS)
def test_dtypes(device, op, boxes_dtype):
    for options in OPTIONS[op]:
        check(op, put(device, arguments(op, (70,)), boxes_dtype), **options)


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes(device, op):
    arrays = arguments(op, (40,))
    for first in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for second in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            tensors = put(device, arrays, second)
            check(op, (device.put(arrays[0], first), *tensors[1:]))
    half = device.put(arrays[0], torch.float16)
    tensors = put(device, arrays)
    assert torch.equal(getattr(detops, op)(half, *tensors[1:]), getattr(detops, op)(half.float(), *tensors[1:]))


@pytest.mark.parametrize(
    ("shape", "second"),
    [
        ((3, 50), (50,)),  # shared by the images
        ((3, 50), (1, 50)),
        ((3, 50), (3, 1)),
        ((40, 7), (40, 1)),  # shared by the classes
        ((2, 9, 150), (9, 1)),  # both; more classes than rows of a run
        ((2, 3, 5, 4), (3, 5, 1)),
        ((2, 3, 5, 4), (2, 1, 1, 4)),  # repeated in the middle
        ((2, 3, 5), (1,)),
        ((2, 3, 5), ()),
        ((5,), (2, 3, 5)),  # the second is the larger
        ((3, 1), (1, 4)),
        ((), ()),
        ((), (6,)),
        ((0, 5), (5,)),
        ((4, 0), (1, 0)),
        ((2, 0, 3), (3,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_broadcasting(device, op, shape, second):
    for dtype in (torch.float16, torch.float32):
        check(op, put(device, arguments(op, shape, second), dtype))


@pytest.mark.parametrize("op", ("encode_ltrb", "decode_ltrb"))
def test_strides_of_their_own_shape(device, op):
    first, points, _ = put(device, arguments(op, (3, 20)))
    for strides in (strides_of(20), strides_of(3, 1), strides_of(3, 20), np.array(4.0)):
        check(op, (first, points, device.put(strides)))
    shared = points[0]
    for strides in (strides_of(20), strides_of(1), np.array(4.0)):
        check(op, (first, shared, device.put(strides)))


@pytest.mark.parametrize("op", OPS)
def test_strided_tensors(device, op):
    tensors = put(device, arguments(op, (24,)))
    expected = check(op, tensors)
    function = getattr(detops, op)
    apart = [torch.stack([t, t], -1)[..., 0] for t in tensors]
    assert not any(t.is_contiguous() for t in apart) and torch.equal(function(*apart), expected)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in tensors]  # not aligned
    assert torch.equal(function(*shifted), expected)
    assert torch.equal(function(*(t[::2] for t in tensors)), expected[::2])
    folded = [t.reshape(4, 6, *t.shape[1:]).transpose(0, 1) for t in tensors]
    assert torch.equal(function(*folded), expected.reshape(4, 6, 4).transpose(0, 1))


@pytest.mark.parametrize("name", inputs.EDGES)
@pytest.mark.parametrize("op", OPS)
def test_odd_boxes(device, op, name):
    """Not numbers where the formula gives none, the formula's value elsewhere."""
    odd = inputs.edge_boxes(name)
    n = len(odd)
    first, second, *strides = arguments(op, (n,))
    if op == "decode_boxes":
        pairs = [(first, odd)]
    elif op == "encode_boxes":
        pairs = [(odd, second), (boxes_of(n), odd)]
    else:
        pairs = [(odd, second), (first, odd[:, :2])]
    for each in pairs:
        tensors = put(device, (*each, *strides))
        got = to_numpy(getattr(detops, op)(*tensors))
        with np.errstate(all="ignore"):
            expected = getattr(reference, op)(*map(to_numpy, tensors))
        assert expected.dtype == np.float32  # overflows where the op does
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        infinite = np.isinf(expected)
        np.testing.assert_array_equal(got[infinite], expected[infinite])
        np.testing.assert_allclose(got[~infinite], expected[~infinite], rtol=1e-4, atol=1e-2)


def test_sides_without_a_logarithm(device):
    anchor = device.put([[0.0, 0, 10, 10]])
    assert detops.encode_boxes(device.put([[5.0, 5, 5, 5]]), anchor).tolist() == [[0, 0, -math.inf, -math.inf]]
    assert detops.encode_boxes(device.put([[9.0, 0, 1, 10]]), anchor)[0].isnan().tolist() == [False, False, True, False]
    tiny = device.put([[0.0, 0, 1e-42, 1e30]])
    expected = reference.encode_boxes(to_numpy(tiny), to_numpy(anchor))
    np.testing.assert_allclose(to_numpy(detops.encode_boxes(tiny, anchor)), expected, rtol=1e-6)


def test_large_deltas(device):
    anchor = device.put([[0.0, 0, 16, 16]])
    deltas = device.put([[0, 0, 1e30, 50], [0, 0, 80, 100], [0, 0, -100, -math.inf], [0, 0, NAN, 0]])
    clipped = detops.decode_boxes(deltas, anchor)
    torch.testing.assert_close(clipped[0], device.put([-492.0, -492, 508, 508]))
    free = detops.decode_boxes(deltas, anchor, clip=math.inf)
    assert free[:2].isinf().tolist() == [[True, False, True, False], [False, True, False, True]]
    assert free[2].tolist() == clipped[2].tolist() == [8, 8, 8, 8]
    for boxes in (clipped, free):
        assert boxes[3].isnan().tolist() == [True, False, True, False]


def test_exponentials_of_all_sizes(device):
    dw = np.linspace(-88, 88, device.limit(20_000))
    deltas = device.put(np.stack([0 * dw, 0 * dw, dw, -dw], 1))
    boxes = to_numpy(detops.decode_boxes(deltas, device.put([[-1.0, -1, 1, 1]]), clip=math.inf)).astype(np.float64)
    for column, power in ((2, to_numpy(deltas)[:, 2]), (3, to_numpy(deltas)[:, 3])):
        np.testing.assert_allclose(boxes[:, column], np.exp(power.astype(np.float64)), rtol=1.2e-7, atol=1.5e-45)


def test_logarithms_of_all_sizes(device):
    sides = np.exp(np.linspace(-87, 85, device.limit(20_000)))
    boxes = device.put(np.stack([0 * sides, 0 * sides, sides, sides], 1))
    deltas = to_numpy(detops.encode_boxes(boxes, device.put([[0.0, 0, 1, 1]])))
    np.testing.assert_allclose(deltas[:, 2], np.log(to_numpy(boxes)[:, 2].astype(np.float64)), rtol=1.2e-7)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), WEIGHTS])
def test_decoding_inverts_encoding(device, weights):
    boxes, anchors = put(device, (boxes_of(200), boxes_of(200, seed=1)), torch.float64)
    back = detops.decode_boxes(detops.encode_boxes(boxes, anchors, weights), anchors, weights, math.inf)
    torch.testing.assert_close(back, boxes)
    points, strides = put(device, (points_of(200), strides_of(200)), torch.float64)
    torch.testing.assert_close(detops.decode_ltrb(detops.encode_ltrb(boxes, points, strides), points, strides), boxes)


def test_many_rows_on_many_threads():
    for op in OPS:
        tensors = put_on_cpu(arguments(op, (2, 9000), (9000,)))
        whole = getattr(detops, op)(*tensors)
        parts = [getattr(detops, op)(t, *tensors[1:]) for t in tensors[0]]
        assert torch.equal(whole, torch.stack(parts))


def put_on_cpu(arrays, dtype=torch.float32):
    return tuple(to_torch(array, dtype) for array in arrays)


# BoxCoder.


def test_box_coder(device):
    counts = (3, 0, 5)
    boxes = [device.put(boxes_of(n, seed=n)) for n in counts]
    proposals = [device.put(boxes_of(n, seed=n + 10)) for n in counts]
    coder = detops.BoxCoder(WEIGHTS)
    deltas = coder.encode(boxes, proposals)
    assert [d.shape for d in deltas] == [(n, 4) for n in counts]
    assert torch.equal(deltas[2], detops.encode_boxes(boxes[2], proposals[2], WEIGHTS))
    decoded = coder.decode(torch.cat(deltas), proposals)
    assert decoded.shape == (8, 1, 4)
    classes = coder.decode(torch.cat(deltas).repeat(1, 6), proposals)
    assert classes.shape == (8, 6, 4) and torch.equal(classes, decoded.expand(8, 6, 4))
    assert coder.decode_single(torch.cat(deltas).repeat(1, 6), torch.cat(proposals)).shape == (8, 24)
    nothing = [device.put(np.zeros((0, 4)))]
    assert coder.decode(device.put(np.zeros((0, 8))), nothing).shape == (0, 8)  # as torchvision


def test_torchvision(torchvision):
    utils = pytest.importorskip("torchvision.models.detection._utils")
    theirs, ours = utils.BoxCoder(WEIGHTS), detops.BoxCoder(WEIGHTS)
    boxes = [to_torch(boxes_of(n, seed=n)) for n in (300, 0, 77)]
    proposals = [to_torch(boxes_of(n, seed=n + 9)) for n in (300, 0, 77)]
    for got, expected in zip(ours.encode(boxes, proposals), theirs.encode(boxes, proposals), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    codes = 3 * torch.randn(377, 4 * 5, generator=torch.Generator().manual_seed(0))
    got, expected = ours.decode(codes, proposals), theirs.decode(codes, proposals)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=3e-4)
    empty = torch.zeros(0, 8), [torch.zeros(0, 4)]
    assert ours.decode(*empty).shape == theirs.decode(*empty).shape
    # FCOS divides by the sides of its square anchors: the strides.
    points, strides = to_torch(points_of(200)), to_torch(strides_of(200))
    anchors = torch.cat([points - strides[:, None] / 2, points + strides[:, None] / 2], 1)
    targets, linear = to_torch(boxes_of(200)), utils.BoxLinearCoder(normalize_by_size=True)
    distances = linear.encode(anchors, targets)
    torch.testing.assert_close(detops.encode_ltrb(targets, points, strides), distances, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        detops.decode_ltrb(distances, points, strides), linear.decode(distances, anchors), rtol=1e-5, atol=1e-3
    )


def test_gradients_of_torchvision(torchvision):
    utils = pytest.importorskip("torchvision.models.detection._utils")
    coder = utils.BoxCoder(WEIGHTS)
    deltas, anchors = put_on_cpu(arguments("decode_boxes", (50,)), torch.float64)
    deltas[0] = torch.tensor([0, 0, 5 * math.log(1000 / 16), 100])  # on the clip, and beyond
    grads = []
    for decode in (coder.decode_single, lambda d, a: detops.decode_boxes(d, a, WEIGHTS)):
        leaves = [t.clone().requires_grad_() for t in (deltas, anchors)]
        (decode(*leaves) * torch.arange(200.0, dtype=torch.float64).view(50, 4)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


# Gradients.


@pytest.mark.parametrize(("shape", "second"), [((6,), (6,)), ((2, 5), (5,)), ((5, 3), (5, 1))], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_gradients(device, op, shape, second):
    first, other, *strides = put(device, arguments(op, shape, second), torch.float64)
    for options in OPTIONS[op]:
        leaves = first.requires_grad_(), other.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b, kw=options: getattr(detops, op)(a, b, *strides, **kw), leaves)


def test_gradients_of_nothing(device):
    for op in OPS:
        first, second, *strides = put(device, arguments(op, (2, 0), (0,)))
        leaves = first.requires_grad_(), second.requires_grad_()
        getattr(detops, op)(*leaves, *strides).sum().backward()
        assert first.grad.shape == (2, 0, 4) and second.grad.shape == second.shape


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_dtypes_and_runs(device, op, boxes_dtype):
    """As the float64 gradients, for rows of one and of several runs; the first tensor alone, too."""
    arrays = arguments(op, (3, device.limit(300, 70)), (device.limit(300, 70),))
    tensors = put(device, arrays, boxes_dtype)
    weights = device.put(np.random.default_rng(0).normal(0, 1, arrays[0].shape), torch.float64)
    grads = {}
    for dtype in (boxes_dtype, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors[:2]]
        strides = [t.to(dtype) for t in tensors[2:]]
        result = getattr(detops, op)(*leaves, *strides)
        (result * weights.to(dtype)).sum().backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves)
        grads[dtype] = [leaf.grad.double().cpu() for leaf in leaves]
        (alone,) = torch.autograd.grad(
            (getattr(detops, op)(leaves[0], leaves[1].detach(), *strides) * weights.to(dtype)).sum(), leaves[0]
        )
        assert torch.equal(alone, leaves[0].grad)
    for got, expected in zip(grads[boxes_dtype], grads[torch.float64], strict=True):
        tolerance = {torch.float64: 0, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[boxes_dtype]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_no_gradient_beyond_the_clip(device):
    deltas = device.put([[0, 0, 1.0, 1.0], [0, 0, 1.5, NAN]]).requires_grad_()
    anchors = device.put([[0.0, 0, 8, 8]])
    boxes = detops.decode_boxes(deltas, anchors, clip=1.0)
    (of_deltas,) = torch.autograd.grad(boxes[:, 2:].sum(), deltas)
    torch.testing.assert_close(of_deltas[:, 2], device.put([4 * math.e, 0]))
    assert of_deltas[1, 3] == 0


def test_no_gradient_where_clamped(device):
    boxes = device.put([[12.0, 0, 20, 15]]).requires_grad_()
    detops.encode_ltrb(boxes, device.put([[10.0, 10]]), max_distance=10.0).sum().backward()
    assert boxes.grad.tolist() == [[0, -1, 1, 1]]  # outside; on both borders


def test_no_second_derivative():
    for op in OPS:
        first, *others = put_on_cpu(arguments(op, (3,)), torch.float64)
        first.requires_grad_()
        (grad,) = torch.autograd.grad(getattr(detops, op)(first, *others).sum(), first, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
            grad.sum().backward()


# Bad input.


def test_bad_options():
    boxes, points = torch.zeros(2, 4), torch.zeros(2, 2)
    for weights in ((1, 1, 1), (1, 1, 0, 1), (1, -1, 1, 1), (1, 1, NAN, 1), (1, 1, math.inf, 1)):
        for function in (detops.encode_boxes, detops.decode_boxes):
            with pytest.raises(ValueError, match=f"^{function.__name__}: weights must be 4 positive numbers, got "):
                function(boxes, boxes, weights)
        with pytest.raises(ValueError, match="^BoxCoder: weights must be 4 positive numbers, got "):
            detops.BoxCoder(weights)
    with pytest.raises(ValueError, match="^decode_boxes: clip must be a number, got nan"):
        detops.decode_boxes(boxes, boxes, clip=NAN)
    for distance in (-1.0, NAN):
        with pytest.raises(ValueError, match="^encode_ltrb: max_distance must be at least 0, got "):
            detops.encode_ltrb(boxes, points, max_distance=distance)
    with pytest.raises(RuntimeError, match=r"^BoxCoder: rel_codes must have shape \[n, 4 C\], got \[2, 6\]"):
        detops.BoxCoder(WEIGHTS).decode_single(torch.zeros(2, 6), boxes)


@pytest.mark.parametrize("op", OPS)
def test_bad_tensors(device, op):
    first, second, *strides = put(device, arguments(op, (6,)))
    function, columns = getattr(detops, op), second.shape[1]
    names = {"encode": "boxes", "decode": "deltas" if op == "decode_boxes" else "distances"}
    name, other = names[op[:6]], "anchors" if op.endswith("boxes") else "points"
    for bad, shape in ((first[:, :3], r"\[6, 3\]"), (first[0, 0], r"\[\]")):
        with pytest.raises(RuntimeError, match=rf"^{op}: {name} must have shape \[\.\.\., 4\], got {shape}"):
            function(bad, second)
    with pytest.raises(RuntimeError, match=rf"^{op}: {other} must have shape \[\.\.\., {columns}\], got \[6, 1\]"):
        function(first, second[:, :1])
    with pytest.raises(RuntimeError, match=rf"^{op}: {other} must have leading .* broadcast with {name} \[6, 4\], got"):
        function(first, second[:4])
    with pytest.raises(RuntimeError, match=rf"^{op}: {name} must be float16, .*, got int64"):
        function(first.long(), second.long())
    if device.torch == "cuda":
        with pytest.raises(RuntimeError, match=rf"^{op}: {other} must be on the device of {name} \(cuda:0\), got cpu"):
            function(first, second.cpu())
    if strides:
        with pytest.raises(RuntimeError, match=rf"^{op}: strides must have dimensions that broadcast to \[6\], got"):
            function(first, second, strides[0][:4])
        with pytest.raises(RuntimeError, match=f"^{op}: strides must not require a gradient"):
            function(first, second, strides[0].requires_grad_())


def test_bad_arguments_of_the_ops(device):
    ops = _library.ops
    boxes, points = device.put(boxes_of(6)), device.put(points_of(6))
    ones = [1.0] * 4
    with pytest.raises(RuntimeError, match="^decode_boxes: weights must be 4 numbers, got 3"):
        ops.decode_boxes(boxes, boxes, ones[:3], 1.0)
    with pytest.raises(RuntimeError, match=r"^encode_boxes: anchors must have as many dimensions as boxes \[6, 4\]"):
        ops.encode_boxes(boxes, boxes[0], ones)
    with pytest.raises(RuntimeError, match=r"^encode_boxes: anchors must have the leading dimensions of boxes"):
        ops.encode_boxes(boxes, boxes[:5], ones)
    with pytest.raises(RuntimeError, match=r"^decode_boxes: anchors must have the dtype of deltas \(float32\) or be"):
        ops.decode_boxes(boxes, boxes.double(), ones, 1.0)
    with pytest.raises(RuntimeError, match="^decode_ltrb: strides must have one dimension less than distances"):
        ops.decode_ltrb(boxes, points, points)
    with pytest.raises(RuntimeError, match="^decode_ltrb: strides must have the leading dimensions of distances"):
        ops.decode_ltrb(boxes, points, points[:4, 0])
    with pytest.raises(RuntimeError, match=r"^decode_ltrb: strides must have the dtype of points \(float32\), got"):
        ops.decode_ltrb(boxes, points, points[:, 0].double())
    with pytest.raises(RuntimeError, match=r"^decode_boxes: grad must have shape \[\.\.\., 4\], got \[6, 3\]"):
        ops.decode_boxes_backward(boxes[:, :3], boxes, boxes, ones, 1.0, True)
    with pytest.raises(RuntimeError, match="^decode_boxes: grad must be float32, got float64"):
        ops.decode_boxes_backward(boxes.double(), boxes, boxes, ones, 1.0, True)


# A PyTorch citizen.


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    first, second, *strides = put(device, arguments(op, (2, 5)))
    shared = second[0].expand(2, *second.shape[1:])
    options = {
        "encode_boxes": ([1.0] * 4,),
        "decode_boxes": ([1.0] * 4, 4.0),
        "encode_ltrb": (strides and strides[0], 7.0),
        "decode_ltrb": (strides and strides[0],),
    }[op]
    for other in (second, shared):
        leaves = first.detach().requires_grad_(), other.detach()
        torch.library.opcheck(getattr(_library.ops, op), (*leaves, *options))
        torch.library.opcheck(getattr(_library.ops, op), (leaves[0], second.detach().requires_grad_(), *options))
    for wanted in (False, True):
        torch.library.opcheck(
            getattr(_library.ops, f"{op}_backward"), (first.detach(), first.detach(), second.detach(), *options, wanted)
        )


def all_coders(boxes, anchors, points, strides):
    deltas = detops.encode_boxes(boxes, anchors, WEIGHTS)
    distances = detops.encode_ltrb(boxes, points, strides)
    return detops.decode_boxes(deltas, anchors, WEIGHTS), detops.decode_ltrb(distances, points, strides)


@pytest.mark.needs_compiler
def test_compile():
    boxes, anchors = put_on_cpu((boxes_of(2, 30), boxes_of(30, seed=1)))
    points, strides = put_on_cpu((points_of(30), strides_of(30)))
    boxes.requires_grad_()
    results = []
    for function in (all_coders, torch.compile(all_coders, fullgraph=True)):
        out = function(boxes, anchors, points, strides)
        grads = torch.autograd.grad(sum(each.square().sum() for each in out), boxes)
        results.append((*out, *grads))
    torch.testing.assert_close(*results)


def test_export():
    class Coders(torch.nn.Module):
        def forward(self, boxes, anchors, points, strides):
            return all_coders(boxes, anchors, points, strides)

    tensors = put_on_cpu((boxes_of(2, 30), boxes_of(30, seed=1), points_of(30), strides_of(30)))
    rows = torch.export.Dim("rows", min=3)
    shapes = ({1: rows}, {0: rows}, {0: rows}, {0: rows})
    exported = torch.export.export(Coders(), tensors, dynamic_shapes=shapes).module()
    others = put_on_cpu((boxes_of(2, 11), boxes_of(11, seed=1), points_of(11), strides_of(11)))
    for each in (tensors, others):
        assert all(map(torch.equal, exported(*each), all_coders(*each)))


def test_autocast():
    deltas, anchors = put_on_cpu(arguments("decode_boxes", (20,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = detops.decode_boxes(deltas.bfloat16(), anchors)
    assert boxes.dtype == torch.float32


def test_the_box_coder_refuses_lists_that_do_not_fit():
    coder, two, one = detops.BoxCoder((1.0, 1.0, 1.0, 1.0)), torch.rand(2, 4), torch.rand(1, 4)
    with pytest.raises(RuntimeError, match=r"^BoxCoder: proposals must be as many as reference_boxes, \[2, 1\], got "):
        coder.encode([two, one], [one, two])  # the deltas would go to the wrong images
    with pytest.raises(RuntimeError, match="^BoxCoder: reference_boxes must be the boxes of at least one image, got n"):
        coder.encode([], [])
    with pytest.raises(RuntimeError, match=r"^BoxCoder: proposals must have shape \[n, 4\], got \[2, 3\]"):
        coder.encode([two, one], [two[:, :3], one])
    with pytest.raises(RuntimeError, match=r"^BoxCoder: boxes must have shape \[n, 4\], got \[4\]"):
        coder.decode(two, [two[0]])
    with pytest.raises(RuntimeError, match=r"^BoxCoder: rel_codes must have shape \[3, 4 C\], got \[2, 4\]"):
        coder.decode(two, [two, one])


def test_complex_numbers_are_refused():
    boxes, points = torch.zeros(1, 4), torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="^encode_ltrb: strides must be float16, .* or integer, got complex64$"):
        detops.encode_ltrb(boxes, points, torch.ones(1, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="^decode_yolo: anchors must be float16, .* or integer, got complex64$"):
        detops.decode_yolo([torch.zeros(1, 6, 1, 1)], torch.ones(1, 1, 2, dtype=torch.complex64), [8], version="v3")
