"""What was measured → the README's figures, the tables of ``RESULTS.md``, and the plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .bench import PADDED, SERVED
from .sweep_report import facts, rates, stages, summary

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- {}: written by loadtest/report.py -->\n", "<!-- end of {} -->\n"
COLOURS = {"ladder": "#2a6f97", "peers": "#adb5bd"}
PEER = "sentence-transformers"
#: How far nDCG@10 may be from FP32's and count as equal.
EQUAL = 0.005
#: What the benchmark wrote of one machine, and of one contestant there.
Result = dict[str, Any]
Row = dict[str, Any]


def figures(results: Iterable[Result]) -> str:
    """The README's four, a column for each machine on which a server was measured."""
    names = [
        "",
        "pairs a second, end to end",
        f"against {PEER}",
        f"against {PADDED}",
        "nDCG@10 on TREC DL 2019 (FP32's)",
    ]
    head, *rows = zip(names, *map(_column, filter(_served, results)))
    return (
        f"{_table(head, rows)}\n\n"
        f"Medians over requests. An nDCG@10 is equal within {EQUAL} of FP32's."
    )


def _served(result: Result) -> Row | None:
    """The row of the server with one client."""
    return next((row for row in result["rows"] if row["label"] == SERVED), None)


def _column(result: Result) -> list[str]:
    rows = {row["label"]: row for row in result["rows"]}
    served = rows[SERVED]
    busiest = max(rows.values(), key=lambda row: (row["table"] == "ladder", row["clients"]))
    return [
        f"{_machine(result)}, {'FP16' if result['hardware']['gpu'] else 'INT8'}",
        f"**{_number(_rate(served))}**, {served['pairs'] // served['requests']} documents in "
        f"{_number(served['latency_ms']['median'])} ms; {_number(_rate(busiest))} with "
        f"{busiest['clients']} clients",
        _against_backends(served, result["rows"]),
        f"**{_times(served, rows[PADDED])}**" if PADDED in rows else "not measured",
        f"**{_quality(served) or 'not measured'}**, {result['queries']} queries",
    ]


def _against_backends(served: Row, rows: Iterable[Row]) -> str:
    """Against the peer's fastest backend of equal nDCG, and its fastest if that is another."""
    backends = sorted((row for row in rows if row["label"].startswith(PEER)), key=_rate)
    equal = [row for row in backends if _loss(row) <= EQUAL][-1:]
    faster = [row for row in backends[-1:] if row not in equal]
    told = [
        f"**{_times(served, row)}** its fastest of equal nDCG@10, {_backend(row)}" for row in equal
    ]
    told += [f"{_times(served, row)} its fastest, {_backend(row)}" for row in faster]
    return "; ".join(told) or "not measured"


def _backend(row: Row) -> str:
    return str(row["label"].removeprefix(f"{PEER}, "))


def _rate(row: Row) -> float:
    return float(row["pairs_per_second"]["median"])


def _times(row: Row, other: Row) -> str:
    return f"{_rate(row) / _rate(other):.1f} ×"


def _loss(row: Row) -> float:
    """How far its nDCG@10 is from FP32's; unknown is too far."""
    if "ndcg_at_10" not in row:
        return math.inf
    return float(abs(row["ndcg_at_10"] - row["ndcg_at_10_of_fp32"]))


def _quality(row: Row) -> str:
    if "ndcg_at_10" not in row:
        return ""
    return f"{row['ndcg_at_10']:.4f} ({row['ndcg_at_10_of_fp32']:.4f})"


def _machine(result: Result) -> str:
    hardware = result["hardware"]
    return str(hardware["gpu"] or f"{hardware['cores']} cores of {hardware['cpu']}")


