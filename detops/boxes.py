"""Boxes of a batch of images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class GroundTruth(NamedTuple):
    """The annotated boxes of a batch of images, padded to the same number; see `pad_ground_truth`."""

    boxes: Tensor
    """[B, M, 4] in the dtype of the inputs; 0 in padded rows."""
    labels: Tensor
    """[B, M] int64; -1 in padded rows."""
    valid: Tensor
    """[B, M] bool; False in padded rows."""


def pad_ground_truth(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> GroundTruth:
    """Pads per-image ground truth to one batch, the form that all batched ops of detops take.

    M is the largest number of boxes of an image. Rows that are not valid never influence a result of detops.

    Args:
        boxes: for each of B images a tensor [n, 4], or an empty one, of the same floating dtype and device.
        labels: for each image an integer tensor [n]: the classes of its boxes.

    Returns:
        `GroundTruth(boxes [B, M, 4], labels [B, M] int64, valid [B, M] bool)` on the device of the inputs. An empty
        list gives B = M = 0; images without boxes are ordinary. The rows of an image keep their order.

    Gradients pass to `boxes`. No host synchronisation.

    Raises:
        ValueError: the lists or the tensors of an image differ in length, or a tensor has a wrong shape.

    Example:
        >>> boxes = [torch.tensor([[0., 0., 8., 8.], [2., 2., 6., 6.]]), torch.zeros(0, 4)]
        >>> truth = pad_ground_truth(boxes, [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64)])
        >>> truth.labels.tolist()
        [[3, 1], [-1, -1]]
    """
    if len(boxes) != len(labels):
        raise ValueError(f"pad_ground_truth: labels must have one tensor per image ({len(boxes)}), got {len(labels)}")
    for image, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        if image_boxes.numel() and (image_boxes.ndim != 2 or image_boxes.shape[1] != 4):
            raise ValueError(
                f"pad_ground_truth: boxes[{image}] must have shape [n, 4], got {list(image_boxes.shape)}"
            )
        if image_labels.numel() != image_boxes.numel() // 4 or image_labels.ndim != 1:
            raise ValueError(
                f"pad_ground_truth: labels[{image}] must have shape [n] with n = {image_boxes.numel() // 4}, "
                f"got {list(image_labels.shape)}"
            )
    if not boxes:
        return GroundTruth(torch.zeros(0, 0, 4), torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
    return GroundTruth(
        pad_sequence([image_boxes.reshape(-1, 4) for image_boxes in boxes], batch_first=True),
        pad_sequence([image_labels.long() for image_labels in labels], batch_first=True, padding_value=-1),
        # Built on the device: lengths known to the host would have to be copied there.
        pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in labels], batch_first=True),
    )
