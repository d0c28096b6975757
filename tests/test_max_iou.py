"""max_iou: equal to the definition in reference/iou.py, values and indices, and never the matrix."""

import sys

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from memory import peak_growth
from reference import iou as reference

# Around the GPU's blocks of 256 rows and chunks of 256 columns, and the 16 lanes of the CPU.
ROWS = (0, 1, 15, 16, 17, 255, 256, 257)
COLUMNS = (0, 1, 2, 31, 33, 255, 256, 257, 600)


def expected_of(boxes1, boxes2, valid=None):
    """The reference, image by image, for tensors whose batch dimensions broadcast."""
    arrays = [to_numpy(boxes1), to_numpy(boxes2)]
    mask = np.ones(arrays[1].shape[:-1], bool) if valid is None else to_numpy(valid)
    batch = np.broadcast_shapes(arrays[0].shape[:-2], arrays[1].shape[:-2], mask.shape[:-1])
    boxes1, boxes2 = (np.broadcast_to(array, (*batch, *array.shape[-2:])) for array in arrays)
    mask = np.broadcast_to(mask, (*batch, mask.shape[-1]))
    values = np.empty(boxes1.shape[:-1], np.result_type(*arrays))
    indices = np.empty(boxes1.shape[:-1], np.int64)
    for image in np.ndindex(*batch):
        values[image], indices[image] = reference.max_iou(boxes1[image], boxes2[image], mask[image])
    return values, indices


def check(boxes1, boxes2, valid=None):
    """The result for these tensors equals the reference; returns it."""
    values, indices = detops.max_iou(boxes1, boxes2, valid)
    expected_values, expected_indices = expected_of(boxes1, boxes2, valid)
    assert indices.dtype == torch.int64 and values.device == indices.device == boxes1.device
    assert to_numpy(values).dtype == expected_values.dtype
    np.testing.assert_array_equal(to_numpy(values), expected_values)
    np.testing.assert_array_equal(to_numpy(indices), expected_indices)
    return values, indices


def masked(n, share=0.7, seed=0):
    return np.random.default_rng(seed).random(n) < share


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_sizes(device, rows, columns):
    valid = device.put(masked(columns))
    for dtype in (torch.float32, torch.float64):
        boxes1 = device.put(inputs.uniform_boxes(rows, extent=300), dtype)
        boxes2 = device.put(inputs.uniform_boxes(columns, seed=1, extent=300), dtype)
        check(boxes1, boxes2)
        check(boxes1, boxes2, valid)


@pytest.mark.parametrize("layout", inputs.KINDS)
def test_kinds_of_boxes(device, layout):
    n = device.limit(3000, emulated=400)
    boxes = inputs.KINDS[layout](n + 60)
    for dtype in (torch.float32, torch.float64):
        check(device.put(boxes[:n], dtype), device.put(boxes[n - 60 :], dtype))


@pytest.mark.parametrize("name", inputs.EDGES)
def test_edges(device, name, boxes_dtype):
    boxes = device.put(inputs.edge_boxes(name), boxes_dtype)
    values, _ = check(boxes.float() if boxes_dtype.itemsize == 2 else boxes, boxes)
    assert not values.isnan().any()
    check(boxes.double(), boxes.double(), device.put(masked(len(boxes))))


def test_ties_go_to_the_lower_index(device):
    grid = device.put(inputs.grid_boxes(300, cells=4))
    check(grid, grid)
    box = device.put([[0.0, 0, 10, 10]])
    others = device.put([[0.0, 0, 5, 5], [0, 0, 10, 10], [0, 0, 10, 10]])
    assert detops.max_iou(box, others)[1].tolist() == [1]
    assert detops.max_iou(box, others.flip(0))[1].tolist() == [0]
    # Across chunks of columns too, and where nothing overlaps.
    assert detops.max_iou(box, box.expand(1000, 4))[1].tolist() == [0]
    assert detops.max_iou(box + 100, others)[1].tolist() == [0]
    assert [each.tolist() for each in detops.max_iou(box, others[:, [2, 3, 0, 1]])] == [[0.0], [0]]


