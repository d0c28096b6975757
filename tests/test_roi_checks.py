"""What all RoI ops share: what they refuse, by whom ever they are called; what they take for options and for boxes;
RoIs of any size; and torch.fx."""

import functools
import operator
import re

import numpy as np
import pytest
import torch

import detops
from detops import BoxFormatError, _library
from inputs import to_numpy
from reference import roi as reference
from roi_inputs import LAYOUTS, random_map, random_rois


def multi_scale_roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1):
    return detops.multi_scale_roi_align(
        [input], boxes, output_size, spatial_scales=[spatial_scale], sampling_ratio=sampling_ratio
    )


# Each with the options that it takes behind the output size.
OPS = {
    "roi_align": (detops.roi_align, ("spatial_scale", "sampling_ratio")),
    "roi_align_max": (functools.partial(detops.roi_align, mode="max"), ("spatial_scale", "sampling_ratio")),
    "multi_scale_roi_align": (multi_scale_roi_align, ("spatial_scale", "sampling_ratio")),
    "roi_align_rotated": (detops.roi_align_rotated, ("spatial_scale", "sampling_ratio")),
    "roi_pool": (detops.roi_pool, ("spatial_scale",)),
    "ps_roi_align": (detops.ps_roi_align, ("spatial_scale", "sampling_ratio")),
    "ps_roi_pool": (detops.ps_roi_pool, ("spatial_scale",)),
}


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def name_of(op):
    return "roi_align" if op == "roi_align_max" else op


def box_of(op):
    return [2.0, 2, 3, 3, 0] if op == "roi_align_rotated" else [0.0, 0, 3, 3]


def row_of(op, index):
    return [[index, *box_of(op)]]


# The arguments behind (input, boxes) of the op and behind (grad, boxes, sizes) of its gradient, as Python calls them.


def options_of(op, bins=(2, 2)):
    ratio, aligned = (0,), (False,)
    return {
        "roi_align": (1.0, *bins, *ratio, *aligned),
        "roi_align_max": (1.0, *bins, *ratio, *aligned),
        "multi_scale_roi_align": ([1.0], *bins, *ratio, *aligned, 224.0, 4),
        "roi_align_rotated": (1.0, *bins, *ratio),
        "roi_pool": (1.0, *bins),
        "ps_roi_align": (1.0, *bins, *ratio),
        "ps_roi_pool": (1.0, *bins),
    }[op]


def call_by_name(op, input, boxes, options):
    run = getattr(_library.ops, op)
    if op == "multi_scale_roi_align":
        input = [input]
    keeps = (True,) if op in ("roi_pool", "roi_align_max") else ()
    return run(input, boxes, *options, *keeps)


def gradient_by_name(op, grad, boxes, sizes, options, winners=None):
    run = getattr(_library.ops, f"{op}_backward")
    if op not in ("roi_pool", "roi_align_max"):
        return run(grad, boxes, sizes, *options, False)
    if winners is None:
        winners = grad.new_zeros(2, grad.numel())
    return run(grad, winners, boxes, sizes, *options, False)


# Whoever calls.


def test_an_index_above_minus_one_names_no_image_where_there_is_none(device, op):
    input = torch.zeros(0, 4, 5, 5, device=device.torch)
    boxes = device.put(row_of(op, -0.5))
    grad = torch.ones(1, 1 if op.startswith("ps_") else 4, 2, 2, device=device.torch)
    for run in (
        lambda: OPS[op][0](input, boxes, 2),
        lambda: gradient_by_name(op, grad, boxes, input.shape, options_of(op)),
    ):
        if device.name == "cpu":
            with pytest.raises(RuntimeError, match=f"^{name_of(op)}: boxes must be empty for an input of 0 images"):
                run()
            continue
        got = run()
        got = got[0] if isinstance(got, list) else got
        assert (got == 0).all()


