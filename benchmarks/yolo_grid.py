"""Targets on a grid and their loss, against the formulations in PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch

import detops
from harness import Case, reference

SIZE = 416
GRID = 13
CLASSES = 20


def gts(images: int, count: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    centres = SIZE * torch.rand(images, count, 2, generator=generator)
    sides = 8 * 30 ** torch.rand(images, count, 2, generator=generator)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], -1)
    labels = torch.randint(0, CLASSES, (images, count), generator=generator)
    return boxes.to(device), labels.to(device), torch.ones_like(labels, dtype=torch.bool, device=device)


def run_assign(boxes, labels, valid):
    return detops.assign_yolo_grid(boxes, labels, valid, grid_size=GRID, image_size=(SIZE, SIZE), num_classes=CLASSES)


def loop_assign(boxes, labels, valid):
    """The textbook's loop over the boxes."""
    targets = torch.zeros(len(boxes), GRID, GRID, 5 + CLASSES, device=boxes.device)
    for image in range(len(boxes)):
        for box, label in zip(boxes[image].double().tolist(), labels[image].tolist(), strict=True):
            x, y = ((box[0] + box[2]) / 2 * GRID / SIZE, (box[1] + box[3]) / 2 * GRID / SIZE)
            column, row = min(int(x), GRID - 1), min(int(y), GRID - 1)
            if targets[image, row, column, 0] == 0:
                size = (box[2] - box[0]) / (SIZE / GRID), (box[3] - box[1]) / (SIZE / GRID)
                targets[image, row, column, :5] = torch.tensor([1, x - column, y - row, *size])
                targets[image, row, column, 5 + label] = 1
    return targets


def assign_follows_definition(result, boxes, labels, valid) -> bool:
    arrays = (each[:1].cpu().numpy() for each in (boxes, labels, valid))
    expected = reference("yolo_grid").assign_yolo_grid(*arrays, None, (GRID, GRID), (SIZE, SIZE), CLASSES)
    return torch.equal(result[:1].cpu(), torch.as_tensor(expected[:, :, :, 0]))


def predictions(images: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    targets = run_assign(*gts(images, 20, "cpu"))
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    return (targets + 0.3 * noise).to(device), targets.to(device)


def eager_loss(predicted, targets):
    def soft_root(v):
        return v / (v.abs() + 1e-6).sqrt()

    objects = targets[..., 0] > 0
    of_objects = (predicted - targets)[objects]
    size = soft_root(predicted[objects][:, 3:5]) - soft_root(targets[objects][:, 3:5])
    of_background = (predicted - targets)[..., 0][~objects]
    loss = 5 * (of_objects[:, 1:3].square().sum() + size.square().sum()) + of_objects[:, 0].square().sum()
    return loss + of_objects[:, 5:].square().sum() + 0.5 * of_background.square().sum()


def with_gradient(loss, predicted, targets):
    predicted = predicted.detach().requires_grad_()
    value = loss(predicted, targets)
    return value.detach(), torch.autograd.grad(value, predicted)[0]


def close(ours, theirs) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def cases(device: str, quick: bool) -> Iterator[Case]:
    images = 8 if quick else 64
    yield Case(
        name=f"assign_yolo_grid {images} x 20 gts, 13 x 13, C=20",
        make_inputs=partial(gts, images, 20, device),
        run=run_assign,
        peers={"loop": loop_assign},
        verify=assign_follows_definition,
        may_differ=["loop"],  # rounds the centre twice
        prediction="1 MB, 2 launches: 8 us",
    )
    yield Case(
        name=f"yolo_loss and gradient {images} x 13 x 13 x 25",
        make_inputs=partial(predictions, images, device),
        run=partial(with_gradient, detops.yolo_loss),
        peers={"eager": partial(with_gradient, eager_loss)},
        same=close,
        prediction="3 MB, 3 launches, autograd: 50 us",
    )
