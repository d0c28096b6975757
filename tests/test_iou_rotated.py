"""box_iou of rotated boxes against polygon clipping in float64, and where other libraries have failed."""

import functools
import itertools

import numpy as np
import pytest
import torch

import detops
import inputs
from inputs import to_numpy, to_torch
from reference import iou as reference

# The largest errors seen in some 100,000 pairs were 5e-7 and 2e-13, the latter for sides of 1 : 1000.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def rotated_iou(boxes1, boxes2, fmt="cxcywhr", aligned=False):
    return detops.box_iou(boxes1, boxes2, fmt=fmt, aligned=aligned)


@functools.cache
def _expected(bytes1, shape1, bytes2, shape2, aligned):
    boxes1, boxes2 = np.frombuffer(bytes1).reshape(shape1), np.frombuffer(bytes2).reshape(shape2)
    return reference.rotated_box_iou(boxes1, boxes2, aligned=aligned)


def expected_of(boxes1, boxes2, aligned=False):
    """The reference for these tensors, computed once for all devices."""
    arrays = [to_numpy(boxes).astype(np.float64) for boxes in (boxes1, boxes2)]
    return _expected(*(part for array in arrays for part in (array.tobytes(), array.shape)), aligned)


def circles_apart(boxes1, boxes2, aligned):
    """Where the circles around the boxes do not meet, by a margin."""
    if not aligned:
        boxes1, boxes2 = boxes1[..., :, None, :], boxes2[..., None, :, :]
    distance = (boxes1[..., :2] - boxes2[..., :2]).norm(dim=-1)
    return distance > 0.5001 * (boxes1[..., 2:4].norm(dim=-1) + boxes2[..., 2:4].norm(dim=-1))


def check(boxes1, boxes2, aligned=False, atol=0):
    """The result is close to the reference, and exactly 0 for boxes far apart; returns it."""
    got, expected = rotated_iou(boxes1, boxes2, aligned=aligned), expected_of(boxes1, boxes2, aligned)
    dtype = torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32
    assert got.dtype == dtype and got.device == boxes1.device and got.is_contiguous()
    np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=max(atol, TOLERANCE[dtype]))
    assert not got[circles_apart(boxes1.double(), boxes2.double(), aligned)].any()
    assert not (got < 0).any() and not (got > 1).any()
    return got


# The reference itself.


def test_reference_equals_shapely():
    geometry = pytest.importorskip("shapely.geometry")
    boxes = np.concatenate([inputs.rotated_boxes(40), inputs.clustered_rotated_boxes(30, extent=50)])
    polygons = [geometry.Polygon(corners) for corners in reference.corners(boxes)]
    for i, j in itertools.product(range(len(boxes)), repeat=2):
        shared = polygons[i].intersection(polygons[j]).area
        expected = shared / (polygons[i].area + polygons[j].area - shared)
        assert reference.rotated_iou(boxes[i], boxes[j]) == pytest.approx(expected, abs=1e-12)


def test_reference_equals_upright_boxes():
    corners = np.concatenate([inputs.grid_boxes(40) + [0, 0, 8, 8], inputs.uniform_boxes(30, extent=20, size=20)])
    upright = reference.box_iou(corners, corners)
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    for turn in (0, 90, 180, 270):
        turned = sides if turn % 180 == 0 else sides[:, ::-1]
        boxes = np.column_stack([centres, turned, np.full(len(corners), turn)])
        np.testing.assert_allclose(reference.rotated_box_iou(boxes, boxes), upright, rtol=0, atol=1e-14)


def test_corners_are_those_of_torchvision(torchvision):
    # Which states the sign of the angle: a box is turned counter-clockwise as one looks at the image.
    boxes = inputs.rotated_boxes(50)
    corners = torchvision.ops.box_convert(to_torch(boxes, torch.float64), "cxcywhr", "xywhr")
    corners = torchvision.ops.box_convert(corners, "xywhr", "xyxyxyxy")
    np.testing.assert_allclose(reference.corners(boxes).reshape(-1, 8), to_numpy(corners), rtol=0, atol=1e-11)


# Written-out cases.


