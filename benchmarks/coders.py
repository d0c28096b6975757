"""Box coders: deltas and distances of anchors and points, distributions over bins, and maps of YOLO heads."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

import detops
from harness import Case, optional, tensors

torchvision = optional("torchvision")
if torchvision:
    from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BINS, POINTS, CLASSES = 16, 8400, 80  # of a detector at 640 x 640 pixels
STRIDES = (8.0, 16.0, 32.0)
ANCHORS = ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326))


# Inputs


def boxes_of(n: int, seed: int) -> torch.Tensor:
    """Corners of boxes anywhere in 1000 x 1000 pixels, sides of 10 to 200."""
    generator = torch.Generator().manual_seed(seed)
    corners = 1000 * torch.rand(n, 2, generator=generator)
    return torch.cat([corners, corners + 10 + 190 * torch.rand(n, 2, generator=generator)], dim=1)


def boxes_and_anchors(n: int, device: str) -> tuple[torch.Tensor, ...]:
    return boxes_of(n, 0).to(device), boxes_of(n, 1).to(device)


def deltas_and_anchors(n: int, columns: int, device: str) -> tuple[torch.Tensor, ...]:
    deltas = torch.randn(n, columns, generator=torch.Generator().manual_seed(0))
    return deltas.to(device), boxes_of(n, 1).to(device)


def distances_and_points(images: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    strides = torch.cat([torch.full(((640 // s) ** 2,), float(s)) for s in (8, 16, 32)])
    points = 640 * torch.rand(POINTS, 2, generator=generator)
    distances = 16 * torch.rand(images, POINTS, 4, generator=generator)
    return tuple(t.to(device) for t in (distances, points, strides))


def boxes_and_points(images: int, device: str) -> tuple[torch.Tensor, ...]:
    _, points, strides = distances_and_points(images, device)
    return boxes_of(images * POINTS, 0).view(images, POINTS, 4).to(device), points, strides


def distributions(images: int, by_channel: bool, device: str) -> tuple[torch.Tensor]:
    """A head's map [B, 4, bins, points], or rows of bins [B, points, 4, bins]."""
    logits = torch.randn(images, 4, BINS, POINTS, generator=torch.Generator().manual_seed(0))
    return ((logits if by_channel else logits.permute(0, 3, 1, 2).contiguous()).to(device),)


