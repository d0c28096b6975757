"""match_max_iou and match_ssd: equal to their definitions in reference/matching.py, indices and IoUs."""

import sys

import numpy as np
import pytest
import torch

import detops
import inputs
from detops import _library
from inputs import to_numpy, to_torch
from memory import peak_growth
from reference import matching as reference

# (high, low, options): the settings of RPN, the same in mmdetection, RetinaNet, Fast R-CNN, and odd ones.
SETTINGS = {
    "rpn": (0.7, 0.3, {"allow_low_quality_matches": True}),
    "rpn_mmdet": (0.7, 0.3, dict(allow_low_quality_matches=True, low_quality="this_gt", low_quality_min_iou=0.3)),
    "retinanet": (0.5, 0.4, {"allow_low_quality_matches": True}),
    "retinanet_mmdet": (0.5, 0.4, dict(allow_low_quality_matches=True, low_quality="this_gt")),
    "rcnn": (0.5, 0.5, {}),
    "first_of_ties": (0.6, 0.5, dict(allow_low_quality_matches=True, low_quality_all_ties=False)),
    "first_of_ties_this_gt": (
        *(0.6, 0.0),
        dict(allow_low_quality_matches=True, low_quality="this_gt", low_quality_all_ties=False),
    ),
    "first_of_good_ties": (
        *(0.9, 0.2),
        dict(
            allow_low_quality_matches=True,
            low_quality="this_gt",
            low_quality_all_ties=False,
            low_quality_min_iou=0.25,
        ),
    ),
}
# Around the 16 lanes and chunks of 256 anchors of the CPU, and the GPU's blocks of 256.
ANCHORS = (0, 1, 15, 17, 256, 257, 600)
BOXES = (0, 1, 2, 31, 33, 257)


def expected_of(anchors, gt_boxes, gt_valid, high, low, options, ignore_boxes=None, ignore_valid=None):
    names = {"allow_low_quality_matches": "allow_low_quality", "low_quality_min_iou": "min_iou"}
    names |= {"low_quality_all_ties": "all_ties", "ignore_threshold": "ignore_threshold"}
    renamed = {names[key]: value for key, value in options.items() if key != "low_quality"}
    renamed["this_gt"] = options.get("low_quality") == "this_gt"
    anchors, gt_boxes = to_numpy(anchors), to_numpy(gt_boxes)
    shape = len(gt_boxes), anchors.shape[-2]
    indices, ious = np.empty(shape, np.int64), np.empty(shape, anchors.dtype)
    for image, boxes in enumerate(gt_boxes):
        valid = np.ones(len(boxes), bool) if gt_valid is None else to_numpy(gt_valid)[image]
        regions = None if ignore_boxes is None else to_numpy(ignore_boxes)[image]
        if ignore_valid is not None:
            regions = regions[to_numpy(ignore_valid)[image]]
        image_anchors = anchors if anchors.ndim == 2 else anchors[image]
        indices[image], ious[image] = reference.match_max_iou(
            image_anchors, boxes, valid, high, low, ignore_boxes=regions, **renamed
        )
    return indices, ious


def check(anchors, gt_boxes, gt_valid, setting, **ignore):
    """The result for these tensors equals the reference; returns it."""
    high, low, options = SETTINGS[setting] if isinstance(setting, str) else setting
    matches = detops.match_max_iou(
        anchors, gt_boxes, gt_valid, high_threshold=high, low_threshold=low, **options, **ignore
    )
    options = options | {key: ignore.pop(key) for key in ("ignore_threshold",) if key in ignore}
    indices, ious = expected_of(anchors, gt_boxes, gt_valid, high, low, options, **ignore)
    assert matches.indices.dtype == torch.int64 and matches.indices.device == matches.ious.device == anchors.device
    assert to_numpy(matches.ious).dtype == ious.dtype
    np.testing.assert_array_equal(to_numpy(matches.ious), ious)
    np.testing.assert_array_equal(to_numpy(matches.indices), indices)
    return matches


def masked(shape, share=0.7, seed=0):
    return np.random.default_rng(seed).random(shape) < share