def markdown(result: Result, name: str) -> str:
    """One machine's tables, with its plots ``NAME.png`` and ``NAME-latency.png``."""
    hardware = result["hardware"]
    cpu = f"{hardware['cores']} cores of {hardware['cpu']} ({', '.join(hardware['instructions'])})"
    machine = f"{hardware['gpu']}, {cpu}" if hardware["gpu"] else cpu
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    parts = [
        f"### {_machine(result)}",
        f"{machine}, {result['data']}, {result['queries']} queries, with "
        f"{versions}, commit {result['commit']}. Medians over requests, and from the slowest to "
        "the fastest. Rows of fewer pairs had fewer requests, and so no nDCG. "
        'Errors are against the row "packed".',
        f"![Pairs a second](results/{name}.png)",
        _rates("step", [row for row in result["rows"] if row["table"] == "ladder"]),
        _rates("peer", [row for row in result["rows"] if row["table"] == "peers"]),
        f"![Latency against throughput](results/{name}-latency.png)",
    ]
    of_rows = {f"{name} {v}" for row in result["rows"] for name, v in row["versions"].items()}
    parts.append(", ".join(sorted(of_rows)) + ".")
    if result["left_out"]:
        parts.append("Left out: " + "; ".join(result["left_out"]) + ".")
    parts += [_limit(result["limit"])] if "limit" in result else []
    parts += _anatomy(result["anatomy"]) if "anatomy" in result else []
    parts += _growth(result["growth"]) if "growth" in result else []
    parts += _delay(result["queue_delay"]) if "queue_delay" in result else []
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _rates(first: str, rows: list[Row]) -> str:
    head = [first, "pairs/s", "pairs", "nDCG@10 (FP32's)", "largest logit error"]
    lines = []
    for row in rows:
        rate = {name: _number(value) for name, value in row["pairs_per_second"].items()}
        spread = f"**{rate['median']}** ({rate['min']}–{rate['max']})"
        error = f"{row['largest_logit_error']:.2g}"
        lines.append([row["label"], spread, row["pairs"], _quality(row), error])
    return _table(head, lines)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _anatomy(anatomy: dict[str, Any]) -> list[str]:
    tokenizer, single = anatomy["tokenizer"], anatomy["single_document"]
    stages = [(stage, f"{ms:.1f}") for stage, ms in anatomy["stages"].items()]
    return [
        f"A request of {anatomy['documents']} documents takes {_number(anatomy['request_ms'])} ms "
        "with one client; the graph alone, by turns in another process, "
        f"{_number(anatomy['graph_ms'])} ms "
        f"(medians). By Triton's own statistics, {100 * anatomy['overhead']:.1f} % of it is spent "
        "outside the scorer's stage (means):",
        _table(["where the time goes", "ms"], stages),
        f"- The tokenizer stage has {tokenizer['share_of_bare_rate']:.2g} × the rate of a bare "
        "batch call of `tokenizers` over the same documents (median of the ratios).\n"
        f"- A lone document takes {single['triton_ms']:.1f} ms through Triton, and "
        f"{single['direct_ms']:.1f} ms when ONNX Runtime is called directly: "
        f"{single['more_ms']:+.1f} ms (median of the differences).\n"
        f"{_limit(anatomy['limit'])}\n"
        f"- Padded to the longest of each request, {100 * anatomy['real_tokens']:.0f} % of the "
        "places would be real tokens; here all are.",
    ]


def _limit(limit: dict[str, Any]) -> str:
    rates = [
        f"at {limit[f'{precision}_gflop_per_second']:.0f} GFLOP/s in {precision.upper()}, "
        f"{limit[f'{precision}_pairs_per_second']:.0f} pairs/s"
        for precision in ("fp32", "fp16", "int8")
        if f"{precision}_pairs_per_second" in limit
    ]
    return (
        "- The limit of ONNX Runtime's own products, not of the processor's instructions: those of "
        f"a pair of {limit['tokens']:.0f} tokens by all layers' weights are {limit['gflop']:.1f} "
        "GFLOP. One after another, with nothing between them, they run "
        f"{', and '.join(rates)}. The whole reaches {100 * limit['reached']:.0f} % "
        "of the latter, though it leaves out most of the last layer's."
    )


def _growth(growth: dict[str, list[dict[str, Any]]]) -> list[str]:
    head = ["documents", "longest", "tokens", "places if padded", "ms", "µs a token"]
    keys = ("documents", "longest", "tokens", "places_padded_to_longest", "ms", "us_a_token")
    points = [*growth["documents"], *growth["lengths"]]
    of_clients = [
        "clients",
        "requests",
        "refused",
        "executions",
        "pairs/s",
        "median ms",
        "largest ms",
    ]
    names: tuple[str, ...] = ("clients", "requests", "refused", "executions")
    names += ("pairs_per_second", "median_ms", "largest_ms")
    clients = [[_figure(point[key]) for key in names] for point in growth["clients"]]
    return [
        "Cost as work grows, medians of three turns: first more documents, as they come; then 10 "
        "documents, ever longer; last one long document among 99 short ones. Places are the tokens "
        "that a batch padded to its longest document would have.",
        _table(head, [[_figure(point[key]) for key in keys] for point in points]),
        "Clients at a time, with requests of 10 documents, and how many executions they share. "
        "What the server refuses is tried again by the client.",
        _table(of_clients, clients),
    ]


