"""How a benchmark case is described, checked and measured. `run.py` is the command, `<family>.py` lists cases."""

import ctypes
import importlib.util
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
MAX_COPIES = 4096  # of the inputs, see Rotation
PATIENCE = 10  # time budgets; what takes longer is run once


def same(ours: Any, theirs: Any) -> bool:
    """Exact equality of tensors, arrays, scalars and sequences of them."""
    if isinstance(ours, torch.Tensor | np.ndarray):
        ours, theirs = torch.as_tensor(ours).cpu(), torch.as_tensor(theirs).cpu()
        return ours.shape == theirs.shape and bool((ours == theirs).all())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


@dataclass
class Case:
    """One workload, what runs it, and what its result must be.

    `run` and every peer are called with the tensors that `make_inputs` returns. A detops result counts as checked once
    it is the `same` as a peer's, or passes `verify`; a peer that is known to differ in rare cases stands in
    `may_differ` and is marked in the report instead of failing the run.
    """

    name: str
    make_inputs: Callable[[], tuple[torch.Tensor, ...]]
    run: Callable
    peers: Mapping[str, Callable] = field(default_factory=dict)
    same: Callable[[Any, Any], bool] = same  # (our result, a peer's result)
    verify: Callable[..., bool] | None = None  # (our result, *inputs), from the op's definition
    may_differ: Sequence[str] = ()
    series: str = ""  # cases of one series differ in `size` only and are drawn as one line
    size: int = 0
    measure_memory: bool = False  # on the CPU this costs a fresh process; on a GPU memory is always measured
    asked: str = ""  # what the project asks for, printed beside what was measured
    prediction: str = ""  # bytes, launches and microseconds expected on an H200
    # (*inputs) -> which share of the time of detops and of peers goes to the ops, where a case is more than these
    shares: Callable[..., dict[str, float]] | None = None


class WrongResult(Exception):
    """detops disagrees with a peer or with the op's definition."""


@dataclass
class Timing:
    """Seconds a call."""

    median: float
    quartiles: tuple[float, float]
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        q1, median, q3 = np.percentile(samples, [25, 50, 75]).tolist()
        return cls(median, (q1, q3), len(samples))


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a nest of tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


def byte_count(value: Any) -> int:
    return sum(t.nbytes for t in tensors(value))


def optional(module: str) -> ModuleType | None:
    """A peer's module, or None where it is not installed, or does not fit this torch."""
    if not importlib.util.find_spec(module.partition(".")[0]):
        return None
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another torch raises RuntimeError
        print(f"{module} cannot be imported: {error}", file=sys.stderr)
        return None


def reference(family: str) -> ModuleType:
    """The NumPy reference tests/reference/<family>.py."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.import_module(f"reference.{family}")


class Rotation:
    """Inputs for call after call; on a GPU, copies that together exceed the L2 cache, so that calls read memory."""

    def __init__(self, inputs: tuple[torch.Tensor, ...]):
        self.copies = [inputs]
        self.calls = 0
        if inputs[0].is_cuda:
            cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
            count = min(2 * cache // byte_count(inputs) + 1, MAX_COPIES)
            self.copies += [tuple(t.clone() for t in inputs) for _ in range(count - 1)]

    def next(self) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return self.copies[self.calls % len(self.copies)]


def time_calls(function: Callable, rotation: Rotation, count: int) -> list[float]:
    """Seconds of each of `count` calls: device events on a GPU, else the wall clock."""
    if not rotation.copies[0][0].is_cuda:
        seconds = []
        for _ in range(count):
            inputs = rotation.next()
            start = time.perf_counter()
            function(*inputs)
            seconds.append(time.perf_counter() - start)
        return seconds
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        inputs = rotation.next()
        start.record()
        function(*inputs)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def time_in_turn(
    functions: Mapping[str, Callable], first_call: Mapping[str, float], rotation: Rotation, budget: float
) -> dict[str, Timing]:
    """Time all functions in turn, round after round, so that a disturbance of the machine meets all of them.

    Each gets about `budget` seconds: many short calls or few long ones, at least three. What took PATIENCE budgets in
    its `first_call` keeps that one measurement.
    """
    samples = {name: [seconds] if seconds > PATIENCE * budget else [] for name, seconds in first_call.items()}
    cost = {  # of a short call, asked again: the first one may have had more to do
        name: time_calls(functions[name], rotation, 1)[0] if seconds < budget else seconds
        for name, seconds in first_call.items()
        if not samples[name]
    }
    for turn in range(ROUNDS):
        for name, seconds in cost.items():
            if turn < 3 or sum(samples[name]) < budget:
                count = min(max(1, int(budget / ROUNDS / max(seconds, 1e-6))), 1000)
                samples[name] += time_calls(functions[name], rotation, count)
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def timed(function: Callable, *inputs: torch.Tensor) -> tuple[Any, float]:
    """The result of one call and the seconds it took, those of the GPU counted."""
    start = time.perf_counter()
    result = function(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def check(case: Case, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, dict[str, bool], dict[str, float]]:
    """The result of detops, which peers agree with it, and the seconds that each one's first call took."""
    first_call = {}
    result, first_call["detops"] = timed(case.run, *inputs)
    if case.verify and not case.verify(result, *inputs):
        raise WrongResult(f"{case.name}: the result contradicts the definition")
    agrees = {}
    for name, peer in case.peers.items():
        theirs, first_call[name] = timed(peer, *inputs)
        agrees[name] = case.same(result, theirs)
        if not agrees[name] and name not in case.may_differ:
            raise WrongResult(f"{case.name}: the result differs from that of {name}")
    if not case.verify and not any(agrees.values()):
        raise WrongResult(f"{case.name}: nothing here can confirm the result")
    return result, agrees, first_call


