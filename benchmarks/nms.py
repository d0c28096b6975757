"""Non-maximum suppression: one class, many classes, and whole batches of detector outputs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import detops
from harness import Case, optional, reference, same

torchvision = optional("torchvision")

MAX_PAIRS = 2**25  # that a verification computes
MAX_DETECTIONS = 100
SCORE_THRESHOLD = 0.05


# Inputs


def distinct_scores(n: int, generator: torch.Generator) -> torch.Tensor:
    """No ties: some peers leave their order open."""
    return (torch.randperm(n, generator=generator) + 1) / (n + 1)


def uniform_boxes(n: int, generator: torch.Generator) -> torch.Tensor:
    """Centres anywhere in 1000 x 1000 pixels, sides of 10 to 100."""
    centres = 1000 * torch.rand(n, 2, generator=generator)
    sides = 10 + 90 * torch.rand(n, 2, generator=generator)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def clustered_boxes(n: int, generator: torch.Generator) -> torch.Tensor:
    """Copies of 300 boxes, every edge moved by about a tenth of the side: what a detector says before suppression."""
    objects = uniform_boxes(300, generator)[torch.randint(300, (n,), generator=generator)]
    sides = (objects[:, 2:] - objects[:, :2]).repeat(1, 2)
    return objects + 0.1 * sides * (torch.rand(n, 4, generator=generator) - 0.5)


def scored_boxes(layout: Callable, n: int, device: str, classes: int = 0) -> tuple[torch.Tensor, ...]:
    """boxes [n, 4], scores [n] and, where there are classes, idxs [n]."""
    generator = torch.Generator().manual_seed(n)
    inputs = [layout(n, generator), distinct_scores(n, generator)]
    if classes:
        inputs.append(torch.randint(classes, (n,), generator=generator))
    return tuple(t.to(device) for t in inputs)


def detector_outputs(images: int, classes: int, background: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """boxes [images, 8400, 4] and scores [images, 8400, classes] like those of a detector at 640 x 640 pixels.

    The grid points (strides 8, 16, 32) inside one of 30 objects an image predict its box, a little off, and favour its
    class; everywhere else the logits are noise around `background`, which sets how many scores pass the threshold.
    """
    generator = torch.Generator().manual_seed(0)
    grids = [
        torch.stack([torch.arange(stride / 2, 640, stride).repeat(640 // stride),
                     torch.arange(stride / 2, 640, stride).repeat_interleave(640 // stride),
                     torch.full(((640 // stride) ** 2,), 4.0 * stride)])
        for stride in (8, 16, 32)
    ]  # fmt: skip
    x, y, side = torch.cat(grids, dim=1)
    points = torch.stack([x, y], dim=1)
    boxes = torch.cat([points - side[:, None] / 2, points + side[:, None] / 2], dim=1).repeat(images, 1, 1)
    logits = background + 1.2 * torch.randn(images, len(points), classes, generator=generator)
    for image in range(images):
        for label in torch.randint(classes, (30,), generator=generator).tolist():
            centre = 640 * torch.rand(2, generator=generator)
            sides = 20 + 180 * torch.rand(2, generator=generator)
            inside = ((points - centre).abs() < sides / 4).all(dim=1).nonzero()[:, 0]
            noise = torch.randn(len(inside), 4, generator=generator)
            target = torch.cat([centre - sides / 2, centre + sides / 2])
            boxes[image, inside] = target + 0.05 * sides.repeat(2) * noise
            logits[image, inside, label] = 1.5 * torch.randn(len(inside), generator=generator)
    return boxes.to(device), logits.sigmoid().to(device)


# Peers


def iou(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes [..., 4] with boxes [..., 4], the shapes broadcast."""
    sides = (torch.minimum(box[..., 2:], boxes[..., 2:]) - torch.maximum(box[..., :2], boxes[..., :2])).clamp(min=0)
    areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (box, boxes)]
    intersection = sides[..., 0] * sides[..., 1]
    return intersection / (areas[0] + areas[1] - intersection)


def eager_nms(boxes, scores, idxs, iou_threshold):
    """Greedy suppression in plain PyTorch: one row of overlaps for every kept box. `idxs` may be None."""
    order = scores.argsort(descending=True, stable=True)
    keep = []
    while order.numel():
        best, order = order[0], order[1:]
        keep.append(best)
        suppressed = iou(boxes[best], boxes[order]) > iou_threshold
        if idxs is not None:
            suppressed &= idxs[order] == idxs[best]
        order = order[~suppressed]
    return torch.stack(keep)


def numpy_peer(function: Callable, iou_threshold: float) -> Callable:
    """The NumPy reference, given tensors."""
    return lambda *inputs: function(*(t.cpu().numpy() for t in inputs), iou_threshold)


