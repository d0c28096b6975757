"""decode_yolo: equal to the loops in reference/coders.py, gradients equal to finite differences."""

import numpy as np
import pytest
import torch

import detops
from detops import _library
from inputs import NAN, to_numpy, to_torch
from reference import coders as reference

VERSIONS = ("v3", "v5")
STRIDES = [8.0, 16.0, 32.0]
ANCHORS = np.array([[[10, 13], [16, 30]], [[30, 61], [62, 45]], [[116, 90], [156, 198]]], dtype=np.float64)
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def head(device, classes=4, sizes=((5, 7), (3, 4), (1, 2)), images=2, dtype=torch.float32, last=False, seed=0):
    """Maps for two anchors a level."""
    rng = np.random.default_rng(seed)
    maps = [device.put(rng.normal(0, 2, (images, 2 * (5 + classes), *size)), dtype) for size in sizes]
    return [each.contiguous(memory_format=torch.channels_last) if last else each for each in maps]


def anchors_for(device, raw, anchors=ANCHORS):
    dtype = torch.float64 if raw[0].dtype == torch.float64 else torch.float32
    return device.put(anchors[: len(raw)], dtype)


def check(device, raw, version, strides=None, anchors=ANCHORS):
    strides = STRIDES[: len(raw)] if strides is None else strides
    on_device = anchors_for(device, raw, anchors)
    found = detops.decode_yolo(raw, on_device, strides, version=version)
    dtype = raw[0].dtype
    assert isinstance(found, detops.YoloPredictions)
    assert found.boxes.dtype == on_device.dtype and found.objectness.dtype == found.scores.dtype == dtype
    arrays = [to_numpy(each).astype(np.float64) for each in raw]
    expected = reference.decode_yolo(arrays, anchors, strides, version)
    for image, (boxes, objectness, scores) in enumerate(expected):
        tolerance = TOLERANCES[on_device.dtype]
        extent = np.abs(boxes).max(initial=0)
        np.testing.assert_allclose(to_numpy(found.boxes[image]), boxes, rtol=tolerance, atol=tolerance * extent)
        tolerance = TOLERANCES[dtype]
        np.testing.assert_allclose(to_numpy(found.objectness[image]), objectness, rtol=tolerance, atol=1e-7)
        np.testing.assert_allclose(to_numpy(found.scores[image]), scores, rtol=tolerance, atol=1e-7)
    if raw[0].is_cuda or _library.ops.decode_yolo is not torch.ops.detops.decode_yolo.default:
        with _library.use_namespace("detops"):
            on_cpu = detops.decode_yolo([each.cpu() for each in raw], on_device.cpu(), strides, version=version)
        assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(on_cpu, found, strict=True))
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("classes", [0, 1, 2, 15, 16, 17, 31, 32, 33, 65])
def test_classes(device, classes, last, version):
    check(device, head(device, classes, last=last), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 31), (32, 1), (3, 11), (8, 8), (5, 13), (13, 10), (0, 4), (4, 0)], ids=str
)
def test_sizes(device, size, version):
    for last in (False, True):
        check(device, head(device, 3, (size,), last=last), version)


@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes(device, boxes_dtype, version):
    for last in (False, True):
        check(device, head(device, dtype=boxes_dtype, last=last), version)


@pytest.mark.parametrize("levels", [1, 2, 5, 8])
def test_levels(device, levels):
    anchors = np.random.default_rng(0).uniform(5, 300, (levels, 2, 2))
    sizes = [(levels - i, 3) for i in range(levels)]
    check(device, head(device, 2, sizes), "v5", [float(2 ** (i + 1)) for i in range(levels)], anchors)


def test_numbers_of_anchors_and_images(device):
    for anchors in (1, 3, 5):
        for images in (0, 1, 3):
            rng = np.random.default_rng(anchors)
            raw = [device.put(rng.normal(0, 1, (images, anchors * 7, 4, 3)))]
            check(device, raw, "v3", [16.0], rng.uniform(5, 300, (1, anchors, 2)))


def test_written_out(device):
    raw = [device.put(np.zeros((1, 7, 1, 2)))]
    anchors = np.array([[[10.0, 20]]])
    for version, second in (("v3", [7, -6, 17, 14]), ("v5", [7, -6, 17, 14])):
        found = check(device, raw, version, [8], anchors)
        assert found.boxes[0].tolist() == [[-1, -6, 9, 14], second]
        assert found.objectness.tolist() == [[0.5, 0.5]] and (found.scores == 0.25).all()


