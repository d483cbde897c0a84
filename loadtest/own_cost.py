"""What the ensemble itself costs: ``python -m loadtest.own_cost``, into ``results/own-cost``.

It is what an embedded server takes with a graph that computes nothing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import onnx
from onnx import parser
from tritonrank import RerankClient, protocol
from tritonrank_server.export.publish import use
from tritonrank_server.serving.serve import EmbeddedServer, Settings

from .bench import HERE, MODELS, commit, hardware, prepare
from .data import DL19, Request, requests
from .limit import GPU

#: Of the graph's inputs and outputs, and nothing between them: a document's logit is its length.
IDLE = """
<ir_version: 8, opset_import: ["": 17]>
idle (int32[tokens] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)
  => (float[n, 1] logits, float[n, 1] scores)
{ logits = Cast <to = 1> (lengths)
  scores = Sigmoid (logits) }
"""
SHORT = ("green tea", ["a short document of a few words"])
CLIENTS = (1, 16)
#: Requests before any that count, and seconds of each measurement.
WARM_UP, SECONDS = 50, 10.0

Point = dict[str, Any]


def own_cost(repository: Path, every: Sequence[Request]) -> list[Point]:
    """Measures a server of a copy of the repository whose graph computes nothing.

    One client is tritonrank's. Several are one process that sends messages made before, and takes
    no answer apart, so that the cores are the server's as far as can be.

    Args:
        repository: with an export, of which all but the graph is used.
        every: the requests of many documents.

    Returns:
        A point for each number of documents and of clients: ``documents`` of a request,
        ``clients``, ``requests``, ``requests_per_second``, and ``median_ms``, ``p99_ms`` and
        ``largest_ms`` of a request.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(repository, Path(folder, "repository"), symlinks=True)
        _make_idle(copy / "cross_encoder")
        settings = Settings(copy, grpc_port=0, http_port=0, metrics_port=0)
        with EmbeddedServer(settings) as server:
            return [
                _point(server.grpc_url, pairs, clients)
                for pairs in ([SHORT], [(each.query, each.documents) for each in every])
                for clients in CLIENTS
            ]


def _make_idle(models: Path) -> None:
    """Publishes the export with the graph that computes nothing in its graph's place."""
    idle = models / "export-idle"
    idle.mkdir()
    for name in ("export.json", "tokenizer.json"):
        shutil.copy(models / "current" / name, idle)
    onnx.save(parser.parse_model(IDLE), idle / "model.onnx")
    (idle / "model.onnx.data").touch()
    use(idle)


def _point(url: str, requests: Sequence[tuple[str, list[str]]], clients: int) -> Point:
    latencies = _one_client(url, requests) if clients == 1 else _latencies(url, requests, clients)
    milliseconds = 1000 * np.array(latencies)
    return {
        "documents": len(requests[0][1]),
        "clients": clients,
        "requests": len(latencies),
        "requests_per_second": len(latencies) / SECONDS,
        "median_ms": float(np.median(milliseconds)),
        "p99_ms": float(np.quantile(milliseconds, 0.99)),
        "largest_ms": float(milliseconds.max()),
    }


def _one_client(url: str, requests: Sequence[tuple[str, list[str]]]) -> list[float]:
    latencies = []
    turns = cycle(requests)
    with RerankClient(url, timeout=60) as client:
        for request in islice(turns, WARM_UP):
            client.rank(*request)
        end = time.perf_counter() + SECONDS
        while (started := time.perf_counter()) < end:
            client.rank(*next(turns))
            latencies.append(time.perf_counter() - started)
    return latencies


def _latencies(url: str, requests: Sequence[tuple[str, list[str]]], clients: int) -> list[float]:
    end = time.perf_counter() + SECONDS
    times = asyncio.run(several_clients(url, requests, clients, end))
    return [finished - started for started, finished in times]


async def several_clients(
    url: str, requests: Sequence[tuple[str, list[str]]], clients: int, end: float
) -> list[tuple[float, float]]:
    """When each request was sent and answered, by ``perf_counter``; after the end none is sent."""
    turns = cycle(
        protocol.request(*request, None, protocol.Options(), 600).SerializeToString()
        for request in requests
    )
    times: list[tuple[float, float]] = []
    async with grpc.aio.insecure_channel(url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        async def client() -> None:
            while (started := time.perf_counter()) < end:
                await infer(next(turns))
                times.append((started, time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(clients)))
    return times


def main() -> None:
    """Measures, and writes ``cpu.json``."""
    prepare()
    repository = MODELS / f"repository-{'fp16' if GPU else 'int8'}"
    result = {
        "commit": commit(),
        "hardware": hardware() | {"gpu": None},  # It has nothing to do.
        "data": "TREC DL 2019, BM25 top 100" if DL19.exists() else "generated text",
        "points": own_cost(repository, requests(43)),
    }
    path = HERE / "results" / "own-cost" / "cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
