"""assign_atss: equal to its definition in reference/matching.py."""

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import matching as reference


def check(anchors, level_sizes, gt_boxes, gt_valid=None, topk=9):
    found = detops.assign_atss(anchors, level_sizes, gt_boxes, gt_valid, topk=topk)
    assert found.indices.dtype == torch.int64 and found.indices.device == found.ious.device == anchors.device
    rows, boxes = to_numpy(anchors), to_numpy(gt_boxes)
    valid = np.ones(boxes.shape[:2], bool) if gt_valid is None else to_numpy(gt_valid)
    for image in range(len(boxes)):
        own = rows if rows.ndim == 2 else rows[image]
        indices, ious = reference.assign_atss(own, level_sizes, boxes[image], valid[image], topk)
        np.testing.assert_array_equal(to_numpy(found.indices)[image], indices)
        np.testing.assert_array_equal(to_numpy(found.ious)[image], ious)
    return found


def pyramid(size=64, strides=(8, 16, 32), scale=4):
    """(anchors, level sizes): one square anchor at each place."""
    levels = []
    for stride in strides:
        at = np.arange(0, size, stride) + stride / 2
        centres = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
        levels.append(np.concatenate([centres - scale * stride / 2, centres + scale * stride / 2], 1))
    return np.concatenate(levels), [len(level) for level in levels]


def masked(shape, share=0.7, seed=0):
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize("gts", [0, 1, 3, 20])
@pytest.mark.parametrize("topk", [1, 2, 9, 1000])
def test_pyramid(device, gts, topk):
    anchors, sizes = pyramid()
    boxes = inputs.uniform_boxes(2 * gts, extent=64, size=40).reshape(2, gts, 4)
    valid = masked((2, gts))
    for dtype in (torch.float32, torch.float64):
        found = check(device.put(anchors, dtype), sizes, device.put(boxes, dtype), device.put(valid), topk)
    assert topk != 9 or gts < 3 or (found.indices >= 0).any()


@pytest.mark.parametrize("sizes", [[1], [2], [63], [64], [65], [129], [0, 1, 0], [5, 0, 127, 128], [1] * 32])
def test_levels(device, sizes):
    anchors = device.put(inputs.uniform_boxes(sum(sizes), extent=100))
    check(anchors, sizes, device.put(inputs.uniform_boxes(12, seed=1, extent=100).reshape(2, 6, 4)))


def test_ties(device):
    # Equal distances, equal IoUs, anchors between boxes.
    anchors, sizes = pyramid(32, (8, 16), 2)
    boxes = np.array([[[0, 0, 32, 32], [0, 0, 16, 16], [16, 16, 32, 32], [0, 0, 16, 16], [8, 8, 24, 24]]])
    check(device.put(np.concatenate([anchors, anchors])), sizes * 2, device.put(boxes))
    for seed in range(3):
        rows = inputs.grid_boxes(100, seed, cells=5)
        check(device.put(rows), [60, 40], device.put(inputs.grid_boxes(16, seed + 9, cells=5).reshape(2, 8, 4)), topk=4)


@pytest.mark.parametrize("layout", inputs.KINDS)
def test_kinds_of_boxes(device, layout):
    boxes = inputs.KINDS[layout](330)
    for dtype in (torch.float32, torch.float64):
        check(device.put(boxes[:300], dtype), [200, 100], device.put(boxes[None, 300:], dtype))


@pytest.mark.parametrize("name", inputs.EDGES)
def test_edges(device, name):
    rows = np.concatenate([inputs.edge_boxes(name), inputs.uniform_boxes(70, extent=30)])
    boxes = np.concatenate([inputs.edge_boxes(name, seed=1), inputs.uniform_boxes(3, extent=30)])[None]
    for dtype in (torch.float32, torch.float64):
        found = check(device.put(rows, dtype), [len(rows) - 65, 65], device.put(boxes, dtype), topk=5)
        assert not found.ious.isnan().any()


