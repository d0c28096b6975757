"""Break kernels on purpose, one place at a time, and see whether run.py notices.

    python tests/emulation/mutate.py csrc/nms/nms_cuda.cu                 removes each barrier (found by `thread`)
    python tests/emulation/mutate.py csrc/nms/nms_cuda.cu --bounds 83 86  moves the bounds in these lines (`address`)

A barrier is `__syncthreads();` or `__syncwarp();`; a bound is the first < of the line, which becomes <=, or else the
first >=, which becomes >. Ends with status 1 if a mutation goes unnoticed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build import CSRC, ROOT

BARRIER = re.compile(r"__sync(?:threads|warp)\([^()]*\);")
FINDING = re.compile(r"SUMMARY: .*|.*runtime error: .*|cuda_on_cpu: .*|^E  .*", re.MULTILINE)


def without_barriers(text: str):
    """(line number, what was done, mutated text) for each barrier."""
    for match in BARRIER.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield line, f"without {match[0]}", text[: match.start()] + ";" + text[match.end() :]


def with_moved_bounds(text: str, lines: list[int]):
    for number in lines:
        all_lines = text.split("\n")
        line = all_lines[number - 1]
        moved = line.replace(" < ", " <= ", 1) if " < " in line else line.replace(" >= ", " > ", 1)
        if moved == line:
            raise SystemExit(f"line {number} has no bound: {line.strip()}")
        all_lines[number - 1] = moved
        yield number, moved.strip(), "\n".join(all_lines)


def verdict(csrc: Path, name: Path, text: str, sanitize: str, tests: str | None) -> str | None:
    """The first finding of run.py on a copy of csrc with this text in one file, or None if it finds nothing."""
    (csrc / name).write_text(text)
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--first", "--sanitize", sanitize]
    command += ["--csrc", str(csrc), *(["-k", tests] if tests else [])]
    if name.parts[0] != "common":
        command.append(name.parts[0])
    environment = {**os.environ, "DETOPS_EMULATED_SECONDS": "60"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode == 0:
        return None
    finding = FINDING.search(result.stderr) or FINDING.search(result.stdout)
    return finding[0] if finding else f"status {result.returncode}: {(result.stderr or result.stdout)[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--bounds", type=int, nargs="+", metavar="line", help="move these instead of removing barriers")
    parser.add_argument("--barriers", type=int, nargs="+", metavar="line", help="remove only these")
    parser.add_argument("-k", dest="tests", help="only these tests, as pytest's -k")
    options = parser.parse_args()
    source = options.source.resolve()
    text = source.read_text()
    sanitize = "address" if options.bounds else "thread"
    mutations = list(with_moved_bounds(text, options.bounds) if options.bounds else without_barriers(text))
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        csrc = shutil.copytree(CSRC, Path(folder) / "csrc")
        for line, what, mutated in mutations:
            if options.barriers and line not in options.barriers:
                continue
            started = time.monotonic()
            found = verdict(csrc, source.relative_to(CSRC), mutated, sanitize, options.tests)
            unnoticed += found is None
            where = f"{source.relative_to(ROOT)}:{line}"
            print(f"{where}  {what}\n    {found or 'NOT NOTICED'}  ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{unnoticed} mutations went unnoticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
