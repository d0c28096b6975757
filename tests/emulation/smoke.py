"""What run.py runs where there is no pytest: the examples in the docstrings of the families, with the emulated kernels.

DETOPS_EMULATED_LIBRARY=path python tests/emulation/smoke.py nms iou
"""

import doctest
import importlib
import os
import sys

import torch

import detops
from detops import _library


def main(families: list[str]) -> int:
    _library.load_emulation(os.environ["DETOPS_EMULATED_LIBRARY"])
    failed = 0
    for family in families:
        module = importlib.import_module(f"detops.{family}")
        names = {**{name: getattr(detops, name) for name in detops.__all__}, "torch": torch, "detops": detops}
        with _library.use_namespace("detops_emulated"):
            result = doctest.testmod(module, extraglobs=names)
        print(f"{family}: {result.attempted} lines of examples, {result.failed} failed")
        failed += result.failed or not result.attempted
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