def test_the_sense_of_rotation(device):
    # A bar turned by 45 degrees reaches the upper right and the lower left; y points down.
    bar = device.put([[0.0, 0, 10, 1, 45]])
    corners = device.put([[3.0, -3, 1, 1, 0], [-3, 3, 1, 1, 0], [3, 3, 1, 1, 0], [-3, -3, 1, 1, 0]])
    assert (rotated_iou(bar, corners) > 0).tolist() == [[True, True, False, False]]


def test_identical_boxes_give_one(device):
    # Angles of which float32 holds the turned ones too.
    boxes = inputs.rotated_boxes(300) * [1, 1, 1, 1, 0.25]
    boxes[:, 4] = np.round(boxes[:, 4] * 64) / 64
    boxes[:50, :4] *= 1e-12
    boxes[50:100, :4] *= 1e12
    boxes[100:150, :2] += 1e7
    boxes[150:200, 2] *= 1e-6
    boxes[200:204, 4] = [0, 45, 90, -180]
    for dtype in (torch.float32, torch.float64):
        first = device.put(boxes, dtype)
        for turn in (0, 180, 360, -180, -720, 90, -90, 270):
            second = boxes + [0, 0, 0, 0, turn]
            if turn % 180:
                second = second[:, [0, 1, 3, 2, 4]]
            assert (rotated_iou(first, device.put(second, dtype), aligned=True) == 1).all()


def test_disjoint_and_touching_boxes_give_zero(device):
    rng = np.random.default_rng(0)
    boxes = inputs.rotated_boxes(200)
    reach = np.hypot(boxes[:, 2], boxes[:, 3])  # twice the radius of the circle around a box
    direction = rng.uniform(0, 2 * np.pi, len(boxes))
    away = boxes.copy()
    away[:, 0] += 1.001 * reach * np.cos(direction)
    away[:, 1] += 1.001 * reach * np.sin(direction)
    away[:, 4] = rng.uniform(-180, 180, len(boxes))
    # Within the circles, next to each other along a side.
    beside = boxes.copy()
    beside[:, :2] += (boxes[:, 3:4] * 1.001) * np.stack(reference.cos_sin(boxes[:, 4])[::-1], 1)
    # Touching upright boxes of whole numbers.
    touching = np.array([[0.0, 0, 4, 2, 0], [4, 0, 4, 2, 0], [0, 2, 4, 2, 180], [4, 2, 2, 4, 90], [-3, 0, 2, 2, 270]])
    for dtype in (torch.float32, torch.float64):
        for others in (away, beside):
            iou = rotated_iou(device.put(boxes, dtype), device.put(others, dtype), aligned=True)
            assert not iou.any() and not iou.isnan().any()
        iou = rotated_iou(device.put(touching, dtype), device.put(touching, dtype))
        assert torch.equal(iou, torch.eye(5, device=iou.device, dtype=dtype))


@pytest.mark.parametrize(
    ("box1", "box2", "iou"),
    [
        ([0, 0, 8, 2, 0], [0, 0, 2, 8, 0], 4 / 28),  # a plus
        ([0, 0, 8, 2, 30], [0, 0, 8, 2, 120], 4 / 28),
        ([0, 0, 8, 2, 45], [0, 0, 8, 2, 135], 4 / 28),
        ([0, 0, 8, 8, 0], [1, 1, 2, 2, 33], 4 / 64),  # one in the other
        ([5, 5, 2, 2, 33], [5, 5, 8, 8, 1], 4 / 64),
        ([0, 0, 2, 2, 0], [0, 0, 2, 2, 45], 8 * (2**0.5 - 1) / (8 - 8 * (2**0.5 - 1))),  # an octagon
        ([0, 0, 2, 2, 0], [0, 0, 8**0.5, 8**0.5, 45], 0.5),  # corners on sides
        ([0, 0, 2, 2, 0], [1, 0, 2, 2, 90], 1 / 3),
        ([0, 0, 2, 2, 0], [2, 0, 8**0.5, 8**0.5, 45], 1 / 11),  # a corner at the centre
    ],
)
def test_written_out(device, box1, box2, iou):
    for dtype in (torch.float32, torch.float64):
        boxes1, boxes2 = device.put([box1], dtype), device.put([box2], dtype)
        for got in (rotated_iou(boxes1, boxes2), rotated_iou(boxes2, boxes1)):
            assert got.item() == pytest.approx(iou, abs=4 * torch.finfo(dtype).eps)


