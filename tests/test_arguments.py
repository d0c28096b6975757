"""What callers may pass to the functions of boxes, IoUs, losses and coders, and how they are told what they may not."""

import re

import numpy as np
import pytest
import torch

import detops
from detops import _library

BOXES = torch.tensor([[0.0, 0, 10, 10], [2, 2, 8, 9]])
LOGITS = torch.tensor([[2.0, -1.0], [0.0, 0.5]])

# For each function a call with one tensor left open, and the name of that tensor.
TENSORS = {
    "box_area": ("boxes", detops.box_area),
    "box_convert": ("boxes", lambda x: detops.box_convert(x, "xyxy", "xywh")),
    "clip_boxes_to_image": ("boxes", lambda x: detops.clip_boxes_to_image(x, (5, 5))),
    "remove_small_boxes": ("boxes", lambda x: detops.remove_small_boxes(x, 1.0)),
    "box_iou": ("boxes2", lambda x: detops.box_iou(BOXES, x)),
    "generalized_box_iou": ("boxes1", lambda x: detops.generalized_box_iou(x, BOXES)),
    "distance_box_iou": ("boxes2", lambda x: detops.distance_box_iou(BOXES, x)),
    "complete_box_iou": ("boxes2", lambda x: detops.complete_box_iou(BOXES, x)),
    "efficient_box_iou": ("boxes2", lambda x: detops.efficient_box_iou(BOXES, x)),
    "box_ioa": ("boxes1", lambda x: detops.box_ioa(x, BOXES)),
    "max_iou": ("boxes1", lambda x: detops.max_iou(x, BOXES)),
    "generalized_box_iou_loss": ("boxes1", lambda x: detops.generalized_box_iou_loss(x, BOXES)),
    "distance_box_iou_loss": ("boxes2", lambda x: detops.distance_box_iou_loss(BOXES, x)),
    "complete_box_iou_loss": ("boxes1", lambda x: detops.complete_box_iou_loss(x, BOXES)),
    "efficient_box_iou_loss": ("boxes2", lambda x: detops.efficient_box_iou_loss(BOXES, x)),
    "siou_loss": ("boxes2", lambda x: detops.siou_loss(BOXES, x)),
    "encode_boxes": ("anchors", lambda x: detops.encode_boxes(BOXES, x)),
    "decode_boxes": ("deltas", lambda x: detops.decode_boxes(x, BOXES)),
    "encode_ltrb": ("boxes", lambda x: detops.encode_ltrb(x, BOXES[:, :2])),
    "decode_ltrb": ("distances", lambda x: detops.decode_ltrb(x, BOXES[:, :2])),
    "decode_dfl": ("logits", detops.decode_dfl),
    "sigmoid_focal_loss": ("inputs", lambda x: detops.sigmoid_focal_loss(x, BOXES)),
    "varifocal_loss": ("targets", lambda x: detops.varifocal_loss(BOXES, x)),
}
# That take no boxes, and so no dtype but the four of floating numbers.
OTHERS = {
    "masks_to_boxes": ("masks", detops.masks_to_boxes),
    "quality_focal_loss": ("scores", lambda x: detops.quality_focal_loss(LOGITS, torch.tensor([0, 1]), x)),
    "distribution_focal_loss": ("inputs", lambda x: detops.distribution_focal_loss(x, torch.zeros(2))),
}
NO_TENSORS = [(np.zeros((2, 4)), "a NumPy array"), ([[0.0, 0, 1, 1]], "a list"), (None, "None"), (1.5, "a float")]


@pytest.mark.parametrize("name", [*TENSORS, *OTHERS])
def test_what_is_no_tensor(name):
    argument, call = (TENSORS | OTHERS)[name]
    for value, kind in NO_TENSORS:
        with pytest.raises(RuntimeError, match=f"^{name}: {argument} must be a tensor, got {kind}$"):
            call(value)


