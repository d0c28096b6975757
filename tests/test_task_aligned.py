"""assign_task_aligned: equal to the dense definition in reference/task_aligned.py, on every device."""

import sys

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import EDGES, edge_boxes, to_numpy
from memory import peak_growth
from reference import task_aligned as reference
from yolo_scenes import Scene, grid_points, scene

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPTIONS = [
    {},
    {"topk": 13, "alpha": 1.0, "iou": "iou"},
    {"topk": 1},
    {"min_size": 16.0},
    {"alpha": 0.7, "beta": 3.3},
    {"alpha": 0.0, "beta": 1.0},
    {"topk": 40, "dense_scores": False},
    {"candidates": "all"},
    {"candidates": "all", "topk": 13, "alpha": 1.0, "iou": "iou", "with_metrics": True},
    {"candidates": "all", "topk": 40, "min_size": 16.0},
    {"with_metrics": True, "dense_scores": False},
]


def put(device, arrays, dtype=torch.float32, scores_dtype=None):
    """The arguments of assign_task_aligned as tensors."""
    dtypes = [scores_dtype or dtype, dtype, dtype, None, dtype, None]
    return [device.put(each, which) for each, which in zip(arrays, dtypes, strict=True)]


def check(tensors, **options):
    """The result for these tensors is the reference's; returns it."""
    targets = detops.assign_task_aligned(*tensors, **options)
    compare(targets, tensors, **options)
    return targets


