"""Target assignment of YOLOv3 and YOLOv5, against the dense formulations in PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch

import detops
from harness import Case, reference

STRIDES = (8, 16, 32)
ANCHORS = (
    ((10.0, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


def inputs(images: int, gts: int, image_size: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    centres = image_size * torch.rand(images, gts, 2, generator=generator)
    sides = 8 * 40 ** torch.rand(images, gts, 2, generator=generator)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], -1)
    labels = torch.randint(0, 80, (images, gts), generator=generator)
    valid = torch.rand(images, gts, generator=generator) < 0.9
    return tuple(each.to(device) for each in (boxes, labels, valid, torch.tensor(ANCHORS)))


# YOLOv5


def run_yolov5(boxes, labels, valid, anchors, image_size: int):
    return detops.assign_yolov5(boxes, labels, valid, anchors, STRIDES, (image_size, image_size))


def dense_yolov5(boxes, labels, valid, anchors, image_size: int):
    """Lists of rows, in the order of detops: tensors [5, A, n] and boolean indexing."""
    image, gt = valid.nonzero(as_tuple=True)
    low, high = boxes[image, gt].split(2, 1)
    shares = torch.cat([(low + high) / 2 / image_size, (high - low) / image_size], 1)
    offsets = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], device=boxes.device) * 0.5
    levels = []
    for number, stride in enumerate(STRIDES):
        cells = image_size // stride
        of_level = anchors[number] / stride
        rows = shares * cells
        ratio = rows[:, 2:] / of_level[:, None]
        anchor, row = (torch.maximum(ratio, 1 / ratio).amax(2) < 4).nonzero(as_tuple=True)
        centre = rows[row, :2]
        far = cells - centre
        near_low, near_high = (centre % 1 < 0.5) & (centre > 1), (far % 1 < 0.5) & (far > 1)
        takes = torch.stack([torch.ones_like(near_low[:, 0]), *near_low.unbind(1), *near_high.unbind(1)])
        which, place = takes.nonzero(as_tuple=True)
        anchor, row = anchor[place], row[place]
        cell = (rows[row, :2] - offsets[which]).long().clamp(0, cells - 1)
        found = torch.cat([rows[row, :2] - cell, rows[row, 2:]], 1)
        indices = torch.stack([image[row], anchor, cell[:, 1], cell[:, 0]], 1)
        levels.append((labels[image[row], gt[row]], found, indices, gt[row]))
    return levels


def same_rows(ours, levels) -> bool:
    return all(
        all(torch.equal(ours[i][number, : len(rows[0])], each) for i, each in enumerate(rows))
        and int(ours.counts[number]) == len(rows[0])
        for number, rows in enumerate(levels)
    )


# YOLOv3


def run_yolov3(boxes, labels, valid, anchors, image_size: int):
    return detops.assign_yolov3(boxes, labels, valid, anchors, STRIDES, (image_size, image_size))


def dense_yolov3(boxes, labels, valid, anchors, image_size: int):
    """A matrix [gt, anchor] an image."""
    places, of_cells = [], []
    for number, stride in enumerate(STRIDES):
        cells = image_size // stride
        along = (torch.arange(cells, device=boxes.device) + 0.5) * stride
        y, x = torch.meshgrid(along, along, indexing="ij")
        centres, half = torch.stack([x, y], -1).view(1, -1, 2), anchors[number][:, None] / 2
        places.append(torch.cat([centres - half, centres + half], 2).view(-1, 4))
    places = torch.cat(places)
    areas = (places[:, 2:] - places[:, :2]).prod(1)
    results = torch.full((len(boxes), len(places)), -1, device=boxes.device)
    for image in range(len(boxes)):
        rows = valid[image].nonzero().flatten()
        gts = boxes[image, rows]
        sides = torch.minimum(gts[:, None, 2:], places[:, 2:]) - torch.maximum(gts[:, None, :2], places[:, :2])
        intersection = sides.clamp(min=0).prod(2)
        ious = intersection / ((gts[:, 2:] - gts[:, :2]).prod(1)[:, None] + areas - intersection)
        centres, of_cells = (gts[:, :2] + gts[:, 2:]) / 2, []
        for stride in STRIDES:
            cells = image_size // stride
            x, y = (centres / stride).long().clamp(0, cells - 1).unbind(1)
            flags = torch.zeros(cells * cells, dtype=torch.bool, device=boxes.device)
            flags[y * cells + x] = True
            of_cells.append(flags.repeat(anchors.shape[1]))
        responsible = torch.cat(of_cells)
        best, which = ious.max(0)
        result = torch.where(best > 0.5, torch.where(responsible, rows[which], -2), -1)
        ious = torch.where(responsible, ious, -1.0)
        highest = ious.amax(1)
        for gt, row in enumerate(rows.tolist()):
            if highest[gt] > 0:
                result[ious[gt] == highest[gt]] = row
        results[image] = result
    return results


def same_assignment(ours, theirs) -> bool:
    return torch.equal(ours.gt_indices, theirs)


def follows_definition(result, boxes, labels, valid, anchors, image_size: int) -> bool:
    """The first image is what the NumPy reference gives."""
    arrays = (each[:1].cpu().numpy() for each in (boxes, labels, valid))
    size = (image_size, image_size)
    expected = reference("yolov3").assign_yolov3(*arrays, anchors.cpu().numpy(), STRIDES, size)
    return all(torch.equal(ours[:1].cpu(), torch.as_tensor(each)) for ours, each in zip(result, expected, strict=True))


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    for images, gts in ((16, 50),) if quick else ((16, 50), (64, 200)):
        yield Case(
            name=f"assign_yolov5 {images} x {gts} gts, 3 levels",
            make_inputs=partial(inputs, images, gts, 640, device),
            run=partial(run_yolov5, image_size=640),
            peers={"dense PyTorch": partial(dense_yolov5, image_size=640)},
            same=same_rows,
            asked=">= 5x" if cpu and images == 16 else "",
            prediction="11 launches, 5 of them memsets, and 8 of torch: 80 us",
        )
    images, size = (4, 320) if quick else (16, 640)
    yield Case(
        name=f"assign_yolov3 {images} x 50 gts, {63 * (size // 32) ** 2:,} anchors",
        make_inputs=partial(inputs, images, 50, size, device),
        run=partial(run_yolov3, image_size=size),
        peers={"dense PyTorch": partial(dense_yolov3, image_size=size)},
        same=same_assignment,
        verify=partial(follows_definition, image_size=size),
        measure_memory=True,
        prediction="13 MB, 4 launches, 2e7 pairs: 40 us",
    )