def test_what_is_no_list_of_tensors():
    boxes = BOXES.numpy()
    for call, name, argument in (
        (lambda x: detops.pad_ground_truth(x, [torch.zeros(2)]), "pad_ground_truth", "boxes"),
        (lambda x: detops.pad_ground_truth([BOXES], x), "pad_ground_truth", "labels"),
        (lambda x: detops.decode_yolo(x, torch.ones(1, 1, 2), [8], version="v3"), "decode_yolo", "raw"),
        (lambda x: detops.BoxCoder((1.0, 1.0, 1.0, 1.0)).encode(x, [BOXES]), "BoxCoder", "reference_boxes"),
        (lambda x: detops.BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(BOXES, x), "BoxCoder", "boxes"),
    ):
        with pytest.raises(RuntimeError, match=rf"^{name}: {argument}\[0\] must be a tensor, got a NumPy array$"):
            call([boxes])
        with pytest.raises(RuntimeError, match=f"^{name}: {argument} must be a list of tensors, got None$"):
            call(None)
    with pytest.raises(RuntimeError, match="^max_iou: valid must be a tensor or None, got a list$"):
        detops.max_iou(BOXES, BOXES, [True, True])
    with pytest.raises(RuntimeError, match="^decode_ltrb: strides must be a tensor, got a float$"):
        detops.decode_ltrb(BOXES, BOXES[:, :2], 8.0)
    with pytest.raises(RuntimeError, match="^decode_yolo: anchors must be a tensor, got a list$"):
        detops.decode_yolo([torch.zeros(1, 6, 1, 1)], [[[1.0, 1.0]]], [8], version="v3")


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_without_coordinates(name, dtype):
    """torch would convert them all the same: what they are is named."""
    argument, call = TENSORS[name]
    wanted = "must be (float16, bfloat16, float32,? (or )?float64|an integer tensor|must be float32)"
    with pytest.raises(RuntimeError, match=f"^{name}: {argument} {wanted}.*, got {str(dtype)[6:]}$"):
        call(torch.zeros(2, 4).to(dtype))


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fnuz", "uint16", "complex32"])
def test_the_library_knows_the_names_of_dtypes(name):
    boxes = torch.zeros(1, 4, dtype=getattr(torch, name))
    with pytest.raises(RuntimeError, match=f"^box_area: boxes must be float16, .*, got {name}$"):
        _library.ops.box_area(boxes, 0)


def test_lists_on_two_devices():
    """The meta device's kernel runs, which looks into lists too."""
    raw = [torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 1, 1, device="meta")]
    with pytest.raises(RuntimeError, match="^decode_yolo: all tensors must be on one device, got cpu and meta$"):
        detops.decode_yolo(raw, torch.ones(2, 1, 2), [8, 16], version="v3")


def test_areas_and_conversions_of_integers_do_not_wrap():
    for dtype in (torch.int32, torch.int64, torch.uint32):
        area = detops.box_area(torch.tensor([[0, 0, 60_000, 60_000]], dtype=dtype))
        assert area.dtype == torch.int64 and area.tolist() == [3_600_000_000]
    narrow = torch.tensor([[200, 200, 100, 100]], dtype=torch.uint8)
    corners = detops.box_convert(narrow, "xywh", "xyxy")
    assert corners.dtype == torch.int32 and corners.tolist() == [[200, 200, 300, 300]]
    for dtype, low, high in ((torch.int8, -128, 127), (torch.int16, -32768, 32767), (torch.uint8, 0, 255)):
        boxes = torch.tensor([[low, low, high, high]], dtype=dtype)
        sides = detops.box_convert(boxes, "xyxy", "xywh")
        assert sides.dtype == torch.int32 and sides.tolist() == [[low, low, high - low, high - low]]
        assert detops.box_area(boxes).tolist() == [(high - low) ** 2]
        turned = detops.box_convert(torch.tensor([[0, 0, high, high, 45]], dtype=dtype), "xywhr", "xyxyxyxy")
        assert turned.dtype == torch.int32 and turned[0, 4] == round(2**0.5 * high)
        same = detops.box_convert(boxes, "xyxy", "xyxy")
        assert same.dtype == dtype and torch.equal(same, boxes)
    for dtype in (torch.int32, torch.int64):
        assert detops.box_convert(torch.tensor([[1, 2, 3, 4]], dtype=dtype), "xywh", "xyxy").dtype == dtype


@pytest.mark.parametrize(
    "call",
    [
        lambda word: detops.linear_sum_assignment(torch.zeros(1, 2, 2), invalid=word),
        lambda word: detops.generalized_box_iou_loss(BOXES, BOXES, reduction=word),
        lambda word: detops.yolo_anchors(word),
        lambda word: detops.box_convert(BOXES, word, "xyxy"),
        lambda word: detops.kmeans_anchors(BOXES[:, 2:], 1, metric=word),
    ],
)
@pytest.mark.parametrize("word", [["mean"], None, 1, "MEAN"])
def test_words_that_are_none_of_the_choices(call, word):
    with pytest.raises(ValueError, match=r"must be .*, got "):
        call(word)


