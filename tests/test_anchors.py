"""Anchors on grids equal torchvision's; k-means equals the loops in reference/anchors.py."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import detops
from detops import _library
from inputs import NAN, to_numpy, to_torch
from reference import anchors as reference

METRICS = {"iou": 0, "euclidean": 1, "ratio": 2}
SIZES, RATIOS = ((32, 45), (64,), (128, 7.5, 300)), ((0.5, 1.0, 2.0), (1.0,), (0.3, 3.7))


def images(height, width, count=2):
    return SimpleNamespace(tensors=torch.zeros(count, 3, height, width), image_sizes=[(height, width)] * count)


def maps(*sizes, dtype=torch.float32):
    return [torch.zeros(2, 1, height, width, dtype=dtype) for height, width in sizes]


# Grids.


def test_grid_anchors():
    grids, strides = [(5, 7), (3, 4), (1, 1)], [8, 16, 100]
    anchors = detops.grid_anchors(grids, strides, SIZES, RATIOS)
    assert np.array_equal(to_numpy(anchors), reference.grid_anchors(grids, strides, SIZES, RATIOS))
    doubled = detops.grid_anchors(grids, strides, SIZES, RATIOS, dtype=torch.float64)
    assert torch.equal(doubled, anchors.double())
    flat = detops.grid_anchors(grids[:2], strides[:2], (32, 64), (1.0, 2.0))
    assert torch.equal(flat, detops.grid_anchors(grids[:2], strides[:2], ((32,), (64,)), ((1.0, 2.0),) * 2))
    uneven = detops.grid_anchors([(2, 2)], [(8, 4)], [16], [1.0])
    assert uneven[1].tolist() == [-4, -8, 12, 8] and uneven[2].tolist() == [-8, 0, 8, 16]
    assert detops.grid_anchors([(0, 5)], [8], [16]).shape == (0, 4)
    assert detops.grid_anchors([], [], []).shape == (0, 4)


@pytest.mark.parametrize("shape", [(64, 64), (800, 1344), (61, 77)], ids=str)
def test_torchvision_anchor_generator(torchvision, shape):
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    grids = [(max(1, shape[0] // s), max(1, shape[1] // s)) for s in (8, 16, 31)]
    for dtype in (torch.float32, torch.float64, torch.float16):
        ours, theirs = detops.AnchorGenerator(SIZES, RATIOS), utils.AnchorGenerator(SIZES, RATIOS)
        assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()
        got, expected = (
            ours(images(*shape), maps(*grids, dtype=dtype)),
            theirs(images(*shape), maps(*grids, dtype=dtype)),
        )
        assert len(got) == len(expected) == 2 and got[0].dtype == dtype
        assert all(map(torch.equal, got, expected))
    ours, theirs = detops.AnchorGenerator((32, 64, 128), (0.5, 1.0)), utils.AnchorGenerator((32, 64, 128), (0.5, 1.0))
    assert all(map(torch.equal, ours(images(*shape), maps(*grids)), theirs(images(*shape), maps(*grids))))


@pytest.mark.parametrize("options", [{}, {"steps": [8, 16]}, {"scales": [0.07, 0.15, 1.33], "clip": False}], ids=str)
def test_torchvision_default_box_generator(torchvision, options):
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
    ratios = [[2], [2, 3]]
    ours, theirs = detops.DefaultBoxGenerator(ratios, **options), utils.DefaultBoxGenerator(ratios, **options)
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()
    for shape, grids in (((300, 300), [(38, 38), (19, 19)]), ((511, 640), [(7, 9), (1, 2)])):
        got, expected = ours(images(*shape), maps(*grids)), theirs(images(*shape), maps(*grids))
        assert len(got) == 2 and all(map(torch.equal, got, expected))
    one = {"aspect_ratios": [[2]]}
    ours, theirs = detops.DefaultBoxGenerator(**one), utils.DefaultBoxGenerator(**one)
    assert torch.equal(ours(images(64, 64), maps((3, 3)))[0], theirs(images(64, 64), maps((3, 3)))[0])


def test_default_boxes_written_out():
    generator = detops.DefaultBoxGenerator([[4]], scales=[0.25, 1.0])
    (boxes, _) = generator(images(100, 200), maps((1, 1)))
    expected = [[75, 37.5, 125, 62.5], [50, 25, 150, 75], [50, 43.75, 150, 56.25], [87.5, 25, 112.5, 75]]
    assert boxes.tolist() == expected
    assert generator(images(100, 200), maps((1, 1), dtype=torch.float16))[0].dtype == torch.float32
    assert generator(images(100, 200), maps((1, 1), dtype=torch.float64))[0].dtype == torch.float64
    assert "scales=(0.25, 1.0)" in repr(generator)


def test_point_anchors():
    grids, strides = [(5, 7), (0, 3), (1, 2)], [8, 16, 32]
    for offset in (0.5, 0.0):
        found = detops.point_anchors(grids, strides, offset)
        points, of_points = reference.point_anchors(grids, strides, offset)
        assert np.array_equal(to_numpy(found.points), points) and np.array_equal(to_numpy(found.strides), of_points)
    assert detops.point_anchors(grids, strides, dtype=torch.float64).points.dtype == torch.float64
    assert detops.point_anchors([], []).points.shape == (0, 2)


def test_yolo_anchors():
    for version, shape in (
        ("v2", (1, 5)),
        ("v3", (3, 3)),
        ("v3-tiny", (2, 3)),
        ("v4", (3, 3)),
        ("v5", (3, 3)),
        ("v7", (3, 3)),
    ):
        anchors = detops.yolo_anchors(version)
        assert anchors.shape == (*shape, 2) and (anchors > 0).all()
        areas = anchors.prod(-1).flatten()
        assert version == "v2" or areas[0] == areas.min()
    assert detops.yolo_anchors("v3")[2, 2].tolist() == [373, 326]
    assert detops.yolo_anchors("v2")[0, 0].tolist() == pytest.approx([18.32736, 21.67632])
    with pytest.raises(ValueError, match="^yolo_anchors: version must be one of v2, v3, .*, got 'v8'"):
        detops.yolo_anchors("v8")


def test_cache():
    def make():
        return detops.grid_anchors([(3, 4)], [8], [32])

    first = make()
    assert make() is first and detops.grid_anchors([(3, 4)], [8], [32], dtype=torch.float64) is not first
    first += 1  # which a caller should not do
    again = make()
    assert again is not first and torch.equal(again, first - 1)
    with torch.inference_mode():
        inferred = detops.point_anchors([(9, 9)], [8])
    assert not inferred.points.is_inference()
    for size in range(40):
        detops.point_anchors([(size, 1)], [8])
    assert make() is not again and torch.equal(make(), again)


def test_bad_grids():
    with pytest.raises(ValueError, match=r"^AnchorGenerator: aspect_ratios must have one entry per sizes \(1\), got 2"):
        detops.AnchorGenerator(((32,),), ((1.0,), (2.0,)))
    with pytest.raises(ValueError, match="^grid_anchors: sizes must be positive and finite, got "):
        detops.grid_anchors([(1, 1)], [8], [0])
    with pytest.raises(ValueError, match="^grid_anchors: aspect_ratios must be positive and finite, got "):
        detops.grid_anchors([(1, 1)], [8], [8], [NAN])
    with pytest.raises(RuntimeError, match=r"^grid_anchors: feature_sizes must have one entry per sizes \(1\), got 2"):
        detops.AnchorGenerator(((32,),), ((1.0,),))(images(64, 64), maps((4, 4), (2, 2)))
    with pytest.raises(
        RuntimeError, match=r"^point_anchors: strides must have one entry per feature_sizes \(1\), got 2"
    ):
        detops.point_anchors([(1, 1)], [8, 16])
    with pytest.raises(ValueError, match="^point_anchors: strides must be positive and finite, got "):
        detops.point_anchors([(1, 1)], [0])
    with pytest.raises(ValueError, match="^point_anchors: strides must be one number per map, got "):
        detops.point_anchors([(1, 1)], [(8, 4)])
    with pytest.raises(ValueError, match=r"^DefaultBoxGenerator: steps must have one entry per map \(1\), got 2"):
        detops.DefaultBoxGenerator([[2]], steps=[8, 16])
    with pytest.raises(ValueError, match="^DefaultBoxGenerator: scales must be 2 numbers, got 1"):
        detops.DefaultBoxGenerator([[2]], scales=[0.1])
    with pytest.raises(RuntimeError, match="^DefaultBoxGenerator: feature_maps must be 1 maps, got 2"):
        detops.DefaultBoxGenerator([[2]])(images(64, 64), maps((4, 4), (2, 2)))


# k-means.


def shapes_of(n, kind="lognormal", seed=0):
    rng = np.random.default_rng(seed)
    return {
        "lognormal": lambda: np.exp(rng.normal(3.5, 0.9, (n, 1)) + rng.normal(0, 0.35, (n, 2))),
        "uniform": lambda: rng.uniform(5, 300, (n, 2)),
        "narrow": lambda: rng.normal(100, 5, (n, 2)),
        "integers": lambda: 8 * rng.integers(1, 12, (n, 2)).astype(np.float64),
    }[kind]()


def unit_shapes(n, seed=0, levels=0):
    """In (0, 1]; of few values if `levels` says so: ties come all the time."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, levels + 1, (n, 2)) / levels if levels else rng.uniform(1e-3, 1, (n, 2))
    return sizes.astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 127, 128, 129, 257, 1025])
