"""Call every public function and every compiled op with drawn arguments, wrong ones too, and say what must not happen.

    python tests/fuzz.py --seconds 600                      all of them in turn
    python tests/fuzz.py --only nms 'detops::*' --seed 7    some; "detops::" marks a compiled op
    python tests/fuzz.py --call nms 17                      one call again, and what its arguments are
    python tests/checked.py python tests/fuzz.py            with the library that traps at a memory fault
    python tests/fuzz.py --device emulated                  the CUDA sources, in emulation with AddressSanitizer

A call may return, or raise a ValueError, TypeError or RuntimeError whose message begins with the name of the function.
A finding is everything else: another exception or message, the end of the process, a report of a sanitizer, a call that
does not end within --limit seconds, a result with memory that nobody has written, a result that another number of
threads or another run changes, and an argument that was written to. Findings of one kind are printed once, with the
command that repeats the call. Ends with status 1 if there is one.
"""

import argparse
import contextlib
import faulthandler
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checked import LIMIT, UNWRITTEN

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "emulation"))

MOST_MEMORY = 4 << 30  # of a worker, in bytes
CALLS = {"match_ssd": "(match_ssd|match_max_iou)"}  # which it is, with other options
MOST_ENDS = 3  # of the process in a function; then it is left out


# ---- A worker makes calls. It says which before it makes them, so that the one that ends the process is known.


def work(options: argparse.Namespace, say) -> None:
    """Calls the targets in turn with ascending seeds, its share of them, until it is ended or all are left out."""
    from fuzz_arguments import targets

    every = targets()
    names = [name for name in every if chosen(name, options)]
    with kernels(options.device):
        for step in range(options.first, sys.maxsize, options.workers):
            name, seed = names[step % len(names)], options.seed + step // len(names)
            if set(names) <= set(options.without):
                return
            if name in options.without:
                continue
            say(f"call {step} {name} {seed}")
            faulthandler.dump_traceback_later(options.limit, exit=True)
            outcome, text = make_call(every[name], seed, options.device)
            say(f"{outcome} {' '.join(text.split())[:600]}")


def make_call(target, seed: int, device: str, show: bool = False) -> tuple[str, str]:
    """("result" | "refused" | "finding" | "words", what it is). "words" is an exception of another kind or text."""
    import torch

    from fuzz_arguments import draw

    scene, arguments = draw(target, seed, small=device == "emulated")
    if show:
        for name, value in arguments.items():
            print(f"  {name} = {describe(value)}", flush=True)
    flushes = scene.chance(0.05) and torch.set_flush_denormal(True)
    threads = 1 if device == "emulated" else scene.pick((1, 2, 3))
    torch.set_num_threads(threads)
    before = [tensor.detach().clone() for tensor in tensors_in(arguments)]
    try:
        results = called(target, arguments, scene, seed)
        if found := unwritten(results):
            return "finding", found
        if not all(map(same_bits, before, tensors_in(arguments))):
            return "finding", "an argument was written to"
        if scene.chance(0.2) and not flushes and threads:
            torch.set_num_threads(1 if device == "emulated" else 4 - threads)
            again = called(target, arguments, scene, seed)
            if len(again) != len(results) or not all(map(same_bits, results, again)):
                return "finding", "the same call has another result"
        return "result", ""
    except Exception as error:
        kind = "refused" if is_allowed(error, target.name) else "words"
        if show and kind == "words":
            raise
        return kind, f"{type(error).__name__}: {error} ({place_of(error)})"
    finally:
        torch.set_flush_denormal(False)


def called(target, arguments: dict, scene, seed: int) -> list:
    """The tensors of the result, and of the gradients where some are asked for."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    result = target.call(**arguments)
    outputs = tensors_in(result)
    wanted = [tensor for tensor in tensors_in(arguments) if tensor.requires_grad]
    differentiable = [tensor for tensor in outputs if tensor.requires_grad]
    if not wanted or not differentiable:
        return outputs
    rng, scene.rng = scene.rng, np.random.default_rng(seed)  # the same in both runs
    try:
        grads = [gradient_for(scene, tensor) for tensor in differentiable]
        twice = scene.chance(0.1)
        found = torch.autograd.grad(differentiable, wanted, grads, allow_unused=True, create_graph=twice)
        found = [tensor for tensor in found if tensor is not None]
        if twice and (again := [tensor for tensor in found if tensor.requires_grad]):
            second = torch.autograd.grad([tensor.sum() for tensor in again], wanted, allow_unused=True)
            found += [tensor for tensor in second if tensor is not None]
    finally:
        scene.rng = rng
    return outputs + found


def gradient_for(scene, tensor):
    """As a sum's, which is expanded, or of any values and strides."""
    if scene.chance(0.3):
        return tensor.new_ones(()).expand(tensor.shape)
    gradient, scene.gradient = scene.gradient, False
    try:
        return scene.numbers(*tensor.shape, low=-1, high=1, dtype=tensor.dtype)
    finally:
        scene.gradient = gradient