def test_any_layout(device):
    raw = head(device, 3)
    expected = check(device, raw, "v5")
    anchors = anchors_for(device, raw)
    mixed = [raw[0], raw[1].contiguous(memory_format=torch.channels_last), raw[2].transpose(2, 3).contiguous()]
    mixed[2] = mixed[2].transpose(2, 3)
    sliced = [torch.cat([each, each], 1)[:, : each.shape[1]] for each in raw]
    permuted = [each.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for each in raw]
    for maps in (mixed, sliced, permuted):
        found = detops.decode_yolo(maps, anchors, STRIDES, version="v5")
        assert all(map(torch.equal, found, expected))
    apart = torch.stack([anchors, anchors], -1)[..., 0]
    assert all(map(torch.equal, detops.decode_yolo(raw, apart, STRIDES, version="v5"), expected))


def test_odd_logits(device):
    values = [0, 1e-3, 20, 90, 105, 1e30, np.inf]
    grid = np.random.default_rng(0).choice(values + [-v for v in values], (1, 16, 6, 6))
    for version in VERSIONS:
        found = detops.decode_yolo([device.put(grid)], device.put(ANCHORS[:1]), [8], version=version)
        assert not found.objectness.isnan().any() and not found.scores.isnan().any()
        assert found.scores.min() >= 0 and found.scores.max() <= 1
        with np.errstate(all="ignore"):
            (boxes, _, _), *_ = reference.decode_yolo([grid.astype(np.float32)], ANCHORS[:1], [8], version)
        moderate = np.abs(boxes).max(axis=1) < 1e6
        got = to_numpy(found.boxes[0])
        np.testing.assert_allclose(got[moderate], boxes[moderate], rtol=1e-5, atol=1e-3)
        assert moderate.any() and np.isinf(boxes).any() == (version == "v3") == np.isinf(got).any()
    grid[0, 4, 2, 3] = NAN
    found = detops.decode_yolo([device.put(grid)], device.put(ANCHORS[:1]), [8], version="v5")
    assert found.objectness.isnan().nonzero().tolist() == [[0, 15]] and found.scores[0, 15].isnan().all()
    assert found.scores.isnan().sum() == found.scores.shape[2]


def test_agrees_with_multiclass_nms(device):
    raw = head(device, 3)
    found = check(device, raw, "v5")
    kept = detops.multiclass_nms(found.boxes, found.scores, score_threshold=0.3)
    assert kept.counts.min() > 0


