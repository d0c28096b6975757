"""multiclass_nms: filter by score, best candidates, NMS by class, first K, for a batch and in fixed shapes."""

import time

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from reference import nms as reference

OPTIONS = {
    "defaults": {},
    "everything passes": dict(score_threshold=-1.0, max_detections=400),
    "few detections": dict(max_detections=3, iou_threshold=0.3),
    "one detection": dict(max_detections=1),
    "no detections": dict(max_detections=0),
    "few candidates": dict(max_candidates=20, max_detections=30),
    "one candidate": dict(max_candidates=1, max_detections=5),
    "no candidates": dict(max_candidates=0, max_detections=5),
    "more candidates than pairs": dict(max_candidates=10**12, max_detections=50),
    "agnostic": dict(class_agnostic=True),
    "agnostic, few candidates": dict(class_agnostic=True, max_candidates=50, iou_threshold=0.7),
    "agnostic, nothing suppressed": dict(class_agnostic=True, iou_threshold=1.0, max_detections=500),
    "nothing passes": dict(score_threshold=2.0),
    "infinite thresholds": dict(score_threshold=float("-inf"), iou_threshold=float("inf"), max_detections=70),
}


def assert_detections(detections, expected, boxes, scores):
    """Bit for bit, padding included; dtypes and device too."""
    assert type(detections).__name__ == "Detections"
    assert detections._fields == ("boxes", "scores", "labels", "indices", "counts")
    dtypes = (boxes.dtype, scores.dtype, torch.int64, torch.int64, torch.int64)
    for name, got, dtype, wanted in zip(detections._fields, detections, dtypes, expected, strict=True):
        assert got.dtype == dtype and got.device == boxes.device and got.is_contiguous(), name
        np.testing.assert_array_equal(to_numpy(got), wanted, err_msg=name)


def check(boxes, scores, **options):
    """The result for these tensors equals the reference; returns it."""
    detections = detops.multiclass_nms(boxes, scores, **options)
    # torch compares a scalar with a half tensor in half.
    threshold = torch.tensor(options.get("score_threshold", 0.05), dtype=scores.dtype).item()
    expected = reference.multiclass_nms(to_numpy(boxes), to_numpy(scores), **{**options, "score_threshold": threshold})
    assert_detections(detections, expected, boxes, scores)
    return detections


def batch(device, *shape, **kwargs):
    return tuple(device.put(array) for array in inputs.batch(*shape, **kwargs))


def boxes_apart(device, n):
    """[1, n, 4], none overlapping another."""
    corner = np.arange(n)[:, None] * 100.0
    return device.put((corner + [0, 0, 9, 9])[None])


# Against the reference.