def scene(anchors, gts, images=2, seed=0, extent=300):
    """Anchors for all images, boxes near them, and which of these are valid."""
    rows = inputs.uniform_boxes(anchors, seed, extent)
    boxes = inputs.uniform_boxes(images * gts, seed + 1, extent).reshape(images, gts, 4)
    return rows, boxes, masked((images, gts), seed=seed)


def grid_anchors(size=6, stride=10, sides=(12, 20)):
    centres = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).reshape(-1, 1, 2) * stride + stride / 2
    half = np.array([[a / 2, b / 2] for a in sides for b in sides])
    return np.concatenate([centres - half, centres + half], -1).reshape(-1, 4)


@pytest.mark.parametrize("gts", BOXES)
@pytest.mark.parametrize("anchors", ANCHORS)
def test_sizes(device, anchors, gts):
    rows, boxes, valid = scene(device.limit(anchors, emulated=300), gts)
    for dtype, setting in ((torch.float32, "rpn"), (torch.float64, "first_of_good_ties"), (torch.float32, "rcnn")):
        check(device.put(rows, dtype), device.put(boxes, dtype), device.put(valid), setting)
    check(device.put(rows), device.put(boxes), None, "rpn_mmdet")


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_on_ties(device, setting):
    # Integer corners: many anchors tie for a box, many boxes for an anchor, and some touch nothing.
    for images, cells in ((1, 4), (3, 6)):
        rows = inputs.grid_boxes(90, cells=cells)
        boxes = inputs.grid_boxes(images * 7, seed=1, cells=cells).reshape(images, 7, 4)
        check(device.put(rows), device.put(boxes), device.put(masked((images, 7))), setting)
    rows, boxes = grid_anchors(), np.array([[[0, 0, 12, 12], [5, 5, 25, 25], [15, 15, 25, 25], [15, 15, 25, 25]]])
    check(device.put(rows), device.put(boxes), None, setting)
    check(device.put(rows), device.put(boxes + 1000), None, setting)


@pytest.mark.parametrize("setting", ["rpn", "rpn_mmdet", "first_of_ties_this_gt"])
@pytest.mark.parametrize("layout", inputs.KINDS)
def test_kinds_of_boxes(device, layout, setting):
    n = device.limit(2000, emulated=300)
    boxes = inputs.KINDS[layout](n + 40)
    for dtype in (torch.float32, torch.float64):
        check(device.put(boxes[:n], dtype), device.put(boxes[None, n:], dtype), None, setting)


@pytest.mark.parametrize("setting", ["retinanet", "retinanet_mmdet", "first_of_ties"])
@pytest.mark.parametrize("name", inputs.EDGES)
def test_edges(device, name, setting):
    boxes = inputs.edge_boxes(name)
    rows = np.concatenate([boxes, inputs.uniform_boxes(9, extent=30)])
    for dtype in (torch.float32, torch.float64):
        matches = check(device.put(rows, dtype), device.put(boxes[None], dtype), None, setting)
        assert not matches.ious.isnan().any()
    regions = device.put(inputs.edge_boxes(name, seed=1)[None])
    check(device.put(rows), device.put(boxes[None, :4]), None, setting, ignore_boxes=regions)


def test_what_the_rules_mean(device):
    anchors = device.put([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [50, 50, 60, 60], [0, 0, 10, 10]])
    gt = device.put([[[0, 0, 10, 4.5], [200, 200, 210, 210], [50, 50, 60, 51]]])
    options = dict(high_threshold=0.95, low_threshold=0.3)
    assert detops.match_max_iou(anchors, gt, **options).indices.tolist() == [[-2, -2, -2, -1, -2]]
    low_quality = options | {"allow_low_quality_matches": True, "low_quality_min_iou": 0.05}
    found = detops.match_max_iou(anchors, gt, **low_quality)
    assert found.indices.tolist() == [[-2, 0, -2, 2, -2]]
    # The box that touches nothing ties with every anchor of IoU 0, and those are all.
    low_quality["low_quality_min_iou"] = 0.0
    assert detops.match_max_iou(anchors, gt, **low_quality).indices.tolist() == [[0, 0, 0, 2, 0]]
    low_quality["low_quality"] = "this_gt"
    assert detops.match_max_iou(anchors, gt, **low_quality).indices.tolist() == [[1, 1, 1, 2, 1]]
    low_quality["low_quality_all_ties"] = False
    assert detops.match_max_iou(anchors, gt, **low_quality).indices.tolist() == [[1, 0, -2, 2, -2]]
    region = device.put([[[0, 0, 10, 6]]])
    found = detops.match_max_iou(anchors, gt, **low_quality, ignore_boxes=region, ignore_threshold=0.6)
    assert found.indices.tolist() == [[1, -2, -2, 2, -2]]
    assert found.ious.tolist() == detops.match_max_iou(anchors, gt, **options).ious.tolist()


