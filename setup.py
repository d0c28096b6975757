"""Builds detops with its compiled library; build_backend/build_kernels.py says how, and by what it is steered."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))

# A source distribution is files alone, and is made where there is no torch too.
if {"sdist", "egg_info", "dist_info"} & set(sys.argv):
    setup()
else:
    from build_kernels import BuildKernels, PlatformWheel, extension

    setup(
        ext_modules=[extension(BuildKernels.toolkit)],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
        # Always ask ninja: setuptools does not see a changed header, another torch or another DETOPS_CUDA.
        options={"build_ext": {"force": True}},
    )
