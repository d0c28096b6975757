"""assign_simota: equal to the dense definition in reference/simota.py, on every device."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import EDGES, edge_boxes, to_numpy
from reference import simota as reference
from yolo_scenes import grid_points, scene

OPTIONS = [
    {},
    {"topk": 1},
    {"topk": 32, "center_radius": 2.5},
    {"center_radius": 0.4, "dense_scores": False},
    {"center_radius": 0.05},
    {"iou_weight": 0.0},
    {"rule": "mmdet"},
    {"rule": "mmdet", "topk": 32, "center_radius": 0.4},
    {"rule": "mmdet", "center_radius": 9.0, "dense_scores": False},
]


def arguments_of(arrays, strides, seed=0, spread=3.0):
    """The arguments of assign_simota as arrays, with random logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, arrays.scores.shape)
    objectness = rng.normal(0, spread, logits.shape[:2])
    return [
        logits,
        objectness,
        arrays.boxes,
        arrays.points,
        strides,
        arrays.gt_boxes,
        arrays.gt_labels,
        arrays.gt_valid,
    ]


def as_probabilities(arrays):
    """The same predictions, as MMDetection's rule takes them."""
    return [1 / (1 + np.exp(-each)) if i < 2 else each for i, each in enumerate(arrays)]


def put(device, arrays, dtype=torch.float32, logits_dtype=None):
    dtypes = [logits_dtype or dtype] * 2 + [dtype] * 4 + [None, None]
    return [device.put(each, which) for each, which in zip(arrays, dtypes, strict=True)]


def scene_of(image_size=64, gts=9, **options):
    points, strides = grid_points(image_size)
    return arguments_of(scene(points, gts, **options), strides, options.get("seed", 0))


def check(tensors, **options):
    """The result for these tensors is the reference's; returns it."""
    targets = detops.assign_simota(*tensors, **options)
    arrays = [None if each is None else to_numpy(each) for each in tensors]
    expected = reference.assign_simota(*arrays, **options)
    dtypes = [torch.int64, tensors[5].dtype, tensors[0].dtype, torch.bool, torch.int64]
    assert [each.dtype for each in targets] == dtypes
    assert all(each.device == tensors[0].device for each in targets)
    for name, ours, theirs in zip(targets._fields, targets, expected, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(torch.as_tensor(theirs).to(ours.dtype)), name)
    return targets


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_scenes_of_three_levels(device, options, seed):
    arrays = scene_of(device.limit(128, emulated=64), 12, seed=seed)
    check(put(device, as_probabilities(arrays) if options.get("rule") == "mmdet" else arrays), **options)


@pytest.mark.parametrize("anchors", (0, 1, 2, 31, 32, 33, 64, 257))
@pytest.mark.parametrize("gts", (0, 1, 17, 65))
def test_sizes(device, anchors, gts):
    rng = np.random.default_rng(anchors)
    arrays = scene(rng.uniform(0, 128, (anchors, 2)), gts, seed=gts)
    check(put(device, arguments_of(arrays, rng.choice([8.0, 16, 32], anchors))))


@pytest.mark.parametrize("classes", (0, 1, 2, 3, 4, 5, 8, 80, 130))
def test_numbers_of_classes(device, classes):
    arrays = scene_of(gts=6 if classes else 0, classes=classes)
    for dtype in (torch.float16, torch.float32):
        tensors = put(device, arrays, torch.float32, dtype)
        dense, sparse = check(tensors), check(tensors, dense_scores=False)
        assert torch.equal(dense.labels, sparse.labels)


