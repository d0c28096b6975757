"""yolo_loss: equal to the formula in reference/yolo_grid.py, with its gradient."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_numpy
from reference import yolo_grid as reference

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def grid_of(shape, classes, seed=0):
    """(predictions, targets): objects in a third of the places, sizes of both signs and 0 among the predictions."""
    rng = np.random.default_rng(seed)
    predictions = rng.normal(0.3, 0.6, (*shape, 5 + classes))
    predictions[..., 3:5] *= rng.random((*shape, 2)) < 0.9
    targets = rng.uniform(0, 1, predictions.shape)
    targets[..., 0] = rng.random(shape) < 1 / 3
    return predictions, targets * targets[..., :1]


@pytest.mark.parametrize("rows", (0, 1, 31, 255, 257, 1023, 1025, 2500))
@pytest.mark.parametrize("classes", (0, 1, 20))
def test_values(device, rows, classes):
    predictions, targets = map(device.put, grid_of((device.limit(rows, emulated=1025),), classes))
    expected = reference.yolo_loss(to_numpy(predictions), to_numpy(targets))
    losses = detops.yolo_loss(predictions, targets, reduction="none")
    assert losses.dtype == torch.float32 and losses.shape == expected.shape
    np.testing.assert_allclose(to_numpy(losses), expected, rtol=1e-5, atol=1e-6)
    total = detops.yolo_loss(predictions, targets)
    assert total.shape == () and total.dtype == torch.float32
    np.testing.assert_allclose(to_numpy(total), to_numpy(losses).astype(float).sum(), rtol=1e-6)
    mean = detops.yolo_loss(predictions, targets, reduction="mean")
    np.testing.assert_allclose(to_numpy(mean), to_numpy(losses).astype(float).mean() if rows else 0, rtol=1e-6)


def test_shapes_dtypes_and_weights(device, scores_dtype):
    predictions, targets = (device.put(each, scores_dtype) for each in grid_of((2, 3, 4, 5), 3))
    for coord, noobj in ((5.0, 0.5), (0.0, 1.0), (1.0, 0.0)):
        options = {"lambda_coord": coord, "lambda_noobj": noobj}
        losses = detops.yolo_loss(predictions, targets, reduction="none", **options)
        expected = reference.yolo_loss(to_numpy(predictions), to_numpy(targets), coord, noobj)
        assert losses.dtype == scores_dtype and losses.shape == (2, 3, 4, 5)
        np.testing.assert_allclose(
            to_numpy(losses), expected, rtol=TOLERANCE[scores_dtype], atol=TOLERANCE[scores_dtype]
        )
    same = detops.yolo_loss(targets, targets)
    assert same == 0


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_gradient(device, reduction):
    predictions, targets = (device.put(each, torch.float64) for each in grid_of((3, 7), 2))
    predictions[..., 3:5] += 0.05 * (predictions[..., 3:5] >= 0) - 0.02  # away from the steep part at 0
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: detops.yolo_loss(p, targets, reduction=reduction), predictions)


def test_gradient_is_finite_where_a_size_is_zero(device):
    predictions, targets = map(device.put, grid_of((40,), 2))
    predictions[:, 3:5] = 0
    predictions.requires_grad_()
    detops.yolo_loss(predictions, targets).backward()
    assert predictions.grad.isfinite().all()
    background = targets[:, 0] == 0
    assert (predictions.grad[background, 1:] == 0).all() and predictions.grad[background, 0].any()


def test_gradient_in_half_precision(device, scores_dtype):
    predictions, targets = grid_of((40,), 3)
    ours = device.put(predictions, scores_dtype).requires_grad_()
    detops.yolo_loss(ours, device.put(targets)).backward()
    assert ours.grad.dtype == scores_dtype
    wide = ours.detach().double().cpu().requires_grad_()
    with _library.use_namespace("detops"):
        detops.yolo_loss(wide, device.put(targets).double().cpu()).backward()
    tolerance = TOLERANCE[scores_dtype]
    np.testing.assert_allclose(to_numpy(ours.grad), wide.grad.numpy(), rtol=10 * tolerance, atol=10 * tolerance)


def test_inputs_of_any_strides(device):
    predictions, targets = map(device.put, grid_of((6, 8), 3))
    expected = detops.yolo_loss(predictions, targets, reduction="none")
    strided = predictions.permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    losses = detops.yolo_loss(strided, targets.transpose(0, 1).contiguous().transpose(0, 1), reduction="none")
    assert torch.equal(losses, expected)
    plain = predictions.clone().requires_grad_()
    detops.yolo_loss(plain, targets, reduction="none").square().sum().backward()
    losses.square().sum().backward()
    assert torch.equal(strided.grad, plain.grad)


def test_autocast(device):
    predictions, targets = map(device.put, grid_of((6,), 3))
    with torch.autocast(device.torch, dtype=torch.bfloat16):
        assert detops.yolo_loss(predictions.bfloat16(), targets).dtype == torch.float32


def test_every_run_and_any_number_of_threads_give_the_same(device, restore_threads):
    predictions, targets = map(device.put, grid_of((device.limit(20_000, emulated=1500),), 3))
    first = detops.yolo_loss(predictions, targets)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(detops.yolo_loss(predictions, targets), first)


def test_errors(device):
    predictions, targets = map(device.put, grid_of((6,), 3))
    with pytest.raises(RuntimeError, match=r"^yolo_loss: predictions must have shape \[..., 5 \+ C\], got \[6, 4\]$"):
        detops.yolo_loss(predictions[:, :4], targets[:, :4])
    with pytest.raises(
        RuntimeError, match=r"^yolo_loss: targets must have shape \[6, 8\] as predictions, got \[5, 8\]$"
    ):
        detops.yolo_loss(predictions, targets[:5])
    with pytest.raises(RuntimeError, match="^yolo_loss: targets must not require a gradient"):
        detops.yolo_loss(predictions, targets.requires_grad_())
    with pytest.raises(ValueError, match="^yolo_loss: lambda_coord must be at least 0 and finite in float32, got -1$"):
        detops.yolo_loss(predictions, targets, lambda_coord=-1)
    with pytest.raises(ValueError, match="^yolo_loss: lambda_noobj must be at least 0 and finite in float32, got nan$"):
        detops.yolo_loss(predictions, targets, lambda_noobj=float("nan"))
    with pytest.raises(ValueError, match="^Invalid reduction: yolo_loss: reduction must be 'none', 'mean' or 'sum'"):
        detops.yolo_loss(predictions, targets, reduction="all")


def test_no_second_derivative(device):
    predictions, targets = map(device.put, grid_of((6,), 3))
    predictions.requires_grad_()
    (slope,) = torch.autograd.grad(detops.yolo_loss(predictions, targets), predictions, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
        slope.sum().backward()


def test_opcheck(device):
    predictions, targets = map(device.put, grid_of((6,), 3))
    predictions.requires_grad_()
    for reduction in range(3):
        torch.library.opcheck(_library.ops.yolo_loss, (predictions, targets, 5.0, 0.5, reduction))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    compiled = torch.compile(lambda p, t: detops.yolo_loss(p * 2, t), fullgraph=True)
    for rows in (6, 11):
        predictions, targets = map(device.put, grid_of((rows,), 3))
        predictions.requires_grad_()
        loss = compiled(predictions, targets)
        (slope,) = torch.autograd.grad(loss, predictions)
        (expected,) = torch.autograd.grad(detops.yolo_loss(predictions * 2, targets), predictions)
        assert torch.allclose(slope, expected, rtol=1e-6)