def test_assignment(device, n, metric):
    n = device.limit(n, 300)
    for levels, k in ((0, 5), (4, 9), (0, 1)):
        sizes, anchors = unit_shapes(n, levels=levels), unit_shapes(k, 1, levels)
        labels, affinities = _library.ops.assign_sizes(device.put(sizes), device.put(anchors), METRICS[metric])
        expected = reference.assign_sizes(sizes, anchors, metric)
        assert np.array_equal(to_numpy(labels), expected[0]) and np.array_equal(to_numpy(affinities), expected[1])


@pytest.mark.parametrize("metric", ("iou", "euclidean"))
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (33, 3), (300, 9), (1500, 4)])
def test_lloyd(device, n, k, metric):
    n = device.limit(n, 400)
    for levels in (0, 6):
        sizes, start = unit_shapes(n, levels=levels), unit_shapes(k, 1, levels)
        for iterations in (0, 1, 3, 40):
            anchors, ran = _library.ops.kmeans_anchors(
                device.put(sizes), device.put(start), METRICS[metric], iterations
            )
            expected, expected_ran = reference.kmeans_anchors(sizes, start, metric, iterations)
            assert np.array_equal(to_numpy(anchors), expected) and ran.item() == expected_ran


def test_many_anchors(device):
    sizes, start = unit_shapes(1100), unit_shapes(1024, 1)
    sizes = sizes[: device.limit(1100, 300)]
    anchors, _ = _library.ops.kmeans_anchors(device.put(sizes), device.put(start), 1, 2)
    assert np.array_equal(to_numpy(anchors), reference.kmeans_anchors(sizes, start, "euclidean", 2)[0])