def test_k_follows_the_ious(device):
    # 12 predictions that fit perfectly: k = 10. Apart from them k = 1.
    n = 20
    points, box = np.full((n, 2), 32.0), [20.0, 20, 44, 44]
    boxes = np.tile([500.0, 500, 510, 510], (1, n, 1))
    for fitting, k in ((12, 10), (4, 4), (1, 1), (0, 1)):
        boxes[0, :fitting] = box
        boxes[0, fitting:] = [500, 500, 510, 510]
        arrays = [np.zeros((1, n, 2)), np.zeros((1, n)), boxes, points, np.full(n, 8.0), np.array([[box]]),
                  np.array([[1]]), np.array([[True]])]  # fmt: skip
        targets = check(put(device, arrays))
        assert targets.foreground[0].nonzero().flatten().tolist() == list(range(k))


def test_ties_go_to_the_lower_index(device):
    points, strides = grid_points(64)
    for seed in range(4):
        arrays = scene(points, 10, seed=seed, noise=0.0, levels=2)
        tensors = put(device, arguments_of(arrays, strides, spread=0.0))
        for center_radius in (0.3, 1.5, 4.0):
            check(tensors, center_radius=center_radius)


def test_crowded(device):
    size = device.limit(256, emulated=64)
    arrays = scene_of(size, device.limit(500, emulated=70), images=1, extent=size, size=50, noise=0.1)
    assert check(put(device, arrays)).foreground.float().mean() > 0.2


def test_no_candidate_at_all(device):
    arrays = scene_of()
    arrays[5] = arrays[5] + 1000  # all gts outside of the image
    targets = check(put(device, arrays))
    assert not targets.foreground.any() and (targets.labels == -1).all() and not targets.scores.any()
    arrays[7] = np.zeros_like(arrays[7])
    assert not check(put(device, arrays)).foreground.any()


def test_a_gt_without_near_anchors_takes_those_of_others(device):
    points = np.array([[10.0, 10], [18, 10], [26, 10]])
    gts = np.array([[[6.0, 6, 14, 14], [200, 200, 208, 208]]])
    arrays = [np.zeros((1, 3, 2)), np.zeros((1, 3)), np.tile(gts[:, :1], (1, 3, 1)), points, np.full(3, 8.0), gts,
              np.array([[0, 1]]), np.ones((1, 2), bool)]  # fmt: skip
    # Gt 1 claims anchor 0, the cheapest candidate, and loses it to gt 0.
    assert check(put(device, arrays), topk=2).gt_indices.tolist() == [[0, 0, -1]]
    assert check(put(device, arrays), topk=1).gt_indices.tolist() == [[0, -1, -1]]
    arrays[0][0, 0] = [9, -9]
    assert check(put(device, arrays), topk=1).gt_indices.tolist() == [[0, 1, -1]]


def test_candidates_and_favoured_anchors_of_mmdet(device):
    # Anchor 0 is near and inside of the gt, 1 inside only, 2 near only, 3 neither.
    points = np.array([[16.0, 16], [4, 16], [16, 22], [40, 40]])
    gts, strides = np.array([[[0.0, 12, 32, 20]]]), np.full(4, 4.0)
    arrays = [np.full((1, 4, 1), 0.5), np.ones((1, 4)), np.tile(gts, (1, 4, 1)), points, strides, gts,
              np.zeros((1, 1), int), np.ones((1, 1), bool)]  # fmt: skip
    tensors = put(device, arrays)
    found = check(tensors, rule="mmdet")  # all fit perfectly, so that three are wanted
    assert found.foreground.tolist() == [[True, True, True, False]]
    assert check(tensors, rule="yolox", center_radius=2.5).foreground.tolist() == [[True, False, True, False]]
    # One is wanted: the favoured one, whatever it costs, up to 1e5.
    arrays[2] = np.array([[[100.0, 100, 110, 110], [0, 12, 32, 20], [0, 12, 32, 20], [0, 12, 32, 20]]])
    arrays[2][0, 2:] += 1000
    assert check(put(device, arrays), rule="mmdet").foreground.tolist() == [[True, False, False, False]]
    assert check(put(device, arrays), rule="mmdet", iou_weight=1e4).foreground.tolist() == [[False, True, False, False]]
    # The objectness may be in the scores already.
    arrays = as_probabilities(scene_of())
    apart = put(device, arrays, torch.float64)
    joined = check([apart[0] * apart[1][..., None], None, *apart[2:]], rule="mmdet")
    assert all(map(torch.equal, joined, check(apart, rule="mmdet")))


