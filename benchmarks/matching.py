"""Matching of anchors to ground truth."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Case, optional, reference, same

import detops

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


def scipy_loop(cost: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(cost), cost.shape[2]), -1)
    for image, matrix in enumerate(cost.cpu().numpy()):
        queries, targets = scipy_optimize.linear_sum_assignment(matrix)
        out[image, targets] = torch.from_numpy(queries)
    return out.to(cost.device)


def lap_batch(cost: torch.Tensor) -> torch.Tensor:
    return lap.batch_linear_assignment(cost.transpose(1, 2).contiguous())


def assigns_well(found: torch.Tensor, cost: torch.Tensor) -> bool:
    """Every query at most once, as many pairs as there can be, and no swap of two queries, or for a free one, pays."""
    for queries, matrix in zip(found.cpu(), cost.double().cpu(), strict=True):
        targets = (queries >= 0).nonzero()[:, 0]
        used = queries[targets]
        if len(set(used.tolist())) != min(matrix.shape):
            return False
        paid = matrix[used, targets]
        swapped = matrix[used][:, targets]
        if (swapped + swapped.T + 1e-9 < paid + paid[:, None]).any():
            return False
        free = torch.ones(len(matrix), dtype=torch.bool)
        free[used] = False
        if (matrix[free][:, targets] + 1e-9 < paid).any():
            return False
    return True


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
                verify=assigns_well,
                asked=asked,
                prediction="about 250 steps of 0.5 us in the slowest problem: 130 us, 2 launches",
            )
