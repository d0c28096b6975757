"""The IoU losses: values against the formulas of reference/losses.py, gradients against autograd through them."""

from functools import partial

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import losses as reference
from test_losses import REDUCTIONS

LOSSES = (
    detops.generalized_box_iou_loss,
    detops.distance_box_iou_loss,
    detops.complete_box_iou_loss,
    detops.efficient_box_iou_loss,
    detops.siou_loss,
)
NAMES = tuple(loss.__name__ for loss in LOSSES)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def pairs(n, seed=0):
    """Sides of 0.5 to 10 in a square of 12: most pairs overlap, none has a tie."""
    return inputs.uniform_boxes(n, seed, 12, 10), inputs.uniform_boxes(n, seed + 1000, 12, 10)


def grid_pairs(n, seed=0):
    """Sides of 1 to 3 on a small grid: ties of all kinds, touching, nested and identical boxes."""
    rng = np.random.default_rng(seed)
    low, side = rng.integers(0, 4, (2, n, 2)), rng.integers(1, 4, (2, n, 2))
    return tuple(np.concatenate([low, low + side], axis=2).astype(np.float64))


def all_pairs(boxes):
    return np.repeat(boxes, len(boxes), axis=0), np.tile(boxes, (len(boxes), 1))


def put(device, arrays, dtype=torch.float64):
    return tuple(device.put(array, dtype) for array in arrays)


def check(name, boxes1, boxes2, reduction="none", eps=1e-7):
    """The losses equal the reference's, up to a few roundings of terms of size 1; returns them."""
    losses = getattr(detops.losses, name)(boxes1, boxes2, reduction=reduction, eps=eps)
    expected = getattr(reference, name)(to_numpy(boxes1), to_numpy(boxes2), eps)
    dtype = torch.float64 if boxes1.dtype == torch.float64 else torch.float32
    assert losses.dtype == dtype and losses.device == boxes1.device and losses.is_contiguous()
    expected = REDUCTIONS[reduction](to_torch(expected, torch.float64))
    tolerance = 2e-14 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return losses


# Values.


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([0, 0, 10, 10], (0, 0, 0, 0, 0)),
        # Half the box: IoU 1/2, centres 2.5 apart in a diagonal of sqrt(200), one side halved.
        ([0, 0, 10, 5], (0.5, 0.53125, 0.5345, 0.78125, 0.5 + (1 - np.exp(-0.125) + (1 - np.exp(-0.5)) ** 4) / 2)),
        # The neighbour: IoU 0, centres 10 apart in a diagonal of sqrt(500).
        ([10, 0, 20, 10], (1, 1.2, 1.2, 1.2, 1 + (1 - np.exp(-0.5)) / 2)),
        # The neighbour over a corner: the smallest box around is half empty, and the angle cost is 1.
        ([10, 10, 20, 20], (1.5, 1.25, 1.25, 1.25, 2 - np.exp(-0.25))),
    ],
)
def test_written_out_losses(device, second, expected):
    boxes1, boxes2 = device.put([[0.0, 0, 10, 10]]), device.put([second], torch.float32)
    for name, loss in zip(NAMES, expected, strict=True):
        for pair in ((boxes1, boxes2), (boxes2, boxes1)):
            assert getattr(detops.losses, name)(*pair).item() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 3000])
def test_sizes(device, name, n, reduction):
    check(name, *put(device, pairs(device.limit(n, 1030))), reduction)


@pytest.mark.parametrize("kind", inputs.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinds_of_boxes(device, name, kind, dtype):
    if kind == "distant" and dtype == torch.float32 and name != "generalized_box_iou_loss":
        pytest.skip("float32 rounds their centres, here as in torchvision")
    boxes1, boxes2 = put(device, (inputs.KINDS[kind](400, seed=seed) for seed in (0, 1)), dtype)
    check(name, boxes1, boxes2)
    check(name, boxes1, boxes1 + (boxes2 - boxes1) / 16)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-3, 1.0, 100.0])
def test_eps(device, name, eps):
    check(name, *put(device, pairs(200)), eps=eps)


def test_dtypes(device, name, boxes_dtype):
    boxes1, boxes2 = put(device, pairs(300), boxes_dtype)
    losses = check(name, boxes1, boxes2)
    if boxes_dtype.itemsize == 2:
        assert torch.equal(losses, getattr(detops.losses, name)(boxes1.float(), boxes2.float()))


