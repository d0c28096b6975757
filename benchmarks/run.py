"""Measure detops and every installed peer on this machine.

    python benchmarks/run.py                     all families
    python benchmarks/run.py nms --quick         one family, within half a minute
    python benchmarks/run.py nms --json out.json --plot out.png

Every result is checked before it is timed; a wrong one ends the run with exit status 1.
"""

import argparse
import importlib
import json
import sys
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import harness
import torch

FAMILIES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("run", "harness"))


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def time_text(seconds: float, quartiles: tuple[float, float] | None = None) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e3)) if seconds * s >= 1), ("us", 1e6))
    spread = f" ({'-'.join(digits(q * scale) for q in quartiles)})" if quartiles else ""
    return f"{digits(seconds * scale)} {unit}{spread}"


class Table:
    """Aligned text, printed row by row. The columns of peers are known from the cases before anything is measured."""

    def __init__(self, cases: list[harness.Case], bandwidth: float):
        self.bandwidth = bandwidth
        self.peers = list(dict.fromkeys(name for case in cases for name in case.peers))
        self.widths = [max(len(case.name) for case in cases), 24, *(17 for _ in self.peers), 17, 8, 8, 0]

    def line(self, cells: list[str]) -> str:
        return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, self.widths, strict=True)).rstrip()

    def header(self) -> str:
        return self.line(["case", "detops (quartiles)", *self.peers, "GB/s (of copy)", "floor", "memory", "asked"])

    def row(self, measured: dict) -> str:
        ours = measured["detops"]
        peers = []
        for name in self.peers:
            peer = measured["peers"].get(name)
            differs = "" if not peer or peer["agrees"] else " *"
            peers.append(f"{time_text(peer['median'])} {digits(peer['ratio'])}x{differs}" if peer else "")
        memory = measured["peak_extra_bytes"]
        return self.line(
            [
                measured["name"],
                time_text(ours["median"], ours["quartiles"]),
                *peers,
                f"{measured['gb_per_s']:.3g} ({1e9 * measured['gb_per_s'] / self.bandwidth:.1%})",
                time_text(measured["floor"]["median"]),
                "" if memory is None else f"{digits(memory / 1e6)} MB",
                measured["asked"],
            ]
        )


def progress_bar(total: int):
    """A bar where a person watches and tqdm is installed, else nothing."""
    tqdm = harness.optional("tqdm")
    return tqdm.tqdm(total=total, leave=False) if tqdm and sys.stderr.isatty() else nullcontext()


def plot(report: dict, path: str) -> None:
    """Ratios of every case, and time against size."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = [case for case in report["cases"] if case["peers"]]
    figure = Figure(figsize=(16, 3 + 0.3 * len(cases)), layout="tight")
    ratios, scaling = figure.subplots(1, 2)
    peers = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    for row, case in enumerate(cases):
        height = 0.8 / len(case["peers"])
        for i, (name, peer) in enumerate(case["peers"].items()):
            ratios.barh(row + i * height, peer["ratio"], height, align="edge", color=f"C{peers.index(name)}")
    ratios.set_yticks([row + 0.4 for row in range(len(cases))], [case["name"] for case in cases])
    ratios.legend([Patch(color=f"C{i}") for i in range(len(peers))], peers)
    ratios.invert_yaxis()
    ratios.set_xscale("log")
    ratios.axvline(1, color="black", linewidth=1)
    ratios.set_xlabel("peer's time / detops's time")

    for colour, series in enumerate(dict.fromkeys(case["series"] for case in report["cases"] if case["series"])):
        members = [case for case in report["cases"] if case["series"] == series]
        if len(members) < 2:
            continue
        for name, style in (("detops", "-o"), ("torchvision", "--x")):
            points = [(c["size"], c["detops"] if name == "detops" else c["peers"].get(name)) for c in members]
            points = [(size, timing["median"]) for size, timing in points if timing]
            if points:
                scaling.loglog(*zip(*points, strict=True), style, color=f"C{colour}", label=f"{name}, {series}")
    scaling.set_xlabel("boxes")
    scaling.set_ylabel("seconds")
    scaling.legend()
    machine = report["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} CPU threads, {report['date'][:10]}")
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, less time each")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", metavar="FILE", help="draw it (needs matplotlib)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    args = parser.parse_args()
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"unknown family: {', '.join(sorted(unknown))}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    machine, versions = harness.machine(device), harness.versions()
    bandwidth = harness.copy_bandwidth(device, args.quick)
    families = {
        name: list(importlib.import_module(name).cases(device, args.quick)) for name in args.families or FAMILIES
    }
    cases = [(family, case) for family, members in families.items() for case in members]

    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} CPU threads, copies at {bandwidth / 1e9:.3g} GB/s")
    print(", ".join(f"{name} {version}" for name, version in versions.items() if isinstance(version, str)))
    table = Table([case for _, case in cases], bandwidth)
    print(table.header(), flush=True)
    measured = []
    with progress_bar(len(cases)) as bar:
        for family, case in cases:
            try:
                measured.append(harness.measure(case, family, device, args.quick, 0.1 if args.quick else 1.0))
            except harness.WrongResult as wrong:
                print(f"WRONG RESULT  {wrong}", file=sys.stderr)
                return 1
            (bar.write if bar else print)(table.row(measured[-1]))
            if bar:
                bar.update()
    if any(not peer["agrees"] for case in measured for peer in case["peers"].values()):
        print("* its result differs from the definition's")

    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": harness.git_commit(),
        "machine": machine,
        "versions": versions,
        "device": device,
        "quick": args.quick,
        "copy_gb_per_s": bandwidth / 1e9,
        "cases": measured,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