# Gradients.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("last", [False, True])
def test_gradients(device, last, version):
    raw = [each.requires_grad_() for each in head(device, 2, ((2, 3), (1, 2)), dtype=torch.float64, last=last)]
    anchors = anchors_for(device, raw)
    assert torch.autograd.gradcheck(
        lambda *maps: tuple(detops.decode_yolo(maps, anchors, STRIDES[:2], version=version)), raw
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_dtypes(device, boxes_dtype, version):
    grads = []
    for dtype in (boxes_dtype, torch.float64):
        for last in (False, True):
            raw = [each.to(dtype).requires_grad_() for each in head(device, 20, dtype=boxes_dtype, last=last)]
            found = detops.decode_yolo(raw, anchors_for(device, raw), STRIDES, version=version)
            (found.boxes.sum() + found.objectness.square().sum() + found.scores.square().sum()).backward()
            assert all(each.grad.dtype == dtype and each.grad.stride() == each.stride() for each in raw)
            grads.append([each.grad.double() for each in raw])
    tolerance = {torch.float64: 0, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[boxes_dtype]
    for contiguous, last, expected, _ in zip(*grads, strict=True):
        assert torch.equal(contiguous, last)
        torch.testing.assert_close(contiguous, expected, rtol=tolerance, atol=tolerance)


def test_one_result_alone_has_a_gradient(device):
    raw = [each.requires_grad_() for each in head(device)]
    found = detops.decode_yolo(raw, anchors_for(device, raw), STRIDES, version="v5")
    for result, channel in ((found.boxes, 0), (found.objectness, 4), (found.scores, 5)):
        (grad, *_) = torch.autograd.grad(result.sum(), raw, retain_graph=True)
        assert grad[:, channel].abs().min() > 0 and grad[:, 3 if channel else 4].abs().max() == 0


def test_no_second_derivative():
    raw = torch.zeros(1, 14, 2, 2, requires_grad=True)
    found = detops.decode_yolo([raw], to_torch(ANCHORS[:1]), [8], version="v5")
    (grad,) = torch.autograd.grad(found.boxes.sum(), raw, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^\w+: there is no second derivative$"):
        grad.sum().backward()


# Bad input.


def test_bad_options():
    raw, anchors = [torch.zeros(1, 14, 2, 2)], to_torch(ANCHORS[:1])
    with pytest.raises(ValueError, match="^decode_yolo: version must be 'v3' or 'v5', got 'v8'"):
        detops.decode_yolo(raw, anchors, [8], version="v8")
    for stride in (0, -8, NAN, np.inf):
        with pytest.raises(ValueError, match="^decode_yolo: strides must be positive, got "):
            detops.decode_yolo(raw, anchors, [stride], version="v5")
    with pytest.raises(RuntimeError, match="^decode_yolo: anchors must not require a gradient"):
        detops.decode_yolo(raw, anchors.requires_grad_(), [8], version="v5")


def test_bad_tensors(device):
    raw, rule = head(device, 2), r"\[B, 2 \(5 \+ C\), H, W\], with B and C of all levels"
    anchors = anchors_for(device, raw)

    def decode(raw, anchors=anchors, strides=STRIDES):
        return detops.decode_yolo(raw, anchors, strides, version="v5")

    for maps in ([], [raw[0]] * 9):
        with pytest.raises(RuntimeError, match=f"^decode_yolo: raw must have 1 to 8 levels, got {len(maps)}"):
            decode(maps)
    for wrong in (anchors[:2], anchors[..., :1], anchors[:, :0], anchors[0]):
        with pytest.raises(RuntimeError, match=r"^decode_yolo: anchors must have shape \[levels, K, 2\] with 3 levels"):
            decode(raw, wrong)
    with pytest.raises(RuntimeError, match="^decode_yolo: strides must be 3 numbers, got 2"):
        decode(raw, strides=[8, 16])
    for wrong in (raw[1][0], raw[1][:1], raw[1][:, :-2], raw[1][:, :-1]):
        with pytest.raises(RuntimeError, match=rf"^decode_yolo: raw\[1\] must have shape {rule}, got \["):
            decode([raw[0], wrong, raw[2]])
    with pytest.raises(RuntimeError, match=rf"^decode_yolo: raw\[0\] must have shape {rule}, got \[2, 8, "):
        decode([each[:, :8] for each in raw])
    with pytest.raises(RuntimeError, match=r"^decode_yolo: raw\[2\] must have the dtype of raw\[0\] \(float32\), got"):
        decode([*raw[:2], raw[2].double()])
    with pytest.raises(RuntimeError, match=r"^decode_yolo: raw\[0\] must be float16, .*, got int32"):
        decode([each.int() for each in raw])
    if device.torch == "cuda":
        with pytest.raises(RuntimeError, match=r"^decode_yolo: anchors must be on the device of raw\[0\] \(cuda:0\)"):
            decode(raw, anchors.cpu())
    with pytest.raises(RuntimeError, match="^decode_yolo: version must be 3 or 5, got 4"):
        _library.ops.decode_yolo(raw, anchors, STRIDES, 4)
    with pytest.raises(RuntimeError, match="^decode_yolo: anchors must be float32 for raw of float32, got float64"):
        _library.ops.decode_yolo(raw, anchors.double(), STRIDES, 5)
    found = decode(raw)
    with pytest.raises(
        RuntimeError, match="^decode_yolo: grad_scores must have the shape and dtype of its result, got"
    ):
        _library.ops.decode_yolo_backward(*found[:2], found.scores[:, 1:], raw, anchors, STRIDES, 5)


# A PyTorch citizen.


def test_opcheck(device):
    for last in (False, True):
        raw = [each.requires_grad_() for each in head(device, 2, last=last)]
        anchors = anchors_for(device, raw)
        torch.library.opcheck(_library.ops.decode_yolo, (raw, anchors, STRIDES, 5))
        found = [each.detach() for each in detops.decode_yolo(raw, anchors, STRIDES, version="v5")]
        raw = [each.detach() for each in raw]
        torch.library.opcheck(_library.ops.decode_yolo_backward, (*found, raw, anchors, STRIDES, 5))


class Decode(torch.nn.Module):
    def forward(self, raw, anchors):
        return tuple(detops.decode_yolo(raw, anchors, STRIDES, version="v5"))


class Cpu:
    @staticmethod
    def put(values, dtype=None):
        return to_torch(values, dtype)


@pytest.mark.needs_compiler
def test_compile():
    raw = [each.requires_grad_() for each in head(Cpu)]
    anchors, results = anchors_for(Cpu, raw), []
    for function in (Decode(), torch.compile(Decode(), fullgraph=True)):
        found = function(raw, anchors)
        results.append((*found, *torch.autograd.grad(sum(each.sum() for each in found), raw)))
    torch.testing.assert_close(*results)


def test_export():
    raw = head(Cpu)
    images = torch.export.Dim("images", min=3)
    raw = head(Cpu, images=3)
    exported = torch.export.export(
        Decode(), (raw, anchors_for(Cpu, raw)), dynamic_shapes=([{0: images}] * 3, None)
    ).module()
    others = head(Cpu, images=5, seed=1)
    for maps in (raw, others):
        anchors = anchors_for(Cpu, maps)
        assert all(map(torch.equal, exported(maps, anchors), Decode()(maps, anchors)))