# Pairs that other libraries get wrong, from their issues; theirs = what is printed there.
PUBLISHED = {
    "detectron2 2154: 0.600": (
        *([296.6620178222656, 458.73883056640625, 23.515729904174805, 47.677001953125, 0.08795166015625],),
        *([296.66201, 458.73882000000003, 23.51573, 47.67702, 0.087951],),
    ),
    "detectron2 2167: 0.585": (
        *([2563.744628906250, 1436.790161132812500, 2174.703369140625, 214.095001220703125, 115.118347167968750],),
        *([2563.744628906250, 1436.790283203125000, 2174.702880859375, 214.094955444335937, 115.118354797363281],),
    ),
    "detectron2 1207: 0.266": ([160.0, 153, 230, 23, -37], [190.0, 127, 80, 21, -46]),
    "detectron2 4961: 0.369": (
        *([1010.5, 860.00012207, 12.20655537, 48.82622528, 55.00798035],),
        *([1022, 870.49993896, 10.81665134, 43.26660919, 56.30992889],),
    ),
    "mmcv 2952: -1.2e7": (
        *([135.07, 406.72, 7.9445e-7, 1971.1, -101.4594],),  # radians there, clockwise
        *([151.0080, 436.2173, 302.0159, 313.7347, -178.6712],),
    ),
    "mmcv 2952: 6.05": (
        *([135.07, 406.72, 7.9445e-7, 1.9711e10, -101.4594],),
        *([151.0080, 436.2173, 302.0159, 313.7347, -178.6712],),
    ),
    "mmcv 2621: 0.333": ([0.0, 0, 180.6422271729, 136.3633728027, -54.772753],) * 2,
    "rotated_maskrcnn 46: 0.333": ([672.4067, 290.7776, 791.0275, 38.9333, 34.1454],) * 2,
    "RRPN 44: 1.35": ([46.83, 44.03, 3.9, 1.63, 0.0], [46.83, 44.03, 1.63, 3.9, 83.07888]),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_failures(device, case):
    box1, box2 = PUBLISHED[case]
    for dtype in (torch.float32, torch.float64):
        boxes1, boxes2 = device.put([box1], dtype), device.put([box2], dtype)
        # At 1 : 2.5e16 not even float64 corners hold the width, and the reference differs from itself by 2e-10.
        atol = 1e-8 if "6.05" in case else 0
        got = check(boxes1, boxes2, atol=atol).item(), check(boxes2, boxes1, atol=atol).item()
        if box1 == box2:
            assert got == (1.0, 1.0)
        elif "2154" in case or "2167" in case:
            assert min(got) > 0.99999
        # Turned the other way round, which is how some libraries measure.
        mirrored = device.put([1, 1, 1, 1, -1])
        check(boxes1 * mirrored, boxes2 * mirrored, atol=atol)


# A corner of the second box lies on a side of the first: rounded, the polygon crosses the line of that side four times.
# Each crossing more than two made a vertex more than there can be, which was written beyond the others.
CROSSED_OFTEN = {
    torch.float32: (
        *([0, 0, 7.8777775764465332, 8.1759872436523438, 0],),
        *([-0.82365238666534424, 1.2137396335601807, 9.9898672103881836, 4.8964371681213379, -57.222854614257812],),
        0.5077034,
    ),
    torch.float64: (
        *([0, 0, 11.506014700617659, 16.874260617442079, 0],),
        *([3.0085160799425426, -1.8671432374173087, 19.319880234975024, 10.317864093405632, -64.969696688306442],),
        0.4751440014556918,
    ),
}


@pytest.mark.parametrize("dtype", CROSSED_OFTEN)
def test_a_line_is_crossed_twice_at_most(device, dtype):
    box1, box2, iou = CROSSED_OFTEN[dtype]
    boxes1, boxes2 = device.put([box1], dtype), device.put([box2], dtype)
    for got in (check(boxes1, boxes2), check(boxes2, boxes1)):
        assert got.item() == pytest.approx(iou, abs=TOLERANCE[dtype])
    both = torch.cat([boxes1, boxes2])
    assert detops.nms_rotated(both, device.put([0.9, 0.8]), 0.3).tolist() == [0]


def boxes_on_lines(n, seed=0):
    """Two times [n, 5]: whole numbers, equal and nearly equal boxes, and boxes with a corner on the line of a side."""
    rng = np.random.default_rng(seed)
    boxes = rng.integers(1, 13, (2, n, 5)).astype(np.float64)
    turns = [
        rng.integers(-12, 13, (2, n)) * 15.0,
        rng.integers(-360, 361, (2, n)) * 1.0,
        rng.uniform(-360, 360, (2, n)),
    ]
    boxes[..., 4] = np.choose(rng.integers(0, 3, (2, n)), turns)
    first, second = boxes
    kind = rng.integers(0, 4, n)
    second[kind == 0] = (
        first[kind == 0] * (1 + 10.0 ** -rng.integers(3, 10, (n, 1)) * rng.uniform(-1, 1, (n, 5)))[kind == 0]
    )
    on_line = kind > 1
    first[on_line, 2:4], second[on_line, 2:4] = rng.uniform(0.5, 20, (2, on_line.sum(), 2))
    first[kind == 2, 4] = 0

    def in_image(box, x, y):  # a point in the frame of a box
        cos, sin = reference.cos_sin(box[:, 4])
        return np.stack([x * cos + y * sin, y * cos - x * sin], 1)

    signs = rng.choice([-0.5, 0.5], (4, n))
    along = np.where(rng.random((2, n)) < 0.5, signs[2:], rng.uniform(-0.5, 0.5, (2, n)))
    corner = in_image(second, signs[0] * second[:, 2], signs[1] * second[:, 3])
    point = in_image(first, along[0] * first[:, 2], along[1] * first[:, 3])
    second[on_line, :2] = (first[:, :2] + point - corner)[on_line]
    return first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_on_lines(device, dtype):
    boxes1, boxes2 = (device.put(boxes, dtype) for boxes in boxes_on_lines(device.limit(300_000, 10_000)))
    iou, other_way = (rotated_iou(*pair, aligned=True) for pair in ((boxes1, boxes2), (boxes2, boxes1)))
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(iou, other_way, rtol=0, atol=tolerance)
    assert torch.equal(rotated_iou(boxes1, boxes1, aligned=True), torch.ones_like(iou))
    check(boxes1[:1500], boxes2[:1500], aligned=True)
    check(boxes2[:1500], boxes1[:1500], aligned=True)


@pytest.mark.parametrize("off", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_nearly_identical_boxes(device, off):
    rng = np.random.default_rng(0)
    for aspect in (1, 8, 1000):
        boxes = inputs.rotated_boxes(300, extent=3000, size=2000, aspect=aspect)
        moved = boxes * (1 + off * rng.normal(size=boxes.shape))
        for dtype in (torch.float32, torch.float64):
            check(device.put(boxes, dtype), device.put(moved, dtype), aligned=True)


# Against the reference at large.


@pytest.mark.parametrize("columns", [0, 1, 31, 33, 63, 64, 65])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_sizes(device, rows, columns):
    for dtype in (torch.float32, torch.float64):
        boxes1, boxes2 = inputs.rotated_boxes(rows), inputs.rotated_boxes(columns, seed=1)
        check(device.put(boxes1, dtype), device.put(boxes2, dtype))


@pytest.mark.parametrize("aspect", [1.0, 8.0, 1000.0])
def test_random_boxes(device, aspect):
    boxes1 = inputs.rotated_boxes(2000, aspect=aspect)
    boxes2 = inputs.rotated_boxes(2000, seed=1, aspect=aspect)
    near = inputs.clustered_rotated_boxes(50, extent=100)
    for dtype in (torch.float32, torch.float64):
        check(device.put(boxes1, dtype), device.put(boxes2, dtype), aligned=True)
        check(device.put(near, dtype), device.put(near, dtype))


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_tiny_and_huge_boxes(device, scale):
    scales = np.array([scale] * 4 + [1])
    boxes1, boxes2 = inputs.rotated_boxes(30) * scales, inputs.rotated_boxes(40, seed=1) * scales
    ordinary = inputs.rotated_boxes(5, seed=2)
    for dtype in (torch.float32, torch.float64):
        first = device.put(np.concatenate([boxes1, ordinary]), dtype)
        check(first, device.put(np.concatenate([boxes2, ordinary]), dtype))


@pytest.mark.parametrize("offset", [-1e4, 1e6, 1e9])
def test_far_from_the_origin(device, offset):
    # What rounding the centres to float32 leaves of them is what counts.
    moved = np.array([offset, -offset, 0, 0, 0])
    boxes1, boxes2 = inputs.rotated_boxes(40) + moved, inputs.rotated_boxes(40, seed=1) + moved
    for dtype in (torch.float32, torch.float64):
        assert check(device.put(boxes1, dtype), device.put(boxes2, dtype)).any()


@pytest.mark.parametrize("turns", [10, 1000, 10_000])
def test_large_angles(device, turns):
    boxes1, boxes2 = inputs.rotated_boxes(40) * [1, 1, 1, 1, turns], inputs.rotated_boxes(40, seed=1)
    for dtype in (torch.float32, torch.float64):
        atol = TOLERANCE[dtype] * (1 if dtype == torch.float32 else turns)  # the reference's own angle is rounded
        first, second = device.put(boxes1, dtype), device.put(boxes2, dtype)
        np.testing.assert_allclose(to_numpy(rotated_iou(first, second)), expected_of(first, second), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "angle"),
    [*((torch.float32, angle) for angle in (1e17, 1e30, 3e38)), *((torch.float64, angle) for angle in (1e17, 1e300))],
)
def test_angles_of_any_size(device, dtype, angle):
    # A difference of angles of which one is far larger would lose the other.
    boxes1, boxes2 = inputs.rotated_boxes(40), inputs.rotated_boxes(40, seed=1)
    boxes1[:, 4] = np.nextafter(angle, np.inf) * np.sign(boxes1[:, 4])
    first, second = device.put(boxes1, dtype), device.put(boxes2, dtype)
    within = to_numpy(first).astype(np.float64)
    within[:, 4] = np.fmod(within[:, 4], 360)
    expected = reference.rotated_box_iou(within, to_numpy(second).astype(np.float64))
    for got in (rotated_iou(first, second), rotated_iou(second, first).T):
        np.testing.assert_allclose(to_numpy(got), expected, rtol=0, atol=TOLERANCE[dtype])
    assert (rotated_iou(first, first, aligned=True) == 1).all()


def test_differences_that_overflow(device):
    """Centres on both ends of float32, and angles: finite boxes give no NaN."""
    most = 3e38
    boxes = device.put([[-most, 0, 2, 2, 0], [most, 0, 2, 2, 0], [0, -most, 2, 2, 30], [most, most, 2, 2, most]])
    assert torch.equal(rotated_iou(boxes, boxes), torch.eye(4, device=boxes.device))
    turned = device.put([[0, 0, 3, 2, -most], [0, 0, 3, 2, most]])
    assert rotated_iou(turned, turned).isfinite().all()


def test_quarter_turns_give_what_upright_boxes_give(device):
    corners = inputs.grid_boxes(60) + [0, 0, 8, 8]
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    for dtype in (torch.float32, torch.float64):
        upright = detops.box_iou(device.put(corners, dtype), device.put(corners, dtype))
        for turns in itertools.product((0, 90, 180, -90, 3600), repeat=2):
            boxes = [
                np.column_stack([centres, sides if turn % 180 == 0 else sides[:, ::-1], np.full(60, turn)])
                for turn in turns
            ]
            assert torch.equal(rotated_iou(*(device.put(each, dtype) for each in boxes)), upright)


def test_empty_inverted_nan_and_infinite_boxes(device):
    ordinary = [0.0, 0, 10, 10, 30]
    empty = [[0, 0, 0, 10, 0], [0, 0, 10, 0, 30], [0, 0, 0, 0, 0], [0, 0, -10, -10, 30], [0, 0, -5, 10, 0]]
    for dtype in (torch.float32, torch.float64):
        first, boxes = device.put([ordinary], dtype), device.put(empty, dtype)
        assert not rotated_iou(first, boxes).any() and not rotated_iou(boxes, first).any()
        assert rotated_iou(boxes[:3], boxes[:3]).isnan().all()  # 0 / 0
        for value in (np.nan, np.inf, -np.inf):
            spoilt = first.repeat(6, 1)
            spoilt[range(5), range(5)] = value
            spoilt[5] = value
            for got in (rotated_iou(first, spoilt), rotated_iou(spoilt, first), rotated_iou(spoilt, spoilt)):
                assert not (got > 0).any()
                assert got.isnan().all() or not np.isnan(value)
