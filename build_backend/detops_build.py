"""The build backend: setuptools, plus the search for the torch and the CUDA compiler that the build needs.

Front ends build in an isolated environment. Asking for torch there would fetch gigabytes, of another build than the
user's; so the build uses the torch of the environment that detops is installed into. pip says which one that is, and
only where that has none is one asked for. Of others it is found as far as can be, or the build stops.
"""

import os
import sys

from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from cuda_toolkit import check_compiler, find_toolkit
from find_torch import OLDEST_TORCH, search

DEFAULT_CUDA = "13.0"  # the first whose compiler NVIDIA publishes as wheels; runs on every driver of CUDA 13


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    check_compiler()
    requirements = []
    if FOUND.torch is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        if not FOUND.certain:
            raise SystemExit(_where_torch_was_not_found(oldest))
        requirements.append(f"torch>={oldest}")
    if _cuda_wanted(FOUND.torch) and find_toolkit() is None:
        requirements += _compiler_wheels(FOUND.torch)
    if os.environ.get("DETOPS_MANYLINUX"):
        requirements.append("ziglang")  # the linker
    return requirements


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []  # files alone


def _where_torch_was_not_found(oldest: str) -> str:
    version = ".".join(map(str, sys.version_info[:2]))
    return "\n  ".join(
        [
            f"detops: torch {oldest} or later for Python {version} must be there to build with. None was found in",
            *(each.python for each in FOUND.looked_at),
            "Install torch first. If it is in an environment that is not among these, install setuptools and ninja "
            "there too, and pass --no-build-isolation.",
        ]
    )


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


FOUND = search()
# Behind the isolated packages, so that those win.
sys.path += [folder for folder in FOUND.looked_at[-1 if FOUND.torch else 0].path if folder not in sys.path]
