"""The benchmark's JSON → the README's tables, and their plot."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmark: written by loadtest/report.py -->\n", "<!-- end of benchmark -->\n"
COLOURS = {"ladder": "#2a6f97", "peers": "#adb5bd"}


def markdown(result: dict[str, Any]) -> str:
    """Both tables, and what they were measured on."""
    hardware = result["hardware"]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    parts = [
        f"{result['data']}, {result['queries']} queries, on {hardware['cores']} cores of "
        f"{hardware['cpu']} ({', '.join(hardware['instructions']) or 'no AVX2'}), with {versions}, "
        f"commit {result['commit']}. Medians over requests, and from the slowest to the fastest.",
        _table("step", [row for row in result["rows"] if row["table"] == "ladder"]),
        _table("peer", [row for row in result["rows"] if row["table"] == "peers"]),
    ]
    if result["left_out"]:
        parts.append("Left out: " + "; ".join(result["left_out"]) + ".")
    parts.append("GPU: not measured.")
    return "\n\n".join(parts) + "\n"


def _table(first: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {first} | pairs/s | pairs | nDCG@10 (FP32's) | largest logit error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rate = {name: _rate(value) for name, value in row["pairs_per_second"].items()}
        quality = ""
        if "ndcg_at_10" in row:
            quality = f"{row['ndcg_at_10']:.4f} ({row['ndcg_at_10_of_fp32']:.4f})"
        lines.append(
            f"| {row['label']} | **{rate['median']}** ({rate['min']}–{rate['max']}) "
            f"| {row['pairs']} | {quality} | {row['largest_logit_error']:.2g} |"
        )
    return "\n".join(lines)


def _rate(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of pairs a second, the steps above the peers."""
    rows = result["rows"][::-1]
    rates = [row["pairs_per_second"]["median"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 1), layout="constrained")
    bars = axes.barh(
        [row["label"] for row in rows], rates, color=[COLOURS[row["table"]] for row in rows]
    )
    axes.bar_label(bars, [_rate(rate) for rate in rates], padding=3)
    axes.set_xlabel("query–document pairs a second (median)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Writes the tables between the README's two marks, and the plot beside the JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    result = json.loads(path.read_text())
    plot(result, path.with_suffix(".png"))
    block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text, found = block.subn(lambda _: BEGIN + markdown(result) + END, README.read_text())
    if not found:
        raise SystemExit(f"no line {BEGIN.strip()} in {README}")
    README.write_text(text)


if __name__ == "__main__":
    main()
