"""The emulation of CUDA on the CPU (tests/emulation): every planted fault is found, and kernels without one pass."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

EMULATION = Path(__file__).parent / "emulation"
CORRECT, BUGS = (EMULATION / "selftest" / f"{name}.cu" for name in ("correct", "bugs"))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulated kernels")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EMULATION / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # run.py and mutate.py import build
    spec.loader.exec_module(module)
    return module


build = load("build")
run = load("run")
mutate = load("mutate")
MODES = tuple(build.FLAGS)


program = cache(build.build_program)


def execute(command, **environment):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, preexec_fn=run.fix_addresses
    )


# What finds each fault: in which build, and with which words.
ABORTS = {
    "divergent_barrier": r"thread \(32, 0, 0\): divergent barrier: .* ends while 32 threads wait in __syncthreads at",
    "two_barriers": r"divergent barrier: .* reaches __syncthreads at .*bugs.cu:\d+, but 32 threads wait in",
    "exit_before_barrier": r"thread \(40, 0, 0\): divergent barrier: .* ends while 40 threads wait in __syncthreads",
    "barrier_and_warp": r"divergent barrier: .* ends while 1 threads wait in __syncthreads",
    "deadlock": r"block .*: deadlock\n  32 of 64 threads wait in __syncthreads .*\n.* lanes 0x0000ffff wait in __any",
    "endless": r"is still running after 0.5 seconds",
    "mismatched_collectives": r"lane 3 calls __any_sync at .*, but lane 0 waits in __all_sync",
    "different_masks": r"deadlock, lanes of one warp wait with different masks\n.* __any_sync\(0x0001ffff\)",
    "absent_lane": r"__shfl_sync at .* reads lane 20, which is not in mask 0x0000ffff",
    "ended_lane": r"thread \(5, 0, 0\): this thread ends while other lanes wait for it in __syncwarp\(0xffffffff\)",
    "not_in_own_mask": r"thread \(16, 0, 0\): __any_sync at .*: lane 16 is not in its own mask 0x0000ffff",
    "float_atomics": r"atomicAdd of floating-point numbers rounds .*: the result depends on the schedule",
    "static_shared_limit": r"needs 49156 bytes of shared memory, only 49152 are allowed",
    "dynamic_shared_limit": r"needs 49153 bytes of shared memory, only 49152 are allowed",
    "large_block": r"a block must have 1 to 1024 threads .*, got \(1025, 1, 1\)",
    "empty_grid": r"a grid must have 1 to 2147483647 .*, got \(0, 1, 1\)",
}
RACES = (
    *("missing_syncthreads", "missing_second_syncthreads", "missing_syncwarp", "vote_for_a_barrier"),
    *("syncwarp_of_half", "race_between_blocks", "plain_beside_atomic"),
)
FOUND_BY = [
    *((bug, "none", rf"cuda_on_cpu: kernel (?:{bug}|nothing)_kernel.*{text}") for bug, text in ABORTS.items()),
    *((bug, "thread", rf"ThreadSanitizer: data race(?s:.*) {bug}_kernel<true>") for bug in RACES),
    ("read_past_the_end", "address", r"heap-buffer-overflow(?s:.*)kernel read_past_the_end_kernel, .*\(63, 0, 0\)"),
    ("shared_overrun", "address", r"use-after-poison(?s:.*)kernel shared_overrun_kernel, .* thread \(63, 0, 0\)"),
    ("dynamic_shared_overrun", "address", r"use-after-poison(?s:.*)kernel dynamic_shared_overrun_kernel"),
    ("misaligned", "undefined", r"misaligned address .* requires 16 byte alignment(?s:.*)kernel misaligned_kernel"),
    ("signed_overflow", "undefined", r"signed integer overflow(?s:.*)kernel signed_overflow_kernel"),
    ("signed_overflow", "address", r"signed integer overflow"),
    ("uninitialised_shared", "init", r"\(63, 0, 0\): reads shared array 'cells' at byte 256, which nobody has written"),
    ("uninitialised_counter", "init", r"reads shared array 'counter' at byte 0, which nobody has written"),
]


@pytest.mark.parametrize(("bug", "mode", "words"), FOUND_BY)
def test_planted_fault_is_found(bug, mode, words):
    result = execute([program("bugs", mode), bug], DETOPS_EMULATED_SECONDS="0.5" if bug == "endless" else "100")
    assert result.returncode != 0
    assert re.search(words, result.stderr), result.stderr


def test_every_planted_fault_is_looked_for():
    planted = re.findall(r'(?:RUN(?:_ONE_BLOCK)?\((\w+)|chosen\("(\w+)"\))', BUGS.read_text())
    planted = {a or b for a, b in planted} - {"bug"}
    assert planted == {bug for bug, _, _ in FOUND_BY} | {"late_copy"}


@pytest.mark.parametrize("mode", MODES)
def test_kernels_without_their_faults_pass(mode):
    result = execute([program("bugs", mode), "fine"])
    assert result.returncode == 0 and result.stderr == "", result.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correct_kernels_pass(mode, seed):
    result = execute([program("correct", mode)], DETOPS_EMULATED_SEED=str(seed), DETOPS_EMULATED_POISON=str(seed))
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert set(result.stdout.split()) == set(re.findall(r"__global__ void (\w+)", CORRECT.read_text()))


def test_fibers_without_assembly():
    result = execute([program("correct_ucontext", "none")])
    assert result.returncode == 0, result.stderr


def outputs(bug, variable, values):
    return {execute([program("bugs", "none"), bug], **{variable: value}).stdout for value in values}


def test_seed_changes_what_a_race_gives():
    assert len(outputs("race_between_blocks", "DETOPS_EMULATED_SEED", "123456")) > 1
    assert len(outputs("race_between_blocks", "DETOPS_EMULATED_SEED", "33")) == 1


def test_poison_changes_what_an_uninitialised_read_gives():
    assert len(outputs("uninitialised_shared", "DETOPS_EMULATED_POISON", ("0xff", "0"))) == 2


def test_copy_to_the_host_lands_when_synchronised():
    bug, fine = (execute([program("bugs", "none"), name]).stdout for name in ("late_copy", "fine"))
    assert int(bug) == -1 and int(fine) > 0


def test_memory_of_torch_has_red_zones():
    library = program("reader.so", "address")
    preload = " ".join(map(run.compiler_file, run.PRELOADED["address"]))
    script = (
        "import ctypes, sys, torch\n"
        "values = torch.arange(float(sys.argv[2]))\n"
        "read = ctypes.CDLL(sys.argv[1]).read_element\n"
        "read.restype, read.argtypes = ctypes.c_float, (ctypes.c_void_p, ctypes.c_int)\n"
        "print(read(values.data_ptr(), int(sys.argv[3])))\n"
    )
    for length in (1, 3, 1000):
        for index in (-1, length - 1, length):
            result = execute([sys.executable, "-c", script, library, str(length), str(index)], LD_PRELOAD=preload)
            if index == length - 1:
                assert result.stdout == f"{float(index)}\n", result.stderr
            else:
                assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


# ---- The build, and what pytest shows of a process that ends


def test_a_header_concerns_what_includes_it():
    """Of the plain library of the NMS family, which is built first."""
    build.build_library("none", "nms")
    assert build.announcement(build.library_name("nms")) == ""
    folder = build.folder_of("none", build.CSRC)
    listed = subprocess.run([*build.ninja(), "-t", "deps"], cwd=folder, capture_output=True, text=True).stdout
    includes = {text.partition(":")[0] for text in listed.split("\n\n") if "csrc/nms/nms.h" in text}
    assert "nms/nms_cuda.o" in includes
    assert not includes & {"roi/roi_align_cuda.o", "iou/iou_cuda.o", "machine.o"}


def test_last_words_of_a_worker_are_shown(tmp_path):
    pytest.importorskip("xdist")
    words = "cuda_on_cpu: kernel some_kernel: deadlock"
    (tmp_path / "test_end.py").write_text(f"import os\ndef test_end():\n    os.write(2, b'{words}')\n    os.abort()\n")
    options = ["-n", "1", "-c", build.ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    result = execute([sys.executable, "-m", "pytest", *options, tmp_path])
    assert result.returncode == 1 and words in result.stderr, result.stdout + result.stderr


# ---- run.py's list of kernels


def test_kernels_are_listed(tmp_path):
    (tmp_path / "a_cuda.cu").write_text(
        "template <class T>\n__global__ void first_kernel(T* a);\n"
        "// __global__ void not_this()\n/* __global__ void nor_this() */\n"
        "__global__ __launch_bounds__(kThreads, f(2)) void second_kernel(int) {}\n"
        "static __global__ void __launch_bounds__(64)\n    third_kernel() {}\n"
    )
    (tmp_path / "helper.cuh").write_text("__device__ void helper();\n__global__ void fourth_kernel() {}\n")
    assert run.kernels_in(tmp_path) == {"first_kernel", "second_kernel", "third_kernel", "fourth_kernel"}


def test_kernel_that_no_test_runs_is_named(tmp_path):
    for family, kernel in (("iou", "one_kernel"), ("nms", "two_kernel"), ("common", "shared_kernel")):
        (tmp_path / family).mkdir()
        name = "sort_cuda.cuh" if family == "common" else f"{family}_cuda.cu"
        (tmp_path / family / name).write_text(f"__global__ void {kernel}() {{}}\n")
    assert run.kernels_not_run(["iou"], set(), tmp_path) == {"one_kernel"}
    assert run.kernels_not_run(["iou"], {"one_kernel"}, tmp_path) == set()
    assert run.kernels_not_run(["iou", "nms"], {"one_kernel"}, tmp_path) == {"two_kernel", "shared_kernel"}


@pytest.mark.parametrize("family", run.families())
def test_family_has_kernels_and_tests(family):
    assert run.kernels_in(build.CSRC / family)
    assert run.test_files(family)


def test_launches_name_their_kernel():
    """The registry knows kernels by the text in DETOPS_LAUNCH, so that must be a kernel and not a variable."""
    kernels = run.kernels_in(build.CSRC)
    for source in build.CSRC.glob("*/*_cuda.cu"):
        for text in re.findall(r"DETOPS_LAUNCH\(\(?\s*(?:\w+::)*(\w+)", source.read_text()):
            assert text in kernels, f"{source.name} launches {text}"


# ---- mutate.py


def test_mutations():
    text = "a < b;\n__syncthreads();\n  __syncwarp(mask);\nx >= y"
    assert [(line, what) for line, what, _ in mutate.without_barriers(text)] == [
        (2, "without __syncthreads();"),
        (3, "without __syncwarp(mask);"),
    ]
    assert [mutated for _, _, mutated in mutate.without_barriers(text)][1] == "a < b;\n__syncthreads();\n  ;\nx >= y"
    assert [what for _, what, _ in mutate.with_moved_bounds(text, [1, 4])] == ["a <= b;", "x > y"]
