"""Train a small one-stage detector from scratch in a few minutes on a laptop, and see how the pieces fit together.

It learns coins, faces and a cup of coffee, cut out of photographs that come with scikit-image and pasted on others, and
is then tried on coins, faces and backgrounds that it never saw; pasted_scenes.py makes the scenes.

    python examples/train_yolo.py --output train_yolo_output

What detops does in a training step, which is that of YOLOv8:

    point_anchors          the points of the image that the cells of the feature maps speak for
    decode_dfl             from logits over bins to the distances of a box's sides from its point
    decode_ltrb            from points and distances to boxes
    assign_task_aligned    from predictions and true boxes to what each point is to learn
    varifocal_loss, complete_box_iou_loss, distribution_focal_loss

To detect, `multiclass_nms` takes the place of the last two lines.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pasted_scenes import BACKGROUNDS, CLASSES, SIZE, UNSEEN_BACKGROUNDS, Scenes, cut_out_objects
from torch import Tensor, nn
from tqdm import tqdm

import detops

STRIDES = (8, 16)  # pixels of a cell of each feature map
BINS = 8  # of distances: a side is at most 7 cells away from its point


class Predictions(NamedTuple):
    """Of the A points of all feature maps."""

    logits: Tensor  # [B, A, C] of classes
    sides: Tensor  # [B, 4, BINS, A] logits of the distances left, top, right, bottom, in cells
    boxes: Tensor  # [B, A, 4] xyxy in pixels
    points: Tensor  # [A, 2] x, y in pixels
    strides: Tensor  # [A]


def block(inputs, outputs, stride=1):
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    # Unlike batch norm it computes the same in training and use, and the same however a batch is split.
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())


class Detector(nn.Module):
    """Two feature maps, and at each of their cells one box and a score for each class."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Sequential(
            block(1, 16, 2), block(16, 32, 2), block(32, 32), block(32, 64, 2), block(64, 64), block(64, 64)
        )
        self.coarse = nn.Sequential(block(64, 96, 2), block(96, 96), block(96, 96))
        self.heads = nn.ModuleList(
            nn.Sequential(block(width, 64), nn.Conv2d(64, len(CLASSES) + 4 * BINS, 1)) for width in (64, 96)
        )
        for head in self.heads:  # most points see no object, and training is quicker if that is not to be learnt
            nn.init.constant_(head[-1].bias[: len(CLASSES)], -4.6)  # a score of 0.01

    def forward(self, images) -> Predictions:
        """Of images [B, 1, height, width], the sides multiples of 16."""
        fine = self.fine(images)
        maps = [head(level) for head, level in zip(self.heads, (fine, self.coarse(fine)), strict=True)]
        points, strides = detops.point_anchors([each.shape[-2:] for each in maps], STRIDES, device=images.device)
        outputs = torch.cat([each.flatten(2) for each in maps], dim=2)  # the order of the points
        logits, sides = outputs.split([len(CLASSES), 4 * BINS], dim=1)
        sides = sides.unflatten(1, (4, BINS))
        boxes = detops.decode_ltrb(detops.decode_dfl(sides, dim=2).mT, points, strides)
        return Predictions(logits.mT, sides, boxes, points, strides)


def detection_loss(predictions, truth):
    """How far predictions are from the true objects, a number; `truth` is padded `GroundTruth`."""
    logits, sides, boxes, points, strides = predictions
    scores = logits.detach().sigmoid()
    targets = detops.assign_task_aligned(scores, boxes, points, truth.labels, truth.boxes, truth.valid)
    total = targets.scores.sum().clamp(min=1)  # so that the loss does not follow the number of objects
    class_loss = detops.varifocal_loss(logits, targets.scores, reduction="sum")

    # Only points with an object have a box to learn; the better one fits, the more it counts.
    image, point = targets.foreground.nonzero(as_tuple=True)
    weights, true_boxes = targets.scores[image, point].sum(-1), targets.boxes[image, point]
    box_loss = weights @ detops.complete_box_iou_loss(boxes[image, point], true_boxes)
    distances = detops.encode_ltrb(true_boxes, points[point], strides[point], max_distance=BINS - 1)
    side_loss = weights @ detops.distribution_focal_loss(sides[image, :, :, point], distances).mean(1)
    return (class_loss + 5 * box_loss + side_loss) / total


