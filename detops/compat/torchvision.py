"""Makes torchvision, and all code that uses it, run on detops; or only a block of code.

>>> with detops.compat.torchvision():
...     losses = model(images, targets)
>>> detops.compat.torchvision.install()  # from here on, everywhere
>>> detops.compat.torchvision.uninstall()

These functions of torchvision then call detops, whoever calls them and under whatever name: its own models, built
before or after, and all other modules, also where they keep a function in a closure or as a default argument.

- `nms`, `batched_nms`, `clip_boxes_to_image`, `remove_small_boxes`, `box_area`, `box_convert`, `masks_to_boxes`;
- `box_iou`, `generalized_box_iou`, `distance_box_iou`, `complete_box_iou`, and the three `..._loss` of the same
  names, `sigmoid_focal_loss`;
- `roi_align`, `roi_pool`, `ps_roi_align`, `ps_roi_pool`, their modules, and `MultiScaleRoIAlign`;
- of the detection models `Matcher`, `BoxCoder`, `AnchorGenerator`, `DefaultBoxGenerator`, and the post-processing
  of RetinaNet and SSD.

Samplers stay torchvision's: another random stream would change losses.

Blocks nest, and a block within an installation changes nothing. `install` and `uninstall` may be repeated; after
`uninstall`, or when the last block ends, also by an exception, everything is as it was. The code inside functions
is exchanged and not their names, so nothing has to be imported or built again. All threads see the change.

Results are torchvision's up to rounding. They differ where the docstrings of the functions say so, above all:
half-precision boxes are computed in float32, `batched_nms` does not merge classes where coordinates are negative, a
batch index out of range is an error, `MultiScaleRoIAlign` takes the scales of its maps from the longer side of the
images and not from their height, areas of integer boxes are int64 and do not wrap, nor do conversions of boxes of less
than 32 bits, which give int32, the losses of two boxes without area are 1 and have no gradient, and IoUs, their losses
and the coders have no second derivative.

torchvision's own code still runs under TorchScript, tracing and export, in torch.func transforms and forward-mode
derivatives, for tensors that are quantised or on devices that detops has no kernels for, for arguments that detops
does not take, and where a subclass or a changed instance has its own way. So programs that are exported, to ONNX
too, are those of torchvision, and need no detops. Not reached are programs scripted, exported or traced before, and
calls of `torch.ops.torchvision.*`.

Raises:
    ImportError: torchvision is not installed.
    RuntimeError: something else has replaced one of these functions; nothing is changed then.
"""

import importlib
from collections.abc import Callable

from ._host import Switch, make_callable
from ._redirect import Redirection


def _redirections() -> list[Redirection]:
    # Here and not above: these need all of detops.
    from . import _torchvision_detection, _torchvision_ops  # noqa: F401
    from ._torchvision_ops import replacements

    try:
        modules = {name: importlib.import_module(name) for name, _ in replacements}
    except Exception as error:  # torchvision of another torch raises RuntimeError
        raise ImportError(
            f"detops.compat.torchvision: torchvision must be installed and fit this torch, and could not be imported: "
            f"{error}"
        ) from error
    return [Redirection(modules[module], path, each) for (module, path), each in replacements.items()]


_switch = Switch(__name__, _redirections)
install: Callable[[], None] = _switch.install
uninstall: Callable[[], None] = _switch.uninstall
make_callable(__name__)