def tensors_in(value) -> list:
    import torch

    if isinstance(value, torch.Tensor):
        # Of those on the device "meta", and of those expanded to millions of rows, there is nothing to look at.
        return [value] if value.device.type != "meta" and value.numel() < 1 << 26 else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def unwritten(results: list) -> str:
    """Whether a result holds the bytes that fill what is allocated."""
    import torch

    for place, tensor in enumerate(results):
        size = tensor.element_size()
        if size == 1 and tensor.dtype != torch.bool or not tensor.numel():
            continue  # in integers of 8 bits they may be a result
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        pattern = int.from_bytes(bytes([UNWRITTEN] * size), "little", signed=size > 1)
        # Eight bytes in a row: two alone may be a number of 16 bits. As bfloat16 they are no NaN but -1.7e38, which a
        # few neighbours between extremes can be.
        in_a_row = 16 if tensor.dtype == torch.bfloat16 else 8 // size
        filled = plain(tensor).view(integers) == pattern
        if filled.unfold(0, min(len(filled), in_a_row), 1).all(1).any():
            return f"tensor {place} of the result has memory that nobody has written"
    return ""


def same_bits(one, other) -> bool:
    """But for the bits of NaNs."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = plain(one), plain(other)
    if one.dtype.is_floating_point and one.element_size() > 1:
        nan = one.isnan()
        if not torch.equal(nan, other.isnan()):
            return False
        one, other = (torch.where(nan, 0, each) for each in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def plain(tensor):
    """Its elements in one dense row."""
    import torch

    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten()


def is_allowed(error: Exception, name: str) -> bool:
    """Whether it names the function or, of a compiled op and a class, one of those that it serves or calls."""
    import detops
    from detops import _library

    every = "|".join([*detops.__all__, *_library.op_names()])
    one_function = not name.startswith("detops::") and "." not in name
    allowed = [
        rf"(Invalid [\w ]+: )?({CALLS.get(name, name) if one_function else every}): ",
        rf"({every}): (there is no second derivative|all tensors must be on one device)",  # where only the op is known
        # torch's words: for a value of another type, before any code of ours runs, and where memory runs out.
        r"detops(_emulated)?::\w+\(\) Expected a value of type",
        r"There were no tensor arguments to this function",
        r".*DefaultCPUAllocator: (can't allocate|not enough) memory",
    ]
    return isinstance(error, ValueError | TypeError | RuntimeError) and any(
        re.match(beginning, str(error), re.DOTALL) for beginning in allowed
    )


def place_of(error: Exception) -> str:
    """The line of detops that an exception comes from: those of one line are of one kind."""
    import detops

    package = Path(detops.__file__).parent
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    inside = [f"{path.name}:{line}" for path, line in frames if package in path.parents]
    return inside[-1] if inside else "the compiled library"


def describe(value) -> str:
    """For the eye; small tensors in full."""
    import torch

    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        asks = ", requires_grad" if value.requires_grad else ""
        what = f"{dtype} {list(value.shape)}, strides {list(value.stride())}{asks}"
        if value.device.type == "meta":
            return f"<{what}, meta>"
        return f"<{what}: {value.tolist()}>" if value.numel() <= 100 else f"<{what}>"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {describe(item)}' for key, item in value.items())}}}"
    return repr(value)


@contextlib.contextmanager
def kernels(device: str):
    """The ops of the device in place of the others."""
    from detops import _library

    if device == "cpu":
        yield
        return
    _library.load_emulation(os.environ["DETOPS_EMULATED_LIBRARY"])
    with _library.use_namespace("detops_emulated"):
        yield


def restart_for_emulation() -> None:
    """As this program with the emulated kernels, whose sanitizers must be there before all else."""
    from build import build_library
    from run import fix_addresses, sanitizer_environment

    wanted = {"DETOPS_EMULATED_LIBRARY": str(build_library("address")), "OMP_NUM_THREADS": "1"}
    fix_addresses()
    environment = {**os.environ, **sanitizer_environment("address", UNWRITTEN), **wanted}
    environment["ASAN_OPTIONS"] += f":{LIMIT}"
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def chosen(name: str, options: argparse.Namespace) -> bool:
    """ "nms" chooses "nms", "Matcher" the methods of the class too."""
    return not options.only or any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*") for pattern in options.only
    )


def prepare_worker(options: argparse.Namespace) -> None:
    """Limits what it may take, so that a call for too much ends in an error of torch and not of the machine."""
    import resource

    warnings.simplefilter("ignore")
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which has a limit of its own, and needs address space
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# ---- The main process starts the workers, listens to them, and starts them anew behind a call that ended one.


class Report:
    """What was called, and the findings: each kind once."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.started = time.monotonic()
        self.outcomes: dict[str, Counter] = {}
        self.findings: dict[tuple[str, str], list] = {}
        self.ends: Counter = Counter()
        self.lock = threading.Lock()

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.started)

    def without(self) -> list[str]:
        """Functions that ended too many workers to be called on."""
        return [name for name, count in self.ends.items() if count >= MOST_ENDS]

    def outcome(self, name: str, seed: int, outcome: str, text: str, more: str = "") -> None:
        with self.lock:
            self.outcomes.setdefault(name, Counter())[outcome] += 1
            if outcome not in ("finding", "words"):
                return
            place = re.search(r"\((\w+\.py:\d+)\)$", text)
            kind = (name, place[1] if place else re.sub(r"0x[0-9a-f]+|-?\d[\d.e+-]*|\[.*?\]", "#", text))
            self.findings.setdefault(kind, []).append((seed, text))
            if len(self.findings[kind]) == 1:
                device = "" if self.options.device == "cpu" else f" --device {self.options.device}"
                print(f"{name}: {text}\n    python tests/fuzz.py{device} --call '{name}' {seed}\n{more}", flush=True)

    def end(self, name: str, seed: int, status: int, stderr: str) -> None:
        self.ends[name] += 1
        lines = [line for line in stderr.splitlines() if not line.startswith("Extension modules:")]
        telling = re.compile(
            r"runtime error:|ERROR: \w+Sanitizer|is beyond \d+ elements|Assertion|^Timeout|cuda_on_cpu:"
        )
        first = next((place for place, line in enumerate(lines) if telling.search(line)), 0)
        text = re.sub(r"==\d+==", "", lines[first]) if lines else ""
        frames = "\n".join(f"    {line}" for line in lines[first : first + 12])
        self.outcome(name, seed, "finding", f"the process ended with status {status}: {text}"[:300], frames)

    def close(self) -> int:
        calls = sum(sum(counts.values()) for counts in self.outcomes.values())
        refused = sum(counts["refused"] for counts in self.outcomes.values())
        silent = [name for name, counts in self.outcomes.items() if sum(counts.values()) >= 40 and not counts["result"]]
        print(f"fuzz: {calls} calls of {len(self.outcomes)} functions, {refused} refused, ", end="")
        print(f"{len(self.findings)} kinds of findings, {time.monotonic() - self.started:.0f} s")
        for (name, _), cases in sorted(self.findings.items(), key=lambda item: -len(item[1])):
            print(f"  {len(cases)} x {name} {cases[0][0]}: {cases[0][1][:160]}")
        for name in self.without():
            print(f"  {name} ended {MOST_ENDS} processes and was left out from there on")
        for name in silent:
            print(f"  {name} never had a result: its drawers draw nothing right")
        return int(bool(self.findings or silent))