def test_many_sizes_on_many_threads():
    sizes, start = to_torch(unit_shapes(50_000)), to_torch(unit_shapes(9, 1))
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    for metric in (0, 1):
        expected = _library.ops.kmeans_anchors(sizes, start, metric, 20)
        assert all(map(torch.equal, _library.ops.kmeans_anchors(sizes[order], start, metric, 20), expected))


@pytest.mark.parametrize("metric", ("iou", "euclidean"))
def test_same_anchors_on_every_device(device, metric):
    for dtype in (torch.float32, torch.float16):
        sizes = device.put(shapes_of(device.limit(800, 150)), dtype)
        found = detops.kmeans_anchors(sizes, 5, metric=metric, seed=3)
        assert found.anchors.dtype == dtype and found.anchors.device == sizes.device
        with _library.use_namespace("detops"):
            expected = detops.kmeans_anchors(sizes.cpu(), 5, metric=metric, seed=3)
        assert torch.equal(found.anchors.cpu(), expected.anchors) and found[1:] == expected[1:]
        areas = found.anchors.float().prod(1)
        assert (areas.diff() >= 0).all()


def test_statistics():
    sizes = shapes_of(500)
    found = detops.kmeans_anchors(to_torch(sizes, torch.float64), 4)
    anchors = to_numpy(found.anchors)
    assert found.mean_iou == pytest.approx(reference.assign_sizes(sizes, anchors, "iou")[1].mean(), abs=1e-6)
    recall = (reference.assign_sizes(sizes, anchors, "ratio")[1] > -4).mean()
    assert found.best_possible_recall == pytest.approx(recall, abs=2.5 / 500)


