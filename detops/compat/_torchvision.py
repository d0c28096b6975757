"""The switch that puts detops in torchvision's place."""

import contextlib
import importlib
import threading
from collections.abc import Iterator

from ._redirect import Redirection


class Torchvision:
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
    batch index out of range is an error, and IoUs, their losses and the coders have no second derivative.

    torchvision's own code still runs under TorchScript, tracing and export, in torch.func transforms and forward-mode
    derivatives, for tensors that are quantised or on devices that detops has no kernels for, for arguments that detops
    does not take, and where a subclass or a changed instance has its own way. So programs that are exported, to ONNX
    too, are those of torchvision, and need no detops. Not reached are programs scripted, exported or traced before, and
    calls of `torch.ops.torchvision.*`.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: something else has replaced one of these functions; nothing is changed then.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._installed = False
        self._blocks = 0
        self._running: list[Redirection] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Installed within a block; also a decorator."""
        with self._lock:
            self._switch(self._installed, self._blocks + 1)
        try:
            yield
        finally:
            with self._lock:
                self._switch(self._installed, self._blocks - 1)

    def install(self) -> None:
        """Until `uninstall`."""
        with self._lock:
            self._switch(True, self._blocks)

    def uninstall(self) -> None:
        """Undoes `install`; blocks that still run keep what they asked for."""
        with self._lock:
            self._switch(False, self._blocks)

    def __repr__(self) -> str:
        return f"<detops.compat.torchvision: {'in place' if self._running else 'not in place'}>"

    def _switch(self, installed: bool, blocks: int) -> None:
        wanted = installed or blocks > 0
        if wanted and not (self._installed or self._blocks):
            self._stop()  # what a stop that was interrupted has left
            redirections = _redirections()
            try:
                for each in redirections:
                    self._running.append(each)  # before it starts, which may be interrupted half-way
                    each.start()
            except BaseException:
                self._stop()
                raise
        self._installed, self._blocks = installed, blocks
        if not wanted:
            self._stop()

    def _stop(self) -> None:
        """All of them, also where one raises or is interrupted; that one stays, for the next switch."""
        left, raised = [], None
        for each in self._running:
            try:
                each.stop()
            except BaseException as error:
                left.append(each)
                raised = error
        self._running = left
        if raised is not None:
            raise raised


torchvision = Torchvision()


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
