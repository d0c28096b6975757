"""roi_align: values, gradients, memory formats, edges, errors, and torchvision's results."""

import numpy as np
import pytest
import torch

import detops
from detops import BoxFormatError, _library
from inputs import to_numpy
from reference import roi as reference
from roi_inputs import CHANNELS, LAYOUTS, edge_rois, random_map, random_rois, tolerance

OPTIONS = [(0.25, ratio, aligned) for ratio in (-1, 1, 2, 3) for aligned in (False, True)]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def expect_close(got, expected, dtype, scale=1.0):
    np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=tolerance(dtype) * scale)


def check(device, input, boxes, output_size, *options):
    """The result and its gradient equal the reference; returns both."""
    size = (output_size, output_size) if isinstance(output_size, int) else output_size
    input = input.detach().requires_grad_()
    got = detops.roi_align(input, boxes, output_size, *options)
    rows = to_numpy(boxes.to(torch.float64 if input.dtype == torch.float64 else torch.float32))
    values = to_numpy(input).astype(np.float64)
    assert got.dtype == input.dtype and got.shape == (len(rows), input.shape[1], *size)
    assert torch.isfinite(got).all()
    expect_close(got, reference.roi_align(values, rows, size, *options), input.dtype, 4)
    weights = random_map(got.shape, input.dtype, seed=9).to(input.device)
    (grad,) = torch.autograd.grad(got, input, weights)
    assert grad.dtype == input.dtype and grad.shape == input.shape
    expected = reference.roi_align_gradient(to_numpy(weights).astype(np.float64), rows, input.shape, *options)
    expect_close(grad, expected, input.dtype, 4 * max(1.0, np.abs(expected).max()))
    for tensor in (got, grad):
        assert in_format_of(tensor, input)
    return got.detach(), grad


def in_format_of(tensor, input):
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return tensor.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


# Against the reference.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, layout, dtype, options):
    input = random_map((2, 3, 13, 18), dtype, layout).to(device.torch)
    boxes = device.put(random_rois(device.limit(20, 8), 2, 72, 52), dtype)
    check(device, input, boxes, (3, 2), *options)


@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(device, layout, channels):
    for dtype in (torch.float32, torch.float16):
        input = random_map((1, channels, 9, 11), dtype, layout).to(device.torch)
        check(device, input, device.put(random_rois(3, 1, 44, 36, seed=channels)), (2, 3), 0.25, 2, True)


@pytest.mark.parametrize("output_size", [1, 7, (1, 9), (14, 2), (33, 31)])
def test_output_sizes(device, layout, output_size):
    input = random_map((1, 9, 17, 21), torch.float32, layout).to(device.torch)
    check(device, input, device.put(random_rois(3, 1, 84, 68)), output_size, 0.25, -1, True)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 63, 64, 65, 300])
def test_counts(device, layout, count):
    input = random_map((3, 2, 10, 12), torch.float32, layout).to(device.torch)
    check(device, input, device.put(random_rois(count, 3, 12, 10, seed=count)), 2, 1.0, 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 8), (8, 9), (9, 7), (33, 65)])
def test_map_sizes(device, layout, size):
    input = random_map((2, 2, *size), torch.float32, layout).to(device.torch)
    check(device, input, device.put(random_rois(9, 2, size[1], size[0])), (2, 3), 1.0, -1, True)


def test_dtypes(device, layout, boxes_dtype):
    input = random_map((2, 4, 12, 14), torch.float32, layout)
    boxes = random_rois(10, 2, 56, 48).round()  # exact in every dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check(device, input.to(device.torch, dtype), device.put(boxes, boxes_dtype), 3, 0.25)


def test_wide_rois(device, layout):
    # More columns than a warp sums up at once on the GPU, and several at once.
    input = random_map((1, 2, 3, 700), torch.float32, layout).to(device.torch)
    boxes = device.put([[0, -20, 0, 690, 3], [0, 300, 1, 620, 2], [0, 0.5, 0, 200, 3]])
    check(device, input, boxes, (3, 2))
    check(device, input, boxes, (2, 3), 1.0, 2, True)