def test_thresholds_are_met_on_the_last_bit(device):
    # 0.7 and 0.3 are no float32: a quality that rounds to them is not below.
    for dtype, threshold in ((torch.float32, 0.7), (torch.float64, 0.7), (torch.float32, 0.3), (torch.float32, 0.5)):
        pairs = inputs.pairs_on_threshold(threshold, np.float32 if dtype == torch.float32 else np.float64, n=8)
        anchors, boxes = device.put(pairs[0::2, None], dtype), device.put(pairs[1::2, None], dtype)
        found = check(anchors, boxes, None, (threshold, threshold, {}))
        assert 0 < (found.indices >= 0).sum() < len(pairs) / 2
    ratios = inputs.pairs_of_small_ratios(10)
    check(device.put(ratios[0::2, None]), device.put(ratios[1::2, None]), None, (0.7, 0.3, {}))


def test_rows_that_are_not_valid_have_no_say(device):
    rows, boxes, valid = scene(100, 40, images=3)
    valid[1] = False
    for setting in ("rpn", "retinanet_mmdet", "first_of_ties_this_gt"):
        results = []
        for filler in (np.nan, np.inf, 0.0, rows[0]):
            padded = np.where(valid[..., None], boxes, filler)
            results.append(check(device.put(rows), device.put(padded), device.put(valid), setting))
        assert all(map(torch.equal, results[0], results[-1]))
        assert (results[0].indices[1] == -1).all() and (results[0].ious[1] == 0).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_images_without_boxes(device, setting):
    anchors = device.put(inputs.uniform_boxes(20))
    high, low, options = SETTINGS[setting]
    region = anchors[None, :1].repeat(2, 1, 1)
    for shape, valid in (((2, 0, 4), None), ((2, 5, 4), torch.zeros(2, 5, dtype=torch.bool, device=anchors.device))):
        boxes = torch.zeros(shape, device=anchors.device)
        for extra, ignored in (({}, []), ({"ignore_boxes": region}, [0])):
            found = detops.match_max_iou(
                anchors, boxes, valid, high_threshold=high, low_threshold=low, **options, **extra
            )
            assert found.indices.tolist() == 2 * [[-2 if a in ignored else -1 for a in range(20)]]
            assert (found.ious == 0).all()
    for rows, boxes in ((anchors[:0], region), (anchors, region[:0]), (region[:, :0], region), (region[:0],) * 2):
        found = detops.match_max_iou(rows, boxes, high_threshold=high, low_threshold=low, **options)
        assert found.indices.shape == found.ious.shape == (len(boxes), rows.shape[-2])


@pytest.mark.parametrize("setting", SETTINGS)
def test_ignore_regions(device, setting):
    rows, boxes, valid = scene(150, 9, images=3)
    regions, regions_valid = inputs.uniform_boxes(3 * 300, seed=5, extent=300).reshape(3, 300, 4), masked((3, 300), 0.1)
    regions[~regions_valid] = np.nan
    regions[0, 0], regions_valid[0, 0] = [0, 0, np.inf, np.inf], True
    rows[:30] = rows[30:60] = boxes[0, :3].repeat(10, 0)  # ties, of which some are ignored
    for threshold in (0.0, 0.5, 0.99, 1.0):
        found = check(
            *(device.put(rows), device.put(boxes), device.put(valid), setting),
            ignore_boxes=device.put(regions),
            ignore_valid=device.put(regions_valid),
            ignore_threshold=threshold,
        )
        assert (found.indices == -2).any() or threshold == 1
    everywhere = device.put([[[-1e6, -1e6, 1e6, 1e6]]] * 3)
    found = check(device.put(rows), device.put(boxes), device.put(valid), setting, ignore_boxes=everywhere)
    assert (found.indices == -2).all()
    check(device.put(rows), device.put(boxes), device.put(valid), setting, ignore_boxes=everywhere[:, :0])