def measure(case: Case, family: str, device: str, quick: bool, budget: float) -> dict:
    """Check and time one case; everything that is known about it, as JSON wants it."""
    inputs = case.make_inputs()
    result, agrees, first_call = check(case, inputs)
    outputs = tensors(result)
    moved = byte_count(inputs) + byte_count(outputs)

    def floor(*_):
        for t in outputs:
            torch.full(t.shape, 0, dtype=t.dtype, device=t.device)

    functions = {"detops": case.run, **case.peers, "floor": floor}
    timings = time_in_turn(functions, {**first_call, "floor": 0.0}, Rotation(inputs), budget)
    ours, least = timings.pop("detops"), timings.pop("floor")
    if device == "cuda":
        memory = peak_extra_memory_cuda(case, inputs)
    else:
        memory = peak_extra_memory_cpu(family, case.name, quick) if case.measure_memory else None
    return {
        "family": family,
        "name": case.name,
        "series": case.series,
        "size": case.size,
        "asked": case.asked,
        "prediction": case.prediction,
        "detops": vars(ours),
        "peers": {
            name: {**vars(t), "ratio": t.median / ours.median, "agrees": agrees[name]} for name, t in timings.items()
        },
        "floor": vars(least),
        "bytes": moved,
        "gb_per_s": moved / ours.median / 1e9,
        "peak_extra_bytes": memory,
        "shares": case.shares(*inputs) if case.shares else {},
    }


def peak_extra_memory_cuda(case: Case, inputs: tuple[torch.Tensor, ...]) -> int:
    """Device bytes that one call holds at most on top of its inputs, its outputs counted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_extra_memory_cpu(family: str, name: str, quick: bool) -> int | None:
    """The same on the CPU: how far one call raises the resident memory of a fresh process. Linux only, else None."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("spawn")  # a fork would inherit a thread pool without its threads
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_report_peak_extra_memory, args=(sender, family, name, quick, torch.get_num_threads())
    )
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # this kernel does not let a process reset its peak
        return None
    finally:
        child.join()


def _report_peak_extra_memory(sender, family: str, name: str, quick: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    cases = importlib.import_module(family).cases("cpu", quick)
    case = next(case for case in cases if case.name == name)
    inputs = case.make_inputs()
    # Give back what building the inputs left in the heap, which the call could otherwise use unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of VmRSS
    before = _status_bytes("VmRSS")
    case.run(*inputs)
    sender.send(_status_bytes("VmHWM") - before)


def _status_bytes(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field_name)


def copy_bandwidth(device: str, quick: bool) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.ones((64 if quick else 256) * 2**20 // (1 if device == "cuda" else 4), device=device)
    target = torch.empty_like(source)
    seconds = time_calls(lambda s: target.copy_(s), Rotation((source,)), 7)
    return 2 * source.nbytes / statistics.median(seconds)


def machine(device: str) -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,  # large results ask for them
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
    }


def versions() -> dict:
    from detops import _library

    torchvision = optional("torchvision")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__ if torchvision else None,
        "numpy": np.__version__,
        "detops": _library.build_info(),
    }


def git_commit() -> str | None:
    """The checked-out commit, with -dirty where files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