def test_seeds_and_scales():
    sizes = to_torch(shapes_of(400))
    first = detops.kmeans_anchors(sizes, 6, seed=1)
    assert torch.equal(first.anchors, detops.kmeans_anchors(sizes, 6, seed=1).anchors)
    large = [detops.kmeans_anchors(sizes, 6, seed=seed).anchors for seed in (2**64 - 1, np.uint64(2**64 - 1))]
    assert torch.equal(*large)
    starts = [detops.kmeans_anchors(sizes, 6, metric="euclidean", seed=seed, max_iterations=0) for seed in (1, 2)]
    assert not torch.equal(starts[0].anchors, starts[1].anchors)
    for factor in (2.0**-60, 2.0**60):
        scaled = detops.kmeans_anchors(sizes * factor, 6, seed=1)
        assert torch.equal(scaled.anchors, first.anchors * factor) and scaled[1:] == first[1:]


def test_few_different_sizes():
    sizes = torch.tensor([[10.0, 20], [30, 5]]).repeat(20, 1)
    for metric in ("iou", "euclidean"):
        found = detops.kmeans_anchors(sizes, 5, metric=metric)
        assert found.mean_iou == 1 and found.best_possible_recall == 1
        assert {tuple(anchor) for anchor in found.anchors.tolist()} == {(10, 20), (30, 5)}
    alone = detops.kmeans_anchors(sizes[:1], 1)
    assert alone.anchors.tolist() == [[10, 20]]


@pytest.mark.parametrize("kind", ["lognormal", "uniform", "narrow", "integers"])
def test_not_worse_than_scikit_learn(kind):
    cluster = pytest.importorskip("sklearn.cluster")
    sizes = shapes_of(3000, kind)
    for k in (3, 9):
        for seed in range(3):
            theirs = cluster.KMeans(k, n_init=1, random_state=seed).fit(sizes).cluster_centers_
            values = [[reference.affinity(size, anchor, "iou") for anchor in theirs] for size in sizes[::1]]
            assert detops.kmeans_anchors(to_torch(sizes), k, seed=seed).mean_iou >= np.max(values, axis=1).mean()


def test_scikit_learn_from_the_same_start():
    cluster = pytest.importorskip("sklearn.cluster")
    sizes, start = unit_shapes(2000), unit_shapes(7, 1)
    fit = cluster.KMeans(7, init=start, n_init=1, tol=0, max_iter=30, algorithm="lloyd").fit(sizes)
    anchors, iterations = _library.ops.kmeans_anchors(to_torch(sizes), to_torch(start), 1, 30)
    np.testing.assert_allclose(to_numpy(anchors), fit.cluster_centers_, atol=1e-5)
    assert iterations.item() == fit.n_iter_


