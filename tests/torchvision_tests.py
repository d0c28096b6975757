"""Runs torchvision's own tests of its ops with detops in torchvision's place.

    python tests/torchvision_tests.py CHECKOUT [options of pytest]

CHECKOUT is a source tree of torchvision, of the release that is installed; only its folder `test` is used. Left out are
ops that detops has none of, and `test_roi_opcheck`, which calls torchvision's compiled ops by name. TorchScript and
quantised tensors stay with torchvision, and are tested.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import pytest

import detops
from detops.compat import _redirect

OTHER_OPS = (
    "TestDeformConv",
    "TestFrozenBNT",
    "TestStochasticDepth",
    "TestDropBlock",
    "TestUtils",
)


class InPlace:
    """The plugin that puts detops in place, leaves tests out, and counts what went to detops."""

    def __init__(self) -> None:
        self.calls, self.left_to_torchvision = Counter(), Counter()

    def pytest_configure(self, config):
        detops.compat.torchvision.install()
        for key, target in _redirect.targets.items():
            (original,) = target.args
            counted = functools.partial(target.func, self._counted(self.left_to_torchvision, key, original))
            _redirect.targets[key] = self._counted(self.calls, key, counted)

    def pytest_unconfigure(self, config):
        detops.compat.torchvision.uninstall()

    @staticmethod
    def _counted(counter, key, function):
        def count(*args):
            counter[key] += 1
            return function(*args)

        return count

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if self._reason(item)]
        config.hook.pytest_deselected(items=left_out)
        self.left_out = left_out
        items[:] = [item for item in items if not self._reason(item)]

    @staticmethod
    def _reason(item):
        if item.cls is not None and item.cls.__name__ in OTHER_OPS:
            return "other ops"
        return "torchvision's compiled ops by name" if item.originalname == "test_roi_opcheck" else None

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("left out")
        reasons = [self._reason(item) for item in self.left_out]
        for reason in sorted(set(reasons)):
            terminalreporter.write_line(f"{reasons.count(reason)}: {reason}")
        terminalreporter.section("calls")
        for key in sorted(_redirect.targets):
            left = self.left_to_torchvision[key]
            terminalreporter.write_line(f"{key}: {self.calls[key] - left} to detops, {left} left to torchvision")


if __name__ == "__main__":
    checkout, *options = sys.argv[1:]
    tests = Path(checkout) / "test" / "test_ops.py"
    sys.exit(
        pytest.main([str(tests), f"--rootdir={checkout}", "-p", "no:cacheprovider", *options], plugins=[InPlace()])
    )
