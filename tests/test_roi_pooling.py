"""roi_pool, roi_align in mode "max", ps_roi_align, ps_roi_pool and roi_align_rotated."""

import functools

import numpy as np
import pytest
import torch

import detops
from detops import BoxFormatError, _library
from inputs import to_numpy
from memory import peak_growth
from reference import roi as reference
from roi_inputs import LAYOUTS, edge_rois, random_map, random_rois, tolerance
from test_roi_align import in_format_of

# Each op as (function, reference, its gradient), with options (spatial_scale, sampling_ratio) where it takes them.
MAX = functools.partial(detops.roi_align, mode="max")
OPS = {
    "roi_pool": (detops.roi_pool, reference.roi_pool, None),
    "roi_align_max": (MAX, reference.roi_align_max, None),
    "ps_roi_align": (detops.ps_roi_align, reference.ps_roi_align, reference.ps_roi_align_gradient),
    "ps_roi_pool": (detops.ps_roi_pool, reference.ps_roi_pool, reference.ps_roi_pool_gradient),
    "roi_align_rotated": (
        detops.roi_align_rotated,
        reference.roi_align_rotated,
        reference.roi_align_rotated_gradient,
    ),
}
LINEAR = ("ps_roi_align", "ps_roi_pool", "roi_align_rotated")
SAMPLED = ("roi_align_max", "ps_roi_align", "roi_align_rotated")


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def rois_for(op, n, images, width, height, seed=0):
    rois = random_rois(n, images, width, height, seed)
    return turned(rois, seed) if op == "roi_align_rotated" else rois


def turned(rois, seed=0):
    """Centres, sides and angles for corners."""
    with np.errstate(invalid="ignore"):
        centre, side = (rois[:, 1:3] + rois[:, 3:]) / 2, rois[:, 3:] - rois[:, 1:3]
    angle = np.random.default_rng(seed).uniform(-400, 400, (len(rois), 1))
    return np.concatenate([rois[:, :1], centre, side, angle], 1)


def channels_for(op, channels, output_size):
    return channels * output_size[0] * output_size[1] if op.startswith("ps_") else channels


def options_for(op, scale, ratio):
    return (scale, ratio) if op in SAMPLED else (scale,)


def check(device, op, input, boxes, output_size, *options):
    """The result and its gradient equal the reference; returns both."""
    function, forward, backward = OPS[op]
    input = input.detach().requires_grad_()
    got = function(input, boxes, output_size, *options)
    double = input.dtype == torch.float64
    rows, values = to_numpy(boxes.to(torch.float64 if double else torch.float32)), to_numpy(input)
    values = values.astype(np.float64)
    expected = forward(values, rows, output_size, *options)
    assert got.shape == expected.shape and got.dtype == input.dtype
    # Positions of rotated samples carry rounding of their own.
    loose = 60 if op == "roi_align_rotated" else 4
    np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=tolerance(input.dtype) * loose)
    if op == "roi_pool":
        np.testing.assert_array_equal(to_numpy(got), expected)
    weights = random_map(got.shape, input.dtype, seed=9).to(input.device)
    (grad,) = torch.autograd.grad(got, input, weights)
    weights = to_numpy(weights).astype(np.float64)
    if backward:
        expected = backward(weights, rows, input.shape, *options)
    else:
        expected = forward(values, rows, output_size, *options, grad=weights)
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(to_numpy(grad), expected, rtol=0, atol=tolerance(input.dtype) * loose * scale)
    assert grad.dtype == input.dtype and grad.shape == input.shape
    assert in_format_of(got, input) and in_format_of(grad, input)
    assert torch.equal(function(input.detach(), boxes, output_size, *options), got)
    return got.detach(), grad


# Against the reference.


