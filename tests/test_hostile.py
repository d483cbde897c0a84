"""Clients that give up at any moment, of every kind, beside good ones that lose nothing.

Triton 24.10, as it is on PyPI, ended by a signal within seconds of this; see ``mends.py``.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
from conftest import pipeline, start
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonrank import AsyncRerankClient, RerankClient, RerankError, protocol
from tritonrank.protocol import Options
from tritonrank_server.serving import assets
from tritonrank_server.serving.mends import MENDS, mend
from tritonrank_server.serving.serve import EmbeddedServer

SECONDS = 60
#: Between two requests of a client: they are to be many, but not more than the server can do.
PAUSE = 0.1
DOCUMENTS = ["green tea"]
#: What another client must never see change.
REQUEST = ("tea", ["a car", "green tea", "", "water " * 100])


def lives(server: EmbeddedServer) -> bool:
    return psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE


def message(source: random.Random, timeout: float = 10) -> service_pb2.ModelInferRequest:
    query = source.choice(["tea", "tea", ""])  # A bad one is answered sooner.
    return protocol.request(query, DOCUMENTS, None, Options(), timeout)


def moment(source: random.Random) -> float:
    """How long a client waits before it gives up: around an answer's time, or any."""
    return source.choice([0.0, source.uniform(0, 0.004), source.uniform(0, 0.05)])


def deadlines(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    with RerankClient(server.grpc_url) as client:
        while True:
            with suppress(RerankError):
                client.rank("tea", DOCUMENTS, timeout=source.choice([0.001, moment(source)]))
            yield


def cancelled_tasks(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    async def give_up() -> None:
        async with AsyncRerankClient(server.grpc_url) as client:
            tasks = [asyncio.create_task(client.rank("tea", DOCUMENTS)) for _ in range(4)]
            for task in tasks:
                await asyncio.sleep(moment(source))
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    while True:
        asyncio.run(give_up())
        yield


def cancelled_calls(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while True:
            wait = moment(source)
            # Triton's own deadline may pass at the same moment.
            call = stub.ModelInfer.future(message(source, source.choice([10, wait])))
            time.sleep(wait)
            call.cancel()
            yield


def cancelled_streams(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while True:
            metadata = source.choice([(), (("triton_grpc_error", "true"),)])
            requests = [message(source) for _ in range(2)]
            call = stub.ModelStreamInfer(iter(requests), metadata=metadata)
            threading.Timer(moment(source), call.cancel).start()
            with suppress(grpc.RpcError):
                for _ in call:
                    pass
            yield


def closed_connections(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    host, port = server.http_url.split(":")
    texts = {"QUERY": ["tea"], "DOCUMENTS": DOCUMENTS}
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}
        for name, data in texts.items()
    ]
    body = json.dumps({"inputs": inputs})
    head = f"POST /v2/models/reranker/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    while True:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\n{body}".encode())
            time.sleep(moment(source))
        yield


def good(server: EmbeddedServer, source: random.Random) -> Iterator[None]:
    with RerankClient(server.grpc_url, timeout=60) as client:
        expected = client.rank(*REQUEST)
        while True:
            assert client.rank(*REQUEST) == expected
            yield


HOSTILE = (deadlines, cancelled_calls, cancelled_streams, closed_connections)


def test_who_gives_up_harms_nobody(int8_repository: Path) -> None:
    done: Counter[str] = Counter()
    until = time.monotonic() + SECONDS

    def run(kind: Callable[..., Iterator[None]], seed: int) -> None:
        for _ in kind(server, random.Random(seed)):
            done[kind.__name__] += 1
            time.sleep(PAUSE)
            if time.monotonic() > until or not lives(server):
                return

    oracle = pipeline(int8_repository).rank(*REQUEST)
    with start(int8_repository) as server, ThreadPoolExecutor(12) as pool:
        clients = [pool.submit(run, kind, seed) for seed, kind in enumerate((*HOSTILE, good) * 2)]
        clients.append(pool.submit(run, cancelled_tasks, 0))  # gRPC's asyncio is for one thread.
        for client in clients:
            client.result()
        assert lives(server)
        with RerankClient(server.grpc_url, timeout=60) as client:
            ranking = client.rank(*REQUEST)
    assert [each.logit for each in ranking] == oracle.logits.tolist()
    assert min(done[kind.__name__] for kind in (*HOSTILE, cancelled_tasks, good)) > 20, done


def test_only_the_known_binary_is_mended(tmp_path: Path) -> None:
    wheel = assets.tritonserver().parents[1]
    contents = {each.file: bytearray((wheel / each.file).read_bytes()) for each in MENDS}
    for each in MENDS:
        content = contents[each.file]
        assert content[each.offset :].startswith(each.after)
        content[each.offset : each.offset + len(each.before)] = each.before
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    mend(tmp_path)
    for name in contents:
        assert (tmp_path / name).read_bytes() == (wheel / name).read_bytes()
    with pytest.raises(ValueError, match="tritonserver is not the one"):  # It is mended already.
        mend(tmp_path)