@pytest.mark.parametrize("rule", ["yolox", "mmdet"])
def test_large_weights(device, rule):
    # A cost of an IoU of 1 is below 0, and much so by a large weight: it may be that of an anchor with the penalty.
    arrays = as_probabilities(scene_of()) if rule == "mmdet" else scene_of()
    arrays[2] = np.where(np.arange(arrays[2].shape[1])[:, None] % 3 > 0, arrays[5][:, :1], arrays[2])
    for weight in (1e6, 1e10, 1e12, 1e14):
        for dtype in (torch.float32, torch.float64):
            check(put(device, arrays, dtype), rule=rule, iou_weight=weight)
    # Gt 0 has a nearly perfect anchor that is near it, and a perfect one by the other gt, which is cheaper.
    weight, penalty = (1e11, 1e5) if rule == "mmdet" else (1e12, 1e6)
    side = 100 * (1 - penalty / weight * (1.005 if rule == "yolox" else 1.095))
    arrays = [np.ones((1, 2, 2)), np.ones((1, 2)), np.array([[[0, 0, 100, side], [0, 0, 100, 100]]]),
              np.array([[50.0, 50], [500, 500]]), np.full(2, 8.0),
              np.array([[[0.0, 0, 100, 100], [450, 450, 550, 550]]]), np.array([[0, 1]]),
              np.ones((1, 2), bool)]  # fmt: skip
    found = check(put(device, arrays, torch.float64), rule=rule, iou_weight=weight, topk=1)
    assert found.gt_indices.tolist() == [[-1, 0]]