@pytest.mark.parametrize("setting", ["rpn", "retinanet_mmdet", "first_of_ties_this_gt"])
def test_more_boxes_than_a_chunk(device, setting):
    # Chunks grow with the number of boxes, and ties lie in several of them.
    rows = np.concatenate([inputs.grid_boxes(500, cells=6)] * 2)[: device.limit(1000, emulated=700)]
    boxes = inputs.grid_boxes(2 * 300, seed=1, cells=6).reshape(2, 300, 4)
    check(device.put(rows), device.put(boxes), device.put(masked((2, 300))), setting)


def test_anchors_of_each_image(device):
    rows = device.put(inputs.uniform_boxes(3 * 50, extent=200).reshape(3, 50, 4))
    boxes = device.put(inputs.uniform_boxes(3 * 6, seed=1, extent=200).reshape(3, 6, 4))
    valid = device.put(masked((3, 6)))
    for setting in SETTINGS:
        together = check(rows, boxes, valid, setting)
        high, low, options = SETTINGS[setting]
        for i in range(3):
            alone = detops.match_max_iou(
                rows[i], boxes[i : i + 1], valid[i : i + 1], high_threshold=high, low_threshold=low, **options
            )
            assert torch.equal(together.indices[i], alone.indices[0])
            assert torch.equal(together.ious[i], alone.ious[0])


def test_inputs_of_any_strides_are_read_and_left_alone(device):
    wide = device.put(inputs.uniform_boxes(240, extent=200))
    odd = torch.empty(481, device=wide.device)[1:].view(120, 4).copy_(wide[:120])  # not aligned to 16 bytes
    for anchors in (wide[::2], odd, wide[:60].t().contiguous().t(), wide.view(2, 120, 4).flip(0)[:, ::2]):
        for boxes in (wide.view(60, 4, 4)[::30, :3], wide[:5].expand(2, 5, 4)):
            valid = device.put(masked((2, 10)))[:, ::2][:, : boxes.shape[1]]
            before = anchors.clone(), boxes.clone()
            check(anchors, boxes, valid, "rpn")
            assert torch.equal(anchors, before[0]) and torch.equal(boxes, before[1])


def test_dtypes(device, boxes_dtype):
    rows, boxes, valid = scene(120, 8)
    anchors, boxes = device.put(rows, boxes_dtype), device.put(boxes, boxes_dtype)
    matches = check(anchors, boxes, device.put(valid), "rpn")
    assert matches.ious.dtype == (torch.float64 if boxes_dtype == torch.float64 else torch.float32)
    check(anchors.double(), boxes.double(), device.put(valid), "rpn")
    mixed = detops.match_max_iou(anchors, boxes.double(), high_threshold=0.7, low_threshold=0.3)
    assert mixed.ious.dtype == torch.float64
    whole = device.put(inputs.grid_boxes(40), torch.int64)
    options = dict(high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True)
    of_integers = detops.match_max_iou(whole, whole[None], **options)
    assert all(map(torch.equal, of_integers, detops.match_max_iou(whole.float(), whole[None].float(), **options)))


def test_no_gradient(device):
    boxes = device.put(inputs.uniform_boxes(10)).requires_grad_()
    matches = detops.match_max_iou(boxes, boxes[None], high_threshold=0.7, low_threshold=0.3)
    assert not matches.ious.requires_grad


def test_drawn_boxes(device):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    coordinate = st.integers(0, 5).map(float) | st.sampled_from([np.nan, np.inf, -np.inf, 1e30, 0.1])
    box = st.tuples(*[coordinate] * 4)
    row = st.tuples(box, st.booleans())

    @hypothesis.settings(max_examples=device.limit(200, emulated=20), deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        *(st.lists(box, max_size=20), st.lists(row, max_size=6), st.lists(row, max_size=2)),
        *(st.sampled_from(sorted(SETTINGS)), st.sampled_from([torch.float32, torch.float64])),
    )
    def check_drawn(anchors, boxes, regions, setting, dtype):
        rows = device.put(np.array(anchors).reshape(-1, 4), dtype)
        boxes, regions = (
            (
                device.put(np.array([each[0] for each in drawn]).reshape(1, -1, 4), dtype),
                device.put(np.array([[each[1] for each in drawn]], bool)),
            )
            for drawn in (boxes, regions)
        )
        check(rows, *boxes, setting, ignore_boxes=regions[0], ignore_valid=regions[1])

    check_drawn()