@pytest.mark.parametrize(
    "sizes", [[], [1], [1, 4], [1, 4, 5], [1, 4, 5, 5, 5], [1, -4, 5, 5], [1, 4, 2**40, 5]], ids=str
)
def test_gradients_for_no_map_at_all(device, op, sizes):
    boxes = device.put(row_of(op, 0.0))
    grad = torch.ones(1, 1 if op.startswith("ps_") else 4, 2, 2, device=device.torch)
    rule = "sizes must be N, C, and H and W of the map, from 0 to 2147418112, got " + re.escape(str(sizes))
    with pytest.raises(RuntimeError, match=f"^{name_of(op)}: {rule}$"):
        gradient_by_name(op, grad, boxes, sizes, options_of(op))


def test_results_beyond_all_memory(device, op):
    most = 2**31 - 2**16
    boxes = device.put(row_of(op, 0.0))[:0]
    grad = torch.ones(0, most // 4 if op.startswith("ps_") else most, 2, 2, device=device.torch)
    with pytest.raises(RuntimeError, match=f"^{name_of(op)}: the result must have at most 2\\^60 elements, got shape"):
        gradient_by_name(op, grad, boxes, [most] * 4, options_of(op))


@pytest.mark.parametrize("bins", [(0, 2), (2, 0), (-1, -1), (2**31, 1), (2**16, 2**16)], ids=str)
def test_bins_that_cannot_be_counted(device, op, bins):
    boxes, input = device.put(row_of(op, 0.0)), torch.ones(1, 4, 5, 5, device=device.torch)
    rule = f"output_size must be positive and make at most 2147418112 bins, got {bins[0]} x {bins[1]}"
    grad = torch.ones(1, 4, 2, 2, device=device.torch)
    for rows in (boxes, boxes[:0]):
        with pytest.raises(RuntimeError, match=f"^{name_of(op)}: {rule}$"):
            call_by_name(op, input, rows, options_of(op, bins))
        with pytest.raises(RuntimeError, match=f"^{name_of(op)}: {rule}$"):
            gradient_by_name(op, grad[: len(rows)], rows, input.shape, options_of(op, bins))


def test_a_gradient_of_more_levels_than_there_are(device):
    boxes, grad = device.put([[0.0, 0, 0, 3, 3]]), torch.ones(1, 1, 2, 2, device=device.torch)
    run = _library.ops.multi_scale_roi_align_backward
    for count in (0, 9, 30):
        scales = [0.5**i for i in range(count)]
        with pytest.raises(
            RuntimeError, match=f"^multi_scale_roi_align: spatial_scales must be those of 1 to 8 maps, got {count}$"
        ):
            run(grad, boxes, [1, 1] + [4, 4] * count, scales, 2, 2, 0, False, 224.0, 4, False)
    with pytest.raises(
        RuntimeError, match=r"^multi_scale_roi_align: sizes must be N, C, and H and W of each of the 2 m"
    ):
        run(grad, boxes, [1, 1, 4, 4], [1.0, 0.5], 2, 2, 0, False, 224.0, 4, False)
    for scale in (0.0, np.nan, np.inf):
        with pytest.raises(RuntimeError, match=r"^multi_scale_roi_align: spatial_scales must be positive and finite"):
            run(grad, boxes, [1, 1, 4, 4], [scale], 2, 2, 0, False, 224.0, 4, False)


@pytest.mark.parametrize("op", ["roi_pool", "roi_align_max"])
def test_winners_off_the_map_get_nothing(device, op, layout):
    boxes = device.put([[0.0, 0, 0, 3, 3]])
    off = [1e30, -1e30, np.inf, -np.inf, np.nan, 6.0, -1.5]
    grad = torch.ones(1, 1, 4, 4, device=device.torch)
    places = device.put([[y, x] for y in off for x in (1.0, 1e30)] + [[1.0, 1e30], [3.0, 3.0]])
    got = getattr(_library.ops, f"{op}_backward")(
        grad, places.T.contiguous(), boxes, [1, 1, 5, 5], *options_of(op, (4, 4)), layout == "channels_last"
    )
    expected = torch.zeros(5, 5, device=device.torch)
    expected[3, 3] = 1
    assert torch.equal(got[0, 0], expected)
    with pytest.raises(RuntimeError, match=r"^roi_\w+: winners must have the dtype of boxes \(float32\), got float64$"):
        gradient_by_name(
            op, grad, boxes, [1, 1, 5, 5], options_of(op, (4, 4)), torch.zeros(2, 16).double().to(grad.device)
        )


# RoIs of any size.


def samples_near(bin_start, bin_size, count, size):
    """The positions of `count` samples of a bin that lie on a map of `size` pixels, found by halving."""
    dtype = type(bin_size)

    def position(i):
        return bin_start + (dtype(i) + dtype(0.5)) * bin_size / dtype(count)

    def first(condition):
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if condition(position(middle)) else (middle + 1, high)
        return low

    return [position(i) for i in range(first(lambda at: at >= -1), first(lambda at: at > size))]


def matrix(low, high, bins, size, ratio):
    """[bins, size]: what each pixel weighs in each bin of one axis, with pixel centres at half-integers."""
    dtype = type(low)
    start = low - dtype(0.5)
    bin_size = (high - dtype(0.5) - start) / dtype(bins)
    count = ratio if ratio > 0 else int(np.ceil(bin_size))
    weights = np.zeros((bins, size))
    for p in range(bins):
        for at in samples_near(start + dtype(p) * bin_size, bin_size, count, size):
            for pixel, weight in reference.pixels_of(at, size).items():
                weights[p, pixel] += weight / count
    return weights


HUGE = [1.3e6, 3.1e7, 1.1147231e9, 1.45385728e9]


@pytest.mark.parametrize("op", ["roi_align", "multi_scale_roi_align", "ps_roi_align"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_huge_rois(device, layout, op, dtype, ratio):
    # Rounding lets bins overlap by many pixels, so that a RoI has more taps than any of ordinary size.
    bins, height, width = 14, 49, 49
    channels = bins * bins if op == "ps_roi_align" else 2
    input = random_map((1, channels, height, width), dtype, layout).to(device.torch).requires_grad_()
    rows = [row for size in HUGE for row in ([0, 4, -size, 25, size], [0, -size, -size, size, size])]
    boxes = device.put(rows, dtype)
    if op == "roi_align":
        got = detops.roi_align(input, boxes, bins, 1.0, ratio, True)
    elif op == "ps_roi_align":
        got = detops.ps_roi_align(input, boxes, bins, 1.0, ratio)
    else:
        options = {"spatial_scales": [1.0], "sampling_ratio": ratio, "aligned": True}
        got = detops.multi_scale_roi_align([input], boxes, bins, **options)
    values, total = to_numpy(input).astype(np.float64)[0], 0.0
    for row, pooled in zip(to_numpy(boxes), to_numpy(got), strict=True):
        y = matrix(row[2], row[4], bins, height, ratio)
        x = matrix(row[1], row[3], bins, width, ratio)
        if op == "ps_roi_align":
            expected = np.einsum("pi,qj,pqij->pq", y, x, values.reshape(bins, bins, height, width))[None]
        else:
            expected = np.einsum("pi,qj,cij->cpq", y, x, values)
        np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert ratio > 0 or np.abs(expected).max() > 0
        total += y.sum() * x.sum() * (1 if op == "ps_roi_align" else channels)
    # All that the bins send is what they weigh.
    (grad,) = torch.autograd.grad(got.sum(), input)
    assert grad.double().sum().item() == pytest.approx(total, rel=1e-4)


def test_long_rotated_rois_are_sampled_where_they_meet_the_map(device):
    # The samples that rounding may bring onto the map come before those that lie on it.
    input = torch.ones(1, 1, 16, 3, device=device.torch)
    for length in (1e6, 1e7, 6e7):
        boxes = device.put([[0, 1.5, 8, 1, length, 0], [0, 1.5, 8, length, 1, 90]])
        got = to_numpy(detops.roi_align_rotated(input, boxes, 1)).ravel() * length
        np.testing.assert_allclose(got, 16, atol=3 + 1e-7 * length)


# Options and boxes.


class Seven:
    def __index__(self):
        return 7


@pytest.mark.parametrize(
    "output_size",
    [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), np.array([2, 2]), [np.int32(2), 2], torch.Size([2, 2])],
)
def test_output_sizes_of_all_kinds(op, output_size):
    input, boxes = random_map((1, 4, 9, 9)), torch.tensor(row_of(op, 0.0))
    assert torch.equal(OPS[op][0](input, boxes, output_size), OPS[op][0](input, boxes, 2))


def test_output_size_of_what_has_an_index():
    input, boxes = random_map((1, 4, 9, 9)), torch.tensor([[0.0, 1, 1, 8, 8]])
    assert operator.index(Seven()) == 7
    assert torch.equal(detops.roi_align(input, boxes, Seven()), detops.roi_align(input, boxes, 7))


def test_numbers_of_all_kinds(op):
    input, boxes = random_map((1, 4, 9, 9)), torch.tensor(row_of(op, 0.0))
    function, names = OPS[op]
    plain = dict(zip(names, (0.5, 3), strict=False))
    expected = function(input, boxes, 2, **plain)
    for number, integer in ((np.float32, np.int64), (np.float64, np.uint8), (np.array, np.array), (torch.tensor,) * 2):
        options = {name: kind(plain[name]) for name, kind in zip(names, (number, integer), strict=False)}
        assert torch.equal(function(input, boxes, 2, **options), expected)


def test_numbers_of_all_kinds_of_a_pyramid():
    features, boxes = [random_map((1, 4, 16, 16)), random_map((1, 4, 8, 8))], [torch.tensor([[0.0, 0, 9, 9]])]
    options = {"spatial_scales": [0.5, 0.25], "canonical_scale": 8, "canonical_level": 2, "aligned": True}
    own = {
        "spatial_scales": np.array([0.5, 0.25]),
        "canonical_scale": np.float32(8),
        "canonical_level": np.int64(2),
        "aligned": np.bool_(True),
    }
    expected = detops.multi_scale_roi_align(features, boxes, 2, **options)
    assert torch.equal(detops.multi_scale_roi_align(features, boxes, np.int64(2), **own), expected)
    module = detops.MultiScaleRoIAlign(["0", "1"], np.int64(2), np.int64(2))
    maps = dict(zip("01", features, strict=True))
    assert module(maps, boxes, [(32, 32)]).shape == (1, 4, 2, 2)


def test_options_that_are_none(op):
    input, boxes = random_map((1, 4, 9, 9)), torch.tensor(row_of(op, 0.0))
    function, names = OPS[op]
    name = name_of(op)
    for size, got in (
        (2.5, "2.5"),
        ((2, 2.5), r"\(2, 2.5\)"),
        (None, "None"),
        ("7", "'7'"),
        ((1, 2, 3), r"\(1, 2, 3\)"),
    ):
        rule = "output_size must be one or two positive whole numbers"
        with pytest.raises(ValueError, match=f"^{name}: {rule}, got {got}$"):
            function(input, boxes, size)
    for rows in (boxes, boxes[:0]):
        for size in (2**31, (2**16, 2**16)):
            with pytest.raises(ValueError, match=f"^{name}: output_size must make at most 2147418112 bins, got "):
                function(input, rows, size)
    with pytest.raises(ValueError, match=f"^{name}: spatial_scales? must be a number, got None$"):
        function(input, boxes, 2, spatial_scale=None)
    if "sampling_ratio" in names:
        with pytest.raises(ValueError, match=f"^{name}: sampling_ratio must be an integer, got 1.5$"):
            function(input, boxes, 2, sampling_ratio=1.5)


def test_what_is_no_tensor(op):
    input, boxes = random_map((1, 4, 9, 9)), torch.tensor(row_of(op, 0.0))
    function, name = OPS[op][0], name_of(op)
    for wrong, got in ((input.numpy(), "a NumPy array"), (None, "None"), (3, "an int")):
        argument = r"features\[0\]" if op == "multi_scale_roi_align" else "input"
        with pytest.raises(RuntimeError, match=f"^{name}: {argument} must be a tensor, got {got}$"):
            function(wrong, boxes, 2)
        with pytest.raises(BoxFormatError, match=f"^{name}: boxes must be a tensor .* or a list of .*, got {got}$"):
            function(input, wrong, 2)
        with pytest.raises(BoxFormatError, match=f"^{name}: boxes must be a tensor .* or a list of .*, got {got}$"):
            function(input, [wrong], 2)


def test_lists_of_more_boxes_than_images(device, op):
    input, box = random_map((2, 4, 9, 9)).to(device.torch), device.put([box_of(op)])
    function = OPS[op][0]
    rule = "boxes must be a list of one tensor for each of the 2 images at most, got 3 tensors"
    with pytest.raises(BoxFormatError, match=f"^{name_of(op)}: {rule}$"):
        function(input, [box] * 3, 2)
    # None for images that are not there is right, and so are fewer.
    assert torch.equal(function(input, [box, box, box[:0]], 2), function(input, [box] * 2, 2))
    assert len(function(input, [box], 2)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int64, torch.float32])
def test_lists_for_many_images(device, op, dtype):
    count = 2100 if dtype == torch.float16 and device.name == "cpu" else 299
    input = torch.arange(count, dtype=torch.float32, device=device.torch).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    input = input.clone().requires_grad_()
    box = device.put([box_of(op)]).to(dtype)
    got = OPS[op][0](input, [box] * count, 1)
    assert got.detach().flatten().round().tolist() == list(range(count))
    (grad,) = torch.autograd.grad(got.sum(), input)
    assert (grad.sum((1, 2, 3)) - 1).abs().max() < 1e-6


def test_modules_take_lists_for_many_images():
    input = torch.arange(299.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    boxes = [torch.tensor([[0, 0, 3, 3]], dtype=torch.bfloat16)] * 299
    arguments = {"RoIAlign": (1, 1.0, 2), "RoIPool": (1, 1.0), "PSRoIAlign": (1, 1.0, 2), "PSRoIPool": (1, 1.0)}
    for name, each in arguments.items():
        assert getattr(detops, name)(*each)(input, boxes).flatten().round().tolist() == list(range(299))
    pooled = detops.MultiScaleRoIAlign(["0"], 1, 2)({"0": input}, boxes, [(8, 8)])
    assert pooled.flatten().round().tolist() == list(range(299))


def test_batch_indices_of_half_precision_have_their_own_limits():
    input = torch.arange(299.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    rows = torch.tensor([[256.0, 0, 0, 3, 3], [257, 0, 0, 3, 3]], dtype=torch.bfloat16)
    assert detops.roi_align(input, rows, 1).flatten().round().tolist() == [256, 256]


# torch.fx.

MODULES = {
    "RoIAlign": ((2, 0.5, 2, True), detops.roi_align),
    "RoIPool": (((2, 1), 0.5), detops.roi_pool),
    "PSRoIAlign": ((2, 0.5, 2), detops.ps_roi_align),
    "PSRoIPool": ((2, 0.5), detops.ps_roi_pool),
}


@pytest.mark.parametrize("name", MODULES)
def test_fx_traces_modules(name):
    arguments, function = MODULES[name]
    module = getattr(detops, name)(*arguments)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = module

        def forward(self, input, boxes):
            return self.pool(input * 2, boxes)

    for model in (module, Head()):
        traced = torch.fx.symbolic_trace(model)
        called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert called[-1] is function
        input = random_map((2, 4, 9, 12))
        rows = torch.from_numpy(random_rois(5, 2, 24, 18)).float()
        for boxes in (rows, [rows[:2, 1:], rows[2:, 1:]]):
            assert torch.equal(traced(input, boxes), model(input, boxes))


@pytest.mark.parametrize("name", MODULES)
def test_fx_traces_modules_as_torchvision_does(torchvision, name):
    arguments, _ = MODULES[name]
    graphs = [torch.fx.symbolic_trace(getattr(each, name)(*arguments)).graph for each in (detops, torchvision.ops)]
    ours, theirs = ([(node.op, node.name) for node in graph.nodes] for graph in graphs)
    assert ours == theirs