@pytest.mark.parametrize("name", EDGES)
def test_odd_boxes(device, name):
    odd = edge_boxes(name)
    rng = np.random.default_rng(0)
    points = rng.uniform(-20, 40, (60, 2))
    points[:4] = [[np.nan, 5], [5, np.inf], [-np.inf, 5], [0, 0]]
    arrays = scene(points, len(odd), images=1, classes=2)
    boxes = np.random.default_rng(1).permutation(np.tile(odd, (60 // len(odd) + 1, 1)))[:60]
    arrays = arrays._replace(gt_boxes=odd[None], boxes=boxes[None])
    strides = rng.choice([8.0, 16.0, 0.0, -4.0, np.nan, np.inf], 60)
    for dtype in (torch.float32, torch.float64):
        check(put(device, arguments_of(arrays, strides), dtype))
        check(put(device, as_probabilities(arguments_of(arrays, strides)), dtype), rule="mmdet")


def test_odd_logits(device):
    arrays = scene_of()
    rng = np.random.default_rng(0)
    for spread in (1.0, 100.0):
        arrays[0] = rng.choice([np.nan, np.inf, -np.inf, 1e4, -1e4, spread, -spread, 0.0], arrays[0].shape)
        arrays[1] = rng.choice([np.inf, -np.inf, spread, 40.0, 0.0], arrays[1].shape)
        for center_radius in (0.5, 1.5):
            check(put(device, arrays), center_radius=center_radius)
    arrays[1][:] = np.nan
    check(put(device, arrays))
    for of_objects in ([0.5, 1.0, 0.0, 7.0, -1.0], [np.nan]):
        arrays[0] = rng.choice([np.nan, np.inf, -np.inf, -0.5, 0.0, 0.5, 1.0, 1.5], arrays[0].shape)
        arrays[1] = rng.choice(of_objects, arrays[1].shape)
        check(put(device, arrays), rule="mmdet")


def test_rows_that_are_not_valid_have_no_say(device):
    arrays = scene_of(gts=14)
    expected = check(put(device, arrays))
    for filler, label in ((np.nan, -1), (np.inf, 7), (0.0, 0), (32.0, 2)):
        padded = [*arrays[:5], np.where(arrays[7][..., None], arrays[5], filler),
                  np.where(arrays[7], arrays[6], label), arrays[7]]  # fmt: skip
        assert all(map(torch.equal, detops.assign_simota(*put(device, padded)), expected))


@pytest.mark.parametrize("shape", [(0, 84, 5), (2, 0, 5), (2, 84, 0), (0, 0, 0), (1, 1, 1)])
def test_empty(device, shape):
    images, anchors, gts = shape
    points, strides = grid_points(64)
    check(put(device, arguments_of(scene(points[:anchors], gts, images=images), strides[:anchors])))


def test_dtypes(device, boxes_dtype, scores_dtype):
    check(put(device, scene_of(), boxes_dtype, scores_dtype))
    check(put(device, as_probabilities(scene_of()), boxes_dtype, scores_dtype), rule="mmdet")


def test_inputs_of_any_strides_are_read_and_left_alone(device):
    plain = put(device, scene_of())
    expected = check(plain)
    head = torch.cat([plain[2], plain[1][..., None], plain[0]], -1)  # as YOLOX's: boxes, objectness, classes
    strided = [
        head[..., 5:],
        head[..., 4],
        head[..., :4],
        plain[3].t().contiguous().t(),
        plain[4].repeat_interleave(2)[::2],
        plain[5].permute(0, 2, 1).contiguous().permute(0, 2, 1),
        plain[6].t().contiguous().t(),
        plain[7].repeat_interleave(2, 1)[:, ::2],
    ]
    before = [each.clone() for each in strided]
    assert all(map(torch.equal, detops.assign_simota(*strided), expected))
    strided[0] = plain[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert all(map(torch.equal, detops.assign_simota(*strided), expected))
    assert all(map(torch.equal, strided[1:], before[1:]))


def test_no_gradient(device):
    tensors = [each.requires_grad_() if each.is_floating_point() else each for each in put(device, scene_of())]
    assert not any(each.requires_grad for each in detops.assign_simota(*tensors))


# Bad input.

GOOD = [
    *(torch.zeros(2, 7, 3), torch.zeros(2, 7), torch.zeros(2, 7, 4), torch.zeros(7, 2), torch.ones(7)),
    *(torch.zeros(2, 4, 4), torch.zeros(2, 4).long(), torch.ones(2, 4).bool()),
]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(7, 3), r"pred_logits must have shape \[B, A, C\], got \[7, 3\]"),
        (0, torch.zeros(2, 7, 3).long(), "pred_logits must be float16, bfloat16, float32 or float64, got int64"),
        (1, torch.zeros(2, 7, 1), r"pred_objectness must have shape \[2, 7\] as of pred_logits, got \[2, 7, 1\]"),
        (1, torch.zeros(2, 7).half(), r"pred_objectness must have the dtype of pred_logits \(float32\), got float16"),
        (2, torch.zeros(2, 6, 4), r"pred_boxes must have shape \[2, 7, 4\] as of pred_logits, got \[2, 6, 4\]"),
        (3, torch.zeros(7, 3), r"anchor_points must have shape \[7, 2\] as of pred_logits, got \[7, 3\]"),
        (4, torch.zeros(7, 1), r"anchor_strides must have shape \[7\] as of pred_logits, got \[7, 1\]"),
        (
            5,
            torch.zeros(2, 4, 5),
            r"gt_boxes must have shape \[B, M, 4\] with B = 2 as of pred_logits, got \[2, 4, 5\]",
        ),
        (6, torch.zeros(2, 4), "gt_labels must be int64, got float32"),
        (7, torch.zeros(2, 4), "gt_valid must be bool, got float32"),
    ],
)
def test_bad_tensors(device, position, value, message):
    tensors = [each.to(device.torch) for each in (*GOOD[:position], value, *GOOD[position + 1 :])]
    with pytest.raises(RuntimeError, match=f"^assign_simota: {message}$"):
        detops.assign_simota(*tensors)


@pytest.mark.parametrize("label", (-1, 3))
def test_label_that_is_no_class(device, label):
    arrays = scene_of(gts=5)
    arrays[6][1, 2], arrays[7][1, 2] = label, True
    if device.name == "cpu":
        with pytest.raises(RuntimeError, match=f"gt_labels must be from 0 to 2 where gt_valid, got {label}$"):
            detops.assign_simota(*put(device, arrays))
    else:  # without a synchronisation it can only be left out
        assert not (check(put(device, arrays)).gt_indices[1] == 2).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be from 1 to 32, got 0"),
        ({"topk": 33}, "topk must be from 1 to 32, got 33"),
        ({"center_radius": 0.0}, "center_radius must be finite and above 0, got 0.0"),
        ({"iou_weight": -1.0}, "iou_weight must be finite and at least 0, got -1.0"),
        ({"rule": "ppyoloe"}, "rule must be 'yolox' or 'mmdet', got 'ppyoloe'"),
        ({"topk": 2.5}, "topk must be an integer, got 2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^assign_simota: {message}$"):
        detops.assign_simota(*GOOD, **options)


@pytest.mark.parametrize(
    ("topk", "rule", "message"),
    [(0, 0, "topk must be from 1 to 32, got 0"), (33, 0, "topk must be .*, got 33"), (1, 2, "rule must be .*, got 2")],
)
def test_bad_options_of_the_op(device, topk, rule, message):
    with pytest.raises(RuntimeError, match=f"^assign_simota: {message}$"):
        _library.ops.assign_simota(*put(device, scene_of()), 1.5, topk, 3.0, True, rule)


def test_arguments_that_are_no_tensors():
    with pytest.raises(RuntimeError, match="^assign_simota: pred_objectness must be a tensor, got None$"):
        detops.assign_simota(GOOD[0], None, *GOOD[2:])
    with pytest.raises(RuntimeError, match="^assign_simota: gt_valid must be a tensor, got None$"):
        detops.assign_simota(*GOOD[:7], None)


# A PyTorch citizen, the same on every run.


def test_opcheck(device):
    for dense in (True, False):
        torch.library.opcheck(_library.ops.assign_simota, (*put(device, scene_of(32, 4)), 1.5, 10, 3.0, dense))
    torch.library.opcheck(_library.ops.assign_simota, (*put(device, scene_of(32, 4)), 1.5, 10, 3.0, True, 1))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    def use(*tensors):
        targets = detops.assign_simota(*tensors)
        return targets.scores.amax(1), targets.labels + 1, targets.boxes * targets.foreground[..., None]

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for size, gts in ((64, 5), (128, 9)):
        tensors = put(device, scene_of(size, gts))
        assert all(map(torch.equal, compiled(*tensors), use(*tensors)))


def test_export_with_any_number_of_boxes():
    class Assign(torch.nn.Module):
        def forward(self, *tensors):
            return detops.assign_simota(*tensors).labels

    def tensors_of(gts):
        tensors = [torch.as_tensor(each).float() for each in scene_of(64, gts)]
        return (*tensors[:6], tensors[6].long(), tensors[7].bool())

    gts = torch.export.Dim("gts")
    shapes = ((*[None] * 5, {1: gts}, {1: gts}, {1: gts}),)
    program = torch.export.export(Assign(), tensors_of(5), dynamic_shapes=shapes)
    assert torch.equal(program.module()(*tensors_of(31)), detops.assign_simota(*tensors_of(31)).labels)


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    tensors = put(device, scene_of(device.limit(256, emulated=64), 40, images=3))
    first = detops.assign_simota(*tensors)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, detops.assign_simota(*tensors), first))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_captured_in_a_cuda_graph(device):
    tensors = put(device, scene_of(128, 12))
    expected = detops.assign_simota(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        targets = detops.assign_simota(*tensors)
    graph.replay()
    assert all(map(torch.equal, targets, expected))
