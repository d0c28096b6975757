"""Measure detops and every installed peer on this machine.

    python benchmarks/run.py                     all families
    python benchmarks/run.py nms --quick         one family, fewer cases
    python benchmarks/run.py --json out.json --plot out.md      and a page with tables and plots

Every result is checked before it is timed; a wrong one ends the run with exit status 1.
"""

import argparse
import importlib
import json
import sys
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch

import harness
import report

FAMILIES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("run", "harness", "report"))


class Table:
    """Aligned text, printed row by row. The columns of peers are known from the cases before anything is measured."""

    def __init__(self, cases: list[harness.Case], bandwidth: float):
        self.bandwidth = bandwidth
        self.peers = list(dict.fromkeys(name for case in cases for name in case.peers))
        self.widths = [max(len(case.name) for case in cases), 24, *(17 for _ in self.peers), 17, 8, 8, 0]

    def line(self, cells: list[str]) -> str:
        return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, self.widths, strict=True)).rstrip()

    def header(self) -> str:
        return self.line(report.header(self.peers))

    def row(self, measured: dict) -> str:
        return self.line(report.cells(measured, self.peers, self.bandwidth / 1e9))


def progress_bar(total: int):
    """A bar where a person watches and tqdm is installed, else nothing."""
    tqdm = harness.optional("tqdm")
    return tqdm.tqdm(total=total, leave=False) if tqdm and sys.stderr.isatty() else nullcontext()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, less time each")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--plot", metavar="FILE", help="write a page of Markdown, and plots beside it (needs matplotlib)"
    )
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
    print(report.versions_text(versions))
    table = Table([case for _, case in cases], bandwidth)
    print(table.header(), flush=True)
    measured = []
    with progress_bar(len(cases)) as bar:
        for family, case in cases:
            try:
                measured.append(harness.measure(case, family, device, args.quick, 0.1 if args.quick else 0.5))
            except harness.WrongResult as wrong:
                print(f"WRONG RESULT  {wrong}", file=sys.stderr)
                return 1
            for line in (table.row(measured[-1]), report.shares_text(measured[-1])):
                if line:
                    (bar.write if bar else print)(line)
            if bar:
                bar.update()
    if any(not peer["agrees"] for case in measured for peer in case["peers"].values()):
        print("* its result differs from the definition's")

    everything = {
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
        Path(args.json).write_text(json.dumps(everything, indent=1) + "\n")
    if args.plot:
        report.write_page(everything, Path(args.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
