"""The focal losses: values against the formulas of reference/losses.py, gradients against finite differences."""

from functools import partial

import numpy as np
import pytest
import torch

import detops
from inputs import NAN, to_numpy, to_torch
from reference import losses as reference

NAMES = ("sigmoid", "sigmoid_by_class", "quality", "varifocal", "distribution")
REDUCTIONS = {"none": lambda losses: losses, "sum": torch.sum, "mean": torch.mean}


# Inputs. Blocks of 1024 losses on the CPU, of 2048 to 8192 logits or 128 rows on a GPU: sizes on both sides.


def logits(*shape, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def hard_targets(*shape, seed=0):
    return (np.random.default_rng(seed).random(shape) < 0.3).astype(np.float64)


def soft_targets(*shape, seed=0):
    """In [0, 1], many of them 0 or 1."""
    return np.clip(np.random.default_rng(seed).uniform(-0.7, 1.3, shape), 0, 1)


def classes(n, c, seed=0):
    """From -1, ignored, to c, background."""
    return np.random.default_rng(seed).integers(-1, c + 1, n)


def arguments(name, n, c=5, seed=0):
    """Arrays for n rows of c logits."""
    x, rng = logits(n, c, seed=seed), np.random.default_rng(seed)
    return {
        "sigmoid": lambda: (x, hard_targets(n, c, seed=seed)),
        "sigmoid_by_class": lambda: (x, classes(n, c, seed)),
        "quality": lambda: (x, classes(n, c, seed), rng.random(n)),
        "varifocal": lambda: (x, soft_targets(n, c, seed=seed)),
        "distribution": lambda: (x, rng.uniform(0, c - 1, n)),
    }[name]()


def function_of(name, module=detops.losses):
    return getattr(module, f"{name.removesuffix('_by_class')}_{'' if name == 'varifocal' else 'focal_'}loss")


def put(device, arrays, dtype=torch.float64):
    return tuple(device.put(array, dtype if np.issubdtype(array.dtype, np.floating) else None) for array in arrays)


# Errors relative to each loss. The factor |t - p|^2 of soft targets cancels in any precision.
RELATIVE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
ABSOLUTE = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-6}


def check(name, tensors, reduction="none", **options):
    """The losses of these tensors equal the reference's; returns them."""
    losses = function_of(name)(*tensors, reduction=reduction, **options)
    expected = function_of(name, reference)(*map(to_numpy, tensors), **options)
    dtype = tensors[0].dtype
    assert losses.dtype == dtype and losses.device == tensors[0].device and losses.is_contiguous()
    expected = REDUCTIONS[reduction](to_torch(expected, torch.float64))
    torch.testing.assert_close(
        losses.double().cpu(), expected, rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype], equal_nan=True
    )
    return losses


# Values.


