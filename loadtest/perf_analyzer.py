"""A workload as perf_analyzer reads it: ``python -m loadtest.perf_analyzer [WORKLOAD] > FILE``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from .workloads import WORKLOADS, Request, stream


def main() -> None:
    """Prints requests for ``perf_analyzer --input-data``, which sends them over and over."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    names = ", ".join(WORKLOADS)
    parser.add_argument("workload", nargs="?", default="search", help=f"{names}, or a JSONL file")
    parser.add_argument("--requests", type=int, default=50, help="how many")
    arguments = parser.parse_args()
    requests = islice(stream(arguments.workload), arguments.requests)
    print(json.dumps({"data": list(map(_inputs, requests))}, ensure_ascii=False))


def _inputs(request: Request) -> dict[str, Any]:
    columns: dict[str, Sequence[object]] = {
        "QUERY": [request.query],
        "DOCUMENTS": request.documents,
    }
    if request.max_passages is not None:
        columns["MAX_PASSAGES"] = [request.max_passages]
    return {name: {"content": each, "shape": [len(each)]} for name, each in columns.items()}


if __name__ == "__main__":
    main()
