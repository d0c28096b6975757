"""detops in place of other libraries, inside code that was written for them.

>>> import detops
>>> with detops.compat.torchvision():
...     losses = model(images, targets)  # any model on torchvision's ops

See `detops.compat.torchvision`. Importing this imports nothing of theirs.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which knows no module that can be called
    from ._host import Switch

    torchvision: Switch
else:
    from . import torchvision

__all__ = ["torchvision"]
