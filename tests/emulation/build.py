"""Compile the CUDA sources for the CPU: csrc/*/*.cpp and csrc/*/*_cuda.cu with g++ into one library whose ops stand in
torch's namespace `detops_emulated`. Needs g++ and torch.

    python tests/emulation/build.py [none|address|undefined|thread|init]

Object files and libraries are kept in build/emulation, under names that depend on everything that went into them.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"

RUNTIME = [EMULATION / name for name in ("machine.cpp", "fiber.cpp", "initialised.cpp")]
STANDARD = ["-std=c++17", "-fPIC", "-g1", "-ffp-contract=off", f"-ffile-prefix-map={ROOT}/="]

# `checked` compiles kernels and ops, `runtime` the machine that runs them, which only talks to the sanitizer.
UNDEFINED = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
FLAGS = {
    "none": {"checked": ["-O2"], "runtime": [], "link": []},
    "address": {
        "checked": ["-O1", "-fsanitize=address", *UNDEFINED],
        "runtime": ["-DDETOPS_SANITIZE_ADDRESS"],
        "link": ["-fsanitize=address", *UNDEFINED],
    },
    "undefined": {
        "checked": ["-O1", *UNDEFINED],
        "runtime": ["-DDETOPS_SANITIZE_UNDEFINED"],
        "link": UNDEFINED,
    },
    "thread": {
        "checked": ["-O1", "-fsanitize=thread"],
        "runtime": ["-DDETOPS_SANITIZE_THREAD"],
        "link": ["-fsanitize=thread"],
    },
    # Calls a function at each load and store, which initialised.cpp defines: no sanitizer's library is involved.
    "init": {
        "checked": [
            *("-O1", "-fsanitize=kernel-address"),
            *("--param=asan-instrumentation-with-call-threshold=0", "--param=asan-stack=0", "--param=asan-globals=0"),
        ],
        "runtime": ["-DDETOPS_CHECK_INITIALISED"],
        "link": [],
    },
}
CHECKED_ALWAYS = ["-DDETOPS_EMULATED", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
RUNTIME_ALWAYS = ["-O2", "-Wall", "-Wextra"]


def build(sanitize: str = "none", csrc: Path = CSRC) -> Path:
    """The emulated library, made if need be."""
    import torch
    from torch.utils import cpp_extension

    headers = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}", f"-ffile-prefix-map={csrc}/=csrc/", *headers]
    sources = sorted([*csrc.glob("*/*.cpp"), *csrc.glob("*/*_cuda.cu")])
    link = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    salt = [torch.__version__, *(text_of_headers(csrc))]
    return link_objects("libdetops_emulated", sources, sanitize, flags, ["-shared", *link], salt, ".so")


def build_program(source: Path, sanitize: str = "none", flags: list[str] = (), suffix: str = "") -> Path:
    """A program of a source that needs no torch, with flags for all its parts: the self tests."""
    return link_objects(source.stem, [source], sanitize, flags, ["-shared"] if suffix else [], [], suffix, flags)


def link_objects(name, sources, sanitize, compile_flags, link_flags, salt, suffix, runtime_flags=()) -> Path:
    flags = FLAGS[sanitize]
    checked = [*STANDARD, *CHECKED_ALWAYS, *flags["checked"], f"-I{EMULATION}", *compile_flags]
    runtime = [*STANDARD, *RUNTIME_ALWAYS, *flags["runtime"], *runtime_flags]
    hidden = ["-fvisibility=hidden"]
    salt = [*salt, *text_of_headers(EMULATION)]
    with only_one_builds(), ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [pool.submit(compile_one, source, [*checked, *hidden], salt) for source in sources]
        objects += [pool.submit(compile_one, source, [*runtime, *hidden], salt) for source in RUNTIME]
        objects = [job.result() for job in objects]
    command = ["g++", *map(str, objects), *flags["link"], *link_flags]
    output = CACHE / f"{name}-{sanitize}-{digest(command)}{suffix}"
    return produce(command, output)


@contextlib.contextmanager
def only_one_builds():
    """Of several processes: the others wait, and then find what they need."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_one(source: Path, flags: list[str], salt: list[str]) -> Path:
    # Folders may differ between two copies of the same sources, and do not matter.
    named = [flag for flag in flags if not flag.startswith(("-I", "-ffile-prefix-map"))]
    key = digest([source.read_text(), *named, *salt])
    return produce(["g++", *flags, "-x", "c++", "-c", str(source)], CACHE / f"{source.stem}-{key}.o")


def produce(command: list[str], output: Path) -> Path:
    """Runs a compiler unless its output is there already."""
    if not output.exists():
        unfinished = output.with_name(f"{os.getpid()}-{output.name}")  # not taken for the output if this is cut off
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        unfinished.replace(output)
    return output


@functools.cache
def compiler_version() -> str:
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to compile the CUDA sources for the CPU")
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def text_of_headers(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted([*folder.rglob("*.h"), *folder.rglob("*.cuh")])]


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join([compiler_version(), *texts]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
