"""torchvision's models with and without detops in its place: the same losses, gradients and detections.

Weights and images are random. Of a training step in float64 losses agree to 1e-9, relatively, and gradients to 1e-9 of
the largest; in float32 to 1e-5 and 1e-4. Detections are made in float32: labels and the order are equal, scores agree
to 1e-5, boxes and keypoints to 1e-3 pixels, masks to 1e-4.
"""

import copy
import inspect
import math
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import detops
from conftest import Device
from detops.compat import _redirect

MODELS = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", "ssd")


class Backbone(nn.Module):
    """Maps of strides 4, 8, 16, ... of few channels."""

    def __init__(self, levels):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=4, padding=3)
        self.downs = nn.ModuleList(nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(levels - 1))
        self.out_channels = 32

    def forward(self, x):
        maps = [self.stem(x)]
        for down in self.downs:
            maps.append(down(maps[-1].relu()))
        return OrderedDict((str(i), each) for i, each in enumerate(maps))


def build(name, seed=0):
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

    torch.manual_seed(seed)
    size = {"min_size": 128, "max_size": 160}
    if name.endswith("rcnn"):
        anchors = AnchorGenerator(tuple((16 * 2**i,) for i in range(4)), ((0.5, 1.0, 2.0),) * 4)
        own = {
            "rpn_anchor_generator": anchors,
            "box_head": detection.faster_rcnn.TwoMLPHead(32 * 7 * 7, 64),
            "box_predictor": detection.faster_rcnn.FastRCNNPredictor(64, 7),
            "box_score_thresh": 0.05,
            "box_detections_per_img": 40,
            "box_batch_size_per_image": 96,
        }
        if name == "faster_rcnn":
            model = detection.FasterRCNN(Backbone(4), **own, **size)
        elif name == "keypoint_rcnn":
            own["keypoint_head"] = detection.keypoint_rcnn.KeypointRCNNHeads(32, (32,))
            own["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(32, 5)
            model = detection.KeypointRCNN(Backbone(4), **own, **size)
        else:
            own["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(32, (32,), 1)
            own["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(32, 16, 7)
            model = detection.MaskRCNN(Backbone(4), **own, **size)
        head = model.rpn.head
    elif name == "ssd":
        backbone = Backbone(4)
        backbone.out_channels = [32] * 4
        boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2]])
        return detection.ssd.SSD(backbone, boxes, (160, 160), num_classes=7, score_thresh=0.05)
    else:
        kind = {"retinanet": detection.RetinaNet, "fcos": detection.FCOS}[name]
        model = kind(Backbone(5), num_classes=7, score_thresh=0.05, **size)
        head = model.head
    for layer in head.modules():  # so that scores differ
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return model