def test_on_the_last_bit(device):
    # IoUs that differ by units in the last place decide as they are computed, in both orders.
    for dtype in (np.float32, np.float64):
        pairs = inputs.pairs_on_threshold(0.5, dtype, n=1)
        first, second = (device.put(pairs[k::2], getattr(torch, np.dtype(dtype).name)) for k in (0, 1))
        for boxes in (second, second.flip(0)):
            check(first[:1], boxes)
            check(first[4:5], boxes.repeat(40, 1))


def test_nan_counts_as_nothing(device):
    boxes1 = device.put([[0.0, 0, 10, 10], [np.nan, 0, 1, 1], [5, 5, 5, 5]])
    boxes2 = device.put([[np.nan] * 4, [5, 5, 5, 5], [0, 0, 10, 5]])
    values, indices = check(boxes1, boxes2)
    assert values.tolist() == [0.5, 0, 0] and indices.tolist() == [2, 0, 0]


def test_rows_that_are_not_valid_have_no_say(device):
    n = 40
    boxes1, boxes2 = device.put(inputs.clustered_boxes(70)), inputs.clustered_boxes(n, seed=0)
    valid = masked(n, 0.5)
    for filler in (np.nan, np.inf, -1e30, 0.0):
        padded = np.where(valid[:, None], boxes2, filler)
        values, indices = check(boxes1, device.put(padded), device.put(valid))
        kept = np.flatnonzero(valid)
        compact = detops.max_iou(boxes1, device.put(boxes2[kept]))
        assert torch.equal(values, compact[0]) and indices.tolist() == kept[compact[1].tolist()].tolist()
    # A row that would be the best of all has none either.
    best = torch.cat([boxes1[:1], device.put(boxes2)])
    check(boxes1, best, torch.arange(n + 1, device=best.device) > 0)


def test_images_without_a_valid_partner(device):
    boxes1 = device.put(inputs.uniform_boxes(60).reshape(3, 20, 4))
    boxes2 = device.put(np.full((3, 5, 4), np.nan))
    boxes2[1] = boxes1[1, :5]
    valid = device.put([[False] * 5, [False, True, False, False, True], [False] * 5])
    values, indices = check(boxes1, boxes2, valid)
    assert (values[[0, 2]] == 0).all() and (indices[[0, 2]] == -1).all()
    assert indices[1].min() >= 1 and values[1, 1] == 1
    for empty in (boxes2[:, :0], boxes2[0, :0]):
        values, indices = check(boxes1, empty)
        assert values.shape == (3, 20) and (values == 0).all() and (indices == -1).all()


@pytest.mark.parametrize(
    ("shape1", "shape2", "valid_shape"),
    [
        ((2, 20, 4), (2, 7, 4), (2, 7)),
        ((20, 4), (3, 7, 4), (3, 7)),
        ((20, 4), (3, 7, 4), (7,)),
        ((3, 20, 4), (7, 4), (7,)),
        ((3, 20, 4), (7, 4), (3, 7)),
        ((20, 4), (7, 4), (3, 7)),
        ((2, 1, 20, 4), (3, 7, 4), (2, 3, 7)),
        ((0, 20, 4), (0, 7, 4), (0, 7)),
        ((2, 0, 4), (2, 7, 4), (2, 7)),
        ((2, 300, 4), (2, 300, 4), (1, 300)),
    ],
)
def test_batch_dimensions_broadcast(device, shape1, shape2, valid_shape):
    boxes1, boxes2 = (
        device.put(inputs.clustered_boxes(int(np.prod(shape[:-1])), seed=0).reshape(shape))
        for shape in (shape1, shape2)
    )
    check(boxes1, boxes2)
    check(boxes1, boxes2, device.put(masked(int(np.prod(valid_shape))).reshape(valid_shape)))