def test_numbers_of_numpy():
    """Every option takes what `operator.index` and `float` take."""
    whole, half = np.int64(8), np.float32(0.5)
    assert torch.equal(detops.clip_boxes_to_image(BOXES, (whole, whole)), detops.clip_boxes_to_image(BOXES, (8, 8)))
    assert torch.equal(
        detops.clip_boxes_to_image(BOXES.long(), np.array([8, 5])), detops.clip_boxes_to_image(BOXES.long(), (8, 5))
    )
    assert detops.remove_small_boxes(BOXES, whole).tolist() == [0]
    assert detops.remove_small_boxes(BOXES, torch.tensor(8)).tolist() == [0]
    for function in (detops.distance_box_iou, detops.complete_box_iou, detops.efficient_box_iou, detops.siou_loss):
        assert torch.equal(function(BOXES, BOXES, eps=half), function(BOXES, BOXES, eps=0.5))
    weights = np.array([10, 10, 5, 5])
    deltas = detops.encode_boxes(BOXES, BOXES.flip(0), weights)
    assert torch.equal(deltas, detops.encode_boxes(BOXES, BOXES.flip(0), (10, 10, 5, 5)))
    assert torch.equal(
        detops.decode_boxes(deltas, BOXES, weights, half), detops.decode_boxes(deltas, BOXES, (10, 10, 5, 5), 0.5)
    )
    coder = detops.BoxCoder(weights, np.float64(0.5))
    assert coder.weights == (10, 10, 5, 5) and type(coder.bbox_xform_clip) is float
    points = BOXES[:, :2]
    assert torch.equal(
        detops.encode_ltrb(BOXES, points, max_distance=whole), detops.encode_ltrb(BOXES, points, max_distance=8)
    )
    assert torch.equal(detops.decode_dfl(LOGITS, np.int64(0)), detops.decode_dfl(LOGITS, 0))
    raw, anchors = [torch.zeros(1, 6, 2, 2)], torch.ones(1, 1, 2)
    assert torch.equal(
        detops.decode_yolo(raw, anchors, np.array([8]), version="v3").boxes,
        detops.decode_yolo(raw, anchors, [8], version="v3").boxes,
    )
    targets = torch.tensor([0, 2])
    assert torch.equal(
        detops.sigmoid_focal_loss(LOGITS, targets, alpha=half, gamma=np.int32(2)),
        detops.sigmoid_focal_loss(LOGITS, targets, alpha=0.5, gamma=2),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: detops.clip_boxes_to_image(BOXES, 5),
            "clip_boxes_to_image: size must be a sequence of numbers, got 5",
        ),
        (lambda: detops.clip_boxes_to_image(BOXES, ("a", 5)), "clip_boxes_to_image: size must be a number, got 'a'"),
        (lambda: detops.remove_small_boxes(BOXES, None), "remove_small_boxes: min_size must be a number, got None"),
        (lambda: detops.distance_box_iou(BOXES, BOXES, "1"), "distance_box_iou: eps must be a number, got '1'"),
        (lambda: detops.siou_loss(BOXES, BOXES, eps=None), "siou_loss: eps must be a number, got None"),
        (
            lambda: detops.encode_boxes(BOXES, BOXES, 1.0),
            "encode_boxes: weights must be a sequence of numbers, got 1.0",
        ),
        (lambda: detops.decode_boxes(BOXES, BOXES, clip="4"), "decode_boxes: clip must be a number, got '4'"),
        (lambda: detops.decode_dfl(LOGITS, 0.5), "decode_dfl: dim must be an integer, got 0.5"),
        (
            lambda: detops.sigmoid_focal_loss(LOGITS, LOGITS, gamma=[2]),
            "sigmoid_focal_loss: gamma must be a number, got",
        ),
    ],
)
def test_what_is_no_number(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Tracing.


@pytest.mark.parametrize("name", TENSORS)
def test_symbolic_trace_keeps_the_call(name):
    """torch.fx cannot look into the functions, and need not: the graph calls them."""
    _, call = TENSORS[name]
    if name in ("encode_boxes", "decode_boxes", "encode_ltrb", "decode_ltrb", "decode_dfl", "varifocal_loss") or (
        "iou_loss" in name or name == "siou_loss"
    ):
        pytest.skip("torchvision's are not traced either")
    graph = torch.fx.symbolic_trace(lambda boxes: call(boxes))
    got, expected = graph(BOXES), call(BOXES)
    for mine, other in zip(
        *((each,) if isinstance(each, torch.Tensor) else each for each in (got, expected)), strict=True
    ):
        assert torch.equal(mine, other)


def test_symbolic_trace_of_sizes_and_targets():
    graph = torch.fx.symbolic_trace(lambda boxes, size: detops.clip_boxes_to_image(boxes, size))
    assert torch.equal(graph(BOXES, (5, 6)), detops.clip_boxes_to_image(BOXES, (5, 6)))
    graph = torch.fx.symbolic_trace(lambda image: detops.clip_boxes_to_image(BOXES, (image.shape[-2], image.shape[-1])))
    assert torch.equal(graph(torch.zeros(1, 5, 6)), detops.clip_boxes_to_image(BOXES, (5, 6)))
    graph = torch.fx.symbolic_trace(
        lambda inputs, targets: detops.sigmoid_focal_loss(inputs, targets, gamma=1, reduction="sum")
    )
    targets = torch.tensor([0, 2])
    assert torch.equal(graph(LOGITS, targets), detops.sigmoid_focal_loss(LOGITS, targets, gamma=1, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
def test_traces_keep_the_size_of_an_image_open(dtype):
    def clip(boxes, image):
        return detops.clip_boxes_to_image(boxes, image.shape[-2:])

    boxes = torch.tensor([[3, 4, 200, 210]]).to(dtype)
    traced = torch.jit.trace(clip, (boxes, torch.zeros(1, 50, 60)))
    for height, width in ((50, 60), (100, 120), (300, 400)):
        got = traced(boxes, torch.zeros(1, height, width))
        assert got.dtype == dtype and got.tolist() == [[3, 4, min(200, width), min(210, height)]]
