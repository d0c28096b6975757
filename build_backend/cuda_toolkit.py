"""Finds the compilers. Used by setup.py and by the build backend; needs only the standard library."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_VERSION = (12, 0)  # older compilers do not read torch's headers


@dataclass(frozen=True)
class Toolkit:
    root: str
    version: str  # "13.0"
    architectures: tuple[str, ...]  # what its nvcc compiles for: "7.5", "8.0", ...
    include_dir: str
    library_dir: str


def check_compiler() -> None:
    """Ends the build where there is no C++ compiler, before anything is fetched or tried."""
    command, *_ = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command) is None:
        raise SystemExit(f"detops: building needs a C++ compiler, and {command} was not found: install g++, or set CXX")


def find_toolkit() -> Toolkit | None:
    """The first usable toolkit: CUDA_HOME, PATH, the usual folder, then NVIDIA's wheels on the import path."""
    for nvcc in _nvcc_candidates():
        if os.access(nvcc, os.X_OK) and (toolkit := _toolkit_of(nvcc)):
            return toolkit
    return None


def _nvcc_candidates() -> list[Path]:
    found = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    for folder in sys.path:
        found += sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return found


def _toolkit_of(nvcc: Path) -> Toolkit | None:
    version = re.search(r"release (\d+)\.(\d+)", _output_of(nvcc, "--version"))
    if not version or tuple(map(int, version.groups())) < OLDEST_VERSION:
        return None
    # nvcc may be a wrapper script: only a dry run tells where the compiler and its libraries really are.
    dry_run = _output_of(nvcc, "--dryrun", "detops.cu")
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    if not top:
        return None
    root = Path(top[1].strip()).resolve()
    include_dir = _folder_with("cuda_runtime.h", [*_folders(dry_run, "INCLUDES", "-I"), root / "include"])
    library_dir = _folder_with("libcudart_static.a", [*_folders(dry_run, "LIBRARIES", "-L"), root / "lib"])
    if not include_dir or not library_dir:
        return None
    numbers = sorted({int(number) for number in re.findall(r"compute_(\d+)", _output_of(nvcc, "--list-gpu-arch"))})
    architectures = tuple(f"{number // 10}.{number % 10}" for number in numbers)
    return Toolkit(str(root), ".".join(version.groups()), architectures, include_dir, library_dir)


def _folders(dry_run: str, variable: str, flag: str) -> list[Path]:
    """The folders that a line such as `#$ LIBRARIES= "-L/a" "-L/b"` of a dry run names."""
    line = re.search(rf"^#\$ {variable}=(.*)$", dry_run, re.MULTILINE)
    return [Path(folder).resolve() for folder in re.findall(rf'{flag}([^"]+)', line[1])] if line else []


def _folder_with(name: str, folders: list[Path]) -> str | None:
    return next((str(folder) for folder in folders if (folder / name).exists()), None)


def _output_of(nvcc: Path, *arguments: str) -> str:
    result = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout
