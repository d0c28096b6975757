"""match_detr: the cheapest assignment for the costs of reference/linear_sum_assignment.py."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_numpy, to_torch
from reference import linear_sum_assignment as reference

COSTS = {
    "detr": {},
    "rt_detr": dict(class_cost="focal", class_weight=2.0),
    "gamma": dict(class_cost="focal", class_weight=3.0, alpha=0.4, gamma=1.5, l1_weight=1.0, giou_weight=0.5),
    "class_only": dict(l1_weight=0.0, giou_weight=0.0),
    "box_only": dict(class_weight=0.0),
}


def scene(images, queries, classes, gts, seed=0, share=0.7):
    """Logits, boxes, gt_boxes, labels and which boxes are valid; boxes divided by the width and height of the image."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        return np.concatenate([rng.uniform(0.1, 0.9, (images, n, 2)), rng.uniform(0.05, 0.5, (images, n, 2))], -1)

    logits = rng.normal(0, 2, (images, queries, classes))
    return (
        logits,
        boxes(queries),
        boxes(gts),
        rng.integers(0, classes, (images, gts)),
        rng.random((images, gts)) < share,
    )


def put(device, arrays, dtype=None):
    return [device.put(each, None if each.dtype != np.float64 else dtype) for each in arrays]


def cost_of(arguments, image, options):
    """The costs of the reference for the valid boxes of an image, and the rows of these."""
    logits, boxes, gt_boxes, labels, valid = (None if each is None else to_numpy(each)[image] for each in arguments)
    rows = np.flatnonzero(np.ones(len(labels)) if valid is None else valid)
    options = {name: value for name, value in options.items() if name != "invalid"}
    weights = [options.pop(f"{name}_weight", default) for name, default in (("class", 1.0), ("l1", 5.0), ("giou", 2.0))]
    cost = reference.match_detr(logits, boxes, gt_boxes[rows], labels[rows], weights=weights, **options)
    return cost, rows


def check(arguments, **options):
    """The assignment is as cheap as can be, and the only one that is (but for floating-point noise)."""
    found = detops.match_detr(*arguments, **options)
    assert found.dtype == torch.int64 and found.shape == arguments[2].shape[:2] and found.device == arguments[0].device
    for image, queries in enumerate(to_numpy(found)):
        cost, rows = cost_of(arguments, image, options)
        assert (np.delete(queries, rows) == -1).all()
        own = queries[rows]
        assert reference.is_assignment(own, *cost.shape) and (own >= 0).sum() == min(cost.shape)
        if cost.shape[1] <= cost.shape[0]:
            assert own.tolist() == reference.cheapest(cost).tolist()
        else:
            query_of = reference.cheapest(cost.T)
            assert [own[target] for target in query_of] == list(range(len(cost)))
    return found


@pytest.mark.parametrize("gts", [0, 1, 5, 13])
@pytest.mark.parametrize("queries", [1, 9, 33])
@pytest.mark.parametrize("costs", COSTS)
def test_sizes(device, queries, gts, costs):
    arrays = scene(2, queries, 7, gts)
    if costs == "class_only":  # else boxes of one class tie
        arrays[3][:] = np.arange(gts) % 7
        arrays[4][:, 7:] = False
    for dtype in (torch.float32, torch.float64):
        check(put(device, arrays, dtype), **COSTS[costs])
    check([*put(device, arrays)[:4], None] if costs != "class_only" else put(device, arrays), **COSTS[costs])


@pytest.mark.parametrize("classes", [1, 2, 31, 32, 33, 91])
def test_numbers_of_classes(device, classes):
    for costs in ("detr", "rt_detr"):
        check(put(device, scene(2, 20, classes, 6)), **COSTS[costs])


def test_class_cost_decides_as_computed(device):
    # One box, so that the assignment is the first of the least costs: it shows the costs to the bit.
    for seed in range(4):
        for costs in ("detr", "rt_detr", "gamma", "box_only"):
            arguments = put(device, scene(3, 40, 5, 1, seed, share=1))
            for each in arguments[:2]:
                each[:, 20:] = each[:, :20]  # ties
            found = detops.match_detr(*arguments, **COSTS[costs])
            expected = [cost_of(arguments, image, COSTS[costs])[0].argmin() for image in range(3)]
            assert found[:, 0].tolist() == expected


def test_large_logits(device):
    arguments = put(device, scene(1, 12, 4, 3, share=1))
    for scale in (50, 1e4):
        arguments[0] = arguments[0].sign() * scale + arguments[0]
        for costs in ("detr", "rt_detr"):
            check(arguments, **COSTS[costs])
    masked = put(device, scene(1, 12, 4, 3, share=1))
    masked[0][:, :, 3] = -float("inf")  # a class that is ruled out
    masked[3][:] = masked[3] % 3
    check(masked)


def test_formats(device):
    arguments = put(device, scene(2, 20, 5, 6), torch.float64)
    of_centres = detops.match_detr(*arguments)
    for i in (1, 2):
        arguments[i] = detops.box_convert(arguments[i], "cxcywh", "xyxy")
    assert torch.equal(check(arguments, fmt="xyxy"), of_centres)


