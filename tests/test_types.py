"""What a type checker, and with it an editor, makes of the public names."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detops

HEAD = """
from typing import Any
from typing_extensions import assert_type
import detops
import torch
from torch import Tensor

def results(args: tuple[Any, ...], options: dict[str, Any]) -> None:
"""

# Functions whose result depends on an option: what it is for which.
OVERLOADED = {"assign_task_aligned": {"": "TaskAlignedTargets", ", with_metrics=True": "TaskAlignedMetrics"}}


def expected_types():
    """A line for each public function, and for each field of the results that have some."""
    for name in sorted(detops.__all__):
        value = getattr(detops, name)
        if name in OVERLOADED:
            for option, result in OVERLOADED[name].items():
                yield f"    assert_type(detops.{name}(*args{option}), detops.{result})"
        elif inspect.isfunction(value):
            result = inspect.formatannotation(inspect.signature(value).return_annotation)
            result = re.sub(r"detops\.\w+\.", "detops.", result)  # classes by their public names
            yield f"    assert_type(detops.{name}(*args, **options), {result})"
        elif issubclass(value, tuple):
            for field, kind in inspect.get_annotations(value).items():
                yield f"    assert_type(detops.{name}(*args, **options).{field}, {kind.__name__})"


def check(tmp_path, source):
    pytest.importorskip("pyright", reason="pyright, a type checker, is not installed")
    (tmp_path / "use.py").write_text(source)
    path = {**os.environ, "PYTHONPATH": str(Path(detops.__file__).parents[1])}
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "use.py"]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_results_have_types(tmp_path):
    lines = [*expected_types()]
    assert len(lines) > 80
    check(tmp_path, HEAD + "\n".join(lines))


def test_hosts_are_called_and_installed(tmp_path):
    check(
        tmp_path,
        """
from typing_extensions import assert_type
import detops
from detops.compat import torchvision

with detops.compat.torchvision():
    detops.compat.torchvision.install()
with torchvision():
    torchvision.uninstall()

@torchvision()
def run() -> int:
    return 1

assert_type(run(), int)
""",
    )
