"""The focal losses: errors, how they get on with the rest of PyTorch, and that they are the same on every run."""

import doctest
from functools import partial

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import NAN, to_torch
from test_losses import NAMES, REDUCTIONS, arguments, function_of, logits, put

# Errors.


X, T, LABELS, SCORES = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
SIGMOID, QUALITY = "sigmoid_focal_loss", "quality_focal_loss"
VARIFOCAL, DISTRIBUTION = "varifocal_loss", "distribution_focal_loss"


@pytest.mark.parametrize(
    ("name", "tensors", "options", "message"),
    [
        (
            SIGMOID,
            (X, T),
            {"alpha": 1.5},
            "Invalid alpha value: sigmoid_focal_loss: alpha must be from 0 to 1, or -1 .* 1.5",
        ),
        (SIGMOID, (X, T), {"alpha": NAN}, "Invalid alpha value"),
        (SIGMOID, (X, T), {"gamma": -1}, "sigmoid_focal_loss: gamma must be at least 0 and finite in float32, got -1"),
        (
            SIGMOID,
            (X, T),
            {"reduction": "max"},
            "Invalid reduction: sigmoid_focal_loss: reduction must be .* got 'max'",
        ),
        (
            QUALITY,
            (X, LABELS, SCORES),
            {"beta": NAN},
            "quality_focal_loss: beta must be at least 0 and finite in float32, got nan",
        ),
        (QUALITY, (X, LABELS, SCORES), {"reduction": ""}, "Invalid"),
        (VARIFOCAL, (X, T), {"alpha": -1}, "varifocal_loss: alpha must be at least 0 and finite in float32, got -1"),
        (
            VARIFOCAL,
            (X, T),
            {"gamma": float("inf")},
            "varifocal_loss: gamma must be at least 0 and finite in float32, got inf",
        ),
        (VARIFOCAL, (X, T), {"reduction": None}, "Invalid"),
        (DISTRIBUTION, (X, SCORES), {"reduction": "xyz"}, "Invalid"),
    ],
)
def test_bad_options(device, name, tensors, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(detops.losses, name)(*(t.to(device.torch) for t in tensors), **options)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (SIGMOID, (X.int(), T), "inputs must be float16, bfloat16, float32 or float64, got int32"),
        (SIGMOID, (X, T[0]), r"targets must have shape \[3, 5\] as inputs, got \[5\]"),
        (SIGMOID, (X, T.long()), r"targets must have shape \[3\] as inputs without the last dimension, got \[3, 5\]"),
        (SIGMOID, (X[0, 0], LABELS[0]), r"inputs must have shape \[..., C\] for class targets, got \[\]"),
        (
            SIGMOID,
            (X, T.clone().requires_grad_()),
            "targets must not require a gradient, got requires_grad=True; detach it",
        ),
        (QUALITY, (X, T, SCORES), "targets must be an integer tensor, got float32"),
        (QUALITY, (X, LABELS, LABELS), "scores must be float16, bfloat16, float32 or float64, got int64"),
        (QUALITY, (X, LABELS, SCORES[:2]), r"scores must have shape \[3\] as targets, got \[2\]"),
        (QUALITY, (X, LABELS, SCORES.clone().requires_grad_()), "scores must not require a gradient"),
        (VARIFOCAL, (X, LABELS), "targets must be float16, bfloat16, float32 or float64, got int64"),
        (VARIFOCAL, (X, T[:2]), r"targets must have shape \[3, 5\] as inputs, got \[2, 5\]"),
        (DISTRIBUTION, (X.int(), SCORES), "inputs must be float16, bfloat16, float32 or float64, got int32"),
        (DISTRIBUTION, (X, LABELS), "targets must be float16, bfloat16, float32 or float64, got int64"),
        (DISTRIBUTION, (X[:, :1], SCORES), r"inputs must have shape \[..., bins\] with at least 2 bins, got \[3, 1\]"),
        (
            DISTRIBUTION,
            (X, SCORES[:2]),
            r"targets must have shape \[3\] as inputs without the last dimension, got \[2\]",
        ),
    ],
)
def test_bad_tensors(device, name, tensors, message):
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        getattr(detops.losses, name)(*(t.to(device.torch) for t in tensors))