# match_ssd


@pytest.mark.parametrize("gts", [0, 1, 2, 33])
@pytest.mark.parametrize("anchors", [0, 1, 17, 300])
def test_ssd(device, anchors, gts):
    for rows, boxes in (
        scene(anchors, gts)[:2],
        (inputs.grid_boxes(anchors, cells=5), inputs.grid_boxes(2 * gts, seed=1, cells=5).reshape(2, gts, 4)),
    ):
        valid = masked((2, gts))
        found = detops.match_ssd(device.put(rows), device.put(boxes), device.put(valid))
        arrays = to_numpy(device.put(rows)), to_numpy(device.put(boxes))
        for image in range(2):
            indices, ious = reference.match_ssd(arrays[0], arrays[1][image], valid[image])
            assert found.indices[image].tolist() == indices.tolist()
            assert found.ious[image].tolist() == ious.tolist()


def test_ssd_gives_a_shared_anchor_to_the_later_box(device):
    anchors = device.put([[0, 0, 10, 10], [100, 100, 110, 110]])
    boxes = device.put([[[0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 7]]])
    assert detops.match_ssd(anchors, boxes).indices.tolist() == [[2, -1]]
    assert detops.match_ssd(anchors, boxes + 500).indices.tolist() == [[2, -1]]


def test_ssd_checks_its_threshold():
    with pytest.raises(ValueError, match="^match_ssd: threshold must be a number, got nan$"):
        detops.match_ssd(torch.zeros(1, 4), torch.zeros(1, 1, 4), threshold=float("nan"))


# Bad input.

