"""What a served export takes of memory: ``python -m loadtest.memory``, into ``results/memory``."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from tritonrank import RerankClient
from tritonrank_server.serving.serve import EmbeddedServer, Settings

from .bench import HERE, commit, hardware
from .data import Request, requests

RESULTS = HERE / "results" / "memory"
#: What a server may take: so many times the bytes of its graph, and so many bytes.
TIMES, BESIDES = 1.3, 400e6
#: Longer than any model reads.
LONG = 10_000
#: How often memory is looked at under load, in seconds.
INTERVAL = 0.2

#: Bytes of each process, with the model it belongs to; see ``by_process``.
Processes = list[tuple[str, int]]


def by_process(pid: int) -> Processes:
    """Proportional set sizes of a ``tritonserver`` and of its Python backend's processes.

    A page that several processes have counts as a share in each, so that their sum is memory.
    """
    server = psutil.Process(pid)
    stubs = [(Path(each.cmdline()[1]).parts[-3], each) for each in server.children(recursive=True)]
    return [
        (name, each.memory_full_info().pss) for name, each in [("tritonserver", server), *stubs]
    ]


def total(processes: Processes) -> int:
    """Their sum."""
    return sum(size for _, size in processes)


def graph_bytes(export: Path) -> int:
    """Bytes of an export's graph with its weights."""
    return sum(path.stat().st_size for path in export.glob("model.onnx*"))


def load(url: str, every: Sequence[Request]) -> None:
    """One short document, then 100 of each request, then documents beyond the model's length."""
    long = " ".join(every[0].documents)[:LONG]
    work = [(each.query, each.documents) for each in every]
    work += [(each.query, [long] * 8) for each in every]
    with RerankClient(url, timeout=3600) as client, ThreadPoolExecutor(4) as pool:
        client.rank(every[0].query, every[0].documents[:1])
        list(pool.map(lambda request: client.rank(*request), work))


@contextmanager
def largest(pid: int) -> Iterator[Processes]:
    """What a server takes at the moment of the block when it takes most; filled in at its end."""
    found = by_process(pid)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(INTERVAL):
            now = by_process(pid)
            if total(now) > total(found):
                found[:] = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        finished.set()
        watcher.join()


def memory(repository: Path) -> dict[str, Any]:
    """Serves a repository's export, and measures it before and under load, in bytes."""
    export = (repository / "cross_encoder" / "current").resolve()
    settings = Settings(repository, grpc_port=0, http_port=0, metrics_port=0)
    with EmbeddedServer(settings) as server:
        started = by_process(server.pid)
        with largest(server.pid) as most:
            load(server.grpc_url, requests(4))
    size = graph_bytes(export)
    facts = json.loads((export / "export.json").read_text())
    return {
        "checkpoint": facts["checkpoint"],
        "precision": facts["precision"],
        "graph": size,
        "started": started,
        "most": most,
        "most_total": total(most),
        "bound": TIMES * size + BESIDES,
        "share_of_bound": total(most) / (TIMES * size + BESIDES),
        "hardware": hardware(),
        "commit": commit(),
    }


def main() -> None:
    """Measures an export."""
    parser = argparse.ArgumentParser(prog="loadtest.memory", description=__doc__)
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    show(memory(parser.parse_args().model_repository))


def show(result: dict[str, Any]) -> None:
    """Prints it, and writes a file by the name of its checkpoint."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    output = RESULTS / f"{Path(result['checkpoint']).name}-{result['precision']}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['checkpoint']} {result['precision']}: graph {result['graph'] / 1e6:.0f} MB, "
        f"{total(result['started']) / 1e6:.0f} MB at start, {result['most_total'] / 1e6:.0f} MB "
        f"under load, {result['share_of_bound']:.2f} of {TIMES} × the graph + "
        f"{BESIDES / 1e6:.0f} MB. Wrote {output}"
    )


if __name__ == "__main__":
    main()
