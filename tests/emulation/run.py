"""Run the CUDA sources on the CPU: build them, and run the families' tests on the device "emulated".

    python tests/emulation/run.py                              every family, no sanitizer
    python tests/emulation/run.py --sanitize address nms       one family; out-of-bounds accesses, undefined behaviour
    python tests/emulation/run.py --sanitize thread --seed 7   races, with small inputs and a shuffled schedule
    python tests/emulation/run.py --sanitize init              reads of shared memory that nothing has written

Ends with a status other than 0 if a test fails, something is reported, or a kernel of these families was not run; with
`thread` the latter is only said, as small inputs do not reach every kernel. Needs g++, torch and an importable detops;
without pytest, smoke.py takes the tests' place.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build import CSRC, EMULATION, FLAGS, ROOT, build_library, families

TESTS = ROOT / "tests"
HAS_PYTEST = importlib.util.find_spec("pytest") is not None
NO_TESTS = 5  # pytest's status where -k chose none
# To be loaded before anything else. AddressSanitizer looks for the C++ runtime's exceptions when it starts.
PRELOADED = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}


def test_files(family: str) -> list[str]:
    """The tests of a family, and of the ops that have a source file of their own in its folder."""
    stems = {family} | {path.stem.removesuffix("_cuda") for path in CSRC.glob(f"{family}/*_cuda.cu")}
    return sorted({str(path) for stem in stems for path in TESTS.glob(f"test_{stem}*.py")})


def size_of_sources(family: str) -> int:
    return sum(path.stat().st_size for path in (CSRC / family).iterdir())


def kernels_in(folder: Path) -> set[str]:
    """The names of the __global__ functions in the sources of a folder."""
    found = set()
    for path in [*folder.rglob("*.cu"), *folder.rglob("*.cuh")]:
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        code = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", code)
        for declaration in re.findall(r"__global__([^;{(]*)\(", code):
            found.add(declaration.split()[-1])
    return found


def kernels_not_run(names: list[str], ran: set[str], csrc: Path = CSRC) -> set[str]:
    """Kernels of these families that did not run; with all families, of everything in csrc."""
    folders = [csrc] if set(names) == set(families(csrc)) else [csrc / name for name in names]
    return set().union(*map(kernels_in, folders)) - ran


def small(options: argparse.Namespace) -> bool:
    """Whether the tests are asked for small inputs, which need not reach every kernel."""
    return options.sanitize == "thread"


def sanitizer_environment(sanitize: str, poison: int) -> dict[str, str]:
    """What Python needs to run with a library that was built so; unwritten memory is filled with the poison."""
    options = [
        "detect_leaks=0",  # Python keeps memory to its end
        "handle_segv=2",  # not faulthandler: it knows less
        "allocator_may_return_null=1",  # some tests ask for more than there is
        f"max_malloc_fill_size={1 << 30}:malloc_fill_byte={poison}",
    ]
    preloaded = {"LD_PRELOAD": " ".join(map(compiler_file, PRELOADED[sanitize]))} if sanitize in PRELOADED else {}
    return {**preloaded, "ASAN_OPTIONS": ":".join(options), "UBSAN_OPTIONS": "print_stacktrace=1"}


def environment(library: Path, log: Path, options: argparse.Namespace) -> dict[str, str]:
    every = {
        **os.environ,
        **sanitizer_environment(options.sanitize, options.poison),
        "DETOPS_TEST_DEVICES": "emulated",
        "DETOPS_EMULATED_LIBRARY": str(library),
        "DETOPS_EMULATED_KERNELS": str(log),
        "DETOPS_EMULATED_SEED": str(options.seed),
        "DETOPS_EMULATED_POISON": str(options.poison),
        "OMP_NUM_THREADS": "1",  # fibers and threads of a pool do not mix well, and reports should be about fibers
        # What torch allocates is filled as well: by the C library, which cannot write 0xFF, or by the sanitizer.
        "MALLOC_PERTURB_": str(options.poison ^ 0xFF or 1),
        "TSAN_OPTIONS": f"exitcode=66:halt_on_error={int(options.first)}",
    }
    if (ROOT / "detops" / "_C.so").exists():
        every["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if small(options):
        every["DETOPS_TEST_SMALL"] = "1"
    return every


def fix_addresses() -> None:
    """Before a program starts: no random layout of its memory. Some of them ThreadSanitizer does not know."""
    no_randomisation = 0x0040000
    ctypes.CDLL(None).personality(no_randomisation)  # where this is forbidden, most layouts work all the same


def compiler_file(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tests_command(family: str, options: argparse.Namespace) -> list[str]:
    if not HAS_PYTEST:
        return [sys.executable, str(EMULATION / "smoke.py"), family]
    chosen = [*(["-k", options.pytest_k] if options.pytest_k else []), *(["-x"] if options.first else [])]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *test_files(family)]


def run_family(family: str, library: Path, log: Path, options: argparse.Namespace) -> int:
    """Runs the tests of a family in a process of its own and returns their status. What several print is kept apart."""
    kept = None if len(options.families) == 1 else subprocess.PIPE
    result = subprocess.run(
        tests_command(family, options),
        env=environment(library, log, options),
        cwd=TESTS,
        preexec_fn=fix_addresses,
        stdout=kept,
        stderr=kept and subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if kept:
        print(f"=== {family}\n{result.stdout}", flush=True)
    if HAS_PYTEST and options.pytest_k and result.returncode == NO_TESTS:
        return 0
    return result.returncode


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(families())}; default: all")
    parser.add_argument("--sanitize", choices=FLAGS, default="none")
    parser.add_argument("--seed", type=int, default=0, help="shuffles the schedule of threads and blocks; 0: in order")
    parser.add_argument(
        "--poison", type=lambda text: int(text, 0), default=0xFF, help="the byte that fills unwritten memory"
    )
    parser.add_argument("--csrc", type=Path, default=CSRC, help="another copy of the sources")
    parser.add_argument("--first", action="store_true", help="stop at the first finding")
    parser.add_argument("-k", dest="pytest_k", help="only these tests, as pytest's -k; kernels may then be left out")
    options = parser.parse_args()
    if unknown := set(options.families) - set(families()):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    return options


def build(options: argparse.Namespace) -> dict[str, Path]:
    """The library for each family: its own where families are named, that of all of them otherwise."""
    csrc = options.csrc.resolve()
    if options.families:
        return {name: build_library(options.sanitize, name, csrc) for name in options.families}
    return dict.fromkeys(families(), build_library(options.sanitize, None, csrc))


def main() -> int:
    options = parse_arguments()
    names = options.families or families()
    started = time.monotonic()
    libraries = build(options)
    built = time.monotonic()
    if not HAS_PYTEST:
        print("no pytest here: running the examples of the docstrings in place of the tests", flush=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        names = sorted(names, key=size_of_sources, reverse=True)  # so that no long one is left for the end
        logs = [Path(folder) / name for name in names]
        jobs = [
            pool.submit(run_family, name, libraries[name], log, options) for name, log in zip(names, logs, strict=True)
        ]
        statuses = [job.result() for job in jobs]
        ran = set().union(*(log.read_text().split() for log in logs if log.exists()))
    status = next((status for status in statuses if status), 0)
    missing = kernels_not_run(names, ran, options.csrc)
    print(f"emulation: sanitize={options.sanitize} seed={options.seed}, {len(ran)} kernels run, ", end="")
    print(f"build {built - started:.0f} s, tests {time.monotonic() - built:.0f} s, status {status}")
    if missing and HAS_PYTEST and not options.pytest_k:
        print(f"no test ran: {', '.join(sorted(missing))}")
        if not small(options):
            status = status or 1
    return status if 0 <= status < 256 else 1


if __name__ == "__main__":
    sys.exit(main())
