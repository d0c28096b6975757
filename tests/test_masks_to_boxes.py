"""masks_to_boxes: equal to the extreme set pixels of each mask."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import to_numpy
from reference import boxes as reference

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def check(masks):
    """Equals the reference; returns the result."""
    boxes = detops.masks_to_boxes(masks)
    assert boxes.dtype == torch.float32 and boxes.device == masks.device and boxes.is_contiguous()
    assert boxes.shape == (*masks.shape[:-2], 4)
    np.testing.assert_array_equal(to_numpy(boxes), reference.masks_to_boxes(to_numpy(masks)))
    return boxes


def sparse_masks(n, height, width, seed=0, pixels=3):
    """n bool masks with up to `pixels` set pixels each; many have none."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, height, width), bool)
    for mask in masks:
        for _ in range(rng.integers(0, pixels + 1)):
            mask[rng.integers(0, height), rng.integers(0, width)] = True
    return torch.from_numpy(masks)


def test_written_out_masks(device):
    masks = torch.zeros(4, 6, 9, dtype=torch.bool)
    masks[0, 2:5, 3:8] = True
    masks[1, 5, 0] = True
    masks[3] = True
    boxes = detops.masks_to_boxes(masks.to(device.torch))
    assert boxes.tolist() == [[3, 2, 7, 4], [0, 5, 0, 5], [0, 0, 0, 0], [0, 0, 8, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_pixel(device, dtype):
    height, width = 3, 37  # rows that begin at any alignment
    masks = torch.eye(height * width).reshape(-1, height, width).to(device.torch, dtype)
    boxes = check(masks)
    x, y = torch.arange(height * width) % width, torch.arange(height * width) // width
    assert torch.equal(boxes.cpu(), torch.stack([x, y, x, y], 1).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (2, 16), (9, 31), (5, 64), (3, 300), (40, 33)])
def test_sizes(device, dtype, height, width):
    for pixels in (1, 3, 40):
        check(sparse_masks(9, height, width, pixels=pixels).to(device.torch, dtype))


def test_masks_in_several_parts(device):
    # More than the 16 KB that one block reads, and more than the 64 KB that one thread takes.
    masks = sparse_masks(3, 90, 300, seed=1)
    masks[0] = False
    masks[0, [0, 89], [299, 0]] = True
    check(masks.to(device.torch))
    check(masks.double()[:2].to(device.torch))
    if device.name != "emulated":
        many = sparse_masks(2000, 8, 9)
        check(many.to(device.torch))


def test_shapes_without_pixels_or_masks(device):
    for shape in ((0, 5, 6), (3, 0, 6), (3, 5, 0), (2, 0, 4, 4), (0, 0)):
        boxes = check(torch.ones(shape, device=device.torch))
        assert not boxes.any()


def test_leading_dimensions(device):
    masks = sparse_masks(12, 10, 11).to(device.torch)
    boxes = check(masks)
    assert torch.equal(check(masks.reshape(3, 4, 10, 11)), boxes.reshape(3, 4, 4))
    assert torch.equal(check(masks[5]), boxes[5])


def test_masks_of_any_strides(device):
    masks = sparse_masks(8, 20, 24, pixels=9).to(device.torch)
    for view in (masks[::2], masks[:, 3:, 5:], masks.mT, masks[..., ::3], masks[:1].expand(5, 20, 24), masks.flip(2)):
        before = view.clone()
        check(view)
        assert torch.equal(view, before)
    check(masks.flatten()[1 : 1 + 2 * 20 * 24].reshape(2, 20, 24))  # begins at an odd address


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_counts_as_set(device, dtype):
    least = 2.0**-24 if dtype == torch.float16 else 1e-40 if dtype != torch.float64 else 5e-324  # subnormal
    masks = torch.full((4, 3, 5), -0.0, dtype=dtype)
    masks[0, 1, 2] = float("nan")
    masks[1, 2, 4] = least
    masks[2, 0, 1] = -float("inf")
    boxes = detops.masks_to_boxes(masks.to(device.torch))
    assert boxes.tolist() == [[2, 1, 2, 1], [4, 2, 4, 2], [1, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_negative_and_lowest_integers_are_set(device, dtype):
    masks = torch.zeros(2, 3, 4, dtype=dtype)
    masks[0, 1, 3], masks[1, 2, 0] = torch.iinfo(dtype).min, -1
    assert detops.masks_to_boxes(masks.to(device.torch)).tolist() == [[3, 1, 3, 1], [0, 2, 0, 2]]


def test_no_gradient(device):
    masks = device.put(np.ones((1, 2, 3))).requires_grad_()
    assert not detops.masks_to_boxes(masks).requires_grad


def test_bad_input(device):
    with pytest.raises(RuntimeError, match=r"^masks_to_boxes: masks must have shape \[\.\.\., H, W\], got \[5\]"):
        detops.masks_to_boxes(torch.zeros(5, device=device.torch))
    with pytest.raises(RuntimeError, match="^masks_to_boxes: masks must be bool, integer or floating, got complex64$"):
        detops.masks_to_boxes(torch.zeros(2, 2, dtype=torch.complex64, device=device.torch))


def test_opcheck(device):
    for masks in (sparse_masks(4, 5, 6), torch.zeros(0, 5, 6), torch.ones(2, 2, 3, 4)):
        torch.library.opcheck(_library.ops.masks_to_boxes, (masks.to(device.torch),))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_compile_in_one_graph(device):
    compiled = torch.compile(lambda logits: detops.masks_to_boxes(logits > 0.9) + 1, fullgraph=True)
    for n in (3, 5):
        logits = torch.rand(n, 8, 9, device=device.torch)
        assert torch.equal(compiled(logits), detops.masks_to_boxes(logits > 0.9) + 1)


def test_export_with_any_number_of_masks():
    class Boxes(torch.nn.Module):
        def forward(self, masks):
            return detops.masks_to_boxes(masks)

    dynamic = {"masks": {0: torch.export.Dim("n", min=2)}}
    program = torch.export.export(Boxes(), (sparse_masks(3, 8, 9),), dynamic_shapes=dynamic)
    for n in (3, 20):
        masks = sparse_masks(n, 8, 9)
        np.testing.assert_array_equal(to_numpy(program.module()(masks)), reference.masks_to_boxes(to_numpy(masks)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torchvision(torchvision, device, dtype):
    for masks in (sparse_masks(50, 40, 50), sparse_masks(4, 200, 130, pixels=500), torch.ones(2, 9, 9)):
        masks = masks.to(dtype)
        got = detops.masks_to_boxes(masks.to(device.torch))
        assert torch.equal(got.cpu(), torchvision.ops.masks_to_boxes(masks))
