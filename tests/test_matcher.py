"""Matcher: equal to its definition in reference/matching.py, and to torchvision's."""

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import matching as reference

THRESHOLDS = ((0.7, 0.3), (0.5, 0.5), (0.5, 0.0), (0.25, -1.0))


def check(quality, high, low, low_quality):
    found = detops.Matcher(high, low, low_quality)(quality)
    assert found.dtype == torch.int64 and found.device == quality.device
    # Thresholds in the dtype of the matrix.
    high, low = torch.tensor([high, low], dtype=quality.dtype).tolist()
    expected = reference.Matcher(to_numpy(quality), high, low, low_quality)
    np.testing.assert_array_equal(to_numpy(found), expected)


def matrix(rows, columns, seed=0):
    """Ties in rows and columns, and values on the thresholds."""
    return np.random.default_rng(seed).integers(0, 21, (rows, columns)) / 20


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_flushed_subnormal_numbers(device):
    # torch flushes them on the calling thread alone: as few columns as one thread takes, and many.
    for columns in (3, 100_000):
        quality = device.put(np.random.default_rng(0).integers(0, 5, (4, columns)) * 1e-40)
        torch.set_flush_denormal(True)
        try:
            found = detops.Matcher(0.5, 0.3, True)(quality)
        finally:
            torch.set_flush_denormal(False)
        expected = reference.Matcher(to_numpy(quality), 0.5, 0.3, True)
        np.testing.assert_array_equal(to_numpy(found), expected)


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 255, 257, 1100])
def test_sizes(device, rows, columns):
    quality = device.put(matrix(rows, device.limit(columns, emulated=600)))
    for high, low in THRESHOLDS:
        for low_quality in (False, True):
            check(quality, high, low, low_quality)


def test_dtypes(device, boxes_dtype):
    quality = device.put(matrix(9, 300), boxes_dtype)
    for low_quality in (False, True):
        check(quality, 0.7, 0.3, low_quality)
        check(quality.t().contiguous().t()[::2, 1::3], 0.7, 0.3, low_quality)


def test_odd_qualities(device):
    rng = np.random.default_rng(0)
    for values in ([np.nan, 0.0, 0.5, 1.0], [-3.0, -2.0, -1.0, 0.0, np.nan], [-3.0, -2.0, -1.0]):
        quality = device.put(rng.choice(values, (6, 200)))
        for high, low in ((0.5, 0.5), (0.0, -2.0), (-1.0, -1.0)):
            check(quality, high, low, True)
            check(quality, high, low, False)


def test_equals_match_max_iou(device):
    anchors = device.put(np.concatenate([inputs.grid_boxes(150), inputs.edge_boxes("everything")]))
    boxes = device.put(inputs.grid_boxes(12, seed=1))
    for low_quality in (False, True):
        matches = detops.match_max_iou(
            *(anchors, boxes[None]), high_threshold=0.6, low_threshold=0.2, allow_low_quality_matches=low_quality
        )
        quality = detops.box_iou(boxes, anchors)
        assert torch.equal(detops.Matcher(0.6, 0.2, low_quality)(quality), matches.indices[0])


@pytest.mark.parity
@pytest.mark.parametrize("low_quality", [False, True])
def test_equals_torchvision(torchvision, device, low_quality):
    utils = torchvision.models.detection._utils
    for high, low in THRESHOLDS:
        quality = to_torch(matrix(20, device.limit(5000, emulated=500)))
        found = detops.Matcher(high, low, low_quality)(quality.to(device.torch))
        assert torch.equal(found.cpu(), utils.Matcher(high, low, low_quality)(quality))
    for name in ("BELOW_LOW_THRESHOLD", "BETWEEN_THRESHOLDS"):
        assert getattr(detops.Matcher, name) == getattr(utils.Matcher, name)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_bad_shapes(device, shape):
    with pytest.raises(RuntimeError, match=r"^Matcher: match_quality_matrix must have shape \[M, N\], got "):
        detops.Matcher(0.7, 0.3)(torch.zeros(shape, device=device.torch))


def test_bad_arguments(device):
    with pytest.raises(RuntimeError, match="^Matcher: match_quality_matrix must be float16, .*, got int64$"):
        detops.Matcher(0.7, 0.3)(torch.zeros(2, 3, dtype=torch.int64, device=device.torch))
    with pytest.raises(ValueError, match="^Matcher: high_threshold must be at least low_threshold, got 0.3 and 0.7$"):
        detops.Matcher(0.3, 0.7)


def test_opcheck(device):
    for shape in ((5, 40), (0, 40), (5, 0)):
        torch.library.opcheck(_library.ops.matcher, (torch.rand(shape, device=device.torch), 0.7, 0.3, True))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    matcher = detops.Matcher(0.7, 0.3, True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda quality: matcher(quality) + 1, fullgraph=True)
    for rows in (5, 9):
        quality = device.put(matrix(rows, 70))
        assert torch.equal(compiled(quality), matcher(quality) + 1)


def test_export():
    class Match(torch.nn.Module):
        def forward(self, quality):
            return detops.Matcher(0.7, 0.3, True)(quality)

    shapes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("columns")},)
    program = torch.export.export(Match(), (torch.rand(5, 40),), dynamic_shapes=shapes)
    quality = to_torch(matrix(9, 99))
    assert torch.equal(program.module()(quality), Match()(quality))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    quality = device.put(matrix(9, 300))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        detops.Matcher(0.7, 0.3, True)(quality)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_thresholds_in_a_list():
    with pytest.raises(ValueError, match=r"^Matcher: high_threshold must be a number, got \[0.3, 0.7\]$"):
        detops.Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
