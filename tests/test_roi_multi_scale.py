"""multi_scale_roi_align and the modules of the RoI ops."""

import doctest
import sys

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_numpy
from reference import roi as reference
from roi_inputs import LAYOUTS, edge_rois, random_map, random_rois, tolerance
from test_roi_align import in_format_of

SCALES = [1 / 4, 1 / 8, 1 / 16]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def pyramid(dtype=torch.float32, layout="contiguous", channels=3, device="cpu", images=2):
    sizes = ((20, 28), (10, 14), (5, 7))
    return [
        random_map((images, channels, *size), dtype, layout, seed=i).to(device).requires_grad_()
        for i, size in enumerate(sizes)
    ]


def rois_of_all_sizes(n, seed=0):
    """On images of 112 x 80 pixels, with sides of 2 to 200."""
    return random_rois(n, 2, 112, 80, seed) * np.array([1, 1, 1, 1, 1])


def pool(features, boxes, size=(3, 2), **options):
    return detops.multi_scale_roi_align(features, boxes, size, spatial_scales=SCALES, canonical_scale=40, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_values_and_gradients(device, layout, dtype, ratio):
    features = pyramid(dtype, layout, device=device.torch)
    rows = np.concatenate([rois_of_all_sizes(device.limit(30, 12)), edge_rois()])
    boxes = device.put(rows, torch.float64 if dtype == torch.float64 else torch.float32)
    got = pool(features, boxes, sampling_ratio=ratio, aligned=True)
    arrays = [to_numpy(map).astype(np.float64) for map in features]
    expected = reference.multi_scale_roi_align(arrays, to_numpy(boxes), (3, 2), SCALES, ratio, True, canonical_scale=40)
    assert got.dtype == dtype and in_format_of(got, features[0])
    np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=4 * tolerance(dtype))
    weights = random_map(got.shape, dtype, seed=5).to(got.device)
    grads = torch.autograd.grad(got, features, weights)
    levels = [reference.level_of(row[1:], SCALES, 40) if np.isfinite(row).all() else 0 for row in to_numpy(boxes)]
    assert set(levels) == {0, 1, 2}
    for level, (grad, map) in enumerate(zip(grads, features, strict=True)):
        rows_here = np.array(levels) == level
        expected = reference.roi_align_gradient(
            to_numpy(weights)[rows_here].astype(np.float64),
            to_numpy(boxes)[rows_here],
            map.shape,
            SCALES[level],
            ratio,
            True,
        )
        atol = 4 * tolerance(dtype) * max(1, np.abs(expected).max())
        np.testing.assert_allclose(to_numpy(grad), expected, rtol=0, atol=atol)
        assert grad.dtype == dtype and in_format_of(grad, map)


def test_levels_on_their_thresholds(device):
    features = [torch.full((1, 1, 128, 128), float(i), device=device.torch) for i in range(4)]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    sides = np.concatenate([[112 * f, 224 * f, 448 * f] for f in (1, 1 - 1e-5, 1 - 1e-7, 1 + 1e-5)])
    for dtype in (torch.float32, torch.float64):
        boxes = device.put([[0, 0, 0, side, side] for side in sides], dtype)
        maps = [map.to(dtype) for map in features]
        got = detops.multi_scale_roi_align(maps, boxes, 1, spatial_scales=scales, sampling_ratio=1)
        expected = [np.clip(np.floor(4 + np.log2(side / 224) + 1e-6), 2, 5) - 2 for side in sides]
        np.testing.assert_array_equal(to_numpy(got.flatten()), expected)


@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_one_level_is_roi_align(device, layout, scale):
    features = pyramid(layout=layout, device=device.torch)[:1]
    boxes = device.put(rois_of_all_sizes(20))
    got = detops.multi_scale_roi_align(features, boxes, 2, spatial_scales=[scale])
    assert torch.equal(got, detops.roi_align(features[0], boxes, 2, scale))


