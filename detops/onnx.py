"""Export to ONNX: the ops of detops that have a counterpart there.

    program = torch.onnx.export(model, inputs, custom_translation_table=detops.onnx.translation_table())

`nms` becomes NonMaxSuppression and `roi_align` (the mean) becomes RoiAlign. The other ops have no counterpart, and
torch.onnx names them in its error. Needs the package onnxscript.
"""

from collections.abc import Callable
from typing import Any

import torch


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of detops' ops, to pass to torch.onnx.export as `custom_translation_table`.

    ONNX computes both ops in float32: other dtypes are converted to it, and the result of `roi_align` back. What a
    runtime makes of boxes that are inverted or not finite is its own affair.

    Returns:
        From each op to the function that writes it in ONNX (opset 18).

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> class Suppression(torch.nn.Module):
        ...     def forward(self, boxes, scores):
        ...         return detops.nms(boxes, scores, 0.5)
        >>> inputs = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 9]]), torch.tensor([0.5, 0.6])
        >>> table = detops.onnx.translation_table()
        >>> program = torch.onnx.export(Suppression(), inputs, custom_translation_table=table, verbose=False)
        >>> [node.op_type for node in program.model.graph][-2:]
        ['NonMaxSuppression', 'Gather']

    Source:
        The operators of ONNX, https://onnx.ai/onnx/operators/.
    """
    from onnxscript import FLOAT, INT64  # pyright: ignore[reportMissingImports]
    from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]

    def nms(boxes, scores, iou_threshold: float):
        # The IoU is the same with x for y, so the order of the coordinates does not matter.
        kept = op.NonMaxSuppression(
            op.Unsqueeze(op.Cast(boxes, to=FLOAT.dtype), [0]),
            op.Unsqueeze(op.Cast(scores, to=FLOAT.dtype), [0, 1]),
            op.Constant(value_ints=[torch.iinfo(torch.int64).max]),  # all that remain
            op.Constant(value_floats=[_float32_not_above(min(iou_threshold, 1.0))]),  # which no IoU exceeds
        )
        return op.Gather(kept, op.Constant(value_int=2), axis=1)  # of (image, class, box)

    def roi_align(input, boxes, spatial_scale: float, bins_y, bins_x, sampling_ratio: int, aligned: bool):
        boxes = op.Cast(boxes, to=FLOAT.dtype)
        images = op.Cast(op.Gather(boxes, op.Constant(value_int=0), axis=1), to=INT64.dtype)
        corners = op.Slice(boxes, [1], [5], [1])
        pooled = op.RoiAlign(
            op.Cast(input, to=FLOAT.dtype),
            corners,
            images,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=bins_y,
            output_width=bins_x,
            sampling_ratio=max(sampling_ratio, 0),  # 0: as many as fit, which is -1 here
            spatial_scale=spatial_scale,
        )
        return op.CastLike(pooled, input)

    ops = torch.ops.detops
    return {ops.nms.default: nms, ops.roi_align.default: roi_align}


def _float32_not_above(value: float) -> float:
    """The largest float32 that is at most `value`: an IoU in float32 exceeds one as it exceeds the other."""
    rounded = torch.tensor(value, dtype=torch.float32)
    return (rounded if rounded.double() <= value else rounded.nextafter(torch.tensor(-1.0))).item()
