"""Matching of anchors to ground truth."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import detops
from harness import Case, optional, reference, same

torchvision = optional("torchvision")
utils = optional("torchvision.models.detection._utils")
scipy_optimize = optional("scipy.optimize")
lap = optional("torch_linear_assignment")

SAMPLE = 2000  # anchors that are compared with the NumPy reference


# Inputs


def boxes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Corners anywhere in 1344 x 800 pixels, sides of 10 to 300."""
    corners = torch.rand(*shape, 2, generator=generator) * torch.tensor([1344.0, 800])
    return torch.cat([corners, corners + 10 + 290 * torch.rand(*shape, 2, generator=generator) ** 2], dim=-1)


def pyramid_anchors(most: int) -> torch.Tensor:
    """Those of an RPN with a feature pyramid on 1344 x 800 pixels: 3 shapes, strides 4 to 64; the first `most`."""
    levels = []
    for stride in (4, 8, 16, 32, 64):
        y, x = torch.meshgrid(torch.arange(0, 800, stride), torch.arange(0, 1344, stride), indexing="ij")
        width = 8 * stride / torch.tensor([0.5, 1, 2]).sqrt()
        half = torch.stack([width, (8 * stride) ** 2 / width], 1) / 2
        centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
        levels.append(torch.cat([centres - half, centres + half], -1).reshape(-1, 4))
    return torch.cat(levels)[:most].contiguous()


