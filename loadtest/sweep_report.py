"""A load test's result → tables, plots and one HTML page."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PERCENTILES = {"p50_ms": "#74a892", "p95_ms": "#2a6f97", "p99_ms": "#c7522a"}
STAGES = {"tokenizer": "#74a892", "cross_encoder": "#2a6f97", "sorter": "#c7522a"}
#: Its head, and its rows.
Table = tuple[list[str], list[list[str]]]

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Load test: {workload}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
tr.missed {{ color: #b00020 }} tr.knee {{ font-weight: 600 }}
img {{ max-width: 100% }}
</style>
<h1>Load test: {workload}</h1>
<p>{summary}</p>
<p>{facts}</p>
<img alt="Latency and throughput against offered load" src="data:image/png;base64,{load}">
{rates}
<h2>Where the time goes</h2>
<img alt="Queue and compute time by stage" src="data:image/png;base64,{bars}">
{times}
</html>
"""


def summary(result: dict[str, Any]) -> str:
    """The knee, and what was asked of it, in a sentence or two."""
    limits = result["limits"]
    asked = f"at most {100 * limits['error_rate']:g} % failures"
    if limits["p95_ms"] is not None:
        asked += f", and 95 % of the answers within {limits['p95_ms']:.0f} ms"
    if result["knee"] is None:
        return f"The lowest rate did not hold the limits: {asked}."
    knee = result["steps"][result["knee"]]
    return (
        f"The knee, the highest rate with {asked}: {knee['rate']:.2f} requests/s, "
        f"{knee['documents']:.0f} documents/s, {knee['tokens']:.0f} tokens/s."
    )


def facts(result: dict[str, Any]) -> str:
    """The machine, and what was run."""
    machine = result["hardware"]
    where = f"Server: {result['server']}. Load generator: {machine['cores']} cores"
    longer = ", twice that after the knee" if result["closed_loop"] else ""
    return (
        f"{where} of {machine['cpu']} ({', '.join(machine['instructions'])}), commit "
        f"{result['commit']}; {result['seconds']:g} s of each rate{longer}; Poisson arrivals, the "
        f"client's timeout {result['timeout']:g} s."
    )


def rates(result: dict[str, Any]) -> Table:
    """A row for each step."""
    head = ["step", "rate/s", "came/s", "answered/s", "requests", "p50 ms", "p95 ms", "p99 ms"]
    head += ["documents/s", "failures", "slowest failure, ms"]
    rows = [
        [
            step["name"],
            *(f"{step[key]:.2f}" for key in ("rate", "offered", "answered")),
            str(step["requests"]),
            *("" if step[key] is None else f"{step[key]:.0f}" for key in PERCENTILES),
            f"{step['documents']:.0f}",
            ", ".join(f"{count} {name}" for name, count in step["errors"].items()) or "none",
            f"{step['slowest_error_ms']:.0f}" if step["errors"] else "",
        ]
        for step in result["steps"]
    ]
    return head, rows


def stages(result: dict[str, Any]) -> Table:
    """Queue and compute time by stage, batch sizes and memory, a row for each step."""
    head = ["step", "rate/s"]
    head += [f"{stage}: {part}, ms" for stage in STAGES for part in ("queue", "compute")]
    head += ["requests an execution", "documents an execution"]
    memory = list(result["steps"][0]["memory_mb"])
    head += [f"{what}, MB" for what in memory]
    rows = []
    for step in result["steps"]:
        times = [step[f"{part}_ms"][stage] for stage in STAGES for part in ("queue", "compute")]
        batches = [step["requests_per_execution"], step["documents_per_execution"]]
        figures = [*(f"{ms:.1f}" for ms in times), *(f"{size:.1f}" for size in batches)]
        figures += [f"{step['memory_mb'][what]:.0f}" for what in memory]
        rows.append([step["name"], f"{step['rate']:.2f}", *figures])
    return head, rows


def _html(table: Table, result: dict[str, Any]) -> str:
    head, rows = table
    lines = [_row("th", head, "")]
    for number, row in enumerate(rows):
        held = "knee" if number == result["knee"] else "" if result["held"][number] else "missed"
        lines.append(_row("td", row, held))
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _row(tag: str, cells: Iterable[str], name: str) -> str:
    inside = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{name}">{inside}</tr>'


def plot_load(result: dict[str, Any], path: Path) -> None:
    """Latency percentiles and throughput against offered load, the knee marked."""
    steps = [step for step in result["steps"] if step["name"] in ("rising", "overload")]
    rates = [step["rate"] for step in steps]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 7), layout="constrained"
    )
    for key, colour in PERCENTILES.items():
        above.plot(
            rates, [step[key] or float("nan") for step in steps], "o-", label=key[:3], color=colour
        )
    above.set(ylabel="response time, ms", yscale="log")
    below.plot(rates, [step["offered"] for step in steps], "o:", color="#adb5bd", label="came")
    below.plot(rates, [step["answered"] for step in steps], "o-", label="answered")
    below.set(xlabel="requests/s offered", ylabel="requests/s", ylim=(0, None))
    for axes in (above, below):
        if result["knee"] is not None:
            axes.axvline(
                result["steps"][result["knee"]]["offered"], color="k", lw=0.8, label="knee"
            )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_stages(result: dict[str, Any], path: Path) -> None:
    """Bars of a request's queue and compute time by stage, one for each step."""
    steps = result["steps"]
    names = [f"{step['name']}\n{step['rate']:.2f}/s" for step in steps]
    figure, axes = pyplot.subplots(figsize=(max(7, 1.2 * len(steps)), 4), layout="constrained")
    bottom = [0.0] * len(steps)
    for stage, colour in STAGES.items():
        for part, hatch in (("queue", "//"), ("compute", "")):
            times = [step[f"{part}_ms"][stage] for step in steps]
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.bar(range(len(steps)), times, bottom=bottom, label=f"{stage}: {part}", **style)
            bottom = [low + ms for low, ms in zip(bottom, times)]
    axes.set_xticks(range(len(steps)), names, fontsize=8)
    axes.set_ylabel("ms of an answered request (mean)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Writes ``load.json``, ``load.html``, ``load.png``, ``bars.png``; gives the page's path."""
    (folder / "load.json").write_text(json.dumps(result, indent=2) + "\n")
    pictures = {"load": plot_load, "bars": plot_stages}
    inline = {}
    for name, plot in pictures.items():
        path = folder / f"{name}.png"
        plot(result, path)
        inline[name] = base64.b64encode(path.read_bytes()).decode()
    page = folder / "load.html"
    page.write_text(
        PAGE.format(
            workload=escape(result["workload"]),
            summary=escape(summary(result)),
            facts=escape(facts(result)),
            rates=_html(rates(result), result),
            times=_html(stages(result), result),
            **inline,
        ),
        "utf-8",
    )
    return page
