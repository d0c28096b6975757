"""The commands of a developer.

    python dev.py sdist [OUTDIR]    the source distribution; needs no torch
    python dev.py wheel [OUTDIR]    the wheel for everybody: any Python, torch from 2.10 on, glibc from 2.28 on, CPU and
                                    CUDA in one file

Both need the extra `release` (`pip install '.[release]'`). `wheel` builds with the torch and the CUDA compiler that are
there, or fetches them; DETOPS_CUDA=0 leaves the CUDA kernels out, TORCH_CUDA_ARCH_LIST chooses among their
architectures. OUTDIR is dist where it is not given.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_GLIBC = "2.28"
LIBRARIES_OF_TORCH = ("libtorch_cpu.so", "libc10.so")


def run(*command: str | Path, **variables: str) -> None:
    environment = {**variables, **os.environ}
    subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)


def sdist(folder: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder)


def wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as built, tempfile.TemporaryDirectory() as repaired:
        pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", built)
        run(*pip, ".", DETOPS_CUDA="1", DETOPS_MANYLINUX=OLDEST_GLIBC)
        (path,) = Path(built).glob("*.whl")
        check(path, Path(repaired))
        folder.mkdir(parents=True, exist_ok=True)
        print(path.rename(folder / path.name))


def check(path: Path, repaired: Path) -> None:
    """That the wheel is what its name says: auditwheel has nothing to refuse, and no library to change."""
    platform = path.stem.split("-")[-1]
    excluded = [word for name in LIBRARIES_OF_TORCH for word in ("--exclude", name)]
    audit = (sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", platform, *excluded)
    run(*audit, "--wheel-dir", repaired, path)
    (other,) = repaired.glob("*.whl")
    if libraries(path) != libraries(other):
        raise SystemExit(f"{path.name}: auditwheel had to change its libraries")


def libraries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".so" in name}


COMMANDS = {"sdist": sdist, "wheel": wheel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", metavar="OUTDIR")
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments.folder.resolve())


if __name__ == "__main__":
    main()
