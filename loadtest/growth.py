"""What a request costs as work grows: more documents, longer ones, more clients at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonrank import RerankClient, ServerUnavailableError
from tritonrank_server.serve import EmbeddedServer, Settings
from tritonrank_server.tokenizer import PairTokenizer

from .data import Request

DOCUMENTS = (1, 3, 10, 30, 100, 300, 1000)
LENGTHS = (16, 32, 64, 128, 256, 512)
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
DELAYS_US = (0, 2_000, 10_000)
#: Of a request whose length or clients vary.
FEW = 10
#: Each point is measured so often, in turns with the others of its kind.
TIMES = 3

Point = dict[str, Any]


def growth(url: str, tokenizer_json: Path, every: Sequence[Request]) -> dict[str, list[Point]]:
    """Measures each curve on a running server, by one client where clients do not vary.

    Args:
        url: gRPC address of the server.
        tokenizer_json: of the export that it serves.
        every: requests whose documents are used.

    Returns:
        ``documents``; ``lengths``, the last of which has one long document among 99 short ones;
        and ``clients``.
    """
    tokenizer = PairTokenizer(tokenizer_json, 1024)
    texts = [text for each in every for text in each.documents]
    more = [(every[0].query, list(islice(cycle(texts), count))) for count in DOCUMENTS]
    longer = [("water", [_document(length)] * FEW) for length in LENGTHS]
    skewed = ("water", [_document(LENGTHS[-1])] + [_document(LENGTHS[0])] * 99)
    with RerankClient(url, timeout=600) as client:
        return {
            "documents": _measure(client, tokenizer, more),
            "lengths": _measure(client, tokenizer, [*longer, skewed]),
            "clients": [_concurrent(url, every, count) for count in CLIENTS],
        }


def queue_delay(repository: Path, every: Sequence[Request]) -> list[Point]:
    """One client and eight, on embedded servers whose scorer waits so long for a larger batch."""
    points = []
    for delay in DELAYS_US:
        with _delayed(repository, delay) as url:
            points += [
                {"max_queue_delay_us": delay, **_concurrent(url, every, clients)}
                for clients in (1, 8)
            ]
    return points


def _document(length: int) -> str:
    """A document that makes a pair of so many tokens with a query of one."""
    return " ".join(["water"] * (length - 4))


def _measure(
    client: RerankClient,
    tokenizer: PairTokenizer,
    requests: Sequence[tuple[str, list[str]]],
) -> list[Point]:
    seconds: list[list[float]] = [[] for _ in requests]
    for _ in range(TIMES):
        for found, request in zip(seconds, requests):
            started = time.perf_counter()
            client.rank(*request)
            found.append(time.perf_counter() - started)
    return [
        _point(tokenizer, request, float(np.median(found)))
        for request, found in zip(requests, seconds)
    ]


def _point(tokenizer: PairTokenizer, request: tuple[str, list[str]], seconds: float) -> Point:
    query, documents = request
    pairs = tokenizer.read(query.encode(), [text.encode() for text in documents])
    [encoded] = tokenizer.encode([pairs])
    tokens = int(encoded.lengths.sum())
    return {
        "documents": len(documents),
        "longest": encoded.input_ids.shape[1],
        "tokens": tokens,
        "places_padded_to_longest": encoded.input_ids.size,
        "ms": 1000 * seconds,
        "us_a_token": 1e6 * seconds / tokens,
    }


def _concurrent(url: str, every: Sequence[Request], clients: int) -> Point:
    """So many clients, each with its next request as soon as it has an answer."""
    requests = [
        (each.query, each.documents[i : i + FEW])
        for i in range(0, len(every[0].documents), FEW)
        for each in every
    ][: max(32, 2 * clients)]
    latencies: list[float] = []
    with RerankClient(url, timeout=600) as client, ThreadPoolExecutor(clients) as pool:

        def rank(request: tuple[str, list[str]]) -> None:
            started = time.perf_counter()
            with suppress(ServerUnavailableError):
                client.rank(*request)
                latencies.append(1000 * (time.perf_counter() - started))

        client.rank(*requests[0])
        before = _executions(url)
        started = time.perf_counter()
        list(pool.map(rank, requests))
        elapsed = time.perf_counter() - started
    return {
        "clients": clients,
        "requests": len(requests),
        "executions": _executions(url) - before,
        "refused": len(requests) - len(latencies),
        "pairs_per_second": FEW * len(latencies) / elapsed,
        "median_ms": float(np.median(latencies)),
        "largest_ms": max(latencies),
    }


def _executions(url: str) -> int:
    with triton.InferenceServerClient(url) as client:
        return int(client.get_inference_statistics("cross_encoder").model_stats[0].execution_count)


@contextmanager
def _delayed(repository: Path, delay_us: int) -> Iterator[str]:
    """The address of a server with that queue delay, set in the repository while it runs."""
    config = repository / "cross_encoder" / "configs" / "cpu.pbtxt"
    original = config.read_text()
    delayed = f"dynamic_batching {{\n  max_queue_delay_microseconds: {delay_us}\n"
    config.write_text(original.replace("dynamic_batching {\n", delayed))
    settings = Settings(repository, grpc_port=0, http_port=0, metrics_port=0)
    try:
        with EmbeddedServer(settings) as server:
            yield server.grpc_url
    finally:
        config.write_text(original)