def compare(targets, tensors, **options):
    expected = reference.assign_task_aligned(*map(to_numpy, tensors), **options)
    assert [each.dtype for each in targets[:5]] == [
        torch.int64,
        tensors[4].dtype,
        tensors[0].dtype,
        torch.bool,
        torch.int64,
    ]
    assert isinstance(targets, detops.TaskAlignedMetrics if options.get("with_metrics") else detops.TaskAlignedTargets)
    assert all(each.device == tensors[0].device for each in targets)
    for name, ours, theirs in zip(targets._fields, targets, expected, strict=True):
        if name in ("metrics", "overlaps"):
            assert to_numpy(ours).dtype == theirs.dtype
        if name in ("scores", "metrics") and theirs.dtype == np.float64:  # the last bits of a power are open
            np.testing.assert_allclose(to_numpy(ours), to_numpy(torch.as_tensor(theirs).to(ours.dtype)), rtol=1e-12)
        else:
            np.testing.assert_array_equal(to_numpy(ours), to_numpy(torch.as_tensor(theirs).to(ours.dtype)), name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_scenes_of_three_levels(device, options, seed):
    points, _ = grid_points(device.limit(128, emulated=64))
    check(put(device, scene(points, 12, seed=seed)), **options)


@pytest.mark.parametrize("anchors", (0, 1, 2, 31, 32, 33, 64, 255, 257, 1056, 1100))
@pytest.mark.parametrize("gts", (0, 1, 17, 65))
def test_sizes(device, anchors, gts):
    if device.name == "emulated" and anchors > 300 and gts > 17:
        pytest.skip("takes long, and the others reach all code")
    points = np.random.default_rng(anchors).uniform(0, 128, (anchors, 2))
    tensors = put(device, scene(points, gts, seed=gts))
    check(tensors)
    check(tensors, candidates="all")


@pytest.mark.parametrize("classes", (1, 2, 3, 4, 5, 8, 80))
def test_numbers_of_classes(device, classes):
    arrays = scene(grid_points(64)[0], 6, classes=classes)
    for dtype in (torch.float16, torch.float32):
        tensors = put(device, arrays, torch.float32, dtype)
        dense = check(tensors)
        sparse = check(tensors, dense_scores=False)
        assert torch.equal(dense.scores.amax(2), sparse.scores) and torch.equal(dense.labels, sparse.labels)


def test_ties_go_to_the_lower_index(device):
    points, _ = grid_points(64)
    for seed in range(4):
        arrays = scene(points, 10, seed=seed, noise=0.0, levels=2)
        for topk in (1, 3, 10, 33):
            check(put(device, arrays), topk=topk)
    # All anchors alike: the first ones, and of two equal gts the first.
    box, n = [8.0, 8, 56, 56], 40
    arrays = Scene(
        np.ones((1, n, 1)), np.tile(box, (1, n, 1)), np.full((n, 2), 32.0), np.zeros((1, 2), int),
        np.tile(box, (1, 2, 1)), np.ones((1, 2), bool),
    )  # fmt: skip
    tensors = put(device, arrays)
    targets = check(tensors, topk=5)
    assert targets.gt_indices[0].tolist() == [0] * 5 + [-1] * (n - 5)


def test_places_left_over_go_to_the_first_anchors_of_metric_zero(device):
    # One of 50 anchors overlaps; anchors 1 and 3 are candidates early enough to fill up, 40 is not.
    points = np.full((50, 2), 500.0)
    points[[1, 3, 20, 40]] = 10.0
    boxes = np.tile([900.0, 900, 901, 901], (1, 50, 1))
    boxes[0, 20] = [0, 0, 20, 20]
    arrays = Scene(np.ones((1, 50, 2)), boxes, points, np.ones((1, 1), int), np.array([[[0.0, 0, 20, 20]]]),
                   np.ones((1, 1), bool))  # fmt: skip
    tensors = put(device, arrays)
    assert check(tensors, topk=10).foreground[0].nonzero().flatten().tolist() == [1, 3, 20]
    assert check(tensors, topk=3).foreground[0].nonzero().flatten().tolist() == [1, 20]
    assert check(tensors, topk=1).foreground[0].nonzero().flatten().tolist() == [20]
    assert check(tensors, topk=41).foreground[0].nonzero().flatten().tolist() == [1, 3, 20, 40]
    assert check(tensors, topk=99).scores[0, 1].tolist() == [0, 0]


def test_crowded(device):
    points, _ = grid_points(device.limit(256, emulated=64))
    arrays = scene(points, device.limit(500, emulated=70), images=1, extent=points.max() + 4, size=50, noise=0.1)
    targets = check(put(device, arrays), topk=13)
    assert targets.foreground.float().mean() > 0.4


def test_an_anchor_may_go_to_a_gt_that_did_not_claim_it(device):
    # Anchor 0 is claimed by gts 0 and 1, overlaps best with gt 2, which has a better one.
    boxes = [[0, 0, 10, 10.0], [0, 0, 12, 12]]
    gts = [[0, 0, 9, 9], [0, 0, 8, 9], [0, 0, 10.5, 10.5]]
    arrays = Scene(
        np.array([[[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]]), np.array([boxes]), np.full((2, 2), 4.0), np.array([[0, 1, 2]]),
        np.array([gts], float), np.ones((1, 3), bool),
    )  # fmt: skip
    assert check(put(device, arrays), topk=1).gt_indices.tolist() == [[2, 2]]


def test_all_anchors_compete(device):
    # Two anchors outside of the gt fit it best: by one rule they leave their places to others, by TOOD's they do not.
    gt = [[[8.0, 8, 24, 24]]]
    points = np.array([[16.0, 16], [12, 12], [40, 40], [24, 16], [23.995, 16]])
    boxes = np.array([[[8.0, 8, 24, 22], [8, 8, 24, 20], [8, 8, 24, 24], [8, 8, 24, 24], [8, 8, 24, 24]]])
    arrays = Scene(np.full((1, 5, 1), 0.5), boxes, points, np.zeros((1, 1), int), np.array(gt), np.ones((1, 1), bool))
    tensors = put(device, arrays)
    for topk, inside, every in ((1, [4], []), (2, [0, 4], []), (3, [0, 1, 4], []), (4, [0, 1, 4], [0])):
        assert check(tensors, topk=topk).foreground[0].nonzero().flatten().tolist() == inside
        found = check(tensors, topk=topk, candidates="all", with_metrics=True)
        assert found.foreground[0].nonzero().flatten().tolist() == every
        assert (found.metrics > 0).tolist() == found.foreground.tolist()
    # An overlap or a score of 0 is never positive.
    apart = arrays._replace(boxes=boxes + 100)
    assert check(put(device, apart)).foreground.any()
    assert not check(put(device, apart), candidates="all").foreground.any()
    assert not check(put(device, arrays._replace(scores=0 * arrays.scores)), topk=5, candidates="all").foreground.any()


def test_all_anchors_compete_and_claimants_alone_settle(device):
    # Gts 0 and 1 claim anchor 0, gt 2 overlaps it best but prefers anchor 1.
    boxes = [[0, 0, 10, 10.0], [0, 0, 12, 12]]
    gts = [[0, 0, 8, 9], [0, 0, 9, 9], [0, 0, 10.5, 10.5]]
    arrays = Scene(
        np.array([[[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]]), np.array([boxes]), np.full((2, 2), 4.0), np.array([[0, 1, 2]]),
        np.array([gts], float), np.ones((1, 3), bool),
    )  # fmt: skip
    tensors = put(device, arrays)
    assert check(tensors, topk=1).gt_indices.tolist() == [[2, 2]]
    assert check(tensors, topk=1, candidates="all").gt_indices.tolist() == [[1, 2]]
    # Of two alike the first, also where one has claimed it in another round of 32.
    n = 70
    box, points = [8.0, 8, 56, 56], np.full((n, 2), 32.0)
    same = Scene(np.ones((1, n, 1)), np.tile(box, (1, n, 1)), points, np.zeros((1, 2), int), np.tile(box, (1, 2, 1)),
                 np.ones((1, 2), bool))  # fmt: skip
    for topk in (5, 33, 64, 66):
        expected = [0] * topk + [-1] * (n - topk)
        assert check(put(device, same), topk=topk, candidates="all").gt_indices[0].tolist() == expected


def test_ties_and_crowds_where_all_anchors_compete(device):
    points, _ = grid_points(64)
    for seed in range(4):
        arrays = scene(points, 25, seed=seed, noise=0.0, levels=2, size=50)
        for topk in (1, 3, 10, 33):
            check(put(device, arrays), topk=topk, candidates="all", iou=("ciou", "iou")[seed % 2])


@pytest.mark.parametrize("topk2", (1, 2, 5, 33))
def test_fewer_kept_than_claimed(device, topk2):
    points, _ = grid_points(64)
    for seed, noise in ((0, 0.15), (1, 3.0), (2, 0.0)):
        tensors = put(device, scene(points, 25, seed=seed, noise=noise, levels=2 if noise == 0 else None))
        result = _library.ops.assign_task_aligned(*tensors, 40, topk2, 0.5, 6.0, True, 16.0, 1e-9, True)
        compare(detops.TaskAlignedTargets(*result), tensors, topk=40, topk2=topk2, min_size=16.0)
        result = _library.ops.assign_task_aligned(*tensors, 40, topk2, 0.5, 6.0, True, 16.0, 1e-9, True, 1)
        compare(detops.TaskAlignedTargets(*result), tensors, topk=40, topk2=topk2, min_size=16.0, candidates="all")
    nothing = put(device, scene(points, 0))
    assert not _library.ops.assign_task_aligned(*nothing, 40, topk2, 0.5, 6.0, True, 0.0, 1e-9, True)[3].any()


@pytest.mark.parametrize("name", EDGES)
def test_odd_boxes(device, name):
    odd = edge_boxes(name)
    points = np.random.default_rng(0).uniform(-20, 40, (60, 2))
    points[:4] = [[np.nan, 5], [5, np.inf], [-np.inf, 5], [0, 0]]
    arrays = scene(points, len(odd), images=1, classes=2)
    boxes = np.random.default_rng(1).permutation(np.tile(odd, (60 // len(odd) + 1, 1)))[:60]
    arrays = arrays._replace(gt_boxes=odd[None], boxes=boxes[None])
    for options in ({}, {"iou": "iou", "min_size": 12.0}, {"candidates": "all", "with_metrics": True}):
        for dtype in (torch.float32, torch.float64):
            check(put(device, arrays, dtype), **options)


def test_tiny_boxes_and_min_size(device):
    points, _ = grid_points(64)
    arrays = scene(points, 20, size=6)
    tensors = put(device, arrays)
    before = check(tensors).foreground.sum()
    assert check(tensors, min_size=16.0).foreground.sum() > 2 * before
    assert check(tensors, min_size=0.0).foreground.sum() == before
    assert torch.equal(tensors[4], put(device, arrays)[4])  # the gts themselves stay


def test_gts_outside_of_the_image_get_nothing(device):
    points, _ = grid_points(64)
    arrays = scene(points, 5)
    targets = check(put(device, arrays._replace(gt_boxes=arrays.gt_boxes + 1000)))
    assert not targets.foreground.any() and (targets.labels == -1).all() and (targets.gt_indices == -1).all()
    assert (targets.boxes == 0).all() and (targets.scores == 0).all()


def test_odd_scores(device):
    points, _ = grid_points(64)
    arrays = scene(points, 8)
    values = np.random.default_rng(0).choice([np.nan, -1.0, 0.0, -0.0, 0.5, 1.0, 3.0], arrays.scores.shape)
    for alpha in (0.0, 0.5, 1.0, 1.7):
        check(put(device, arrays._replace(scores=values)), alpha=alpha)
        check(put(device, arrays._replace(scores=values)), alpha=alpha, candidates="all", with_metrics=True)


def test_rows_that_are_not_valid_have_no_say(device):
    points, _ = grid_points(64)
    arrays = scene(points, 14)
    expected = check(put(device, arrays))
    for filler, label in ((np.nan, -1), (np.inf, 7), (0.0, 0), (32.0, 2)):
        padded = np.where(arrays.gt_valid[..., None], arrays.gt_boxes, filler)
        labels = np.where(arrays.gt_valid, arrays.gt_labels, label)
        targets = detops.assign_task_aligned(*put(device, arrays._replace(gt_boxes=padded, gt_labels=labels)))
        assert all(map(torch.equal, targets, expected))
    assert not check(put(device, arrays._replace(gt_valid=np.zeros((2, 14), bool)))).foreground.any()


@pytest.mark.parametrize("shape", [(0, 84, 5), (2, 0, 5), (2, 84, 0), (0, 0, 0), (1, 1, 1)])
def test_empty(device, shape):
    images, anchors, gts = shape
    check(put(device, scene(grid_points(64)[0][:anchors], gts, images=images)))
    check(put(device, scene(grid_points(64)[0][:anchors], gts, images=images)), candidates="all", with_metrics=True)
    no_class = put(device, scene(grid_points(64)[0][:anchors], 0, images=images, classes=0))
    for with_metrics in (False, True):
        assert check(no_class, with_metrics=with_metrics).labels.shape == shape[:2]


def test_dtypes(device, boxes_dtype, scores_dtype):
    arrays = scene(grid_points(64)[0], 9)
    tensors = put(device, arrays, boxes_dtype, scores_dtype)
    check(tensors)
    check(put(device, arrays, torch.float32, scores_dtype)[:4] + [tensors[4], tensors[5]])


def test_inputs_of_any_strides_are_read_and_left_alone(device):
    points, _ = grid_points(64)
    arrays = scene(points, 9)
    plain = put(device, arrays)
    expected = check(plain)
    odd = torch.empty(plain[4].numel() + 1, device=plain[4].device)[1:].view(plain[4].shape).copy_(plain[4])
    strided = [
        plain[0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        plain[1].permute(0, 2, 1).contiguous().permute(0, 2, 1),
        plain[2].t().contiguous().t(),
        plain[3].t().contiguous().t(),
        odd,
        plain[5].repeat_interleave(2, 1)[:, ::2],
    ]
    before = [each.clone() for each in strided]
    assert all(map(torch.equal, detops.assign_task_aligned(*strided), expected))
    assert all(map(torch.equal, strided, before))
    shared = [each[:1].expand(3, *each.shape[1:]) if i != 2 else each for i, each in enumerate(plain)]
    targets = check(shared)
    assert torch.equal(targets.labels[0], targets.labels[2])


def test_no_gradient(device):
    tensors = put(device, scene(grid_points(64)[0], 5))
    tensors = [each.requires_grad_() if each.is_floating_point() else each for each in tensors]
    assert not any(each.requires_grad for each in detops.assign_task_aligned(*tensors))


# Bad input.

GOOD = put(type("", (), {"put": staticmethod(lambda a, d: torch.as_tensor(a).to(d))}), scene(np.zeros((7, 2)), 4))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(7, 3), r"pred_scores must have shape \[B, A, C\], got \[7, 3\]"),
        (1, torch.zeros(2, 6, 4), r"pred_boxes must have shape \[2, 7, 4\] as of pred_scores, got \[2, 6, 4\]"),
        (2, torch.zeros(7, 3), r"anchor_points must have shape \[7, 2\] as of pred_scores, got \[7, 3\]"),
        (2, torch.zeros(7, 2).long(), "anchor_points must be float16, bfloat16, float32 or float64, got int64"),
        (0, torch.zeros(2, 7, 3).long(), "pred_scores must be float16, bfloat16, float32 or float64, got int64"),
        (3, torch.zeros(2, 4, 1).long(), r"gt_labels must have shape \[2, 4\] as of gt_boxes, got \[2, 4, 1\]"),
        (3, torch.zeros(2, 4), "gt_labels must be int64, got float32"),
        (
            4,
            torch.zeros(3, 4, 4),
            r"gt_boxes must have shape \[B, M, 4\] with B = 2 as of pred_scores, got \[3, 4, 4\]",
        ),
        (5, torch.zeros(2, 5).bool(), r"gt_valid must have shape \[2, 4\] as of gt_boxes, got \[2, 5\]"),
        (5, torch.zeros(2, 4), "gt_valid must be bool, got float32"),
    ],
)
def test_bad_tensors(device, position, value, message):
    tensors = [each.to(device.torch) for each in (*GOOD[:position], value, *GOOD[position + 1 :])]
    with pytest.raises(RuntimeError, match=f"^assign_task_aligned: {message}$"):
        detops.assign_task_aligned(*tensors)


@pytest.mark.parametrize("label", (-1, 3))
def test_label_that_is_no_class(device, label):
    arrays = scene(grid_points(64)[0], 5)
    arrays.gt_labels[1, 2] = label
    arrays.gt_valid[1, 2] = True
    if device.name == "cpu":
        with pytest.raises(RuntimeError, match=f"gt_labels must be from 0 to 2 where gt_valid, got {label}$"):
            detops.assign_task_aligned(*put(device, arrays))
    else:  # without a synchronisation it can only be left out
        assert not (check(put(device, arrays)).gt_indices[1] == 2).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"alpha": -1.0}, "alpha must be finite and at least 0, got -1.0"),
        ({"alpha": float("nan")}, "alpha must be finite and at least 0, got nan"),
        ({"beta": 0.0}, "beta must be finite and above 0, got 0.0"),
        ({"min_size": float("inf")}, "min_size must be finite and at least 0, got inf"),
        ({"iou": "giou"}, "iou must be 'ciou' or 'iou', got 'giou'"),
        ({"candidates": "some"}, "candidates must be 'inside' or 'all', got 'some'"),
        ({"topk": 2.5}, "topk must be an integer, got 2.5"),
        ({"alpha": "1"}, "alpha must be a number, got '1'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^assign_task_aligned: {message}$"):
        detops.assign_task_aligned(*GOOD, **options)


@pytest.mark.parametrize(
    ("topk", "topk2", "candidates", "message"),
    [
        (0, 1, 0, "topk must be at least 1, got 0"),
        (-5, -5, 0, "topk must be at least 1, got -5"),
        (3, 0, 0, "topk2 must be at least 1, got 0"),
        (3, 3, 2, r"candidates must be 0 \(inside\) or 1 \(all\), got 2"),
    ],
)
def test_bad_options_of_the_op(device, topk, topk2, candidates, message):
    tensors = put(device, scene(grid_points(64)[0], 5))
    with pytest.raises(RuntimeError, match=f"^assign_task_aligned: {message}$"):
        _library.ops.assign_task_aligned(*tensors, topk, topk2, 0.5, 6.0, True, 0.0, 1e-9, True, candidates)


def test_options_of_numpy(device):
    tensors = put(device, scene(grid_points(64)[0], 5))
    options = {"topk": np.int64(7), "alpha": np.float32(0.5), "beta": np.float64(6), "min_size": torch.tensor(16.0)}
    expected = detops.assign_task_aligned(*tensors, topk=7, min_size=16.0)
    assert all(map(torch.equal, detops.assign_task_aligned(*tensors, **options), expected))


def test_arguments_that_are_no_tensors():
    with pytest.raises(RuntimeError, match="^assign_task_aligned: gt_boxes must be a tensor, got a list$"):
        detops.assign_task_aligned(*GOOD[:4], [[1, 2, 3, 4]], GOOD[5])


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    with pytest.raises(RuntimeError, match="^assign_task_aligned: gt_boxes must be on the device of pred_scores"):
        detops.assign_task_aligned(*(each.to("cuda") for each in GOOD[:3]), *GOOD[3:])


# A PyTorch citizen, the same on every run, in bounded memory.


def test_opcheck(device):
    tensors = put(device, scene(grid_points(32)[0], 4))
    for topk2, dense in ((10, True), (1, False)):
        arguments = (*tensors, 10, topk2, 0.5, 6.0, True, 16.0, 1e-9, dense)
        torch.library.opcheck(_library.ops.assign_task_aligned, arguments)
    tensors[0] = tensors[0].half()
    torch.library.opcheck(_library.ops.assign_task_aligned, (*tensors, 9, 9, 0.5, 6.0, True, 16.0, 1e-9, True, 1, True))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    def use(*tensors):
        targets = detops.assign_task_aligned(*tensors)
        return targets.scores.amax(1), targets.labels + 1, targets.boxes * targets.foreground[..., None]

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for size, gts in ((64, 5), (128, 9)):
        tensors = put(device, scene(grid_points(size)[0], gts))
        assert all(map(torch.equal, compiled(*tensors), use(*tensors)))


def test_export_with_any_number_of_boxes():
    class Assign(torch.nn.Module):
        def forward(self, *tensors):
            return detops.assign_task_aligned(*tensors).labels

    example = [torch.as_tensor(each).float() for each in scene(grid_points(64)[0], 5)]
    example[3], example[5] = example[3].long(), example[5].bool()
    gts = torch.export.Dim("gts")
    shapes = ((None, None, None, {1: gts}, {1: gts}, {1: gts}),)
    program = torch.export.export(Assign(), tuple(example), dynamic_shapes=shapes)
    more = [
        torch.as_tensor(each).to(like.dtype) for each, like in zip(scene(grid_points(64)[0], 31), example, strict=True)
    ]
    assert torch.equal(program.module()(*more), detops.assign_task_aligned(*more).labels)


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    tensors = put(device, scene(grid_points(device.limit(256, emulated=64))[0], 40, images=3))
    first = detops.assign_task_aligned(*tensors)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, detops.assign_task_aligned(*tensors), first))


