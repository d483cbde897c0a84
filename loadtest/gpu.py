"""What a GPU gives when it is warm and asked by many: ``python -m loadtest.gpu``.

``make bench URL=…`` has the ladder, the peers and a request taken apart. This has the graph alone,
and how much of its rate is left through Triton; on a CPU it measures an embedded server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonrank_server.export import default_model
from tritonrank_server.export.command import export
from tritonrank_server.stages.tokenizer import PairTokenizer

from .anatomy import encode, graph_alone, stages_of, statistics
from .bench import (
    HERE,
    MODELS,
    Contestant,
    commit,
    hardware,
    measure,
    new_repository,
    serving,
    spread,
)
from .contestant import session
from .data import DL19, Request, requests
from .growth import executions
from .limit import GPU, limit
from .own_cost import several_clients

PRECISION = "fp16" if GPU else "int8"
#: Requests of each size that the graph has met before any counts.
VARIETY = 5
#: Of a point: how long it warms up, and is measured.
WARM, SECONDS = 3.0, 6.0
#: They send, so that none of them is the limit.
PROCESSES = 4
Point = dict[str, Any]


def prepared(name: str) -> Path:
    """The folder of a model, made once: its ``checkpoint``, and a ``repository`` that serves it."""
    folder = MODELS / f"{name}-{PRECISION}"
    if not (folder / "repository" / "cross_encoder" / "current").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoint").mkdir(parents=True)
        if name == "default":
            default_model.write_checkpoint(folder / "checkpoint")
        else:
            from . import large

            large.write_checkpoint(name, folder / "checkpoint")
        source = name if name == "default" else str(folder / "checkpoint")
        export(source, PRECISION, new_repository(folder / "repository"))
    return folder


@contextmanager
def sampled() -> Iterator[Point]:
    """How busy the first GPU is meanwhile, ``gpu_percent``, filled in at the end; none, no key."""
    found: Point = {}
    if not shutil.which("nvidia-smi"):
        yield found
        return
    command = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--loop-ms=200"]
    command.append("--format=csv,noheader,nounits")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield found
        finally:
            process.terminate()
        assert process.stdout
        values = [int(line) for line in process.stdout if line.strip().isdigit()]
    if values:
        found["gpu_percent"] = float(np.mean(values))


def alone(folder: Path, every: Sequence[Request], sizes: Sequence[int]) -> dict[str, Any]:
    """The graph without a server, as the server calls it, and the rate of its products alone."""
    current = folder / "repository" / "cross_encoder" / "current"
    tokenizer = PairTokenizer.of(current, 1024)
    precision, score = graph_alone(current, session(current / "model.onnx"))
    texts = cycle([text for each in every for text in each.documents])
    points, lengths = [], []
    for size in sizes:
        work = [encode(tokenizer, every[0].query, [*islice(texts, size)]) for _ in range(VARIETY)]
        for tokens in work:  # Each shape has been met.
            score(tokens)
        seconds = []
        with sampled() as gpu:
            end = time.perf_counter() + SECONDS
            for tokens in cycle(work):
                if (started := time.perf_counter()) > end:
                    break
                score(tokens)
                seconds.append(time.perf_counter() - started)
        median = float(np.median(seconds))
        rate = size / median
        points.append({"documents": size, "ms": 1000 * median, "pairs_per_second": rate, **gpu})
        lengths += [tokens.lengths for tokens in work]
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    mean = round(float(np.mean(np.concatenate(lengths))))
    return {"alone": points, "limit": limit(mean, (precision,), config)}


def under_load(pool: Any, url: str, every: Sequence[Request], clients: int) -> Point:
    """So many clients, each with its next request when the last is answered; after a while."""
    pairs = [(each.query, each.documents) for each in every]
    begin = time.perf_counter() + WARM
    end = begin + SECONDS
    shares = [clients // PROCESSES + (i < clients % PROCESSES) for i in range(PROCESSES)]
    tasks = [(url, pairs[i:] + pairs[:i], share, end) for i, share in enumerate(shares) if share]
    parts = pool.map_async(_send, tasks, chunksize=1)
    time.sleep(max(0.0, begin - time.perf_counter()))
    before, executed = statistics(url), executions(url)
    with sampled() as gpu:
        time.sleep(max(0.0, end - time.perf_counter()))
        after, executed = statistics(url), executions(url) - executed
    try:
        sent = parts.get()
    except RuntimeError as error:
        return {"clients": clients, "left_out": str(error)}
    times = [each for part, _ in sent for each in part]
    latencies = [finish - start for start, finish in times if begin <= finish < end]
    counted = after["reranker"]["count"] > before["reranker"]["count"]
    if not latencies or not counted or not executed:
        return {"clients": clients, "left_out": f"no answer within {SECONDS:g} s"}
    documents = len(latencies) * len(every[0].documents)
    milliseconds = 1000 * np.array(latencies)
    return {
        "clients": clients,
        "requests": len(latencies),
        "pairs_per_second": documents / SECONDS,
        "median_ms": float(np.median(milliseconds)),
        "p99_ms": float(np.quantile(milliseconds, 0.99)),
        "pairs_an_execution": documents / executed,
        "stages": stages_of(before, after, float(np.mean(milliseconds))),
        "busiest_sender": max(busy for _, busy in sent),
        **gpu,
    }


def _send(
    task: tuple[str, list[tuple[str, list[str]]], int, float],
) -> tuple[list[tuple[float, float]], float]:
    """A process's part: when each request was sent and answered, and how much of a core it took."""
    started, cpu = time.perf_counter(), time.process_time()
    try:
        times = asyncio.run(several_clients(*task))
    except grpc.RpcError as error:  # Which no other process can read.
        raise RuntimeError(error.details()) from None
    return times, (time.process_time() - cpu) / (time.perf_counter() - started)


