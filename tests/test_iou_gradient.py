"""Gradients of box_iou and its relatives, against finite differences and torch's autograd."""

import numpy as np
import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

import inputs
from detops import _library
from inputs import to_torch
from test_iou import FUNCTIONS, NAMES


@pytest.fixture(params=FUNCTIONS)
def kind(request):
    return request.param


def parts(kind, boxes1, boxes2, aligned, eps=1e-7):
    """(value without the alpha v of the complete IoU, alpha, v) from PyTorch operations, step by step as published."""
    a, b = (boxes1, boxes2) if aligned else (boxes1[..., :, None, :], boxes2[..., None, :, :])
    sides = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    around = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).clamp(min=0)
    size1, size2 = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    intersection = sides[..., 0] * sides[..., 1]
    union = size1[..., 0] * size1[..., 1] + size2[..., 0] * size2[..., 1] - intersection
    iou, nothing = intersection / union, torch.zeros((), dtype=boxes1.dtype, device=boxes1.device)
    if kind == "iou":
        return iou, nothing, nothing
    if kind == "ioa":
        return intersection / (size1[..., 0] * size1[..., 1]), nothing, nothing
    if kind == "generalized":
        area = around[..., 0] * around[..., 1]
        return iou - (area - union) / area, nothing, nothing
    apart = (a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2
    value = iou - (apart**2).sum(-1) / ((around**2).sum(-1) + eps)
    if kind == "efficient":
        return value - ((size1 - size2) ** 2 / (around**2 + eps)).sum(-1), nothing, nothing
    if kind == "distance":
        return value, nothing, nothing
    angles = [torch.atan(size[..., 0] / size[..., 1]) for size in (size1, size2)]
    v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    return value, v / (1 - iou + v + eps), v


def formula(kind, boxes1, boxes2, aligned):
    value, alpha, v = parts(kind, boxes1, boxes2, aligned)
    return value - alpha.detach() * v


def gradients(function, boxes1, boxes2, weights):
    """Of the weighted sum of the results, with respect to both."""
    boxes1, boxes2 = boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()
    return torch.autograd.grad(function(boxes1, boxes2), (boxes1, boxes2), weights)


def random_weights(shape, like, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def check(kind, boxes1, boxes2, aligned=False):
    """Gradients equal those of autograd through the formula in float64.

    Within 1e-12, or 2e-6 for float32 boxes, of the largest component, times the square root of the number of rows.
    """
    function = FUNCTIONS[kind]
    weights = random_weights(function(boxes1, boxes2, aligned=aligned).shape, boxes1)
    got = gradients(lambda *boxes: function(*boxes, aligned=aligned), boxes1, boxes2, weights)
    expected = gradients(
        lambda *boxes: formula(kind, *boxes, aligned), boxes1.double(), boxes2.double(), weights.double()
    )
    for ours, theirs, boxes in zip(got, expected, (boxes1, boxes2), strict=True):
        assert ours.dtype == boxes.dtype and ours.shape == boxes.shape
        tolerance = (1e-12 if boxes.dtype == torch.float64 else 2e-6) * len(weights) ** 0.5
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def loose_boxes(n, seed=0):
    """Sides of 2 to 10 in a square of 12, so that most pairs overlap and none has a tie."""
    return inputs.uniform_boxes(n, seed, extent=12, size=10) + 0.01


# Finite differences.


@pytest.mark.parametrize(
    ("shape1", "shape2", "aligned"),
    [((5, 4), (4, 4), False), ((2, 1, 3, 4), (2, 4, 4), False), ((6, 4), (6, 4), True), ((2, 3, 4), (4,), True)],
)
def test_gradcheck(device, kind, shape1, shape2, aligned):
    boxes1, boxes2 = (
        device.put(loose_boxes(int(np.prod(shape[:-1])), seed).reshape(shape), torch.float64).requires_grad_()
        for seed, shape in enumerate((shape1, shape2))
    )
    alpha = parts(kind, boxes1, boxes2, aligned)[1].detach()

    def with_alpha_fixed(boxes1, boxes2):
        # Moves the value to that for the alpha of the start, where the term added has neither value nor gradient.
        _, moved, v = parts(kind, boxes1, boxes2, aligned)
        return FUNCTIONS[kind](boxes1, boxes2, aligned=aligned) + (moved - alpha).detach() * v

    assert torch.autograd.gradcheck(with_alpha_fixed, (boxes1, boxes2), nondet_tol=0)


def test_alpha_is_a_constant(device):
    # The whole derivative of the complete IoU differs: what test_gradcheck does about alpha is needed.
    boxes1, boxes2 = (device.put(loose_boxes(4, seed), torch.float64).requires_grad_() for seed in (0, 1))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(FUNCTIONS["complete"], (boxes1, boxes2))


# torch's autograd.


# Around 16 lanes and 64 rows a block on the CPU; 8 rows, 32 lanes and 32 rows a block on the GPU.
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33, 257])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 32, 33, 65, 130])
def test_sizes(device, kind, rows, columns):
    for dtype in (torch.float32, torch.float64):
        boxes1, boxes2 = loose_boxes(rows, rows), loose_boxes(columns, columns + 1)
        check(kind, device.put(boxes1, dtype), device.put(boxes2, dtype))