def _delay(points: list[dict[str, Any]]) -> list[str]:
    head = ["queue delay, ms", "clients", "executions", "pairs/s", "median ms"]
    keys = ("clients", "executions", "pairs_per_second", "median_ms")
    rows = [
        [_figure(point["max_queue_delay_us"] // 1000), *(_figure(point[key]) for key in keys)]
        for point in points
    ]
    return ["What a queue delay buys on this machine, median of three turns:", _table(head, rows)]


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else _number(value)


def plot_rates(result: Result, path: Path) -> None:
    """Bars of pairs a second, the steps above the peers."""
    rows = result["rows"][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(rows) + 1), layout="constrained")
    _bars(axes, rows)
    axes.set_xlabel("query–document pairs a second (median)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_overview(results: Iterable[Result], path: Path) -> None:
    """For the README: on each machine the server among the peers, all with one client."""
    results = list(filter(_served, results))
    figure, every = pyplot.subplots(
        1, len(results), figsize=(6 * len(results), 3.6), squeeze=False, layout="constrained"
    )
    for axes, result in zip(every.flat, results):
        rows = [row for row in result["rows"] if row["table"] == "peers" and row["clients"] == 1]
        served = dict(_served(result) or {}, label="tritonrank, through Triton")
        _bars(axes, sorted([*rows, served], key=_rate))
        axes.set_title(_machine(result), fontsize=10)
    figure.supxlabel("query–document pairs a second, one client (median)", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    rates = [_rate(row) for row in rows]
    colours = [COLOURS[row["table"]] for row in rows]
    bars = axes.barh([row["label"] for row in rows], rates, color=colours)
    axes.bar_label(bars, [_number(rate) for rate in rates], padding=3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_latencies(result: Result, path: Path) -> None:
    """A number for each way that took most requests: its throughput, and a request's latency."""
    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    most = max(row["requests"] for row in result["rows"])
    rows = [row for row in result["rows"] if 2 * row["requests"] > most]
    for number, row in enumerate(rows, 1):
        x, y = row["pairs_per_second"]["median"], row["latency_ms"]["median"]
        axes.scatter(x, y, color=COLOURS[row["table"]], label=f"{number}  {row['label']}")
        axes.annotate(str(number), (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("pairs a second (median)")
    axes.set_ylabel("ms for a request (median)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, handlelength=0, markerscale=0.6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(machines: dict[str, Result], folder: Path) -> None:
    """The plots of the benchmark."""
    plot_overview(machines.values(), folder / "overview.png")
    for name, result in machines.items():
        plot_rates(result, folder / f"{name}.png")
        plot_latencies(result, folder / f"{name}-latency.png")


def benchmark(machines: dict[str, Result]) -> str:
    """Of each machine."""
    parts = [markdown(result, name) for name, result in machines.items()]
    if not any(result["hardware"]["gpu"] for result in machines.values()):
        parts.append("GPU: not measured.")
    return "\n\n".join(parts)


def load_tests(folder: Path) -> str:
    """Of each folder in there that a sweep wrote."""
    parts = []
    for path in sorted(folder.glob("*/load.json")):
        result, name = json.loads(path.read_text()), path.parent.name
        parts += [f"### {name}", f"`--workload {result['workload']}`. {facts(result)}"]
        if result["closed_loop"]:  # Else the rates are those of a soak, and nothing to plot.
            parts += [summary(result), f"![Latency and throughput](results/{name}/load.png)"]
        parts += [_table(*rates(result)), _table(*stages(result))]
    return "\n\n".join(parts)


def gpu(folder: Path) -> str:
    """The graph alone, and how much of its rate is left under load, on each machine."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu/*.json"))]
    return "\n\n".join(map(_under_load, results)) or "Not measured."


def _under_load(result: Result) -> str:
    parts = [
        f"### {_machine(result)}, under load",
        f"{result['precision'].upper()}, {result['data']}, commit {result['commit']}.",
    ]
    for name, model in result["models"].items():
        limit = model["limit"][f"{result['precision']}_pairs_per_second"]
        best = max(point["pairs_per_second"] for point in model["alone"])
        alone = [
            [point["documents"], _number(point["ms"]), *_shares(point, limit)]
            for point in model["alone"]
        ]
        parts += [
            f"{name}, the graph alone; the limit is ONNX Runtime's products', {_number(limit)} "
            f"pairs/s of {model['limit']['tokens']:.0f} tokens:",
            _table(["documents", "ms", "pairs/s", "of the limit", "GPU busy"], alone),
        ]
        every, left_out = model.get("clients", []), model.get("left_out", [])
        points = [point for point in every if "left_out" not in point]
        if points:
            head = ["clients", "pairs/s", "of the limit", "GPU busy", "of the graph's best"]
            head += ["median ms", "99 % within ms", "pairs an execution", *points[0]["stages"]]
            rows = [_loaded(point, limit, best) for point in points]
            parts += [
                "Through Triton, requests of 100 documents; the last columns are where a request's "
                "mean time goes, in ms, and how much of a core the busiest of the sending "
                "processes took:",
                _table([*head, "sender"], rows),
            ]
        rates = [[label, _number(rate["median"])] for label, rate in model.get("peers", {}).items()]
        parts += [_table(["peer, one client", "pairs/s"], rates)] if rates else []
        left_out = [
            *(f"{p['clients']} clients: {p['left_out']}" for p in every if p not in points),
            *left_out,
        ]
        parts += ["Left out: " + "; ".join(left_out) + "."] if left_out else []
    return "\n\n".join(parts)


def _shares(point: Row, limit: float) -> list[str]:
    rate = point["pairs_per_second"]
    busy = f"{point['gpu_percent']:.0f} %" if "gpu_percent" in point else ""
    return [_number(rate), f"{100 * rate / limit:.0f} %", busy]


def _loaded(point: Row, limit: float, best: float) -> list[object]:
    of_best = f"{100 * point['pairs_per_second'] / best:.0f} %"
    times = [point["median_ms"], point["p99_ms"], point["pairs_an_execution"]]
    times += point["stages"].values()
    sender = f"{100 * point['busiest_sender']:.0f} %"
    return [point["clients"], *_shares(point, limit), of_best, *map(_number, times), sender]


def replicas(result: Result) -> str:
    """Of each way to reach several servers."""
    hardware = result["hardware"]
    head = ["meanwhile", "requests", "failed or wrong", "p50 ms", "p95 ms", "slowest ms", "shares"]
    parts = [
        f"{hardware['cores']} cores of {hardware['cpu']} for all servers and the load generator, "
        f"commit {result['commit']}. Clients that wait for each answer, 10 documents a request, "
        f"{result['seconds']:g} s where nothing is done."
    ]
    for way, phases in result["ways"].items():
        rows = []
        for phase in phases:
            failures = ", ".join(f"{n} {kind}" for kind, n in phase["failures"].items()) or "none"
            times = [f"{phase[name]:.0f}" for name in ("p50_ms", "p95_ms", "slowest_ms")]
            shares = " ".join(f"{share:.2f}" for share in phase["shares"])
            rows.append([phase["name"], phase["requests"], failures, *times, shares])
        parts += [f"Through {way}:", _table(head, rows)]
    return "\n\n".join(parts)


def memory(folder: Path) -> str:
    """Of each export that was measured."""
    head = ["", "graph", "export's peak", "served", "under load", "of 1.3 × the graph + 400 MB"]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("memory/*.json"))]
    rows = [
        (
            f"{Path(result['checkpoint']).name}, {result['precision'].upper()}",
            f"{result['graph'] / 1e6:.0f} MB",
            f"{result['export_peak'] / result['fp32']:.1f} × FP32's {result['fp32'] / 1e9:.1f} GB"
            if "fp32" in result
            else "not measured",
            f"{sum(size for _, size in result['started']) / 1e6:.0f} MB",
            f"{result['most_total'] / 1e6:.0f} MB",
            f"{result['share_of_bound']:.2f}, {result['hardware']['cores']} cores",
        )
        for result in results
    ]
    return _table(head, rows)


def own_cost(folder: Path) -> str:
    """What the ensemble costs beside the graph, on each machine that it was measured on."""
    head = ["documents", "clients", "requests/s", "median ms", "99 % within ms", "largest ms"]
    keys = ("documents", "clients", "requests_per_second", "median_ms", "p99_ms", "largest_ms")
    parts = []
    for path in sorted(folder.glob("own-cost/*.json")):
        result = json.loads(path.read_text())
        parts.append(f"{_machine(result)}, commit {result['commit']}:")
        points = [[_figure(point[key]) for key in keys] for point in result["points"]]
        parts.append(_table(head, points))
    return "\n\n".join(parts)


def gateway(folder: Path) -> str:
    """What the HTTP gateway costs, on each machine that it was measured on."""
    head = ["", "by gRPC", "through the gateway", "added", "a process carries"]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("gateway/*.json"))]
    rows = [
        (
            _machine(result),
            f"{result['grpc_ms']:.1f} ms",
            f"{result['gateway_ms']:.1f} ms",
            f"{result['added_ms']:.1f} ms",
            f"{result['requests_per_second']:.0f} requests/s",
        )
        for result in results
    ]
    return _table(head, rows)


def passages(result: Result) -> str:
    """How well long documents are ranked in passages, and what that costs."""
    chosen_on, judged_on = result["chosen_on"], result["judged_on"]
    head = ["", "right", "by fifths", "MRR", "MRR, more", "logit lost", "logit, more", "read"]
    return "\n\n".join(
        [
            f"{_machine(result)}, INT8, commit {result['commit']}. To choose on:",
            _table(head, map(_planted, chosen_on)),
            "![Right pairs by depth](results/passages/cpu.png)",
            "To judge on, once:",
            _table(head, map(_planted, judged_on)),
            "Time, medians of requests by turns:",
            _table(
                ["model", "documents", "tokens", "ms", "tokens, ×", "ms, ×", "ms / tokens, ×"],
                [row for model, rows in result["cost"].items() for row in _costs(model, rows)],
            ),
        ]
    )


def _planted(row: Row) -> list[str]:
    return [
        _reading(row),
        f"{row['right']} of {row['pairs']}",
        " ".join(f"{share:.2f}" for share in row["right_by_fifth"]),
        f"{row['mrr']:.2f}",
        _more(row["more_mrr"]),
        f"{row['median_lost']:.1f}",
        _more(row["more_logit"]),
        f"{row['read']:.2f} ×",
    ]


def _reading(row: Row) -> str:
    if row["passages"] == 1:
        return "cut at 512"
    shortest = "as long as fit" if row["shortest"] == 1 else f"{row['shortest']:g} of it"
    most = f", {row['passages']} at most" if row["passages"] else ""
    return f"{shortest}, overlap {row['overlap']:g}, near {row['near']:g}{most}"


def _more(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _costs(model: str, rows: Sequence[Row]) -> list[list[str]]:
    """Against the first of them."""
    found = []
    for row in rows:
        tokens, ms = (row[name] / rows[0][name] for name in ("tokens", "ms"))
        times = [f"{tokens:.2f}", f"{ms:.2f}", f"{ms / tokens:.2f}"]
        found.append([model, row["way"], str(row["tokens"]), f"{row['ms']:.0f}", *times])
    return found


def plot_passages(result: Result, path: Path) -> None:
    """The share of pairs ranked right by where the answer stands, of a few ways to read."""
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    first = result["chosen_on"][0]  # Cut, with the overlap of what is chosen.
    for row in result["chosen_on"]:
        if (row["overlap"], row["near"]) == (first["overlap"], first["near"]):
            shares = row["right_by_fifth"]
            depths = [(i + 0.5) / len(shares) for i in range(len(shares))]
            axes.plot(depths, shares, marker="o", label=_reading(row))
    axes.set_xlabel("where the answer stands in the document")
    axes.set_ylabel("pairs ranked right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(path: Path, name: str, block: str) -> None:
    """Puts the block between the two marks of that name in the file.

    Raises:
        SystemExit: there are no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text, found = pattern.subn(lambda _: f"{begin}{block}\n{end}", path.read_text())
    if not found:
        raise SystemExit(f"no line {begin.strip()} in {path}")
    path.write_text(text)


def main(root: Path = ROOT) -> None:
    """Writes a checkout's tables between their marks, and the plots beside the results."""
    folder = root / "loadtest" / "results"
    machines = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    draw(machines, folder)
    write(root / "README.md", "figures", figures(machines.values()))
    write(root / "loadtest" / "RESULTS.md", "benchmark", benchmark(machines))
    write(root / "loadtest" / "RESULTS.md", "gpu", gpu(folder))
    write(root / "loadtest" / "RESULTS.md", "load", load_tests(folder))
    write(root / "loadtest" / "RESULTS.md", "memory", memory(folder))
    write(root / "loadtest" / "RESULTS.md", "own cost", own_cost(folder))
    write(root / "loadtest" / "RESULTS.md", "gateway", gateway(folder))
    long = json.loads((folder / "passages" / "cpu.json").read_text())
    plot_passages(long, folder / "passages" / "cpu.png")
    write(root / "loadtest" / "RESULTS.md", "passages", passages(long))
    several = json.loads((folder / "replicas" / "replicas.json").read_text())
    write(root / "docker" / "README.md", "replicas", replicas(several))


if __name__ == "__main__":
    main()