def watch(first: int, report: Report) -> None:
    """Runs one worker's share."""
    options = report.options
    while report.left() > 0:
        read, write = os.pipe()
        command = [sys.executable, __file__, "--worker", str(write), "--first", str(first), *worker_arguments(options)]
        command += ["--without", *report.without()]
        with tempfile.TemporaryFile("w+", errors="replace") as stderr:
            worker = subprocess.Popen(
                command, pass_fds=[write], stderr=stderr, stdout=stderr, env=worker_environment(), cwd=ROOT / "tests"
            )
            os.close(write)
            timer = threading.Timer(max(0.1, report.left()), worker.terminate)
            timer.start()
            call = None
            with open(read) as lines:
                for line in lines:
                    word, _, rest = line.rstrip("\n").partition(" ")
                    if word == "call":
                        step, name, seed = rest.split()
                        call, first = (name, int(seed)), int(step) + options.workers
                    else:
                        report.outcome(*call, word, rest)
                        call = None
            timer.cancel()
            status = worker.wait()
            if status == 0:
                return
            if report.left() > 0:
                stderr.seek(0)
                text = stderr.read()
                if call is None:
                    raise RuntimeError(f"a worker ended with status {status} outside of a call:\n{text[-3000:]}")
                report.end(*call, status, text)


def worker_arguments(options: argparse.Namespace) -> list[str]:
    every = ["--seed", options.seed, "--workers", options.workers, "--limit", options.limit, "--device", options.device]
    return [*map(str, every), *(["--only", *options.only] if options.only else [])]


def worker_environment() -> dict[str, str]:
    # The C library fills what it allocates with the complement. Sanitizers have options of their own.
    return {**os.environ, "MALLOC_PERTURB_": str(UNWRITTEN ^ 0xFF), "PYTHONUNBUFFERED": "1"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first call of each function")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--device", choices=["cpu", "emulated"], default="cpu")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a call may take")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--call", nargs=2, metavar=("NAME", "SEED"), help="make this call only, in this process")
    for name in ("--worker", "--first"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.device == "emulated" and "DETOPS_EMULATED_LIBRARY" not in os.environ:
        restart_for_emulation()
    if options.worker is not None:
        prepare_worker(options)
        channel = os.fdopen(options.worker, "w", buffering=1)
        work(options, lambda text: channel.write(text + "\n"))
        return 0
    if options.call:
        from fuzz_arguments import targets

        name, seed = options.call
        with kernels(options.device):
            print(name)
            outcome, text = make_call(targets()[name], int(seed), options.device, show=True)
        print(f"{outcome} {text}")
        return int(outcome in ("finding", "words"))
    report = Report(options)
    with ThreadPoolExecutor(options.workers) as pool:
        for job in [pool.submit(watch, first, report) for first in range(options.workers)]:
            job.result()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
