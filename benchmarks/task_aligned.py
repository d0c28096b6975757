"""Task-aligned assignment of whole batches, against the dense formulation in PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch

import detops
from harness import Case, reference

STRIDES = (8, 16, 32)


# Inputs


def anchor_points(image_size: int, strides: tuple[int, ...] = STRIDES) -> torch.Tensor:
    """The centres of the cells of all levels, row by row."""
    levels = []
    for stride in strides:
        along = (torch.arange(image_size // stride) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        levels.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(levels)


def scene(images: int, gts: int, image_size: int, classes: int, device: str, dtype=torch.float32) -> tuple:
    """A head half-way through its training: boxes a little off the nearest object, scores to match.

    Objects have sides of 8 to 250 pixels, small ones more often.
    """
    generator = torch.Generator().manual_seed(0)
    points = anchor_points(image_size)
    centres = image_size * torch.rand(images, gts, 2, generator=generator)
    sides = 8 * (250 / 8) ** torch.rand(images, gts, 2, generator=generator)
    gt_boxes = torch.cat([centres - sides / 2, centres + sides / 2], -1).clamp(0, image_size)
    gt_labels = torch.randint(0, classes, (images, gts), generator=generator)
    gt_valid = torch.rand(images, gts, generator=generator) < 0.9
    nearest = torch.stack([torch.cdist(points, each).argmin(1) for each in centres])
    near = gt_boxes.gather(1, nearest[..., None].expand(-1, -1, 4))
    size = (near[..., 2:] - near[..., :2]).repeat(1, 1, 2)
    pred_boxes = near + 0.2 * size * torch.randn(near.shape, generator=generator)
    scores = torch.rand(images, len(points), classes, generator=generator) ** 4
    scores.scatter_(2, gt_labels.gather(1, nearest)[..., None], torch.rand(*nearest.shape, 1, generator=generator))
    return tuple(each.to(device) for each in (scores.to(dtype), pred_boxes, points, gt_labels, gt_boxes, gt_valid))


# Peers


def complete_iou(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Of matching boxes [n, 4]."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    (w1, h1), (w2, h2) = (a[:, 2:] - a[:, :2]).unbind(1), (b[:, 2:] - b[:, :2]).unbind(1)
    intersection = sides[:, 0] * sides[:, 1]
    iou = intersection / (w1 * h1 + w2 * h2 - intersection)
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    centres = (a[:, :2] + a[:, 2:]) / 2 - (b[:, :2] + b[:, 2:]) / 2
    v = 4 / torch.pi**2 * (torch.atan(w1 / h1) - torch.atan(w2 / h2)) ** 2
    return iou - (centres**2).sum(1) / ((around**2).sum(1) + eps) - v / (1 - iou + v + eps) * v


def dense(
    pred_scores, pred_boxes, anchor_points, gt_labels, gt_boxes, gt_valid, *,
    topk=10, alpha=0.5, beta=6.0, dense_scores=True,
):  # fmt: skip
    """The definition as matrices [B, M, A]; complete IoU is computed for candidates only."""
    distances = torch.cat([anchor_points - gt_boxes[..., None, :2], gt_boxes[..., None, 2:] - anchor_points], -1)
    candidates = (distances.amin(-1) > 1e-9) & gt_valid[..., None]
    image, gt, anchor = candidates.nonzero(as_tuple=True)
    overlaps, metrics = torch.zeros(2, *candidates.shape, dtype=pred_boxes.dtype, device=pred_boxes.device)
    overlap = complete_iou(gt_boxes[image, gt], pred_boxes[image, anchor]).clamp(min=0)
    score = pred_scores[image, anchor, gt_labels[image, gt]].to(overlap.dtype)
    overlaps[image, gt, anchor] = overlap
    metrics[image, gt, anchor] = score**alpha * overlap**beta
    chosen = metrics.topk(topk, dim=-1).indices
    claims = torch.zeros_like(candidates).scatter_(-1, chosen, True) & candidates
    contested = claims.sum(1, keepdim=True) > 1
    owners = torch.where(candidates, overlaps, -1).argmax(1, keepdim=True)
    settled = torch.zeros_like(claims).scatter_(1, owners, True)
    claims = torch.where(contested, settled, claims)
    metrics, overlaps = metrics * claims, overlaps * claims
    best_metric, best_overlap = metrics.amax(-1, keepdim=True), overlaps.amax(-1, keepdim=True)
    values = (metrics * best_overlap / (best_metric + 1e-9)).amax(1).to(pred_scores.dtype)
    foreground = claims.any(1)
    rows = claims.byte().argmax(1)
    labels = torch.where(foreground, gt_labels.gather(1, rows), -1)
    boxes = gt_boxes.gather(1, rows[..., None].expand(-1, -1, 4)) * foreground[..., None]
    if dense_scores:
        scores = torch.zeros_like(pred_scores).scatter_(2, labels.clamp(min=0)[..., None], values[..., None])
    else:
        scores = values
    return labels, boxes, scores, foreground, torch.where(foreground, rows, -1)


# Agreement


def agrees(ours, theirs) -> bool:
    """Indices are equal; scores differ by the rounding of atan and of powers."""
    same = all(torch.equal(ours[i], theirs[i]) for i in (0, 1, 3, 4))
    return same and torch.allclose(ours[2].float(), theirs[2].float(), rtol=0, atol=2e-4)


def follows_definition(result, *inputs, **options) -> bool:
    """The first image is what the NumPy reference gives."""
    arrays = [each if i == 2 else each[:1] for i, each in enumerate(inputs)]
    arrays = [(each.float() if each.dtype == torch.float16 else each).cpu().numpy() for each in arrays]
    expected = reference("task_aligned").assign_task_aligned(*arrays, **options)
    rounded = [torch.as_tensor(each).to(result[i].dtype) for i, each in enumerate(expected)]
    return all(torch.equal(result[i][:1].cpu(), rounded[i]) for i in range(5))


# Cases


def case(images, gts, image_size, classes, device, *, dense_scores, peer=True, **fields) -> Case:
    inputs = partial(scene, images, gts, image_size, classes, device)
    anchors = len(anchor_points(image_size))
    form = "dense" if dense_scores else "sparse"
    return Case(
        name=f"assign_task_aligned {images} x {anchors:,} x {gts:,} gts, C={classes}, {form} scores",
        make_inputs=inputs,
        run=partial(detops.assign_task_aligned, dense_scores=dense_scores),
        peers={"dense PyTorch": partial(dense, dense_scores=dense_scores)} if peer else {},
        same=agrees,
        may_differ=["dense PyTorch"],  # its float32 atan and powers decide near ties otherwise
        verify=partial(follows_definition, dense_scores=dense_scores),
        measure_memory=True,
        **fields,
    )


def tood_case(images, gts, image_size, classes, device, **fields) -> Case:
    options = dict(candidates="all", topk=13, alpha=1.0, iou="iou", dense_scores=False)
    anchors = len(anchor_points(image_size))
    return Case(
        name=f"assign_task_aligned {images} x {anchors:,} x {gts:,} gts, C={classes}, TOOD's rule",
        make_inputs=partial(scene, images, gts, image_size, classes, device),
        run=partial(detops.assign_task_aligned, **options),
        verify=partial(follows_definition, **options),
        measure_memory=True,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    if quick:
        yield case(4, 20, 320, 80, device, dense_scores=False)
        yield case(4, 20, 320, 80, device, dense_scores=True)
        yield tood_case(4, 20, 320, 80, device)
        return
    goal = ">= 40x, 1/20 of the memory" if cpu else ""
    prediction = "10 MB, 5 launches: 35 us, 1.2e6 candidates"
    yield case(16, 50, 640, 80, device, dense_scores=False, asked=goal, prediction=prediction)
    yield tood_case(16, 50, 640, 80, device, prediction="10 MB, 5 launches: 45 us, 4e6 pairs")
    goal = "<= 2x the floor" if cpu else ""
    yield case(16, 50, 640, 80, device, dense_scores=True, asked=goal, prediction="53 MB, 5 launches: 50 us")
    if cpu:
        yield case(8, 1000, 1280, 80, device, dense_scores=False, peer=False, asked="< 2 s, 200 MB")
    else:
        prediction = "53 MB, 5 launches: 60 us"
        yield case(16, 100, 640, 80, device, dense_scores=True, asked="< 150 us", prediction=prediction)
        prediction = "440 MB, 5 launches, 3e8 candidates: 6 ms"
        yield case(
            128, 5000, 640, 80, device, dense_scores=True, peer=False, asked="< 20 ms, 2 GB", prediction=prediction
        )
