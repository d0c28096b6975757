"""TaskAlignedAssigner: the tuple that Ultralytics' trainer takes, and the results of Ultralytics' class itself."""

import numpy as np
import pytest
import torch

import detops
from inputs import to_torch
from yolo_scenes import grid_points, scene


class Cpu:
    put = staticmethod(to_torch)


def published_assigner(**options):
    """Ultralytics' class; skips the test where it cannot be imported."""
    module = pytest.importorskip("ultralytics.utils.tal", exc_type=ImportError)
    return module.TaskAlignedAssigner(num_classes=5, **options)


def overlapping_scene(points, gts, seed, classes=5):
    """All boxes share a middle, so that no metric is 0: what Ultralytics does with ties is open.

    No point is on an edge either: its boxes go through centre and size, which moves edges by a rounding.
    """
    rng = np.random.default_rng(seed)
    arrays = scene(points, gts, seed=seed, classes=classes)
    centre, side = rng.uniform(30, 98, (2, gts, 2)), rng.uniform(24, 60, (2, gts, 2))
    arrays.gt_valid[:, 0] = True
    low, high = np.minimum(centre - side / 2, 60.3), np.maximum(centre + side / 2, 67.7)
    gt_boxes = np.concatenate([low, high], 2)
    distances = np.abs(points[:, None] - centre[:, None]).sum(3) + 1e6 * ~arrays.gt_valid[:, None]
    near = gt_boxes[np.arange(2)[:, None], distances.argmin(2)]
    boxes = near + rng.uniform(-4, 4, near.shape)
    boxes = np.concatenate([np.minimum(boxes[..., :2], 60.3), np.maximum(boxes[..., 2:], 67.7)], 2)
    return arrays._replace(boxes=boxes, gt_boxes=gt_boxes * arrays.gt_valid[..., None])


def trainer_arguments(device, arrays):
    """As Ultralytics' trainer gives them: labels and mask [B, n, 1], zeros where padded, all float32."""
    labels = np.where(arrays.gt_valid, arrays.gt_labels, 0)[..., None].astype(float)
    mask = arrays.gt_valid[..., None].astype(float)
    return [device.put(each) for each in (*arrays[:3], labels, arrays.gt_boxes, mask)]


@pytest.mark.parametrize("gts", (1, 3, 12, 40))
@pytest.mark.parametrize(
    "options",
    [
        {"topk": 10, "alpha": 0.5},
        {},
        {"topk": 7, "alpha": 0.5, "topk2": 1},
        {"topk": 13, "topk2": 4},
        {"stride": [4, 8]},
        {"stride": [16], "beta": 4.0},
    ],
    ids=str,
)
def test_equals_ultralytics(device, options, gts):
    published = published_assigner(**options)
    assigner = detops.TaskAlignedAssigner(num_classes=5, **options)
    points, _ = grid_points(128, (8, 16))
    for seed in range(5):
        arguments = trainer_arguments(device, overlapping_scene(points, gts, seed))
        ours, theirs = assigner(*arguments), published(*arguments)
        assert [each.dtype for each in ours] == [each.dtype for each in theirs]
        for i in (0, 1, 3, 4):
            assert torch.equal(ours[i], theirs[i])
        torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-5)


def test_equals_ultralytics_without_ground_truth(device):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 0))
    published = published_assigner()
    for ours, theirs in zip(detops.TaskAlignedAssigner(num_classes=5)(*arguments), published(*arguments), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_scores_have_the_dtype_of_ultralytics(device):
    arguments = trainer_arguments(device, overlapping_scene(grid_points(128, (8, 16))[0], 12, 3))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        arguments[0] = arguments[0].to(dtype)
        ours, theirs = (each(*arguments) for each in (detops.TaskAlignedAssigner(num_classes=5), published_assigner()))
        assert [each.dtype for each in ours] == [each.dtype for each in theirs]


def test_equals_the_function(device):
    arrays = scene(grid_points(64)[0], 9)
    arrays = arrays._replace(gt_boxes=arrays.gt_boxes * arrays.gt_valid[..., None])
    arguments = trainer_arguments(device, arrays)
    labels, valid = arguments[3][..., 0].long(), arguments[5][..., 0] > 0
    for stride, min_size in ((None, 16.0), ([4, 8], 8.0), ([32], 32.0)):
        assigner = detops.TaskAlignedAssigner(topk=10, num_classes=3, alpha=0.5, stride=stride)
        ours = assigner(*arguments)
        targets = detops.assign_task_aligned(*arguments[:3], labels, arguments[4], valid, min_size=min_size)
        foreground = targets.foreground
        assert torch.equal(ours[2], targets.scores) and torch.equal(ours[3], foreground)
        assert torch.equal(ours[0][foreground], targets.labels[foreground])
        assert torch.equal(ours[4][foreground], targets.gt_indices[foreground])
        assert torch.equal(ours[1][foreground], targets.boxes[foreground])
        # Background rows are those of the first gt.
        assert torch.equal(ours[0][~foreground], labels[:, :1].expand(foreground.shape)[~foreground])
        assert torch.equal(ours[1][~foreground], arguments[4][:, :1].expand(ours[1].shape)[~foreground])
        assert (ours[4][~foreground] == 0).all()


def test_without_ground_truth(device):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 0))
    labels, boxes, scores, foreground, indices = detops.TaskAlignedAssigner(num_classes=3)(*arguments)
    assert (labels == 3).all() and labels.shape == (2, 84)
    assert not boxes.any() and not scores.any() and not foreground.any() and not indices.any()
    assert boxes.shape == (2, 84, 4) and scores.shape == (2, 84, 3)


