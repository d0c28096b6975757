"""How much memory a call takes: asked of a fresh process, because the peak of a process never falls again."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import detops

SCRIPT = """
import resource, torch, detops
{prepare}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = {call}
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print({check}, (after - before) * 1024)
"""


def peak_growth(prepare, call, check):
    """(the int that `check` says of `result`, bytes by which `result = call` raised the process's peak); Linux only.

    `prepare` makes the inputs and calls the op once on few boxes, so that code pages and pools are not counted.
    """
    script = SCRIPT.format(prepare=prepare, call=call, check=check)
    # Started in the source folder, Python would find that and not the package under test.
    environment = {**os.environ, "PYTHONPATH": str(Path(detops.__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.check_output([sys.executable, "-c", script], cwd=folder, env=environment, text=True)
    return tuple(map(int, output.split()))