def test_written_out_losses(device):
    # p = 1/2 everywhere: the cross-entropy is log 2, and (1 - p_t)^2 = 1/4.
    zeros, log2 = device.put(np.zeros((1, 2))), np.log(2)
    one = device.put([0])
    np.testing.assert_allclose(to_numpy(detops.sigmoid_focal_loss(zeros, one)), [[log2 / 16, log2 * 3 / 16]], rtol=1e-6)
    np.testing.assert_allclose(
        to_numpy(detops.quality_focal_loss(zeros, one, device.put([1.0]))), [[log2 / 4] * 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        to_numpy(detops.varifocal_loss(zeros, device.put([[0.5, 0.0]]))), [[log2 / 2, log2 * 3 / 16]], rtol=1e-6
    )
    np.testing.assert_allclose(to_numpy(detops.distribution_focal_loss(zeros, device.put([0.25]))), [log2], rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [1, 2, 25, 26, 31, 32, 33, 127, 128, 129, 409, 410, 1000, 3300])
@pytest.mark.parametrize("name", NAMES)
def test_sizes(device, name, n, reduction):
    check(name, put(device, arguments(name, device.limit(n, 1000))), reduction)


@pytest.mark.parametrize("c", [2, 3, 4, 8, 9, 16, 17, 33, 80, 1500])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_classes(device, name, c):
    for dtype in (torch.float16, torch.float32):
        check(name, put(device, arguments(name, 7, c), dtype))


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(device, name, boxes_dtype):
    tensors = put(device, arguments(name, 300), boxes_dtype)
    check(name, tensors)
    if name == "sigmoid_by_class":
        for dtype in (torch.int32, torch.int16, torch.int8):
            assert torch.equal(function_of(name)(tensors[0], tensors[1].to(dtype)), function_of(name)(*tensors))


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 1.5, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponents(device, dtype, exponent):
    for alpha in (-1, 0, 0.25, 1):
        for name in ("sigmoid", "sigmoid_by_class"):
            check(name, put(device, arguments(name, 100), dtype), alpha=alpha, gamma=exponent)
    check("sigmoid", put(device, (logits(100, 5), soft_targets(100, 5)), dtype), gamma=exponent)
    check("quality", put(device, arguments("quality", 100), dtype), beta=exponent)
    for alpha in (0, 0.75, 2):
        check("varifocal", put(device, arguments("varifocal", 100), dtype), alpha=alpha, gamma=exponent)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits(device, name, dtype):
    _, *others = put(device, arguments(name, 64, 8), dtype)
    values = [0, 1e-3, 1, 10, 20, 50, 87, 88, 100, 104, 1000, 1e30]
    x = device.put(np.random.default_rng(0).choice(values + [-v for v in values], (64, 8)), dtype)
    check(name, (x, *others))
    x.requires_grad_()
    function_of(name)(x, *others, reduction="sum").backward()
    assert x.grad.isfinite().all()


def test_logits_that_are_no_numbers(device):
    x = device.put([[NAN, 1.0, np.inf, -np.inf]])
    for losses in (
        detops.sigmoid_focal_loss(x, device.put([[1.0, 0, 1, 0]])),
        detops.sigmoid_focal_loss(x, device.put([2])),
        detops.quality_focal_loss(x, device.put([2]), device.put([0.5])),
        detops.varifocal_loss(x, device.put([[1.0, 0, 1, 0]])),
    ):
        assert losses[0, 0].isnan() and losses[0, 1].isfinite()
    assert detops.distribution_focal_loss(x, device.put([1.0])).isnan().all()
    assert detops.distribution_focal_loss(device.put([[0.0, -np.inf, 0.0]]), device.put([1.0])) == np.inf


def test_targets_that_are_no_numbers(device):
    x = device.put(logits(1, 4))
    assert detops.sigmoid_focal_loss(x, device.put([[NAN] * 4])).isnan().all()
    assert detops.varifocal_loss(x, device.put([[NAN] * 4])).isnan().all()
    assert detops.quality_focal_loss(x, device.put([2]), device.put([NAN])).isnan().tolist() == [
        [False, False, True, False]
    ]
    assert detops.distribution_focal_loss(x, device.put([NAN])).isnan().all()


@pytest.mark.parametrize("name", ["sigmoid_by_class", "quality"])
def test_ignored_rows_have_no_influence(device, name):
    x, labels, *scores = arguments(name, 60, 7)
    x[labels == -1] = NAN
    for score in scores:
        score[labels == -1] = NAN
    tensors = put(device, (x, labels, *scores))
    tensors[0].requires_grad_()
    losses = function_of(name)(*tensors)
    losses.sum().backward()
    ignored = tensors[1] == -1
    assert (losses[ignored] == 0).all() and (tensors[0].grad[ignored] == 0).all()
    assert (losses[~ignored] > 0).all() and (tensors[0].grad[~ignored] != 0).all()
    (gradient,) = torch.autograd.grad(function_of(name)(*tensors, reduction="sum") * np.inf, tensors[0])
    assert (gradient[ignored] == 0).all()
    kept = [tensor[~ignored] for tensor in tensors]
    for reduction, share in (("sum", 1.0), ("mean", len(kept[0]) / len(x))):
        torch.testing.assert_close(
            function_of(name)(*tensors, reduction=reduction), function_of(name)(*kept, reduction=reduction) * share
        )


def test_class_targets_equal_one_hot(device):
    x, labels = put(device, arguments("sigmoid_by_class", 200, 11), torch.float32)
    labels = labels.clamp(min=0)
    one_hot = torch.nn.functional.one_hot(labels, 12)[:, :11].float()
    assert torch.equal(detops.sigmoid_focal_loss(x, labels), detops.sigmoid_focal_loss(x, one_hot))


def test_distribution_targets_on_the_bins(device):
    x = device.put(logits(9, 9), torch.float64)
    on_bins = torch.arange(9.0, device=device.torch, dtype=torch.float64)
    losses = detops.distribution_focal_loss(x, on_bins)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(x, on_bins.long(), reduction="none"))