def anchors_and_boxes(kind: str, images: int, anchors: int, gts: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = pyramid_anchors(anchors) if kind == "pyramid" else boxes((anchors,), generator)
    return rows.to(device), boxes((images, gts), generator).to(device)


# What is measured


RPN = dict(high_threshold=0.7, low_threshold=0.3)


def match_rpn(anchors: torch.Tensor, gt_boxes: torch.Tensor, low_quality: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(detops.match_max_iou(anchors, gt_boxes, allow_low_quality_matches=low_quality, **RPN))


def torchvision_rpn(matcher: Callable, anchors: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    return torch.stack([matcher(torchvision.ops.box_iou(image, anchors)) for image in gt_boxes])


def match_ssd(anchors: torch.Tensor, gt_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(detops.match_ssd(anchors, gt_boxes))


def qualities(gts: int, anchors: int, device: str) -> tuple[torch.Tensor]:
    """The matrix of IoUs of an RPN."""
    anchors_of, gt_boxes = anchors_and_boxes("pyramid", 1, anchors, gts, "cpu")
    return (detops.box_iou(gt_boxes[0], anchors_of).to(device),)


def costs(kind: str, problems: int, queries: int, targets: int, device: str) -> tuple[torch.Tensor]:
    """Uniform in [0, 1], or DETR's: classes alike for all targets, and distances of centres."""
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        return (torch.rand(problems, queries, targets, generator=generator).to(device),)
    at, wanted = (torch.rand(problems, n, 4, generator=generator) for n in (queries, targets))
    scores = torch.rand(problems, queries, 1, generator=generator) ** 4
    return (5 * torch.cdist(at, wanted, p=1).to(device) - 2 * scores.to(device),)


def costs_with_nan(problems: int, queries: int, targets: int, device: str) -> tuple[torch.Tensor]:
    """Uniform costs, but of four queries in five none is a number: targets are left with these."""
    (cost,) = costs("uniform", problems, queries, targets, device)
    cost[:, torch.arange(queries) % 5 > 0] = float("nan")
    return (cost,)


def scipy_loop(cost: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(cost), cost.shape[2]), -1)
    for image, matrix in enumerate(cost.cpu().numpy()):
        queries, targets = scipy_optimize.linear_sum_assignment(matrix)
        out[image, targets] = torch.from_numpy(queries)
    return out.to(cost.device)


def lap_batch(cost: torch.Tensor) -> torch.Tensor:
    return lap.batch_linear_assignment(cost.transpose(1, 2).contiguous())


def detr_outputs(images: int, queries: int, classes: int, gts: int, device: str) -> tuple[torch.Tensor, ...]:
    """Logits, boxes, gt_boxes and labels of a DETR; boxes in shares of the image."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, queries, classes, generator=generator)
    found, wanted = (
        torch.cat(
            [torch.rand(images, n, 2, generator=generator), 0.3 * torch.rand(images, n, 2, generator=generator)], 2
        )
        for n in (queries, gts)
    )
    labels = torch.randint(classes - 1, (images, gts), generator=generator)
    return tuple(each.to(device) for each in (logits, found, wanted, labels))


def cross_image_detr(focal: bool, logits, found, wanted, labels) -> torch.Tensor:
    """As published: costs across all images of the batch, then image by image on the CPU."""
    images, queries = found.shape[:2]
    flat = logits.flatten(0, 1)
    if focal:
        p = flat.sigmoid()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        of_class = (0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - negative)[:, labels.flatten()]
    else:
        of_class = -flat.softmax(-1)[:, labels.flatten()]
    corners = [torchvision.ops.box_convert(each.flatten(0, 1), "cxcywh", "xyxy") for each in (found, wanted)]
    cost = 5 * torch.cdist(found.flatten(0, 1), wanted.flatten(0, 1), p=1) + (2 if focal else 1) * of_class
    cost = (cost - 2 * torchvision.ops.generalized_box_iou(*corners)).view(images, queries, -1).cpu()
    parts = [block[image] for image, block in enumerate(cost.split(wanted.shape[1], -1))]
    return scipy_loop(torch.stack(parts)).to(found.device)


def match_detr(focal: bool, *outputs: torch.Tensor) -> torch.Tensor:
    options = dict(class_cost="focal", class_weight=2.0) if focal else {}
    return detops.match_detr(*outputs, **options)


def rpn_matches(images: int, anchors: int, device: str) -> tuple[torch.Tensor]:
    """1 positive in 1000, 1 in 10 ignored."""
    draw = torch.rand(images, anchors, generator=torch.Generator().manual_seed(0))
    return (torch.where(draw < 0.001, 5, torch.where(draw < 0.1, -2, -1)).to(device),)


def sample(matches: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(detops.sample_matches(matches, 256, 0.5))


def torchvision_sample(sampler: Callable, matches: torch.Tensor) -> tuple:
    """Its labels: 1 and up for positives, 0 for negatives."""
    return sampler([torch.where(each >= 0, 1, torch.where(each == -1, 0, -1)) for each in matches])


def same_numbers(ours: tuple, theirs: tuple) -> bool:
    """Of positives and of all; who is drawn is up to chance."""
    positives, negatives = ([int(mask.sum()) for mask in masks] for masks in theirs)
    return ours[1].tolist() == positives and (ours[2] - ours[1]).tolist() == negatives


def samples_are_sound(samples: tuple, matches: torch.Tensor) -> bool:
    indices, positive_counts, counts = samples
    drawn = matches.gather(1, indices.clamp(min=0))
    return (
        bool((indices >= 0).sum(1).eq(counts).all() and (drawn >= -1).all())
        and bool((indices[:, 1:] != indices[:, :-1]).logical_or(indices[:, 1:] < 0).all())
        and bool(((drawn >= 0) & (indices >= 0)).sum(1).eq(positive_counts).all())
    )


def square_pyramid() -> tuple[torch.Tensor, list[int]]:
    levels = []
    for stride in (8, 16, 32, 64, 128):
        y, x = torch.meshgrid(torch.arange(0, 800, stride), torch.arange(0, 1344, stride), indexing="ij")
        centres = torch.stack([x, y], -1).reshape(-1, 2) + stride / 2
        levels.append(torch.cat([centres - 4 * stride, centres + 4 * stride], 1))
    return torch.cat(levels), [len(level) for level in levels]


LEVELS = square_pyramid()[1]


def atss_inputs(images: int, gts: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return square_pyramid()[0].to(device), boxes((images, gts), torch.Generator().manual_seed(0)).to(device)


def assign_atss(anchors: torch.Tensor, gt_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(detops.assign_atss(anchors, LEVELS, gt_boxes))


def eager_atss(anchors: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    """Image by image, with matrices of all anchors and boxes."""
    results = []
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for image in gt_boxes:
        ious = torchvision.ops.box_iou(anchors, image)
        apart = torch.cdist(centres, (image[:, :2] + image[:, 2:]) / 2)
        starts = [sum(LEVELS[:i]) for i in range(len(LEVELS))]
        candidates = torch.cat(
            [
                level.topk(min(9, len(level)), dim=0, largest=False).indices + start
                for level, start in zip(apart.split(LEVELS), starts, strict=True)
            ]
        )
        own = ious.gather(0, candidates)
        threshold = own.mean(0) + own.std(0)
        inside = torch.cat([centres[candidates] - image[:, :2], image[:, 2:] - centres[candidates]], -1).amin(-1) > 0.01
        positive = torch.full_like(ious, -1).scatter(0, candidates, torch.where((own >= threshold) & inside, own, -1.0))
        best, gt = positive.max(1)
        results.append(torch.where(best >= 0, gt, -1))
    return torch.stack(results)


def atss_follows_definition(result: tuple, anchors: torch.Tensor, gt_boxes: torch.Tensor) -> bool:
    """The first image, with the NumPy reference."""
    first = gt_boxes[0].cpu().numpy()
    expected = reference("matching").assign_atss(anchors.cpu().numpy(), LEVELS, first, [True] * len(first))
    return all(same(got[0].cpu(), torch.from_numpy(want)) for got, want in zip(result, expected, strict=True))


# Agreement


def assigns_as_cheaply(found: torch.Tensor, cost: torch.Tensor) -> bool:
    """As many pairs as can be, at scipy's total. Without scipy: no swap of two queries, or for a free one, pays."""
    for queries, matrix in zip(found.cpu(), cost.double().cpu(), strict=True):
        targets = (queries >= 0).nonzero()[:, 0]
        used = queries[targets]
        if len(set(used.tolist())) != min(matrix.shape):
            return False
        paid = matrix[used, targets]
        if scipy_optimize:
            if abs(paid.sum() - matrix[scipy_optimize.linear_sum_assignment(matrix)].sum()) > 1e-9 * paid.abs().sum():
                return False
            continue
        swapped = matrix[used][:, targets]
        if (swapped + swapped.T + 1e-9 < paid + paid[:, None]).any():
            return False
        free = torch.ones(len(matrix), dtype=torch.bool)
        free[used] = False
        if (matrix[free][:, targets] + 1e-9 < paid).any():
            return False
    return True


def assigns_invalid_pairs_last(found: torch.Tensor, cost: torch.Tensor) -> bool:
    """All targets have a query, and the valid pairs are as many and as cheap as can be: with 1024, which is more than
    all costs together, in the place of NaN."""
    return assigns_as_cheaply(found, cost.nan_to_num(1024.0))


def matches_detr(focal: bool, found: torch.Tensor, logits, boxes, gt_boxes, labels) -> bool:
    """The first image, as cheap as can be for the costs of the NumPy reference."""
    arrays = [each[0].cpu().numpy() for each in (logits, boxes, gt_boxes, labels)]
    options = dict(class_cost="focal", weights=(2.0, 5.0, 2.0)) if focal else {}
    cost = torch.from_numpy(reference("linear_sum_assignment").match_detr(*arrays, **options))
    return assigns_as_cheaply(found[:1], cost[None])


def same_indices(ours: tuple, theirs: torch.Tensor) -> bool:
    return same(ours[0], theirs)


def ious_follow_definition(result: tuple, anchors: torch.Tensor, gt_boxes: torch.Tensor) -> bool:
    """A sample of the anchors has the best IoU of the definition, and its index or none."""
    indices, ious = (each[0, :: max(1, len(anchors) // SAMPLE)].cpu().numpy() for each in result)
    rows = anchors[:: max(1, len(anchors) // SAMPLE)].cpu().numpy()
    matching = reference("matching")
    best, own = matching.match_matrix(matching.iou_matrix(gt_boxes[0].cpu().numpy(), rows), 0, 0)[::-1]
    return (ious == best).all() and ((indices < 0) | (indices == own)).all()


# Cases


def rpn_case(kind: str, images: int, low_quality: bool, device: str, anchors: int = 200_000, **fields) -> Case:
    matcher = utils.Matcher(0.7, 0.3, low_quality) if utils else None
    return Case(
        name=f"match_max_iou {kind} {images} x {anchors:,} x 100, {'with' if low_quality else 'no'} low quality",
        make_inputs=partial(anchors_and_boxes, kind, images, anchors, 100, device),
        run=partial(match_rpn, low_quality=low_quality),
        peers={"torchvision": partial(torchvision_rpn, matcher)} if utils else {},
        same=same_indices,
        verify=None if low_quality and utils else ious_follow_definition,
        **fields,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    goal = ">= 20x torchvision, 1/50 of its memory" if cpu else ""
    anchors = 20_000 if quick else 200_000
    for kind in ("pyramid", "uniform"):
        for low_quality in (False, True):
            yield rpn_case(
                *(kind, 1, low_quality, device, anchors),
                asked=goal,
                measure_memory=True,
                prediction="5.6 MB: 10 us, 1 launch" + (", and 2 more" if low_quality else ""),
            )
    if not quick:
        for low_quality in (False, True):
            limit = "< 1 ms" if low_quality else "< 600 us"
            pairs = "90 MB at 3 TB/s and 1 in 20 of 3.2e8 pairs: 50 us, 1 launch"
            yield rpn_case(
                *("pyramid", 16, low_quality, device),
                asked="" if cpu else limit,
                prediction=pairs + (", and 15 us in 2 more" if low_quality else ""),
            )
    yield Case(
        name=f"Matcher 100 x {anchors:,}, with low quality",
        make_inputs=partial(qualities, 100, anchors, device),
        run=detops.Matcher(0.7, 0.3, True),
        peers={"torchvision": utils.Matcher(0.7, 0.3, True)} if utils else {},
        verify=None if utils else lambda indices, matrix: bool((indices[matrix.amax(0) >= 0.7] >= 0).all()),
        prediction="160 MB read at 3 TB/s: 55 us, 2 launches",
    )
    yield Case(
        name="match_ssd 32 x 8,732 x 20",
        make_inputs=partial(anchors_and_boxes, "uniform", 32, 8732, 20, device),
        run=match_ssd,
        peers={"torchvision": partial(torchvision_rpn, utils.SSDMatcher(0.5))} if utils else {},
        same=same_indices,
        verify=None if utils else ious_follow_definition,
        prediction="3.4 MB: 15 us, 4 launches",
    )
    for kind in ("uniform", "detr"):
        for problems, queries, targets in (16, 300, 100), (16, 900, 100), (16, 300, 300):
            if quick and (queries, targets) != (300, 100):
                continue
            asked = {(True, 300, 100): ">= 3x scipy", (False, 900, 100): "< 500 us"}.get((cpu, queries, targets), "")
            yield Case(
                name=f"linear_sum_assignment {kind} {problems} x {queries} x {targets}",
                make_inputs=partial(costs, kind, problems, queries, targets, device),
                run=detops.linear_sum_assignment,
                peers=({"scipy, per image": scipy_loop} if scipy_optimize else {})
                | ({"torch-linear-assignment": lap_batch} if lap else {}),
                verify=assigns_as_cheaply,
                may_differ=["scipy, per image", "torch-linear-assignment"],  # where two assignments cost the same
                asked=asked,
                prediction="about 250 steps of 0.5 us in the slowest problem: 130 us, 2 launches",
            )
    yield Case(
        name="linear_sum_assignment invalid costs last 16 x 300 x 100",
        make_inputs=partial(costs_with_nan, 16, 300, 100, device),
        run=partial(detops.linear_sum_assignment, invalid="last"),
        verify=assigns_invalid_pairs_last,
        prediction="the search twice, once in tiers: 500 us, 2 launches",
    )
    for focal in (False, True):
        for queries, gts in ((300, 30),) if quick else ((300, 30), (900, 100)):
            yield Case(
                name=f"match_detr {'focal' if focal else 'softmax'} 16 x {queries} x {gts}",
                make_inputs=partial(detr_outputs, 16, queries, 91, gts, device),
                run=partial(match_detr, focal),
                peers={"eager and scipy": partial(cross_image_detr, focal)} if scipy_optimize and torchvision else {},
                verify=partial(matches_detr, focal),
                may_differ=["eager and scipy"],  # its costs are rounded otherwise
                prediction="as linear_sum_assignment, and 10 us in 2 more launches",
            )
    yield Case(
        name=f"sample_matches 16 x {anchors:,}, 256 drawn",
        make_inputs=partial(rpn_matches, 16, anchors, device),
        run=sample,
        peers={"torchvision": partial(torchvision_sample, utils.BalancedPositiveNegativeSampler(256, 0.5))}
        if utils
        else {},
        same=same_numbers,
        verify=samples_are_sound,
        prediction="38 MB read 6 times by 16 blocks at 60 GB/s each: 200 us, 1 launch beside the keys'",
    )
    yield Case(
        name="assign_atss 16 x 22,400 x 100",
        make_inputs=partial(atss_inputs, 16, 100, device),
        run=assign_atss,
        peers={"eager": eager_atss} if torchvision else {},
        same=same_indices,
        verify=atss_follows_definition,
        may_differ=["eager"],  # ties of the distance
        prediction="8,000 selections of 9 in about 10 us each, 1,000 at a time: 80 us, 3 launches",
    )
