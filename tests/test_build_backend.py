"""Which torch the build backend takes, under front ends that isolate it. A torch is a file `torch/version.py` here."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

BACKEND = Path(__file__).resolve().parents[1] / "build_backend"
HOOKS = "build_editable build_sdist build_wheel prepare_metadata_for_build_editable prepare_metadata_for_build_wheel"
ANY_COMPILER = sys.executable  # a program that is there
CHECK = "import cuda_toolkit; cuda_toolkit.check_compiler()"
SEARCH = """
import find_torch, json
found = find_torch.search()
print(json.dumps([found.torch["__version__"], found.certain, *(each.python for each in found.looked_at)]))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc to look into")


def environment(folder, torch=None, setuptools=False):
    """The Python of a new environment."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    if torch:
        (packages / "torch").mkdir()
        (packages / "torch" / "version.py").write_text(f"__version__ = '{torch}'\ncuda = None\n")
    if setuptools:
        make_setuptools(packages)
    return folder / "bin" / "python"


def make_setuptools(folder):
    (folder / "setuptools").mkdir(parents=True)
    (folder / "setuptools" / "__init__.py").touch()
    (folder / "setuptools" / "build_meta.py").write_text("\n".join(f"{name} = None" for name in HOOKS.split()))


def run(front_end, backend, code, folder=None, **variables):
    """The backend as a front end starts it, which is a Python too here: the parent, with these variables, of a child
    that gets only what isolation leaves."""
    handed_on = {"PYTHONPATH": os.pathsep.join([str(BACKEND), variables.pop("PYTHONPATH", "")]), "DETOPS_CUDA": "0"}
    start = f"import subprocess; exit(subprocess.run([{str(backend)!r}, '-c', {code!r}], env={handed_on!r}).returncode)"
    return subprocess.run(
        [front_end, "-c", start], env={"PATH": "", **variables}, cwd=folder, capture_output=True, text=True
    )


@pytest.fixture
def isolated(tmp_path):
    return environment(tmp_path / "isolated", setuptools=True)


@pytest.fixture
def target(tmp_path):
    return environment(tmp_path / "project" / ".venv", torch="2.12.0+cpu")


@pytest.fixture
def other(tmp_path):
    """Where the front end runs, which has no torch."""
    return environment(tmp_path / "other")


@pytest.mark.parametrize("way", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "folder", "interpreter"])
def test_the_torch_of_the_front_ends_environment(tmp_path, isolated, target, other, way):
    variables, folder, front_end = {}, tmp_path, other
    if way in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        variables[way] = str(target.parents[1])
    elif way == "PATH":
        variables[way] = str(target.parent)
    elif way == "folder":
        folder = tmp_path / "project" / "below"
        folder.mkdir()
    else:
        front_end = target
    version, certain, *looked_at = json.loads(run(front_end, isolated, SEARCH, folder, **variables).stdout)
    assert version == "2.12.0+cpu" and not certain
    assert looked_at[0] == str(isolated) and Path(looked_at[-1]).parent == target.parent


@pytest.mark.parametrize(
    "words", [["--python", "{}/bin/python"], ["-p", "{}"], ["--python={}"], ["-p", "project/.venv"]]
)
def test_the_python_that_uv_is_told(tmp_path, target, words, monkeypatch):
    monkeypatch.syspath_prepend(BACKEND)
    import find_torch

    command = ("/bin/uv", "pip", "install", *(word.format(target.parents[1]) for word in words), ".")
    process = find_torch.Process(command, {"VIRTUAL_ENV": sys.prefix}, tmp_path)
    assert next(find_torch.pythons_of(process)) == str(target)
    by_variable = find_torch.Process(("uv", "sync"), {"UV_PROJECT_ENVIRONMENT": str(target.parents[1])}, tmp_path)
    assert next(find_torch.pythons_of(by_variable)) == str(target)
    bare = find_torch.Process(("/usr/bin/uv",), {}, target.parents[1].parent)
    assert all(isinstance(each, str) for each in find_torch.pythons_of(bare))


def test_no_torch_is_asked_for_where_one_may_be(tmp_path, isolated, other):
    old = environment(tmp_path / "old", torch="2.9.1")
    code = "import detops_build; detops_build.get_requires_for_build_wheel()"
    done = run(other, isolated, code, tmp_path, VIRTUAL_ENV=str(old.parents[1]), CXX=ANY_COMPILER)
    assert done.returncode == 1
    assert done.stderr.startswith("detops: torch 2.10 or later for Python 3.")
    assert "--no-build-isolation" in done.stderr and str(old) in done.stderr and str(other) in done.stderr
    assert "Traceback" not in done.stderr


def test_pip_says_where_it_installs(tmp_path, target, other):
    """With setuptools in a folder beside the target's own packages, and torch in another environment."""
    make_setuptools(tmp_path / "beside")
    options = {"PYTHONPATH": str(tmp_path / "beside"), "VIRTUAL_ENV": str(target.parents[1]), "CXX": ANY_COMPILER}
    code = "import detops_build; print(detops_build.get_requires_for_build_wheel())"
    assert run(other, other, code, tmp_path, **options).stdout == "['torch>=2.10']\n"
    assert run(target, target, code, tmp_path, **options).stdout == "[]\n"


def test_the_found_torch_comes_behind_what_the_build_has(tmp_path, isolated, target):
    code = "import detops_build, sys, torch; print(list(torch.__path__)[0], sys.modules['setuptools'].__file__)"
    torch, setuptools = run(target, isolated, code, tmp_path).stdout.split()
    assert torch.startswith(str(target.parents[1])) and setuptools.startswith(str(isolated.parents[1]))


def test_without_a_compiler_one_line_says_so(tmp_path):
    bare = {**os.environ, "PATH": str(tmp_path), "CXX": "no-such-compiler -O2"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=BACKEND, env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "detops: building needs a C++ compiler, and no-such-compiler was not found: install g++, or set CXX\n"
    )