def test_maps_of_two_formats_follow_the_first(device):
    features = pyramid(device=device.torch)
    mixed = [map.contiguous(memory_format=LAYOUTS[name]) for map, name in zip(features, [*LAYOUTS, "contiguous"])]  # noqa: B905
    boxes = device.put(rois_of_all_sizes(10))
    assert torch.equal(pool(mixed, boxes), pool(features, boxes))


def test_gradcheck(device, layout):
    features = [
        map.detach()[:, :1].contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        for map in pyramid(torch.float64, device=device.torch)[1:]
    ]
    boxes = device.put([[0, 4, 4, 30, 30], [1, 0, 0, 80, 70]], torch.float64)

    def function(*features):
        return detops.multi_scale_roi_align(
            list(features), boxes, 1, spatial_scales=SCALES[1:], canonical_scale=40, sampling_ratio=2
        )

    assert torch.autograd.gradcheck(function, features, nondet_tol=0)
    assert torch.autograd.gradgradcheck(function, features, nondet_tol=0)


def test_errors(device):
    features, boxes = [map.detach() for map in pyramid(device=device.torch)], device.put([[0.0, 0, 0, 1, 1]])
    name = "^multi_scale_roi_align: "
    with pytest.raises(RuntimeError, match=name + r"spatial_scales must have one value for each of the 3 maps, got 2$"):
        detops.multi_scale_roi_align(features, boxes, 2, spatial_scales=SCALES[:2])
    with pytest.raises(RuntimeError, match=name + r"features must agree in N and C, got \[2, 3, 20, 28\] and \[1, "):
        pool([features[0], features[1][:1], features[2]], boxes)
    with pytest.raises(RuntimeError, match=name + r"features must have one dtype, got float32 and float64$"):
        pool([features[0], features[1].double(), features[2]], boxes)
    with pytest.raises(RuntimeError, match=name + r"features must be 1 to 8 maps, got 9$"):
        detops.multi_scale_roi_align([features[0]] * 9, boxes, 2, spatial_scales=[0.5**i for i in range(9)])
    with pytest.raises(ValueError, match=name + r"features must be 1 to 8 maps, got none$"):
        detops.multi_scale_roi_align([], boxes, 2, spatial_scales=[])
    for scale in (0, -0.5, np.nan):
        with pytest.raises(ValueError, match=name + r"spatial_scales must be positive and finite, got "):
            detops.multi_scale_roi_align(features, boxes, 2, spatial_scales=[0.5, scale, 0.25])
    rule = r"spatial_scales must be powers of two, each half of the one before, got \[0\."
    for scales in ([1 / 4, 1 / 16], [0.3, 0.15], [1 / 4, 1 / 4], [1 / 8, 1 / 4], [1 / 4, 0.124]):
        with pytest.raises(ValueError, match=name + rule):
            detops.multi_scale_roi_align(features[:2], boxes, 2, spatial_scales=scales)


def test_opcheck(device, layout):
    features = pyramid(layout=layout, device=device.torch)
    boxes = device.put(rois_of_all_sizes(4))
    options = (SCALES, 2, 2, 2, True, 40.0, 4)
    torch.library.opcheck(_library.ops.multi_scale_roi_align, (features, boxes, *options))
    grad = torch.ones(4, 3, 2, 2, device=device.torch, requires_grad=True)
    sizes = [2, 3, 20, 28, 10, 14, 5, 7]
    last = layout == "channels_last"
    torch.library.opcheck(_library.ops.multi_scale_roi_align_backward, (grad, boxes, sizes, *options, last))


# Modules.

MODULES = {
    "RoIAlign": ((2, 0.5, 2), 3),
    "RoIPool": (((2, 1), 0.5), 3),
    "PSRoIAlign": ((2, 0.5, 2), 4),
    "PSRoIPool": ((2, 0.5), 4),
}


