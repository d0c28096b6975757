"""What was measured, as text for a terminal and as a page of Markdown with plots."""

from pathlib import Path


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def time_text(seconds: float, quartiles: tuple[float, float] | None = None) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e3)) if seconds * s >= 1), ("us", 1e6))
    spread = f" ({'-'.join(digits(q * scale) for q in quartiles)})" if quartiles else ""
    return f"{digits(seconds * scale)} {unit}{spread}"


def header(peers: list[str]) -> list[str]:
    return ["case", "detops (quartiles)", *peers, "GB/s (of copy)", "floor", "memory", "asked"]


def cells(measured: dict, peers: list[str], copy_gb_per_s: float) -> list[str]:
    """The row of a case under that header."""
    ours, memory = measured["detops"], measured["peak_extra_bytes"]
    theirs = [measured["peers"].get(name) for name in peers]
    return [
        measured["name"],
        time_text(ours["median"], ours["quartiles"]),
        *(
            f"{time_text(peer['median'])} {digits(peer['ratio'])}x{'' if peer['agrees'] else ' *'}" if peer else ""
            for peer in theirs
        ),
        f"{measured['gb_per_s']:.3g} ({measured['gb_per_s'] / copy_gb_per_s:.1%})",
        time_text(measured["floor"]["median"]),
        "" if memory is None else f"{digits(memory / 1e6)} MB",
        measured["asked"],
    ]


def shares_text(measured: dict) -> str:
    """Which share of a case's time goes to the ops; empty where that was not measured."""
    shares = measured["shares"]
    parts = ", ".join(f"{share:.1%} with {name}" for name, share in shares.items())
    return f"{measured['name']}: the ops take {parts}" if shares else ""


def versions_text(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if isinstance(version, str))


def write_page(report: dict, path: Path) -> None:
    """The page, and its plots beside it under names that begin as its own."""
    machine = report["machine"]
    lines = [
        f"# Measured on {machine['gpu'] or machine['cpu']}",
        "",
        f"{report['date'][:10]}, commit {report['commit']}, {machine['threads']} CPU threads, {machine['system']}; "
        f"{versions_text(report['versions'])}. Copies run at {report['copy_gb_per_s']:.3g} GB/s.",
        "",
        "Medians of one process in which detops and the peers take turns. `12x` behind a peer's time: detops takes a "
        "twelfth of it; `*`: the peer's result differs from the definition. The floor is `torch.full` of the results "
        "(on the CPU detops asks for huge pages under large results, `torch.full` does not), "
        "memory what a call holds at most beyond its inputs, its results counted.",
        "",
        "On the CPU the floor of results of tens of megabytes may differ tenfold between cases: `torch.full` needs new "
        "pages, or finds memory that the process has freed and kept.",
        "",
    ]
    if draw_scaling(report, scaling := path.with_name(f"{path.stem}-scaling.png")):
        lines += ["## Time against size", "", f"![time against size]({scaling.name})", ""]
    for family in dict.fromkeys(case["family"] for case in report["cases"]):
        cases = [case for case in report["cases"] if case["family"] == family]
        peers = list(dict.fromkeys(name for case in cases for name in case["peers"]))
        lines += [f"## {family}", ""]
        if peers:
            picture = path.with_name(f"{path.stem}-{family}.png")
            draw_ratios(cases, peers, picture)
            lines += [f"![ratios to peers]({picture.name})", ""]
        rows = [header(peers), ["---"] * len(header(peers))]
        rows += [cells(case, peers, report["copy_gb_per_s"]) for case in cases]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
        if texts := [text for case in cases if (text := shares_text(case))]:
            lines += [
                f"{'. '.join(texts)}. Not counted is the backward of what torchvision composes of torch's ops.",
                "",
            ]
    path.write_text("\n".join(lines))


def draw_ratios(cases: list[dict], peers: list[str], path: Path) -> None:
    """A bar for each case and peer."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = [case for case in cases if case["peers"]]
    figure = Figure(figsize=(11, 1 + 0.3 * len(cases)), layout="tight")
    axes = figure.subplots()
    for row, case in enumerate(cases):
        height = 0.8 / len(case["peers"])
        for i, (name, peer) in enumerate(case["peers"].items()):
            axes.barh(row + i * height, peer["ratio"], height, align="edge", color=f"C{peers.index(name)}")
    axes.set_yticks([row + 0.4 for row in range(len(cases))], [case["name"] for case in cases])
    axes.legend([Patch(color=f"C{i}") for i in range(len(peers))], peers)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("peer's time / detops's time")
    figure.savefig(path, dpi=70)


def draw_scaling(report: dict, path: Path) -> bool:
    """Time against size, a panel for each series of cases; False if there is none."""
    from matplotlib.figure import Figure

    series = {}
    for case in report["cases"]:
        if case["series"]:
            series.setdefault(case["series"], []).append(case)
    series = {name: cases for name, cases in series.items() if len(cases) > 1}
    if not series:
        return False
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="tight")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, cases) in zip(panels, series.items(), strict=False):
        for who in dict.fromkeys(["detops", *(peer for case in cases for peer in case["peers"])]):
            timings = [(case["size"], case["detops"] if who == "detops" else case["peers"].get(who)) for case in cases]
            points = [(size, timing["median"]) for size, timing in timings if timing]
            axes.loglog(*zip(*points, strict=True), "-o" if who == "detops" else "--x", label=who)
        axes.set_title(name)
        axes.set_xlabel("size")
        axes.set_ylabel("seconds")
        axes.legend()
    for axes in panels[len(series) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=70)
    return True
