"""The checked build (DETOPS_CHECKED): an access beyond a counted view, an array or a vector ends the process and says
where; other builds check nothing. What tests/checked.py runs is tested by CI, which fuzzes with it."""

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
# As build_backend/build_kernels.py has them.
CHECKED = ["-DDETOPS_CHECKED", "-D_GLIBCXX_ASSERTIONS"]
LAST = {"view": 14, "part": 4, "part of": 10, "array": 14, "vector": 14}
WORDS = {
    "view": "some_op: rows of a level: index {} is beyond 15 elements",
    "part": "some_op: rows of a level: index {} is beyond 5 elements",
    "part of": "some_op: rows of a level: index {} is beyond 15 elements",
    "array": "some_op: corners: index {} is beyond 15 elements",
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the accesses")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "accesses"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
    source = ROOT / "tests" / "checked_harness.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", *CHECKED, *includes, str(source), "-o", str(path)], check=True)
    return path


def access(program, what, index):
    return subprocess.run([program, what, str(index)], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("what", LAST)
def test_access_within(program, what):
    for index in (0, LAST[what]):
        result = access(program, what, index)
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("what", LAST)
def test_access_beyond_ends_the_process(program, what):
    for index in (LAST[what] + 1, 1000, -1):
        result = access(program, what, index)
        assert result.returncode == -signal.SIGABRT and result.stdout == ""
        if what == "vector":
            assert re.search(r"std::vector.*operator\[\].*Assertion '__n < this->size\(\)' failed", result.stderr)
        else:
            # Of a part that reaches too far, its last element.
            said = index + 4 if what == "part of" and index >= 0 and index < 15 else index
            assert result.stderr == WORDS[what].format(said) + "\n"


def test_the_macros_are_those_of_the_build():
    build = (ROOT / "build_backend" / "build_kernels.py").read_text()
    assert all(f'("{flag.removeprefix("-D")}", None)' in build for flag in CHECKED)