A, G, V = torch.zeros(3, 4), torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("anchors", "gt_boxes", "gt_valid", "ignore", "message"),
    [
        (A, torch.zeros(5, 4), None, {}, r"gt_boxes must have shape \[B, M, 4\], got \[5, 4\]"),
        (A, torch.zeros(2, 5, 5), None, {}, r"gt_boxes must have shape \[B, M, 4\], got \[2, 5, 5\]"),
        (torch.zeros(3, 5), G, None, {}, r"anchors must have shape \[A, 4\] or .* \(2\), got \[3, 5\]"),
        (torch.zeros(4), G, None, {}, r"anchors must have shape \[A, 4\] or .* \(2\), got \[4\]"),
        (torch.zeros(3, 3, 4), G, None, {}, r"anchors must have shape .* gt_boxes \(2\), got \[3, 3, 4\]"),
        (A, G, V[:1], {}, r"gt_valid must have one value per box of gt_boxes \(\[2, 5, 4\]\), got \[1, 5\]"),
        (A, G, V[0], {}, r"gt_valid must have one value per box of gt_boxes \(\[2, 5, 4\]\), got \[5\]"),
        (A, G, V.long(), {}, "gt_valid must be bool, got int64"),
        (A, G, V, {"ignore_boxes": G[:1]}, r"ignore_boxes must have shape \[B, I, 4\] with .*, got \[1, 5, 4\]"),
        (A, G, V, {"ignore_boxes": G[0]}, r"ignore_boxes must have shape \[B, I, 4\] with .*, got \[5, 4\]"),
        (A, G, V, {"ignore_boxes": G, "ignore_valid": V[:, 1:]}, r"ignore_valid must have one value .*, got \[2, 4\]"),
        (A, G, V, {"ignore_boxes": G, "ignore_valid": V.float()}, "ignore_valid must be bool, got float32"),
    ],
)
def test_bad_tensors(device, anchors, gt_boxes, gt_valid, ignore, message):
    put = {key: value.to(device.torch) for key, value in ignore.items()}
    gt_valid = None if gt_valid is None else gt_valid.to(device.torch)
    with pytest.raises(RuntimeError, match=f"^match_max_iou: {message}$"):
        detops.match_max_iou(
            *(anchors.to(device.torch), gt_boxes.to(device.torch), gt_valid),
            **{"high_threshold": 0.5, "low_threshold": 0.5, **put},
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"high_threshold": 0.3}, "high_threshold must be at least low_threshold, got 0.3 and 0.5"),
        ({"high_threshold": float("nan")}, "high_threshold must be at least low_threshold, got nan and 0.5"),
        ({"low_quality": "best"}, "low_quality must be 'own_argmax' or 'this_gt', got 'best'"),
        ({"low_quality_min_iou": float("nan")}, "low_quality_min_iou must be a number, got nan"),
        ({"ignore_threshold": -0.5}, "ignore_threshold must be at least 0, got -0.5"),
        ({"ignore_valid": V}, "ignore_valid must come with ignore_boxes, got it alone"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^match_max_iou: {message}$"):
        detops.match_max_iou(A, G, V, **{"high_threshold": 0.5, "low_threshold": 0.5, **options})


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tensors_on_different_devices(device):
    options = dict(high_threshold=0.5, low_threshold=0.5)
    with pytest.raises(RuntimeError, match="^match_max_iou: gt_boxes must be on the device of anchors"):
        detops.match_max_iou(A.to(device.torch), G, **options)
    with pytest.raises(RuntimeError, match="^match_max_iou: gt_valid must be on the device of gt_boxes"):
        detops.match_max_iou(A.to(device.torch), G.to(device.torch), V, **options)


# Parity with torchvision.


@pytest.mark.parity
@pytest.mark.parametrize(("high", "low", "low_quality"), [(0.7, 0.3, True), (0.5, 0.4, True), (0.5, 0.5, False)])
def test_equals_torchvision(torchvision, device, high, low, low_quality):
    utils = torchvision.models.detection._utils
    matcher, ssd = utils.Matcher(high, low, low_quality), utils.SSDMatcher(0.5)
    cases = [
        (inputs.uniform_boxes(2000, extent=400), inputs.uniform_boxes(30, seed=1, extent=400)),
        (grid_anchors(), inputs.uniform_boxes(12, seed=2, extent=60, size=30)),
        (grid_anchors(), np.array([[5.0, 5, 25, 25], [15, 15, 25, 25], [0, 0, 12, 12], [900, 900, 910, 910]])),
        (inputs.clustered_boxes(500), inputs.clustered_boxes(500)[:9]),
    ]
    for rows, boxes in cases:
        rows, boxes = to_torch(rows[: device.limit(2000, emulated=400)]), to_torch(boxes)
        found = detops.match_max_iou(
            *(rows.to(device.torch), boxes[None].to(device.torch)),
            high_threshold=high,
            low_threshold=low,
            allow_low_quality_matches=low_quality,
        )
        matrix = torchvision.ops.box_iou(boxes, rows)
        assert torch.equal(found.ious[0].cpu(), matrix.amax(0))
        assert torch.equal(found.indices[0].cpu(), matcher(matrix))
        assert torch.equal(
            detops.match_ssd(rows.to(device.torch), boxes[None].to(device.torch)).indices[0].cpu(), ssd(matrix)
        )


# A PyTorch citizen, the same on every run, in bounded memory.


def test_opcheck(device):
    rows, boxes, valid = (device.put(each) for each in scene(40, 6))
    for arguments in (
        (rows, boxes, valid, 0.7, 0.3, True, False, 0.0, True, None, None, 0.5),
        (rows.expand(2, 40, 4), boxes[:, :0], None, 0.7, 0.3, True, True, 0.0, False, boxes, valid, 0.5),
    ):
        torch.library.opcheck(_library.ops.match_max_iou, arguments)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_in_one_graph(device, dynamic):
    def use(anchors, boxes, valid):
        matches = detops.match_max_iou(
            anchors, boxes, valid, high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True
        )
        return matches.indices + 1, matches.ious, detops.match_ssd(anchors, boxes, valid).indices

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, dynamic=dynamic)
    for anchors, gts in ((50, 9), (70, 30)):
        arguments = [device.put(each) for each in scene(anchors, gts)]
        assert all(map(torch.equal, compiled(*arguments), use(*arguments)))