def yolo_head(images: int, device: str, channels_last: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(images, 3 * (5 + CLASSES), 640 // int(s), 640 // int(s), generator=generator) for s in STRIDES]
    anchors = torch.tensor(ANCHORS, dtype=torch.float32).view(3, 3, 2)
    return *(each.to(device, memory_format=layout) for each in maps), anchors.to(device)


# Peers


def eager_decode_ltrb(distances, points, strides):
    scaled = distances * strides[:, None]
    return torch.cat([points - scaled[..., :2], points + scaled[..., 2:]], dim=-1)


def eager_encode_ltrb(boxes, points, strides):
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
    return (distances / strides[:, None]).clamp(0, BINS - 1.01)


def torchvision_decode_ltrb(distances, points, strides):
    half = strides[:, None] / 2
    anchors = torch.cat([points - half, points + half], dim=1)
    return BoxLinearCoder(normalize_by_size=True).decode(distances, anchors)


def eager_decode_dfl(logits, dim: int):
    bins = torch.arange(BINS, dtype=logits.dtype, device=logits.device)
    return torch.tensordot(logits.softmax(dim), bins, ([dim % logits.ndim], [0]))


def convolution_decode_dfl(logits):
    """The integral as a fixed 1 x 1 convolution, as heads have it."""
    images, _, bins, points = logits.shape
    weight = torch.arange(bins, dtype=logits.dtype, device=logits.device).view(1, bins, 1, 1)
    return torch.nn.functional.conv2d(logits.transpose(1, 2).softmax(1), weight).view(images, 4, points)


def eager_decode_yolo(*inputs):
    *raw, anchors = inputs
    boxes, objectness, scores = [], [], []
    for level, stride, sides in zip(raw, STRIDES, anchors, strict=True):
        images, _, height, width = level.shape
        values = level.view(images, 3, 5 + CLASSES, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        y, x = torch.meshgrid(*(torch.arange(n, device=level.device) for n in (height, width)), indexing="ij")
        centre = (values[..., :2] * 2 - 0.5 + torch.stack([x, y], dim=-1)) * stride
        half = (values[..., 2:4] * 2) ** 2 * sides.view(1, 3, 1, 1, 2) / 2
        boxes.append(torch.cat([centre - half, centre + half], dim=-1).reshape(images, -1, 4))
        objectness.append(values[..., 4].reshape(images, -1))
        scores.append((values[..., 5:] * values[..., 4:5]).reshape(images, -1, CLASSES))
    return torch.cat(boxes, 1), torch.cat(objectness, 1), torch.cat(scores, 1)


def decode_yolo(*inputs):
    *raw, anchors = inputs
    return tuple(detops.decode_yolo(raw, anchors, STRIDES, version="v5"))


# Cases


def close(ours, theirs, scale: float = 1.0) -> bool:
    """Equal but for rounding, of values up to about `scale`."""
    pairs = zip(tensors([ours]), tensors([theirs]), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=2e-6 * scale) for a, b in pairs)


def forward_backward(function: Callable) -> Callable:
    """The result and its gradient with respect to the first tensor."""

    def run(first, *others):
        first = first.detach().requires_grad_()
        result = function(first, *others)
        result.square().sum().backward()
        return result.detach(), first.grad

    return run


def boxes_cases(device: str, quick: bool) -> Iterator[Case]:
    predictions = {1_000: "5 us: the launch", 100_000: "4.8 MB at 3.3 TB/s and 1 launch: 5 us"}
    predictions[1_000_000] = "48 MB at 4 TB/s: 14 us"
    coder = BoxCoder(WEIGHTS) if torchvision else None
    for n in (1_000, 100_000) if quick else (1_000, 100_000, 1_000_000):
        yield Case(
            name=f"decode_boxes {n:,}",
            make_inputs=partial(deltas_and_anchors, n, 4, device),
            run=partial(detops.decode_boxes, weights=WEIGHTS),
            peers={"torchvision": coder.decode_single} if coder else {},
            same=partial(close, scale=1e3),
            verify=None if coder else lambda boxes, *_: bool(boxes.isfinite().all()),
            series="decode_boxes",
            size=n,
            asked="4x torchvision",
            prediction=predictions[n],
        )
        yield Case(
            name=f"encode_boxes {n:,}",
            make_inputs=partial(boxes_and_anchors, n, device),
            run=partial(detops.encode_boxes, weights=WEIGHTS),
            peers={"torchvision": coder.encode_single} if coder else {},
            same=partial(close, scale=1e2),
            verify=None if coder else lambda deltas, *_: bool(deltas.isfinite().all()),
            series="encode_boxes",
            size=n,
            prediction=predictions[n],
        )
    yield Case(
        name="BoxCoder.decode 1,000 x 91 classes",
        make_inputs=partial(deltas_and_anchors, 1_000, 4 * 91, device),
        run=detops.BoxCoder(WEIGHTS).decode_single,
        peers={"torchvision": coder.decode_single} if coder else {},
        same=partial(close, scale=1e3),
        verify=None if coder else lambda boxes, *_: bool(boxes.isfinite().all()),
        prediction="2.9 MB, 1 launch: 5 us",
    )
    yield Case(
        name="decode_boxes 100,000, forward and backward",
        make_inputs=partial(deltas_and_anchors, 100_000, 4, device),
        run=forward_backward(partial(detops.decode_boxes, weights=WEIGHTS)),
        peers={"torchvision": forward_backward(coder.decode_single)} if coder else {},
        same=partial(close, scale=1e6),
        verify=None if coder else lambda found, *_: bool(found[1].isfinite().all()),
        prediction="2 launches of ours, 4.8 and 6.4 MB, and those of the loss: 40 us",
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    yield from boxes_cases(device, quick)
    for images in (1,) if quick else (1, 16):
        rows = images * POINTS
        yield Case(
            name=f"decode_ltrb {images} x {POINTS}",
            make_inputs=partial(distances_and_points, images, device),
            run=detops.decode_ltrb,
            peers={
                "eager": eager_decode_ltrb,
                **({"torchvision": torchvision_decode_ltrb} if torchvision else {}),
            },
            same=partial(close, scale=1e3),
            prediction=f"{rows * 32 / 1e6:.1f} MB, 1 launch: 5 us",
        )
        yield Case(
            name=f"encode_ltrb {images} x {POINTS}",
            make_inputs=partial(boxes_and_points, images, device),
            run=partial(detops.encode_ltrb, max_distance=BINS - 1.01),
            peers={"eager": eager_encode_ltrb},
            same=partial(close, scale=16),
            prediction=f"{rows * 32 / 1e6:.1f} MB, 1 launch: 5 us",
        )
        for by_channel, title in ((True, "4 x 16 x 8400"), (False, "8400 x 4 x 16")):
            dim = 2 if by_channel else -1
            peers = {"eager": partial(eager_decode_dfl, dim=dim)}
            if by_channel:
                peers["convolution"] = convolution_decode_dfl
            yield Case(
                name=f"decode_dfl {images} x {title}",
                make_inputs=partial(distributions, images, by_channel, device),
                run=partial(detops.decode_dfl, dim=dim),
                peers=peers,
                same=partial(close, scale=16),
                prediction=f"{rows * 272 / 1e6:.1f} MB at 3.5 TB/s and 1 launch: {4 + rows * 272 / 3.5e6:.0f} us",
            )
        for channels_last in (False, True):
            bytes_moved = images * 25200 * 85 * 8
            yield Case(
                name=f"decode_yolo {images} x 25200 x 85{', channels_last' if channels_last else ''}",
                make_inputs=partial(yolo_head, images, device, channels_last),
                run=decode_yolo,
                peers={"eager": eager_decode_yolo},
                same=partial(close, scale=1e3),
                measure_memory=not channels_last,
                prediction=f"{bytes_moved / 1e6:.0f} MB at 3.3 TB/s and 1 launch: {5 + bytes_moved / 3.3e6:.0f} us",
            )