def test_one_candidate_has_no_deviation(device):
    box = device.put([[0.0, 0, 10, 10]])
    assert check(box, [1], box[None]).indices.tolist() == [[-1]]
    assert check(box.repeat(2, 1), [1, 1], box[None]).indices.tolist() == [[0, 0]]


def test_centres_must_be_inside_by_more_than_a_hundredth(device):
    gt = device.put([[[0.0, 0, 10, 10]]])
    for shift, inside in ((0.005, False), (0.02, True)):
        anchors = device.put([[-9 + shift, 0, 9 + shift, 10], [-9 + shift, 0, 9 + shift, 10]])
        assert (check(anchors, [2], gt).indices >= 0).all().item() == inside


def test_rows_that_are_not_valid_have_no_say(device):
    anchors, sizes = pyramid()
    boxes, valid = inputs.uniform_boxes(24, extent=64, size=40).reshape(3, 8, 4), masked((3, 8))
    valid[1] = False
    results = []
    for filler in (np.nan, np.inf, 0.0, boxes[0, 0]):
        padded = np.where(valid[..., None], boxes, filler)
        results.append(check(device.put(anchors), sizes, device.put(padded), device.put(valid)))
        assert all(map(torch.equal, results[-1], results[0]))
    assert (results[0].indices[1] == -1).all()


def test_anchors_of_each_image_and_strides(device):
    anchors = device.put(inputs.uniform_boxes(2 * 140, extent=100).reshape(140, 2, 4)).transpose(0, 1)
    boxes = device.put(inputs.uniform_boxes(20, seed=1, extent=100).reshape(2, 10, 4))[:, ::2]
    together = check(anchors, [100, 40], boxes)
    for i in range(2):
        alone = detops.assign_atss(anchors[i], [100, 40], boxes[i : i + 1])
        assert torch.equal(together.indices[i], alone.indices[0]) and torch.equal(together.ious[i], alone.ious[0])


def test_dtypes(device, boxes_dtype):
    anchors, sizes = pyramid()
    anchors, boxes = device.put(anchors, boxes_dtype), device.put(inputs.uniform_boxes(6, extent=64, size=40)[None])
    found = check(anchors, sizes, boxes.to(boxes_dtype))
    assert found.ious.dtype == (torch.float64 if boxes_dtype == torch.float64 else torch.float32)


def test_empty(device):
    anchors, sizes = pyramid()
    anchors = device.put(anchors)
    for rows, counts, shape in ((anchors, sizes, (0, 3, 4)), (anchors, sizes, (2, 0, 4)), (anchors[:0], [], (2, 3, 4))):
        found = detops.assign_atss(rows, counts, torch.zeros(shape, device=anchors.device))
        assert found.indices.shape == found.ious.shape == (shape[0], len(rows))
        assert (found.indices == -1).all() and (found.ious == 0).all()


def test_drawn_boxes(device):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    coordinate = st.integers(0, 5).map(float) | st.sampled_from([np.nan, np.inf, 1e30])
    box = st.tuples(*[coordinate] * 4)

    @hypothesis.settings(max_examples=device.limit(150, emulated=15), deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        *(st.lists(box, max_size=12), st.lists(box, max_size=12), st.lists(box, max_size=5), st.integers(1, 4))
    )
    def check_drawn(level1, level2, boxes, topk):
        anchors = device.put(np.array(level1 + level2).reshape(-1, 4))
        check(anchors, [len(level1), len(level2)], device.put(np.array(boxes).reshape(1, -1, 4)), topk=topk)

    check_drawn()


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_flushed_subnormal_numbers(device):
    # Distances whose squares are subnormal decide as ever: torch flushes such numbers on the calling thread alone.
    x = 1e-20 * np.arange(1, 65)
    anchors = device.put(np.stack([-x, -x, 3 * x, 3 * x], 1)[::-1].copy())
    boxes = device.put(np.tile([[-1.0, -1, 1, 1]], (64, 1))[None])
    expected = detops.assign_atss(anchors, [64], boxes, topk=3)
    torch.set_flush_denormal(True)
    try:
        found = detops.assign_atss(anchors, [64], boxes, topk=3)
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, found, expected))


