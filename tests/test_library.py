"""The compiled library: how it is found, what it says of itself, and that no op lacks its companions."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detops
from detops import _library
from detops.__main__ import driver_verdict

ROOT = Path(__file__).parents[1]
LIBRARY = "_C.so"
OPS = _library.op_names()


def run_python(*arguments, path):
    """Runs Python where `detops` is the package in the folder `path`."""
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=path, env=environment, capture_output=True, text=True, timeout=120
    )


def import_error(path, setup="pass"):
    """The message of the ImportError that `import detops` ends with: one, with no other behind it."""
    result = run_python("-c", f"{setup}\nimport detops", path=path)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1, result.stderr
    kind, message = result.stderr.strip().splitlines()[-1].split(": ", 1)
    assert kind == "ImportError"
    return message


@pytest.fixture
def package_copy(tmp_path):
    """A folder with a copy of the package, to damage."""
    shutil.copytree(Path(detops.__file__).parent, tmp_path / "detops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_missing_library(package_copy):
    (package_copy / "detops" / LIBRARY).unlink()
    message = import_error(package_copy)
    assert message.startswith("detops has no compiled library: ")
    assert f"{LIBRARY} is missing" in message and "installation is incomplete" in message
    assert "'pip install .'" in message


def test_missing_library_in_the_source_folder(package_copy):
    (package_copy / "detops" / LIBRARY).unlink()
    (package_copy / "setup.py").touch()
    message = import_error(package_copy)
    assert "This is the source folder" in message
    assert "'pip install .'" in message and "'pip install -e .'" in message


def test_library_that_is_no_library(package_copy):
    (package_copy / "detops" / LIBRARY).write_bytes(b"not an ELF file")
    message = import_error(package_copy)
    assert message.startswith("the compiled library of detops cannot be loaded; ")
    assert f"does not fit this machine or torch {torch.__version__}" in message
    assert "'pip install .'" in message and "The loader: " in message


def test_library_with_an_undefined_symbol(package_copy):
    library = package_copy / "detops" / LIBRARY
    content = library.read_bytes()
    assert b"aoti_torch_abi_version" in content
    library.write_bytes(content.replace(b"aoti_torch_abi_version", b"aoti_torch_abi_missing"))
    message = import_error(package_copy)
    assert "cannot be loaded" in message and "undefined symbol: aoti_torch_abi_missing" in message


def test_library_under_an_old_torch(package_copy):
    (package_copy / "detops" / LIBRARY).write_bytes(b"")
    old = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1')"
    message = import_error(package_copy, setup=old)
    assert "detops needs torch>=2.10, and this is torch 2.9.1: upgrade torch" in message


def test_library_of_another_version(package_copy):
    with open(package_copy / "detops" / "nms.py", "a") as module:
        module.write("register_fake('absent')(None)\n")
    message = import_error(package_copy)
    assert "has no op absent" in message and "'pip install .'" in message


def test_importing_the_module_nms_leaves_the_function():
    code = "import detops, detops.nms; from detops import nms; print(type(detops.nms).__name__, nms is detops.nms)"
    result = run_python("-c", code, path=Path(detops.__file__).parents[1])
    assert result.stdout.split() == ["function", "True"], result.stderr


def test_version_is_the_one_of_pyproject():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert detops.__version__ == version == _library.build_info()["version"]


def test_build_info():
    info = _library.build_info()
    keys = {"version", "torch", "compiler", "cpu", "cuda", "architectures", "driver", "cuda_stream"}
    assert info.keys() == keys
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["torch"])
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    if info["cuda"] is None:
        assert info["architectures"] is info["driver"] is info["cuda_stream"] is None
    else:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"]) and re.match(r"\d+\.\d+", info["architectures"])
        assert info["driver"] >= 0
        assert info["cuda_stream"] is (torch.version.cuda is not None)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's features are read from /proc/cpuinfo")
def test_instruction_set_is_the_best_of_the_processor():
    cpu = _library.build_info()["cpu"]
    if cpu == "baseline":
        pytest.skip("this compiler or processor has no clones per instruction set")
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    avx512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    assert {"avx2", "fma", "bmi2"} <= flags
    assert cpu == ("AVX-512 (x86-64-v4)" if avx512 else "AVX2 (x86-64-v3)")


def test_report_of_the_installation():
    result = run_python("-m", "detops", path=Path(detops.__file__).parents[1])
    assert result.returncode == 0, result.stderr
    report = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    info = _library.build_info()
    assert report["detops"] == f"{info['version']}, compiled by {info['compiler']}"
    assert report["torch"] == f"{torch.__version__}, built against {info['torch']}"
    assert report["CUDA kernels"] == (f"CUDA {info['cuda']} for {info['architectures']}" if info["cuda"] else "none")
    assert report["NVIDIA driver"] == driver_verdict(info)
    assert re.fullmatch(re.escape(info["cpu"]) + r", \d+ threads", report["CPU code"])
    assert report["ops"] == str(len(OPS))
    for op in OPS:
        assert report[op] == ("cpu, cuda" if info["cuda"] else "cpu")


def test_report_as_json():
    result = run_python("-m", "detops", "--json", path=Path(detops.__file__).parents[1])
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["build"] == _library.build_info()
    assert report["detops"].startswith(detops.__version__)
    assert sorted(report["ops"]) == OPS and all("cpu" in devices for devices in report["ops"].values())


def test_report_to_a_reader_that_has_enough():
    command = f"{sys.executable} -m detops | head -n 1; exit ${{PIPESTATUS[0]}}"
    folder = Path(detops.__file__).parents[1]
    result = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("detops ") and result.stderr == ""


@pytest.mark.parametrize(
    ("cuda", "driver", "verdict"),
    [
        (None, None, "not needed"),
        ("13.0", 0, "none found; the CPU ops work regardless"),
        ("13.0", 12080, "too old: it is for CUDA 12.8, the kernels are of CUDA 13.0; "),
        ("13.2", 13000, "fine: it is for CUDA 13.0"),
        ("12.8", 13000, "fine: it is for CUDA 13.0"),
    ],
)
def test_driver_verdict(cuda, driver, verdict):
    assert driver_verdict({"cuda": cuda, "driver": driver}).startswith(verdict)


def test_use_namespace_switches_and_restores():
    ops = _library.ops
    fragment = torch.library.Library("detops_of_one_family", "FRAGMENT")
    fragment.define("nms(Tensor boxes) -> Tensor")
    with pytest.raises(KeyError), _library.use_namespace("detops_of_one_family"):
        assert _library.ops.nms is torch.ops.detops_of_one_family.nms.default
        assert _library.ops.box_iou is ops.box_iou
        raise KeyError
    assert _library.ops is ops


# Ops without a function of their name: one that they serve. So does a gradient, `<op>_backward`. What a public
# function must have, test_public_names.py asks.
SERVES = {
    "assign_sizes": "kmeans_anchors",
    "rotated_box_iou": "box_iou",
    "focal_loss": "sigmoid_focal_loss",
    "iou_loss": "generalized_box_iou_loss",
    "matcher": "Matcher",
    "roi_align_max": "roi_align",
}


def public_name(op):
    name = op.removesuffix("_backward")
    return SERVES.get(name, name)


def test_ops_are_found():
    assert "nms" in OPS


@pytest.mark.parametrize("op", OPS)
class TestEveryOp:
    def test_has_a_public_wrapper(self, op):
        assert callable(getattr(detops, public_name(op))) and public_name(op) in detops.__all__

    def test_has_a_fake(self, op):
        # torch keeps fakes as kernels for the device "meta".
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"detops::{op}", "Meta")

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_refuses_none_as_a_tensor(self, op, device):
        types = {argument.name: str(argument.real_type) for argument in getattr(_library.ops, op)._schema.arguments}
        right = {"Tensor": torch.zeros(1, device=device), "int": 1, "float": 1.0, "bool": True}
        arguments = {name: right.get(kind, None if "Optional" in kind else []) for name, kind in types.items()}
        tensors = [name for name, kind in types.items() if kind == "Tensor"]
        for missing in tensors if len(tensors) > 1 else ():  # of one alone torch would not know the device
            with pytest.raises(RuntimeError, match=rf"^{op}: {missing} must be a tensor, got None"):
                getattr(_library.ops, op)(**arguments | {missing: None})


BOXES = torch.tensor([[0.0, 0, 8, 8], [2, 2, 6, 9]])
LOGITS = torch.zeros(2, 4)
MAP, ROIS = torch.zeros(1, 4, 8, 8), torch.tensor([[0, 1.0, 1, 6, 6]])
DIFFERENTIABLE = {
    "roi_align": lambda: detops.roi_align(_dual(MAP), ROIS, 2),
    "roi_align_max": lambda: detops.roi_align(_dual(MAP), ROIS, 2, mode="max"),
    "roi_align_rotated": lambda: detops.roi_align_rotated(_dual(MAP), torch.zeros(1, 6), 2),
    "multi_scale_roi_align": lambda: detops.multi_scale_roi_align([MAP, _dual(MAP)], ROIS, 2, spatial_scales=[1, 0.5]),
    "roi_pool": lambda: detops.roi_pool(_dual(MAP), ROIS, 2),
    "ps_roi_align": lambda: detops.ps_roi_align(_dual(MAP), ROIS, 2),
    "ps_roi_pool": lambda: detops.ps_roi_pool(_dual(MAP), ROIS, 2),
    "box_iou": lambda: detops.box_iou(_dual(BOXES), BOXES),
    "focal_loss": lambda: detops.sigmoid_focal_loss(_dual(LOGITS), LOGITS),
    "distribution_focal_loss": lambda: detops.distribution_focal_loss(_dual(LOGITS), torch.zeros(2)),
    "iou_loss": lambda: detops.generalized_box_iou_loss(BOXES, _dual(BOXES)),
    "encode_boxes": lambda: detops.encode_boxes(_dual(BOXES), BOXES),
    "decode_boxes": lambda: detops.decode_boxes(_dual(LOGITS), BOXES),
    "encode_ltrb": lambda: detops.encode_ltrb(_dual(BOXES), BOXES[:, :2]),
    "decode_ltrb": lambda: detops.decode_ltrb(_dual(LOGITS), BOXES[:, :2]),
    "decode_dfl": lambda: detops.decode_dfl(_dual(LOGITS)),
    "yolo_loss": lambda: detops.yolo_loss(_dual(torch.zeros(2, 6)), torch.zeros(2, 6)),
    "decode_yolo": lambda: detops.decode_yolo([_dual(torch.zeros(1, 6, 2, 2))], torch.ones(1, 1, 2), [8], version="v5"),
}


def _dual(tensor):
    return torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("op", sorted(name for name in _library._autograds if not name.endswith("_backward")))
def test_forward_mode_derivative_is_refused(op):
    """torch would take it as 0."""
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match=r"^\w+: there is no forward-mode derivative"):
            DIFFERENTIABLE[op]()


def test_tensors_on_two_devices_are_refused_where_one_is_meta():
    with pytest.raises(RuntimeError, match=r"^box_iou: all tensors must be on one device, got cpu and meta$"):
        detops.box_iou(BOXES, BOXES.to("meta"))


def test_a_copy_that_does_not_fit_is_named():
    """A view of one row that is expanded to 2^30 rows, in a process that may take 2 GiB."""
    resource = pytest.importorskip("resource")
    code = (
        "import detops, torch\nboxes = torch.zeros(1, 4, dtype=torch.float16).expand(2**30, 4)\n"
        "try:\n    detops.remove_small_boxes(boxes, 1.0)\nexcept RuntimeError as error:\n    print(error)"
    )
    limit = 2 << 30
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(detops.__file__).parents[1],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.match(
        r"remove_small_boxes: cannot copy a float16 tensor of shape \[1073741824, 4\]: .*memory", result.stdout
    ), result.stderr


def test_results_are_read_by_torch_load(tmp_path):
    saved = detops.multiclass_nms(BOXES[None], torch.ones(1, 2, 1), max_detections=3)
    torch.save(saved, tmp_path / "detections.pt")
    loaded = torch.load(tmp_path / "detections.pt", weights_only=True)
    assert type(loaded) is detops.Detections and all(map(torch.equal, loaded, saved))


@pytest.mark.parametrize("name", [name for name in detops.__all__ if hasattr(getattr(detops, name), "_fields")])
def test_every_named_tuple_is_a_result(name):
    """torch.export saves programs that return it, and torch.load reads it."""
    assert getattr(detops, name) in torch.utils._pytree.SUPPORTED_SERIALIZED_TYPES
    assert getattr(detops, name) in torch.serialization.get_safe_globals()


def test_results_without_gradient_do_not_ask_for_one():
    found = detops.multiclass_nms(BOXES[None].requires_grad_(), torch.ones(1, 2, 1, requires_grad=True))
    assert not found.boxes.requires_grad and not found.scores.requires_grad