def pictures(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images, targets = [], []
    for (height, width), count in (((150, 190), 4), ((170, 160), 6)):
        images.append(torch.rand(3, height, width, generator=generator))
        low = torch.rand(count, 2, generator=generator) * 90
        sides = 15 + torch.rand(count, 2, generator=generator) * 45
        boxes = torch.cat((low, low + sides), dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, 7, (count,), generator=generator)
        points = low[:, None] + torch.rand(count, 5, 2, generator=generator) * sides[:, None]
        keypoints = torch.cat((points, torch.ones(count, 5, 1)), dim=2)  # x, y, visible
        targets.append({"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints})
    targets = [{name: put(each, device, dtype) for name, each in target.items()} for target in targets]
    for target in targets:
        target["keypoints"] = target["keypoints"].float()  # torchvision takes no others
    return [put(image, device, dtype) for image in images], targets


def put(tensor, device, dtype):
    return tensor.to(device.torch, dtype if tensor.is_floating_point() else None)


def training_step(model, images, targets):
    model.train().zero_grad()
    torch.manual_seed(5)  # the samplers'
    losses = model(images, copy.deepcopy(targets))
    sum(losses.values()).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@torch.no_grad()
def detect(model, images):
    return model.eval()(images)


def assert_same_detections(found, expected, enough=20):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert len(other["labels"]) >= enough
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-3)
        if "keypoints" in other:
            torch.testing.assert_close(one["keypoints"], other["keypoints"], rtol=0, atol=1e-3)
            torch.testing.assert_close(one["keypoints_scores"], other["keypoints_scores"], rtol=1e-4, atol=1e-4)
        if "masks" in other:
            torch.testing.assert_close(one["masks"], other["masks"], rtol=0, atol=1e-4)


@pytest.fixture
def in_place():
    """Not in place before nor after."""
    assert "not in place" in repr(detops.compat.torchvision)
    yield detops.compat.torchvision
    detops.compat.torchvision.uninstall()
    assert "not in place" in repr(detops.compat.torchvision)


@pytest.fixture
def spied(monkeypatch):
    """The names of the functions of detops that are called."""
    called = set()
    for name in detops.__all__:
        function = getattr(detops, name)
        if isinstance(function, types.FunctionType):
            monkeypatch.setattr(detops, name, spy(name, function, called))
    return called


def spy(name, function, called):
    def call(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_training_step(self, torchvision, in_place, device, dtype, name):
        of_losses, of_gradients = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
        model, (images, targets) = build(name).to(device.torch, dtype), pictures(device, dtype)
        losses, gradients = training_step(model, images, targets)
        with in_place():
            ours, our_gradients = training_step(model, images, targets)
        assert ours == pytest.approx(losses, rel=of_losses)
        assert all(value > 0 for value in losses.values())
        assert our_gradients.keys() == gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for parameter, expected in gradients.items():
            torch.testing.assert_close(our_gradients[parameter], expected, rtol=0, atol=of_gradients * largest)

    def test_detections(self, torchvision, in_place, device, name):
        model, (images, _) = build(name).to(device.torch), pictures(device)
        expected = detect(model, images)
        with in_place():
            assert_same_detections(detect(model, images), expected)
        assert_same_detections(detect(model, images), expected)


@pytest.mark.parametrize("name", ["retinanet", "ssd"])
def test_detections_have_gradients(torchvision, in_place, name):
    model, (images, _) = build(name).eval(), pictures(Device("cpu"))

    def gradients():
        model.zero_grad()
        sum((each["boxes"].sum() + each["scores"].sum()) for each in model(images)).backward()
        return [each.grad for each in model.parameters() if each.grad is not None]

    expected = gradients()
    with in_place():
        ours = gradients()
    assert len(ours) == len(expected) > 10
    largest = max(each.abs().max().item() for each in expected)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("threshold", [1e-6, 0.05, 0.5, 0.7311, 0.998, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_retinanet_finds_all_scores_above_the_threshold(torchvision, in_place, dtype, threshold):
    """Among logits that are neighbours in their dtype, those of the threshold in the middle."""
    # Positive numbers of a floating dtype are ordered as their bits are, and negative ones the other way round.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    middle = torch.tensor(math.log(threshold / (1 - threshold))).to(dtype)
    middle = middle if middle != 0 else torch.tensor(1e-3, dtype=dtype)
    logits = (middle.view(bits) + torch.arange(-200, 201, dtype=bits)).view(dtype)[None, :, None]
    places = torch.arange(401.0)[:, None] * 100
    anchors = torch.cat((places, places, places + 20, places + 20), dim=1)
    model = types.SimpleNamespace(
        score_thresh=threshold,
        topk_candidates=401,
        nms_thresh=0.5,
        detections_per_img=401,
        box_coder=torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )
    outputs = {"cls_logits": [logits], "bbox_regression": [torch.zeros(1, 401, 4)]}
    with in_place():
        (found,) = torchvision.models.detection.RetinaNet.postprocess_detections(
            model, outputs, [[anchors]], [(50000, 50000)]
        )
    # torch computes a score in a vector or alone, which gives other last bits, and both are torch's. Of a score that is
    # above the threshold in one of them only, either may be found.
    alone = torch.stack([logit.sigmoid() for logit in logits.flatten()])
    in_vectors = logits.reshape(-1, 1).repeat(1, 64).sigmoid()[:, 0]
    lower, upper = torch.minimum(alone, in_vectors), torch.maximum(alone, in_vectors)
    place = (found["boxes"][:, 0] / 100).round().long()
    counts = torch.bincount(place, minlength=401)
    assert (counts <= 1).all() and (counts[lower > threshold] == 1).all() and (counts[upper <= threshold] == 0).all()
    assert ((found["scores"] == alone[place]) | (found["scores"] == in_vectors[place])).all()
    assert (found["scores"].diff() <= 0).all()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_model_built_in_place_is_an_ordinary_one(torchvision, in_place, device):
    images, _ = pictures(device)
    with in_place():
        model = build("faster_rcnn")  # whose proposal network keeps box_iou as an attribute
        expected = detect(model, images)
        saved = pickle.dumps(model)
    assert_same_detections(detect(pickle.loads(saved), images), expected)
    assert_same_detections(detect(pickle.loads(pickle.dumps(model)), images), expected)


# What each model's training step and detection must have called.
CALLS = {
    "faster_rcnn": {"batched_nms", "box_iou", "multi_scale_roi_align", "encode_boxes", "decode_boxes", "grid_anchors"},
    "mask_rcnn": {"roi_align", "multi_scale_roi_align", "clip_boxes_to_image", "remove_small_boxes"},
    "keypoint_rcnn": {"multi_scale_roi_align", "batched_nms", "encode_boxes", "decode_boxes"},
    "retinanet": {"sigmoid_focal_loss", "multiclass_nms", "batched_nms", "box_iou", "encode_boxes", "decode_boxes"},
    "fcos": {"sigmoid_focal_loss", "generalized_box_iou_loss", "batched_nms", "clip_boxes_to_image"},
    "ssd": {"multiclass_nms", "box_iou", "encode_boxes", "decode_boxes", "clip_boxes_to_image"},
}


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_models_built_before_call_detops(torchvision, in_place, spied, device, name):
    model, (images, targets) = build(name), pictures(device)
    with in_place():
        training_step(model, images, targets)
        detect(model, images)
    assert spied >= CALLS[name]
    spied.clear()
    detect(model, images)
    assert not spied


BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10]])
SCORES = torch.tensor([0.8, 0.9, 0.7])


class TestTheSwitch:
    def test_reaches_every_holder_of_a_function(self, torchvision, in_place, spied):
        from torchvision.ops import nms as renamed

        third_party = types.ModuleType("a_third_party")
        exec("from torchvision.ops import nms, box_iou as overlap", vars(third_party))
        sys.modules["a_third_party"] = third_party

        def with_default(function=torchvision.ops.nms):
            return function(BOXES, SCORES, 0.5)

        holders = [
            lambda: renamed(BOXES, SCORES, 0.5),
            lambda: third_party.nms(BOXES, SCORES, iou_threshold=0.5),
            lambda: torchvision.ops.boxes.nms(BOXES, SCORES, 0.5),
            with_default,
        ]
        try:
            with in_place():
                for holder in holders:
                    assert holder().tolist() == [1, 2]
                    assert spied == {"nms"}
                    spied.clear()
                third_party.overlap(BOXES, BOXES)
                assert spied == {"box_iou"}
                spied.clear()
            for holder in holders:
                assert holder().tolist() == [1, 2]
            assert not spied
        finally:
            del sys.modules["a_third_party"]

    def test_puts_everything_back(self, torchvision, in_place):
        before = state_of_torchvision()
        with in_place():
            during = state_of_torchvision()
        assert state_of_torchvision() == before
        assert during.keys() == before.keys()
        changed = {name for name in before if during[name] != before[name]}
        assert len(changed) > 20
        assert all(during[name][0] == before[name][0] for name in before)  # names stay bound to what they were
        assert not any("Sampler" in name for name in changed)

    def test_puts_everything_back_after_an_exception(self, torchvision, in_place):
        before = state_of_torchvision()
        with pytest.raises(ZeroDivisionError), in_place():
            torchvision.ops.nms(BOXES, SCORES, 0.5)
            1 / 0  # noqa: B018
        assert state_of_torchvision() == before

    def test_nests_and_repeats(self, torchvision, in_place, spied):
        def is_in_place():
            spied.clear()
            torchvision.ops.nms(BOXES, SCORES, 0.5)
            return spied == {"nms"}

        before = state_of_torchvision()
        with in_place():
            with in_place():
                assert is_in_place()
            assert is_in_place()
            in_place.uninstall()  # nothing was installed
            assert is_in_place()
        assert not is_in_place()
        in_place.install()
        in_place.install()
        with in_place():
            assert is_in_place()
        assert is_in_place()
        with in_place():
            in_place.uninstall()
            assert is_in_place()
        assert not is_in_place()
        in_place.uninstall()
        assert state_of_torchvision() == before

    def test_is_a_decorator(self, torchvision, in_place, spied):
        @in_place()
        def run():
            return torchvision.ops.nms(BOXES, SCORES, 0.5)

        assert run().tolist() == run().tolist() == [1, 2]
        assert spied == {"nms"}

    def test_refuses_what_is_not_torchvisions(self, torchvision, in_place, monkeypatch):
        monkeypatch.setattr(torchvision.ops.boxes, "box_iou", lambda boxes1, boxes2, fmt: None)
        before = state_of_torchvision()
        with pytest.raises(RuntimeError, match=r"torchvision\.ops\.boxes\.box_iou must be the function of its library"):
            in_place.install()
        with pytest.raises(RuntimeError, match="must be the function of its library"), in_place():
            pass
        assert state_of_torchvision() == before

    def test_refuses_parameters_it_does_not_know(self, torchvision):
        with pytest.raises(RuntimeError, match=r"must have the parameters \['other'\], got \['boxes', 'scores'"):
            _redirect.Redirection(torchvision.ops.boxes, "nms", lambda original, other: None)

    def test_refuses_keyword_only_parameters(self):
        module = types.ModuleType("a_library")
        exec("def area(boxes, *, fmt='xyxy'): return boxes", vars(module))
        with pytest.raises(RuntimeError, match=r"a_library\.area must have no keyword-only parameters"):
            _redirect.Redirection(module, "area", lambda original, boxes, fmt: None)

    @pytest.mark.parametrize("half_way", [False, True])
    def test_an_interrupted_start_changes_nothing(self, torchvision, in_place, monkeypatch, half_way):
        def interrupted(self):
            started.append(self)
            if len(started) == 5 and not half_way:
                raise KeyboardInterrupt
            start(self)
            if len(started) == 5:
                raise KeyboardInterrupt

        started, start, before = [], _redirect.Redirection.start, state_of_torchvision()
        monkeypatch.setattr(_redirect.Redirection, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_place.install()
        assert len(started) == 5
        assert "not in place" in repr(in_place)
        assert state_of_torchvision() == before
        with in_place():
            assert len(started) > 25
        assert state_of_torchvision() == before

    @pytest.mark.parametrize("again", ["uninstall", "install"])
    def test_an_interrupted_stop_puts_the_others_back(self, torchvision, in_place, spied, monkeypatch, again):
        def interrupted(self):
            stopped.append(self)
            if len(stopped) == 5:
                raise KeyboardInterrupt
            stop(self)

        stopped, stop, before = [], _redirect.Redirection.stop, state_of_torchvision()
        in_place.install()
        monkeypatch.setattr(_redirect.Redirection, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_place.uninstall()
        after = state_of_torchvision()
        names = {id(each._function): each._function.__qualname__ for each in stopped}
        assert {names[state[0]] for name, state in after.items() if state != before[name]} == {
            names[id(stopped[4]._function)]
        }
        assert repr(in_place) == "<detops.compat.torchvision: in place>"
        getattr(in_place, again)()
        if again == "install":
            torchvision.ops.nms(BOXES, SCORES, 0.5)
            assert spied == {"nms"}
            in_place.uninstall()
        assert state_of_torchvision() == before

    def test_ties_of_many_boxes_are_in_torchs_order(self, torchvision, in_place):
        low = torch.rand(2000, 2) * 500
        boxes = torch.cat((low, low + 20), dim=1)
        scores, idxs = torch.randint(0, 30, (2000,)) / 30, torch.randint(0, 4, (2000,))
        expected = torchvision.ops.batched_nms(boxes, scores, idxs, 0.5)
        with in_place():
            assert torch.equal(torchvision.ops.batched_nms(boxes, scores, idxs, 0.5), expected)

    def test_signatures_stay(self, torchvision, in_place):
        before = inspect.signature(torchvision.ops.roi_align)
        with in_place():
            assert inspect.signature(torchvision.ops.roi_align) == before
            with pytest.raises(TypeError, match=r"roi_align\(\) missing 3 required positional arguments"):
                torchvision.ops.roi_align()

    def test_compiled_code_follows(self, torchvision, in_place, spied):
        compiled = torch.compile(lambda boxes: torchvision.ops.box_iou(boxes, boxes), fullgraph=True, backend="eager")
        expected = compiled(BOXES)
        assert not spied
        with in_place():
            torch.testing.assert_close(compiled(BOXES), expected)
            assert spied == {"box_iou"}
        spied.clear()
        compiled(BOXES + 1)
        assert not spied


def state_of_torchvision():
    """Every function and class attribute of its loaded modules, with the code and defaults of the functions."""
    state = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "torchvision":
            continue
        for name, value in list(vars(module).items()):
            state[f"{module_name}.{name}"] = content_of(value)
            if isinstance(value, type) and value.__module__.startswith("torchvision"):
                state |= {f"{module_name}.{name}.{key}": content_of(each) for key, each in vars(value).items()}
    return state


def content_of(value):
    if not isinstance(value, types.FunctionType):
        return (id(value),)
    return id(value), id(value.__code__), value.__defaults__, str(value.__kwdefaults__), sorted(vars(value))


class NmsAndRoIAlign(nn.Module):
    def forward(self, boxes, scores, features):
        import torchvision

        keep = torchvision.ops.nms(boxes, scores, 0.5)
        keep_in_groups = torchvision.ops.batched_nms(boxes, scores, torch.zeros_like(scores).long(), 0.5)
        return torchvision.ops.roi_align(features, [boxes[keep]], 2), keep_in_groups


FEATURES = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
LONG = torch.cat((BOXES, BOXES), dim=1)
OUT_OF_RANGE = {
    "samples": lambda ops: ops.roi_align(FEATURES[:, :1], [BOXES[:1]], 1, 1.0, 5000),
    "samples, position-sensitive": lambda ops: ops.ps_roi_align(FEATURES[:, :1], [BOXES[:1]], 1, 1.0, 5000),
    "no bins": lambda ops: ops.roi_align(FEATURES, [BOXES], (0, 7)),
    "no bins, maximum": lambda ops: ops.roi_pool(FEATURES, [BOXES], (7, 0)),
    "three sizes": lambda ops: ops.ps_roi_pool(FEATURES, [BOXES], (2, 2, 2)),
    **{
        f"{name}, scale {scale}": lambda ops, name=name, scale=scale: getattr(ops, name)(FEATURES, [BOXES], 2, scale)
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
        for scale in (0.0, -0.5)
    },
    **{
        f"{name}, eps {eps}": lambda ops, name=name, eps=eps: getattr(ops, name)(BOXES, BOXES.flip(0), eps=eps)
        for name in (f"{kind}_box_iou{loss}" for kind in ("distance", "complete") for loss in ("", "_loss"))
        for eps in (-1.0, torch.tensor(0.1), float("nan"))
    },
    "generalized_box_iou_loss, eps": lambda ops: ops.generalized_box_iou_loss(BOXES, BOXES.flip(0), eps=-1.0),
    "one box": lambda ops: ops.generalized_box_iou(BOXES[0], BOXES),
    "gamma": lambda ops: ops.sigmoid_focal_loss(SCORES, SCORES, gamma=float("inf")),
    "alpha": lambda ops: ops.sigmoid_focal_loss(SCORES, SCORES, alpha=torch.tensor(0.3)),
    "long rows, area": lambda ops: ops.box_area(LONG),
    "long rows, small": lambda ops: ops.remove_small_boxes(LONG, 9.5),
    "long rows, clipped": lambda ops: ops.clip_boxes_to_image(LONG, (5, 6)),
    "long rows, copied": lambda ops: ops.box_convert(LONG, "xyxy", "xyxy"),
    "size": lambda ops: ops.clip_boxes_to_image(BOXES, (5, float("nan"))),
    "no candidates": lambda ops: ops.batched_nms(torch.empty(0), torch.empty(0), torch.empty(0), 0.5),
}


class TestLeftToTorchvision:
    def test_transforms_of_torch_func(self, torchvision, in_place, spied):
        with in_place():
            pairs = torch.func.vmap(lambda box: torchvision.ops.box_iou(box[None], BOXES)[0])(BOXES)
            _, tangent = torch.func.jvp(lambda each: torchvision.ops.box_area(each), (BOXES,), (torch.ones(3, 4),))
        assert not spied
        torch.testing.assert_close(pairs, torchvision.ops.box_iou(BOXES, BOXES))
        assert tangent.tolist() == [0, 0, 0]

    def test_torchscript_and_tracing(self, torchvision, in_place, spied):
        with in_place():
            scripted = torch.jit.script(torchvision.ops.nms)
            traced = torch.jit.trace(lambda boxes: torchvision.ops.box_iou(boxes, boxes), BOXES, check_trace=False)
            assert scripted(BOXES, SCORES, 0.5).tolist() == [1, 2]
        assert traced(BOXES).shape == (3, 3)
        assert not spied

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, torchvision, in_place, strict):
        with in_place():
            program = torch.export.export(NmsAndRoIAlign(), (BOXES, SCORES, torch.rand(1, 2, 8, 8)), strict=strict)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called >= {"torchvision.nms.default", "torchvision.roi_align.default"}
        assert not any("detops" in each for each in called)

    def test_export_to_onnx(self, torchvision, in_place):
        pytest.importorskip("onnxscript")

        def nodes():
            inputs = BOXES, SCORES, torch.ones(1, 2, 8, 8)
            graph = torch.onnx.export(NmsAndRoIAlign(), inputs, dynamo=True, verbose=False).model_proto.graph
            return [(each.op_type, [*each.input], [*each.output], [*each.attribute]) for each in graph.node]

        expected = nodes()
        with in_place():
            assert nodes() == expected
        assert {"NonMaxSuppression", "RoiAlign"} <= {kind for kind, *_ in expected}

    def test_arguments_that_detops_refuses(self, torchvision, in_place):
        calls = [
            lambda: torchvision.ops.nms(BOXES, SCORES, -0.5),
            lambda: torchvision.ops.batched_nms(BOXES, SCORES, torch.tensor([0.0, 0.5, 0.0]), 0.5),
            lambda: torchvision.ops.remove_small_boxes(BOXES[None], 1.0),
            lambda: torchvision.ops.clip_boxes_to_image(BOXES.int(), (5, 5)),
            lambda: torchvision.ops.box_convert(BOXES.int(), "xyxy", "cxcywh"),
            lambda: torchvision.ops.masks_to_boxes(torch.zeros(2, 0, 5)),
            lambda: torchvision.ops.generalized_box_iou_loss(BOXES, BOXES[0]),
            lambda: torchvision.ops.sigmoid_focal_loss(SCORES, SCORES, gamma=-1),
        ]
        expected = [call() for call in calls]
        with in_place():
            results = [call() for call in calls]
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other)

    @pytest.mark.parametrize("call", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
    def test_arguments_out_of_the_range_of_detops(self, torchvision, in_place, call):
        expected = call(torchvision.ops)
        with in_place():
            torch.testing.assert_close(call(torchvision.ops), expected, equal_nan=True)

    def test_anchors_changed_in_inference_mode(self, torchvision, in_place):
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.image_list import ImageList

        images, maps = ImageList(torch.zeros(1, 3, 64, 96), [(64, 90)]), [torch.zeros(1, 1, 4, 6)]
        with torch.inference_mode(), in_place():
            generator = AnchorGenerator(((16,),), ((1.0,),))
            (before,) = generator(images, maps)
            generator.cell_anchors[0].mul_(2)
            (after,) = generator(images, maps)
        assert not torch.equal(before, after)
        assert torch.equal(after, generator(images, maps)[0])

    def test_maps_finer_than_the_image(self, torchvision, in_place):
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.image_list import ImageList

        images, maps = ImageList(torch.zeros(1, 3, 4, 4), [(4, 4)]), [torch.zeros(1, 1, 8, 8)]
        generator = AnchorGenerator(((16,),), ((1.0,),))
        expected = generator(images, maps)
        with in_place():
            assert torch.equal(generator(images, maps)[0], expected[0])

    def test_anchors_that_are_not_what_the_options_say(self, torchvision, in_place, spied):
        from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
        from torchvision.models.detection.image_list import ImageList

        class Own(AnchorGenerator):
            def generate_anchors(self, *args, **kwargs):
                return super().generate_anchors(*args, **kwargs) + 1

        images, maps = ImageList(torch.zeros(2, 3, 64, 96), [(64, 90), (60, 96)]), [torch.zeros(2, 1, 4, 6)]
        changed = AnchorGenerator(((16,),), ((1.0,),))
        changed.cell_anchors[0].mul_(2)
        replaced = AnchorGenerator(((16,),), ((1.0,),))
        rounded = AnchorGenerator(((900,),), ((0.7,),))
        rounded(images, [each.bfloat16() for each in maps])  # which rounds its cells for good
        defaults = DefaultBoxGenerator([[2]])
        defaults._wh_pairs[0].mul_(0.5)
        with in_place():
            replaced(images, maps)
            assert spied == {"grid_anchors"}
            replaced.cell_anchors = [each + 3 for each in replaced.cell_anchors]
        for generator in (Own(((16,),), ((1.0,),)), changed, replaced, rounded, defaults):
            expected = generator(images, maps)
            with in_place():
                for one, other in zip(generator(images, maps), expected, strict=True):
                    assert torch.equal(one, other)

    @pytest.mark.parametrize("kind", ["AnchorGenerator", "DefaultBoxGenerator"])
    def test_anchors_under_a_tracer(self, torchvision, in_place, spied, kind):
        from torch.fx.experimental.proxy_tensor import make_fx
        from torchvision.models.detection import anchor_utils
        from torchvision.models.detection.image_list import ImageList

        images, maps = ImageList(torch.zeros(1, 3, 64, 96), [(64, 90)]), [torch.zeros(1, 1, 4, 6)]
        options = {"AnchorGenerator": (((16,),), ((1.0,),)), "DefaultBoxGenerator": ([[2]],)}
        generator = getattr(anchor_utils, kind)(*options[kind])
        expected = generator(images, maps)
        with in_place():
            traced = make_fx(lambda each: generator(images, [each]))(*maps)
            assert torch.equal(traced(*maps)[0], expected[0])
        assert not spied & {"grid_anchors"}

    def test_anchors_may_be_changed_by_the_caller(self, torchvision, in_place):
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.image_list import ImageList

        images, maps = ImageList(torch.zeros(2, 3, 64, 96), [(64, 90), (60, 96)]), [torch.zeros(2, 1, 4, 6)]
        with in_place():
            generator = AnchorGenerator(((16,),), ((1.0,),))
            first, second = generator(images, maps)
            first += 1
            assert torch.equal(second, generator(images, maps)[0])

    def test_a_pyramid_with_a_gap(self, torchvision, in_place):
        pool = torchvision.ops.MultiScaleRoIAlign(["a", "c"], 2, 2)
        maps = {"a": torch.rand(1, 3, 32, 32), "b": torch.rand(1, 3, 16, 16), "c": torch.rand(1, 3, 8, 8)}
        boxes = [torch.tensor([[0.0, 0, 30, 30], [0, 0, 120, 120], [0, 0, 20, 128]])]
        expected = pool(maps, boxes, [(128, 128)])
        with in_place():
            torch.testing.assert_close(pool(maps, boxes, [(128, 128)]), expected)

    def test_scales_of_oblong_images(self, torchvision, in_place):
        x = torch.arange(32.0).add(0.5).mul(4).expand(1, 1, 8, -1)
        boxes, image = [torch.tensor([[30.0, 2, 70, 4]])], [(11, 100)]
        with in_place():
            pooled = torchvision.ops.MultiScaleRoIAlign(["0"], 2, 2)({"0": x}, boxes, image)
        torch.testing.assert_close(pooled[0, 0], torch.tensor([42.0, 62]).expand(2, 2))

    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "c"]], ids="".join)
    def test_lists_of_half_precision_boxes_for_many_images(self, torchvision, in_place, names):
        numbers = torch.arange(299.0).view(-1, 1, 1, 1)
        maps = {name: numbers.expand(-1, 1, side, side) for name, side in zip("abc", (16, 8, 4), strict=True)}
        boxes = [torch.tensor([[0, 0, 8, 8]], dtype=torch.bfloat16)] * 299
        with in_place():
            pooled = torchvision.ops.MultiScaleRoIAlign(names, 1, 2)(maps, boxes, [(16, 16)] * 299)
            aligned = torchvision.ops.roi_align(maps["a"], boxes, 1)
        assert pooled.flatten().round().tolist() == aligned.flatten().round().tolist() == list(range(299))

    def test_a_matcher_of_ones_own(self, torchvision, in_place):
        from torchvision.models.detection._utils import Matcher

        class Own(Matcher):
            def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix):
                matches.fill_(7)

        with in_place():
            assert Own(0.7, 0.3, True)(torch.rand(2, 5)).tolist() == [7] * 5
            with pytest.raises(ValueError, match="No ground-truth boxes"):
                Matcher(0.7, 0.3)(torch.rand(0, 5))