def test_export_with_any_number_of_boxes():
    class Match(torch.nn.Module):
        def forward(self, anchors, gt_boxes, gt_valid):
            return detops.match_max_iou(
                anchors, gt_boxes, gt_valid, high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True
            )

    example = torch.rand(50, 4), torch.rand(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.export.export(Match(), example, dynamic_shapes=({0: rows}, {1: columns}, {1: columns}))
    arguments = [to_torch(each) for each in scene(99, 20)]
    assert all(map(torch.equal, program.module()(*arguments), Match()(*arguments)))


@pytest.mark.parametrize("setting", ["rpn", "first_of_ties_this_gt"])
def test_any_number_of_threads_and_every_run_give_the_same(restore_threads, device, setting):
    high, low, options = SETTINGS[setting]
    rows, boxes, valid = (device.put(each) for each in scene(device.limit(20_000, emulated=300), 30, images=3))

    def match():
        return detops.match_max_iou(rows, boxes, valid, high_threshold=high, low_threshold=low, **options)

    first = match()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, match(), first))


PREPARE = """
torch.manual_seed(0)
corner, side = torch.rand(200_000, 2) * 4000, torch.rand(200_000, 2) * 60 + 5
anchors = torch.cat([corner, corner + side], 1)
boxes = anchors[None, :{columns}].clone()
options = dict(high_threshold=0.7, low_threshold=0.3, allow_low_quality_matches=True)
detops.match_max_iou(anchors[:99], boxes, **options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("columns", [100, 600])
def test_the_matrix_is_never_made(columns):
    call = "detops.match_max_iou(anchors, boxes, **options)"
    right, extra = peak_growth(PREPARE.format(columns=columns), call, "int(result.ious[0, 0] == 1)")
    # The results take 2.4 MB, what is kept of each anchor 0.8 MB; the matrix would take 80 MB, or 480 MB.
    assert right == 1 and extra < 5.5e6


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_no_synchronisation(device):
    rows, boxes, valid = (device.put(each) for each in scene(300, 9))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for high, low, options in SETTINGS.values():
            detops.match_max_iou(rows, boxes, valid, high_threshold=high, low_threshold=low, **options)
        detops.match_ssd(rows, boxes, valid)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("argument", ["anchors", "gt_boxes", "ignore_boxes"])
def test_complex_boxes_are_refused(argument):
    boxes = {"anchors": torch.zeros(2, 4), "gt_boxes": torch.zeros(1, 1, 4), "ignore_boxes": torch.zeros(1, 1, 4)}
    boxes[argument] = boxes[argument].to(torch.complex64)
    with pytest.raises(RuntimeError, match=f"^match_max_iou: {argument} must be real, got complex64$"):
        detops.match_max_iou(**boxes, high_threshold=0.5, low_threshold=0.5)
    if argument != "ignore_boxes":
        del boxes["ignore_boxes"]
        with pytest.raises(RuntimeError, match=f"^assign_atss: {argument} must be real, got complex64$"):
            detops.assign_atss(**boxes, level_sizes=[2])


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("setting", ["first_of_ties", "first_of_ties_this_gt", "retinanet"])
def test_flushed_subnormal_numbers(device, setting):
    # IoUs of 4e-42 to 3e-41, computed by several threads: torch flushes such numbers on the calling thread alone.
    sides = 2e-19 * np.array([[1.0 + i % 7, 1] for i in range(20_000)])
    anchors = device.put(np.concatenate([np.zeros_like(sides), sides], 1))
    gts = device.put([[[0.0, 0, 100, 100], [-50, -50, 50, 50], [0, 0, 1e-19, 1e-19]]])
    torch.set_flush_denormal(True)
    try:
        high, low, options = SETTINGS[setting]
        found = detops.match_max_iou(anchors, gts, high_threshold=high, low_threshold=low, **options)
        forced = detops.match_ssd(anchors, gts)
    finally:
        torch.set_flush_denormal(False)
    indices, ious = expected_of(anchors, gts, None, high, low, options)
    np.testing.assert_array_equal(to_numpy(found.ious), ious)
    np.testing.assert_array_equal(to_numpy(found.indices), indices)
    expected = detops.match_ssd(anchors, gts)
    assert torch.equal(forced.indices, expected.indices) and forced.indices[0, 6] == 1
