"""Areas, conversions and clipping of boxes, removal of small ones, and the boxes of masks."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import detops
from harness import Case, optional, reference

torchvision = optional("torchvision")


# Inputs


def uniform_boxes(n: int, device: str) -> tuple[torch.Tensor]:
    """Corners of boxes anywhere in 1000 x 1000 pixels, sides of 1 to 100."""
    generator = torch.Generator().manual_seed(n)
    corners = 1000 * torch.rand(n, 2, generator=generator)
    sides = 1 + 99 * torch.rand(n, 2, generator=generator)
    return (torch.cat([corners, corners + sides], dim=1).to(device),)


def discs(n: int, height: int, width: int, radius: float, device: str) -> tuple[torch.Tensor]:
    """Masks of one disc each, its centre anywhere, its radius up to a share of the height."""
    generator = torch.Generator().manual_seed(0)
    x, y, r = torch.rand(3, n, 1, 1, generator=generator)
    columns, rows = torch.arange(width), torch.arange(height)[:, None]
    return (
        ((columns - x * width).square() + (rows - y * height).square() < (r * radius * height).square()).to(device),
    )


# Cases


def numpy_peer(name: str, *arguments) -> Callable:
    """The NumPy reference, given tensors."""
    function = getattr(reference("boxes"), name)
    return lambda *inputs: function(*(t.cpu().numpy() for t in inputs), *arguments)


FUNCTIONS = {
    "box_area": (detops.box_area, ()),
    "box_convert cxcywh to xyxy": (detops.box_convert, ("cxcywh", "xyxy")),
    "box_convert xyxy to cxcywh": (detops.box_convert, ("xyxy", "cxcywh")),
    "clip_boxes_to_image": (detops.clip_boxes_to_image, ((600, 800),)),
    "remove_small_boxes": (detops.remove_small_boxes, (20.0,)),
}
PREDICTIONS = {  # for an H200, unmeasured; box_area writes a quarter of what the others write
    10: "320 bytes, 1 launch: 5 us",
    1_000: "32 kB, 1 launch: 5 us",
    100_000: "3.2 MB at 3.3 TB/s, 1 launch: 5 us",
}
SYNCHRONISING = "1 launch, nonzero and the size sync: 30 us"


def boxes_case(name: str, n: int, device: str) -> Case:
    function, arguments = FUNCTIONS[name]
    peers = {}
    if torchvision:
        theirs = getattr(torchvision.ops, function.__name__)
        peers["torchvision"] = lambda boxes: theirs(boxes, *arguments)
    if n <= 1_000 or not torchvision:
        peers["numpy"] = numpy_peer(function.__name__, *arguments or ("xyxy",))
    return Case(
        name=f"{name} {n:,}",
        make_inputs=partial(uniform_boxes, n, device),
        run=lambda boxes: function(boxes, *arguments),
        peers=peers,
        series=name,
        size=n,
        prediction=SYNCHRONISING if name == "remove_small_boxes" else PREDICTIONS[n],
    )


def masks_case(title: str, n: int, height: int, width: int, radius: float, device: str, **fields) -> Case:
    peers = {"torchvision": torchvision.ops.masks_to_boxes} if torchvision else {}
    if n * height * width <= 10**6 or not torchvision:
        peers["numpy"] = numpy_peer("masks_to_boxes")
    return Case(
        name=f"masks_to_boxes {n} x {height} x {width} {title}",
        make_inputs=partial(discs, n, height, width, radius, device),
        run=detops.masks_to_boxes,
        peers=peers,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for name in FUNCTIONS:
        for n in (10, 1_000, 100_000):
            yield boxes_case(name, n, device)

    yield masks_case("small discs", 10, 28, 28, 0.3, device, prediction="8 kB, 1 launch: 5 us")
    yield masks_case("small discs", 1_000, 28, 28, 0.3, device, prediction="0.8 MB, 1 launch: 6 us")
    if quick:
        return
    prediction = "41 MB at 3.3 TB/s: 13 us, and a launch more for the parts: 17 us"
    yield masks_case("discs", 100, 640, 640, 0.3, device, prediction=prediction)
    yield masks_case("small discs", 100, 640, 640, 0.03, device, prediction=prediction, measure_memory=True)
    yield masks_case("empty", 100, 640, 640, 0.0, device, prediction=prediction)
