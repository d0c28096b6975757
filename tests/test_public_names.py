"""Every public name has a docstring, a reference, a test, a benchmark and a row in docs/ops.md, or a reason not to."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import detops

ROOT = Path(__file__).parents[1]
NAMES = {name: getattr(detops, name) for name in detops.__all__}
RESULTS = [name for name, value in NAMES.items() if isinstance(value, type) and issubclass(value, tuple)]
ERRORS = [name for name, value in NAMES.items() if isinstance(value, type) and issubclass(value, Exception)]
CALLED = [name for name in NAMES if name not in RESULTS + ERRORS]

# Modules that call one function, whose docstring, reference and benchmark are theirs too.
MODULES = {"RoIAlign": "roi_align", "RoIPool": "roi_pool", "PSRoIAlign": "ps_roi_align", "PSRoIPool": "ps_roi_pool"}
# What else the reference is called. A class that wraps functions is judged by theirs.
REFERENCES = {
    **MODULES,
    "generalized_box_iou": "box_iou",  # of that kind
    "distance_box_iou": "box_iou",
    "complete_box_iou": "box_iou",
    "efficient_box_iou": "box_iou",
    "box_ioa": "box_iou",
    "BoxCoder": "encode_boxes",
    "TaskAlignedAssigner": "assign_task_aligned",
    "AnchorGenerator": "grid_anchors",
    "MultiScaleRoIAlign": "multi_scale_roi_align",
}
WITHOUT_REFERENCE = {
    "DefaultBoxGenerator": "torchvision's, and boxes that the test writes out",
    "decode_yolo_grid": "the test has it undo assign_yolo_grid",
    "yolo_anchors": "published numbers",
    "yolov5_target_lists": "the test has the published code",
}
WITHOUT_BENCHMARK = {
    "pad_ground_truth": "copies, and no kernel",
    "yolo_anchors": "published numbers",
    "decode_yolo_grid": "a few operations of PyTorch",
    "grid_anchors": "a few sums for each point, which AnchorGenerator keeps",
    "point_anchors": "a few sums for each point",
    "DefaultBoxGenerator": "a few sums for each point, once for a size",
    "TaskAlignedAssigner": "assign_task_aligned, which is timed, behind another interface",
    "yolov5_target_lists": "assign_yolov5, which is timed, and its results as lists",
    **{name: f"{function}, which is timed, as a module" for name, function in MODULES.items()},
    "MultiScaleRoIAlign": "multi_scale_roi_align, which is timed, behind torchvision's interface",
}
WITHOUT_SOURCE = {"pad_ground_truth": "of detops alone"}


def names_used(path):
    """What a file uses of detops, in code: docstrings and comments do not count, a name for getattr does."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] == "detops":
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            used.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "detops":
            used |= {name.name for name in node.names}
    return used


def names_used_in(pattern):
    return set().union(*(names_used(path) for path in ROOT.glob(pattern) if path != Path(__file__)))


TESTED, TIMED = names_used_in("tests/test_*.py"), names_used_in("benchmarks/*.py")


def names_of_references():
    stems = [path.stem for path in ROOT.glob("tests/reference/[a-z]*.py")]
    return {name for stem in stems for name in dir(importlib.import_module(f"reference.{stem}"))}


def parts_of(docstring):
    """The indented text under each heading: {"Args": ..., "Returns": ...}."""
    parts = re.split(r"^(\w+):(?= |$)", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", CALLED)
class TestEveryFunctionAndClass:
    def test_its_docstring_is_complete(self, name):
        docstring = inspect.getdoc(NAMES[name])
        assert docstring and docstring.splitlines()[0]
        if name in MODULES:
            assert f"`detops.{MODULES[name]}`" in docstring
            return
        parts = parts_of(docstring)
        wanted = {"Args", "Example"} | (set() if inspect.isclass(NAMES[name]) else {"Returns", "Raises"})
        assert parts.keys() >= wanted
        assert ("Source" in parts) != (name in WITHOUT_SOURCE)
        described = ", ".join(re.findall(r"^    (\w+(?:, \w+)*):", parts["Args"], re.MULTILINE)).split(", ")
        assert set(described) == set(inspect.signature(NAMES[name]).parameters)

    def test_its_example_runs(self, name):
        if name in MODULES:
            pytest.skip("its function has one")
        module = importlib.import_module(NAMES[name].__module__)
        finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
        (example,) = finder.find(NAMES[name], name, module, extraglobs={**NAMES, "torch": torch, "detops": detops})
        assert example.examples
        assert runner.run(example).failed == 0

    def test_has_a_reference(self, name):
        assert (REFERENCES.get(name, name) in names_of_references()) != (name in WITHOUT_REFERENCE)

    def test_is_tested(self, name):
        assert name in TESTED

    def test_is_timed(self, name):
        assert (name in TIMED) != (name in WITHOUT_BENCHMARK)

    def test_has_a_row_in_the_documents(self, name):
        assert name in names_in_the_documents()


def names_in_the_documents():
    """Those in the first column of the table of ops."""
    rows = (ROOT / "docs" / "ops.md").read_text().splitlines()
    return {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_the_documents_name_nothing_else():
    assert names_in_the_documents() <= set(CALLED)


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_documented_field_by_field(name):
    result = NAMES[name]
    assert not inspect.getdoc(result).startswith(f"{name}(")  # which namedtuple writes by itself
    (definition,) = ast.parse(inspect.getsource(result)).body
    body = definition.body[1:]  # after the docstring: fields, each with its own
    assert [node.target.id for node in body[::2] if isinstance(node, ast.AnnAssign)] == list(result._fields)
    assert all(isinstance(node, ast.Expr) and node.value.value for node in body[1::2])
    assert len(body) == 2 * len(result._fields)


def test_exemptions_name_what_exists():
    for exempt in (REFERENCES, WITHOUT_REFERENCE, WITHOUT_BENCHMARK, WITHOUT_SOURCE):
        assert exempt.keys() <= set(CALLED)