def test_rows_that_are_not_valid_have_no_say(device):
    arrays = scene(3, 20, 5, 9)
    arrays[4][1] = False
    results = []
    for filler in (np.nan, np.inf, 0.5):
        arrays[2][~arrays[4]] = filler
        arrays[3][~arrays[4]] = -5 if filler == 0.5 else 99
        results.append(check(put(device, arrays)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert (results[0][1] == -1).all()


def test_costs_stay_within_their_image(device):
    arguments = put(device, scene(4, 15, 5, 6))
    together = detops.match_detr(*arguments)
    for i in range(4):
        assert torch.equal(detops.match_detr(*(each[i : i + 1] for each in arguments))[0], together[i])


def test_dtypes_and_strides(device, boxes_dtype):
    arrays = scene(2, 20, 5, 6)
    arguments = put(device, arrays, boxes_dtype)
    wide = [each.float() if each.is_floating_point() and each.element_size() == 2 else each for each in arguments]
    assert torch.equal(detops.match_detr(*arguments), check(wide))
    arguments[3] = arguments[3].to(torch.int32)
    assert torch.equal(detops.match_detr(*arguments), check(wide))
    views = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in wide]
    assert torch.equal(detops.match_detr(*views), check(wide))


def test_empty(device):
    for images, queries, gts in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        found = detops.match_detr(*put(device, scene(images, queries, 5, gts)))
        assert found.shape == (images, gts) and (found == -1).all()


def test_equals_eager_pytorch_and_scipy(device):
    optimize = pytest.importorskip("scipy.optimize")
    logits, boxes, gt_boxes, labels, valid = put(device, scene(3, 60, 20, 12))
    found = detops.match_detr(logits, boxes, gt_boxes, labels, valid)
    for i in range(3):
        rows = valid[i].nonzero()[:, 0]
        probability = logits[i].softmax(-1)[:, labels[i, rows]]
        corners = [detops.box_convert(each, "cxcywh", "xyxy") for each in (boxes[i], gt_boxes[i, rows])]
        giou = detops.generalized_box_iou(*corners)
        cost = 5 * torch.cdist(boxes[i], gt_boxes[i, rows], p=1) - probability - 2 * giou
        queries, targets = optimize.linear_sum_assignment(cost.cpu().numpy())
        assert found[i, rows[targets]].tolist() == queries.tolist()


@pytest.mark.parametrize("what", ["logits", "boxes", "gt_boxes"])
def test_costs_that_are_no_numbers(device, what):
    arguments = put(device, scene(3, 9, 5, 4, share=1))
    arguments[("logits", "boxes", "gt_boxes").index(what)][1, 2] = float("nan")
    with pytest.raises(RuntimeError, match="^match_detr: costs must be numbers, got NaN or -inf in image 1, as of"):
        detops.match_detr(*arguments, invalid="raise")
    found, last = detops.match_detr(*arguments), detops.match_detr(*arguments, invalid="last")
    assert reference.is_assignment(to_numpy(found)[1], 9, 4)
    if what == "gt_boxes":
        assert (found[1] >= 0).tolist() == [True, True, False, True]
        assert (last[1] >= 0).all() and torch.equal(found[found >= 0], last[found >= 0])
    else:
        assert (found[1] >= 0).all() and (found[1] != 2).all() and torch.equal(found, last)
    # The three queries of three that are left are taken last too.
    few = [each[:, :3] if i < 2 else each for i, each in enumerate(arguments)]
    if what != "gt_boxes":
        assert (detops.match_detr(*few)[1] >= 0).sum() == 2
        assert (detops.match_detr(*few, invalid="last")[1] >= 0).sum() == 3


@pytest.mark.parametrize("fmt", ["cxcywh", "xyxy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_boxes_without_area_have_iou_0(device, fmt, dtype):
    for seed in range(4):
        arguments = put(device, scene(2, 9, 5, 4, seed, share=1), dtype)
        if fmt == "xyxy":
            arguments[1:3] = [detops.box_convert(each, "cxcywh", "xyxy") for each in arguments[1:3]]
        point = torch.tensor([0.5, 0.5, 0.5, 0.5] if fmt == "xyxy" else [0.5, 0.5, 0, 0], device=device.torch)
        line = torch.tensor([0.5, 0.25, 0.5, 0.75] if fmt == "xyxy" else [0.5, 0.5, 0, 0.5], device=device.torch)
        arguments[1][:, 2], arguments[1][:, 5] = point, line
        arguments[2][:, 1], arguments[2][:, 3] = line + seed % 2 / 8, point
        check(arguments, fmt=fmt)
        check(arguments, fmt=fmt, invalid="raise")
    # One like the other goes to it.
    boxes = torch.tensor([[[0.25, 0.25, 0, 0], [0.75, 0.75, 0, 0.0]]], device=device.torch)
    labels = torch.zeros(1, 2, dtype=torch.int64, device=device.torch)
    assert detops.match_detr(torch.zeros(1, 2, 3, device=device.torch), boxes, boxes, labels).tolist() == [[0, 1]]


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range(device, label):
    arguments = put(device, scene(2, 9, 5, 4, share=1))
    arguments[3][1, 2] = label
    if device.name == "cpu":
        message = rf"^match_detr: gt_labels must be from 0 to C - 1 \(4\) where valid, got {label}$"
        with pytest.raises(RuntimeError, match=message):
            detops.match_detr(*arguments)
    else:
        found = [detops.match_detr(*arguments, invalid=invalid) for invalid in ("forbid", "raise", "last")]
        arguments[4][1, 2] = False
        for each in found:
            assert torch.equal(each, detops.match_detr(*arguments))


L, X, G, Y, V = (to_torch(each) for each in scene(2, 6, 5, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((L[0], X, G, Y, V), r"logits must have shape \[B, Q, C\], got \[6, 5\]"),
        ((L, X[:, 1:], G, Y, V), r"boxes must have shape \[B, Q, 4\] with .*, got \[2, 5, 4\]"),
        ((L, X, G[:1], Y, V), r"gt_boxes must have shape \[B, M, 4\] with .*, got \[1, 3, 4\]"),
        ((L, X, G, Y[:, 1:], V), r"gt_labels must have shape \[B, M\] with .*, got \[2, 2\]"),
        ((L, X, G, Y.float(), V), "gt_labels must be int64, got float32"),
        ((L, X, G, Y, V[:, 1:]), r"gt_valid must have one value per box of gt_boxes .*, got \[2, 2\]"),
        ((L, X, G, Y, V.long()), "gt_valid must be bool, got int64"),
    ],
)
def test_bad_tensors(device, arguments, message):
    with pytest.raises(RuntimeError, match=f"^match_detr: {message}$"):
        detops.match_detr(*(each.to(device.torch) for each in arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_cost": "bce"}, "class_cost must be 'softmax' or 'focal', got 'bce'"),
        ({"fmt": "xywh"}, "fmt must be 'cxcywh' or 'xyxy', got 'xywh'"),
        ({"l1_weight": float("inf")}, "l1_weight must be finite, got inf"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"gamma": -1.0}, "gamma must be finite and at least 0, got -1.0"),
        ({"invalid": None}, "invalid must be 'forbid', 'raise' or 'last', got None"),
        ({"l1_weight": "5"}, "l1_weight must be a number, got '5'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^match_detr: {message}$"):
        detops.match_detr(L, X, G, Y, V, **options)


def test_no_gradient(device):
    arguments = put(device, scene(2, 6, 5, 3))
    arguments[0].requires_grad_()
    assert not detops.match_detr(*arguments).requires_grad


def test_opcheck(device):
    arguments = put(device, scene(2, 9, 5, 4))
    for focal, valid in ((False, arguments[4]), (True, None)):
        options = (*arguments[:4], valid, focal, 1.0, 5.0, 2.0, 0.25, 2.0, False)
        torch.library.opcheck(_library.ops.match_detr, options)
        torch.library.opcheck(_library.ops.match_detr, (*options, 2))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: detops.match_detr(*arguments) + 1, fullgraph=True)
    for gts in (5, 7):
        arguments = put(device, scene(2, 9, 5, gts))
        assert torch.equal(compiled(*arguments), detops.match_detr(*arguments) + 1)


def test_export():
    class Match(torch.nn.Module):
        def forward(self, *arguments):
            return detops.match_detr(*arguments)

    example = tuple(to_torch(each) for each in scene(2, 9, 5, 4))
    gts = torch.export.Dim("gts")
    shapes = ({}, {}, {1: gts}, {1: gts}, {1: gts})
    program = torch.export.export(Match(), example, dynamic_shapes={"arguments": shapes})
    arguments = [to_torch(each) for each in scene(2, 9, 5, 8)]
    assert torch.equal(program.module()(*arguments), Match()(*arguments))


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    arguments = put(device, scene(4, 40, 5, 9))
    first = detops.match_detr(*arguments)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(detops.match_detr(*arguments), first)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    arguments = put(device, scene(2, 40, 5, 9))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for costs in ("detr", "rt_detr"):
            detops.match_detr(*arguments, **COSTS[costs])
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("argument", ["logits", "boxes", "gt_boxes", "gt_labels"])
def test_complex_numbers_are_refused(argument):
    tensors = {"logits": torch.zeros(1, 2, 3), "boxes": torch.zeros(1, 2, 4), "gt_boxes": torch.zeros(1, 1, 4)}
    tensors["gt_labels"] = torch.zeros(1, 1, dtype=torch.int64)
    tensors[argument] = tensors[argument].to(torch.complex64)
    with pytest.raises(RuntimeError, match=f"^match_detr: {argument} must be real, got complex64$"):
        detops.match_detr(**tensors)