@pytest.mark.parametrize("shape", [(1300, 40), (40, 1300), (5000, 3)])
def test_many_rows_or_columns(device, kind, shape):
    rows, columns = shape
    check(kind, device.put(loose_boxes(rows)), device.put(loose_boxes(columns, seed=1)))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 9000])
def test_aligned_sizes(device, kind, n):
    for dtype in (torch.float32, torch.float64):
        check(kind, device.put(loose_boxes(n), dtype), device.put(loose_boxes(n, seed=1), dtype), aligned=True)


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [((2, 5, 4), (2, 70, 4)), ((70, 4), (3, 7, 4)), ((3, 33, 4), (7, 4)), ((3, 1, 5, 4), (2, 7, 4))],
)
def test_batches(device, kind, shape1, shape2):
    boxes1 = loose_boxes(int(np.prod(shape1[:-1]))).reshape(shape1)
    boxes2 = loose_boxes(int(np.prod(shape2[:-1])), seed=1).reshape(shape2)
    for dtype in (torch.float32, torch.float64):
        check(kind, device.put(boxes1, dtype), device.put(boxes2, dtype))


@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((0, 4), (0, 4)), ((2, 0, 4), (5, 4)), ((0, 3, 4), (5, 4))],
)
def test_no_pairs_give_zero_gradients(device, kind, shape1, shape2):
    boxes1, boxes2 = (torch.ones(shape, device=device.torch).requires_grad_() for shape in (shape1, shape2))
    FUNCTIONS[kind](boxes1, boxes2).sum().backward()
    for boxes in (boxes1, boxes2):
        assert boxes.grad.shape == boxes.shape and not boxes.grad.any()