@pytest.mark.parametrize("module", ["roi", "roi_pooling", "roi_modules"])
def test_examples_of_the_docstrings(module):
    results = doctest.testmod(sys.modules[f"detops.{module}"], extraglobs={"torch": torch})
    assert results.attempted >= 3 and results.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_modules(device, name):
    arguments, channels = MODULES[name]
    module = getattr(detops, name)(*arguments)
    input = random_map((2, channels, 9, 12)).to(device.torch)
    boxes = device.put(random_rois(5, 2, 24, 18))
    function = {
        "RoIAlign": detops.roi_align,
        "RoIPool": detops.roi_pool,
        "PSRoIAlign": detops.ps_roi_align,
        "PSRoIPool": detops.ps_roi_pool,
    }[name]
    assert torch.equal(module(input, boxes), function(input, boxes, *arguments))


@pytest.mark.parametrize("name", MODULES)
def test_modules_show_themselves_as_those_of_torchvision(torchvision, name):
    arguments, _ = MODULES[name]
    assert repr(getattr(detops, name)(*arguments)) == repr(getattr(torchvision.ops, name)(*arguments))


def test_multi_scale_module(device, layout):
    names = ["p2", "p3", "p4"]
    maps = dict(zip([*names[:2], "other", names[2]], [*pyramid(layout=layout)[:2], None, pyramid(layout=layout)[2]]))  # noqa: B905
    maps = {name: map.to(device.torch) if map is not None else None for name, map in maps.items()}
    module = detops.MultiScaleRoIAlign(names, (3, 2), 2, canonical_scale=40)
    rows = rois_of_all_sizes(20)
    lists = [device.put(rows[rows[:, 0] == image, 1:]) for image in (0, 1)]
    got = module(maps, lists, [(80, 112), (76, 100)])
    expected = pool([maps[name] for name in names], lists, sampling_ratio=2)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="^MultiScaleRoIAlign: image_shapes must name at least one image, got none$"):
        module(maps, lists, [])
    with pytest.raises(ValueError, match=r"^MultiScaleRoIAlign: the maps must include some of \['p9'\]"):
        detops.MultiScaleRoIAlign(["p9"], 2, 2)(maps, lists, [(80, 112)])