def image_loop(boxes, scores, batched_nms):
    """What people write around batched_nms: images one by one."""
    detections = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        rows, labels = (image_scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
        candidates, candidate_scores = image_boxes[rows], image_scores[rows, labels]
        keep = batched_nms(candidates, candidate_scores, labels, 0.5)[:MAX_DETECTIONS]
        detections.append((candidates[keep], candidate_scores[keep], labels[keep]))
    return detections


def same_detections(detections: "detops.Detections", per_image: list) -> bool:
    """Padded rows against the loop's list."""
    ours = [
        (detections.boxes[i, :count], detections.scores[i, :count], detections.labels[i, :count])
        for i, count in enumerate(detections.counts.tolist())
    ]
    return same(ours, per_image)


# Verification from the definition, for sizes at which no peer finishes


def follows_definition(keep, boxes, scores, idxs=None, *, iou_threshold) -> bool:
    """A list is the greedy one if it is in rank order and holds exactly the boxes that no earlier member suppresses.

    Of large inputs an evenly spread sample of the boxes is tested against the whole list.
    """
    order = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    if (rank[keep].diff() <= 0).any():
        return False
    kept = torch.zeros_like(rank, dtype=torch.bool)
    kept[keep] = True
    sample = order[:: len(order) * len(keep) // MAX_PAIRS + 1]
    for part in sample.split(2**21 // len(keep) + 1):
        suppresses = iou(boxes[keep][:, None], boxes[part]) > iou_threshold
        suppresses &= rank[keep][:, None] < rank[part]
        if idxs is not None:
            suppresses &= idxs[keep][:, None] == idxs[part]
        if (suppresses.any(dim=0) == kept[part]).any():
            return False
    return True


def detections_follow_definition(detections, boxes, scores) -> bool:
    """The same for every image. Candidates that rank below the last row of a full list have no say."""
    for i, count in enumerate(detections.counts.tolist()):
        indices, labels = detections.indices[i, :count], detections.labels[i, :count]
        listed = [boxes[i, indices], scores[i, indices, labels]]
        candidate = scores[i] > SCORE_THRESHOLD
        if not candidate[indices, labels].all():
            return False
        if not same(listed, [detections.boxes[i, :count], detections.scores[i, :count]]):
            return False
        if count == MAX_DETECTIONS:
            candidate = scores[i] > listed[1][-1]
            candidate[indices, labels] = True
        rows, columns = candidate.nonzero(as_tuple=True)
        place = torch.empty_like(candidate, dtype=torch.int64)
        place[rows, columns] = torch.arange(len(rows), device=rows.device)
        keep = place[indices, labels]
        if not follows_definition(keep, boxes[i, rows], scores[i, rows, columns], columns, iou_threshold=0.5):
            return False
    return True


# Cases

PREDICTIONS = {  # for an H200, from the limits of the op, unmeasured
    10: "300 bytes; 1 launch and 1 size sync: 30 us",
    100: "3 kB; 1 launch and 1 size sync: 40 us",
    1_000: "28 kB; 1 launch and 1 size sync: 60 us",
    10_000: "280 kB; 1 size sync: 300 us, the serial chain of kept boxes",
    30_000: "840 kB; 4.5e8 pairs at 1.2e12/s: 400 us, with the serial chain 1 ms",
    100_000: "2.8 MB; 5e9 pairs at 1.2e12/s: 4 ms",
}


def nms_case(n: int, layout: Callable, iou_threshold: float, device: str, eager_up_to: int, **fields) -> Case:
    peers = {}
    if torchvision:
        peers["torchvision"] = partial(torchvision.ops.nms, iou_threshold=iou_threshold)
    if n <= eager_up_to:
        peers["eager"] = partial(eager_nms, idxs=None, iou_threshold=iou_threshold)
    if n <= 1000:
        peers["numpy"] = numpy_peer(reference("nms").nms, iou_threshold)
    kind = layout.__name__.partition("_")[0]
    return Case(
        name=f"nms {kind} {n:,} iou {iou_threshold}",
        make_inputs=partial(scored_boxes, layout, n, device),
        run=partial(detops.nms, iou_threshold=iou_threshold),
        peers=peers,
        verify=partial(follows_definition, iou_threshold=iou_threshold),
        # torchvision's CUDA kernel contracts multiply-adds, which can move an overlap across the threshold.
        may_differ=["torchvision"] if device == "cuda" else [],
        series=f"nms {kind} iou {iou_threshold}",
        size=n,
        prediction=PREDICTIONS[n],
        **fields,
    )


def batched_nms_case(n: int, classes: int, device: str, eager_up_to: int, peers: bool = True, **fields) -> Case:
    compared = {}
    if peers and torchvision:
        compared["torchvision"] = partial(torchvision.ops.batched_nms, iou_threshold=0.5)
    if peers and n <= eager_up_to:
        compared["eager"] = partial(eager_nms, iou_threshold=0.5)
    return Case(
        name=f"batched_nms {n:,} x {classes:,} classes",
        make_inputs=partial(scored_boxes, uniform_boxes, n, device, classes),
        run=partial(detops.batched_nms, iou_threshold=0.5),
        peers=compared,
        verify=partial(follows_definition, iou_threshold=0.5),
        may_differ=["torchvision"] if device == "cuda" else [],
        series=f"batched_nms {classes} classes",
        size=n,
        **fields,
    )


def multiclass_nms_case(images: int, density: str, background: float, device: str, eager: bool, **fields) -> Case:
    peers = {}
    if torchvision:
        peers["loop"] = partial(image_loop, batched_nms=torchvision.ops.batched_nms)
    if eager:
        peers["eager"] = partial(image_loop, batched_nms=eager_nms)
    return Case(
        name=f"multiclass_nms {images} x 8400 x 80 {density}",
        make_inputs=partial(detector_outputs, images, 80, background, device),
        run=partial(
            detops.multiclass_nms,
            iou_threshold=0.5,
            score_threshold=SCORE_THRESHOLD,
            max_detections=MAX_DETECTIONS,
        ),
        peers=peers,
        same=same_detections,
        verify=detections_follow_definition,
        may_differ=["loop"] if device == "cuda" else [],
        **fields,
    )


def one_class(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """boxes [1, n, 4] and scores [1, n, 1]: all are candidates of one list."""
    boxes, scores = scored_boxes(uniform_boxes, n, device)
    return boxes[None], scores[None, :, None]


def list_follows_definition(detections, boxes, scores) -> bool:
    return follows_definition(
        detections.indices[0, : detections.counts[0]], boxes[0], scores[0, :, 0], iou_threshold=0.7
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    sizes = [100, 1_000, 10_000] if quick else [100, 1_000, 10_000, 30_000, 100_000]
    eager_up_to = 100 if quick else 10_000
    asked = {
        "cpu": {1_000: ">= 10x torchvision", 10_000: ">= 60x torchvision", 30_000: ">= 100x torchvision"},
        "cuda": {1_000: ">= 5x torchvision", 10_000: ">= 10x torchvision", 100_000: ">= 10x torchvision, < 64 MB"},
    }[device]

    yield nms_case(10, uniform_boxes, 0.5, device, eager_up_to, asked=">= 3x torchvision" if cpu else "")
    for layout in (uniform_boxes, clustered_boxes):
        for iou_threshold in (0.7,) if quick else (0.5, 0.7):
            for n in sizes:
                goal = asked.get(n, "") if layout is uniform_boxes else ""
                yield nms_case(n, layout, iou_threshold, device, eager_up_to, asked=goal)

    goal = ">= 10x torchvision" if cpu else ""
    prediction = "360 kB, 80 segments of 125: 100 us with the size sync"
    yield batched_nms_case(10_000, 80, device, eager_up_to, asked=goal, prediction=prediction)
    prediction = "360 kB, 1000 segments of 10: 100 us with the size sync"
    yield batched_nms_case(10_000, 1_000, device, eager_up_to, prediction=prediction)
    if not quick:
        prediction = "3.6 MB, 80 segments of 1250: 250 us with the size sync"
        yield batched_nms_case(100_000, 80, device, eager_up_to, prediction=prediction)
        prediction = "36 MB, 80 segments of 12500, 6e9 pairs at 1.2e12/s: 5 ms"
        yield batched_nms_case(
            1_000_000,
            80,
            device,
            eager_up_to,
            peers=False,
            measure_memory=True,
            asked="< 300 MB" if cpu else "",
            prediction=prediction,
        )

    images = (2 if quick else 8) if cpu else 16
    goal = ">= 10x loop" if cpu else "< 200 us"
    prediction = "16 images: 45 MB read in 10 us, 60-80 us to select, sort and suppress, no sync"
    yield multiclass_nms_case(images, "sparse", -6.5, device, eager=True, asked=goal, prediction=prediction)
    if not quick:
        prediction = "16 images: 45 MB read in 10 us, 34,000 candidates an image: 300 us, no sync"
        yield multiclass_nms_case(images, "dense", -4.9, device, eager=False, prediction=prediction)
    for n in () if quick else (20_000, 80_000):
        yield Case(
            name=f"multiclass_nms 1 x {n:,} x 1, all kept that may be",
            make_inputs=partial(one_class, n, device),
            run=partial(detops.multiclass_nms, iou_threshold=0.7, score_threshold=0.0, max_detections=n),
            verify=list_follows_definition,
            series="multiclass_nms, all kept that may be",
            size=n,
            prediction={20_000: "1.5e8 pairs: 1 ms, no sync", 80_000: "2.4e9 pairs: 5 ms, no sync"}[n],
        )
