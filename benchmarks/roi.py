"""RoI pooling with the shapes of Mask R-CNN and R-FCN, forward and with gradients."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

import detops
from harness import Case, optional, reference, tensors

torchvision = optional("torchvision")

IMAGE = (800, 1344)  # height and width in pixels
CHANNELS = 256
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]  # of a pyramid
HALF_DIFFERS = ["torchvision"]  # it takes the boxes in half precision, whose pixels are up to one apart
SAMPLE = 5  # RoIs that are compared with the NumPy reference where there is no peer


# Inputs


def proposals(count: int, images: int, generator: torch.Generator, sides: tuple[float, float]) -> torch.Tensor:
    """[count, 5], grouped by image; centres anywhere, sides from the first to the second, small ones more often."""
    size = torch.tensor([IMAGE[1], IMAGE[0]], dtype=torch.float32)
    centre = torch.rand(count, 2, generator=generator) * size
    low, high = torch.tensor(sides).log()
    side = (low + (high - low) * torch.rand(count, 2, generator=generator)).exp()
    index = torch.arange(count) * images // max(count, 1)
    return torch.cat([index[:, None], centre - side / 2, centre + side / 2], 1)


def maps(images: int, channels: int, strides: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(images, channels, IMAGE[0] // s, IMAGE[1] // s, generator=generator) for s in strides]


def make_inputs(
    count: int,
    images: int,
    strides: tuple[int, ...],
    device: str,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    channels: int = CHANNELS,
    sides: tuple[float, float] = (16.0, 224.0),
    rotated: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Boxes, and maps that are 1 / stride of the image."""
    generator = torch.Generator().manual_seed(0)
    boxes = proposals(count, images, generator, sides)
    if rotated:
        centre, side = (boxes[:, 1:3] + boxes[:, 3:]) / 2, boxes[:, 3:] - boxes[:, 1:3]
        boxes = torch.cat([boxes[:, :1], centre, side, 360 * torch.rand(count, 1, generator=generator)], 1)
    features = maps(images, channels, strides, generator)
    return boxes.to(device), *(f.to(device, dtype).contiguous(memory_format=FORMATS[layout]) for f in features)


# What runs


def on_one_map(function: Callable, size: int, options: tuple, **keywords) -> Callable:
    def run(boxes, input):
        # torchvision wants the boxes in the dtype of the features, where detops keeps them as they are.
        rows = boxes if function.__module__.startswith("detops") else boxes.to(input.dtype)
        return function(input, rows, size, *options, **keywords)

    return run


def on_pyramid(module, size: int, ratio: int) -> Callable:
    """The module, with the boxes of each image in a list of their own."""
    names = ["0", "1", "2", "3"]
    pool = module.MultiScaleRoIAlign(names, size, ratio)

    def run(boxes, *features):
        images = features[0].shape[0]
        per_image = len(boxes) // images
        lists = [part[:, 1:].to(features[0].dtype) for part in boxes.split(per_image)]
        return pool(dict(zip(names, features, strict=True)), lists, [IMAGE] * images)

    return run


def with_gradient(run: Callable) -> Callable:
    """The result, and the gradients of the features where that of the result is the result."""

    def forward_backward(boxes, *features):
        features = [f.detach().requires_grad_() for f in features]
        out = run(boxes, *features)
        out.backward(out.detach())
        return out.detach(), *(f.grad for f in features)

    return forward_backward


# Agreement


def close(ours, theirs) -> bool:
    """Within rounding of the largest value: the order of sums differs."""
    half = tensors(ours)[0].element_size() == 2
    limit = 3e-3 if half else 3e-5
    return all(
        torch.allclose(a.float(), b.float(), rtol=0, atol=limit * float(b.abs().max()))
        for a, b in zip(tensors(ours), tensors(theirs), strict=True)
    )