def test_bad_sizes(device):
    sizes = device.put(shapes_of(10))
    for metric in ("ratio", "IoU"):
        with pytest.raises(ValueError, match=f"^kmeans_anchors: metric must be 'iou' or 'euclidean', got '{metric}'"):
            detops.kmeans_anchors(sizes, 2, metric=metric)
    for k in (0, -1, 11):
        with pytest.raises(ValueError, match=rf"^kmeans_anchors: k must be from 1 to min\(N, 1024\) = 10, got {k}"):
            detops.kmeans_anchors(sizes, k)
    with pytest.raises(ValueError, match="^kmeans_anchors: max_iterations must be at least 0, got -1"):
        detops.kmeans_anchors(sizes, 2, max_iterations=-1)
    with pytest.raises(
        ValueError, match=r"^kmeans_anchors: seed must be from -2\^63 to 2\^64 - 1, got 18446744073709551616"
    ):
        detops.kmeans_anchors(sizes, 2, seed=2**64)
    for wrong in (sizes[:, :1], sizes[0], sizes.long()):
        with pytest.raises(RuntimeError, match=r"^kmeans_anchors: sizes must be floating of shape \[N, 2\], got "):
            detops.kmeans_anchors(wrong, 2)
    for value in (0, -1, NAN, math.inf):
        wrong = sizes.clone()
        wrong[4, 1] = value
        with pytest.raises(RuntimeError, match="^kmeans_anchors: sizes must be positive and finite, got some from "):
            detops.kmeans_anchors(wrong, 2)
    for wrong in ([[10.0, 10], [1e30, 1e30]], [[1e-30, 10.0], [10, 10]], [[1e-10, 1], [1e6, 1]]):
        match = r"^kmeans_anchors: sizes must be within a factor of 2\^50 / N = 5.63e\+14 of each other, got some from "
        with pytest.raises(RuntimeError, match=match):
            detops.kmeans_anchors(torch.tensor(wrong), 2)


@pytest.mark.parametrize("metric", ("iou", "euclidean"))
@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e25))
def test_sizes_of_the_widest_range(device, metric, scale):
    small, large = 2.0**-24, 2.0**24  # of four sizes
    sizes = scale * np.array([[small, small], [small * 1.5, small], [large, large], [large, large * 0.75]])
    found = detops.kmeans_anchors(device.put(sizes), 2 if metric == "euclidean" else 4, metric=metric)
    assert (found.anchors > 0).all() and found.anchors.isfinite().all() and 0.7 < found.mean_iou <= 1
    if metric == "iou":
        assert np.array_equal(to_numpy(found.anchors), sizes[[0, 1, 3, 2]].astype(np.float32))


def test_bad_arguments_of_the_ops(device):
    sizes = device.put(unit_shapes(4))
    for op, argument, options in (
        (_library.ops.assign_sizes, "anchors", ()),
        (_library.ops.kmeans_anchors, "start", (5,)),
    ):
        name = "assign_sizes" if argument == "anchors" else "kmeans_anchors"
        with pytest.raises(RuntimeError, match=rf"^{name}: sizes must have shape \[N, 2\], got \[4, 1\]"):
            op(sizes[:, :1], sizes, 0, *options)
        with pytest.raises(RuntimeError, match=f"^{name}: {argument} must be float32, got float64"):
            op(sizes, sizes.double(), 0, *options)
        with pytest.raises(RuntimeError, match=f"^{name}: {argument} must have 1 to 1024 rows, got 0"):
            op(sizes, sizes[:0], 0, *options)
        with pytest.raises(RuntimeError, match=rf"^{name}: metric must be in 0\.\.2, got 3"):
            op(sizes, sizes, 3, *options)
    with pytest.raises(RuntimeError, match="^kmeans_anchors: sizes must have at least 1 row, got 0"):
        _library.ops.kmeans_anchors(sizes[:0], sizes, 0, 5)
    with pytest.raises(RuntimeError, match="^kmeans_anchors: max_iterations must be at least 0, got -1"):
        _library.ops.kmeans_anchors(sizes, sizes, 0, -1)