@pytest.mark.parametrize("boxes_per_class", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(device, options, boxes_per_class):
    boxes, scores = batch(device, 3, device.limit(100, 30), 4, boxes_per_class=boxes_per_class)
    check(boxes, scores, **options)


@pytest.mark.parametrize(
    ("images", "n", "classes"),
    [
        *[(0, 10, 3), (2, 0, 3), (0, 0, 1), (1, 1, 1), (2, 31, 1)],
        *[(2, 32, 2), (1, 33, 5), (3, 64, 1), (2, 65, 3), (1, 7, 1000)],
    ],
)
def test_shapes(device, images, n, classes):
    for boxes_per_class in (False, True):
        boxes, scores = batch(device, images, n, classes, boxes_per_class=boxes_per_class)
        for options in ({}, dict(class_agnostic=True, max_detections=7), dict(score_threshold=-1.0, max_candidates=40)):
            check(boxes, scores, **options)


def test_a_detectors_head(device):
    boxes, scores = batch(device, 2, device.limit(8400, emulated=1000), 80, share=0.01)
    for options in ({}, dict(class_agnostic=True), dict(max_candidates=1000, max_detections=300)):
        check(boxes, scores, **options)
    head = torch.cat([boxes.transpose(1, 2), scores.transpose(1, 2)], dim=1)  # [B, 4 + C, N], as YOLO's
    check(head[:, :4].transpose(1, 2), head[:, 4:].transpose(1, 2))


# The CUDA kernel sorts 1024 candidates at once; 1100 are never made less.
@pytest.mark.parametrize("n", [1100, 8000])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_one_class_with_very_many_candidates(device, class_agnostic, ties, n):
    n = max(1100, device.limit(n))
    boxes, scores = batch(device, 2, n, 1, share=1.0)
    if ties:
        scores = device.put(inputs.tied_scores(2 * n, levels=5).reshape(2, n, 1))
    for max_candidates in (None, n // 2):
        options = dict(iou_threshold=0.7, max_detections=n, max_candidates=max_candidates)
        check(boxes, scores, class_agnostic=class_agnostic, **options)


# Enough to leave the lists of the classes for the index on the CPU.
@pytest.mark.parametrize("kind", inputs.KINDS)
@pytest.mark.parametrize("iou_threshold", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_many_detections(device, iou_threshold, kind):
    n = device.limit(1500, emulated=400)
    boxes = inputs.KINDS[kind](2 * n).reshape(2, n, 4)
    odd = inputs.edge_boxes("everything")
    boxes[1, : len(odd)] = odd  # not all of these has an index a cell for
    scores = device.put(inputs.tied_scores(6 * n, levels=700).reshape(2, n, 3))
    for options in ({}, dict(class_agnostic=True), dict(max_candidates=n)):
        options = dict(iou_threshold=iou_threshold, score_threshold=0.1, max_detections=2 * n, **options)
        check(device.put(boxes), scores, **options)
    check(device.put(boxes, torch.float64), scores, iou_threshold=iou_threshold, max_detections=600)


def test_very_many_detections_take_no_quadratic_time():
    n = 100_000
    boxes, scores = to_torch(inputs.uniform_boxes(n)[None]), to_torch(inputs.distinct_scores(n)[None, :, None])
    start = time.process_time()
    detections = detops.multiclass_nms(boxes, scores, iou_threshold=0.7, score_threshold=0.0, max_detections=n)
    assert time.process_time() - start < 3  # comparing with all kept boxes takes 7 s
    keep = detops.nms(boxes[0], scores[0, :, 0], 0.7)
    assert len(keep) > 50_000 and torch.equal(detections.indices[0, : len(keep)], keep)
    assert detections.counts.tolist() == [len(keep)]


def test_dtypes(device, boxes_dtype, scores_dtype):
    for boxes_per_class in (False, True):
        boxes, scores = inputs.batch(2, device.limit(80, 30), 3, boxes_per_class=boxes_per_class)
        boxes, scores = device.put(boxes, boxes_dtype), device.put(scores, scores_dtype)
        check(boxes, scores)
        check(boxes, scores, class_agnostic=True, max_candidates=60)


@pytest.mark.parametrize("name", inputs.EDGES)
def test_edges(device, name, boxes_dtype):
    boxes = device.put(inputs.edge_boxes(name), boxes_dtype).expand(2, -1, -1)
    for make in (inputs.distinct_scores, inputs.tied_scores, inputs.odd_scores):
        scores = device.put(make(boxes.shape[1] * 4).reshape(2, -1, 2))
        check(boxes, scores, max_detections=40)
        check(boxes, scores, max_detections=40, score_threshold=-2.0, iou_threshold=0.0)
        check(boxes, scores, max_detections=40, class_agnostic=True, iou_threshold=0.0)


def test_ties_go_to_the_lower_index_then_class(device):
    boxes, _ = batch(device, 2, 50, 4)
    for scores in (torch.full((2, 50, 4), 0.5), to_torch(inputs.tied_scores(400).reshape(2, 50, 4))):
        scores = scores.to(device.torch)
        for max_candidates in (None, 1, 30, 199):
            check(boxes, scores, max_candidates=max_candidates, iou_threshold=0.3, max_detections=60)
    detections = detops.multiclass_nms(boxes_apart(device, 3), device.put(np.ones((1, 3, 2))), max_detections=5)
    assert detections.indices.tolist() == [[0, 0, 1, 1, 2]] and detections.labels.tolist() == [[0, 1, 0, 1, 0]]


def test_inputs_of_any_strides(device):
    head = torch.cat([tensor.transpose(1, 2) for tensor in batch(device, 2, 60, 5)], dim=1)
    boxes, scores = head[:, :4].transpose(1, 2), head[:, 4:].transpose(1, 2)
    before = head.clone()
    check(boxes, scores)
    check(boxes, scores, class_agnostic=True)
    check(boxes[:, ::2], scores[:, ::2, 1:])
    check(boxes[:, :, None].expand(-1, -1, 5, -1), scores)
    check(boxes[:1].expand(3, -1, -1), scores[:1].expand(3, -1, -1))
    assert torch.equal(head, before)


# Written-out cases.


def test_the_score_threshold_is_strict_and_in_the_scores_dtype(device, scores_dtype):
    at = torch.tensor(0.05, dtype=scores_dtype)
    scores = torch.stack([at * 1.01, at, at * 0.99]).reshape(1, 3, 1).to(device.torch)
    detections = detops.multiclass_nms(boxes_apart(device, 3), scores, max_detections=3)
    assert detections.indices.tolist() == [[0, -1, -1]] and detections.counts.tolist() == [1]
    assert (scores > 0.05).flatten().tolist() == [True, False, False]  # torch agrees


def test_nan_scores_are_no_candidates_and_infinite_ones_are(device):
    scores = device.put([[[np.nan], [0.5], [np.inf], [-np.inf]]])
    detections = detops.multiclass_nms(boxes_apart(device, 4), scores, max_detections=4)
    assert detections.indices.tolist() == [[2, 1, -1, -1]] and detections.scores.tolist() == [[float("inf"), 0.5, 0, 0]]


def test_the_pairs_of_one_box_suppress_each_other_only_when_agnostic(device):
    boxes, scores = boxes_apart(device, 2), device.put([[[0.6, 0.9, 0.7], [0.1, 0.2, 0.3]]])
    by_class = detops.multiclass_nms(boxes, scores, max_detections=6)
    assert by_class.labels.tolist() == [[1, 2, 0, 2, 1, 0]] and by_class.indices.tolist() == [[0, 0, 0, 1, 1, 1]]
    agnostic = detops.multiclass_nms(boxes, scores, max_detections=6, class_agnostic=True)
    assert agnostic.labels.tolist() == [[1, 2, -1, -1, -1, -1]]
    assert agnostic.indices.tolist() == [[0, 1, -1, -1, -1, -1]]
    assert agnostic.boxes[0, 2:].eq(0).all() and agnostic.scores[0, 2:].eq(0).all() and agnostic.counts.tolist() == [2]


def test_candidates_are_counted_before_suppression(device):
    # The two best pairs overlap; the third would survive, but only two candidates enter.
    boxes = device.put([[[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]])
    scores = device.put([[[0.9], [0.8], [0.7]]])
    kept = [detops.multiclass_nms(boxes, scores, max_candidates=m).counts.item() for m in (0, 1, 2, 3, None)]
    assert kept == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_equals_filter_batched_nms_and_first_k_of_each_image(device, class_agnostic):
    boxes, scores = batch(device, 3, device.limit(300, 60), 6)
    detections = detops.multiclass_nms(boxes, scores, max_detections=50, class_agnostic=class_agnostic)
    for image in range(3):
        indices, labels = (scores[image] > 0.05).nonzero().unbind(1)
        best = scores[image, indices, labels]
        ids = torch.zeros_like(labels) if class_agnostic else labels
        keep = detops.batched_nms(boxes[image, indices], best, ids, 0.5)[:50]
        assert detections.counts[image].item() == len(keep)
        assert detections.indices[image, : len(keep)].tolist() == indices[keep].tolist()
        assert detections.labels[image, : len(keep)].tolist() == labels[keep].tolist()
        assert detections.scores[image, : len(keep)].tolist() == best[keep].tolist()


def test_drawn_batches(device):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    options = st.fixed_dictionaries(
        dict(
            iou_threshold=st.sampled_from([*inputs.THRESHOLDS, 0.25, 1 / 3]),
            score_threshold=st.sampled_from([0.0, -0.0, -1.0, 0.25, 0.5]),
            max_detections=st.integers(0, 30),
            max_candidates=st.one_of(st.none(), st.integers(0, 40)),
            class_agnostic=st.booleans(),
        )
    )

    @hypothesis.settings(max_examples=device.limit(200, 25), deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 4)), st.booleans(), st.integers(0, 999), options
    )
    def check_drawn(shape, boxes_per_class, seed, options):
        images, n, classes = shape
        shape = (images, n, classes) if boxes_per_class else (images, n)
        boxes = inputs.grid_boxes(int(np.prod(shape)), seed, cells=5).reshape(*shape, 4)
        make = inputs.odd_scores if seed % 2 else inputs.tied_scores
        scores = make(images * n * classes, seed).reshape(images, n, classes)
        check(device.put(boxes), device.put(scores), **options)

    check_drawn()


# Bad input.

BOXES, SCORES = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("iou_threshold", value) for value in (-0.1, float("nan"))],
        ("score_threshold", float("nan")),
        ("max_detections", -1),
        ("max_candidates", -1),
    ],
)
def test_bad_options(device, option, value):
    with pytest.raises(ValueError, match=f"^multiclass_nms: {option} must .*, got {value}"):
        detops.multiclass_nms(BOXES.to(device.torch), SCORES.to(device.torch), **{option: value})


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (torch.zeros(3, 4), SCORES, r"boxes must .*, got \[3, 4\]"),
        (torch.zeros(2, 3, 5), SCORES, r"boxes must .*, got \[2, 3, 5\]"),
        (torch.zeros(2, 3, 5, 5), SCORES, r"boxes must .*, got \[2, 3, 5, 5\]"),
        (torch.zeros(1, 2, 3, 5, 4), SCORES, r"boxes must .*, got \[1, 2, 3, 5, 4\]"),
        (BOXES, torch.zeros(2, 3), r"scores must .*, got \[2, 3\]"),
        (BOXES, torch.zeros(2, 4, 5), r"boxes must .* with B = 2, N = 4, C = 5, got \[2, 3, 4\]"),
        (BOXES, torch.zeros(1, 3, 5), r"boxes must .* with B = 1, N = 3, C = 5, got \[2, 3, 4\]"),
        (torch.zeros(2, 3, 6, 4), SCORES, r"boxes must .* with B = 2, N = 3, C = 5, got \[2, 3, 6, 4\]"),
        (BOXES.int(), SCORES, "boxes must be float16, bfloat16, float32 or float64, got int32"),
        (BOXES, SCORES.long(), "scores must be float16, bfloat16, float32 or float64, got int64"),
    ],
)
def test_bad_tensors(device, boxes, scores, message):
    with pytest.raises(RuntimeError, match=f"^multiclass_nms: {message}"):
        detops.multiclass_nms(boxes.to(device.torch), scores.to(device.torch))


