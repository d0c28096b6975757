"""Losses, forward and backward: the focal family on the output of a detector's head, and the IoU losses of pairs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import detops
from harness import Case, optional, tensors

torchvision = optional("torchvision")

POINTS, CLASSES, BINS = 8400, 80, 16  # of a detector at 640 x 640 pixels


# Inputs


def head_outputs(images: int, device: str, kind: str) -> tuple[torch.Tensor, ...]:
    """logits [images, points, classes] and the targets of the loss; one point in fifty has an object."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, POINTS, CLASSES, generator=generator) * 2 - 3
    labels = torch.randint(CLASSES, (images, POINTS), generator=generator)
    labels[torch.rand(images, POINTS, generator=generator) > 0.02] = CLASSES
    quality = torch.rand(images, POINTS, generator=generator)
    one_hot = F.one_hot(labels, CLASSES + 1)[..., :CLASSES].float()
    targets = {
        "dense": (one_hot,),
        "classes": (labels,),
        "quality": (labels, quality),
        "varifocal": (one_hot * quality[..., None],),
    }[kind]
    return tuple(t.to(device) for t in (logits, *targets))


def distributions(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, BINS, generator=generator)
    return logits.to(device), ((BINS - 1.01) * torch.rand(rows, generator=generator)).to(device)


