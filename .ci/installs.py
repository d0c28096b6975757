"""Install detops from source in every way that people do, each into the same environment, and call it.

    python .ci/installs.py                     all ways
    python .ci/installs.py sdist editable      some

Without CUDA kernels unless DETOPS_CUDA=1 is set; with ccache in PATH the second build and those that follow take
seconds. Prints the rows of docs/versions.md. Ends with status 1 if one failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
CALL = """
import torch, detops
keep = detops.nms(torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10]]), torch.tensor([0.8, 0.9, 0.7]), 0.5)
assert keep.tolist() == [1, 2], keep
print(detops.__version__, torch.__version__, sep=" | ")
"""


def run(*command: str | Path, **options) -> str:
    """The output of a command; an error has it too."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stdout[-3000:]}")
    return result.stdout


class Ways:
    """Each installs detops into the environment, which has torch, and returns the command that did."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "environment" / "bin"
        self.tools = folder / "tools" / "bin"
        for name, packages in {
            "environment": [f"torch=={TORCH}", "numpy", "setuptools>=77", "ninja"],
            "tools": ["uv", "build", "setuptools>=77"],
        }.items():
            run(sys.executable, "-m", "venv", folder / name)
            run(folder / name / "bin" / "pip", "install", "-q", *packages)

    def pip(self, *arguments: str | Path, **options) -> None:
        run(self.bin / "pip", "install", "-q", "--no-deps", *arguments, **options)

    def folder_itself(self) -> str:
        self.pip(ROOT)
        return "pip install ."

    def sdist(self) -> str:
        """Made without torch; built without an index, with the torch, setuptools and ninja that are there."""
        run(self.tools / "python", ROOT / "dev.py", "sdist", self.folder / "sdist")
        (source,) = (self.folder / "sdist").glob("*.tar.gz")
        self.pip("--no-index", "--no-build-isolation", source)
        return f"pip install --no-index --no-build-isolation {source.name}"

    def git(self) -> str:
        self.pip(f"git+file://{ROOT}")
        return "pip install git+file://..."

    def editable(self) -> str:
        """Of a clone, which gets the library."""
        run("git", "clone", "-q", ROOT, self.folder / "clone")
        self.pip("-e", self.folder / "clone")
        return "pip install -e ."

    def uv(self) -> str:
        run(self.tools / "uv", "pip", "install", "-q", "--python", self.bin / "python", "--no-deps", ROOT)
        return "uv pip install ."

    def build(self) -> str:
        """A wheel made by the front end of the packaging authority, then installed."""
        run(self.bin / "pip", "install", "-q", "build")
        run(self.bin / "python", "-m", "build", "--wheel", "--outdir", self.folder / "wheel", ROOT)
        (wheel,) = (self.folder / "wheel").glob("*.whl")
        self.pip("--no-index", wheel)
        return "python -m build --wheel"


WAYS = {"pip": "folder_itself", "sdist": "sdist", "git": "git", "editable": "editable", "uv": "uv", "build": "build"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    chosen = parser.parse_args().ways
    os.environ.setdefault("DETOPS_CUDA", "0")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(Path(folder))
        print("| installed by | detops | torch | seconds |\n| --- | --- | --- | --- |", flush=True)
        for way in chosen:
            begin = time.monotonic()
            try:
                command = getattr(ways, WAYS[way])()
                seconds = time.monotonic() - begin
                versions = run(ways.bin / "python", "-c", CALL, cwd=folder).strip()
                print(f"| `{command}` | {versions} | {seconds:.0f} |", flush=True)
            except RuntimeError as error:
                failed = True
                print(error, file=sys.stderr)
                print(f"| {way} | failed |", flush=True)
            run(ways.bin / "pip", "uninstall", "-q", "-y", "detops")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
