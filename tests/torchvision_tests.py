"""Runs torchvision's own tests of its ops with detops in torchvision's place.

    python tests/torchvision_tests.py CHECKOUT [options of pytest]

CHECKOUT is a source tree of torchvision, of the release that is installed; only its folder `test` is used. Left out are
ops that detops has none of, and `test_roi_opcheck`, which calls torchvision's compiled ops by name. TorchScript and
quantised tensors stay with torchvision, and are tested. A run in which detops serves no call fails. Tests do not run in
parallel: pytest-xdist's workers would have torchvision's own functions.
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
        self.calls, self.left_to_torchvision, self.left_out = Counter(), Counter(), []

    def pytest_configure(self, config):
        detops.compat.torchvision.install()
        _redirect.observe(self._counting)

    def pytest_unconfigure(self, config):
        detops.compat.torchvision.uninstall()

    def _counting(self, key, replacement, original):
        counted = functools.partial(replacement, self._counted(self.left_to_torchvision, key, original))
        return self._counted(self.calls, key, counted)

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

    @pytest.hookimpl(trylast=True)  # torchvision's own makes a success of a run without tests
    def pytest_sessionfinish(self, session):
        if self._served_none() and not session.exitstatus and not session.config.option.collectonly:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _served_none(self):
        return self.calls.total() == self.left_to_torchvision.total()

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("left out")
        reasons = [self._reason(item) for item in self.left_out]
        for reason in sorted(set(reasons)):
            terminalreporter.write_line(f"{reasons.count(reason)}: {reason}")
        terminalreporter.section("calls")
        for key in sorted(self.calls):
            left = self.left_to_torchvision[key]
            terminalreporter.write_line(f"{key}: {self.calls[key] - left} to detops, {left} left to torchvision")
        if self._served_none():
            terminalreporter.write_line("detops served no call", red=True)


if __name__ == "__main__":
    checkout, *options = sys.argv[1:]
    tests = Path(checkout) / "test" / "test_ops.py"
    without = [option for plugin in ("cacheprovider", "xdist", "xdist.looponfail") for option in ("-p", f"no:{plugin}")]
    sys.exit(pytest.main([str(tests), f"--rootdir={checkout}", *without, *options], plugins=[InPlace()]))
