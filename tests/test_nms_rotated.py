"""nms_rotated: the decisions of nms with the IoU of rotated boxes."""

import functools
import time

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import iou as reference
from reference.nms import ranking


def threshold_in_a_gap(ious, wanted):
    """A threshold near the wanted one that no IoU comes near to, so that rounding decides nothing.

    A threshold of 0 may stand: boxes that miss each other have the IoU 0 in any precision.
    """
    for step in range(1000):
        threshold = wanted + step * 1e-4
        others = ious[np.isfinite(ious) & (ious != threshold if threshold in (0, 1) else True)]
        if np.abs(others - threshold).min(initial=1) > 2e-5:
            return threshold
    raise AssertionError("no gap")


def ious_of(boxes):
    """All IoUs of these boxes, in float64."""
    boxes = np.ascontiguousarray(boxes, np.float64)
    return _ious_of(boxes.tobytes(), len(boxes))


@functools.cache
def _ious_of(values, n):
    boxes = np.frombuffer(values).reshape(n, 5)
    return reference.rotated_box_iou(boxes, boxes)


def check(boxes, scores, wanted, idxs=None):
    """With a threshold near the wanted one, the result is that of the reference in float64; returns it."""
    ious = ious_of(to_numpy(boxes))
    threshold, ids = threshold_in_a_gap(ious, wanted), None if idxs is None else to_numpy(idxs)
    keep = detops.nms_rotated(boxes, scores, threshold, idxs)
    assert keep.dtype == torch.int64 and keep.device == boxes.device and keep.is_contiguous()
    assert keep.tolist() == reference.nms_rotated(None, to_numpy(scores), threshold, ids, ious).tolist()
    return keep


@pytest.mark.parametrize(("wanted", "jitter"), [(0.0001, 0.1), (0.1, 0.1), (0.5, 0.1), (0.7, 0.1), (0.9, 0.02)])
def test_equals_the_reference(device, wanted, jitter):
    for n in (2, 31, 65):
        boxes = inputs.clustered_rotated_boxes(n, per_object=8, jitter=jitter, extent=300).astype(np.float32)
        ids = device.put(inputs.class_ids(n, 3))
        for scores in (inputs.distinct_scores(n), inputs.tied_scores(n), inputs.odd_scores(n)):
            for dtype in (torch.float32, torch.float64):
                arguments = device.put(boxes, dtype), device.put(scores), wanted
                assert n == 2 or len(check(*arguments)) < n
                check(*arguments, ids)


@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 63, 64, 65, 128, 300])
def test_sizes(device, n):
    n = device.limit(n, emulated=200)
    boxes = inputs.clustered_rotated_boxes(n).astype(np.float32)
    ids = device.put(inputs.class_ids(n, 4))
    for dtype in (torch.float32, torch.float64):
        for wanted in (0.0, 0.3, 0.7, 1.0):
            check(device.put(boxes, dtype), device.put(inputs.distinct_scores(n)), wanted)
            check(device.put(boxes, dtype), device.put(inputs.tied_scores(n)), wanted, ids)


def test_class_ids_by_position_and_by_name(device):
    boxes, scores = device.put(inputs.clustered_rotated_boxes(60)), device.put(inputs.distinct_scores(60))
    ids = device.put(inputs.class_ids(60, 3))
    assert torch.equal(detops.nms_rotated(boxes, scores, 0.5, ids), detops.nms_rotated(boxes, scores, 0.5, idxs=ids))