def test_written_out(device):
    ramp = torch.arange(16.0, device=device.torch).view(1, 1, 4, 4)
    boxes = device.put([[0, 0, 0, 4, 4], [0, 1, 1, 3, 3], [0, -4, -4, 0, 0]])
    got = detops.roi_align(ramp, boxes, 2, aligned=True)
    # A whole pixel's samples are at its centre; the third RoI touches the map with one sample of four in one bin.
    expected = [[[2.5, 4.5], [10.5, 12.5]], [[5, 6], [9, 10]], [[0, 0], [0, 0]]]
    np.testing.assert_allclose(to_numpy(got[:, 0]), expected, atol=1e-6)


# Edges.


@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(device, layout, ratio, aligned, dtype):
    input = random_map((2, 2, 6, 7), dtype, layout).to(device.torch)
    boxes = device.put(edge_rois(), dtype)
    got, _ = check(device, input, boxes, (2, 3), 1.0, ratio, aligned)
    odd = ~torch.isfinite(boxes).all(1)
    assert odd.any() and (got[odd] == 0).all()
    assert (check(device, input, boxes[odd], (2, 3), 1.0, ratio, aligned)[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_rois_take_no_time_and_give_next_to_nothing(device, layout, dtype):
    input = random_map((1, 2, 6, 7), dtype, layout).to(device.torch).requires_grad_()
    for size in (1e9, 1e15, 1e30, 1e38):
        boxes = device.put([[0, -size, -size, size, size], [0, 0, 0, size, size], [0, -size, 0, size, 5]], dtype)
        for ratio in (-1, 2):
            got = detops.roi_align(input, boxes, 3, 1.0, ratio, True)
            (grad,) = torch.autograd.grad(got.sum(), input)
            # At most 17 samples of size / 3 along an axis; the sample in the middle is on the map with ratio 1, 3, ...
            assert got.abs().max() < 1e-5 and grad.abs().max() < 1e-5


def test_a_large_roi_is_sampled_where_it_meets_the_map(device, layout):
    input = random_map((1, 2, 6, 7), torch.float64, layout).to(device.torch)
    for size in (1e3, 3e4):
        boxes = device.put([[0, -size, 1, size, 5], [0, -size, -size, 4, 4], [0, 2, -0.3 * size, 5, 0.7 * size]])
        check(device, input, boxes.double(), (2, 3), 1.0, -1, True)


def test_pixels_of_weight_0_are_not_read(device, layout):
    input = random_map((1, 2, 6, 7), torch.float32, layout).to(device.torch)
    input[:, :, 3:] = np.nan
    input[:, :, :, 4:] = np.inf
    boxes = device.put([[0, 0, 0, 4, 3], [0, 1, 1, 2, 2]])
    got = detops.roi_align(input, boxes, (3, 4), 1.0, 1, True)  # samples at pixel centres
    assert torch.isfinite(got).all()
    boxes[:, 1:] += 1
    assert torch.isnan(detops.roi_align(input, boxes, (3, 4), 1.0, 1, True)).any()


def test_odd_gradients_go_to_their_own_pixels_only(device, layout):
    input = torch.zeros(1, 2, 6, 40, device=device.torch).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    got = detops.roi_align(input, device.put([[0, 8, 1, 16, 5]]), (2, 4), 1.0, 2, True)
    weights = torch.ones_like(got)
    weights[0, 0, 0, 1] = np.inf
    (grad,) = torch.autograd.grad(got, input, weights)
    odd = torch.zeros(2, 6, 40, dtype=torch.bool)
    odd[0, 1:3, 10:12] = True
    assert torch.equal(torch.isinf(grad[0]).cpu(), odd) and not torch.isnan(grad).any()


def test_empty_tensors(device, layout):
    boxes = device.put(random_rois(3, 1, 5, 5))
    for shape, count in (((1, 0, 5, 5), 3), ((1, 2, 0, 5), 3), ((1, 2, 5, 0), 3), ((2, 2, 5, 5), 0), ((0, 2, 5, 5), 0)):
        input = torch.ones(shape, device=device.torch).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        got = detops.roi_align(input, boxes[:count], 2)
        assert got.shape == (count, shape[1], 2, 2) and (got == 0).all()
        got.sum().backward()
        assert input.grad.shape == shape and (input.grad == 0).all()


def test_batch_index_out_of_range(device):
    input = torch.ones(2, 1, 5, 5, device=device.torch, requires_grad=True)
    for index in (2, -1, 1e9, np.nan, np.inf):
        boxes = device.put([[1, 0, 0, 4, 4], [index, 0, 0, 4, 4]])
        if device.name == "cpu":
            with pytest.raises(RuntimeError, match=r"^roi_align: boxes must have batch indices from 0 to 1 in the first"
                               r" column, got .* in row 1$"):  # fmt: skip
                detops.roi_align(input, boxes, 2)
        else:
            got = detops.roi_align(input, boxes, 2)
            assert (got[0] == 1).all() and (got[1] == 0).all()
            (grad,) = torch.autograd.grad(got.sum(), input)
            assert (grad[0] == 0).all() and torch.isfinite(grad).all()
    # As torchvision does, fractions are cut off.
    got = detops.roi_align(input, device.put([[0.9, 0, 0, 4, 4], [-0.9, 0, 0, 4, 4]]), 2)
    assert (got == 1).all()


# Formats.


def test_lists_of_boxes(device):
    input = random_map((3, 2, 8, 9), torch.float32, "contiguous").to(device.torch)
    lists = [device.put(random_rois(n, 1, 9, 8, seed=n)[:, 1:]) for n in (2, 0, 3)]
    rows = torch.cat([torch.cat([torch.full((len(b), 1), i).to(b), b], 1) for i, b in enumerate(lists)])
    expected = detops.roi_align(input, rows, 2)
    assert torch.equal(detops.roi_align(input, lists, 2), expected)
    assert torch.equal(detops.roi_align(input, tuple(lists), (2, 2)), expected)
    assert detops.roi_align(input[:0], [], 2).shape == (0, 2, 2, 2)


def test_inputs_of_any_strides(device):
    base = random_map((2, 4, 16, 18), torch.float32, "contiguous").to(device.torch)
    boxes = device.put(np.repeat(random_rois(6, 2, 18, 16), 2, 1))[:, ::2]
    for input in (base[:, ::2], base[:, :, 1:, 2:], base.transpose(2, 3), base[:1].expand(2, -1, -1, -1)):
        before = input.clone()
        got, _ = check(device, input, boxes, 2)
        assert torch.equal(input, before)
        assert torch.equal(got, detops.roi_align(input.contiguous(), boxes.contiguous(), 2))


def test_gradients_of_any_strides(device, layout):
    input = random_map((1, 4, 8, 9), torch.float32, layout).to(device.torch).requires_grad_()
    got = detops.roi_align(input, device.put(random_rois(5, 1, 9, 8)), 3)
    (expected,) = torch.autograd.grad(got, input, torch.full_like(got, 2.0), retain_graph=True)
    (grad,) = torch.autograd.grad(got, input, torch.full((), 2.0, device=got.device).expand_as(got))
    assert torch.equal(grad, expected) and in_format_of(grad, input)


def test_one_channel_and_one_pixel_count_as_contiguous(device):
    for shape in ((2, 1, 5, 6), (2, 3, 1, 1)):
        input = torch.ones(shape, device=device.torch).to(memory_format=torch.channels_last)
        assert detops.roi_align(input, device.put([[0, 0, 0, 5, 5]]), 2).is_contiguous()


def test_formats_of_boxes_that_raise(device):
    input = torch.ones(1, 1, 4, 4, device=device.torch)
    rows = torch.ones(2, 4, device=device.torch)
    for boxes, got in ((rows, r"\[2, 4\]"), (rows[0], r"\[4\]")):
        with pytest.raises(BoxFormatError, match=rf"^roi_align: boxes must have shape \[K, 5\], got {got}$"):
            detops.roi_align(input, boxes, 2)
    for boxes, got in (
        ([torch.ones(2, 5)], r"\[2, 5\]"),
        ([[0, 0, 1, 1]], "a list"),
        (3, "an int"),
        ([rows[0]], r"\[4\]"),
    ):
        match = rf"^roi_align: boxes must be a tensor \[K, 5\] or a list of tensors \[L, 4\], got {got}$"
        with pytest.raises(BoxFormatError, match=match) as raised:
            detops.roi_align(input, boxes, 2)
        assert isinstance(raised.value, RuntimeError) and isinstance(raised.value, AssertionError)


def test_errors(device):
    input, boxes = torch.ones(1, 1, 4, 4, device=device.torch), torch.zeros(1, 5, device=device.torch)
    for output_size in (0, (0, 2), (2,), (2, 2, 2), -1):
        with pytest.raises(
            ValueError, match=r"^roi_align: output_size must be one or two positive whole numbers, got "
        ):
            detops.roi_align(input, boxes, output_size)
    for scale in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"^roi_align: spatial_scale must be positive and finite, got {scale}$"):
            detops.roi_align(input, boxes, 2, scale)
    with pytest.raises(RuntimeError, match=r"^roi_align: input must have shape \[N, C, H, W\], got \[1, 4, 4\]$"):
        detops.roi_align(input[0], boxes, 2)
    with pytest.raises(RuntimeError, match=r"^roi_align: input must be float16, .* got int64$"):
        detops.roi_align(input.long(), boxes, 2)
    with pytest.raises(RuntimeError, match=r"^roi_align: boxes must be float32 for input of float32, got float64$"):
        _library.ops.roi_align(input, boxes.double(), 1.0, 2, 2, 0, False)
    with pytest.raises(RuntimeError, match=r"^roi_align: grad must have shape \[K, C, bins, bins\], got"):
        _library.ops.roi_align_backward(input, boxes, [1, 1, 4, 4], 1.0, 2, 2, 0, False, False)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_two_devices(device):
    with pytest.raises(RuntimeError, match=r"^roi_align: boxes must be on the device of input"):
        detops.roi_align(torch.ones(1, 1, 4, 4, device="cuda"), torch.zeros(1, 5), 2)


def test_more_than_2_31_elements(device):
    if device.name != "cpu" or not _has_memory(12):
        pytest.skip("needs a CPU and 12 GB of free memory")
    input = torch.arange(8.0, dtype=torch.float16).view(1, 8, 1, 1)
    count = 2**31 // (8 * 7 * 7) + 2
    boxes = torch.zeros(count, 5)
    boxes[:, 3:] = 1
    got = detops.roi_align(input, boxes, 7)
    assert torch.equal(got[-1], torch.arange(8.0, dtype=torch.float16).view(8, 1, 1).expand(8, 7, 7))


def _has_memory(gigabytes):
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) > gigabytes * 2**20
    except (OSError, StopIteration):
        return False


