"""Pairwise IoU and its relatives, forward and backward, the fused best match, and rotated boxes."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Case, optional, reference, same

import detops

torchvision = optional("torchvision")


# Inputs


def boxes(n: int, seed: int) -> torch.Tensor:
    """Boxes with centres anywhere in 1000 x 1000 pixels and sides of 10 to 100."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1000 * torch.rand(n, 2, generator=generator)
    half_sides = 5 + 45 * torch.rand(n, 2, generator=generator)
    return torch.cat([centres - half_sides, centres + half_sides], dim=1)


def rotated_boxes(n: int, seed: int) -> torch.Tensor:
    """The same as (centre x, centre y, width, height, angle), turned anyhow."""
    upright = detops.box_convert(boxes(n, seed), "xyxy", "cxcywh")
    angles = 360 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))
    return torch.cat([upright, angles], dim=1)


def pair(n: int, m: int, device: str, make: Callable = boxes) -> tuple[torch.Tensor, torch.Tensor]:
    return make(n, seed=n).to(device), make(m, seed=m + 1).to(device)


# Peers


def forward_backward(function: Callable, boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of the sum of all pairs with respect to both."""
    boxes1, boxes2 = boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()
    return torch.autograd.grad(function(boxes1, boxes2).sum(), (boxes1, boxes2))


def max_of_matrix(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torchvision.ops.box_iou(boxes1, boxes2).max(1))


def close(ours, theirs) -> bool:
    """Equal but for the rounding of sums and of atan."""
    ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def equals_reference(kind: str, result: torch.Tensor, boxes1: torch.Tensor, boxes2: torch.Tensor) -> bool:
    """A corner of the matrix against the NumPy reference."""
    corner1, corner2 = boxes1[:20].cpu().numpy(), boxes2[:20].cpu().numpy()
    if kind == "rotated":
        expected = reference("iou").rotated_box_iou(corner1, corner2)
    else:
        expected = reference("iou").box_iou(corner1, corner2, kind)
    return torch.allclose(result[:20, :20].cpu().double(), torch.from_numpy(expected).double(), rtol=1e-4, atol=1e-5)


def best_follows_definition(best, boxes1: torch.Tensor, boxes2: torch.Tensor) -> bool:
    """The first rows against the NumPy reference."""
    values, indices = reference("iou").max_iou(boxes1[:50].cpu().numpy(), boxes2.cpu().numpy())
    return same((best[0][:50], best[1][:50]), (values, indices))


def rotated_follows_definition(keep: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor) -> bool:
    """Greedy suppression on the matrix of detops.box_iou."""
    ious = detops.box_iou(boxes, boxes, fmt="cxcywhr").cpu().numpy()
    return keep.tolist() == list(reference("iou").nms_of_matrix(ious, scores.cpu().numpy(), 0.5))


def scored_rotated_boxes(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n))
    return rotated_boxes(n, seed=n).to(device), scores.to(device)


# Cases

KINDS = {
    "iou": detops.box_iou,
    "generalized": detops.generalized_box_iou,
    "distance": detops.distance_box_iou,
    "complete": detops.complete_box_iou,
}
SIZES = {  # asked, and predicted for an H200, unmeasured
    (10, 10): ("", "400 bytes, 1 launch: 5 us"),
    (2_000, 500): (">= 25x torchvision", "4 MB written, 1 launch: 5 us"),
    (10_000, 1_000): ("<= 1.5x the floor", "40 MB written at 70% of 4.3 TB/s, 1 launch: 13 us"),
}


def peer(function: Callable) -> Callable | None:
    return torchvision and getattr(torchvision.ops, function.__name__)


def pairwise_case(kind: str, n: int, m: int, device: str) -> Case:
    asked, prediction = SIZES[n, m]
    function = KINDS[kind]
    return Case(
        f"{function.__name__} {n:,} x {m:,}",
        partial(pair, n, m, device),
        function,
        peers={"torchvision": peer(function)} if torchvision else {},
        same=close,
        verify=partial(equals_reference, kind),
        measure_memory=(n, m) == (2_000, 500),
        asked=asked,
        prediction=prediction,
    )


def gradient_case(kind: str, n: int, m: int, device: str) -> Case:
    function = KINDS[kind]
    return Case(
        f"{function.__name__} {n:,} x {m:,} forward+backward",
        partial(pair, n, m, device),
        partial(forward_backward, function),
        peers={"torchvision": partial(forward_backward, peer(function))},
        same=close,
        asked=">= 10x torchvision",
        prediction="4 MB written and twice read, 4 launches: 25 us",
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    sizes = [(10, 10), (2_000, 500)] if quick else list(SIZES)
    for kind in KINDS:
        for n, m in sizes:
            yield pairwise_case(kind, n, m, device)
    if torchvision:  # whose gradients are what there is to check against
        for kind in KINDS:
            yield gradient_case(kind, 2_000, 500, device)
    n, m = (20_000, 100) if quick else (200_000, 100)
    yield Case(
        f"max_iou {n:,} x {m:,}",
        partial(pair, n, m, device),
        detops.max_iou,
        peers={"box_iou.max": max_of_matrix} if torchvision else {},
        verify=best_follows_definition,
        measure_memory=not quick,
        asked=">= 20x box_iou.max",
        prediction="200,000 x 100 pairs at 1.2e12/s, 1 launch: 20 us; 16 images 0.3 ms",
    )
    yield Case(
        "box_iou 1,000 x 1,000 rotated",
        partial(pair, 1_000, 1_000, device, rotated_boxes),
        partial(detops.box_iou, fmt="cxcywhr"),
        verify=partial(equals_reference, "rotated"),
        prediction="4 MB written, 1 launch, bound by the clipping of the pairs that meet: 50 us",
    )
    yield Case(
        "nms_rotated 1,000",
        partial(scored_rotated_boxes, 1_000, device),
        partial(detops.nms_rotated, iou_threshold=0.5),
        verify=rotated_follows_definition,
        prediction="24 kB, 4 launches and the size sync: 100 us",
    )