def test_mixed_and_integer_dtypes(device, name):
    function = getattr(detops.losses, name)
    boxes1, boxes2 = put(device, grid_pairs(50), torch.float32)
    expected = function(boxes1, boxes2)
    assert torch.equal(function(boxes1.half(), boxes2), expected)
    assert torch.equal(function(boxes1.long(), boxes2.int()), expected)
    assert function(boxes1, boxes2.double()).dtype == torch.float64


@pytest.mark.parametrize("edge", [edge for edge in inputs.EDGES if edge not in ("overflowing", "tiny", "everything")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(device, name, edge, dtype):
    check(name, *put(device, all_pairs(inputs.edge_boxes(edge)), dtype))


def flat(boxes):
    """Which boxes have no area: [x1, y1, x2, y2] with a side of length 0."""
    return (boxes[..., 0] == boxes[..., 2]) | (boxes[..., 1] == boxes[..., 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_boxes_without_area_lose_one_and_have_no_gradient(device, name, dtype):
    flat_boxes = [[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 0, 9], [5, 2, 5, 7], [0, 4, 9, 4], [8, 8, 8, 8], [-9, 0, 1e30, 0]]
    boxes1, boxes2 = (boxes.requires_grad_() for boxes in put(device, all_pairs(np.array(flat_boxes)), dtype))
    for eps in (0.0, 1e-7, 1.0):
        losses = getattr(detops.losses, name)(boxes1, boxes2, eps=eps)
        assert (losses == 1).all()
        assert not any(grad.any() for grad in torch.autograd.grad(losses.sum(), (boxes1, boxes2)))


def test_a_box_without_area_against_one_with(device, name):
    """Whose complete loss was NaN, and so was its gradient: a point has no aspect ratio to compare."""
    boxes1, boxes2 = put(device, ([[30.0, 75, 30, 75], [30, 75, 30, 80]], [[20.0, 60, 60, 90]] * 2), torch.float32)
    for first, second in ((boxes1, boxes2), (boxes2, boxes1)):
        losses = check(name, first, second)
        assert losses.isfinite().all() and all(grad.isfinite().all() for grad in gradients_of(name, first, second))
    if name == "complete_box_iou_loss":
        distance = detops.distance_box_iou_loss(boxes1, boxes2)
        losses = detops.complete_box_iou_loss(boxes1, boxes2)
        assert losses[0] == distance[0] and losses[1] > distance[1]
        for got, expected in zip(
            *(gradients_of(each, boxes1[:1], boxes2[:1]) for each in (name, "distance_box_iou_loss")), strict=True
        ):
            assert torch.equal(got, expected)


def gradients_of(name, boxes1, boxes2):
    return gradients(getattr(detops.losses, name), boxes1, boxes2)


def ordered_boxes(n, dtype, seed):
    """[n, 4] finite, x1 <= x2, y1 <= y2, of coordinates of every size, many equal or next to each other."""
    rng = np.random.default_rng(seed)
    kind = torch.finfo(dtype)
    exponents = np.arange(np.log2(kind.tiny) - 20, np.log2(kind.max))
    sizes = 2.0 ** rng.choice(exponents, (n, 4)) * rng.choice([1, 1.5], (n, 4))
    ordinary = rng.choice([0, 0.5, 1, 2, 30, 75, 640], (n, 4)) * rng.choice([1, 1 + kind.eps], (n, 4))
    extreme = rng.choice([0, kind.smallest_normal, kind.tiny * kind.eps, 1, kind.max], (n, 4))
    drawn = np.choose(rng.integers(0, 3, (n, 1)), [sizes, ordinary, extreme]) * rng.choice([-1, 1], (n, 4))
    drawn[: n // 4, 2:] = drawn[: n // 4, :2] + rng.choice([0, 1, 1e-3], (n // 4, 2)) * ordinary[: n // 4, 2:]
    drawn = drawn.astype(np.float32 if dtype == torch.float32 else np.float64)
    return np.concatenate([np.minimum(drawn[:, :2], drawn[:, 2:]), np.maximum(drawn[:, :2], drawn[:, 2:])], axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_of_ordered_boxes_are_finite(device, name, dtype):
    with np.errstate(over="ignore"):
        boxes1, boxes2 = (ordered_boxes(device.limit(50_000, 3000), dtype, seed) for seed in (0, 1))
    rng = np.random.default_rng(2)
    boxes2 = np.where(rng.random((len(boxes2), 1)) < 0.3, boxes1, boxes2)  # identical, or with one side in common
    boxes2[: len(boxes2) // 4, 0] = np.minimum(boxes1[: len(boxes2) // 4, 0], boxes2[: len(boxes2) // 4, 2])
    boxes1, boxes2 = put(device, (boxes1, boxes2), dtype)
    losses = getattr(detops.losses, name)(boxes1, boxes2)
    assert losses.isfinite().all() and losses.min() > -1e-3 and losses.max() < 8
    assert all(grad.isfinite().all() for grad in gradients_of(name, boxes1, boxes2))
    # And without an eps, where all else is as in a training.
    boxes1, boxes2 = (boxes.clamp(-640, 640).round() for boxes in (boxes1, boxes2))
    assert getattr(detops.losses, name)(boxes1, boxes2, eps=0.0).isfinite().all()


@pytest.mark.parametrize("power", [64, 90, 120])
def test_huge_boxes_lose_what_small_ones_do(device, name, power):
    """Whose squared sides are infinite in float32: all but eps is the same in any unit of length."""
    boxes = put(device, pairs(200), torch.float32)
    huge = tuple(each * 2.0**power for each in boxes)
    check(name, *huge)
    for got, expected in zip(gradients_of(name, *huge), gradients_of(name, *boxes), strict=True):
        torch.testing.assert_close(got * 2.0**power, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sides_twice_as_long_as_coordinates(device, name, dtype):
    """From -x to x, for x around those whose squared side, or its double, is just finite."""
    middle = 62.5 if dtype == torch.float32 else 510.5
    x = 2.0 ** torch.linspace(-2, 2, 33, dtype=torch.float64)
    boxes = torch.stack([-x, -x, x, x], dim=1)
    small = put(device, all_pairs(torch.cat([boxes, boxes.clamp(min=0)]).numpy()), torch.float64)
    boxes1, boxes2 = (each.to(dtype) * 2.0**middle for each in small)
    expected = getattr(detops.losses, name)(*small, eps=1e-30)
    torch.testing.assert_close(getattr(detops.losses, name)(boxes1, boxes2).double(), expected, rtol=1e-5, atol=1e-6)
    assert all(grad.isfinite().all() for grad in gradients_of(name, boxes1, boxes2))


def test_other_shapes_and_strides(device, name):
    function = getattr(detops.losses, name)
    boxes1, boxes2 = put(device, pairs(24), torch.float32)
    expected = function(boxes1, boxes2)
    assert torch.equal(function(boxes1.t().contiguous().t(), boxes2.t().contiguous().t()), expected)
    shifted = [torch.cat([boxes.flatten()[:1], boxes.flatten()])[1:].view(24, 4) for boxes in (boxes1, boxes2)]
    assert torch.equal(function(*shifted), expected)
    assert torch.equal(function(boxes1.view(2, 3, 4, 4), boxes2.view(2, 3, 4, 4)), expected.view(2, 3, 4))
    assert torch.equal(function(boxes1[0], boxes2[0]), expected[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_boxes(device, name, shape, reduction):
    boxes = device.put(np.zeros(shape)).requires_grad_()
    losses = getattr(detops.losses, name)(boxes, boxes, reduction=reduction)
    assert losses.shape == (shape[:-1] if reduction == "none" else ()) and losses.sum() == 0
    losses.sum().backward()
    assert boxes.grad.shape == shape


# Gradients.


def formula(name, boxes1, boxes2, eps=1e-7):
    """The losses from PyTorch operations, step by step as published."""
    sides = torch.min(boxes1[..., 2:], boxes2[..., 2:]) - torch.max(boxes1[..., :2], boxes2[..., :2])
    around = torch.max(boxes1[..., 2:], boxes2[..., 2:]) - torch.min(boxes1[..., :2], boxes2[..., :2])
    sides1, sides2 = boxes1[..., 2:] - boxes1[..., :2], boxes2[..., 2:] - boxes2[..., :2]
    offset = (boxes1[..., 2:] + boxes1[..., :2]) / 2 - (boxes2[..., 2:] + boxes2[..., :2]) / 2
    intersection = torch.where((sides > 0).all(-1), sides.prod(-1), 0)
    union = sides1.prod(-1) + sides2.prod(-1) - intersection
    loss = 1 - intersection / (union + eps)
    no_area = flat(boxes1) & flat(boxes2) & boxes1.isfinite().all(-1) & boxes2.isfinite().all(-1)
    return torch.where(no_area, 1, with_area(name, around, sides1, sides2, offset, union, loss, eps))


def with_area(name, around, sides1, sides2, offset, union, loss, eps):
    if name == "generalized_box_iou_loss":
        return loss + (around.prod(-1) - union) / (around.prod(-1) + eps)
    squared_distance = (offset**2).sum(-1)
    if name == "siou_loss":
        angle = 2 * offset.abs().prod(-1) / (squared_distance + eps)
        distance = 1 - (-(2 - angle[..., None]) * offset**2 / (around**2 + eps)).exp()
        shape = (1 - (-(sides1 - sides2).abs() / (torch.max(sides1, sides2) + eps)).exp()) ** 4
        return loss + (distance.sum(-1) + shape.sum(-1)) / 2
    distance_loss = loss + squared_distance / ((around**2).sum(-1) + eps)
    if name == "complete_box_iou_loss":
        angles = [torch.atan(each[..., 0] / each[..., 1]) for each in (sides1, sides2)]
        v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
        return distance_loss + (v / (loss + v + eps)).detach() * v
    if name == "efficient_box_iou_loss":
        return distance_loss + ((sides1 - sides2) ** 2 / (around**2 + eps)).sum(-1)
    return distance_loss


def gradients(function, boxes1, boxes2, reduction="none"):
    """Those of both boxes; without a reduction the losses count with different weights."""
    boxes1, boxes2 = boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()
    losses = function(boxes1, boxes2)
    weights = torch.linspace(-1, 1, losses.numel()).to(losses).reshape(losses.shape)
    return torch.autograd.grad(losses, (boxes1, boxes2), weights if reduction == "none" else torch.ones_like(losses))


def check_gradients(name, boxes1, boxes2, reduction="none", eps=1e-7):
    def ours(*boxes):
        return getattr(detops.losses, name)(*boxes, reduction=reduction, eps=eps)

    def theirs(*boxes):
        return REDUCTIONS[reduction](formula(name, *boxes, eps))

    expected = gradients(theirs, boxes1.double(), boxes2.double(), reduction)
    tolerance = 1e-12 if boxes1.dtype == torch.float64 else 3e-6
    for got, gradient in zip(gradients(ours, boxes1, boxes2, reduction), expected, strict=True):
        assert got.dtype == boxes1.dtype and got.shape == boxes1.shape
        atol = tolerance * max(1, gradient.abs().max().item())
        torch.testing.assert_close(got.double(), gradient, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(device, name, dtype, reduction):
    check_gradients(name, *put(device, pairs(device.limit(1500)), dtype), reduction)
    if dtype == torch.float64:
        for eps in (1e-3, 1.0):
            check_gradients(name, *put(device, pairs(200)), reduction, eps)


def test_gradients_at_ties_are_split(device, name):
    check_gradients(name, *put(device, grid_pairs(device.limit(1500))))
    boxes = device.put(inputs.uniform_boxes(50), torch.float64)
    check_gradients(name, boxes, boxes.clone())


@pytest.mark.parametrize("edge", ["touching", "identical", "nested", "zero_area", "inverted", "negative", "huge"])
def test_gradients_at_the_edges(device, name, edge):
    boxes1, boxes2 = put(device, all_pairs(inputs.edge_boxes(edge)))
    if name == "complete_box_iou_loss":  # atan(w / h) at h = 0: autograd's gradient is NaN
        ordinary = ((boxes1[:, 3] != boxes1[:, 1]) & (boxes2[:, 3] != boxes2[:, 1])).nonzero()[:, 0]
        boxes1, boxes2 = boxes1[ordinary], boxes2[ordinary]
    if edge in ("inverted", "zero_area"):  # not where a divisor is 0 but for eps: gradients of 1e7 and more
        losses = getattr(detops.losses, name)(boxes1, boxes2)
        tame = (losses.abs() < 10).nonzero()[:, 0]
        boxes1, boxes2 = boxes1[tame], boxes2[tame]
    check_gradients(name, boxes1, boxes2)


def test_boxes_that_overflow(device, name):
    """In float32, and not in the reference's float64."""
    boxes1, boxes2 = put(device, all_pairs(inputs.edge_boxes("overflowing")), torch.float32)
    # Not of [-3e38, 0, 3e38, 10] and smaller ones: in a unit in which its width has a square, 10 has none.
    wide = (boxes1[:, 3] - boxes1[:, 1] < 100) & (boxes1[:, 2] > 1e38) & (boxes2[:, 2] < 1e3)
    wide |= (boxes2[:, 3] - boxes2[:, 1] < 100) & (boxes2[:, 2] > 1e38) & (boxes1[:, 2] < 1e3)
    check(name, boxes1[~wide], boxes2[~wide])
    fits = torch.cat([boxes1, boxes2], dim=1).abs().amax(1) < 1.1e19
    check_gradients(name, boxes1[fits], boxes2[fits])
    assert all(grad.isfinite().all() for grad in gradients_of(name, boxes1, boxes2))


def test_boxes_that_vanish(device, name):
    boxes1, boxes2 = put(device, all_pairs(inputs.edge_boxes("tiny")), torch.float32)
    check(name, boxes1, boxes2)
    if name == "complete_box_iou_loss":  # its gradient is as large as a side is small, and needs the squares of sides
        large = torch.cat([boxes[:, 2:] - boxes[:, :2] for boxes in (boxes1, boxes2)], dim=1).amin(1) > 1e-19
        assert large.sum() > 100
        boxes1, boxes2 = boxes1[large], boxes2[large]
    check_gradients(name, boxes1, boxes2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(device, name, reduction):
    boxes1, boxes2 = put(device, pairs(5, seed=3))
    boxes1.requires_grad_(), boxes2.requires_grad_()
    if name == "complete_box_iou_loss":
        # With alpha held fixed: the rest is the distance loss, and alpha times v.
        got = gradients(lambda *boxes: getattr(detops.losses, name)(*boxes, reduction=reduction), boxes1, boxes2)
        fixed = gradients(lambda *boxes: REDUCTIONS[reduction](formula(name, *boxes)), boxes1, boxes2)
        return torch.testing.assert_close(got, fixed, rtol=1e-12, atol=1e-12)
    function = getattr(detops.losses, name)
    assert torch.autograd.gradcheck(lambda *boxes: function(*boxes, reduction=reduction), (boxes1, boxes2))


def test_gradients_of_half_boxes(device, name):
    for dtype in (torch.float16, torch.bfloat16):
        boxes1, boxes2 = put(device, pairs(100), dtype)
        function = getattr(detops.losses, name)
        half, full = gradients(function, boxes1, boxes2), gradients(function, boxes1.float(), boxes2.float())
        assert all(torch.equal(h, f.to(dtype)) for h, f in zip(half, full, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_gradient_alone_is_the_same(device, name, reduction):
    boxes1, boxes2 = (boxes.requires_grad_() for boxes in put(device, pairs(50), torch.float32))
    both = gradients(partial(getattr(detops.losses, name), reduction=reduction), boxes1, boxes2, reduction)
    for first, second in ((boxes1, boxes2.detach()), (boxes1.detach(), boxes2)):
        losses = getattr(detops.losses, name)(first, second, reduction=reduction)
        weights = torch.linspace(-1, 1, 50).to(losses) if reduction == "none" else torch.ones_like(losses)
        leaf, expected = (first, both[0]) if first.requires_grad else (second, both[1])
        assert torch.equal(*torch.autograd.grad(losses, leaf, weights), expected)


def test_no_second_derivative(device, name):
    boxes1, boxes2 = put(device, pairs(3))
    boxes1.requires_grad_()
    losses = getattr(detops.losses, name)(boxes1, boxes2, reduction="sum")
    (grad,) = torch.autograd.grad(losses, boxes1, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
        grad.sum().backward()


# Errors.


@pytest.mark.parametrize("reduction", ["max", "", None, "Mean"])
def test_bad_reduction(name, reduction):
    with pytest.raises(ValueError, match=f"^Invalid reduction: {name}: reduction must be 'none', 'mean' or 'sum', got"):
        getattr(detops.losses, name)(torch.zeros(3, 4), torch.zeros(3, 4), reduction=reduction)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 5), (3, 5)), r"boxes1 must have shape \[..., 4\], got \[3, 5\]"),
        (((), (3, 4)), r"boxes1 must have shape \[..., 4\], got \[\]"),
        (((3, 4), (2, 4)), r"boxes2 must have shape \[3, 4\] as boxes1, got \[2, 4\]"),
        (((3, 4), (4,)), r"boxes2 must have shape \[3, 4\] as boxes1, got \[4\]"),
    ],
)
def test_bad_boxes(device, name, shapes, message):
    boxes1, boxes2 = (device.put(np.zeros(shape)) for shape in shapes)
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        getattr(detops.losses, name)(boxes1, boxes2)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_boxes_on_different_devices(device, name):
    boxes = device.put(np.zeros((3, 4)))
    with pytest.raises(RuntimeError, match=f"^{name}: boxes2 must be on the device of boxes1"):
        getattr(detops.losses, name)(boxes, boxes.cpu())


# A PyTorch citizen, and the same on every run.


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("kind", range(len(NAMES)))
def test_opcheck(device, kind, reduction):
    """Of detops.iou_loss and detops.iou_loss_backward."""
    boxes1, boxes2 = put(device, pairs(6), torch.float32)
    losses = _library.ops.iou_loss(boxes1, boxes2, kind, 1e-7, reduction)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        arguments = losses, boxes1, boxes2, kind, 1e-7, reduction, *wanted
        torch.library.opcheck(_library.ops.iou_loss_backward, arguments)
        shapes = [(6, 4) if want else (0,) for want in wanted]
        assert [each.shape for each in _library.ops.iou_loss_backward(*arguments)] == shapes
    leaves = boxes1.requires_grad_(), boxes2.requires_grad_()
    torch.library.opcheck(_library.ops.iou_loss, (*leaves, kind, 1e-7, reduction))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device, name):
    function = getattr(detops.losses, name)

    def total(boxes1, boxes2):
        return function(boxes1 * 2, boxes2, reduction="mean") + function(boxes1, boxes2).sum()

    torch.compiler.reset()  # all names share the code of `total`, and so its limit of recompilations
    compiled = torch.compile(total, fullgraph=True)
    for n in (20, 30):
        boxes = put(device, pairs(n))
        torch.testing.assert_close(gradients(compiled, *boxes), gradients(total, *boxes))


def test_export_with_any_number_of_boxes(name):
    class Loss(torch.nn.Module):
        def forward(self, boxes1, boxes2):
            return getattr(detops.losses, name)(boxes1, boxes2, reduction="sum")

    rows = {0: torch.export.Dim("n", min=2)}
    program = torch.export.export(Loss(), tuple(map(to_torch, pairs(20))), dynamic_shapes=(rows, rows))
    boxes = tuple(map(to_torch, pairs(30)))
    assert torch.equal(program.module()(*boxes), getattr(detops.losses, name)(*boxes, reduction="sum"))


def losses_and_gradients(name, boxes1, boxes2):
    results = []
    for reduction in REDUCTIONS:
        boxes = boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()
        losses = getattr(detops.losses, name)(*boxes, reduction=reduction)
        losses.sum().backward()
        results += [losses.detach(), boxes[0].grad, boxes[1].grad]
    return results


def test_any_number_of_threads_gives_the_same_bits(restore_threads, name):
    boxes = tuple(map(to_torch, pairs(50_001)))
    results = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results[threads] = losses_and_gradients(name, *boxes)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, results[1], results[threads]))


def test_the_same_on_every_run(device, name):
    boxes = put(device, pairs(device.limit(50_001, 2000)), torch.float32)
    first = losses_and_gradients(name, *boxes)
    assert all(map(torch.equal, first, losses_and_gradients(name, *boxes)))


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="^siou_loss: eps must be at least 0 and finite in float32, got "):
        detops.siou_loss(torch.zeros(1, 4), torch.zeros(1, 4), eps=eps)
