"""Builds detops._C from csrc/: all *.cpp files, and all *_cuda.cu files when CUDA kernels are wanted.

Environment variables steer it:
  DETOPS_CUDA           "auto" (the default) builds the CUDA kernels if torch is a CUDA build and nvcc is found,
                        "1" builds them with any torch, "0" never.
  TORCH_CUDA_ARCH_LIST  the GPU architectures, such as "8.0;9.0+PTX". By default that of the visible GPU, or else all.
  DETOPS_MANYLINUX      the oldest glibc that the library is to run with, such as "2.28": the linker is then zig's (the
                        package ziglang), which knows the symbols of each glibc, and the wheel is named after it.
  DETOPS_CHECKED        "1": an access beyond a counted view (csrc/common/counted.h) or a vector ends the process.
                        "address": AddressSanitizer and UndefinedBehaviorSanitizer too; tests/checked.py runs that.
  DETOPS_DEBUG          "1": no optimisation, and symbols for a debugger, cuda-gdb too.

torch's ninja goes through ccache from torch 2.13 on, where there is one.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

from cuda_toolkit import Toolkit, check_compiler, find_toolkit

ROOT = Path(__file__).resolve().parents[1]

EVERY_ARCHITECTURE = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

# One set of results everywhere: no contraction into fma, no reordering. The rest lets loops vectorise.
HOST_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Werror=return-type"]
NVCC_FLAGS = ["-O3", "-fmad=false"]
STANDARD = "-std=c++17"
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]

OLDEST_GLIBC = os.environ.get("DETOPS_MANYLINUX")
DEBUG = os.environ.get("DETOPS_DEBUG", "0") == "1"
# Of one core for a source file, about; of a CUDA source for each architecture.
SECONDS = {".cpp": 6, ".cu": 8}


def choose_cuda() -> tuple[Toolkit | None, str]:
    """The toolkit to build CUDA kernels with, or None and why there will be none."""
    wish = os.environ.get("DETOPS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"DETOPS_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "DETOPS_CUDA=0"
    if wish == "auto" and torch.version.cuda is None:
        return None, f"torch {torch.__version__} is no CUDA build; DETOPS_CUDA=1 builds them all the same"
    toolkit = find_toolkit()
    missing = "no nvcc of CUDA 12 or later was found: install the CUDA toolkit, or set CUDA_HOME"
    if toolkit is None and wish == "1":
        raise SystemExit(f"DETOPS_CUDA=1, but {missing}")
    return toolkit, missing


def choose_architectures(toolkit: Toolkit) -> str:
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    visible = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    if visible and visible <= set(toolkit.architectures):
        return ";".join(sorted(visible, key=float))
    return ";".join(name for name in EVERY_ARCHITECTURE if name in toolkit.architectures) + "+PTX"


def files(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"csrc/**/{pattern}"))


def gcc_file(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def extension(toolkit: Toolkit | None) -> Extension:
    check_compiler()
    sources = files("*.cpp")
    # As system headers, torch's give no warnings.
    torch_headers = [flag for folder in cpp_extension.include_paths() for flag in ("-isystem", folder)]
    host_flags = [*HOST_FLAGS, *WARNINGS, STANDARD, "-g0", *torch_headers]
    nvcc_flags = [*NVCC_FLAGS, "-Xcompiler", ",".join([*HOST_FLAGS, *WARNINGS]), STANDARD, *torch_headers]
    options = {"include_dirs": [str(ROOT / "csrc")], "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000")]}
    if OLDEST_GLIBC:
        # g++'s runtime, not zig's: exceptions pass from this library through torch's, and the clones ask libgcc.a for
        # the processor's features, of which zig's knows fewer.
        runtime = ("libgcc.a", "libstdc++.so", "libgcc_s.so.1")
        options["extra_link_args"] = [*map(gcc_file, runtime), "-lm"]
        options["libraries"] = ["dl"]
    checked = os.environ.get("DETOPS_CHECKED", "0")
    if checked not in ("0", "1", "address"):
        raise SystemExit(f"DETOPS_CHECKED must be 0, 1 or address, got {checked!r}")
    if checked != "0":
        options["define_macros"] += [("DETOPS_CHECKED", None), ("_GLIBCXX_ASSERTIONS", None)]
    if checked == "address":
        host_flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
        options.setdefault("extra_link_args", []).extend(SANITIZERS)
    if DEBUG:
        host_flags += ["-O0", "-g"]
        nvcc_flags += ["-O0", "-g", "-G"]
    if toolkit:
        sources += files("*_cuda.cu")
        options["include_dirs"].append(toolkit.include_dir)
        options["library_dirs"] = [toolkit.library_dir]
        # The CUDA runtime goes into the library, so that it depends on no torch and no toolkit at run time.
        options["libraries"] = ["cudart_static", "pthread", "rt", "dl"]
        options["define_macros"].append(("DETOPS_WITH_CUDA", None))
    return cpp_extension.CppExtension(
        "detops._C",
        sources,
        extra_compile_args={"cxx": host_flags, "nvcc": nvcc_flags},
        py_limited_api=True,
        **options,
    )


class BuildKernels(cpp_extension.BuildExtension):
    toolkit, without_cuda = choose_cuda()

    def __init__(self, *args, **kwargs):
        # The library is no module of Python's.
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def build_extensions(self):
        if OLDEST_GLIBC:
            target = f"{platform.machine()}-linux-gnu.{OLDEST_GLIBC}"
            self.compiler.linker_so = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-s"]
            for each in self.extensions:
                each.language = "c"  # for C++ setuptools puts g++ in the linker's place
        if self.toolkit:
            architectures = choose_architectures(self.toolkit)
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
            cpp_extension.CUDA_HOME = self.toolkit.root
            # torch insists on a compiler of its own CUDA version. We link no CUDA library of torch's, so any will do.
            torch.version.cuda = self.toolkit.version
            self.define_text("DETOPS_CUDA_ARCHITECTURES", architectures)
            built = f"with CUDA {self.toolkit.version} kernels for {architectures}"
        else:
            architectures = ""
            built = f"without CUDA kernels ({self.without_cuda})"
        version = self.distribution.get_version()
        self.define_text("DETOPS_VERSION", version)
        what = f"detops {version} against torch {torch.__version__} {built}"
        print(f"building {what}{', unoptimised' if DEBUG else ''}; {self.estimate(architectures)}", flush=True)
        super().build_extensions()
        print(f"built {what}", flush=True)

    def estimate(self, architectures: str) -> str:
        sources = [Path(source) for each in self.extensions for source in each.sources]
        repeated = {".cpp": 1, ".cu": len(architectures.split(";"))}
        cores = len(os.sched_getaffinity(0))
        minutes = sum(SECONDS[path.suffix] * repeated[path.suffix] for path in sources) / cores / 60
        return f"{len(sources)} files on {cores} cores take about {max(1, round(minutes))} min where none is up to date"

    def define_text(self, name: str, text: str):
        for each in self.extensions:
            each.define_macros.append((name, f'"{text}"'))


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library calls nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, system = super().get_tag()
        if OLDEST_GLIBC:
            system = f"manylinux_{OLDEST_GLIBC.replace('.', '_')}_{platform.machine()}"
        return "py3", "none", system