def test_ops_called_by_name_check_their_options(device):
    boxes, scores = BOXES.to(device.torch), SCORES.to(device.torch)
    good = dict(iou_threshold=0.5, score_threshold=0.05, max_detections=5, max_candidates=None, class_agnostic=False)
    for option, value in [
        *[("iou_threshold", -0.5), ("iou_threshold", float("nan")), ("score_threshold", float("nan"))],
        *[("max_detections", -1), ("max_detections", 2**31), ("max_candidates", -1)],
    ]:
        with pytest.raises(RuntimeError, match=f"^multiclass_nms: {option} must .*, got"):
            _library.ops.multiclass_nms(boxes, scores, **{**good, option: value})


@pytest.mark.parametrize("shape", [(2, 0, 2**40), (2, 2**40, 0), (0, 2**31, 2**31), (1, 0, 2**62)])
def test_empty_scores_with_huge_sizes(device, shape):
    images, rows, _ = shape
    scores = torch.empty(*shape, device=device.torch)
    boxes = torch.empty(1, 1, 4, device=device.torch).expand(images, rows, 4)
    for given in (scores, torch.empty(images, shape[2], rows, device=device.torch).transpose(1, 2)):
        if images == 0:
            with pytest.raises(RuntimeError, match="^multiclass_nms: scores must have at most 2147418112 values per"):
                detops.multiclass_nms(boxes, given, max_detections=2)
        else:
            assert detops.multiclass_nms(boxes, given, max_detections=2).counts.tolist() == [0] * images