@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_and_strides(device, name):
    x, *others = put(device, arguments(name, 24, 6), torch.float32)
    function = function_of(name)
    expected = function(x, *others)
    assert torch.equal(function(x.t().contiguous().t(), *others), expected)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (x, *others)]
    assert not any(t.is_contiguous() for t in apart) and torch.equal(function(*apart), expected)
    shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (x, *others)]  # not aligned
    assert torch.equal(function(*shifted), expected)
    folded = [t.reshape(2, 3, 4, *t.shape[1:]) for t in (x, *others)]
    assert torch.equal(function(*folded), expected.reshape(2, 3, 4, *expected.shape[1:]))
    first_row = [t[0] for t in (x, *others)]
    assert torch.equal(function(*first_row), expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(device, name, reduction):
    x, *others = put(device, arguments(name, 0))
    x.requires_grad_()
    losses = function_of(name)(x, *others, reduction=reduction)
    unreduced = x.shape[:-1] if name == "distribution" else x.shape
    assert losses.sum() == 0 and losses.shape == (unreduced if reduction == "none" else ())
    losses.sum().backward()
    assert x.grad.shape == x.shape


def test_no_classes(device):
    for reduction in REDUCTIONS:
        losses = detops.sigmoid_focal_loss(device.put(np.zeros((3, 0))), device.put([0, -1, 0]), reduction=reduction)
        assert losses.sum() == 0 and losses.shape == ((3, 0) if reduction == "none" else ())


def test_a_single_logit(device):
    assert detops.sigmoid_focal_loss(device.put(0.0), device.put(1.0)).item() == pytest.approx(np.log(2) / 16)


def test_different_dtypes_are_promoted(device):
    x, t = put(device, arguments("varifocal", 30), torch.float32)
    half = x.half()
    for function in (detops.sigmoid_focal_loss, detops.varifocal_loss):
        assert torch.equal(function(half, t), function(half.float(), t))
        assert function(x, t.double()).dtype == torch.float64
    x, labels, scores = put(device, arguments("quality", 30), torch.float32)
    losses = detops.quality_focal_loss(x.half(), labels, scores)
    assert losses.dtype == torch.float16
    assert torch.equal(losses, detops.quality_focal_loss(x.half().float(), labels, scores).half())


# Gradients.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(device, name, exponent, reduction):
    if name == "distribution" and exponent != 2:
        pytest.skip("it has no exponent")
    x, *others = put(device, arguments(name, 6, 4))
    option = {"quality": "beta", "distribution": None}.get(name, "gamma")
    function = partial(function_of(name), reduction=reduction, **({option: exponent} if option else {}))
    assert torch.autograd.gradcheck(lambda x: function(x, *others), x.requires_grad_())


def test_gradcheck_of_soft_targets(device):
    x, t = put(device, (logits(6, 4), soft_targets(6, 4)))
    for gamma in (0, 1.5, 2):
        assert torch.autograd.gradcheck(lambda x, g=gamma: detops.sigmoid_focal_loss(x, t, 0.3, g), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "weighted", "mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_float64(device, name, reduction, dtype):
    x, *others = put(device, arguments(name, 250), dtype)
    got = {}
    for wide in (torch.float64, dtype):
        copies = [t.detach().to(wide) if t.is_floating_point() else t for t in (x, *others)]
        copies[0].requires_grad_()
        losses = function_of(name)(*copies, reduction=reduction.replace("weighted", "none"))
        weights = torch.linspace(-1, 1, losses.numel(), device=x.device).to(dtype).to(wide).reshape(losses.shape)
        (losses * weights if reduction == "weighted" else losses).sum().backward()
        got[wide] = copies[0].grad
    assert got[dtype].dtype == dtype
    scale = got[torch.float64].abs().max().item()
    atol = max(scale * max(3e-7, ABSOLUTE[dtype]), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    torch.testing.assert_close(got[dtype].double(), got[torch.float64], rtol=RELATIVE[dtype], atol=atol)


def test_no_second_derivative(device):
    x, t = put(device, arguments("varifocal", 3))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(detops.varifocal_loss(x, t, reduction="sum"), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
        grad.sum().backward()
