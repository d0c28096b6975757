"""decode_dfl: equal to the loops in reference/coders.py, gradients equal to finite differences."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import NAN, to_numpy, to_torch
from reference import coders as reference

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def logits_of(*shape, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def check(logits, dim=-1):
    distances = detops.decode_dfl(logits, dim)
    assert distances.dtype == logits.dtype and distances.device == logits.device and distances.is_contiguous()
    expected = reference.decode_dfl(to_numpy(logits).astype(np.float64), dim)
    tolerance = TOLERANCES[logits.dtype]
    absolute = TOLERANCES[torch.float64 if logits.dtype == torch.float64 else torch.float32] * logits.shape[dim]
    expected = to_torch(expected, torch.float64)
    torch.testing.assert_close(distances.double().cpu(), expected, rtol=tolerance, atol=absolute)
    return distances


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 63, 65, 257, 1000])
def test_rows(device, rows):
    rows = device.limit(rows, 260)
    check(device.put(logits_of(rows, 16)))
    check(device.put(logits_of(4, 16, rows)), 1)
    check(device.put(logits_of(rows, 5, 3)), 1)


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 8, 9, 16, 17, 33, 100])
def test_bins(device, bins):
    check(device.put(logits_of(11, bins)))
    check(device.put(logits_of(bins, 11)), 0)


def test_dtypes(device, boxes_dtype):
    check(device.put(logits_of(40, 16), boxes_dtype))
    check(device.put(logits_of(2, 16, 40), boxes_dtype), 1)


def test_dimensions(device):
    logits = device.put(logits_of(2, 3, 4, 5))
    for dim in range(-4, 4):
        distances = check(logits, dim)
        moved = detops.decode_dfl(logits.movedim(dim, -1).contiguous())
        torch.testing.assert_close(distances, moved, rtol=1e-6, atol=1e-6)
    assert check(device.put(logits_of(7))).shape == ()


def test_strides(device):
    logits = device.put(logits_of(6, 8, 10))
    for each in (logits.transpose(0, 2), logits[:, ::2], logits[:, :, 1:], logits[:1].expand(3, 8, 10)):
        for dim in (0, 1, 2):
            assert torch.equal(check(each, dim), detops.decode_dfl(each.contiguous(), dim))


def test_written_out(device):
    peak = torch.full((5, 16), -1e4)
    peak[torch.arange(5), torch.tensor([0, 3, 7, 14, 15])] = 0
    assert detops.decode_dfl(peak.to(device.torch)).tolist() == [0, 3, 7, 14, 15]
    for bins in (2, 16):
        uniform = device.put(np.zeros((3, bins)))
        assert detops.decode_dfl(uniform).tolist() == [(bins - 1) / 2] * 3


def test_large_and_odd_logits(device):
    huge = device.put([[3e38, -3e38, 3e38], [-3e38] * 3, [-np.inf, 0.0, 0.0], [1000.0, 1000.0, 0.0]])
    assert detops.decode_dfl(huge).tolist() == [1, 1, 1.5, 0.5]
    odd = device.put([[NAN, 0, 0], [0, NAN, 0], [0, 0, NAN], [np.inf, 0, 0], [-np.inf] * 3])
    assert detops.decode_dfl(odd).isnan().all() and detops.decode_dfl(odd.t().contiguous(), 0).isnan().all()
    among = device.put(np.where(np.arange(40)[:, None] == 7, NAN, logits_of(40, 16)))
    assert detops.decode_dfl(among).isnan().nonzero().flatten().tolist() == [7]


def test_many_rows_on_many_threads():
    logits = to_torch(logits_of(2, 4, 16, 3000))
    parts = [detops.decode_dfl(part, 1) for image in logits for part in image.split(1)]
    assert torch.equal(detops.decode_dfl(logits, 2), torch.cat(parts).view(2, 4, 3000))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradients(device, dim):
    logits = device.put(logits_of(3, 4, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: detops.decode_dfl(x, dim), logits)


def test_gradients_of_dtypes(device, boxes_dtype):
    arrays = logits_of(70, 16)
    weights = logits_of(70, seed=1)
    for layout in (-1, 0):
        grads = []
        for dtype in (boxes_dtype, torch.float64):
            logits = device.put(arrays if layout else np.ascontiguousarray(arrays.T), boxes_dtype)
            logits = logits.to(dtype, copy=True).requires_grad_()
            (detops.decode_dfl(logits, layout) * device.put(weights, dtype)).sum().backward()
            assert logits.grad.dtype == dtype
            grads.append(logits.grad.double())
        tolerance = {torch.float64: 0, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[boxes_dtype]
        torch.testing.assert_close(*grads, rtol=tolerance, atol=10 * tolerance)


def test_gradient_of_nothing(device):
    logits = device.put(logits_of(0, 16)).requires_grad_()
    detops.decode_dfl(logits).sum().backward()
    assert logits.grad.shape == (0, 16)


def test_no_second_derivative():
    logits = to_torch(logits_of(3, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(detops.decode_dfl(logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
        grad.sum().backward()


def test_bad_input(device):
    logits = device.put(logits_of(3, 4))
    for dim in (2, -3):
        with pytest.raises(RuntimeError, match=rf"^decode_dfl: dim must be a dimension of logits \[3, 4\], got {dim}"):
            detops.decode_dfl(logits, dim)
    with pytest.raises(RuntimeError, match=r"^decode_dfl: logits must have at least 1 bin, got shape \[3, 0\]"):
        detops.decode_dfl(logits[:, :0])
    with pytest.raises(RuntimeError, match="^decode_dfl: logits must be float16, .*, got int64"):
        detops.decode_dfl(logits.long())
    with pytest.raises(RuntimeError, match="^decode_dfl: grad must have the shape of the distances, got "):
        _library.ops.decode_dfl_backward(logits, logits, 1)
    with pytest.raises(RuntimeError, match="^decode_dfl: grad must be float32, got float64"):
        _library.ops.decode_dfl_backward(logits[:, 0].double(), logits, 1)


def test_opcheck(device):
    for dim in (0, 1, -1):
        logits = device.put(logits_of(3, 4, 5)).requires_grad_()
        torch.library.opcheck(_library.ops.decode_dfl, (logits, dim))
        grad = detops.decode_dfl(logits, dim).detach()
        torch.library.opcheck(_library.ops.decode_dfl_backward, (grad, logits.detach(), dim))


@pytest.mark.needs_compiler
def test_compile():
    logits = to_torch(logits_of(2, 4, 16, 20)).requires_grad_()
    results = []
    for function in (detops.decode_dfl, torch.compile(detops.decode_dfl, fullgraph=True)):
        distances = function(logits, 2)
        results.append((distances, *torch.autograd.grad(distances.square().sum(), logits)))
    torch.testing.assert_close(*results)


def test_export():
    class Decode(torch.nn.Module):
        def forward(self, logits):
            return detops.decode_dfl(logits, 2)

    shapes = ({0: torch.export.Dim("images"), 3: torch.export.Dim("points")},)
    exported = torch.export.export(Decode(), (to_torch(logits_of(2, 4, 16, 20)),), dynamic_shapes=shapes).module()
    logits = to_torch(logits_of(3, 4, 16, 31))
    assert torch.equal(exported(logits), detops.decode_dfl(logits, 2))
