"""torch.fx.symbolic_trace sees the functions and modules of detops as it sees torchvision's: calls that stay."""

import pytest
import torch
from torch import nn

import detops
from features import boxes

BOXES, SCORES, MAP = boxes(5), torch.rand(5), torch.rand(1, 4, 16, 16)
ROIS = torch.cat((torch.zeros(5, 1), BOXES / 2), 1)

FUNCTIONS = {
    "nms": (lambda ops, boxes, scores: ops.nms(boxes, scores, 0.5), (BOXES, SCORES)),
    "box_convert": (lambda ops, boxes: ops.box_convert(boxes, "xyxy", "cxcywh"), (BOXES,)),
    "clip_boxes_to_image": (lambda ops, boxes, image: ops.clip_boxes_to_image(boxes, image.shape[-2:]), (BOXES, MAP)),
    "remove_small_boxes": (lambda ops, boxes: ops.remove_small_boxes(boxes, 4.0), (BOXES,)),
    "sigmoid_focal_loss": (lambda ops, x, y: ops.sigmoid_focal_loss(x, y, reduction="mean"), (SCORES, SCORES.round())),
    "roi_align": (lambda ops, x, boxes: ops.roi_align(x, [boxes], 2, sampling_ratio=2), (MAP, BOXES)),
    "roi_pool": (lambda ops, x, boxes: ops.roi_pool(x, [boxes], 2), (MAP, BOXES)),
    "ps_roi_align": (lambda ops, x, boxes: ops.ps_roi_align(x, [boxes], 2, sampling_ratio=2), (MAP, BOXES)),
    "ps_roi_pool": (lambda ops, x, boxes: ops.ps_roi_pool(x, [boxes], 2), (MAP, BOXES)),
}
MODULES = {
    "RoIAlign": (2, 0.5, 2),
    "RoIPool": (2, 0.5),
    "PSRoIAlign": (2, 0.5, 2),
    "PSRoIPool": (2, 0.5),
}


class Head(nn.Module):
    def __init__(self, ops, name):
        super().__init__()
        self.pool = getattr(ops, name)(*MODULES[name])

    def forward(self, x, rois, boxes):
        return self.pool(x * 2, rois), self.pool(x, [boxes])


class Pyramid(nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.pool = ops.MultiScaleRoIAlign(["fine", "coarse"], 2, 2)

    def forward(self, fine, coarse, boxes):
        return self.pool({"fine": fine, "coarse": coarse}, [boxes], [(64, 64)])


def function_of(ops, name):
    function, inputs = FUNCTIONS[name]
    count = len(inputs)
    return {1: lambda a: function(ops, a), 2: lambda a, b: function(ops, a, b)}[count], inputs


def results(made):
    return made if isinstance(made, tuple) else (made,)


def check(module, inputs):
    graph = torch.fx.symbolic_trace(module)
    expected = results(module(*inputs))
    found = results(graph(*inputs))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    check(*function_of(detops, name))


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    check(Head(detops, name), (MAP, ROIS, BOXES))


def test_pyramid():
    check(Pyramid(detops), (MAP, MAP[..., ::2, ::2], BOXES))


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_torchvision_does_it(torchvision, name):
    if name in FUNCTIONS:
        check(*function_of(torchvision.ops, name))
    else:
        check(Head(torchvision.ops, name), (MAP, ROIS, BOXES))