# A PyTorch citizen.


def test_opcheck(device):
    sizes, anchors = device.put(unit_shapes(40)), device.put(unit_shapes(3, 1))
    for metric in METRICS.values():
        torch.library.opcheck(_library.ops.assign_sizes, (sizes, anchors, metric))
        torch.library.opcheck(_library.ops.kmeans_anchors, (sizes, anchors, metric, 4))


IMAGE = images(64, 64, 1)


def all_of_it(features, sizes, start):
    (anchors,) = detops.AnchorGenerator(((32,),), ((1.0, 2.0),))(IMAGE, [features])
    points = detops.point_anchors([tuple(features.shape[-2:])], [8])
    means, _ = _library.ops.kmeans_anchors(sizes, start, 0, 10)
    return anchors, *points, means, *_library.ops.assign_sizes(sizes, means, 0)


@pytest.mark.needs_compiler
def test_compile():
    inputs = torch.zeros(1, 1, 8, 8), to_torch(unit_shapes(40)), to_torch(unit_shapes(3, 1))
    expected = all_of_it(*inputs)
    assert all(map(torch.equal, torch.compile(all_of_it, fullgraph=True)(*inputs), expected))


def test_export():
    class All(torch.nn.Module):
        def forward(self, features, sizes, start):
            return all_of_it(features, sizes, start)

    inputs = torch.zeros(1, 1, 8, 8), to_torch(unit_shapes(40)), to_torch(unit_shapes(3, 1))
    exported = torch.export.export(All(), inputs, dynamic_shapes=(None, {0: torch.export.Dim("n")}, None)).module()
    others = inputs[0], to_torch(unit_shapes(77)), inputs[2]
    assert all(map(torch.equal, exported(*others), all_of_it(*others)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: detops.grid_anchors([(1, 1)], [math.inf], [32]), "grid_anchors: strides must be positive and finite"),
        (lambda: detops.grid_anchors([(1, 1)], [8], [math.inf]), "grid_anchors: sizes must be positive and finite"),
        (lambda: detops.grid_anchors([(2, -1)], [8], [32]), "grid_anchors: feature_sizes must be pairs of numbers of"),
        (lambda: detops.grid_anchors([(1, 2, 3)], [8], [32]), "grid_anchors: feature_sizes must be pairs of numbers"),
        (
            lambda: detops.grid_anchors([(1, 1)], [8], [32], dtype=torch.int64),
            "grid_anchors: dtype must be float16, bfloat16, float32 or float64",
        ),
        (
            lambda: detops.point_anchors([(1, 1)], [8], dtype=torch.int32),
            "point_anchors: dtype must be float16, bfloat16, float32 or float64",
        ),
        (lambda: detops.point_anchors([(1, 1)], [8], math.nan), "point_anchors: offset must be finite"),
        (
            lambda: detops.DefaultBoxGenerator([[0, 2]]),
            "DefaultBoxGenerator: aspect_ratios must be positive and finite",
        ),
        (
            lambda: detops.DefaultBoxGenerator([[2]], steps=[-8]),
            "DefaultBoxGenerator: steps must be positive and finite",
        ),
        (lambda: detops.DefaultBoxGenerator([[2]], min_ratio=math.nan), "DefaultBoxGenerator: scales must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}.*, got "):
        make()


def test_generators_refuse_maps_without_places():
    anchors, defaults = detops.AnchorGenerator(((32,),)), detops.DefaultBoxGenerator([[2]])
    with pytest.raises(RuntimeError, match="^AnchorGenerator: feature_maps must not be empty, got maps of"):
        anchors(images(64, 64), maps((0, 4)))
    for name, generator in (("AnchorGenerator", anchors), ("DefaultBoxGenerator", defaults)):
        with pytest.raises(RuntimeError, match=f"^{name}: feature_maps must be at least one map, got none"):
            generator(images(64, 64), [])
        with pytest.raises(RuntimeError, match=rf"^{name}: feature_maps must have shape \[B, C, h, w\], got \[3\]"):
            generator(images(64, 64), [torch.empty(3)])


# One cache for the process, whatever runs in it.


def made_by_all(grid=(4, 6)):
    """From all that the cache serves, on the CPU."""
    one_map = maps(grid)
    return [
        detops.grid_anchors([grid], [8], [32], device="cpu"),
        detops.grid_anchors([grid], [7.5], [32], device="cpu"),
        *detops.point_anchors([grid], [8], device="cpu"),
        detops.AnchorGenerator(((32,),))(images(64, 64, 1), one_map)[0],
        detops.DefaultBoxGenerator([[2]])(images(64, 64, 1), one_map)[0],
    ]


MODES = {
    "fake": torch._subclasses.FakeTensorMode,
    "function": torch.overrides.BaseTorchFunctionMode,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
}


def run_in(mode, run):
    if mode == "make_fx":
        return make_fx(lambda x: [each + x for each in run()], tracing_mode="fake")(torch.zeros(1))
    if mode == "functionalize":
        return torch.func.functionalize(lambda x: [each + x for each in run()])(torch.zeros(1))
    if mode == "vmap":
        return torch.func.vmap(lambda x: [each + x for each in run()])(torch.zeros(2))
    with MODES[mode]():
        return run()


@pytest.mark.parametrize("filled_before", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "make_fx", "functionalize", "vmap"])
def test_the_cache_keeps_nothing_of_modes_and_gives_them_nothing(mode, filled_before, monkeypatch):
    expected = [each.clone() for each in made_by_all()]
    monkeypatch.setattr(detops.anchors, "_cache", detops.anchors._Cache())
    if filled_before:
        made_by_all()
    if mode == "fake":
        with torch._subclasses.FakeTensorMode():
            found = made_by_all()
            assert all(isinstance(each, torch._subclasses.FakeTensor) for each in found)
            assert all(
                (each + torch.zeros(1)).shape == other.shape for each, other in zip(found, expected, strict=True)
            )
    elif mode != "device":  # where maps have no values
        run_in(mode, made_by_all)
    else:
        run_in(mode, lambda: [detops.grid_anchors([(4, 6)], [8], [32]), *detops.point_anchors([(4, 6)], [8])])
    found = made_by_all()
    assert all(type(each) is torch.Tensor and not each.is_inference() for each in found)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, [each + 0 for each in found], expected))


