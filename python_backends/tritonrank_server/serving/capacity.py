"""``tritonrank capacity``: how many servers a load needs, from what one was measured to take."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

MEASURE = "make loadtest URL=HOST:8001 ARGS='--workload search'"


def servers(
    requests: float, documents: float, tokens: float, measured: float, utilisation: float
) -> float:
    """The servers that a load keeps busy for ``utilisation`` of the time; not rounded.

    A server's work is tokens: every real one passes through the model once, and nothing else does.
    So offered tokens a second, over those that one server takes, is the number that would be busy
    all the time (Erlang's offered load); the rest is for waiting times, which grow without bound as
    utilisation nears 1.

    Args:
        requests: a second, at the peak.
        documents: of a request.
        tokens: of a query with one document.
        measured: tokens a second at one server's knee.
        utilisation: of each server at that peak, above 0 and below 1.
    """
    return requests * documents * tokens / (measured * utilisation)


def main(argv: list[str] | None = None) -> int:
    """Prints how many, and what that rests on; gives 1 where there is no measurement."""
    parser = argparse.ArgumentParser(
        prog="tritonrank capacity",
        description="How many servers a load needs, from a load test of one such server.",
        epilog=f"A load test of a server, on the GPU that it will have: {MEASURE}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("report", type=Path, help="load.json of the load test")
    parser.add_argument("--requests", type=_positive, required=True, help="a second, at the peak")
    parser.add_argument("--documents", type=_positive, default=100.0, help="of a request")
    parser.add_argument(
        "--tokens", type=_positive, help="of a query with a document; default: as in the load test"
    )
    parser.add_argument("--utilisation", type=_share, default=0.7, help="of each server's knee")
    parser.add_argument("--spare", type=_count, default=1, help="that may be down at the peak")
    arguments = parser.parse_args(argv)
    try:
        report = json.loads(arguments.report.read_text())
        knee = report["steps"][report["knee"]]
        measured, rate, p95 = (float(knee[name]) for name in ("tokens", "documents", "p95_ms"))
        if not (0 < measured < math.inf and 0 < rate < math.inf):
            raise ValueError("no throughput")
        origin = (
            f"server: {report['server']}, load generator: {report['hardware']['cpu']}, "
            f"commit {report['commit']}, --workload {report['workload']}"
        )
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        print(
            f"tritonrank: {arguments.report} has no knee of a server: measure one with {MEASURE}",
            file=sys.stderr,
        )
        return 1
    tokens = arguments.tokens or measured / rate
    needed = servers(
        arguments.requests, arguments.documents, tokens, measured, arguments.utilisation
    )
    print(
        f"{math.ceil(needed) + arguments.spare} servers: {needed:.2f} for "
        f"{arguments.requests:g} requests/s of {arguments.documents:g} documents of {tokens:.0f} "
        f"tokens, and {arguments.spare} to spare\n"
        f"measured: {measured:.0f} tokens/s at the knee, {rate:.0f} documents/s, p95 {p95:.0f} ms\n"
        f"{origin}\n"
        f"assumed: {arguments.utilisation:.0%} of the knee's load on each server, requests spread "
        "evenly, and work that grows with tokens alone, which a longer document's attention exceeds"
    )
    return 0


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1e12, "a number above 0")


def _share(text: str) -> float:
    return _number(
        text, lambda value: 0.01 <= value < 1, "a share from 0.01 to below 1, such as 0.7"
    )


def _count(text: str) -> int:
    return int(_number(text, lambda value: value >= 0 and value.is_integer(), "0, 1, 2 …"))


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value
