"""common/parallel_cpu.h: what a thread throws reaches the caller as it is, and the process goes on."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the loops alone")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "parallel.so"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
    links = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++17", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    source = ROOT / "tests" / "parallel_harness.cpp"
    subprocess.run(["g++", *flags, *includes, str(source), "-o", str(path), *links], check=True)
    return ctypes.CDLL(str(path))


def loop(library, by_item, count, grain=1, first_bad=None, step=1, no_memory=False):
    """(how many items were visited, what the caller caught)"""
    text = ctypes.create_string_buffer(100)
    library.loop.restype = ctypes.c_int64
    integers = [ctypes.c_int64(value) for value in (count, grain, count if first_bad is None else first_bad, step)]
    visited = library.loop(by_item, *integers, no_memory, text, ctypes.c_int64(len(text)))
    return visited, text.value.decode()


@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_exceptions_reach_the_caller(restore_threads, library, by_item, threads):
    torch.set_num_threads(threads)
    assert loop(library, by_item, 0) == (0, "nothing")
    for count in (1, 2, 100):
        assert loop(library, by_item, count) == (count, "nothing")
        assert loop(library, by_item, count, first_bad=count - 1)[1] == f"item {count - 1}"
        assert loop(library, by_item, count, first_bad=0, no_memory=True)[1] == "bad_alloc"
        # Of several exceptions one, and whole.
        assert re.fullmatch(r"item \d+", loop(library, by_item, count, first_bad=0)[1])
    if not by_item:  # one range, on one thread
        assert loop(library, by_item, 100, grain=100, first_bad=7)[1] == "item 7"
    assert loop(library, by_item, 100) == (100, "nothing")