def test_a_gradient_that_one_caller_asks_for_is_not_everybodys():
    detops.grid_anchors([(4, 7)], [8], [32]).requires_grad_()
    assert not detops.grid_anchors([(4, 7)], [8], [32]).requires_grad


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_has_no_part_in_it(default, monkeypatch):
    expected = made_by_all((40, 63))
    monkeypatch.setattr(detops.anchors, "_cache", detops.anchors._Cache())
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        one_map = maps((40, 63))
        found = [
            detops.grid_anchors([(40, 63)], [8], [32]),
            detops.grid_anchors([(40, 63)], [7.5], [32]),
            *detops.point_anchors([(40, 63)], [8]),
            detops.AnchorGenerator(((32,),))(images(64, 64, 1), one_map)[0],
            detops.DefaultBoxGenerator([[2]])(images(64, 64, 1), one_map)[0],
        ]
    finally:
        torch.set_default_dtype(before)
    assert all(each.dtype == torch.float32 for each in found) and all(map(torch.equal, found, expected))


def test_the_default_device_has_no_part_in_it(monkeypatch):
    expected = made_by_all()
    monkeypatch.setattr(detops.anchors, "_cache", detops.anchors._Cache())
    one_map = maps((4, 6))
    image_list = images(64, 64, 1)
    with torch.device("meta"):
        found = [
            detops.grid_anchors([(4, 6)], [8], [32], device="cpu"),
            detops.grid_anchors([(4, 6)], [7.5], [32], device="cpu"),
            *detops.point_anchors([(4, 6)], [8], device="cpu"),
            detops.AnchorGenerator(((32,),))(image_list, one_map)[0],
            detops.DefaultBoxGenerator([[2]])(image_list, one_map)[0],
        ]
        assert detops.grid_anchors([(4, 6)], [8], [32], device="cpu") is found[0]
        assert detops.yolo_anchors("v3").device.type == "cpu"
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fractional_strides_keep_the_dtype(dtype):
    anchors = detops.grid_anchors([(9, 50)], [7.1], [32], [1.0], dtype=dtype)
    assert anchors.dtype == dtype
    y, x = np.meshgrid(np.arange(9) * 7.1, np.arange(50) * 7.1, indexing="ij")
    exact = torch.from_numpy(np.stack((x - 16, y - 16, x + 16, y + 16), -1).reshape(-1, 4))
    torch.testing.assert_close(anchors.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_sizes_stay_open_in_a_trace():
    class Both(torch.nn.Module):
        def forward(self, features):
            (anchors,) = detops.AnchorGenerator(((32,),))(images(64, 64, 1), [features])
            return anchors, *detops.point_anchors([features.shape[-2:]], [8])

    traced = torch.jit.trace(Both(), torch.zeros(1, 1, 8, 8))
    assert all(map(torch.equal, traced(torch.zeros(1, 1, 4, 16)), Both()(torch.zeros(1, 1, 4, 16))))


def test_numbers_of_numpy():
    grid, stride, array = np.array([3, 4]), np.int64(8), np.array([[32.0]])
    expected = detops.grid_anchors([(3, 4)], [8], [32.0], [1.0], dtype=torch.float16)
    assert detops.grid_anchors([grid], [stride], array, np.array([1.0]), dtype=torch.float16) is expected
    assert detops.point_anchors([grid], [stride], np.float32(0.5)) == detops.point_anchors([(3, 4)], [8])
    options = {"scales": np.array([0.25, 1.0]), "steps": np.array([32]), "clip": np.bool_(True)}
    assert repr(detops.DefaultBoxGenerator(np.array([[2]]), **options)) == repr(
        detops.DefaultBoxGenerator([[2]], scales=[0.25, 1.0], steps=[32])
    )
    assert repr(detops.AnchorGenerator(np.array([[32]]), np.array([[1.0]]))) == (
        "AnchorGenerator(sizes=((32,),), aspect_ratios=((1.0,),))"
    )
    with pytest.raises(ValueError, match="^grid_anchors: feature_sizes must be an integer, got 2.5"):
        detops.grid_anchors([(2.5, 1)], [8], [32])
    with pytest.raises(ValueError, match="^point_anchors: strides must be a number, got None"):
        detops.point_anchors([(2, 1)], [None])


@pytest.mark.parametrize("name", ["AnchorGenerator", "DefaultBoxGenerator"])
def test_generators_name_what_is_no_image_list_and_no_map(name):
    generator = {"AnchorGenerator": detops.AnchorGenerator(((32,),))}.get(name, detops.DefaultBoxGenerator([[2]]))
    with pytest.raises(RuntimeError, match=f"^{name}: image_list must have tensors and image_sizes, got None"):
        generator(None, maps((1, 1)))
    with pytest.raises(RuntimeError, match=rf"^{name}: feature_maps\[0\] must be a tensor, got a NumPy array"):
        generator(images(64, 64), [np.zeros((1, 1, 2, 2))])
    with pytest.raises(RuntimeError, match=f"^{name}: feature_maps must be a list of tensors, got a Tensor"):
        generator(images(64, 64), torch.zeros(1, 1, 2, 2))
