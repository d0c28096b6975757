"""`python -m detops` prints what this installation is and what it can use on this machine."""

import torch

from . import _library


def driver_verdict(info: dict) -> str:
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


def devices_of(op: str, info: dict) -> str:
    devices = []
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"detops::{op}", "CPU"):
        devices.append("cpu")
    # The entries are registered for CUDA in any case, to say how to rebuild; the kernels may be absent.
    if info["cuda"] and torch._C._dispatch_has_kernel_for_dispatch_key(f"detops::{op}", "CUDA"):
        devices.append("cuda")
    return ", ".join(devices)


def main() -> None:
    info = _library.build_info()
    ops = _library.op_names()
    rows = [
        ("detops", f"{info['version']}, compiled by {info['compiler']}"),
        ("torch", f"{torch.__version__}, built against {info['torch']}"),
        ("CUDA kernels", f"CUDA {info['cuda']} for {info['architectures']}" if info["cuda"] else "none"),
        ("NVIDIA driver", driver_verdict(info)),
        ("CPU code", f"{info['cpu']}, {torch.get_num_threads()} threads"),
        ("ops", f"{len(ops)}"),
    ]
    width = max(len(name) for name in [row[0] for row in rows] + ["  " + op for op in ops])
    for name, text in rows:
        print(f"{name:{width}}  {text}")
    for op in ops:
        print(f"{'  ' + op:{width}}  {devices_of(op, info)}")


if __name__ == "__main__":
    main()
