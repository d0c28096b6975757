"""SimOTA of whole batches, against the dense formulation in PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch

import detops
from harness import Case, optional, reference
from task_aligned import STRIDES, anchor_points, scene

torchvision = optional("torchvision")


def inputs(images: int, gts: int, image_size: int, classes: int, device: str) -> tuple[torch.Tensor, ...]:
    """A head half-way through its training; see `task_aligned.scene`."""
    scores, boxes, points, labels, gt_boxes, valid = scene(images, gts, image_size, classes, "cpu")
    counts = [(image_size // stride) ** 2 for stride in STRIDES]
    strides = torch.tensor(STRIDES, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
    objectness = scores.amax(2) * 6 - 4
    tensors = (scores.logit(1e-6), objectness, boxes, points, strides, gt_boxes, labels, valid)
    return tuple(each.to(device) for each in tensors)


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    sides = torch.minimum(boxes1[:, None, 2:], boxes2[:, 2:]) - torch.maximum(boxes1[:, None, :2], boxes2[:, :2])
    intersection = sides.clamp(min=0).prod(2)
    areas1, areas2 = ((each[:, 2:] - each[:, :2]).prod(1) for each in (boxes1, boxes2))
    return intersection / (areas1[:, None] + areas2 - intersection)


def dense(logits, objectness, boxes, points, strides, gt_boxes, gt_labels, gt_valid, dense_scores):
    """The definition, image by image on the candidates, with a [gt, candidate, class] tensor."""
    labels = torch.full(logits.shape[:2], -1, device=logits.device)
    indices, targets = labels.clone(), torch.zeros_like(boxes)
    scores = torch.zeros_like(logits) if dense_scores else torch.zeros_like(objectness)
    for image in range(len(logits)):
        rows = gt_valid[image].nonzero().flatten()
        gts, classes = gt_boxes[image, rows], gt_labels[image, rows]
        centres, radius = (gts[:, None, :2] + gts[:, None, 2:]) / 2, 1.5 * strides[:, None]
        near = ((points - (centres - radius) > 0) & (centres + radius - points > 0)).all(2)
        candidates = near.any(0).nonzero().flatten()
        near = near[:, candidates]
        ious = box_iou(gts, boxes[image, candidates])
        p = (logits[image, candidates].sigmoid() * objectness[image, candidates, None].sigmoid()).sqrt()
        one_hot = torch.nn.functional.one_hot(classes, logits.shape[2]).float()
        shape = len(gts), len(candidates), logits.shape[2]
        cost = torch.nn.functional.binary_cross_entropy(
            p.expand(shape), one_hot[:, None].expand(shape), reduction="none"
        ).sum(2)
        cost = cost + 3.0 * -torch.log(ious + 1e-8) + 1e6 * ~near
        ks = ious.topk(min(10, len(candidates)), dim=1).values.sum(1).int().clamp(min=1)
        ranks = cost.argsort(dim=1, stable=True).argsort(dim=1)
        claims = ranks < ks[:, None]
        contested = claims.sum(0) > 1
        cheapest = torch.zeros_like(claims).scatter_(0, cost.argmin(0, keepdim=True), True)
        claims = torch.where(contested, cheapest, claims)
        found = claims.any(0)
        gt = claims.byte().argmax(0)[found]
        anchors = candidates[found]
        labels[image, anchors], indices[image, anchors] = classes[gt], rows[gt]
        targets[image, anchors] = gts[gt]
        place = (image, anchors, classes[gt]) if dense_scores else (image, anchors)
        scores[place] = ious[:, found][gt, torch.arange(len(gt), device=gt.device)]
    return labels, targets, scores, indices >= 0, indices


def agrees(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def follows_definition(result, *tensors, **options) -> bool:
    """The first image is what the NumPy reference gives."""
    arrays = [(each if i in (3, 4) else each[:1]).cpu().numpy() for i, each in enumerate(tensors)]
    expected = reference("simota").assign_simota(*arrays, **options)
    return all(torch.equal(result[i][:1].cpu(), torch.as_tensor(each)) for i, each in enumerate(expected))


def case(images, gts, image_size, classes, device, *, dense_scores, peer=True, **fields) -> Case:
    form = "dense" if dense_scores else "sparse"
    return Case(
        name=f"assign_simota {images} x {len(anchor_points(image_size)):,} x {gts:,} gts, C={classes}, {form} scores",
        make_inputs=partial(inputs, images, gts, image_size, classes, device),
        run=partial(detops.assign_simota, dense_scores=dense_scores),
        peers={"dense PyTorch": partial(dense, dense_scores=dense_scores)} if peer else {},
        same=agrees,
        may_differ=["dense PyTorch"],  # its float32 logarithms decide near ties otherwise
        verify=partial(follows_definition, dense_scores=dense_scores),
        measure_memory=True,
        **fields,
    )


def probabilities(*arguments) -> tuple[torch.Tensor, ...]:
    """The same inputs as MMDetection's rule takes them."""
    logits, objectness, *others = inputs(*arguments)
    return logits.sigmoid(), objectness.sigmoid(), *others


def mmdet_case(images, gts, image_size, classes, device, **fields) -> Case:
    options = dict(rule="mmdet", dense_scores=False)
    anchors = len(anchor_points(image_size))
    return Case(
        name=f"assign_simota {images} x {anchors:,} x {gts:,} gts, C={classes}, mmdetection's rule",
        make_inputs=partial(probabilities, images, gts, image_size, classes, device),
        run=partial(detops.assign_simota, **options),
        verify=partial(follows_definition, **options),
        measure_memory=True,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    if quick:
        yield case(4, 20, 320, 80, device, dense_scores=False)
        yield mmdet_case(4, 20, 320, 80, device)
        return
    goal = ">= 20x" if cpu else ""
    prediction = "15 MB, 6 launches: 60 us, 2e6 logits of candidates in float64"
    yield case(16, 50, 640, 80, device, dense_scores=False, asked=goal, prediction=prediction)
    yield case(16, 50, 640, 80, device, dense_scores=True, asked=goal, prediction="58 MB, 6 launches: 75 us")
    yield mmdet_case(16, 50, 640, 80, device, prediction="15 MB, 6 launches: 80 us, 4e6 probabilities of candidates")
    if cpu:
        yield case(8, 1000, 1280, 80, device, dense_scores=False, peer=False)
    else:
        prediction = "440 MB, 6 launches, 4e9 pairs: 15 ms"
        yield case(128, 5000, 640, 80, device, dense_scores=True, peer=False, prediction=prediction)