@pytest.mark.parametrize("image", [(11, 100), (22, 110), (9, 900), (5, 640), (100, 11), (640, 5), (64, 64)], ids=str)
def test_scales_of_oblong_images(device, image):
    # Padding to multiples of 32 weighs much on the shorter side; the scale is that of the longer one.
    height, width = (-(-side // 32) * 8 for side in image)
    y, x = (torch.arange(float(side)).add(0.5).mul(4) for side in (height, width))
    maps = {"0": torch.stack([y[:, None].expand(-1, width), x.expand(height, -1)])[None].to(device.torch)}
    # Of ramps that say where a pixel lies in the image, half a pixel of the map off, as coordinates are.
    long = max(image)
    box = [0.3 * long, 2, 0.7 * long, 4] if image[1] >= image[0] else [2, 0.3 * long, 4, 0.7 * long]
    pooled = detops.MultiScaleRoIAlign(["0"], 2, 2)(maps, [device.put([box])], [image])
    along = to_numpy(pooled[0, 1, 0] if image[1] >= image[0] else pooled[0, 0, :, 0])
    np.testing.assert_allclose(along, [0.4 * long + 2, 0.6 * long + 2], rtol=1e-5)


def test_maps_and_images_without_a_pixel():
    for height, image in ((0, (8, 8)), (4, (0, 0))):
        with pytest.raises(ValueError, match="^MultiScaleRoIAlign: maps and images must have a pixel, got a map of "):
            detops.MultiScaleRoIAlign(["0"], 2, 2)({"0": torch.ones(1, 1, height, 4)}, [torch.ones(1, 4)], [image])


@pytest.mark.parametrize("ratio", [0, 2])
def test_multi_scale_module_equals_torchvision(torchvision, device, layout, ratio):
    names = ["0", "1", "2"]
    modules = [m.MultiScaleRoIAlign(names, 3, ratio, canonical_scale=40) for m in (detops, torchvision.ops)]
    assert repr(modules[0]) == repr(modules[1])
    rows = rois_of_all_sizes(60)
    lists = [torch.from_numpy(rows[rows[:, 0] == image, 1:]).float() for image in (0, 1)]
    results = []
    for module, where in zip(modules, (device.torch, "cpu"), strict=True):
        features = [map.detach().requires_grad_() for map in pyramid(layout=layout)]
        moved = dict(zip(names, [map.to(where) for map in features], strict=True))
        got = module(moved, [boxes.to(where) for boxes in lists], [(80, 112)] * 2).cpu()
        results.append((got, *torch.autograd.grad(got, features, random_map(got.shape, seed=4))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("heights", [(10, 5, 3, 2), (5, 3, 2, 1), (10, 10), (10, 5, 10)])
def test_multi_scale_module_with_rounded_scales_equals_torchvision(torchvision, device, heights):
    # The heights of small maps, rounded up, give scales that are not halves: of 40 pixels, 1/4, 1/8, 1/16 and 1/16.
    # torchvision then has fewer levels than maps.
    image = {10: 40, 5: 17}[heights[0]]
    names = [str(i) for i in range(len(heights))]
    rows = random_rois(60, 1, image, image)
    results = []
    for module, where in ((detops, device.torch), (torchvision.ops, "cpu")):
        features = [random_map((1, 3, h, h), seed=i).requires_grad_() for i, h in enumerate(heights)]
        moved = {name: map.to(where) for name, map in zip(names, features, strict=True)}
        boxes = [torch.from_numpy(rows[:, 1:]).float().to(where)]
        pool = module.MultiScaleRoIAlign(names, 3, 2, canonical_scale=image // 2, canonical_level=3)
        got = pool(moved, boxes, [(image, image)]).cpu()
        results.append((got, *torch.autograd.grad(got, features, random_map(got.shape, seed=4))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("heights", [(20, 5), (10, 20), (20, 10, 2)])
def test_multi_scale_module_without_a_map_for_each_level(device, heights):
    # torchvision returns zeros for the RoIs of the levels in between.
    maps = {str(i): torch.ones(1, 1, h, h, device=device.torch) for i, h in enumerate(heights)}
    message = (
        r"^MultiScaleRoIAlign: the maps must each be half as high as the one before, got heights \[.*for images of 80"
    )
    with pytest.raises(ValueError, match=message):
        detops.MultiScaleRoIAlign(list(maps), 2, 2)(maps, [device.put([[0.0, 0, 9, 9]])], [(80, 80)])


@pytest.mark.needs_compiler
def test_compile_and_export(layout):
    module = detops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=40)
    features = pyramid(layout=layout)
    rows = rois_of_all_sizes(12)
    lists = [torch.from_numpy(rows[rows[:, 0] == image, 1:]).float() for image in (0, 1)]

    def run(*features):
        return module(dict(zip("012", features, strict=True)), lists, [(80, 112)] * 2)

    expected = run(*features)
    compiled = torch.compile(run, fullgraph=True)(*features)
    assert torch.equal(compiled, expected)
    grads = [torch.autograd.grad(result.square().sum(), features) for result in (compiled, expected)]
    assert all(map(torch.equal, *grads))

    class Module(torch.nn.Module):
        def forward(self, first, second, third):
            return run(first, second, third)

    program = torch.export.export(Module(), tuple(map.detach() for map in features))
    assert torch.equal(program.module()(*features), expected)


@pytest.mark.needs_compiler
def test_compile_of_the_function():
    features = pyramid()
    boxes = torch.from_numpy(rois_of_all_sizes(12)).float()
    assert torch.equal(torch.compile(pool, fullgraph=True)(features, boxes), pool(features, boxes))
