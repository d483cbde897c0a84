"""What the HTTP gateway costs: ``python -m loadtest.gateway``, into ``results/gateway``.

Before it stands a server that answers at once, so that all that is measured is the gateway's: its
time beside the gRPC client's own, call about, and how many requests a second a process carries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
from tritonclient.grpc import service_pb2
from tritonrank import RerankClient

from .bench import HERE, commit, hardware

RESULTS = HERE / "results" / "gateway"
DOCUMENTS, CHARACTERS = 100, 500
#: Calls of each kind, in turn, and before them some that do not count.
CALLS, WARM_UP = 400, 50
#: Connections of the load, and its seconds.
CONNECTIONS, SECONDS = 16, 10.0
MODEL = {
    "name": "at-once",
    "precision": "fp32",
    "max_length": 512,
    "activation": "Sigmoid",
    "revision": "0",
}


def _answer(documents: int) -> bytes:
    """A ranking of so many documents, the last one first."""
    logits = np.arange(documents, dtype="<f4")[::-1]
    columns = {
        "INDICES": ("INT32", np.arange(documents, dtype="<i4")[::-1]),
        "SCORES": ("FP32", (1 / (1 + np.exp(-logits))).astype("<f4")),
        "LOGITS": ("FP32", logits),
        "TOKENS": ("INT32", np.full(documents, 128, "<i4")),
        "TRUNCATED": ("BOOL", np.zeros(documents, "?")),
        "MODEL": ("UINT8", np.frombuffer(json.dumps(MODEL).encode(), np.uint8)),
    }
    response = service_pb2.ModelInferResponse(model_name="reranker")
    for name, (datatype, column) in columns.items():
        response.outputs.add(name=name, datatype=datatype, shape=[len(column)])
        response.raw_output_contents.append(column.tobytes())
    return bytes(response.SerializeToString())


async def _serve_at_once() -> None:
    """A server of the wire contract that reads nothing of a request; prints its address."""
    config = service_pb2.ModelConfigResponse()
    config.config.max_batch_size = 1024
    answers = {
        "ModelInfer": _answer(DOCUMENTS),
        "ModelConfig": config.SerializeToString(),
        "ModelReady": service_pb2.ModelReadyResponse(ready=True).SerializeToString(),
    }

    def handler(answer: bytes) -> Any:
        async def reply(request: bytes, context: Any) -> bytes:
            return answer

        return grpc.unary_unary_rpc_method_handler(reply)

    server = grpc.aio.server()
    methods = {name: handler(answer) for name, answer in answers.items()}
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


@contextmanager
def _process(module: str, *arguments: str, address: str) -> Iterator[str]:
    """A Python process, and the address that it tells."""
    command = [sys.executable, "-m", module, *arguments]
    # Its lines go into a file: nobody reads them on.
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, stdout=told, stderr=told)
        try:
            while True:
                told.seek(0)
                if found := re.search(address, told.read().decode()):
                    yield found[0]
                    break
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended")
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait()


def _milliseconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def _added(server: str, gateway: str, body: bytes, texts: list[str]) -> dict[str, float]:
    """Medians of a request by gRPC and by the gateway, milliseconds, call about."""
    direct, through = [], []
    url, kind = f"{gateway}/rerank", {"content-type": "application/json"}
    with RerankClient(server) as client, httpx.Client() as http:
        for _ in range(WARM_UP + CALLS):
            direct.append(_milliseconds(lambda: client.rank("query", texts)))
            through.append(_milliseconds(lambda: http.post(url, content=body, headers=kind).json()))
    medians = [statistics.median(each[WARM_UP:]) for each in (direct, through)]
    return {"grpc_ms": medians[0], "gateway_ms": medians[1], "added_ms": medians[1] - medians[0]}


async def _carried(gateway: str, body: bytes) -> float:
    """Requests a second, by connections that each send the next one when they have the answer.

    By plain sockets, since a client of any library would take more of the cores than the gateway.
    """
    host, port = gateway.removeprefix("http://").split(":")
    head = (
        f"POST /rerank HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    message = head.encode() + body
    ends = time.perf_counter() + SECONDS

    async def connection() -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        done = 0
        while time.perf_counter() < ends:
            writer.write(message)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            length = re.search(rb"content-length: (\d+)", answer)
            assert length
            await reader.readexactly(int(length[1]))
            done += 1
        writer.close()
        return done

    return sum(await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))) / SECONDS


def measure() -> dict[str, Any]:
    """All of it, once."""
    texts = [(f"{i} " + "word " * CHARACTERS)[:CHARACTERS] for i in range(DOCUMENTS)]
    body = json.dumps({"query": "query", "documents": texts}).encode()
    with (
        _process("loadtest.gateway", "--at-once", address=r"127.0.0.1:\d+") as server,
        _process(
            "tritonrank", "gateway", "--url", server, "--port=0", address=r"http://[\d.:]+"
        ) as gateway,
    ):
        added = _added(server, gateway, body, texts)
        carried = asyncio.run(_carried(gateway, body))
    return {**added, "requests_per_second": carried}


def main() -> None:
    """Measures, and writes ``cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().at_once:
        asyncio.run(_serve_at_once())
    result = {
        "commit": commit(),
        "hardware": hardware(),
        "documents": DOCUMENTS,
        "characters": CHARACTERS,
        "connections": CONNECTIONS,
        **measure(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = Path(RESULTS / "cpu.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