def test_inputs_of_any_strides_are_read_and_left_alone(device):
    boxes, images = device.put(inputs.clustered_boxes(120)), device.put(inputs.clustered_boxes(120).reshape(4, 30, 4))
    wide = device.put(masked(240))
    odd = torch.empty(481, device=boxes.device)[1:].view(120, 4).copy_(boxes)  # not aligned to 16 bytes
    cases = [
        (boxes[::2], boxes[50:], wide[:70]),
        (boxes.t().contiguous().t(), odd, wide[::2]),
        (boxes.flip(0), boxes[:1].expand(60, 4), wide[:1].expand(60)),
        (boxes[:30].expand(4, 30, 4), images, wide[:120].view(4, 30)),  # anchors shared by all images
        (images, boxes[:30].expand(4, 30, 4), wide[:30].expand(4, 30)),
        (images[::2], images[1::2], wide[:60].view(30, 2).t()),
        (images.transpose(0, 1), boxes, None),
    ]
    for boxes1, boxes2, valid in cases:
        before = [tensor.clone() for tensor in (boxes1, boxes2)]
        check(boxes1, boxes2, valid)
        assert torch.equal(boxes1, before[0]) and torch.equal(boxes2, before[1])


def test_dtypes(device, boxes_dtype):
    boxes1 = device.put(inputs.clustered_boxes(90), boxes_dtype)
    boxes2 = device.put(inputs.clustered_boxes(50, seed=0), boxes_dtype)
    values, indices = check(boxes1, boxes2)
    assert values.dtype == (torch.float64 if boxes_dtype == torch.float64 else torch.float32)
    values, wide_indices = detops.max_iou(boxes1, boxes2.double())
    assert values.dtype == torch.float64
    expected = expected_of(boxes1.double(), boxes2.double())
    assert to_numpy(values).tolist() == expected[0].tolist() and wide_indices.tolist() == expected[1].tolist()
    grid = device.put(inputs.grid_boxes(40), torch.int64)
    assert torch.equal(detops.max_iou(grid, grid)[0], detops.max_iou(grid.float(), grid.float())[0])


@pytest.mark.parametrize("images", [1, 3])
def test_equals_the_best_of_the_matrix(torchvision, device, images):
    boxes1 = to_torch(inputs.clustered_boxes(images * 200).reshape(images, 200, 4))
    boxes2 = to_torch(inputs.clustered_boxes(90, seed=0))
    matrix = torchvision.ops.box_iou(boxes1, boxes2)
    values, indices = (result.cpu() for result in detops.max_iou(boxes1.to(device.torch), boxes2.to(device.torch)))
    assert torch.equal(values, matrix.amax(-1))
    assert torch.equal(matrix.gather(-1, indices[..., None])[..., 0], values)


def test_no_gradient(device):
    boxes = device.put(inputs.clustered_boxes(10)).requires_grad_()
    values, indices = detops.max_iou(boxes, boxes)
    assert not values.requires_grad and not indices.requires_grad


# Bad input.

BOXES, VALID = torch.zeros(3, 4), torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("boxes1", "boxes2", "valid", "message"),
    [
        (torch.zeros(3, 5), BOXES, VALID, r"boxes1 must have shape \[..., N, 4\], got \[3, 5\]"),
        (torch.zeros(4), BOXES, VALID, r"boxes1 must have shape \[..., N, 4\], got \[4\]"),
        (BOXES, torch.zeros(3, 2), VALID, r"boxes2 must have shape \[..., M, 4\], got \[3, 2\]"),
        (BOXES, torch.zeros(4), None, r"boxes2 must have shape \[..., M, 4\], got \[4\]"),
        (
            *(torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), None),
            r"boxes2 must have the batch dimensions of boxes1 \(\[2, 3, 4\]\), got \[3, 3, 4\]",
        ),
        (BOXES, BOXES, VALID[:2], r"valid must have one value per box of boxes2 \(\[3, 4\]\), got \[2\]"),
        (BOXES, BOXES, VALID[0], r"valid must have one value per box of boxes2 \(\[3, 4\]\), got \[\]"),
        (
            *(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), VALID.expand(3, 3)),
            r"valid must have one value per box of boxes2 \(\[2, 3, 4\]\), got \[3, 3\]",
        ),
        (BOXES, BOXES, VALID.float(), "valid must be bool, got float32"),
        (BOXES, BOXES, VALID.long(), "valid must be bool, got int64"),
    ],
)
def test_bad_tensors(device, boxes1, boxes2, valid, message):
    boxes1, boxes2 = boxes1.to(device.torch), boxes2.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^max_iou: {message}$"):
        detops.max_iou(boxes1, boxes2, None if valid is None else valid.to(device.torch))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    with pytest.raises(RuntimeError, match="^max_iou: boxes2 must be on the device of boxes1"):
        detops.max_iou(BOXES.to(device.torch), BOXES)
    with pytest.raises(RuntimeError, match="^max_iou: valid must be on the device of boxes2"):
        detops.max_iou(BOXES.to(device.torch), BOXES.to(device.torch), VALID)