def test_targets_out_of_range(device):
    """The CPU refuses them; a GPU gives such rows loss and gradient 0."""
    x = device.put(logits(2, 5)).requires_grad_()
    by_class, quality, distribution = (
        partial(detops.sigmoid_focal_loss, x),
        lambda labels: detops.quality_focal_loss(x, labels, device.put([0.5, 0.5])),
        partial(detops.distribution_focal_loss, x),
    )
    for function, targets, message in (
        (by_class, [0, 6], "sigmoid_focal_loss: targets must be from -1 to 5 .* got 6"),
        (by_class, [0, -2], "sigmoid_focal_loss: .* got -2"),
        (quality, [0, 6], "quality_focal_loss: .* got 6"),
        (distribution, [0, 4.25], "distribution_focal_loss: targets must be from 0 to 4, got 4.25"),
        (distribution, [0, -0.5], "distribution_focal_loss: .* got -0.5"),
        (distribution, [0, np.inf], "distribution_focal_loss: .* got inf"),
    ):
        call = partial(function, device.put(targets))
        if device.name == "cpu":
            with pytest.raises(RuntimeError, match=f"^{message}"):
                call()
            continue
        losses, x.grad = call(), None
        losses.sum().backward()
        assert (losses[1] == 0).all() and (x.grad[1] == 0).all()
        assert (losses[0] > 0).all() and (x.grad[0] != 0).any()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    for name in NAMES:
        x, *others = put(device, arguments(name, 3))
        with pytest.raises(RuntimeError, match="targets must be on the device of inputs"):
            function_of(name)(x, *(t.cpu() for t in others))


def test_examples_of_the_docstrings():
    results = doctest.testmod(detops.losses, extraglobs={"torch": torch})
    assert results.attempted >= 18 and results.failed == 0


# A PyTorch citizen.


def loss_op(tensors, name, reduction=0):
    """(op, its arguments) of the compiled library."""
    if name == "distribution":
        return _library.ops.distribution_focal_loss, (*tensors, reduction)
    kind = ("sigmoid", "quality", "varifocal").index(name.removesuffix("_by_class"))
    scores = tensors[2] if name == "quality" else None
    return _library.ops.focal_loss, (*tensors[:2], scores, kind, 0.25, 2.0, reduction)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_float32(device, name):
    x, *others = put(device, arguments(name, 50), torch.bfloat16)
    expected = function_of(name)(x.float(), *others)
    x.requires_grad_()
    with torch.autocast(device.torch, torch.bfloat16):
        losses = function_of(name)(x, *others)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    losses.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and (x.grad != 0).any()


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name, reduction):
    """Of detops.focal_loss and detops.distribution_focal_loss and their gradients."""
    x, *others = put(device, arguments(name, 6), torch.float32)
    op, inputs = loss_op((x.requires_grad_(), *others), name, reduction)
    torch.library.opcheck(op, inputs)
    x = x.detach()
    backward = getattr(
        _library.ops, "focal_loss_backward" if name != "distribution" else "distribution_focal_loss_backward"
    )
    torch.library.opcheck(backward, (op(x, *inputs[1:]), x, *inputs[1:]))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device, name):
    def total(x, *others):
        return function_of(name)(x * 2, *others, reduction="mean") + function_of(name)(x, *others).sum()

    torch.compiler.reset()  # all names share the code of `total`, and so its limit of recompilations
    compiled = torch.compile(total, fullgraph=True)
    for n in (20, 30):
        x, *others = put(device, arguments(name, n))
        grads = []
        for run in (compiled, total):
            x = x.detach().requires_grad_()
            run(x, *others).backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", NAMES)
def test_export_with_any_number_of_rows(name):
    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return function_of(name)(*tensors, reduction="sum")

    inputs = [to_torch(array) for array in arguments(name, 20)]
    rows = {0: torch.export.Dim("n", min=2)}
    program = torch.export.export(Loss(), tuple(inputs), dynamic_shapes=(tuple(rows for _ in inputs),))
    others = [to_torch(array) for array in arguments(name, 30, seed=1)]
    assert torch.equal(program.module()(*others), function_of(name)(*others, reduction="sum"))


# The same on every run.


def losses_and_gradients(name, tensors):
    results = []
    for reduction in REDUCTIONS:
        x = tensors[0].detach().requires_grad_()
        losses = function_of(name)(x, *tensors[1:], reduction=reduction)
        losses.sum().backward()
        results += [losses.detach(), x.grad]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads_gives_the_same_bits(restore_threads, name):
    tensors = [to_torch(array) for array in arguments(name, 20_001, 13)]
    results = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results[threads] = losses_and_gradients(name, tensors)
    for threads in (2, 3, 8):
        assert all(map(torch.equal, results[1], results[threads]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_on_every_run(device, name):
    tensors = put(device, arguments(name, device.limit(20_001, 500), 13), torch.float32)
    first = losses_and_gradients(name, tensors)
    assert all(map(torch.equal, first, losses_and_gradients(name, tensors)))