def test_scalars_of_other_kinds_as_options():
    boxes, scores = (to_torch(array) for array in inputs.batch(2, 30, 3))
    plain = dict(iou_threshold=0.5, score_threshold=0.25, max_detections=7, max_candidates=20, class_agnostic=True)
    kinds = dict(
        iou_threshold=np.float32(0.5),
        score_threshold=torch.tensor(0.25),
        max_detections=np.int64(7),
        max_candidates=np.array(20),
        class_agnostic=np.bool_(True),
    )
    expected = detops.multiclass_nms(boxes, scores, **plain)
    assert all(map(torch.equal, detops.multiclass_nms(boxes, scores, **kinds), expected))
    with pytest.raises(ValueError, match="^multiclass_nms: max_detections must be an integer, got 2.5"):
        detops.multiclass_nms(boxes, scores, max_detections=2.5)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    with pytest.raises(RuntimeError, match="^multiclass_nms: scores must be on the device of boxes"):
        detops.multiclass_nms(BOXES.to(device.torch), SCORES)


# A PyTorch citizen.


@pytest.mark.parametrize("options", [(0.5, 0.05, 20, None, False), (0.5, 0.05, 0, 30, True)], ids=str)
def test_opcheck(device, options):
    for shape in ((2, 30, 3), (0, 30, 3), (2, 0, 3)):
        for boxes_per_class in (False, True):
            tensors = batch(device, *shape, boxes_per_class=boxes_per_class)
            torch.library.opcheck(_library.ops.multiclass_nms, (*tensors, *options))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    def head(boxes, logits):
        detections = detops.multiclass_nms(boxes * 2, logits + 0.25, max_detections=30)
        return detections.boxes + 1, detections.scores, detections.labels, detections.counts

    compiled = torch.compile(head, fullgraph=True)
    for n in (40, 60):  # two sizes: the second makes N dynamic
        tensors = batch(device, 2, n, 3)
        for got, expected in zip(compiled(*tensors), head(*tensors), strict=True):
            assert torch.equal(got, expected)