@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(device, op, layout, dtype, ratio):
    size = (3, 2)
    input = random_map((2, channels_for(op, 3, size), 13, 18), dtype, layout).to(device.torch)
    boxes = device.put(rois_for(op, device.limit(15, 8), 2, 72, 52), dtype)
    check(device, op, input, boxes, size, *options_for(op, 0.25, ratio))


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33, 65])
def test_channels(device, op, layout, channels):
    size = (1, 2)
    input = random_map((1, channels_for(op, channels, size), 9, 11), torch.float32, layout).to(device.torch)
    check(device, op, input, device.put(rois_for(op, 3, 1, 11, 9)), size, *options_for(op, 1.0, 2))


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (2, 33), (9, 9)])
def test_output_sizes(device, op, layout, size):
    input = random_map((1, channels_for(op, 1, size), 10, 12), torch.float32, layout).to(device.torch)
    check(device, op, input, device.put(rois_for(op, 3, 1, 12, 10)), size, *options_for(op, 1.0, -1))


@pytest.mark.parametrize("count", [0, 1, 33, 257])
def test_counts(device, op, layout, count):
    input = random_map((3, channels_for(op, 1, (2, 1)), 8, 9), torch.float32, layout).to(device.torch)
    check(device, op, input, device.put(rois_for(op, count, 3, 9, 8, seed=count)), (2, 1), *options_for(op, 1.0, 1))


