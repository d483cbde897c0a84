"""What a request costs as work grows: more documents, longer ones, more clients at a time."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonrank import RerankClient, ServerUnavailableError
from tritonrank_server.serving.serve import EmbeddedServer, Settings
from tritonrank_server.stages.tokenizer import PairTokenizer

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
    """One client and eight, on embedded servers whose scorers wait so long for a larger batch.

    The servers take turns; the figures are of the median turn by throughput.
    """
    with ExitStack() as stack:
        urls = {delay: stack.enter_context(_delayed(repository, delay)) for delay in DELAYS_US}
        turns = [
            {(delay, clients): _concurrent(urls[delay], every, clients) for delay, clients in kinds}
            for kinds in [[(delay, clients) for clients in (1, 8) for delay in DELAYS_US]] * TIMES
        ]
    points = []
    for delay, clients in turns[0]:
        found = sorted((turn[delay, clients] for turn in turns), key=_throughput)
        points.append({"max_queue_delay_us": delay, **found[TIMES // 2]})
    return points


def _throughput(point: Point) -> float:
    return float(point["pairs_per_second"])


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
        "longest": int(encoded.lengths.max()),
        "tokens": tokens,
        "places_padded_to_longest": encoded.lengths.size * int(encoded.lengths.max()),
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
        before = executions(url)
        started = time.perf_counter()
        list(pool.map(rank, requests))
        elapsed = time.perf_counter() - started
    return {
        "clients": clients,
        "requests": len(requests),
        "executions": executions(url) - before,
        "refused": len(requests) - len(latencies),
        "pairs_per_second": FEW * len(latencies) / elapsed,
        "median_ms": float(np.median(latencies)),
        "largest_ms": max(latencies),
    }


def executions(url: str) -> int:
    """Of the scorer, since the start."""
    with triton.InferenceServerClient(url) as client:
        return int(client.get_inference_statistics("cross_encoder").model_stats[0].execution_count)


@contextmanager
def _delayed(repository: Path, delay_us: int) -> Iterator[str]:
    """The address of a server of a copy of the repository with that queue delay."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(repository, Path(folder, "repository"), symlinks=True)
        config = copy / "cross_encoder" / "configs" / "cpu.pbtxt"
        delayed = f"dynamic_batching {{\n  max_queue_delay_microseconds: {delay_us}\n"
        config.write_text(config.read_text().replace("dynamic_batching {\n", delayed))
        settings = Settings(copy, grpc_port=0, http_port=0, metrics_port=0)
        with EmbeddedServer(settings) as server:
            yield server.grpc_url