def training_step(model, optimizer, images, truth):
    """One step down the gradient, and the loss before it."""
    loss = detection_loss(model(images), truth)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def detect(model, images, score_threshold=0.5):
    """The padded `Detections` of images; an object has one class, so that boxes of all classes compete."""
    found = model(images)
    scores = found.logits.sigmoid()
    return detops.multiclass_nms(found.boxes, scores, score_threshold=score_threshold, class_agnostic=True)


def compare(found, truth):
    """For each class how many objects there are, how many are found, and how many detections find nothing.

    A detection finds the object that it overlaps most, of its class, by 0.5 at least and not found by a better one.
    """
    there, hits, false = (torch.zeros(len(CLASSES), dtype=torch.int64) for _ in range(3))
    for image, count in enumerate(found.counts.tolist()):
        valid, labels = truth.valid[image], found.labels[image, :count]
        true_labels = truth.labels[image, valid]
        there += true_labels.bincount(minlength=len(CLASSES))
        overlaps = detops.box_iou(found.boxes[image, :count], truth.boxes[image, valid])
        overlaps *= labels[:, None] == true_labels
        for label, row in zip(labels, overlaps, strict=True):  # the best detection first
            if len(row) and row.max() >= 0.5:
                hits[label] += 1
                overlaps[:, row.argmax()] = 0
            else:
                false[label] += 1
    return there, hits, false


def draw_detections(images, found, truth, scenes, path):
    """Twelve scenes: the detections with their scores in the colours of their classes, the truth dashed."""
    figure = Figure(figsize=(14, 11), layout="constrained")
    for i, axes in zip(scenes, figure.subplots(3, 4).flat, strict=True):
        axes.imshow(images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, SIZE, SIZE, 0))
        axes.set_axis_off()
        for x1, y1, x2, y2 in truth.boxes[i, truth.valid[i]].tolist():
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linestyle="--"))
        rows = (column[i, : found.counts[i]].tolist() for column in (found.boxes, found.scores, found.labels))
        for (x1, y1, x2, y2), score, label in zip(*rows, strict=True):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=f"C{label}", linewidth=2))
            axes.text(x1, y1 - 2, f"{CLASSES[label]} {score:.2f}", color="white", backgroundcolor=f"C{label}")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="train_yolo_output", help="the folder for pictures")
    parser.add_argument("--steps", type=int, default=1200, help="batches to train with (default: 1200)")
    parser.add_argument("--batch-size", type=int, default=16, help="scenes in a batch (default: 16)")
    parser.add_argument("--unseen", type=int, default=500, help="unseen scenes, 24 at least (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds train equal detectors (default: 0)")
    args = parser.parse_args()
    if args.unseen < 24:
        parser.error("--unseen must be at least 24: so many are drawn")

    torch.manual_seed(args.seed)
    objects, unseen_objects = cut_out_objects()
    scenes = Scenes(objects, BACKGROUNDS, args.seed)
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)

    start = time.perf_counter()
    losses = []
    for step in (progress := tqdm(range(1, args.steps + 1), "training")):
        losses.append(training_step(model, optimizer, *scenes.batch(args.batch_size)))
        schedule.step()
        recent = sum(losses[-50:]) / len(losses[-50:])
        progress.set_postfix(loss=f"{recent:.3f}")
        if step % max(1, args.steps // 10) == 0:
            tqdm.write(f"step {step}: loss {recent:.3f}")
    print(f"trained in {time.perf_counter() - start:.0f} s")

    images, truth = Scenes(unseen_objects, UNSEEN_BACKGROUNDS, args.seed + 1).batch(args.unseen)
    found = detect(model, images)
    there, hits, false = compare(found, truth)
    print(f"{len(images)} scenes of unseen objects and backgrounds:")
    for name, *counts in zip(CLASSES, there.tolist(), hits.tolist(), false.tolist(), strict=True):
        print("{}: {} of them, {} found, {} false detections".format(name, *counts))
    print(f"{hits.sum() / there.sum():.1%} of {there.sum()} objects found at IoU 0.5")
    print(
        f"{false.sum() / len(images):.2f} false detections per scene, precision {hits.sum() / found.counts.sum():.1%}"
    )

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for page in range(2):
        draw_detections(images, found, truth, range(12 * page, 12 * page + 12), folder / f"unseen_{page}.png")
    print(f"pictures written to {folder}")


if __name__ == "__main__":
    main()