class TestWithoutTorchvision:
    """In other processes, where it is or is not installed."""

    def run(self, code):
        folder = Path(detops.__file__).parents[1]  # and not the source folder, which may have no compiled library
        return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)

    def test_detops_does_not_import_it(self):
        done = self.run("import detops, sys; detops.compat.torchvision; assert 'torchvision' not in sys.modules")
        assert done.returncode == 0, done.stderr

    def test_is_a_module_that_can_be_called(self):
        done = self.run(
            "import types, sys\n"
            "import detops.compat.torchvision\n"
            "import detops.compat.torchvision as host\n"
            "from detops.compat import torchvision\n"
            "from detops.compat.torchvision import install, uninstall\n"
            "assert host is torchvision is detops.compat.torchvision and isinstance(host, types.ModuleType)\n"
            "assert callable(host) and host.install == install and 'torchvision' not in sys.modules\n"
            "assert repr(host) == '<detops.compat.torchvision: not in place>' and 'torchvision' in host.__doc__\n"
        )
        assert done.returncode == 0, done.stderr

    def test_the_error_is_clear(self):
        done = self.run(
            "import sys; sys.modules['torchvision'] = None; import detops; detops.compat.torchvision.install()"
        )
        assert done.returncode == 1
        assert "ImportError: detops.compat.torchvision: torchvision must be installed" in done.stderr