def test_dtypes(device, op, layout, boxes_dtype):
    size = (2, 2)
    input = random_map((2, channels_for(op, 2, size), 9, 10), torch.float32, layout)
    boxes = device.put(rois_for(op, 6, 2, 40, 36).round(), boxes_dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check(device, op, input.to(device.torch, dtype), boxes, size, 0.25)


@pytest.mark.parametrize("ratio", [-1, 2])
def test_edges(device, op, layout, ratio):
    size = (2, 3)
    input = random_map((2, channels_for(op, 2, size), 6, 7), torch.float32, layout).to(device.torch)
    rois = edge_rois()
    boxes = device.put(turned(rois) if op == "roi_align_rotated" else rois)
    got, _ = check(device, op, input, boxes, size, *options_for(op, 1.0, ratio))
    odd = ~torch.isfinite(boxes).all(1)
    assert odd.any() and (got[odd] == 0).all() and torch.isfinite(got).all()
    assert (check(device, op, input, boxes[odd], size, *options_for(op, 1.0, ratio))[1] == 0).all()


def test_huge_rois_take_no_time(device, op, layout):
    size = (2, 3)
    input = random_map((1, channels_for(op, 2, size), 6, 7), torch.float32, layout).to(device.torch).requires_grad_()
    for extent in (1e9, 1e20, 1e38):
        rois = np.array([[0, -extent, -extent, extent, extent], [0, 0, 0, extent, extent], [0, -extent, 0, extent, 5]])
        boxes = device.put(turned(rois) if op == "roi_align_rotated" else rois)
        for ratio in (-1, 2):
            got = OPS[op][0](input, boxes, size, *options_for(op, 1.0, ratio))
            (grad,) = torch.autograd.grad(got.sum(), input)
            assert torch.isfinite(got).all() and torch.isfinite(grad).all()
            assert got.abs().max() <= input.abs().max()


def test_empty_tensors(device, op, layout):
    boxes = device.put(rois_for(op, 3, 1, 5, 5))
    for shape, count in (((1, 0, 5, 5), 3), ((1, 4, 0, 5), 3), ((1, 4, 5, 0), 3), ((0, 4, 5, 5), 0)):
        input = torch.ones(shape, device=device.torch).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        got = OPS[op][0](input, boxes[:count], 2)
        assert got.shape == (count, shape[1] // (4 if op.startswith("ps_") else 1), 2, 2) and (got == 0).all()
        got.sum().backward()
        assert input.grad.shape == shape and (input.grad == 0).all()


def test_batch_index_out_of_range(device, op):
    input = torch.ones(2, 4, 6, 6, device=device.torch, requires_grad=True)
    boxes = device.put(rois_for(op, 2, 1, 6, 6))
    for index in (2, -1, np.nan):
        boxes[1, 0] = index
        if device.name == "cpu":
            name = "roi_align" if op == "roi_align_max" else op
            with pytest.raises(RuntimeError, match=rf"^{name}: boxes must have batch indices from 0 to 1 .* in row 1$"):
                OPS[op][0](input, boxes, 2)
        else:
            got = OPS[op][0](input, boxes, 2)
            (grad,) = torch.autograd.grad(got.sum(), input)
            assert (got[1] == 0).all() and torch.isfinite(grad).all()


# Each for itself.


def test_maxima_written_out(device, layout):
    nan = float("nan")
    input = device.put([[1.0, 7, 7, 2], [7, 7, 3, 2], [1, 1, nan, nan], [-5, -6, nan, -4]])[None, None]
    input = input.expand(1, 2, 4, 4).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    got = detops.roi_pool(input, device.put([[0, 0, 0, 3, 3], [0, 0, 3, 1, 3], [0, 8, 8, 9, 9]]), (2, 1))
    assert got[0, 0, 0, 0] == 7 and torch.isnan(got[0, 0, 1, 0])
    assert (got[1] == -5).all() and (got[2] == 0).all()
    (grad,) = torch.autograd.grad(got, input, torch.ones_like(got))
    # The first 7, the first NaN, and -5 twice.
    expected = torch.zeros(4, 4)
    expected[0, 1], expected[2, 2], expected[3, 0] = 1, 1, 2
    assert torch.equal(grad.cpu(), expected.expand(1, 2, 4, 4))


def test_samples_off_the_map_count_as_0(device, layout):
    for value in (-1.0, 1.0):
        input = torch.full((1, 2, 4, 4), value, device=device.torch).contiguous(memory_format=LAYOUTS[layout])
        input.requires_grad_()
        got = MAX(input, device.put([[0, -8, 0, 4, 4]]), (1, 1), 1.0, 4, True)
        (grad,) = torch.autograd.grad(got.sum(), input)
        assert (got == max(value, 0)).all() and (grad.sum() == (2 if value > 0 else 0)).all()


def test_rotated_by_quarter_turns(device, layout):
    # A map and a box that turn together: what the box sees stays the same.
    input = random_map((1, 2, 12, 12), torch.float64, layout).to(device.torch)
    expected = detops.roi_align(input, device.put([[0, 2, 3, 8, 7]], torch.float64), (2, 3), 1.0, 2, True)
    x, y = 5.0 - 6, 5.0 - 6  # its centre, from the middle of the map
    for quarters in range(5):
        box = device.put([[0, x + 6, y + 6, 6, 4, 90 * quarters]], torch.float64)
        got = detops.roi_align_rotated(torch.rot90(input, quarters, (2, 3)), box, (2, 3), 1.0, 2)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
        x, y = y, -x


def test_rotated_with_bins_of_thousands_of_samples(device, layout):
    # More than are listed at once, and more in all than are kept for the gradient.
    input = random_map((2, 9, 6, 7), torch.float64, layout).to(device.torch).requires_grad_()
    boxes = device.put([[1, 3, 3, 5, 4, 30], [0, 2, 4, 3, 3, -100], [1, 20, 20, 3, 3, 0]], torch.float64)
    got = detops.roi_align_rotated(input, boxes, (2, 1), 1.0, 40)
    values, rows = to_numpy(input.detach()), to_numpy(boxes)
    np.testing.assert_allclose(
        to_numpy(got), reference.roi_align_rotated(values, rows, (2, 1), 1.0, 40), rtol=0, atol=1e-12
    )
    weights = random_map(got.shape, torch.float64, seed=5)
    (grad,) = torch.autograd.grad(got, input, weights.to(device.torch))
    expected = reference.roi_align_rotated_gradient(to_numpy(weights), rows, input.shape, 1.0, 40)
    np.testing.assert_allclose(to_numpy(grad), expected, rtol=0, atol=1e-12)


HUGE = {  # (op, columns of its boxes, options)
    "roi_align": ("roi_align", 5, "7, 1.0, {ratio}, True"),
    "roi_align_max": ("roi_align", 5, "7, 1.0, {ratio}, True, mode='max'"),
    "roi_align_rotated": ("roi_align_rotated", 6, "7, 1.0, {ratio}"),
    "ps_roi_align": ("ps_roi_align", 5, "(2, 1), 1.0, {ratio}"),
}
PREPARE = """
torch.manual_seed(0)
torch.set_num_threads(2)
input = torch.rand(1, 2, {size}, {size}, requires_grad=True)
boxes = torch.tensor([[0, 9., 9, 90, 90, 30], [0, -5e3, -5e3, 5e3, 5e3, 45], [0, 90, 90, 300, 200, 1]]).repeat({k}, 1)
boxes = boxes[:, :{columns}]
def run(boxes, ratio):
    out = detops.{op}(input, boxes, {options})
    return out, torch.autograd.grad(out.sum(), input)[0]
run(boxes[:1], 1)
"""


@pytest.mark.parametrize("op", HUGE)
@pytest.mark.parametrize("ratio", [0, 256])
def test_extra_memory_follows_input_and_output(op, ratio):
    function, columns, options = HUGE[op]
    count, size = (1, 64) if ratio else (33, 200)
    prepare = PREPARE.format(size=size, k=count, columns=columns, op=function, options=options.format(ratio="ratio"))
    # Lists of the samples of all RoIs are 95 MB and more.
    assert peak_growth(prepare, f"run(boxes, {ratio})", "len(result)")[1] < 30e6


def test_rotated_of_0_degrees_is_roi_align(device, layout):
    input = random_map((2, 3, 12, 15), torch.float64, layout).to(device.torch)
    rois = random_rois(10, 2, 60, 48)
    boxes = turned(rois)
    boxes[:, 5] = 0
    got = detops.roi_align_rotated(input, device.put(boxes, torch.float64), 3, 0.25, -1)
    expected = detops.roi_align(input, device.put(rois, torch.float64), 3, 0.25, -1, True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_errors(device):
    input, boxes = torch.ones(1, 4, 4, 4, device=device.torch), torch.zeros(1, 5, device=device.torch)
    for function in (detops.ps_roi_align, detops.ps_roi_pool):
        name = function.__name__
        with pytest.raises(RuntimeError, match=rf"^{name}: input must have a multiple of 9 channels, .* got 4$"):
            function(input, boxes, 3)
    for function in (detops.roi_pool, detops.ps_roi_align, detops.ps_roi_pool, detops.roi_align_rotated):
        name, columns = function.__name__, 6 if function is detops.roi_align_rotated else 5
        with pytest.raises(
            ValueError, match=rf"^{name}: output_size must be one or two positive whole numbers, got 0$"
        ):
            function(input, boxes, 0)
        with pytest.raises(ValueError, match=rf"^{name}: spatial_scale must be positive and finite, got 0$"):
            function(input, boxes, 2, 0)
        with pytest.raises(BoxFormatError, match=rf"^{name}: boxes must have shape \[K, {columns}\], got \[1, 4\]$"):
            function(input, boxes[:, 1:], 2)
        with pytest.raises(RuntimeError, match=rf"^{name}: input must have shape \[N, C, H, W\], got \[4, 4, 4\]$"):
            function(input[0], torch.zeros(1, columns, device=device.torch), 2)
    with pytest.raises(ValueError, match=r"^roi_align: mode must be 'avg' or 'max', got 'sum'$"):
        detops.roi_align(input, boxes, 2, mode="sum")
    got = MAX(input.requires_grad_(), boxes, 2)
    weights = torch.ones_like(got).requires_grad_()
    (grad,) = torch.autograd.grad(got, input, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="^roi_align_max: there is no second derivative$"):
        grad.sum().backward()


# Gradients.


def test_gradcheck(device, op, layout):
    size = (2, 2)
    corners = np.array([[0, -1, 0.3, 3.2, 4], [1, 0.2, 1, 9, 2.5], [1, 1.1, 0.9, 2, 2.2]])
    boxes = device.put(turned(corners) if op == "roi_align_rotated" else corners, torch.float64)
    input = random_map((2, channels_for(op, 2, size), 4, 5), torch.float64, layout).to(device.torch).requires_grad_()

    def function(input):
        return OPS[op][0](input, boxes, size, *options_for(op, 0.9, 2))

    assert torch.autograd.gradcheck(function, input, nondet_tol=0)
    if op in LINEAR:
        assert torch.autograd.gradgradcheck(function, input, nondet_tol=0)


def test_the_same_bits_on_every_run_and_with_any_threads(device, op, layout):
    size = (2, 2)
    input = random_map((2, channels_for(op, 5, size), 12, 14), torch.float32, layout).to(device.torch).requires_grad_()
    boxes = device.put(rois_for(op, 40, 2, 14, 12))
    results = []
    threads = torch.get_num_threads()
    for count in (threads, 1, 3):
        torch.set_num_threads(count)
        got = OPS[op][0](input, boxes, size)
        results.append((got.detach(), *torch.autograd.grad(got.square().sum(), input)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# PyTorch.


def test_opcheck(device, op, layout):
    last = layout == "channels_last"
    input = random_map((2, 4, 6, 7), torch.float32, layout).to(device.torch).requires_grad_()
    boxes = device.put(rois_for(op, 3, 2, 7, 6))
    options = {
        "roi_pool": (1.0, 2, 2),
        "roi_align_max": (1.0, 2, 2, 2, True),
        "ps_roi_align": (1.0, 2, 2, 2),
        "ps_roi_pool": (1.0, 2, 2),
        "roi_align_rotated": (1.0, 2, 2, 2),
    }[op]
    forward, backward = getattr(_library.ops, op), getattr(_library.ops, f"{op}_backward")
    if op in LINEAR:
        torch.library.opcheck(forward, (input, boxes, *options))
        grad = torch.ones_like(forward(input, boxes, *options)).requires_grad_()
        torch.library.opcheck(backward, (grad, boxes, input.shape, *options, last))
        return
    for keep_winners in (False, True):
        torch.library.opcheck(
            forward,
            (input if keep_winners else input.detach(), boxes, *options, keep_winners),
        )
    out, winners = forward(input.detach(), boxes, *options, True)
    torch.library.opcheck(backward, (torch.ones_like(out), winners, boxes, input.shape, *options, last))


@pytest.mark.needs_compiler
def test_compile_and_export(op, layout):
    input = random_map((2, 4, 6, 7), torch.float32, layout).requires_grad_()
    boxes = torch.from_numpy(rois_for(op, 3, 2, 7, 6)).float()

    class Module(torch.nn.Module):
        def forward(self, input, boxes):
            return OPS[op][0](input, boxes, 2)

    expected = Module()(input, boxes)
    compiled = torch.compile(Module(), fullgraph=True)(input, boxes)
    assert torch.equal(compiled, expected)
    grads = [torch.autograd.grad(result.square().sum(), input)[0] for result in (compiled, expected)]
    assert torch.equal(*grads)
    shapes = {"input": {2: torch.export.Dim("h", min=2)}, "boxes": {0: torch.export.Dim("k")}}
    program = torch.export.export(Module(), (input.detach(), boxes), dynamic_shapes=shapes)
    other = random_map((2, 4, 9, 7), torch.float32, layout)
    assert torch.equal(program.module()(other, boxes[:2]), Module()(other, boxes[:2]))


# torchvision, on the CPU.


@pytest.mark.parametrize("op", ["roi_pool", "ps_roi_align", "ps_roi_pool"])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_equals_torchvision(torchvision, device, op, layout, ratio):
    size = (3, 2)
    input = random_map((2, channels_for(op, 4, size), 20, 31), torch.float32, layout)
    whole = np.round(random_rois(20, 2, 124, 80)) + [0, 2, 2, 2, 2]  # corners halfway between pixels of the map
    rows = np.concatenate([random_rois(60, 2, 124, 80), whole, edge_rois()])
    rows = rows[np.isfinite(rows).all(1)]
    if op == "ps_roi_align":
        corners = rows[:, 1:].astype(np.float32) * np.float32(0.25) - np.float32(0.5)
        rows = rows[(corners[:, 2:] > corners[:, :2]).all(1)]  # else torchvision gives NaN
    boxes = torch.from_numpy(rows).float()
    options = options_for(op, 0.25, ratio)
    ours, theirs = (input.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    got = OPS[op][0](ours.to(device.torch), boxes.to(device.torch), size, *options)
    expected = getattr(torchvision.ops, op)(theirs, boxes, size, *options)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=4e-6)
    if op == "ps_roi_pool":
        return  # torchvision's gradient goes to pixels that its result does not read
    weights = random_map(got.shape, torch.float32, seed=3)
    got.backward(weights.to(device.torch))
    expected.backward(weights)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=4e-6 * theirs.grad.abs().max().item())
