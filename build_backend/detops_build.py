"""The build backend: setuptools, plus the search for the torch and the CUDA compiler that the build needs.

pip builds in an isolated environment. Asking for torch there would fetch gigabytes, of another build than the user's;
so the build uses the torch of the environment that detops is installed into, and asks for one only where there is none.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from cuda_toolkit import find_toolkit
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

OLDEST_TORCH = (2, 10)
DEFAULT_CUDA = "13.0"  # the first whose compiler NVIDIA publishes as wheels; runs on every driver of CUDA 13


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    torch = _find_torch()
    requirements = [] if torch else ["torch>=" + ".".join(map(str, OLDEST_TORCH))]
    if _cuda_wanted(torch) and find_toolkit() is None:
        requirements += _compiler_wheels(torch)
    if os.environ.get("DETOPS_MANYLINUX"):
        requirements.append("ziglang")  # the linker
    return requirements


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []  # files alone


def _target_path() -> list[str]:
    """The import path of the environment to install into: pip isolates by PYTHON* variables, which -E ignores."""
    command = [sys.executable, "-E", "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    return json.loads(subprocess.check_output(command, text=True))


def _find_torch() -> dict | None:
    """`version.py` of the torch to build against, without importing torch; None if there is none or it is too old."""
    for folder in sys.path:
        version_file = Path(folder, "torch", "version.py")
        if version_file.exists():
            found = runpy.run_path(str(version_file))
            version = tuple(int(part) for part in found["__version__"].split(".")[:2])
            return found if version >= OLDEST_TORCH else None
    return None


def _cuda_wanted(torch: dict | None) -> bool:
    wish = os.environ.get("DETOPS_CUDA", "auto")
    # Where torch is still to come, it will be a CUDA build on Linux unless the user arranged otherwise.
    has_cuda = torch["cuda"] is not None if torch else sys.platform == "linux"
    return wish == "1" or (wish == "auto" and has_cuda)


def _compiler_wheels(torch: dict | None) -> list[str]:
    """NVIDIA's wheels that hold nvcc and what it needs. For CUDA 12 they hold no nvcc: there CUDA 13's is used."""
    version = torch and torch["cuda"] or DEFAULT_CUDA
    if int(version.split(".")[0]) < int(DEFAULT_CUDA.split(".")[0]):
        version = DEFAULT_CUDA
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
    # The headers of nvidia-cuda-cccl are numbered apart from CUDA 13.3 on, and serve every version of their major.
    return [f"{name}=={version}.*" for name in names] + [f"nvidia-cuda-cccl=={version.split('.')[0]}.*"]


# Behind the isolated packages, so that those win.
sys.path += [folder for folder in _target_path() if folder not in sys.path]