@pytest.mark.parametrize("n", [1000, 5000, 12_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_many_boxes_follow_the_definition(device, n):
    # The kept boxes do not suppress each other, and every other one is suppressed by a better one. By box_iou's IoUs,
    # which test_iou_rotated judges: here many boxes are the point.
    boxes, scores = device.put(inputs.clustered_rotated_boxes(n, extent=3000)), device.put(inputs.distinct_scores(n))
    for idxs in (None, device.put(inputs.class_ids(n, 2))):
        keep = detops.nms_rotated(boxes, scores, 0.4, idxs)
        assert (scores[keep].diff() < 0).all() and n // 50 < len(keep) < n
        suppressed = torch.zeros(n, dtype=torch.bool, device=keep.device)
        for part in torch.arange(n, device=keep.device).split(1000):
            over = detops.box_iou(boxes[keep], boxes[part], fmt="cxcywhr") > 0.4
            over &= scores[keep][:, None] > scores[part]
            if idxs is not None:
                over &= idxs[keep][:, None] == idxs[part]
            suppressed[part] = over.any(0)
        assert (~suppressed).nonzero()[:, 0].tolist() == keep.sort().values.tolist()


def elongated_boxes(n, seed=0):
    """Clusters of boxes up to 3000 times as long as wide, moved and turned by about their width."""
    rng = np.random.default_rng(seed)
    longer = rng.uniform(50, 100, n // 10 + 1)
    shorter = longer / np.exp(rng.uniform(0, np.log(3000), len(longer)))
    objects = np.stack([*rng.uniform(0, 400, (2, len(longer))), longer, shorter, rng.uniform(0, 360, len(longer))], 1)
    boxes = objects[rng.integers(0, len(objects), n)]
    boxes[:, :2] += rng.normal(0, 0.3, (n, 2)) * boxes[:, 3:4]
    boxes[:, 4] += rng.normal(0, 20, n) * boxes[:, 3] / boxes[:, 2]
    return boxes


def boxes_of_all_scales(n, seed=0):
    """Longer sides from 1e-7 to 1e7, and the like 1e-17 and 1e17, whose areas float32 cannot hold well."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(np.log(1e-7), np.log(1e7), n // 6 + 1))
    scale[::20] *= rng.choice([1e-10, 1e10], len(scale[::20]))
    scale = scale[rng.integers(0, len(scale), n), None]
    return inputs.clustered_rotated_boxes(n, seed, per_object=6) * np.concatenate([np.tile(scale, 4), scale**0], 1)


def far_and_turned_boxes(n, seed=0):
    """So far from 0 that float32 centres are whole numbers; turned by up to 1e30 degrees."""
    rng = np.random.default_rng(seed)
    boxes = inputs.clustered_rotated_boxes(n, seed, extent=400)
    boxes[:, :2] += 2.0**23
    boxes[:, 4] += rng.choice([0, 0, 0, 360, -3600, 3.6e5, 3.6e7, 1e30], n)
    return boxes


def odd_boxes(n, seed=0):
    """Integer corners; here and there NaN, infinities, zeros, and numbers at the ends of what there is."""
    rng = np.random.default_rng(seed)
    turns = rng.choice([0, 30, 45, 90, 180, -90, 7], n)
    boxes = np.column_stack([rng.integers(0, 60, (n, 2)), rng.integers(1, 12, (n, 2)), turns]).astype(float)
    odd = [np.nan, np.inf, -np.inf, 0, -0.0, -3, 1e30, -1e30, 3e38, 1e20, -1e20, 1e-19, 1e-30, 1e6, 1e12, 2000]
    boxes[rng.integers(0, n, n // 5), rng.integers(0, 5, n // 5)] = rng.choice(odd, n // 5)
    return boxes


def spread_boxes(n, seed=0):
    return inputs.rotated_boxes(n, seed, extent=800)


# Enough for the CPU's index of kept boxes, whose bounds must hold for the IoUs as they are computed.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        *[spread_boxes, inputs.clustered_rotated_boxes, elongated_boxes],
        *[boxes_of_all_scales, far_and_turned_boxes, odd_boxes],
    ],
)
def test_many_boxes_decide_as_box_iou(device, make, dtype):
    n = device.limit(1500, emulated=120)
    scores = inputs.tied_scores(n, levels=n // 3)
    boxes, order = device.put(make(n), dtype), ranking(scores)
    ious = to_numpy(detops.box_iou(boxes[order], boxes[order], fmt="cxcywhr")).astype(np.float64)
    counts = []
    for iou_threshold in (0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9, 0.99, 0.999, 0.99999):
        kept = np.ones(n, bool)
        for i in range(n):
            if kept[i]:
                kept[i + 1 :] &= ~(ious[i, i + 1 :] > iou_threshold)
        assert detops.nms_rotated(boxes, device.put(scores), iou_threshold).tolist() == order[kept].tolist()
        counts.append(kept.sum())
    assert counts[0] < counts[-1] and (counts[-1] > 1000 or device.name == "emulated")


@pytest.mark.parametrize("iou_threshold", [0.3, 0.7, 0.9])
def test_very_many_boxes_take_no_quadratic_time(iou_threshold):
    boxes = to_torch(inputs.rotated_boxes(60_000, extent=2000))
    scores = to_torch(inputs.distinct_scores(60_000))
    start = time.process_time()
    assert len(detops.nms_rotated(boxes, scores, iou_threshold)) > 5000
    assert time.process_time() - start < 4  # comparing with all kept boxes takes 10 s


@pytest.mark.parametrize("n", [40, 300])
def test_quarter_turns_decide_as_nms(device, n):
    corners = inputs.grid_boxes(n)
    turns = np.random.default_rng(0).choice([0, 90, 180, -90, 720], n)
    sides = corners[:, 2:] - corners[:, :2]
    sides = np.where((turns % 180 == 0)[:, None], sides, sides[:, ::-1])
    boxes = device.put(np.column_stack([(corners[:, :2] + corners[:, 2:]) / 2, sides, turns]))
    ids = device.put(inputs.class_ids(n, 3))
    for scores in (inputs.distinct_scores(n), inputs.tied_scores(n), inputs.odd_scores(n)):
        scores = device.put(scores)
        for iou_threshold in (*inputs.THRESHOLDS, 1 / 3, 0.2, 0.25):  # many pairs are exactly on them
            expected = detops.nms(device.put(corners), scores, iou_threshold)
            assert torch.equal(detops.nms_rotated(boxes, scores, iou_threshold), expected)
            expected = detops.batched_nms(device.put(corners), scores, ids, iou_threshold)
            assert torch.equal(detops.nms_rotated(boxes, scores, iou_threshold, ids), expected)


@pytest.mark.parametrize(
    ("second", "iou_threshold", "keep"),
    [
        ([2.5, 5, 5, 10, 0], 0.5, [0, 1]),  # IoU 1/2 is not greater than 0.5
        ([2.5, 5, 10, 5, -90], 0.5, [0, 1]),
        ([2.5, 5, 5, 10, 0], 0.4999, [0]),
        ([0.5, 5, 1, 10, 0], 0.1, [0]),  # float32(0.1) > 0.1
        ([15, 5, 10, 10, 0], 0.0, [0, 1]),  # touching boxes do not overlap
        ([5, 5, 10, 10, 90], 1.0, [0, 1]),
        ([5, 5, 10, 10, 90], 0.9999, [0]),
        ([5, 5, 10, 10, 45], float("inf"), [0, 1]),
    ],
)
def test_the_threshold_is_strict_and_a_double(device, second, iou_threshold, keep):
    boxes, scores = device.put([[5.0, 5, 10, 10, 0], second]), device.put([0.9, 0.8])
    assert detops.nms_rotated(boxes, scores, iou_threshold).tolist() == keep
    assert detops.nms_rotated(boxes, scores, iou_threshold, torch.zeros(2).to(boxes).long()).tolist() == keep


def test_boxes_without_an_iou_neither_suppress_nor_are_suppressed(device):
    nan, inf = np.nan, np.inf
    odd = [[nan, 0, 9, 9, 0], [0, nan, 9, 9, 0], [0, 0, nan, 9, 0], [0, 0, 9, nan, 0], [0, 0, 9, 9, nan], [nan] * 5]
    odd += [[inf, 0, 9, 9, 0], [0, 0, inf, 9, 0], [0, 0, 9, 9, inf], [0, -inf, 9, 9, 30], [inf] * 5]
    odd += [[0, 0, 0, 9, 0], [0, 0, 9, 0, 30], [0, 0, 0, 0, 0], [0, 0, -9, -9, 30], [0, 0, -9, 9, 0], [0, 0, 9, -9, 0]]
    ordinary = [[0, 0, 10, 10, 0], [0, 0, 10, 10, 20], [1, 1, 9, 9, 45], [40, 40, 9, 9, 7]]
    boxes = np.array(odd * 2 + ordinary, np.float64)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(boxes))
        for dtype in (torch.float32, torch.float64):
            keep = check(device.put(boxes[order], dtype), device.put(inputs.distinct_scores(len(boxes))), 0.0)
            assert set(order[keep.tolist()]) >= set(range(2 * len(odd)))


def test_dtypes(device, boxes_dtype, scores_dtype):
    boxes = device.put(inputs.clustered_rotated_boxes(60, extent=300), boxes_dtype)
    for scores in (inputs.distinct_scores(60), inputs.odd_scores(60)):
        check(boxes, device.put(scores, scores_dtype), 0.4, device.put(inputs.class_ids(60, 2)))


@pytest.mark.parametrize("idxs_dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_class_id_dtypes(device, idxs_dtype):
    boxes, scores = device.put(inputs.clustered_rotated_boxes(60, extent=300)), device.put(inputs.distinct_scores(60))
    check(boxes, scores, 0.3, device.put(inputs.class_ids(60, 2), idxs_dtype))


def test_inputs_of_any_strides_are_read(device):
    wide = device.put(inputs.clustered_rotated_boxes(120, extent=300))
    scores, ids = device.put(inputs.distinct_scores(120)), device.put(inputs.class_ids(120, 3))
    rows = torch.cat([wide, scores[:, None], ids[:, None].float()], dim=1)  # a detector's [N, 7] rows
    cases = [(wide[::2], scores[::2], ids[::2]), (wide.t().contiguous().t(), scores, ids)]
    cases += [(rows[:, :5], rows[:, 5], rows[:, 6].long()), (wide[:1].expand(9, 5), scores[:9], ids[:1].expand(9))]
    for boxes, some_scores, some_ids in cases:
        check(boxes, some_scores, 0.4)
        check(boxes, some_scores, 0.4, some_ids)


# Bad input.

BOXES_3, SCORES_3, IDS_3 = torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("value", [float("nan"), -0.1, float("-inf")])
def test_bad_options(value):
    with pytest.raises(ValueError, match=f"^nms_rotated: iou_threshold must be at least 0, got {value}"):
        detops.nms_rotated(BOXES_3, SCORES_3, value)


@pytest.mark.parametrize(
    ("boxes", "scores", "idxs", "message"),
    [
        (torch.zeros(3, 4), SCORES_3, None, r"boxes must have shape \[N, 5\], got \[3, 4\]"),
        (torch.zeros(5), SCORES_3, None, r"boxes must have shape \[N, 5\], got \[5\]"),
        (torch.zeros(2, 3, 5), SCORES_3, None, r"boxes must have shape \[N, 5\], got \[2, 3, 5\]"),
        (BOXES_3, torch.zeros(4), None, r"scores must have shape \[N\] with N = 3, got \[4\]"),
        (BOXES_3.long(), SCORES_3, None, "boxes must be float16, bfloat16, float32 or float64, got int64"),
        (BOXES_3, SCORES_3.int(), None, "scores must be float16, bfloat16, float32 or float64, got int32"),
        (BOXES_3, SCORES_3, IDS_3[:2], r"idxs must have shape \[N\] with N = 3, got \[2\]"),
        (BOXES_3, SCORES_3, IDS_3.float(), "idxs must be an integer tensor, got float32"),
    ],
)
def test_bad_tensors(device, boxes, scores, idxs, message):
    boxes, scores = boxes.to(device.torch), scores.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^nms_rotated: {message}$"):
        detops.nms_rotated(boxes, scores, 0.5, None if idxs is None else idxs.to(device.torch))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    with pytest.raises(RuntimeError, match="^nms_rotated: scores must be on the device of boxes"):
        detops.nms_rotated(BOXES_3.to(device.torch), SCORES_3, 0.5)


# A PyTorch citizen, the same on every run.


@pytest.mark.parametrize("n", [0, 1, 40])
def test_opcheck(device, n):
    boxes, scores = device.put(inputs.clustered_rotated_boxes(n)), device.put(inputs.distinct_scores(n))
    torch.library.opcheck(_library.ops.nms_rotated, (boxes, scores, 0.5, None))
    torch.library.opcheck(_library.ops.nms_rotated, (boxes, scores, 0.5, device.put(inputs.class_ids(n, 3))))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    def thin(boxes, scores, ids):
        return boxes[detops.nms_rotated(boxes, scores, 0.5)] * 2, scores[
            detops.nms_rotated(boxes, scores, 0.5, ids)
        ] + 1

    torch._dynamo.reset()
    compiled = torch.compile(thin, fullgraph=True)
    for n in (40, 60):  # two sizes: the second makes N dynamic
        arguments = device.put(inputs.clustered_rotated_boxes(n)), device.put(inputs.distinct_scores(n))
        arguments = *arguments, device.put(inputs.class_ids(n, 3))
        assert all(map(torch.equal, compiled(*arguments), thin(*arguments)))


def test_export_with_any_number_of_boxes():
    class Thin(torch.nn.Module):
        def forward(self, boxes, scores):
            return detops.nms_rotated(boxes, scores, 0.4)

    def arguments(n):
        return to_torch(inputs.clustered_rotated_boxes(n)), to_torch(inputs.distinct_scores(n))

    dynamic = {0: torch.export.Dim("n", min=2)}
    program = torch.export.export(Thin(), arguments(40), dynamic_shapes=(dynamic, dynamic))
    for n in (40, 150):
        assert torch.equal(program.module()(*arguments(n)), check(*arguments(n), 0.4))


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads):
    boxes, scores = to_torch(inputs.clustered_rotated_boxes(3000)), to_torch(inputs.tied_scores(3000, levels=300))
    ids, results = to_torch(inputs.class_ids(3000, 9)), []
    for threads in (1, 2, 3, 8, 8):
        torch.set_num_threads(threads)
        results.append([detops.nms_rotated(boxes, scores, 0.4, each).tolist() for each in (None, ids)])
    assert all(result == results[0] for result in results[1:]) and len(results[0][0]) < len(results[0][1]) < 3000
