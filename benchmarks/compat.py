"""torchvision's models end to end, with detops in torchvision's place and without.

Of a training step of Faster R-CNN it is measured too which share of it the ops take, before and after.
"""

import functools
import time
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn

import detops
import harness
from detops.compat import _redirect


def cases(device: str, quick: bool):
    if harness.optional("torchvision") is None:
        return
    step = FasterRCNNStep(device, quick)
    yield harness.Case(
        step.name,
        step.inputs,
        run=in_place(step.run),
        peers={"torchvision": step.run},
        same=close,
        asked="faster",
        prediction="the backbone's time, and that of the ops as their families predict it",
        shares=step.shares_of_ops,
    )
    for process in (RetinaNetDetections(device, quick), SSDDetections(device, quick)):
        yield harness.Case(
            process.name,
            process.inputs,
            run=in_place(process.run),
            peers={"torchvision": process.run},
            same=close,
            asked="2x",
            prediction="reads the logits once; some 30 launches an image",
        )


def in_place(function):
    def run(*inputs):
        with detops.compat.torchvision():
            return function(*inputs)

    return run


def close(ours, theirs):
    """Labels equal, the rest up to rounding."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if not a.is_floating_point() else torch.allclose(a, b, rtol=1e-4, atol=1e-3)
        for a, b in zip(ours, theirs, strict=True)
    )


class FasterRCNNStep:
    """Two images, forward and backward; random weights. The result is the losses."""

    def __init__(self, device: str, quick: bool):
        self.device, self.side, self.depth = device, 160 if quick else 480, 18 if quick else 50
        self.name = f"Faster R-CNN step, ResNet-{self.depth} FPN, 2 x {self.side} x {self.side}"

    @functools.cached_property
    def model(self):
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

        torch.manual_seed(0)
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{self.depth}", weights=None, trainable_layers=5)
        model = FasterRCNN(backbone, num_classes=91, min_size=self.side, max_size=self.side)
        with torch.no_grad():
            for name, module in model.backbone.named_modules():  # normalise, which frozen layers of ones do not
                if name.endswith(("bn2", "bn3")):
                    module.weight *= 0.2
        return model.to(self.device).train()

    def inputs(self):
        self.model.zero_grad()  # built before anything is timed
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, self.side, self.side, generator=generator)
        low = torch.rand(2, 12, 2, generator=generator) * self.side * 0.7
        boxes = torch.cat((low, low + 8 + torch.rand(2, 12, 2, generator=generator) * self.side * 0.25), dim=2)
        labels = torch.randint(1, 91, (2, 12), generator=generator)
        return tuple(each.to(self.device) for each in (images, boxes, labels))

    def run(self, images, boxes, labels):
        torch.manual_seed(0)
        self.model.zero_grad()
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
        losses = self.model(list(images), targets)
        sum(losses.values()).backward()
        return [loss.detach() for loss in losses.values()]

    def shares_of_ops(self, *inputs):
        return {name: share_of_ops(self.run, inputs, name == "torchvision") for name in ("torchvision", "detops")}


class Detections:
    """What a detector does in eval mode after its network."""

    def __init__(self, device: str, quick: bool):
        self.device, self.images = device, 1 if quick else 4

    def run(self, *inputs):
        half = len(inputs) // 2
        found = self.process(list(inputs[:half]), list(inputs[half:]))
        return [each[key] for each in found for key in ("labels", "scores", "boxes")]


def anchors_of(model, side, strides, device):
    maps = [torch.zeros(1, 1, -(-side // stride), -(-side // stride), device=device) for stride in strides]
    images = SimpleNamespace(tensors=torch.zeros(1, 3, side, side), image_sizes=[(side, side)])
    (anchors,) = model.anchor_generator(images, maps)
    return anchors


class Maps(nn.Module):
    """Stands for a backbone, which is not run."""

    def __init__(self, out_channels):
        super().__init__()
        self.out_channels = out_channels

    def forward(self, x):
        return OrderedDict()


class RetinaNetDetections(Detections):
    strides = 8, 16, 32, 64, 128

    def __init__(self, device: str, quick: bool):
        super().__init__(device, quick)
        self.side = 320 if quick else 640
        self.name = f"RetinaNet, detections, {self.images} x {self.side} x {self.side}, 0.1% above the threshold"

    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        counts = [9 * (-(-self.side // stride)) ** 2 for stride in self.strides]
        logits = [torch.randn(self.images, count, 91, generator=generator) * 1.7 - 8.2 for count in counts]
        deltas = [torch.randn(self.images, count, 4, generator=generator) * 0.3 for count in counts]
        return tuple(each.to(self.device) for each in (*logits, *deltas))

    @functools.cached_property
    def model(self):
        from torchvision.models.detection import RetinaNet

        return RetinaNet(Maps(32), 91)

    @functools.cached_property
    def anchors(self):
        anchors = anchors_of(self.model, self.side, self.strides, self.device)
        return list(anchors.split([9 * (-(-self.side // stride)) ** 2 for stride in self.strides]))

    def process(self, logits, deltas):
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        shapes = [(self.side, self.side)] * self.images
        return self.model.postprocess_detections(outputs, [self.anchors] * self.images, shapes)


class SSDDetections(Detections):
    def __init__(self, device: str, quick: bool):
        super().__init__(device, quick)
        self.name = f"SSD300, detections, {self.images} x 8732 boxes, 0.2% above the threshold"

    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.images, 8732, 91, generator=generator)
        logits[..., 0] += 7.5  # background
        deltas = torch.randn(self.images, 8732, 4, generator=generator) * 0.3
        return logits.to(self.device), deltas.to(self.device)

    @functools.cached_property
    def model(self):
        from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
        from torchvision.models.detection.ssd import SSD

        ratios = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
        scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
        boxes = DefaultBoxGenerator(ratios, scales=scales, steps=[8, 16, 32, 64, 100, 300])
        return SSD(Maps([32] * 6), boxes, (300, 300), 91)

    @functools.cached_property
    def anchors(self):
        sides = 38, 19, 10, 5, 3, 1
        maps = [torch.zeros(1, 1, side, side, device=self.device) for side in sides]
        images = SimpleNamespace(tensors=torch.zeros(1, 3, 300, 300), image_sizes=[(300, 300)])
        return self.model.anchor_generator(images, maps)[0]

    def process(self, logits, deltas):
        outputs = {"cls_logits": logits[0], "bbox_regression": deltas[0]}
        return self.model.postprocess_detections(outputs, [self.anchors] * self.images, [(300, 300)] * self.images)


def share_of_ops(run, inputs, originals: bool) -> float:
    """The part of a run that the functions take which detops replaces, and the backward kernels of theirs.

    On a GPU this waits for it before and after each function, so that a function's time is that of its kernels and
    launches; the step that it is compared with then waits too. Not counted is the backward of what torchvision composes
    of torch's ops (IoUs, losses, coders): its kernels are torch's. So the share of torchvision is a lower bound.
    """
    with detops.compat.torchvision():
        clock = Clock(inputs[0].is_cuda, originals)
        harness.timed(run, *inputs)
        samples = []
        for _ in range(3):
            clock.seconds = 0.0
            _, total = harness.timed(run, *inputs)
            samples.append((total, clock.seconds))
        with torch.profiler.profile() as profile:
            harness.timed(run, *inputs)
    total, forward = sorted(samples)[1]
    return (forward + backward_seconds(profile, inputs[0].is_cuda)) / total


def backward_seconds(profile, on_gpu: bool) -> float:
    """Of the backward ops of both libraries; on a GPU that of their kernels, which their launches hide behind."""
    ops = [
        each
        for each in profile.key_averages()
        if each.device_type == torch.autograd.DeviceType.CPU  # the ops, which hold the time of their kernels
        and each.key.startswith(("torchvision::", "detops::"))
        and "backward" in each.key
    ]
    return sum(each.self_device_time_total if on_gpu else each.self_cpu_time_total for each in ops) / 1e6


class Clock:
    """Counts the seconds inside redirected functions, of detops or of the originals, the outermost ones."""

    def __init__(self, on_gpu: bool, originals: bool):
        self.seconds, self.inside, self.on_gpu = 0.0, False, on_gpu
        _redirect.observe(
            lambda _, replacement, original: self.timed(
                original if originals else functools.partial(replacement, original)
            )
        )

    def timed(self, function):
        def run(*args):
            if self.inside:
                return function(*args)
            self.inside, start = True, self.now()
            try:
                return function(*args)
            finally:
                self.inside = False
                self.seconds += self.now() - start

        return run

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
