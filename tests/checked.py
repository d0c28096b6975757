"""Run a command with the CPU ops built so that a memory fault ends the process: AddressSanitizer,
UndefinedBehaviorSanitizer, checked containers of the standard library, and the counted views of csrc/common/counted.h.

    python tests/checked.py python tests/fuzz.py --seconds 600
    python tests/checked.py pytest tests/test_nms.py

The library is built into build/checked, anew only where a source changed; the first time takes four minutes on two
cores. The package there is found before the installed one, but not before the source folder: `python -m pytest` puts
that first, `pytest` does not. Needs g++, and what setup.py needs.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "emulation"))
from run import fix_addresses, sanitizer_environment  # noqa: E402

FOLDER = ROOT / "build" / "checked"
UNWRITTEN = 0xFE  # fills what is allocated: tests/fuzz.py looks for it
LIMIT = "max_allocation_size_mb=4096"  # what is drawn may be vast


def build() -> Path:
    """The folder with the package and its checked library."""
    library = FOLDER / "lib"
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={FOLDER}", f"--build-lib={library}"]
    chosen = {"DETOPS_CHECKED": "address", "DETOPS_CUDA": "0"}
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **chosen}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return library


def environment(library: Path) -> dict[str, str]:
    wanted = sanitizer_environment("address", UNWRITTEN)
    wanted["ASAN_OPTIONS"] += f":{LIMIT}"
    wanted["PYTHONPATH"] = os.pathsep.join(filter(None, [str(library), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **wanted}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    chosen = environment(build())
    fix_addresses()
    os.execvpe(sys.argv[1], sys.argv[1:], chosen)


if __name__ == "__main__":
    main()
