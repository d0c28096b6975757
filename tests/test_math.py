"""common/math.h: how near its functions come to the true values, what they give at the edges, and that builds agree."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
# As setup.py compiles; what an instruction set or the optimiser could change is what these builds differ in.
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
BUILDS = {"unoptimised": ["-O0"], "baseline": ["-O3"]}
if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    BUILDS["avx2"] = ["-O3", "-march=x86-64-v3"]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the functions alone"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # infinities and NaNs are meant
]
NAMES = ["exp", "log", "pow", "atan", "sin_degrees", "cos_degrees", "sigmoid", "softplus", "log_sigmoid"]
WIDE = np.longdouble
INFINITY = np.inf
SMALLEST = {np.float64: 5e-324, np.float32: 1e-45}

# Units in the last place of a double, as common/math.h states them.
ULP = {name: 1 if name in ("exp", "log", "pow") else 2 for name in NAMES}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("math")
    source = ROOT / "tests" / "math_harness.cpp"
    found = {}
    for name, flags in BUILDS.items():
        library = folder / f"{name}.so"
        includes = [f"-I{folder}" for folder in (ROOT / "csrc", *cpp_extension.include_paths())]
        subprocess.run(["g++", *FLAGS, *flags, *includes, str(source), "-o", str(library)], check=True)
        found[name] = ctypes.CDLL(str(library))
    return found


def call(library, name, x, y=None):
    x = np.ascontiguousarray(x)
    y = x if y is None else np.ascontiguousarray(np.broadcast_to(y, x.shape), x.dtype)
    out = np.empty_like(x)
    function = getattr(library, f"{name}_{x.dtype}")
    function(*(ctypes.c_void_p(array.ctypes.data) for array in (x, y, out)), ctypes.c_int64(x.size))
    return out


def true_value(name, x, y):
    """In 64 bits of significand, so good to a two-thousandth of a double's unit in the last place."""
    x, y = WIDE(x), WIDE(y)
    # Remainders are exact. They bring the angle into [0, 180), where the sine of radians is as good as its argument.
    degrees = np.abs(x) if "degrees" in name else x
    turned = np.fmod(degrees, 180)
    half_turns = np.where(np.fmod(degrees, 360) >= 180, WIDE(-1), WIDE(1))
    radian = WIDE(np.pi) / 180 + WIDE(1.2246467991473531772e-16) / 180  # pi in two doubles
    tail = np.log1p(np.exp(-np.abs(x)))
    match name:
        case "exp":
            return np.exp(x)
        case "log":
            return np.log(x)
        case "pow":
            return np.power(x, y)
        case "atan":
            return np.arctan(x)
        case "sin_degrees":
            return np.sign(x) * half_turns * np.sin(np.where(turned > 90, 180 - turned, turned) * radian)
        case "cos_degrees":
            return half_turns * np.sin((90 - turned) * radian)
        case "sigmoid":
            return 1 / (1 + np.exp(-x))
        case "softplus":
            return np.maximum(x, 0) + tail
        case "log_sigmoid":
            return -(np.maximum(-x, 0) + tail)


def random_inputs(name, count, seed):
    """Every size of argument, and many near where the functions change their form."""
    random = np.random.default_rng(seed)
    part = count // 4
    sizes = 2.0 ** random.uniform(-60, 60, part) * random.choice([-1, 1], part)
    unit, ordinary, large = (random.uniform(-limit, limit, part) for limit in (1.5, 30, 740))
    x = np.concatenate([sizes, unit, ordinary, large])
    y = random.permutation(np.concatenate([random.uniform(-limit, limit, part) for limit in (1, 3, 10, 100)]))
    if name in ("exp", "sigmoid", "softplus", "log_sigmoid"):
        x = np.clip(x, -700, 700)
    if name == "log":
        x = np.concatenate([np.abs(x), 1 + unit * 1e-3, 2.0 ** random.uniform(-1070, 1020, part)])
    if name == "pow":
        x = 2.0 ** (random.uniform(-1000, 1000, len(y)) / np.maximum(1, np.abs(y)))
        x[::2] = 1 + random.uniform(-0.3, 0.3, len(x[::2]))
    return x, y if name == "pow" else x


def ulps(got, true):
    """The error in units of the last place of a double near the true value."""
    unit = np.spacing(np.maximum(np.abs(true.astype(np.float64)), np.finfo(np.float64).tiny))
    return np.abs(WIDE(got) - true) / unit