@pytest.mark.parametrize("batch", [(), (2,), (0,)])
@pytest.mark.parametrize("sizes", [(3, 0), (0, 3), (0, 0)])
def test_no_boxes_on_one_side(device, kind, sizes, batch):
    """As of a training image without objects. The gradient of no boxes has no memory, and is wanted all the same."""
    boxes = [device.put(np.ones((*batch, size, 4))) for size in sizes]
    for wanted in ((True, False), (False, True), (True, True)):
        leaves = [each.clone().requires_grad_(want) for each, want in zip(boxes, wanted, strict=True)]
        iou = FUNCTIONS[kind](*leaves)
        assert iou.shape == (*batch, *sizes)
        iou.sum().backward()
        for leaf, want in zip(leaves, wanted, strict=True):
            assert not want or (leaf.grad.shape == leaf.shape and not leaf.grad.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_split_as_in_autograd(device, kind, dtype):
    # Every pair of boxes on a grid of 3 x 2 cells: identical, nested, with shared edges, touching at edges or corners.
    corners = [(x1, y1, x2, y2) for x2 in range(4) for x1 in range(x2) for y2 in range(3) for y1 in range(y2)]
    boxes = device.put(np.array(corners, dtype=np.float64), dtype)
    first, second = (each.flatten() for each in torch.meshgrid(*[torch.arange(len(boxes))] * 2, indexing="ij"))
    check(kind, boxes[first], boxes[second], aligned=True)
    check(kind, boxes, boxes)


def test_written_out_ties(device):
    # Of identical unit squares, each takes half of the intersection's gradient and all of its own area's.
    boxes = device.put([[0.0, 0, 1, 1]])
    for ours in gradients(FUNCTIONS["iou"], boxes, boxes, torch.ones(1, 1, device=boxes.device)):
        # I = 1, U = 1: dIoU = dI / U - I / U^2 dU = dI - (dA + dB - dI) = 2 dI - dA, and dI = dA / 2.
        assert ours.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    # Touching boxes: the clamp passes the gradient of a side that is exactly 0.
    touching = device.put([[1.0, 0, 2, 1]])
    ours = gradients(FUNCTIONS["iou"], boxes, touching, torch.ones(1, 1, device=boxes.device))
    assert ours[0].tolist() == [[0.0, 0.0, 0.5, 0.0]] and ours[1].tolist() == [[-0.5, 0.0, 0.0, 0.0]]


def test_disjoint_boxes(device, kind):
    boxes1, boxes2 = device.put(loose_boxes(40)), device.put(loose_boxes(50, seed=1) + 100)
    check(kind, boxes1, boxes2)
    if kind in ("iou", "ioa"):
        weights = torch.ones(40, 50, device=boxes1.device)
        assert not any(gradient.any() for gradient in gradients(FUNCTIONS[kind], boxes1, boxes2, weights))


@pytest.mark.parametrize("kind", ["iou", "generalized", "distance", "complete"])
def test_equals_torchvision_in_float32(torchvision, device, kind):
    boxes1, boxes2 = to_torch(loose_boxes(90)), to_torch(loose_boxes(60, seed=1))
    weights = random_weights((90, 60), boxes1)
    expected = gradients(getattr(torchvision.ops, NAMES[kind]), boxes1, boxes2, weights)
    got = gradients(FUNCTIONS[kind], *(tensor.to(device.torch) for tensor in (boxes1, boxes2, weights)))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


# What autograd may ask for.


def test_gradient_to_one_argument(device, kind):
    boxes1, boxes2 = device.put(loose_boxes(20)), device.put(loose_boxes(30, seed=1))
    weights = random_weights((20, 30), boxes1)
    both = gradients(FUNCTIONS[kind], boxes1, boxes2, weights)
    for number in (0, 1):
        boxes = [boxes1.clone(), boxes2.clone()]
        boxes[number].requires_grad_()
        FUNCTIONS[kind](*boxes).backward(weights)
        assert torch.equal(boxes[number].grad, both[number]) and boxes[1 - number].grad is None


def test_upstream_gradients_of_any_strides(device, kind):
    boxes1, boxes2 = device.put(loose_boxes(20)), device.put(loose_boxes(30, seed=1))
    wide = random_weights((30, 40), boxes1)
    for weights in (wide.t()[::2], torch.ones((), device=boxes1.device).expand(20, 30)):
        got = gradients(FUNCTIONS[kind], boxes1, boxes2, weights)
        expected = gradients(FUNCTIONS[kind], boxes1, boxes2, weights.contiguous())
        assert all(map(torch.equal, got, expected))
        assert got[0].abs().max() > 0


def test_half_boxes_get_half_gradients(device, kind):
    for dtype in (torch.float16, torch.bfloat16):
        boxes1, boxes2 = device.put(loose_boxes(20), dtype), device.put(loose_boxes(30, seed=1), dtype)
        weights = random_weights((20, 30), boxes1.float())
        got = gradients(FUNCTIONS[kind], boxes1, boxes2, weights)
        expected = gradients(FUNCTIONS[kind], boxes1.float(), boxes2.float(), weights)
        for ours, wide in zip(got, expected, strict=True):
            assert ours.dtype == dtype and torch.equal(ours, wide.to(dtype))


WANTED = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("aligned", [False, True])
def test_one_gradient_alone_is_the_same(device, kind, aligned):
    boxes1 = device.put(loose_boxes(40)).requires_grad_()
    boxes2 = device.put(loose_boxes(40 if aligned else 35, seed=1)).requires_grad_()
    weights = random_weights((40,) if aligned else (40, 35), boxes1)
    both = gradients(lambda *boxes: FUNCTIONS[kind](*boxes, aligned=aligned), boxes1, boxes2, weights)
    for first, second in ((boxes1, boxes2.detach()), (boxes1.detach(), boxes2)):
        values = FUNCTIONS[kind](first, second, aligned=aligned)
        leaf, expected = (first, both[0]) if first.requires_grad else (second, both[1])
        assert torch.equal(*torch.autograd.grad(values, leaf, weights), expected)
    op = _library.ops.box_iou_backward
    for wanted in WANTED:
        got = op(weights, boxes1.detach(), boxes2.detach(), 0, aligned, 0.0, *wanted)
        assert [list(each.shape) for each in got] == [
            list(boxes.shape) if want else [0] for boxes, want in zip((boxes1, boxes2), wanted, strict=True)
        ]


def test_no_second_derivative(device, kind):
    boxes1, boxes2 = (device.put(loose_boxes(3, seed)).requires_grad_() for seed in (0, 1))
    first = torch.autograd.grad(FUNCTIONS[kind](boxes1, boxes2).sum(), boxes1, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="^box_iou: .*second derivative"):
        first.square().sum().backward()


def test_opcheck(device):
    boxes1, boxes2 = device.put(loose_boxes(12)), device.put(loose_boxes(9, seed=1))
    weights = random_weights((12, 9), boxes1)
    for number in range(len(FUNCTIONS)):
        for wanted in WANTED:
            torch.library.opcheck(
                _library.ops.box_iou_backward, (weights, boxes1, boxes2, number, False, 1e-7, *wanted)
            )
        torch.library.opcheck(
            _library.ops.box_iou,
            (boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_(), number, False, 1e-7),
        )
    for wanted in WANTED:
        torch.library.opcheck(_library.ops.box_iou_backward, (weights[0], boxes1[:9], boxes2, 0, True, 1e-7, *wanted))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device, kind):
    def loss(boxes1, boxes2):
        return (1 - FUNCTIONS[kind](boxes1, boxes2)).square()

    torch._dynamo.reset()  # else the kinds count as recompilations of one function
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (5, 33):
        boxes1, boxes2 = device.put(loose_boxes(rows)), device.put(loose_boxes(17, seed=1))
        weights = random_weights((rows, 17), boxes1)
        for got, expected in zip(
            gradients(compiled, boxes1, boxes2, weights), gradients(loss, boxes1, boxes2, weights), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# The same bits every time.


@pytest.mark.parametrize("images", [1, 5])
def test_the_same_on_every_run_and_any_number_of_threads(restore_threads, device, kind, images):
    rows, columns = device.limit(1500, emulated=150), device.limit(300, emulated=70)
    boxes1 = device.put(loose_boxes(images * rows).reshape(images, rows, 4))
    boxes2 = device.put(loose_boxes(columns, seed=1))
    weights = random_weights((images, rows, columns), boxes1)
    aligned_weights = random_weights((images, columns), boxes1)
    results = []
    for threads in (1, 1, 2, 3, 8):
        torch.set_num_threads(threads)
        value = FUNCTIONS[kind](boxes1, boxes2)
        # The expansion of boxes2 to all images is summed up by torch.
        many = gradients(FUNCTIONS[kind], boxes1, boxes2.expand(images, -1, -1), weights)
        pairs = gradients(
            lambda *boxes: FUNCTIONS[kind](*boxes, aligned=True), boxes1[:, :columns], boxes2, aligned_weights
        )
        results.append((value, *many, pairs[0]))
    for other in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(other, results[0], strict=True))