def test_without_ground_truth_and_without_classes(device):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 0, classes=0))
    labels, boxes, scores, foreground, indices = detops.TaskAlignedAssigner(num_classes=0)(*arguments)
    assert labels.shape == foreground.shape == indices.shape == (2, 84) and not labels.any() and not foreground.any()
    assert boxes.shape == (2, 84, 4) and scores.shape == (2, 84, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_have_the_dtype_of_scores_times_boxes(device, dtype):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 9))
    assigner = detops.TaskAlignedAssigner(topk=10, num_classes=3)
    for boxes_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        narrow = [arguments[0].to(dtype), arguments[1].to(boxes_dtype), *arguments[2:]]
        scores = assigner(*narrow)[2]
        assert scores.dtype == (narrow[0][:0, 0, 0] * narrow[1][:0, 0, 0]).dtype
        # As from the same numbers in that dtype, with no rounding between.
        wide = [each.to(torch.promote_types(scores.dtype, torch.float32)) for each in narrow[:2]]
        assert torch.equal(scores, assigner(*wide, *narrow[2:])[2].to(scores.dtype))


def test_small_boxes_are_enlarged_or_not(device):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 20, size=6))
    labels, valid = arguments[3][..., 0].long(), arguments[5][..., 0] > 0

    def positives(**options):
        found = detops.TaskAlignedAssigner(topk=10, num_classes=3, alpha=0.5, **options)(*arguments)[3]
        size = options.get("min_size", 16.0)
        of_function = detops.assign_task_aligned(*arguments[:3], labels, arguments[4], valid, min_size=size)
        assert torch.equal(found, of_function.foreground)
        return found.sum()

    assert positives(min_size=0) < positives(min_size=8.0) < positives() == positives(min_size=16)


def test_extra_keywords_change_nothing(device):
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 5))
    assigner = detops.TaskAlignedAssigner(num_classes=3)
    names = ("pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes", "mask_gt")
    with_extra = assigner(**dict(zip(names, arguments, strict=True)), stride_tensor=torch.ones(84, 1), sigmas=None)
    assert all(map(torch.equal, assigner(*arguments), with_extra))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2), r"pd_scores must have 3 dimensions and be floating, got \[2\] of float32"),
        (0, torch.zeros(2, 84, 3).char(), r"pd_scores must have 3 .*, got \[2, 84, 3\] of int8"),
        (4, torch.zeros(4), r"gt_bboxes must have 3 dimensions and be floating, got \[4\] of float32"),
        (5, torch.zeros(2, 4, 1, dtype=torch.complex64), "mask_gt must be .*, got complex64"),
        (3, None, "gt_labels must be a tensor, got None"),
    ],
)
def test_bad_tensors(position, value, message):
    arguments = trainer_arguments(Cpu, scene(grid_points(64)[0], 4))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"^TaskAlignedAssigner: {message}$"):
        detops.TaskAlignedAssigner(num_classes=3)(*arguments)


def test_repr_shows_the_options():
    shown = "topk=13, num_classes=80, alpha=1.0, beta=6.0, stride=[8, 16, 32], eps=1e-09, topk2=13"
    assert repr(detops.TaskAlignedAssigner()) == f"TaskAlignedAssigner({shown})"
    assert repr(detops.TaskAlignedAssigner(min_size=0)) == f"TaskAlignedAssigner({shown}, min_size=0)"


def test_attributes_and_no_gradient(device):
    assigner = detops.TaskAlignedAssigner()
    assert (assigner.topk, assigner.topk2, assigner.num_classes, assigner.alpha, assigner.beta) == (
        13,
        13,
        80,
        1.0,
        6.0,
    )
    assert (assigner.stride, assigner.eps) == ([8, 16, 32], 1e-9)
    arguments = trainer_arguments(device, scene(grid_points(64)[0], 4))
    arguments[0].requires_grad_()
    assert not any(each.requires_grad for each in assigner(*arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"topk2": 0}, "topk2 must be at least 1, got 0"),
        ({"beta": -1.0}, "beta must be finite and above 0, got -1.0"),
        ({"stride": []}, "stride must have at least one level, got none"),
        ({"stride": 8}, "stride must be a sequence of numbers, got 8"),
        ({"topk": 1.5}, "topk must be an integer, got 1.5"),
        ({"num_classes": 2**31}, "num_classes must be from 0 to 2147483647, got 2147483648"),
        ({"min_size": -1}, "min_size must be finite and at least 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^TaskAlignedAssigner: {message}$"):
        detops.TaskAlignedAssigner(**options)
