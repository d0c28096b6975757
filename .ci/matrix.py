"""Build the wheel for everybody, and try it under many versions of Python, torch and torchvision.

    python .ci/matrix.py                                        every Python that is found, every torch
    python .ci/matrix.py --python 3.11 3.13 --torch 2.10.0 newest
    python .ci/matrix.py --wheel WHEEL                          with a wheel that is there

Each environment is fresh and takes a minute or more. Prints the rows of docs/versions.md. Ends with status 1 if one
failed. Needs what `python dev.py wheel` needs, and python3.10 to python3.13 where they are to be tried.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = ["2.10.0", "2.11.0", "2.13.0", "2.14.1", "newest"]
FILES = ("library", "nms", "iou", "roi_align", "compat_torchvision")


def run(*command, **options) -> str:
    """The output of a command; an error has it too."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stdout[-3000:]}")
    return result.stdout


def interpreter(version: str) -> str | None:
    """That Python, if it is there and runs."""
    path = shutil.which(f"python{version}")
    if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
        return path
    return None


def build(folder: Path) -> Path:
    """The wheel for everybody, with CUDA kernels unless DETOPS_CUDA=0 is set."""
    run(sys.executable, ROOT / "dev.py", "wheel", folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def try_wheel(wheel: Path, python: str, torch: str, folder: Path) -> str:
    """Installs the wheel with that torch, calls its report and runs some tests; the row of what it ran under."""
    run(python, "-m", "venv", folder)
    pip = [folder / "bin" / "pip", "install", "-q"]
    run(*pip, "torch" if torch == "newest" else f"torch=={torch}", "torchvision", "numpy", "pytest", "hypothesis")
    run(*pip, "--no-deps", wheel)
    run(folder / "bin" / "python", "-m", "detops", cwd=folder)  # not in the source folder, which would be found first
    tests = run(
        *(folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in FILES)),
        cwd=ROOT,
        env={**os.environ, "DETOPS_EMULATION": "0", "DETOPS_TEST_DEVICES": "cpu"},
    )
    versions = "import torch, torchvision; print(torch.__version__, '|', torchvision.__version__)"
    return f"{run(folder / 'bin' / 'python', '-c', versions, cwd=folder).strip()} | {tests.strip().splitlines()[-1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"default: {' '.join(TORCHES)}")
    parser.add_argument("--wheel", type=Path, help="try this one instead of building")
    args = parser.parse_args()
    failed, tried = False, 0
    with tempfile.TemporaryDirectory() as folder:
        print("| Python | torch | torchvision | tests |\n| --- | --- | --- | --- |", flush=True)
        wheel = args.wheel or build(Path(folder))
        for version in args.python:
            python = interpreter(version)
            if python is None:
                print(f"Python {version} was not found", file=sys.stderr)
                continue
            for torch in args.torch:
                tried += 1
                environment = Path(folder) / f"{version}-{torch}"
                try:
                    outcome = try_wheel(wheel, python, torch, environment)
                except RuntimeError as error:
                    failed = True
                    print(error, file=sys.stderr)
                    outcome = f"{torch} | | failed"
                shutil.rmtree(environment, ignore_errors=True)
                print(f"| {version} | {outcome} |", flush=True)
    return int(failed or not tried)


if __name__ == "__main__":
    sys.exit(main())
