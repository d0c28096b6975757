"""Pairwise IoU and its relatives, with gradients, best matches, and rotated boxes."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

import detops
from harness import Case, optional, reference, same

torchvision = optional("torchvision")

FUNCTIONS = {
    "iou": detops.box_iou,
    "generalized": detops.generalized_box_iou,
    "distance": detops.distance_box_iou,
    "complete": detops.complete_box_iou,
    "efficient": detops.efficient_box_iou,
    "ioa": detops.box_ioa,
}
SAMPLE = 8  # rows that are compared with the NumPy reference


# Inputs


def boxes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Corners anywhere in 1000 x 1000 pixels, sides of 10 to 200."""
    corners = 1000 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([corners, corners + 10 + 190 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def pairs(shape1: tuple[int, ...], shape2: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return boxes(shape1, generator).to(device), boxes(shape2, generator).to(device)


def weighted_pairs(rows: int, columns: int, device: str) -> tuple[torch.Tensor, ...]:
    """Boxes, and the gradient that comes from above."""
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return *pairs((rows,), (columns,), device), weights.to(device)


def rotated_boxes(n: int, generator: torch.Generator) -> torch.Tensor:
    """Centres anywhere in 1000 x 1000 pixels, sides of 10 to 200, any angle."""
    centres_and_angle = torch.rand(n, 3, generator=generator) * torch.tensor([1000.0, 1000, 360])
    sides = 10 + 190 * torch.rand(n, 2, generator=generator)
    return torch.cat([centres_and_angle[:, :2], sides, centres_and_angle[:, 2:]], dim=1)


def rotated_pairs(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return rotated_boxes(n, generator).to(device), rotated_boxes(n, generator).to(device)


def rotated_detections(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten boxes an object, a little off in everything, and scores without ties."""
    generator = torch.Generator().manual_seed(0)
    found = rotated_boxes(n // 10, generator).repeat(10, 1)
    found += (torch.rand(n, 5, generator=generator) - 0.5) * torch.tensor([10.0, 10, 10, 10, 5])
    return found.to(device), ((torch.randperm(n, generator=generator) + 1) / (n + 1)).to(device)


# Peers


def eager(kind: str, boxes1: torch.Tensor, boxes2: torch.Tensor, aligned: bool = False) -> torch.Tensor:
    """Plain PyTorch, for what torchvision lacks."""
    a, b = (boxes1, boxes2) if aligned else (boxes1[..., :, None, :], boxes2[..., None, :, :])
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    size1, size2 = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    if kind == "ioa":
        return intersection / (size1[..., 0] * size1[..., 1])
    iou = intersection / (size1[..., 0] * size1[..., 1] + size2[..., 0] * size2[..., 1] - intersection)
    if kind == "iou":
        return iou
    assert kind == "efficient"
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    centres = (a[..., :2] + a[..., 2:]) / 2 - (b[..., :2] + b[..., 2:]) / 2
    value = iou - (centres**2).sum(-1) / ((around**2).sum(-1) + 1e-7)
    return value - ((size1 - size2) ** 2 / (around**2 + 1e-7)).sum(-1)


def pairwise_peers(kind: str) -> dict[str, Callable]:
    name = FUNCTIONS[kind].__name__
    if torchvision and hasattr(torchvision.ops, name):
        return {"torchvision": getattr(torchvision.ops, name)}
    return {"eager": partial(eager, kind)}


def with_gradients(function: Callable, boxes1: torch.Tensor, boxes2: torch.Tensor, weights: torch.Tensor) -> tuple:
    """The values, and the gradients of both arguments."""
    boxes1, boxes2 = boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()
    values = function(boxes1, boxes2)
    return values.detach(), *torch.autograd.grad(values, (boxes1, boxes2), weights)


def best_of_matrix(box_iou: Callable, boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(box_iou(boxes1, boxes2).max(-1))


def torchvision_rotated() -> Callable | None:
    """torchvision's IoU of rotated boxes, which it has from 0.27 on."""
    if torchvision is None:
        return None
    function = partial(torchvision.ops.box_iou, fmt="cxcywhr")
    try:
        function(torch.ones(1, 5), torch.ones(1, 5))
    except ValueError:
        return None
    return function


def greedy_nms(box_iou: Callable, found: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """One row of overlaps for every kept box."""
    order = scores.argsort(descending=True, stable=True)
    keep = []
    while order.numel():
        best, order = order[:1], order[1:]
        keep.append(best)
        order = order[box_iou(found[best], found[order])[0] <= 0.5]
    return torch.cat(keep)


# Agreement


def close(ours, theirs, tolerance: float = 1e-5) -> bool:
    """Within a tolerance of the largest value: atan, contraction on a GPU and the order of sums may differ."""
    if isinstance(ours, tuple):
        return all(close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def same_values(ours: tuple, theirs: tuple) -> bool:
    """Of best matches; which of several equally good ones a peer names is open."""
    return close(ours[0], theirs[0], 1e-6)


def follows_definition(result, boxes1, boxes2, kind: str, aligned: bool = False) -> bool:
    """A sample of the rows is what the NumPy reference gives."""
    step = max(1, boxes1.shape[-2] // SAMPLE)
    arrays = boxes1[..., ::step, :].cpu().numpy(), (boxes2[..., ::step, :] if aligned else boxes2).cpu().numpy()
    expected = reference("iou").box_iou(*arrays, kind, aligned=aligned)
    found = (result[..., ::step] if aligned else result[..., ::step, :]).cpu().numpy()
    return np.allclose(found, expected, rtol=0, atol=1e-6)


def gradients_follow_definition(results, boxes1, boxes2, weights, kind: str) -> bool:
    return follows_definition(results[0], boxes1, boxes2, kind)


def matches_follow_definition(results, boxes1, boxes2) -> bool:
    """A sample of the rows is what the NumPy reference gives, and all values are those of the boxes named."""
    values, indices = results
    flat1, rows = boxes1.reshape(-1, 4), boxes2.reshape(-1, boxes2.shape[-2], 4)
    image = torch.arange(len(rows), device=indices.device).repeat_interleave(boxes1.shape[-2])
    named = rows[image, indices.flatten()]
    if not same(eager("iou", flat1, named, aligned=True), values.flatten()):
        return False
    for i in range(len(rows)):
        step = boxes1.shape[-2] // SAMPLE
        sample = boxes1.reshape(len(rows), -1, 4)[i, ::step].cpu().numpy()
        expected = reference("iou").max_iou(sample, rows[i].cpu().numpy())
        found = [each.reshape(len(rows), -1)[i, ::step].tolist() for each in results]
        if found != [each.tolist() for each in expected]:
            return False
    return True


def rotated_follow_definition(result, boxes1, boxes2) -> bool:
    rows, columns = torch.arange(0, len(boxes1), 50), torch.arange(0, len(boxes2), 50)
    arrays = (boxes1.cpu()[rows].numpy(), boxes2.cpu()[columns].numpy())
    expected = reference("iou").rotated_box_iou(*arrays)
    return np.allclose(result.cpu()[rows][:, columns].numpy(), expected, rtol=0, atol=1e-6)


def rotated_list_follows_definition(keep, found, scores) -> bool:
    """In rank order, and of the best boxes, which the others have no influence on, those that the reference keeps."""
    best = scores.argsort(descending=True, stable=True)[:200]
    expected = reference("iou").nms_rotated(found[best].cpu().double().numpy(), scores[best].cpu().numpy(), 0.5)
    of_best = keep[: len(expected)]
    return bool((scores[keep].diff() < 0).all()) and same(of_best, best[torch.as_tensor(expected).to(best.device)])


# Cases


def pairwise_case(kind: str, shape1: tuple[int, ...], shape2: tuple[int, ...], device: str, **fields) -> Case:
    sizes = " x ".join(f"{n:,}" for n in (*shape1, shape2[-1]))
    return Case(
        name=f"{FUNCTIONS[kind].__name__} {sizes}",
        make_inputs=partial(pairs, shape1, shape2, device),
        run=FUNCTIONS[kind],
        peers=pairwise_peers(kind),
        same=close,
        verify=partial(follows_definition, kind=kind),
        series=FUNCTIONS[kind].__name__,
        size=int(np.prod(shape1)) * shape2[-1],
        **fields,
    )


def gradient_case(kind: str, rows: int, columns: int, device: str, **fields) -> Case:
    return Case(
        name=f"{FUNCTIONS[kind].__name__} and gradient {rows:,} x {columns:,}",
        make_inputs=partial(weighted_pairs, rows, columns, device),
        run=partial(with_gradients, FUNCTIONS[kind]),
        peers={name: partial(with_gradients, peer) for name, peer in pairwise_peers(kind).items()},
        same=partial(close, tolerance=1e-4),  # float32 sums of a thousand terms
        verify=partial(gradients_follow_definition, kind=kind),
        **fields,
    )


def max_iou_case(images: tuple[int, ...], anchors: int, columns: int, device: str, peers: bool, **fields) -> Case:
    box_iou = torchvision.ops.box_iou if torchvision else partial(eager, "iou")
    sizes = " x ".join(f"{n:,}" for n in (*images, anchors, columns))
    return Case(
        name=f"max_iou {sizes}",
        make_inputs=partial(pairs, (*images, anchors), (*images, columns), device),
        run=detops.max_iou,
        peers={"torchvision" if torchvision else "eager": partial(best_of_matrix, box_iou)} if peers else {},
        same=same_values,
        verify=matches_follow_definition,
        measure_memory=True,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    yield pairwise_case("iou", (10,), (10,), device, prediction="720 bytes, 1 launch: 5 us, the call itself")
    for kind in FUNCTIONS:
        asked = cpu and "torchvision" in pairwise_peers(kind)
        goal = ">= 25x torchvision" if asked else ""
        yield pairwise_case(
            kind, (2000,), (500,), device, asked=goal, prediction="4 MB, 1 launch: 6 us, mostly the call"
        )
        if quick:
            continue
        goal = "<= 1.5x the floor, output + 1 MB" if asked else ""
        prediction = "40 MB written at 3 TB/s: 15 us"
        yield pairwise_case(kind, (10_000,), (1000,), device, asked=goal, measure_memory=True, prediction=prediction)
    if not cpu:
        for kind in FUNCTIONS:
            goal = ">= 70% of the copy bandwidth" if kind == "iou" else ""
            prediction = "537 MB written at 70% of 4.3 TB/s: 180 us, 1 launch"
            yield pairwise_case(kind, (16, 8192), (16, 1024), device, asked=goal, prediction=prediction)

    yield Case(
        name="box_iou aligned 1,000,000",
        make_inputs=partial(pairs, (1_000_000,), (1_000_000,), device),
        run=partial(detops.box_iou, aligned=True),
        peers={"eager": partial(eager, "iou", aligned=True)},
        same=close,
        verify=partial(follows_definition, kind="iou", aligned=True),
        prediction="36 MB at 3 TB/s: 14 us, 1 launch",
    )
    for kind in ("iou", "complete") if quick else FUNCTIONS:
        goal = ">= 10x torchvision" if cpu and "torchvision" in pairwise_peers(kind) else ""
        prediction = "4 MB written, 8 MB read; 4 launches, autograd: 60 us"
        yield gradient_case(kind, 2000, 500, device, asked=goal, prediction=prediction)

    goal = ">= 20x box_iou(...).max(1)" if cpu else ""
    prediction = "5.6 MB, 2e7 pairs at 1.2e12/s: 22 us, 1 launch"
    yield max_iou_case((), 20_000 if quick else 200_000, 100, device, peers=True, asked=goal, prediction=prediction)
    if not cpu:
        prediction = "90 MB, 3.2e8 pairs at 1.2e12/s: 280 us, 1 launch"
        yield max_iou_case((16,), 200_000, 100, device, peers=False, asked="< 600 us", prediction=prediction)

    peer = torchvision_rotated()
    yield Case(
        name="box_iou rotated 1,000 x 1,000",
        make_inputs=partial(rotated_pairs, 1000, device),
        run=partial(detops.box_iou, fmt="cxcywhr"),
        peers={"torchvision": peer} if peer else {},
        same=partial(close, tolerance=1e-4),
        verify=rotated_follow_definition,
        asked=">= 5x torchvision" if cpu else "",
        prediction="4 MB, 1e6 pairs of which 1 in 30 clips: 40 us, 1 launch",
    )
    predictions = {
        1000: "1 size sync: 100 us",
        10_000: "1 size sync: 500 us, the serial chain of kept boxes",
        20_000: "1 size sync: 1 ms, the serial chain of kept boxes",
        80_000: "1 size sync, 3.2e9 pairs of which 1 in 300 clips: 10 ms",
    }
    for n in (1000,) if quick else (1000, 10_000, 20_000, 80_000):
        yield Case(
            name=f"nms_rotated {n:,}",
            make_inputs=partial(rotated_detections, n, device),
            run=partial(detops.nms_rotated, iou_threshold=0.5),
            peers={"torchvision, greedy": partial(greedy_nms, peer)} if peer and n <= 10_000 else {},
            verify=rotated_list_follows_definition,
            may_differ=["torchvision, greedy"],  # its IoUs are off by up to 1e-4
            series="nms_rotated",
            size=n,
            prediction=predictions[n],
        )
