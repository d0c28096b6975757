"""Fixtures: the devices that a test runs on, and the dtypes.

DETOPS_TEST_DEVICES=cpu,emulated     only these devices; tests that name no device belong to "cpu"
DETOPS_EMULATION=0                   never the emulated CUDA kernels
DETOPS_EMULATED_LIBRARY=path         a ready-built emulated library, instead of building one
DETOPS_TEST_SMALL=1                  fewer cases of a test and, on a CPU, fewer boxes, for the slower sanitizers
"""

import functools
import importlib.util
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from inputs import to_torch

DEVICES = ("cpu", "cuda", "emulated")
EMULATION_BUILD = Path(__file__).parent / "emulation" / "build.py"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _chosen_devices():
    names = [name.strip() for name in os.environ.get("DETOPS_TEST_DEVICES", "").split(",") if name.strip()]
    if unknown := set(names) - set(DEVICES):
        raise pytest.UsageError(f"DETOPS_TEST_DEVICES must name some of {', '.join(DEVICES)}, got {sorted(unknown)}")
    return tuple(name for name in DEVICES if not names or name in names)


class Device(NamedTuple):
    """Where a test runs: on "cuda" tensors, or on CPU tensors with the real or the emulated CUDA kernels."""

    name: str

    @property
    def torch(self):
        return "cuda" if self.name == "cuda" else "cpu"

    def put(self, values, dtype=None):
        """An array, list or tensor as a tensor here; floating arrays become float32 unless `dtype` says otherwise."""
        return to_torch(values, dtype, self.torch)

    def limit(self, n, emulated=2500):
        """n, or less under emulation, which is about a thousand times slower than a GPU, and under sanitizers."""
        small = os.environ.get("DETOPS_TEST_SMALL") == "1" and self.name != "cuda"
        return min(n, emulated if self.name == "emulated" else n, 200 if small else n)


def _short(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=DEVICES)
def device(request):
    """A Device. `@pytest.mark.parametrize("device", ["cuda"], indirect=True)` runs a test on that one only."""
    name = request.param
    request.node.user_properties.append(("device", name))
    if name not in _chosen_devices():
        pytest.skip(f"DETOPS_TEST_DEVICES leaves out {name}")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    if name != "emulated":
        yield Device(name)
        return
    if otherwise := _load_emulated_kernels():
        outcome, reason = otherwise
        outcome(reason)
    from detops import _library

    with _library.use_namespace("detops_emulated"):
        yield Device(name)


@functools.cache
def _load_emulated_kernels():
    """(what to do instead, why), or None when they are loaded; asked once a session, also when the build fails."""
    from detops import _library

    library = os.environ.get("DETOPS_EMULATED_LIBRARY")
    if reason := _emulation_is_left_out():
        return pytest.skip, reason
    if not library:
        try:
            library = _module_at(EMULATION_BUILD).build_library()
        except Exception as error:
            return pytest.fail, f"the emulated CUDA kernels do not build: {error}"
    _library.load_emulation(library)
    return None


def _emulation_is_left_out():
    """Why, or nothing."""
    if os.environ.get("DETOPS_EMULATION") == "0":
        return "DETOPS_EMULATION=0"
    if shutil.which("g++") is None and not os.environ.get("DETOPS_EMULATED_LIBRARY"):
        return "no g++ to build the emulated CUDA kernels"
    return ""


def _module_at(path):
    spec = importlib.util.spec_from_file_location("detops_emulation_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FLOATING, ids=_short)
def boxes_dtype(request):
    return request.param


@pytest.fixture(params=FLOATING, ids=_short)
def scores_dtype(request):
    return request.param


@pytest.fixture
def restore_threads():
    """For tests that set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """What torch.compile made of a function before: it counts against a limit, and tests share functions."""
    if "compile" in request.node.name:
        torch.compiler.reset()


@pytest.fixture
def torchvision():
    """torchvision, where it is installed; a test that uses it is marked "parity"."""
    return pytest.importorskip("torchvision")


def pytest_report_header():
    """Says at once that something is compiled first, and how long that takes."""
    if _emulation_is_left_out() or os.environ.get("DETOPS_EMULATED_LIBRARY") or "emulated" not in _chosen_devices():
        return None
    try:
        announced = _module_at(EMULATION_BUILD).announcement()
    except RuntimeError as error:
        return str(error)
    return announced and f'before the first test of device "emulated": {announced} (DETOPS_EMULATION=0 leaves it out)'


def pytest_generate_tests(metafunc):
    _chosen_devices()  # refuses a misspelt name before anything runs


def pytest_collection_modifyitems(config, items):
    """Leave out what DETOPS_TEST_DEVICES and DETOPS_TEST_SMALL leave out; mark the quick tests and those of parity with
    torchvision; skip those that need a compiler where there is none."""
    compiler = shutil.which("g++")
    for item in items:
        if "torchvision" in getattr(item, "fixturenames", ()):
            item.add_marker("parity")
        if compiler is None and item.get_closest_marker("needs_compiler"):
            item.add_marker(pytest.mark.skip(reason="torch.compile on the CPU needs g++"))
    for item in _some_of_each_test([item for item in items if _may_be_quick(item)], most=1):
        item.add_marker("quick")
    chosen = _chosen_devices()
    keep = [item for item in items if _device_of(item) in chosen]
    if os.environ.get("DETOPS_TEST_SMALL") == "1":
        keep = _some_of_each_test(keep)
    if len(keep) < len(items):
        kept = set(keep)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = keep


def _may_be_quick(item):
    of_an_op = "device" in getattr(item, "fixturenames", ()) and _device_of(item) == "cpu"
    return of_an_op and not re.search("gradcheck|opcheck|compile|export|drawn|more_than|many_anchors", item.name)


def _some_of_each_test(items, most=8):
    """At most this many cases of each test, evenly spread over its parameters."""
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    return [
        case
        for every in cases.values()
        for case in (every if len(every) <= most else [every[i * len(every) // most] for i in range(most)])
    ]


def _device_of(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("device", "cpu") if "device" in getattr(item, "fixturenames", ()) else "cpu"


def pytest_terminal_summary(terminalreporter):
    """How many tests ran on which device, so that a green run on a machine without a GPU is not misread."""
    counts = {name: Counter() for name in (*DEVICES, "no device")}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            name = dict(getattr(report, "user_properties", ())).get("device", "no device")
            counts[name][outcome] += 1
    terminalreporter.section("tests by device")
    for name, outcomes in counts.items():
        line = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "none"
        terminalreporter.write_line(f"{name}: {line}")
