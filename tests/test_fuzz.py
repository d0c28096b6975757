"""tests/fuzz.py draws for every public name and compiled op, draws the same for the same seed, and sees what is wrong.
The fuzz itself runs in CI, with the library that tests/checked.py builds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detops
import fuzz
import fuzz_arguments
from detops import _library

TARGETS = fuzz_arguments.targets()


def test_every_public_name_and_op_is_called():
    called = {name.removeprefix("detops::") if "::" in name else name.split(".")[0] for name in TARGETS}
    not_called = set(detops.__all__ + _library.op_names()) - called
    assert all(issubclass(getattr(detops, name), tuple | Exception) for name in not_called)
    assert {f"detops::{name}" for name in _library.op_names()} <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_every_argument_has_a_drawer(name):
    for argument in TARGETS[name].types:
        fuzz_arguments.drawer_of(name, argument)  # add one to OPTIONS or TENSORS of tests/fuzz_arguments.py


def test_every_drawer_is_used():
    used = {fuzz_arguments.drawer_of(name, argument)[1] for name in TARGETS for argument in TARGETS[name].types}
    assert used == fuzz_arguments.OPTIONS.keys() | fuzz_arguments.TENSORS.keys()


@pytest.mark.parametrize("name", ["nms", "detops::roi_align_backward", "AnchorGenerator.forward"])
def test_a_seed_draws_the_same(name):
    for seed in range(20):
        first, again = (fuzz.describe(fuzz_arguments.draw(TARGETS[name], seed)[1]) for _ in range(2))
        assert first == again


def test_most_calls_are_right():
    outcomes = [fuzz.make_call(TARGETS["box_iou"], seed, "cpu")[0] for seed in range(40)]
    assert outcomes.count("result") >= 10 and outcomes.count("refused") >= 5


def unnamed(boxes):
    raise RuntimeError("wrong")


def writes(boxes):
    boxes += 1


def forgets(boxes):
    return torch.full((3,), 0xFE).repeat_interleave(4).to(torch.uint8).view(torch.float32)


def changes(boxes):
    changes.calls = getattr(changes, "calls", 0) + 1
    return torch.tensor(changes.calls)


WRONG = {
    unnamed: "RuntimeError: wrong (the compiled library)",
    writes: "an argument was written to",
    forgets: "tensor 0 of the result has memory that nobody has written",
    changes: "the same call has another result",
}


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_what_is_wrong_is_found(function):
    target = fuzz_arguments.Target("nms", function, {"boxes": None})
    found = [fuzz.make_call(target, seed, "cpu") for seed in range(100)]
    assert ("words" if function is unnamed else "finding", WRONG[function]) in found


def test_a_call_that_ends_the_process_is_named(tmp_path):
    """By a library whose nms ends it."""
    package = tmp_path / "detops"
    package.symlink_to(Path(detops.__file__).parent)
    (tmp_path / "sitecustomize.py").write_text(
        "import detops, os\ndef nms(boxes, scores, iou_threshold):\n    os.abort()\ndetops.nms = nms\n"
    )
    command = [sys.executable, fuzz.__file__, "--only", "nms", "--seconds", "100", "--workers", "1", "--seed", "5"]
    result = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "nms: the process ended with status -6" in result.stdout
    assert "python tests/fuzz.py --call 'nms' 5" in result.stdout