def matched_boxes(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of 10 to 200 pixels, and guesses of them that are off by up to a third."""
    generator = torch.Generator().manual_seed(0)
    corner, side = 500 * torch.rand(n, 2, generator=generator), 10 + 190 * torch.rand(n, 2, generator=generator)
    truth = torch.cat([corner, corner + side], dim=1)
    guess = truth + side.repeat(1, 2) * (torch.rand(n, 4, generator=generator) - 0.5) * 0.6
    return guess.to(device), truth.to(device)


# Peers: the formulas in plain PyTorch


def cross_entropy(logits, targets):
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def eager_sigmoid_focal_loss(logits, labels):
    """Class targets made dense, as callers of torchvision do."""
    targets = F.one_hot(labels, CLASSES + 1)[..., :CLASSES].to(logits.dtype)
    p = logits.sigmoid()
    weight = 0.25 * targets + 0.75 * (1 - targets)
    return (weight * (p * (1 - targets) + (1 - p) * targets) ** 2 * cross_entropy(logits, targets)).sum()


def eager_quality_focal_loss(logits, labels, scores):
    targets = F.one_hot(labels, CLASSES + 1)[..., :CLASSES].to(logits.dtype) * scores[..., None]
    return ((targets - logits.sigmoid()).abs() ** 2 * cross_entropy(logits, targets)).sum()


def eager_varifocal_loss(logits, targets):
    weight = torch.where(targets > 0, targets, 0.75 * logits.sigmoid() ** 2)
    return (weight * cross_entropy(logits, targets)).sum()


def eager_distribution_focal_loss(logits, targets):
    left = targets.long()
    to_left = F.cross_entropy(logits, left, reduction="none")
    to_right = F.cross_entropy(logits, left + 1, reduction="none")
    return (to_left * (left + 1 - targets) + to_right * (targets - left)).sum()


def eager_box_loss(boxes1, boxes2, kind: str, eps: float = 1e-7):
    sides = (torch.min(boxes1[:, 2:], boxes2[:, 2:]) - torch.max(boxes1[:, :2], boxes2[:, :2])).clamp(min=0)
    around = torch.max(boxes1[:, 2:], boxes2[:, 2:]) - torch.min(boxes1[:, :2], boxes2[:, :2])
    sides1, sides2 = boxes1[:, 2:] - boxes1[:, :2], boxes2[:, 2:] - boxes2[:, :2]
    offset = (boxes1[:, 2:] + boxes1[:, :2] - boxes2[:, 2:] - boxes2[:, :2]) / 2
    union = sides1.prod(1) + sides2.prod(1) - sides.prod(1)
    loss = 1 - sides.prod(1) / (union + eps)
    if kind == "generalized":
        return (loss + (around.prod(1) - union) / (around.prod(1) + eps)).sum()
    if kind == "siou":
        angle = 2 * offset.abs().prod(1) / ((offset**2).sum(1) + eps)
        distance = 1 - ((angle[:, None] - 2) * offset**2 / (around**2 + eps)).exp()
        shape = (1 - (-(sides1 - sides2).abs() / (torch.max(sides1, sides2) + eps)).exp()) ** 4
        return (loss + (distance + shape).sum(1) / 2).sum()
    distance_loss = loss + (offset**2).sum(1) / ((around**2).sum(1) + eps)
    if kind == "distance":
        return distance_loss.sum()
    if kind == "efficient":
        return (distance_loss + ((sides1 - sides2) ** 2 / (around**2 + eps)).sum(1)).sum()
    angle1, angle2 = (torch.atan(each[:, 0] / each[:, 1]) for each in (sides1, sides2))
    v = 4 / torch.pi**2 * (angle1 - angle2) ** 2
    return (distance_loss + (v / (loss + v + eps)).detach() * v).sum()


# Cases


def forward_backward(loss: Callable, leaves: int) -> Callable:
    """The loss, and its gradients with respect to the first tensors."""

    def run(*inputs):
        inputs = [t.detach().requires_grad_() if i < leaves else t for i, t in enumerate(inputs)]
        value = loss(*inputs)
        value.sum().backward()
        return value.detach(), *(t.grad for t in inputs[:leaves])

    return run


def close(ours, theirs) -> bool:
    """Equal up to float32 rounding, which weighs more in sums of many and in gradients that cancel."""
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
        for a, b in zip(tensors(ours), tensors(theirs), strict=True)
    )


def focal_case(name: str, images: int, kind: str, run: Callable, peer: tuple[str, Callable], device: str, **fields):
    return Case(
        name=f"{name} {images} x {POINTS} x {CLASSES}",
        make_inputs=partial(head_outputs, images, device, kind),
        run=forward_backward(run, 1),
        peers={peer[0]: forward_backward(peer[1], 1)},
        same=close,
        **fields,
    )


def box_case(kind: str, loss: Callable, n: int, device: str, **fields) -> Case:
    name = loss.__name__
    if torchvision and hasattr(torchvision.ops, name):
        peer_name, peer = "torchvision", partial(getattr(torchvision.ops, name), reduction="sum")
    else:
        peer_name, peer = "eager", partial(eager_box_loss, kind=kind)
    return Case(
        name=f"{name} {n:,}",
        make_inputs=partial(matched_boxes, n, device),
        run=forward_backward(partial(loss, reduction="sum"), 2),
        peers={peer_name: forward_backward(peer, 2)},
        same=close,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    images = 2 if quick else 16
    asked = "" if quick else ">= 5x" if device == "cpu" else ">= 60% of copy"
    dense = "16 images: 215 MB in two passes at 3.4 TB/s: 65 us, 3 launches"
    by_class = "16 images: 130 MB in two passes, 80 operations a logit: 60 us, 3 launches"
    if torchvision:
        for reduction in ("sum", "none"):
            ours, theirs = (
                partial(module.sigmoid_focal_loss, reduction=reduction) for module in (detops, torchvision.ops)
            )
            yield focal_case(
                f"sigmoid_focal_loss {reduction}",
                *(images, "dense", ours, ("torchvision", theirs), device),
                asked=asked,
                prediction=dense if reduction == "sum" else "16 images: 258 MB in two passes at 3.4 TB/s: 80 us",
            )
    for loss, kind, eager, prediction in (
        (detops.sigmoid_focal_loss, "classes", eager_sigmoid_focal_loss, by_class),
        (detops.quality_focal_loss, "quality", eager_quality_focal_loss, by_class),
        (detops.varifocal_loss, "varifocal", eager_varifocal_loss, dense),
    ):
        yield focal_case(
            f"{loss.__name__}{' classes' if kind == 'classes' else ''}",
            *(images, kind, partial(loss, reduction="sum"), ("eager", eager), device),
            prediction=prediction,
        )
    rows = 4 * 1000 * images
    yield Case(
        name=f"distribution_focal_loss {rows:,} x {BINS}",
        make_inputs=partial(distributions, rows, device),
        run=forward_backward(partial(detops.distribution_focal_loss, reduction="sum"), 1),
        peers={"eager": forward_backward(eager_distribution_focal_loss, 1)},
        same=close,
        prediction="64,000 rows: 12 MB in two passes: 8 us, 3 launches",
    )
    pairs = 10_000 if quick else 100_000
    for kind, loss in (
        ("generalized", detops.generalized_box_iou_loss),
        ("distance", detops.distance_box_iou_loss),
        ("complete", detops.complete_box_iou_loss),
        ("efficient", detops.efficient_box_iou_loss),
        ("siou", detops.siou_loss),
    ):
        wanted = asked if kind in ("generalized", "distance", "complete") else ""
        yield box_case(kind, loss, pairs, device, asked=wanted, prediction="9.6 MB in two passes: 8 us, 3 launches")