A, G = torch.zeros(9, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("anchors", "sizes", "gt_boxes", "topk", "message"),
    [
        (A, [4, 4], G, 9, r"level_sizes must be at least 0 and add up to the number of anchors \(9\), got a sum of 8"),
        # The sum, wrapped around 2^64, is 9.
        (A, [1, 2**63 - 1, 2**63 - 1, 10], G, 9, "level_sizes must be at least 0 and add up .* 9223372036854775807"),
        (A, [4, 6], G, 9, r"level_sizes must be at least 0 and add up .* \(9\), got a sum of 10"),
        (A, [10, -1], G, 9, r"level_sizes must be at least 0 and add up .* \(9\), got a sum of 10"),
        (A, [-1, 10], G, 9, r"level_sizes must be at least 0 and add up .* \(9\), got a sum of -1"),
        (A, [9] + 32 * [0], G, 9, "level_sizes must name at most 32 levels, got 33"),
        (A, [9], G, 0, "topk must be at least 1, got 0"),
        (A[:, :3], [9], G, 9, r"anchors must have shape \[A, 4\] or .*, got \[9, 3\]"),
        (A, [9], G[0], 9, r"gt_boxes must have shape \[B, M, 4\], got \[3, 4\]"),
    ],
)
def test_bad_arguments(device, anchors, sizes, gt_boxes, topk, message):
    with pytest.raises(RuntimeError, match=f"^assign_atss: {message}$"):
        detops.assign_atss(anchors.to(device.torch), sizes, gt_boxes.to(device.torch), topk=topk)


def test_opcheck(device):
    anchors, sizes = pyramid()
    boxes, valid = device.put(inputs.uniform_boxes(6).reshape(2, 3, 4)), device.put(masked((2, 3)))
    torch.library.opcheck(_library.ops.assign_atss, (device.put(anchors), sizes, boxes, valid, 9))
    torch.library.opcheck(_library.ops.assign_atss, (device.put(anchors), sizes, boxes[:, :0], None, 9))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    anchors, sizes = pyramid()
    anchors = device.put(anchors)
    torch._dynamo.reset()
    compiled = torch.compile(lambda boxes: detops.assign_atss(anchors, sizes, boxes).indices + 1, fullgraph=True)
    for gts in (3, 5):
        boxes = device.put(inputs.uniform_boxes(gts, extent=64)[None])
        assert torch.equal(compiled(boxes), detops.assign_atss(anchors, sizes, boxes).indices + 1)


def test_export():
    anchors, sizes = pyramid()

    class Assign(torch.nn.Module):
        def forward(self, anchors, boxes):
            return detops.assign_atss(anchors, sizes, boxes)

    example = to_torch(anchors), to_torch(inputs.uniform_boxes(3, extent=64)[None])
    program = torch.export.export(Assign(), example, dynamic_shapes=({}, {1: torch.export.Dim("gts")}))
    arguments = example[0], to_torch(inputs.uniform_boxes(9, extent=64)[None])
    assert all(map(torch.equal, program.module()(*arguments), Assign()(*arguments)))


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    anchors, sizes = pyramid()
    anchors, boxes = device.put(anchors), device.put(inputs.uniform_boxes(60, extent=64).reshape(3, 20, 4))
    first = detops.assign_atss(anchors, sizes, boxes)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, detops.assign_atss(anchors, sizes, boxes), first))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    anchors, sizes = pyramid()
    anchors, boxes = device.put(anchors), device.put(inputs.uniform_boxes(6, extent=64)[None])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        detops.assign_atss(anchors, sizes, boxes)
    finally:
        torch.cuda.set_sync_debug_mode(before)