# Gradients.


@pytest.mark.parametrize("ratio", [-1, 2])
def test_gradcheck(device, layout, ratio):
    boxes = device.put([[0, -1, 0.3, 3.2, 4], [1, 0.2, 1, 9, 2.5], [1, 2, 2, 1, 1]], torch.float64)
    input = random_map((2, 2, 4, 5), torch.float64, layout).to(device.torch).requires_grad_()

    def function(input):
        return detops.roi_align(input, boxes, 2, 0.9, ratio, True)

    assert torch.autograd.gradcheck(function, input, nondet_tol=0)
    assert torch.autograd.gradgradcheck(function, input, nondet_tol=0)


def test_no_gradient_to_boxes(device):
    boxes = device.put([[0.0, 0, 0, 3, 3]]).requires_grad_()
    input = torch.ones(1, 1, 4, 4, device=device.torch, requires_grad=True)
    detops.roi_align(input, boxes, 2).sum().backward()
    assert boxes.grad is None and input.grad is not None
    assert not detops.roi_align(input.detach(), boxes, 2).requires_grad


def test_gradients_are_the_same_bits_on_every_run_and_with_any_threads(device, layout):
    input = random_map((2, 9, 20, 31), torch.float32, layout).to(device.torch).requires_grad_()
    boxes = device.put(random_rois(device.limit(200, 40), 2, 31, 20))
    results = []
    threads = torch.get_num_threads()
    for count in (threads, 1, 2, 3):
        torch.set_num_threads(count)
        got = detops.roi_align(input, boxes, 3)
        results.append((got.detach(), *torch.autograd.grad(got.square().sum(), input)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# PyTorch.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(device, layout, dtype):
    input = random_map((2, 2, 6, 7), dtype, layout).to(device.torch).requires_grad_()
    boxes = device.put(random_rois(3, 2, 7, 6))
    options = (1.0, 2, 3, 2, True)
    torch.library.opcheck(_library.ops.roi_align, (input, boxes, *options))
    grad = torch.ones(3, 2, 2, 3, device=device.torch, dtype=dtype, requires_grad=True)
    last = layout == "channels_last"
    torch.library.opcheck(_library.ops.roi_align_backward, (grad, boxes, input.shape, *options, last))


@pytest.mark.needs_compiler
def test_compile_and_export(layout):
    input = random_map((2, 3, 8, 9), torch.float32, layout).requires_grad_()
    boxes = [torch.from_numpy(random_rois(n, 1, 9, 8, seed=n)[:, 1:]).float() for n in (4, 2)]

    def function(input, boxes):
        return detops.roi_align(input, boxes, (2, 3), 0.5, -1, True)

    expected = function(input, boxes)
    compiled = torch.compile(function, fullgraph=True)(input, boxes)
    assert torch.equal(compiled, expected)
    grads = [torch.autograd.grad(result.square().sum(), input)[0] for result in (compiled, expected)]
    assert torch.equal(*grads)

    class Module(torch.nn.Module):
        def forward(self, input, boxes):
            return function(input, boxes)

    rows = torch.from_numpy(random_rois(4, 2, 9, 8)).float()
    shapes = {"input": {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)},
              "boxes": {0: torch.export.Dim("k")}}  # fmt: skip
    program = torch.export.export(Module(), (input.detach(), rows), dynamic_shapes=shapes)
    other, others = random_map((2, 3, 11, 6), torch.float32, layout), rows[:3]
    assert torch.equal(program.module()(other, others), function(other, others))


def test_fx_keeps_it_whole():
    graph = torch.fx.symbolic_trace(lambda input, boxes: detops.roi.roi_align(input, boxes, 2))
    assert [node.name for node in graph.graph.nodes if node.op == "call_function"] == ["roi_align"]


def test_autocast(device):
    kind = "cuda" if device.name == "cuda" else "cpu"
    boxes = device.put(random_rois(3, 1, 7, 6))
    half = random_map((1, 2, 6, 7), torch.bfloat16, "contiguous").to(device.torch)
    with torch.autocast(kind, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert detops.roi_align(half, boxes.to(dtype), 2).dtype == torch.bfloat16
            assert detops.roi_align(half.float(), boxes.to(dtype), 2).dtype == torch.float32


# torchvision, on the CPU.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torchvision(torchvision, device, layout, options, dtype):
    input = random_map((2, 12, 30, 41), dtype, layout)
    rows = np.concatenate([random_rois(60, 2, 164, 120), edge_rois()])
    rows = rows[np.isfinite(rows).all(1)]
    boxes = torch.from_numpy(rows).to(dtype)
    ours, theirs = (input.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    moved = ours.to(device.torch)
    got = detops.roi_align(moved, boxes.to(device.torch), (5, 3), *options)
    expected = torchvision.ops.roi_align(theirs, boxes, (5, 3), *options)
    expect_close(got, to_numpy(expected), dtype, 4)
    weights = random_map(got.shape, dtype, seed=3)
    got.backward(weights.to(device.torch))
    expected.backward(weights)
    expect_close(ours.grad, to_numpy(theirs.grad), dtype, 4 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("op", ["roi_align", "roi_align_rotated", "multi_scale_roi_align", "ps_roi_align"])
def test_endless_sampling_and_complex_boxes_are_refused(op):
    input, columns = torch.rand(1, 1, 4, 4), 6 if op == "roi_align_rotated" else 5
    options = {"spatial_scales": [1.0]} if op == "multi_scale_roi_align" else {}
    features = [input] if options else input
    with pytest.raises(ValueError, match=f"^{op}: sampling_ratio must be at most 4096, got 2147483648$"):
        getattr(detops, op)(features, torch.zeros(1, columns), 1, sampling_ratio=2**31, **options)
    with pytest.raises(RuntimeError, match=f"^{op}: boxes must be real, got complex64$"):
        getattr(detops, op)(features, torch.zeros(1, columns, dtype=torch.complex64), 1, **options)
