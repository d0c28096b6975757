"""Which features of PyTorch every function works with. The table in docs/features.md is made and checked here:
`python tests/test_features.py` prints it."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import detops
from features import CALLS

ROOT = Path(__file__).parents[1]
YES = "yes"
COUNTS = "no: as many results as the data gives"
LISTS = "no: lists of tensors"
COLUMNS = {
    "torch.compile": "`torch.compile(fullgraph=True, dynamic=True)`",
    "torch.export": "`torch.export`",
    "autocast": "autocast",
    "vmap": "`vmap`",
    "CUDA graph": "CUDA graph [1]",
    "ONNX": "ONNX",
}
# Where the answer is not "yes", or in ONNX not "no".
VMAP = {
    "pad_ground_truth": LISTS,
    "multi_scale_roi_align": LISTS,
    "decode_yolo": LISTS,
    "yolov5_target_lists": COUNTS,
    "sample_matches": "with `randomness=`",
}
CUDA_GRAPH = {name: COUNTS for name, call in CALLS.items() if call.counts}
ONNX = {"nms": "NonMaxSuppression", "roi_align": "RoiAlign"}
ORDINARY = (YES,) * 5 + ("no",)
SIZES = 9, 12, 10


def answers(name):
    return (YES, YES, YES, VMAP.get(name, YES), CUDA_GRAPH.get(name, YES), ONNX.get(name, "no"))


def table():
    """Functions with the same answers share a row, most of them the last."""
    rows = {}
    for name in CALLS:
        rows.setdefault(answers(name), []).append(f"`{name}`")
    rows[ORDINARY] = [f"the {len(rows.pop(ORDINARY))} others"]
    cells = [["function", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    cells += [[", ".join(names), *row] for row, names in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def expect_same(got, expected, exact=True):
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else {}))


def run(name, n, function=None):
    """The call's results, random numbers being the same each time."""
    torch.manual_seed(0)
    return (function or CALLS[name].function)(*CALLS[name].inputs(n))


def test_the_documents_hold_the_table():
    assert table() in (ROOT / "docs" / "features.md").read_text()


def test_every_function_is_here_unless_it_calls_none_of_the_ops():
    eager = {"grid_anchors", "point_anchors", "yolo_anchors", "kmeans_anchors"}
    functions = {name for name in detops.__all__ if re.match("[a-z]", name)}
    assert CALLS.keys() == functions - eager


@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    """Without a graph break, and sizes that were not seen before do not compile anew."""
    compiled = torch.compile(CALLS[name].function, fullgraph=True, dynamic=True, backend="aot_eager")
    first, *others = SIZES
    expect_same(run(name, first, compiled), run(name, first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in others:
            expect_same(run(name, n, compiled), run(name, n))


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("name", CALLS)
def test_export(name):
    call = CALLS[name]
    inputs = call.inputs(SIZES[0])
    dynamic = tuple(dict.fromkeys(range(each.ndim), torch.export.Dim.AUTO) for each in inputs)
    program = torch.export.export(_Module(call.function), inputs, dynamic_shapes=(dynamic,))
    for n in SIZES:
        expect_same(run(name, n, program.module()), run(name, n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_autocast(device, name, dtype):
    """What comes out of a network in low precision is taken beside float32, and computed with in float32."""
    call = CALLS[name]
    inputs = [each.to(device.torch) for each in call.inputs(9)]
    low = [each.to(dtype) if i < call.predicted else each for i, each in enumerate(inputs)]
    torch.manual_seed(0)
    with torch.autocast(device.torch, dtype):
        got = call.function(*low)
    torch.manual_seed(0)
    expected = call.function(*(each.float() if each.is_floating_point() else each for each in low))
    for ours, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert ours.dtype in (theirs.dtype, dtype)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_vmap(name):
    call, inputs = CALLS[name], CALLS[name].inputs(9)
    several = [torch.stack((each, each.flip(0), each)) for each in inputs]
    if call.counts:  # the three must give as many
        several = [torch.stack((each, each, each)) for each in inputs]
    if name in VMAP:
        with pytest.raises(RuntimeError, match="randomness" if name == "sample_matches" else name):
            torch.vmap(call.function)(*several)
        return
    got = torch.vmap(call.function)(*several)
    for i in range(3):
        expect_same(tree_map(lambda each, i=i: each[i], got), call.function(*(each[i] for each in several)))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in CUDA_GRAPH])
def test_cuda_graph(device, name):
    """A captured call computes anew from what its inputs hold when it is replayed."""
    call = CALLS[name]
    inputs, later = ([each.cuda() for each in call.inputs(9)] for _ in range(2))
    later = [each.flip(0) for each in later]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call.function(*inputs)  # builds what is built once
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.function(*inputs)
    for each, other in zip(inputs, later, strict=True):
        each.copy_(other)
    graph.replay()
    if name != "sample_matches":  # whose random numbers are others
        expect_same(captured, call.function(*later))


class _Copies(TorchDispatchMode):
    """Notes what makes the host and a GPU wait for each other."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)}
        if {"cpu", "cuda"} <= devices or function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_randomness(randomness):
    call = CALLS["sample_matches"]
    (indices,) = call.inputs(9)
    got = torch.vmap(call.function, randomness=randomness)(indices.expand(3, -1, -1))
    expected = call.function(indices)  # all anchors: none is left to chance
    expect_same(got, tree_map(lambda each: each.expand(3, *each.shape), expected))


needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch, but no GPU")


@needs_cuda_build
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if not call.counts])
def test_no_copy_between_host_and_gpu(name):
    """Of the Python layer, on tensors that hold nothing and claim to be on a GPU."""
    shapes = CALLS[name].inputs(9)
    with FakeTensorMode(), _Copies() as copies:
        inputs = [torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in shapes]
        results = tree_leaves(CALLS[name].function(*inputs))
        assert {each.device.type for each in results} == {"cuda"}
    assert not copies.found


@needs_cuda_build
def test_a_copy_from_the_host_is_noted():
    with FakeTensorMode(), _Copies() as copies:
        torch.tensor([1.0, 2.0], device="cuda")
        torch.empty(2, device="cuda").cpu()
    assert len(copies.found) == 2


class Postprocessing(torch.nn.Module):
    """Of a detector without anchors: distances and class logits to detections."""

    def forward(self, distances, logits, points, strides):
        boxes = detops.decode_ltrb(detops.decode_dfl(distances), points, strides)
        return tuple(detops.multiclass_nms(boxes, logits.sigmoid(), score_threshold=0.3, max_detections=20))


def postprocessing_inputs(batch):
    generator = torch.Generator().manual_seed(batch)
    points, strides = detops.point_anchors([(6, 8), (3, 4)], [8, 16])
    distances = torch.randn(batch, len(points), 4, 8, generator=generator)
    return distances, torch.randn(batch, len(points), 5, generator=generator), points, strides


@pytest.mark.needs_compiler
def test_postprocessing_compiles_ahead_of_time(tmp_path):
    """Decoding and suppression in one exported program, as a package of AOTInductor."""
    batch = torch.export.Dim("batch", max=32)
    model, inputs = Postprocessing(), postprocessing_inputs(3)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}, {}, {}))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "detector.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for size in (3, 5):
        found, expected = compiled(*postprocessing_inputs(size)), model(*postprocessing_inputs(size))
        assert expected[-1].min() > 0
        expect_same(found, expected, exact=False)  # inductor fuses the sigmoid its own way


if __name__ == "__main__":
    print(table())