PREPARE = """
torch.manual_seed(0)
def scene(anchors, gts):
    low = (torch.rand(gts, 2) * 600).expand(2, -1, -1)
    gt_boxes = torch.cat([low, low + 30], -1)
    boxes = gt_boxes[:, torch.randint(0, gts, (anchors,))]
    points = boxes[0, :, :2] + torch.rand(anchors, 2) * 30
    return (torch.rand(2, anchors, 4), boxes, points, torch.zeros(2, gts, dtype=torch.int64), gt_boxes,
            torch.ones(2, gts, dtype=torch.bool))
detops.assign_task_aligned(*scene(50, 5))
inputs = scene(20000, 500)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_the_matrix_is_never_made():
    call = "detops.assign_task_aligned(*inputs, dense_scores=False)"
    right, extra = peak_growth(PREPARE, call, "int(result.foreground.sum() > 1000)")
    # The results take 1.5 MB; one [B, M, A] matrix of float32 would take 80 MB.
    assert right == 1 and extra < 5e6


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_captured_in_a_cuda_graph(device):
    tensors = put(device, scene(grid_points(128)[0], 12))
    expected = detops.assign_task_aligned(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        targets = detops.assign_task_aligned(*tensors)
    graph.replay()
    assert all(map(torch.equal, targets, expected))
