"""The losses that torchvision has too: values and gradients."""

import numpy as np
import pytest
import torch

import detops
import inputs
from inputs import to_torch
from test_iou_losses import all_pairs, flat, grid_pairs, pairs
from test_losses import arguments, hard_targets, logits

REDUCTIONS = ("none", "mean", "sum")
IOU_LOSSES = ("generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss")


def compare(ours, theirs, leaves, tolerance):
    """Losses and their gradients; torchvision computes on the CPU."""
    got, expected = [], []
    for function, device, results in ((ours, leaves[0].device, got), (theirs, "cpu", expected)):
        tensors = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
        losses = function(*tensors)
        (losses * torch.arange(1.0, 1 + losses.numel()).to(losses).view(losses.shape)).sum().backward()
        results += [losses, *(tensor.grad for tensor in tensors)]
    for mine, his in zip(got, expected, strict=True):
        assert mine.dtype == his.dtype and mine.shape == his.shape
        mine, his = mine.detach().cpu(), his.detach()
        scale = his[his.isfinite()].abs().max().item() if his.isfinite().any() else 1.0
        torch.testing.assert_close(mine, his, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_focal_loss(torchvision, device, dtype, reduction):
    n = device.limit(1000, 100)
    x, tolerance = device.put(logits(n, 8), dtype), 1e-5 if dtype == torch.float32 else 1e-12
    for targets in (hard_targets(n, 8), np.random.default_rng(0).random((n, 8))):
        for alpha, gamma in ((0.25, 2), (-1, 2), (0.75, 1.5), (0.5, 0)):
            ours, theirs = (
                lambda x, f=f, t=t: f(x, t, alpha=alpha, gamma=gamma, reduction=reduction)  # noqa: B023
                for f, t in (
                    (detops.sigmoid_focal_loss, device.put(targets, dtype)),
                    (torchvision.ops.sigmoid_focal_loss, to_torch(targets, dtype)),
                )
            )
            compare(ours, theirs, (x,), tolerance)


def test_sigmoid_focal_loss_of_class_targets(torchvision, device):
    x, labels = arguments("sigmoid_by_class", 100, 8)
    labels = np.maximum(labels, 0)
    one_hot = to_torch(np.eye(9)[labels][:, :8])
    ours, theirs = detops.sigmoid_focal_loss, torchvision.ops.sigmoid_focal_loss
    compare(lambda x: ours(x, device.put(labels)), lambda x: theirs(x, one_hot), (device.put(x),), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigmoid_focal_loss_in_half_precision(torchvision, device, dtype):
    """torchvision rounds after every step: not closer to the losses of the float32 copies than here."""
    x, t = device.put(logits(500, 8), dtype), device.put(hard_targets(500, 8), dtype)
    wide = torchvision.ops.sigmoid_focal_loss(x.float().cpu(), t.float().cpu())
    ours = detops.sigmoid_focal_loss(x, t).cpu()
    theirs = torchvision.ops.sigmoid_focal_loss(x.cpu(), t.cpu())
    assert ours.dtype == theirs.dtype
    assert (ours - wide).abs().max() <= (theirs - wide).abs().max()


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan")])
def test_errors_begin_alike(torchvision, alpha):
    x = torch.zeros(3, 2)
    for module in (detops, torchvision.ops):
        with pytest.raises(ValueError, match="^Invalid alpha value"):
            module.sigmoid_focal_loss(x, x, alpha=alpha)
        for name in ("sigmoid_focal_loss", *IOU_LOSSES):
            boxes = torch.zeros(3, 4)
            with pytest.raises(ValueError, match="^Invalid"):
                getattr(module, name)(boxes, boxes, reduction="xyz")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", IOU_LOSSES)
def test_iou_losses(torchvision, device, name, dtype, reduction):
    ours, theirs = getattr(detops, name), getattr(torchvision.ops, name)
    n, tolerance = device.limit(2000), 3e-6 if dtype == torch.float32 else 1e-12
    for boxes in (pairs(n), grid_pairs(n)):
        for eps in (1e-7, 1e-3, 1.0):
            if name == "complete_box_iou_loss" and eps != 1e-7:
                continue  # it uses the argument for alpha alone
            options = {"reduction": reduction, "eps": eps}
            leaves = [device.put(each, dtype) for each in boxes]
            compare(lambda *b, o=options: ours(*b, **o), lambda *b, o=options: theirs(*b, **o), leaves, tolerance)


@pytest.mark.parametrize(
    "edge", ["touching", "identical", "nested", "zero_area", "inverted", "nan", "negative", "huge"]
)
@pytest.mark.parametrize("name", IOU_LOSSES)
def test_iou_losses_at_the_edges(torchvision, device, name, edge):
    boxes1, boxes2 = (to_torch(boxes) for boxes in all_pairs(inputs.edge_boxes(edge)))
    ours = getattr(detops, name)(boxes1.to(device.torch), boxes2.to(device.torch)).cpu()
    theirs = getattr(torchvision.ops, name)(boxes1, boxes2)
    # Of two boxes without area the loss is 1 here; torchvision's grows with their distance, and its gradient is the
    # reciprocal of eps. The aspect ratio of a point makes its complete loss NaN.
    no_area = flat(boxes1) & flat(boxes2)
    assert (ours[no_area] == 1).all()
    point = (boxes1[:, :2] == boxes1[:, 2:]).all(1) | (boxes2[:, :2] == boxes2[:, 2:]).all(1)
    undefined = point & theirs.isnan()
    assert not undefined.any() or name == "complete_box_iou_loss"
    same = ~no_area & ~undefined
    torch.testing.assert_close(ours[same], theirs[same], rtol=3e-6, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("name", IOU_LOSSES)
def test_iou_losses_of_no_boxes(torchvision, name):
    boxes = torch.zeros(0, 4)
    for reduction in REDUCTIONS:
        ours = getattr(detops, name)(boxes, boxes, reduction=reduction)
        assert torch.equal(ours, getattr(torchvision.ops, name)(boxes, boxes, reduction=reduction))
