"""`python -m detops` prints what this installation is and what it can use on this machine; with --json as JSON."""

import argparse
import json
import signal
from typing import Any

import torch

from . import _library


def driver_verdict(info: dict[str, Any]) -> str:
    """Whether the NVIDIA driver runs the kernels: its CUDA version must reach the toolkit's major version."""
    if info["cuda"] is None:
        return "not needed: built without CUDA kernels"
    driver = f"{info['driver'] // 1000}.{info['driver'] % 1000 // 10}"
    if info["driver"] == 0:
        return "none found; the CPU ops work regardless"
    if info["driver"] // 1000 < int(info["cuda"].split(".")[0]):
        return (
            f"too old: it is for CUDA {driver}, the kernels are of CUDA {info['cuda']}; "
            "update the driver or rebuild detops with an older toolkit. The CPU ops work regardless"
        )
    return f"fine: it is for CUDA {driver}"


def devices_of(op: str, info: dict[str, Any]) -> str:
    devices = []
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"detops::{op}", "CPU"):
        devices.append("cpu")
    # The entries are registered for CUDA in any case, to say how to rebuild; the kernels may be absent.
    if info["cuda"] and torch._C._dispatch_has_kernel_for_dispatch_key(f"detops::{op}", "CUDA"):
        devices.append("cuda")
    return ", ".join(devices)


def report() -> dict[str, Any]:
    """What is printed, by its heading; under "ops" the devices of each op."""
    info = _library.build_info()
    return {
        "detops": f"{info['version']}, compiled by {info['compiler']}",
        "torch": f"{torch.__version__}, built against {info['torch']}",
        "CUDA kernels": f"CUDA {info['cuda']} for {info['architectures']}" if info["cuda"] else "none",
        "NVIDIA driver": driver_verdict(info),
        "CPU code": f"{info['cpu']}, {torch.get_num_threads()} threads",
        "ops": {op: devices_of(op, info) for op in _library.op_names()},
    }


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quietly, where `head` has read enough
    parser = argparse.ArgumentParser(prog="python -m detops", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report and the build's own figures as JSON")
    if parser.parse_args().json:
        print(json.dumps({**report(), "build": _library.build_info()}, indent=2))
        return
    lines = report()
    ops = lines["ops"]
    rows = [*lines.items(), *((f"  {op}", devices) for op, devices in ops.items())]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {len(text) if text is ops else text}")


if __name__ == "__main__":
    main()