def follows_definition(result, boxes, *features, name: str, size: int, options: tuple) -> bool:
    """Some RoIs are what the NumPy reference gives."""
    out = tensors(result)[0]
    picked = torch.arange(0, len(boxes), max(1, len(boxes) // SAMPLE))
    bins = size * size if name.startswith("ps_") else 1
    values = [each[:, : 4 * bins].double().cpu().numpy() for each in features]
    input = values if name == "multi_scale_roi_align" else values[0]
    expected = getattr(reference("roi"), name)(input, boxes[picked].cpu().numpy(), (size, size), *options)
    found = out[picked.to(out.device), :4].double().cpu().numpy()
    return np.allclose(found, expected, rtol=0, atol=2e-3 if out.element_size() == 2 else 1e-3)


# Cases


def case(name: str, ours: Callable, theirs: Callable | None, inputs: dict, backward: bool = False, **fields) -> Case:
    wrap = with_gradient if backward else (lambda run: run)
    layout, dtype = inputs.get("layout", "contiguous"), inputs.get("dtype", torch.float32)
    notes = [layout, *([] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")])]
    return Case(
        name=f"{name}, {inputs['count']} RoIs, batch {inputs['images']}, {' '.join(notes)}"
        + (", forward and backward" if backward else ""),
        make_inputs=partial(make_inputs, **inputs),
        run=wrap(ours),
        peers={"torchvision": wrap(theirs)} if theirs else {},
        same=close,
        **fields,
    )


def align_case(count, images, size, ratio, inputs: dict, backward: bool = False, **fields) -> Case:
    """On the finest map of a pyramid."""
    options = (0.25, ratio, True)
    peer = on_one_map(torchvision.ops.roi_align, size, options) if torchvision else None
    half = "dtype" in inputs
    return case(
        f"roi_align {size} x {size}, {'adaptive' if ratio < 1 else f'sampling {ratio}'}",
        on_one_map(detops.roi_align, size, options),
        peer,
        {"count": count, "images": images, "strides": (4,), **inputs},
        backward,
        verify=None if peer and not half else partial(follows_definition, name="roi_align", size=size, options=options),
        may_differ=HALF_DIFFERS if half else (),
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    gpu = device == "cuda"
    base = {"device": device}
    for layout in FORMATS:
        for ratio in (2, -1):
            inputs = {**base, "layout": layout}
            asked = ">= 3x" if gpu else (">= 12x" if layout == "contiguous" else ">= 20x")
            yield align_case(256, 1, 7, ratio, inputs, asked=asked, prediction="69 + 13 MB: 25 us, 1 launch")
            if quick:
                continue
            floor = "" if gpu else "<= 2x the floor"
            yield align_case(1000, 1, 7, ratio, inputs, asked=floor, prediction="69 + 50 MB: 40 us, 1 launch")
            asked = ">= 3x" if gpu else ">= 7x"
            prediction = "two passes of 119 MB: 100 us, 4 launches"
            yield align_case(256, 1, 7, ratio, inputs, True, asked=asked, prediction=prediction)
    if not quick:
        for layout in FORMATS:
            yield align_case(100, 1, 14, 2, {**base, "layout": layout}, prediction="69 + 20 MB: 30 us, 1 launch")
        yield align_case(512, 2, 7, 2, base, prediction="138 + 26 MB: 50 us, 1 launch")
        half = {**base, "dtype": torch.float16}
        yield align_case(1000, 1, 7, 2, half, prediction="34 + 25 MB: 20 us, 1 launch")
        yield align_case(1000, 1, 7, 2, {**half, "layout": "channels_last"}, prediction="34 + 25 MB: 17 us, 1 launch")
    if torchvision:
        yield from pyramid_cases(base, quick, gpu)
    yield from other_cases(base, quick, gpu)


def pyramid_cases(base: dict, quick: bool, gpu: bool) -> Iterator[Case]:
    """RoIs of all sizes on four maps, as MultiScaleRoIAlign takes them."""
    strides, sides = (4, 8, 16, 32), (16.0, 800.0)
    for images in (1,) if quick else (1, 2, 8) if gpu else (1, 2):
        for layout in FORMATS:
            for backward in (False,) if quick or images > 1 else (False, True):
                yield case(
                    "MultiScaleRoIAlign 7 x 7, sampling 2",
                    on_pyramid(detops, 7, 2),
                    on_pyramid(torchvision.ops, 7, 2),
                    {"count": 1000 * images, "images": images, "strides": strides, "sides": sides, "layout": layout}
                    | base,
                    backward,
                    asked=(">= 3x" if backward else ">= 5x") if gpu else ("" if backward else ">= 12x"),
                    prediction="92 + 50 MB an image: 50 us, 2 launches" + ("; backward 60 us, 3" if backward else ""),
                )
    if not quick:
        inputs = {"count": 1000, "images": 1, "strides": strides, "sides": sides, "dtype": torch.float16} | base
        yield case(
            "multi_scale_roi_align 7 x 7, sampling 2",
            on_half_pyramid,
            on_pyramid(torchvision.ops, 7, 2),
            inputs | {"layout": "channels_last"},
            verify=partial(follows_definition, name="multi_scale_roi_align", size=7, options=(SCALES, 2)),
            may_differ=HALF_DIFFERS,
            prediction="46 + 25 MB: 25 us, 1 launch",
        )


def on_half_pyramid(boxes, *features):
    """All RoIs in one tensor, as detops takes them too."""
    return detops.multi_scale_roi_align(features, boxes, 7, spatial_scales=SCALES, sampling_ratio=2)


def other_cases(base: dict, quick: bool, gpu: bool) -> Iterator[Case]:
    rows = (
        (detops.roi_pool, (0.25,), (4,), CHANNELS, ">= 10x"),
        (detops.ps_roi_align, (1 / 16, 2), (16,), 10 * 49, ">= 10x"),
        (detops.ps_roi_pool, (1 / 16,), (16,), 10 * 49, ""),
    )
    for function, options, strides, channels, asked in rows:
        name = function.__name__
        for layout in ("contiguous",) if quick else FORMATS:
            for backward in (False,) if quick or name == "ps_roi_pool" else (False, True):
                inputs = {"count": 256, "images": 1, "strides": strides, "channels": channels, "layout": layout}
                peer = on_one_map(getattr(torchvision.ops, name), 7, options) if torchvision else None
                yield case(
                    f"{name} 7 x 7",
                    on_one_map(function, 7, options),
                    peer,
                    {**base, **inputs},
                    backward,
                    verify=None if peer else partial(follows_definition, name=name, size=7, options=options),
                    asked="" if backward or gpu else asked,
                    prediction="one pass over map and result: 30 us, 1 launch",
                )
    for name, options in (("roi_align_max", (0.25, 2, True)), ("roi_align_rotated", (0.25, 2))):
        function = detops.roi_align if name == "roi_align_max" else detops.roi_align_rotated
        inputs = {"count": 256, "images": 1, "strides": (4,), "rotated": name == "roi_align_rotated"}
        yield case(
            f"{name} 7 x 7, sampling 2",
            on_one_map(function, 7, options, **({"mode": "max"} if name == "roi_align_max" else {})),
            None,
            {**base, **inputs},
            verify=partial(follows_definition, name=name, size=7, options=options),
            prediction="69 + 13 MB: 60 us, 1 launch",
        )
