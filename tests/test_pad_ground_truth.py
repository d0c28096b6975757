"""pad_ground_truth: lists of an image's boxes and labels as one padded batch."""

import numpy as np
import pytest
import torch

import detops
import inputs
from inputs import to_numpy, to_torch
from reference import boxes as reference


def images(sizes, dtype=torch.float32, labels_dtype=torch.int64, device="cpu"):
    boxes = [to_torch(inputs.uniform_boxes(n, seed), dtype, device) for seed, n in enumerate(sizes)]
    labels = [to_torch(inputs.class_ids(n, 80, seed), labels_dtype, device) for seed, n in enumerate(sizes)]
    return boxes, labels


def check(boxes, labels):
    """Equals the reference; returns the result."""
    padded = detops.pad_ground_truth(boxes, labels)
    assert type(padded).__name__ == "GroundTruth" and padded._fields == ("boxes", "labels", "valid")
    assert (padded.labels.dtype, padded.valid.dtype) == (torch.int64, torch.bool)
    if boxes:
        assert padded.boxes.dtype == boxes[0].dtype
        assert {field.device for field in padded} == {boxes[0].device}
    # [0] is how an image without boxes often arrives; the definition knows [0, 4].
    rows = [to_numpy(image.reshape(-1, 4)) for image in boxes]
    expected = reference.pad_ground_truth(rows, [to_numpy(image) for image in labels])
    for name, got, wanted in zip(padded._fields, padded, expected, strict=True):
        assert got.is_contiguous(), name
        np.testing.assert_array_equal(to_numpy(got), wanted, err_msg=name)
    return padded


# "cuda" needs no kernel of ours here, and "emulated" would repeat "cpu".
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize(
    "sizes", [(3,), (1, 1), (2, 0, 5), (0, 4), (4, 0), (0,), (0, 0, 0), (33, 64), (7,) * 16], ids=str
)
def test_sizes(device, sizes):
    padded = check(*images(sizes, device=device.torch))
    assert padded.boxes.shape == (len(sizes), max(sizes), 4)
    assert padded.valid.sum(1).tolist() == list(sizes)


def test_dtypes(boxes_dtype):
    for labels_dtype in (torch.int64, torch.int32, torch.uint8):
        check(*images((3, 0, 5), boxes_dtype, labels_dtype))


def test_images_of_equally_many_boxes_may_be_stacked():
    boxes, labels = torch.rand(2, 3, 4), torch.arange(6).reshape(2, 3)
    padded = detops.pad_ground_truth(boxes, labels)
    assert torch.equal(padded.boxes, boxes) and torch.equal(padded.labels, labels) and padded.valid.all()


def test_no_images():
    padded = check([], [])
    assert padded.boxes.shape == (0, 0, 4) and padded.labels.shape == (0, 0) and padded.valid.shape == (0, 0)


def test_an_image_without_boxes_may_come_as_an_empty_vector():
    boxes, labels = images((0, 3, 0))
    boxes[0] = torch.zeros(0)
    check(boxes, labels)
    check(boxes[:1], labels[:1])


def test_rows_are_copied_as_they_are():
    boxes = to_torch(inputs.edge_boxes("everything"))
    padded = check([boxes, boxes[:3]], [torch.arange(len(boxes)), torch.arange(3)])
    before = boxes.clone()
    padded.boxes.zero_()
    assert torch.equal(boxes.isnan(), before.isnan()) and torch.equal(boxes.nan_to_num(), before.nan_to_num())


def test_non_contiguous_rows():
    boxes, labels = images((6, 9))
    check([image[::2] for image in boxes], [image[::2] for image in labels])
    check([image.t().contiguous().t() for image in boxes], labels)


def test_bad_input():
    boxes, labels = images((3, 2))
    with pytest.raises(ValueError, match="^pad_ground_truth: labels must .*, got 1"):
        detops.pad_ground_truth(boxes, labels[:1])
    with pytest.raises(RuntimeError, match=r"^pad_ground_truth: labels\[1\] must .*, got \[1\]"):
        detops.pad_ground_truth(boxes, [labels[0], labels[1][:1]])
    with pytest.raises(RuntimeError, match=r"^pad_ground_truth: boxes\[0\] must .*, got \[3, 5\]"):
        detops.pad_ground_truth([torch.zeros(3, 5), boxes[1]], labels)
    with pytest.raises(RuntimeError, match=r"^pad_ground_truth: boxes\[1\] must .* \(float32\), got float64"):
        detops.pad_ground_truth([boxes[0], boxes[1].double()], labels)
    with pytest.raises(RuntimeError, match=r"^pad_ground_truth: labels\[1\] must be integer, got float32"):
        detops.pad_ground_truth(boxes, [labels[0], labels[1].float()])
    with pytest.raises(RuntimeError, match=r"^pad_ground_truth: labels\[1\] must be on the device .*, got meta"):
        detops.pad_ground_truth(boxes, [labels[0], labels[1].to("meta")])