def peers(folder: Path, every: Sequence[Request]) -> dict[str, Any]:
    """sentence-transformers on the same checkpoint, as it is (SDPA) and compiled; warm."""
    own, kind = "sentence-transformers", "torch-fp16" if GPU else "torch"
    rows = [
        Contestant(f"peer:{kind}{more}", "peers", f"{own}, {kind}{more}", own, models=folder)
        for more in ("", "-compiled")
    ]
    left_out = measure(rows, every, warm=True)
    rates = {
        row.label: spread([len(every[0].documents) / seconds for seconds in row.seconds])
        for row in rows
        if row.seconds
    }
    return {"peers": rates, "left_out": left_out}


def main() -> None:
    """Measures each model; writes one JSON file, from which ``report`` makes tables."""
    parser = argparse.ArgumentParser(prog="loadtest.gpu", description=main.__doc__)
    add = parser.add_argument
    names = ["default", "bge-reranker-v2-m3"]
    add("--models", nargs="+", default=names, help="default, or shapes of loadtest.large")
    add("--urls", nargs="+", default=[], help="gRPC addresses of servers here, one a model")
    add("--documents", nargs="+", type=int, default=[1, 10, 100, 256, 800])
    add("--clients", nargs="+", type=int, default=[1, 4, 16, 32, 64])
    add("--queries", type=int, default=8, help="of 100 documents each, over and over")
    add("--prepare", action="store_true", help="only write what a server of each needs")
    name = "gpu" if GPU else "cpu"
    add("--output", type=Path, default=HERE / "results" / "gpu" / f"{name}.json")
    options = parser.parse_args()
    if options.urls and len(options.urls) != len(options.models):
        parser.error("--urls needs one for each of --models")
    folders = {name: prepared(name) for name in options.models}
    for folder in folders.values():
        print(f"Serves it: {folder / 'repository'}", file=sys.stderr)
    if options.prepare:
        return
    every = requests(options.queries)
    result: dict[str, Any] = {
        "hardware": hardware(),
        "commit": commit(),
        "data": "TREC DL 2019, BM25 top 100" if DL19.exists() else "generated text",
        "precision": PRECISION,
        "models": {},
    }
    spawn = multiprocessing.get_context("spawn")  # Since gRPC does not outlive a fork.
    for (name, folder), url in zip(folders.items(), options.urls or [None] * len(folders)):
        found = result["models"][name] = alone(folder, every, options.documents)
        with serving(url, folder / "repository") as address, spawn.Pool(PROCESSES) as pool:
            if address:
                under_load(pool, address, every, max(options.clients))  # It all warms up.
                found["clients"] = [
                    under_load(pool, address, every, clients) for clients in options.clients
                ]
        _write(options.output, result)  # Already, since a GPU may not be there for long.
        found |= peers(folder, every)
        _write(options.output, result)


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
