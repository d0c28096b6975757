"""Checks that a compiled library needs nothing of torch but the C functions of its stable ABI.

    python .ci/check_symbols.py detops/_C.so

Anything else (a C++ symbol of ATen or c10, a CUDA library) would tie the file to one build of torch.
"""

import re
import subprocess
import sys

TORCH_C_SHIM = re.compile(r"(aoti_torch|torch)_[A-Za-z0-9_]+$")
SYSTEM_VERSION = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
# libtorch exports a few templates of libstdc++ without a version, so the linker records them without one.
STANDARD_LIBRARY = re.compile(r"_ZN?K?St(?!.*(3c10|2at|5torch))")


def foreign_symbols(library: str) -> list[str]:
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    entries = [line.split() for line in listing.splitlines()]
    allowed = (TORCH_C_SHIM.match, SYSTEM_VERSION.search, STANDARD_LIBRARY.match)
    # "w" marks a weak symbol, which may be absent.
    return [name for kind, name in entries if kind != "w" and not any(test(name) for test in allowed)]


if __name__ == "__main__":
    library = sys.argv[1]
    foreign = foreign_symbols(library)
    if foreign:
        sys.exit(f"{library} needs symbols outside the stable ABI and the system:\n  " + "\n  ".join(foreign))
    print(f"{library}: only the stable ABI's C functions and system libraries")
