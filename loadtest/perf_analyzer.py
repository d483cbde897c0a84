"""A workload as perf_analyzer reads it: ``python -m loadtest.perf_analyzer [WORKLOAD] > FILE``."""

from __future__ import annotations

import argparse
import json
from itertools import islice

from .workloads import WORKLOADS, stream


def main() -> None:
    """Prints requests for ``perf_analyzer --input-data``, which sends them over and over."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    names = ", ".join(WORKLOADS)
    parser.add_argument("workload", nargs="?", default="search", help=f"{names}, or a JSONL file")
    parser.add_argument("--requests", type=int, default=50, help="how many")
    arguments = parser.parse_args()
    data = [
        {
            "QUERY": {"content": [query], "shape": [1]},
            "DOCUMENTS": {"content": documents, "shape": [len(documents)]},
        }
        for query, documents in islice(stream(arguments.workload), arguments.requests)
    ]
    print(json.dumps({"data": data}, ensure_ascii=False))


if __name__ == "__main__":
    main()
