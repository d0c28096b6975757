"""Finds the torch of the environment that detops is installed into. Needs only the standard library.

pip runs the backend with the Python of that environment, and isolates it by variables. uv, build and others make an
environment for the backend: which one they install into is seen only in the process that has started it.
"""

import importlib.util
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)


@dataclass(frozen=True)
class Process:
    command: tuple[str, ...]
    variables: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class Environment:
    python: str
    path: tuple[str, ...]  # its import path

    @property
    def torch(self) -> dict | None:
        """`version.py` of its torch, without importing torch; None if there is none or it is too old."""
        for folder in self.path:
            version_file = Path(folder, "torch", "version.py")
            if version_file.exists():
                found = runpy.run_path(str(version_file))
                version = tuple(int(part) for part in found["__version__"].split(".")[:2])
                return found if version >= OLDEST_TORCH else None
        return None


@dataclass(frozen=True)
class Search:
    looked_at: tuple[Environment, ...]  # this Python's own first
    torch: dict | None  # what `version.py` of the last of them says
    certain: bool  # whether this Python is the one that is installed into


def search() -> Search:
    """Any environment with a torch serves, since the library that is built runs with every torch."""
    own = _environment_of(sys.executable)
    looked_at, certain = [own], not _made_for_the_build()
    if own.torch is None and not certain:
        for python in dict.fromkeys(pythons_of(_front_end())):
            if python != os.path.abspath(sys.executable) and (found := _environment_of(python)):
                looked_at.append(found)
                if found.torch:
                    break
    return Search(tuple(looked_at), looked_at[-1].torch, certain)


def _made_for_the_build() -> bool:
    """Whether setuptools was installed into this environment; pip puts it into a folder of its own."""
    setuptools = importlib.util.find_spec("setuptools")
    return setuptools is not None and Path(setuptools.origin).is_relative_to(sys.prefix)


def pythons_of(process: Process) -> Iterator[str]:
    """The interpreters that a front end may install for: what it was told, runs in, or finds as uv does."""
    variables, folder = process.variables, process.folder
    told = _told(process) if Path(process.command[0]).name == "uv" else ()
    for place in (*told, _interpreter(process), variables.get("VIRTUAL_ENV"), variables.get("CONDA_PREFIX")):
        yield from _pythons_at(place, folder)
    for each in (folder, *folder.parents):
        yield from _pythons_at(each / ".venv", folder)
    for name in ("python3", "python"):
        yield from _pythons_at(shutil.which(name, path=variables.get("PATH", "")), folder)


def _told(process: Process) -> Iterator[str]:
    arguments = process.command[1:]
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, sign, value = argument.partition("=")
        if option in ("--python", "-p"):
            yield value if sign else following
    for name in ("UV_PYTHON", "UV_PROJECT_ENVIRONMENT"):
        yield process.variables.get(name, "")


def _interpreter(process: Process) -> str | None:
    """What runs the process, if it is Python."""
    program = process.command[0]
    if not Path(program).name.startswith(("python", "pypy")):
        return None
    # Not its link's end, since the link is what belongs to an environment.
    found = program if os.sep in program else shutil.which(program, path=process.variables.get("PATH", ""))
    return os.path.abspath(process.folder / found) if found else None


def _pythons_at(place: str | Path | None, folder: Path) -> Iterator[str]:
    """Of an interpreter or the folder of an environment."""
    if not place:
        return
    path = folder / place
    for python in (path / "bin" / "python", path / "Scripts" / "python.exe", path):
        if python.is_file() and os.access(python, os.X_OK) and python.name.startswith("python"):
            yield os.path.abspath(python)
            return


def _environment_of(python: str) -> Environment | None:
    """None if it is another version's, whose packages are of no use here. -E: pip isolates by PYTHON* variables."""
    code = "import json, sys; print(json.dumps([sys.version_info[:2], sys.implementation.name, sys.path[1:]]))"
    done = subprocess.run([python, "-E", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        return None
    version, implementation, path = json.loads(done.stdout)
    if (tuple(version), implementation) != (sys.version_info[:2], sys.implementation.name):
        return None
    return Environment(python, tuple(path))


def _front_end() -> Process:
    """The process that has started this one. Without /proc, only the variables that it hands on are known."""
    process = Path("/proc", str(os.getppid()))
    try:
        command, variables = (
            os.fsdecode((process / name).read_bytes()).split("\0")[:-1] for name in ("cmdline", "environ")
        )
        pairs = (each.partition("=") for each in variables)
        return Process(tuple(command) or ("",), {name: value for name, _, value in pairs}, (process / "cwd").readlink())
    except OSError:
        return Process((os.environ.get("UV", ""),), dict(os.environ), Path.cwd())
