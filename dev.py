"""The commands of a developer.

    python dev.py setup                     what the commands need, detops in place and the commit hook
    python dev.py build                     the library in place, and compile_commands.json for editors
    python dev.py test [FAMILY] [OPTION..]  pytest: all tests, or a family with only its emulated kernels compiled
    python dev.py emulate [FAMILY..] [--sanitize KIND]   the CUDA sources on the CPU: tests/emulation/run.py
    python dev.py fuzz [OPTION..]           drawn arguments in a build that traps memory faults: tests/fuzz.py
    python dev.py bench [FAMILY..]          benchmarks/run.py
    python dev.py lint                      what .pre-commit-config.yaml lists, on all tracked files
    python dev.py format                    formats Python and C++
    python dev.py types                     pyright on detops, whose public names must have types
    python dev.py docs                      the site, from docs/ and the docstrings: build/site/index.html
    python dev.py tidy [FILE..]             clang-tidy; by default on the C++ that differs from origin/main
    python dev.py sdist [OUTDIR]            the source distribution; needs no torch
    python dev.py wheel [OUTDIR]            the wheel for everybody: any Python, torch from 2.10 on, glibc from 2.28 on,
                                            CPU and CUDA in one file
    python dev.py ci                        all checks of the project: .ci/run

`wheel` builds with the torch and the CUDA compiler that are there, or fetches them; DETOPS_CUDA=0 leaves the CUDA
kernels out, TORCH_CUDA_ARCH_LIST chooses among their architectures. OUTDIR is dist where it is not given.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTHON = sys.executable
OLDEST_GLIBC = "2.28"
LIBRARIES_OF_TORCH = ("libtorch_cpu.so", "libc10.so")
CPP = (".cpp", ".h", ".cu", ".cuh")

sys.path.insert(0, str(ROOT / "tests" / "emulation"))


def run(*command: str | Path, **variables: str) -> None:
    # Tools of this environment are found also where it is not activated, as ninja by torch.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = {**os.environ, **variables, "PATH": path}
    subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)


def setup() -> None:
    run(PYTHON, "-m", "pip", "install", "-e", ".[dev]")
    run(PYTHON, "-m", "pre_commit", "install")


def build() -> None:
    run(PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    compile_commands()


def compile_commands() -> None:
    """The sources as the library has them, and the CUDA sources as the emulator has them: editors know no nvcc."""
    import build as emulation

    emulation.announcement()  # writes the plan
    plans = [emulation.folder_of("none", emulation.CSRC) / "build.ninja", *ROOT.glob("build/temp.*/build.ninja")]
    ninja = (emulation.ninja()[0], "-t", "compdb", "compile")
    listed = [json.loads(subprocess.check_output(ninja, cwd=plan.parent)) for plan in plans]
    entries = {entry["file"]: entry for entries in listed for entry in entries}
    (ROOT / "compile_commands.json").write_text(json.dumps([*entries.values()], indent=1))


def test(*arguments: str) -> None:
    import run as emulation

    family, *options = arguments or [""]
    if family not in emulation.families():
        run(PYTHON, "-m", "pytest", *(arguments or ("-n", "auto")))
    else:
        library = str(emulation.build_library("none", family))
        run(PYTHON, "-m", "pytest", *emulation.test_files(family), *options, DETOPS_EMULATED_LIBRARY=library)


def emulate(*arguments: str) -> None:
    run(PYTHON, "tests/emulation/run.py", *arguments)


def fuzz(*arguments: str) -> None:
    run(PYTHON, "tests/checked.py", PYTHON, "tests/fuzz.py", *arguments)


def bench(*arguments: str) -> None:
    run(PYTHON, "benchmarks/run.py", *arguments)


def lint() -> None:
    run(PYTHON, "-m", "pre_commit", "run", "--all-files", "--show-diff-on-failure")


def format() -> None:
    for hook in ("ruff-format", "clang-format"):  # which fail where they change something
        subprocess.run([PYTHON, "-m", "pre_commit", "run", "--all-files", hook], cwd=ROOT)


def types() -> None:
    pyright = (PYTHON, "-m", "pyright", "--pythonpath", PYTHON)
    run(*pyright)
    run(*pyright, "--verifytypes", "detops", "--ignoreexternal", PYTHONPATH=str(ROOT))


def docs() -> None:
    run(PYTHON, "-m", "mkdocs", "build", NO_MKDOCS_2_WARNING="1")


def tidy(*files: str) -> None:
    compile_commands()
    listing = ("git", "diff", "--name-only", "--diff-filter=d", "origin/main", "--", "csrc")
    changed = subprocess.check_output(listing, cwd=ROOT, text=True).split()
    if chosen := files or [name for name in changed if name.endswith(CPP)]:
        run("clang-tidy", "--quiet", *chosen)


def ci() -> None:
    run(".ci/run")


def sdist(folder: str = "dist") -> None:
    run(PYTHON, "-m", "build", "--sdist", "--outdir", folder)


def wheel(folder: str = "dist") -> None:
    with tempfile.TemporaryDirectory() as built, tempfile.TemporaryDirectory() as repaired:
        pip = (PYTHON, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", built)
        plain = {"DETOPS_CHECKED": "0", "DETOPS_DEBUG": "0", "DETOPS_MANYLINUX": OLDEST_GLIBC}
        run(*pip, ".", DETOPS_CUDA=os.environ.get("DETOPS_CUDA", "1"), **plain)
        (path,) = Path(built).glob("*.whl")
        check(path, Path(repaired))
        target = ROOT / folder
        target.mkdir(parents=True, exist_ok=True)
        print(shutil.move(path, target / path.name))


def check(path: Path, repaired: Path) -> None:
    """That the wheel is what its name says: auditwheel has nothing to refuse, and no library to change."""
    platform = path.stem.split("-")[-1]
    excluded = [word for name in LIBRARIES_OF_TORCH for word in ("--exclude", name)]
    audit = (PYTHON, "-m", "auditwheel", "repair", "--only-plat", "--plat", platform, *excluded)
    run(*audit, "--wheel-dir", repaired, path)
    (other,) = repaired.glob("*.whl")
    if libraries(path) != libraries(other):
        raise SystemExit(f"{path.name}: auditwheel had to change its libraries")


def libraries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".so" in name}


COMMANDS = (setup, build, test, emulate, fuzz, bench, lint, format, types, docs, tidy, sdist, wheel, ci)


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    command = {each.__name__: each for each in COMMANDS}.get(name)
    if command is None:
        sys.exit(__doc__)
    try:
        command(*arguments)
    except subprocess.CalledProcessError as error:  # which has said what is wrong
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