# A PyTorch citizen, the same on every run, in bounded memory.


def test_opcheck(device):
    boxes1, boxes2 = device.put(inputs.uniform_boxes(20)), device.put(inputs.uniform_boxes(9, seed=1))
    valid = device.put(masked(9))
    for arguments in ((boxes1, boxes2, None), (boxes1, boxes2, valid), (boxes1, boxes2[:0], valid[:0])):
        torch.library.opcheck(_library.ops.max_iou, arguments)
    shared = boxes1.expand(2, 20, 4), torch.stack([boxes2, boxes2 + 5]), torch.stack([valid, ~valid])
    torch.library.opcheck(_library.ops.max_iou, shared)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    def use(boxes1, boxes2, valid):
        values, indices = detops.max_iou(boxes1, boxes2, valid)
        return values * 2, boxes2[0][indices[0].clamp(min=0)]

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for rows, columns in ((50, 9), (70, 30)):
        boxes1, boxes2 = device.put(inputs.clustered_boxes(rows)), device.put(inputs.clustered_boxes(columns))
        arguments = boxes1, boxes2.expand(2, -1, -1), device.put(masked(2 * columns).reshape(2, columns))
        assert all(map(torch.equal, compiled(*arguments), use(*arguments)))


def test_export_with_any_number_of_boxes():
    class Match(torch.nn.Module):
        def forward(self, anchors, gt_boxes, gt_valid):
            return detops.max_iou(anchors, gt_boxes, gt_valid)

    example = torch.rand(50, 4), torch.rand(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.export.export(Match(), example, dynamic_shapes=({0: rows}, {1: columns}, {1: columns}))
    boxes1, boxes2 = to_torch(inputs.clustered_boxes(99)), to_torch(inputs.clustered_boxes(40).reshape(2, 20, 4))
    valid = to_torch(masked(40).reshape(2, 20))
    for got, expected in zip(program.module()(boxes1, boxes2, valid), expected_of(boxes1, boxes2, valid), strict=True):
        np.testing.assert_array_equal(to_numpy(got), expected)


def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device):
    n = device.limit(20_000, emulated=300)
    boxes1, boxes2 = device.put(inputs.clustered_boxes(n)), device.put(inputs.grid_boxes(70) * 100)
    first = detops.max_iou(boxes1, boxes2)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, detops.max_iou(boxes1, boxes2), first))


PREPARE = """
torch.manual_seed(0)
corner, side = torch.rand(200_000, 2) * 4000, torch.rand(200_000, 2) * 60 + 5
boxes1 = torch.cat([corner, corner + side], 1)
boxes2 = boxes1[:{columns}].clone()
detops.max_iou(boxes1[:99], boxes2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("columns", [100, 600])
def test_the_matrix_is_never_made(columns):
    prepare = PREPARE.format(columns=columns)
    right, extra = peak_growth(prepare, "detops.max_iou(boxes1, boxes2)", "int(result[0][0] == 1)")
    # The results take 2.4 MB; the matrix would take 80 MB, or 480 MB.
    assert right == 1 and extra < 4.4e6


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_boxes_that_images_share_are_not_copied():
    prepare = "few, many = torch.rand(64, 20, 4), torch.rand(200_000, 4); detops.max_iou(few[:2], many[:99])"
    rows, extra = peak_growth(prepare, "detops.max_iou(few, many)", "result[0].numel()")
    assert rows == 1280 and extra < 8e6  # one packed set takes 4 MB


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_extra_memory_on_the_gpu(device):
    boxes1, boxes2 = device.put(inputs.uniform_boxes(200_000)), device.put(inputs.uniform_boxes(100))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = detops.max_iou(boxes1, boxes2)
    assert len(results[0]) == 200_000 and torch.cuda.max_memory_allocated() - before < 3e6