def test_export_with_any_batch_and_number_of_boxes():
    class Head(torch.nn.Module):
        def forward(self, boxes, scores):
            return detops.multiclass_nms(boxes, scores, max_detections=30)

    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("n", min=2)}
    tensors = [to_torch(array) for array in inputs.batch(2, 40, 3)]
    program = torch.export.export(Head(), tuple(tensors), dynamic_shapes=(dims, dims))
    for shape in ((2, 40, 3), (5, 77, 3)):
        boxes, scores = (to_torch(array) for array in inputs.batch(*shape))
        expected = reference.multiclass_nms(to_numpy(boxes), to_numpy(scores), max_detections=30)
        assert_detections(program.module()(boxes, scores), expected, boxes, scores)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_is_captured_in_a_cuda_graph(device):
    boxes, scores = batch(device, 4, 2000, 20)
    for options in ({}, dict(class_agnostic=True), dict(max_candidates=500)):
        static_boxes, static_scores = boxes.clone(), scores.clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            detops.multiclass_nms(static_boxes, static_scores, **options)  # warm up, as capture asks for
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            detections = detops.multiclass_nms(static_boxes, static_scores, **options)
        for seed in (1, 2):  # a replay reads what the inputs hold then
            new_boxes, new_scores = batch(device, 4, 2000, 20, seed=seed)
            static_boxes.copy_(new_boxes)
            static_scores.copy_(new_scores)
            graph.replay()
            expected = reference.multiclass_nms(to_numpy(new_boxes), to_numpy(new_scores), **options)
            assert_detections(detections, expected, new_boxes, new_scores)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_does_not_wait_for_the_gpu(device):
    boxes, scores = batch(device, 2, 500, 10)
    expected = reference.multiclass_nms(to_numpy(boxes), to_numpy(scores))
    torch.cuda.set_sync_debug_mode("error")
    try:
        detections = detops.multiclass_nms(boxes, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_detections(detections, expected, boxes, scores)


# The same on every run.


def test_any_number_of_threads_gives_the_same_result(restore_threads):
    boxes, scores = (to_torch(array) for array in inputs.batch(3, 2000, 20))
    for class_agnostic in (False, True):
        options = dict(class_agnostic=class_agnostic, max_detections=300)
        expected = reference.multiclass_nms(to_numpy(boxes), to_numpy(scores), **options)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert_detections(detops.multiclass_nms(boxes, scores, **options), expected, boxes, scores)