@pytest.mark.skipif(np.finfo(WIDE).nmant < 63, reason="long double is no wider than double")
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(libraries, name):
    x, y = random_inputs(name, 400_000, seed=1)
    error = ulps(call(libraries["baseline"], name, x, y), true_value(name, x, y))
    worst = int(error.argmax())
    assert error[worst] <= ULP[name], (x[worst], y[worst], float(error[worst]))


@pytest.mark.skipif(np.finfo(WIDE).nmant < 63, reason="long double is no wider than double")
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_rounded_once(libraries, name):
    x, y = (array.astype(np.float32) for array in random_inputs(name, 400_000, seed=2))
    expected = true_value(name, x, y).astype(np.float32)
    got = call(libraries["baseline"], name, x, y)
    # 2^-28 of all true values lie so near to a midpoint of two floats that a double cannot tell the side.
    assert np.count_nonzero(got != expected) == 0


def numbers(values):
    """With one kind of NaN: payload and sign of those are unspecified."""
    return np.where(np.isnan(values), values.dtype.type(np.nan), values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_every_build_gives_the_same_bits(libraries, name, dtype):
    x, y = (array.astype(dtype) for array in random_inputs(name, 40_001, seed=3))
    edges = np.array([0, -0.0, 1, -1, INFINITY, -INFINITY, np.nan, SMALLEST[dtype], np.finfo(dtype).max], dtype)
    x, y = np.concatenate([x, np.repeat(edges, len(edges))]), np.concatenate([y, np.tile(edges, len(edges))])
    results = [call(library, name, x, y) for library in libraries.values()]
    for result in results[1:]:
        # The payload and sign of a NaN are unspecified.
        assert np.array_equal(np.isnan(result), np.isnan(results[0]))
        assert (
            np.where(np.isnan(result), 0, result).tobytes() == np.where(np.isnan(results[0]), 0, results[0]).tobytes()
        )


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "name, values",
    [
        ("exp", {0.0: 1, INFINITY: INFINITY, -INFINITY: 0, 1e30: INFINITY, -1e30: 0}),
        ("log", {-0.0: -INFINITY, 1.0: 0, INFINITY: INFINITY, -1.0: np.nan, -INFINITY: np.nan}),
        ("atan", {0.0: 0.0, INFINITY: np.pi / 2, -INFINITY: -np.pi / 2, 1.0: np.pi / 4}),
        ("sin_degrees", {0.0: 0, 90.0: 1, 180.0: 0, 270.0: -1, 360.0: 0, 30.0: 0.5, INFINITY: np.nan}),
        ("cos_degrees", {0.0: 1, 90.0: 0, 180.0: -1, 270.0: 0, 360.0: 1, 60.0: 0.5, -INFINITY: np.nan}),
        ("sigmoid", {0.0: 0.5, INFINITY: 1, -INFINITY: 0}),
        ("softplus", {0.0: np.log(2), INFINITY: INFINITY, -INFINITY: 0}),
        ("log_sigmoid", {0.0: -np.log(2), INFINITY: 0, -INFINITY: -INFINITY}),
    ],
)
def test_edges(libraries, name, values, dtype):
    got = call(libraries["baseline"], name, np.array([*values, np.nan], dtype))
    np.testing.assert_array_equal(got, np.array([*values.values(), np.nan], dtype))


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_edges_of_pow_are_those_of_c(libraries, dtype):
    edges = np.array([0, SMALLEST[dtype], 0.5, 1, 2, np.finfo(dtype).max, INFINITY, np.nan], dtype)
    powers = np.array([-INFINITY, -3, -0.5, -0.0, 0, 0.5, 2, INFINITY, np.nan], dtype)
    x, y = np.repeat(edges, len(powers)), np.tile(powers, len(edges))
    expected = np.power(x, y)
    ordinary = np.isfinite(expected) & (expected != 0) & (expected != 1)
    got = call(libraries["baseline"], "pow", x, y)
    np.testing.assert_array_equal(got[~ordinary], expected[~ordinary])
    np.testing.assert_allclose(got[ordinary], expected[ordinary], rtol=2 * np.finfo(dtype).eps)
    assert np.isnan(call(libraries["baseline"], "pow", np.array([-1.0], dtype), 2.0)).all()
