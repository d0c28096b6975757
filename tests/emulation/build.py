"""Compile the CUDA sources for the CPU: csrc/*/*.cpp and csrc/*/*_cuda.cu with g++ into one library whose ops stand in
torch's namespace `detops_emulated`. Needs g++, ninja and torch; ccache is used where it is found.

    python tests/emulation/build.py [none|address|undefined|thread|init] [family]

Ninja compiles again only what includes a changed file. The library of one family has no other family's ops. All is kept
in build/emulation, a folder for each kind and version of torch.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parents[1]
CSRC = ROOT / "csrc"
SELFTEST = EMULATION / "selftest"

RUNTIME = ("machine", "fiber", "initialised")
STANDARD = ["-std=c++17", "-fPIC", "-g1", "-ffp-contract=off", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
SECONDS = {"none": 8, "address": 15, "undefined": 15, "thread": 8, "init": 8}  # of one core for a file, about

RULES = """\
rule compile
  command = {compiler} $flags -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule link
  command = g++ $in $flags -o $out.part && mv $out.part $out
  description = link $out
"""

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


def families(csrc: Path = CSRC) -> list[str]:
    return sorted({path.parent.name for path in csrc.glob("*/*_cuda.cu")})


def build_library(sanitize: str = "none", family: str | None = None, csrc: Path = CSRC) -> Path:
    """The emulated library of all families, or of one, made as far as need be."""
    return build(library_name(family), sanitize, csrc)


def build_program(name: str, sanitize: str = "none") -> Path:
    """One of the self tests: "correct", "correct_ucontext", "bugs" or "reader.so"."""
    return build(name, sanitize, CSRC)


def library_name(family: str | None = None) -> str:
    return f"libdetops_emulated_{family}.so" if family else "libdetops_emulated.so"


def build(target: str, sanitize: str, csrc: Path) -> Path:
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to compile the CUDA sources for the CPU")
    with only_one_builds(folder_of(sanitize, csrc)) as folder:
        announced = announcement(target, sanitize, csrc)
        print(announced, end="\n" if announced else "", flush=True)
        if subprocess.run([*ninja(), *([] if announced else ["--quiet"]), target], cwd=folder).returncode:
            raise RuntimeError(f"{target}, {sanitize}: ninja has ended with an error, printed above")
    return folder / target


def announcement(target: str = library_name(), sanitize: str = "none", csrc: Path = CSRC) -> str:
    """What is to be compiled for it and how long that takes, or nothing."""
    folder = folder_of(sanitize, csrc)
    write_if_changed(folder / "build.ninja", plan(sanitize, csrc))
    steps = subprocess.run([*ninja(), "-n", target], cwd=folder, capture_output=True, text=True).stdout
    count = len(re.findall(r"^\[.*\] compile", steps, re.MULTILINE))
    minutes = max(1, round(count * SECONDS[sanitize] / (os.cpu_count() or 1) / 60))
    return f"compiling {count} files of the emulated CUDA kernels, about {minutes} min without a cache" if count else ""


def folder_of(sanitize: str, csrc: Path) -> Path:
    """Where it is built: for another copy of the sources beside that."""
    folder = (ROOT / "build" if csrc == CSRC else csrc.parent) / "emulation" / f"{sanitize}-{torch()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def only_one_builds(folder: Path) -> Iterator[Path]:
    """Of several processes: the others wait, and then find what they need."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def plan(sanitize: str, csrc: Path) -> str:
    """The text of build.ninja: every object, the self tests, the libraries."""
    flags = FLAGS[sanitize]
    folder, _ = torch()
    headers = [f"-I{csrc}", "-isystem", f"{folder}/include", "-isystem", f"{folder}/include/torch/csrc/api/include"]
    checked = [*STANDARD, *CHECKED_ALWAYS, *flags["checked"], f"-I{EMULATION}"]
    op = [*checked, "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-ffile-prefix-map={csrc}/=csrc/", *headers]
    runtime = [*STANDARD, *RUNTIME_ALWAYS, *flags["runtime"]]
    shared = [*flags["link"], "-shared"]
    library = [*shared, f"-L{folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = "ccache g++" if shutil.which("ccache") else "g++"
    statements = [RULES.format(compiler=compiler)]

    def add(rule: str, output: str, inputs: list, flags: list[str]) -> str:
        names = " ".join(re.sub(r"([$ :])", r"$\1", str(name)) for name in inputs)
        words = shlex.join(flags).replace("$", "$$")
        statements.append(f"build {output}: {rule} {names}\n  flags = {words}\n")
        return output

    parts = [add("compile", f"{name}.o", [EMULATION / f"{name}.cpp"], runtime) for name in RUNTIME]
    with_ucontext = [*runtime, "-DDETOPS_FIBERS_BY_UCONTEXT"]
    ucontext = add("compile", "fiber_ucontext.o", [EMULATION / "fiber.cpp"], with_ucontext)
    correct, bugs, reader = (
        add("compile", f"{name}.o", [SELFTEST / f"{name}.cu"], checked) for name in ("correct", "bugs", "reader")
    )
    add("link", "correct", [correct, *parts], flags["link"])
    add("link", "correct_ucontext", [correct, ucontext, *(part for part in parts if part != "fiber.o")], flags["link"])
    add("link", "bugs", [bugs, *parts], flags["link"])
    add("link", "reader.so", [reader, *parts], shared)

    every = []
    for family in families(csrc):
        sources = sorted([*csrc.glob(f"{family}/*.cpp"), *csrc.glob(f"{family}/*_cuda.cu")])
        objects = [add("compile", f"{family}/{source.stem}.o", [source], op) for source in sources]
        add("link", library_name(family), [*objects, *parts], library)
        every += objects
    add("link", library_name(), [*every, *parts], library)
    return "".join(statements)


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(path)


@functools.cache
def ninja() -> list[str]:
    """The command: that of this environment, or else of the machine."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    program = shutil.which("ninja", path=path)
    if program is None:
        raise RuntimeError("ninja is needed to compile the CUDA sources for the CPU: pip install ninja")
    return [program, f"-j{os.cpu_count()}"]


@functools.cache
def torch() -> tuple[Path, str]:
    """The folder and version of torch, without the seconds that its import takes."""
    (folder,) = importlib.util.find_spec("torch").submodule_search_locations
    return Path(folder), runpy.run_path(f"{folder}/version.py")["__version__"]


if __name__ == "__main__":
    print(build_library(*sys.argv[1:]))
