"""Exported to ONNX, nms and roi_align give onnxruntime the results that they give here."""

import doctest

import pytest
import torch

import detops
from features import boxes as random_boxes


@pytest.fixture
def run_exported():
    """Exports a function and runs it: (function, example inputs, dynamic shapes, inputs) -> the result."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    def run(function, example, dynamic, inputs):
        class Module(torch.nn.Module):
            def forward(self, *inputs):
                return function(*inputs)

        program = torch.onnx.export(
            Module().eval(),
            example,
            dynamic_shapes=(dynamic,),
            custom_translation_table=detops.onnx.translation_table(),
        )
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [each.name for each in session.get_inputs()]
        return torch.from_numpy(session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))[0])

    return run


DIM = torch.export.Dim.DYNAMIC


def test_nms(run_exported):
    def keep(boxes, scores):
        return detops.nms(boxes, scores, 0.3)

    def inputs(n):
        # Only 20 different scores: ties go to the lower index in both.
        return random_boxes(n), torch.arange(n) * 7 % 20 / 20

    got = run_exported(keep, inputs(30), ({0: DIM}, {0: DIM}), inputs(200))
    assert got.dtype == torch.int64 and 0 < len(got) < 200
    assert torch.equal(got, keep(*inputs(200)))


@pytest.mark.parametrize("iou_threshold", [1.0, 1.5, float("inf"), 0.1, 0.9999999999])
def test_nms_thresholds(run_exported, iou_threshold):
    # A pair with an IoU of 1, then one of 1/10: in float32 above 0.1, and equal to 0.1 as float32 rounds it.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 21, 10]])
    inputs = boxes, torch.tensor([0.9, 0.8, 0.7, 0.6])
    got = run_exported(lambda boxes, scores: detops.nms(boxes, scores, iou_threshold), inputs, ({}, {}), inputs)
    assert got.tolist() == detops.nms(*inputs, iou_threshold).tolist()
    assert got.tolist() == ([0, 1, 2, 3] if iou_threshold >= 1 else [0, 2] if iou_threshold == 0.1 else [0, 2, 3])


@pytest.mark.parametrize(("aligned", "sampling_ratio", "dtype"), [(True, 2, torch.float32), (False, -1, torch.float16)])
def test_roi_align(run_exported, aligned, sampling_ratio, dtype):
    def crop(input, boxes):
        return detops.roi_align(input, boxes, (3, 5), 0.5, sampling_ratio, aligned)

    def inputs(n):
        rows = torch.cat((torch.arange(n)[:, None] % 2, random_boxes(n)), 1)
        return torch.rand(2, 4, 16, 20, generator=torch.Generator().manual_seed(n)).to(dtype), rows

    got = run_exported(crop, inputs(6), ({}, {0: DIM}), inputs(50))
    torch.testing.assert_close(got, crop(*inputs(50)), rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-6)


def test_the_example_runs(run_exported):
    (example,) = doctest.DocTestFinder().find(
        detops.onnx.translation_table, "", detops.onnx, extraglobs={"detops": detops}
    )
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_other_ops_are_named(run_exported):
    with pytest.raises(Exception, match="detops[.:]+box_iou"):
        run_exported(detops.box_iou, (random_boxes(3), random_boxes(2)), ({}, {}), ())
