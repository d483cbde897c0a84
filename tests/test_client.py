"""The client against servers that fail in ways a real one does only under load."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import UserList
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor
from tritonrank import (
    TLS,
    AsyncRerankClient,
    InvalidRequestError,
    RankedDocument,
    RerankClient,
    RerankError,
    RerankTimeoutError,
    ServerUnavailableError,
    protocol,
)
from tritonrank.cli import main
from tritonrank.connection import Endpoint
from tritonrank.protocol import Options
from tritonrank.table import format_table
from tritonrank_server.serving.serve import EmbeddedServer

LIMIT = 4


@dataclass
class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Scores a document by its length, after failing as often as asked."""

    failures: list[grpc.StatusCode] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    levels: list[tuple[int, bool]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.0
    under_way: list[object] = field(default_factory=list)
    most_under_way: int = 0

    def ModelConfig(self, request: object, context: grpc.ServicerContext) -> object:
        response = service_pb2.ModelConfigResponse()
        response.config.max_batch_size = LIMIT
        return response

    def ModelInfer(self, request: object, context: grpc.ServicerContext) -> object:
        if self.failures:
            context.abort(self.failures.pop(0), "as asked")
        self.under_way.append(request)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        time.sleep(self.delay)
        self.under_way.pop()
        inputs = dict(zip((each.name for each in request.inputs), request.raw_input_contents))
        documents = deserialize_bytes_tensor(inputs["DOCUMENTS"])
        self.sizes.append(len(documents))
        parameters = request.parameters
        self.timeouts.append(parameters["timeout"].int64_param / 1e6)
        self.levels.append((parameters["priority"].int64_param, parameters["bulk"].bool_param))
        if b"hang" in documents:
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(60)
        logits = np.array([len(document) for document in documents], np.float32)
        top_k = np.frombuffer(inputs["TOP_K"], np.int32).item() if "TOP_K" in inputs else None
        order = np.argsort(-logits, kind="stable")[:top_k].astype(np.int32)
        response = service_pb2.ModelInferResponse()
        columns = {"LOGITS": logits[order], "INDICES": order, "SCORES": logits[order] / 1e6}
        for name, column in columns.items():
            response.outputs.add(name=name)
            response.raw_output_contents.append(column.tobytes())
        return response


@contextmanager
def listening(
    service: Service,
    credentials: grpc.ServerCredentials | None = None,
    host: str = "127.0.0.1",
) -> Iterator[tuple[grpc.Server, str]]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(8), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    if credentials:
        port = server.add_secure_port(f"{host}:0", credentials)
    else:
        port = server.add_insecure_port(f"{host}:0")
    server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with listening(service) as (_, url):
        yield url


Rank = Callable[..., list[RankedDocument]]


@pytest.fixture(params=["synchronous", "asynchronous"])
def rank(request: pytest.FixtureRequest, url: str) -> Rank:
    """A call of either client, on a channel of its own."""

    def synchronous(*arguments: object, **options: object) -> list[RankedDocument]:
        with RerankClient(url, timeout=60) as client:
            return client.rank(*arguments, **options)

    def asynchronous(*arguments: object, **options: object) -> list[RankedDocument]:
        async def call() -> list[RankedDocument]:
            async with AsyncRerankClient(url, timeout=60) as client:
                return await client.rank(*arguments, **options)

        return asyncio.run(call())

    return synchronous if request.param == "synchronous" else asynchronous


def test_a_ranking(rank: Rank) -> None:
    documents = ["a", "ccc", "일"]
    assert rank("query", documents) == [
        RankedDocument(1, pytest.approx(3e-6), 3.0, "ccc"),
        RankedDocument(2, pytest.approx(3e-6), 3.0, "일"),
        RankedDocument(0, pytest.approx(1e-6), 1.0, "a"),
    ]
    assert documents == ["a", "ccc", "일"]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_parts_are_even_and_merged(rank: Rank, service: Service, count: int) -> None:
    documents = ["x" * (i * 7 % 5) for i in range(count)]
    ranking = rank("query", documents)
    expected = sorted(range(count), key=lambda i: (-len(documents[i]), i))
    assert [each.index for each in ranking] == expected
    assert [each.document for each in ranking] == [documents[i] for i in expected]
    assert sum(service.sizes) == count
    assert max(service.sizes) <= LIMIT
    assert max(service.sizes) - min(service.sizes) <= 1
    assert rank("query", documents, top_k=3) == ranking[:3]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("size", [1, 2_000_000])
def test_busy_servers_are_tried_again(
    rank: Rank, service: Service, code: grpc.StatusCode, size: int
) -> None:
    service.failures = [code] * 3
    assert len(rank("query", ["x" * size])) == 1
    assert not service.failures


def test_at_most_five_tries(rank: Rank, service: Service) -> None:
    service.failures = [grpc.StatusCode.UNAVAILABLE] * 7
    with pytest.raises(ServerUnavailableError, match="as asked"):
        rank("query", ["x"])
    assert len(service.failures) == 2


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.INTERNAL, RerankError),
    ],
)
def test_other_failures_are_not_tried_again(
    rank: Rank, service: Service, code: grpc.StatusCode, error: type[RerankError]
) -> None:
    service.failures = [code] * 2
    with pytest.raises(error, match="as asked") as raised:
        rank("query", ["x"])
    assert raised.value.code == code
    assert len(service.failures) == 1


def test_deadline(rank: Rank, service: Service) -> None:
    with pytest.raises(RerankTimeoutError, match="pass a longer timeout"):
        rank("query", ["hang"], timeout=0.5)
    assert service.cancelled.wait(60)
    assert 0 < service.timeouts[0] <= 0.5


def test_a_part_that_fails_cancels_the_others(rank: Rank, service: Service) -> None:
    # Five parts of which one hangs; one of those before it is refused.
    documents = ["x"] * 19 + ["hang"]
    service.failures = [grpc.StatusCode.INVALID_ARGUMENT]
    with pytest.raises(InvalidRequestError):
        rank("query", documents)


def test_nobody_there() -> None:
    with (
        RerankClient("127.0.0.1:9", timeout=60) as client,
        pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:9"),
    ):
        client.rank("query", ["x"])


class Series:
    """As of pandas: it iterates by position, and is indexed by label."""

    def __init__(self, rows: dict[int, object]) -> None:
        self.rows = rows
        self.ndim = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[object]:
        return iter(self.rows.values())

    def __getitem__(self, label: int | slice) -> object:
        if isinstance(label, slice):
            return Series(dict(list(self.rows.items())[label]))
        return self.rows[label]


def column(texts: Iterable[str]) -> Series:
    """Sorted by something, and without the row 1."""
    return Series(dict(zip((4, 0, 5, 2, 3), texts)))


def keys(texts: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(texts).keys()


def values(texts: Iterable[str]) -> Iterable[str]:
    return dict(enumerate(texts)).values()


@pytest.mark.parametrize("form", [column, tuple, iter, np.array, UserList, keys, values])
def test_documents_are_taken_by_position(
    rank: Rank, form: Callable[[list[str]], Iterable[str]]
) -> None:
    documents = ["fff", "gggg", "b", "aa", ""]
    assert rank("query", form(documents)) == rank("query", documents)


def test_a_sorted_column_on_a_real_server(int8_server: EmbeddedServer) -> None:
    documents = column(["a red car", "green tea", "two chairs"])

    async def asynchronous() -> list[RankedDocument]:
        async with AsyncRerankClient(int8_server.grpc_url, timeout=60) as client:
            return await client.rank("something to drink", documents)

    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        expected = client.rank("something to drink", list(documents))
        found = client.rank("something to drink", documents)
    assert (expected[0].index, expected[0].document) == (1, "green tea")
    # One at a time, so to the last bit.
    assert expected == found == asyncio.run(asynchronous())


HALF = "cut: \ud83d"
NUMBERS = np.zeros((2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"documents": "one string"}, TypeError, "documents is one str: pass a list"),
        ({"documents": b"bytes"}, TypeError, "documents is one bytes: pass a list"),
        ({"documents": {1: "a"}}, TypeError, "documents is of type dict: pass a list"),
        ({"documents": {"a", "b"}}, TypeError, "documents is of type set: pass a list"),
        ({"documents": None}, TypeError, "documents is of type NoneType: pass a list"),
        ({"documents": 3}, TypeError, "documents is of type int: pass a list"),
        ({"documents": NUMBERS.astype(str)}, TypeError, "documents is of type ndarray: pass a"),
        ({"documents": ["a", None]}, TypeError, r"documents\[1\] is of type NoneType: pass a str"),
        ({"documents": Series({7: "a", 3: np.nan})}, TypeError, r"documents\[1\] is of type float"),
        ({"documents": np.array([b"a"])}, TypeError, r"documents\[0\] is of type bytes_"),
        ({"documents": ["a", "b", HALF]}, ValueError, r"documents\[2\] has half of a surrogate pa"),
        ({"query": HALF}, ValueError, "query has half of a surrogate pair at character 5, .* repl"),
        ({"query": None}, TypeError, "query is of type NoneType: pass a str"),
        ({"query": b"q"}, TypeError, "query is of type bytes: pass a str"),
        ({"top_k": True}, TypeError, "top_k is of type bool: pass an int or None"),
        ({"top_k": 1.0}, TypeError, "top_k is of type float: pass an int or None"),
        ({"top_k": "1"}, TypeError, "top_k is of type str: pass an int or None"),
        ({"timeout": "1"}, TypeError, "timeout is of type str: pass seconds"),
        ({"timeout": True}, TypeError, "timeout is of type bool: pass seconds"),
        ({"timeout": timedelta(1)}, TypeError, "timeout is of type timedelta: pass seconds"),
        ({"timeout": float("inf")}, ValueError, "timeout is inf: pass seconds"),
        ({"timeout": float("nan")}, ValueError, "timeout is nan: pass seconds"),
        ({"timeout": 1e30}, ValueError, "timeout is 1e.30: pass seconds"),
        ({"bulk": "no"}, TypeError, "bulk is of type str: pass True or False"),
        ({"bulk": None}, TypeError, "bulk is of type NoneType: pass True or False"),
        ({"request_id": 7}, TypeError, "request_id is of type int: pass a str"),
        ({"request_id": HALF}, ValueError, "request_id has half of a surrogate pair"),
    ],
)
def test_an_argument_that_cannot_be_meant(
    rank: Rank, service: Service, arguments: dict[str, object], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        rank(**{"query": "query", "documents": ["a"]} | arguments)
    assert not service.sizes


def test_numpys_own_types_are_good(rank: Rank) -> None:
    options = {"top_k": np.int64(1), "timeout": np.float32(60), "bulk": np.bool_(True)}
    [best] = rank(np.str_("query"), [np.str_("a"), np.str_("bb")], **options)
    assert (best.index, best.document) == (1, "bb")


@pytest.mark.parametrize("timeout", [0, -1, float("-inf")])
def test_a_call_without_time_left(rank: Rank, service: Service, timeout: float) -> None:
    with pytest.raises(RerankTimeoutError, match="pass a longer timeout"):
        rank("query", ["a"], timeout=timeout)
    assert not service.sizes


@pytest.mark.parametrize("client", [RerankClient, AsyncRerankClient])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"url": None}, TypeError, "url is of type NoneType: pass HOST:PORT, or a list"),
        ({"url": b"127.0.0.1:8001"}, TypeError, "url is one bytes: pass HOST:PORT, or a list"),
        ({"url": ["127.0.0.1:8001", 8001]}, TypeError, r"url\[1\] is of type int: pass a str"),
        ({"url": f"{HALF}:8001"}, ValueError, "url has half of a surrogate pair"),
        ({"timeout": None}, TypeError, "timeout is of type NoneType: pass seconds"),
        ({"timeout": float("nan")}, ValueError, "timeout is nan: pass seconds"),
        ({"tls": True}, TypeError, r"tls is of type bool: pass TLS\("),
        (
            {"tls": TLS(b"PEM")},
            TypeError,
            r"tls\.root_certificates is of type bytes: pass the path",
        ),
        ({"tls": TLS(server_name=1)}, TypeError, r"tls\.server_name is of type int: pass a str"),
        ({"tls": TLS(Path(__file__))}, ValueError, "test_client.py: .* pass PEM files"),
        ({"tls": TLS("none.pem")}, FileNotFoundError, "none.pem"),
    ],
)
def test_a_client_that_cannot_be_meant(
    client: type, options: dict[str, object], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        client(**options)


def test_a_key_of_another_certificate(tmp_path: Path) -> None:
    one, other = (trustme.CA().issue_cert("a@example.com") for _ in range(2))
    key, chain = tmp_path / "a.key", tmp_path / "a.pem"
    one.private_key_pem.write_to_path(key)
    other.cert_chain_pems[0].write_to_path(chain)
    with pytest.raises(ValueError, match="KEY_VALUES_MISMATCH"):
        RerankClient(tls=TLS(private_key=key, certificate_chain=chain))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ([], "no URL"),
        # Of these gRPC would read a part, and call another host or port.
        ("::1:8001", "pass HOST:PORT"),
        ("host#fragment:8001", "pass HOST:PORT"),
        ("host?query:8001", "pass HOST:PORT"),
        ("127.0.0.1:8001\n", "pass HOST:PORT"),
        ("127.0.0.1:0", "pass HOST:PORT"),
        (["one.invalid:8001", "other.invalid:8001"], "no host is known"),
        (["127.0.0.1:8001", "[::1]:8001"], "all IPv4, or all IPv6"),
        ("127.0.0.1", "pass HOST:PORT"),
        (["127.0.0.1:8001", "127.0.0.1:99999"], "127.0.0.1:99999. is no address"),
    ],
)
def test_urls_that_lead_nowhere(url: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RerankClient(url)


def test_a_name_without_an_address_is_left_out(url: str) -> None:
    with RerankClient([url, "no.such.host.invalid:8001"]) as client:
        assert client.rank("q", ["a"])


def test_half_a_pair_of_key_and_certificate(tmp_path: Path) -> None:
    for half in (TLS(private_key=tmp_path), TLS(certificate_chain=tmp_path)):
        with pytest.raises(ValueError, match="together"):
            RerankClient("127.0.0.1:8001", tls=half)


def test_a_list_with_tls_needs_the_name_in_the_certificates() -> None:
    urls = ["127.0.0.1:8001", "127.0.0.2:8001"]
    with pytest.raises(ValueError, match="server_name"):
        RerankClient(urls, tls=TLS())
    RerankClient(urls, tls=TLS(server_name="reranker")).close()


def test_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="pass HOST:PORT"):
        RerankClient("http://127.0.0.1:8001")


def test_a_cancelled_task_cancels_on_the_server(service: Service, url: str) -> None:
    async def scenario() -> None:
        async with AsyncRerankClient(url) as client:
            task = asyncio.create_task(client.rank("query", ["hang"]))
            while not service.sizes:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(service.cancelled.wait, 60)

    asyncio.run(scenario())


@pytest.mark.parametrize("parts", [1, 40])  # As many as can be under way, and more.
def test_close_fails_what_is_under_way(service: Service, url: str, parts: int) -> None:
    client, documents = RerankClient(url, timeout=60), ["hang"] * LIMIT * parts
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.rank, "query", documents)
        while not service.sizes:
            time.sleep(0.01)
        client.close()
        with pytest.raises(RerankError, match="the client is closed") as raised:
            call.result(30)
    assert raised.value.code == grpc.StatusCode.CANCELLED
    with pytest.raises(RerankError, match="the client is closed"):
        client.rank("query", ["a"])
    assert service.cancelled.wait(60)


@pytest.mark.parametrize("parts", [1, 40])
def test_an_asynchronous_close_fails_what_is_under_way(
    service: Service, url: str, parts: int
) -> None:
    async def scenario() -> None:
        async with AsyncRerankClient(url, timeout=60) as client:
            call = asyncio.create_task(client.rank("query", ["hang"] * LIMIT * parts))
            while not service.sizes:
                await asyncio.sleep(0.01)
        with pytest.raises(RerankError, match="the client is closed") as raised:
            await call
        assert raised.value.code == grpc.StatusCode.CANCELLED
        with pytest.raises(RerankError, match="the client is closed"):
            await client.rank("query", ["a"])

    asyncio.run(scenario())
    assert service.cancelled.wait(60)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell the two apart")
def test_a_task_that_is_cancelled_stays_so_beside_a_close(service: Service, url: str) -> None:
    async def scenario() -> None:
        async with AsyncRerankClient(url, timeout=60) as client:
            call = asyncio.create_task(client.rank("query", ["hang"]))
            while not service.sizes:
                await asyncio.sleep(0.01)
            call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(scenario())


def test_one_asynchronous_client_in_many_loops(service: Service, url: str) -> None:
    client = AsyncRerankClient(url, timeout=60)  # Where no loop runs.

    async def calls() -> list[int]:
        return [len(await client.rank("query", ["a", "b"])) for _ in range(5)]

    for _ in range(3):
        assert asyncio.run(calls()) == [2] * 5
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: asyncio.run(calls()), range(3))) == [[2] * 5] * 3
        service.sizes.clear()
        elsewhere = pool.submit(lambda: asyncio.run(client.rank("query", ["hang"])))
        while not service.sizes:
            time.sleep(0.01)
        asyncio.run(client.close())
        with pytest.raises(RerankError, match="the client is closed"):
            elsewhere.result(30)


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the hosts that it was asked for, to none of which it connects."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a proxy was asked for that the environment names."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as (address, asked):
        monkeypatch.setenv("http_proxy", f"http://user:secret@{address}")
        yield asked


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "0.0.0.0"])
def test_no_proxy_to_this_machine(asked: list[str], url: str, rank: Rank, host: str) -> None:
    assert len(rank("query", ["a"])) == 1
    with listening(Service(), host="0.0.0.0") as (_, every):
        address = f"{host}:{every.rpartition(':')[2]}"
        for urls in (address, [address, address]):
            with RerankClient(urls, timeout=60) as client:
                assert len(client.rank("query", ["a"])) == 1
    assert not asked


def test_no_proxy_to_a_list(asked: list[str]) -> None:
    # gRPC would ask for both in one, as a host of that name.
    client = RerankClient(["192.0.2.1:8001", "192.0.2.2:8001"], timeout=1)
    with client, pytest.raises(RerankError):
        client.rank("query", ["a"])
    assert not asked


def test_a_proxy_is_named_when_it_fails(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def asynchronous() -> None:
        async with AsyncRerankClient("192.0.2.1:8001", timeout=60) as client:
            await client.rank("query", ["a"])

    def synchronous() -> None:
        with RerankClient("192.0.2.1:8001", timeout=60) as client:
            client.rank("query", ["a"])

    named = r"by way of the proxy 127\.0\.0\.1:\d+ of http_proxy; .* no_proxy"
    with pytest.raises(ServerUnavailableError, match=named) as raised:
        synchronous()
    with pytest.raises(ServerUnavailableError, match=named):
        asyncio.run(asynchronous())
    assert {*asked} == {"192.0.2.1:8001"}
    assert "secret" not in str(raised.value)
    with socket.socket() as silent:  # A proxy that takes calls, and does nothing.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        client = RerankClient("192.0.2.1:8001", timeout=0.5)
        with client, pytest.raises(RerankTimeoutError, match="of grpc_proxy"):
            client.rank("query", ["a"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "a:1 of http_proxy"),
        ({"https_proxy": "http://b:2/"}, "b:2 of https_proxy"),
        ({"https_proxy": "http://b:2", "grpc_proxy": "http://[::1]:3"}, "[::1]:3 of grpc_proxy"),
        ({"grpc_proxy": "http://user:p@ss@b:2?c"}, "b:2 of grpc_proxy"),
        ({"grpc_proxy": ""}, None),
        ({"grpc_proxy": "socks5://b:2"}, None),
        ({"grpc_proxy": "b:2"}, None),
        ({"no_proxy": "localhost, 192.0.2.1"}, None),
        ({"no_proxy": "192.0.2.0/24"}, None),
        ({"no_proxy": "192.0.2.1", "no_grpc_proxy": "other"}, "a:1 of http_proxy"),
        ({"no_proxy": "192.0.3.0/24,*"}, "a:1 of http_proxy"),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    expected: str | None,
) -> None:
    monkeypatch.setenv("http_proxy", "http://a:1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Endpoint.of("192.0.2.1:8001", None).proxy == expected


def test_demo_beside_a_proxy(
    int8_repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert main(["demo", "--model-repository", str(int8_repository)]) == 0
    assert "logit" in capsys.readouterr().out


def test_several_endpoints_share_the_calls_and_one_may_die() -> None:
    one, other = Service(), Service()
    with (
        listening(one) as (server, url),
        listening(other) as (_, other_url),
        RerankClient([url, other_url], timeout=60) as client,
    ):
        while not (one.sizes and other.sizes):  # until both are connected
            client.rank("query", ["x"])
        one.sizes, other.sizes = [], []
        for _ in range(20):
            client.rank("query", ["x"])
        assert (len(one.sizes), len(other.sizes)) == (10, 10)
        server.stop(None)
        for _ in range(20):
            client.rank("query", ["x"])
        assert len(one.sizes) + len(other.sizes) == 40


def test_mutual_tls(tmp_path: Path, service: Service) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    root = tmp_path / "root.pem"
    authority.cert_pem.write_to_path(root)

    def client_files(name: str, issuer: trustme.CA) -> tuple[Path, Path]:
        certificate = issuer.issue_cert(f"{name}@example.com")
        key, chain = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        certificate.private_key_pem.write_to_path(key)
        certificate.cert_chain_pems[0].write_to_path(chain)
        return key, chain

    own = authority.issue_cert("rerank.example.com")
    credentials = grpc.ssl_server_credentials(
        [(own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())],
        root_certificates=authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    friend = TLS(root, *client_files("friend", authority), server_name="rerank.example.com")
    refused = [
        None,
        TLS(root, server_name="rerank.example.com"),
        TLS(root, *client_files("stranger", stranger), server_name="rerank.example.com"),
        TLS(root, friend.private_key, friend.certificate_chain),  # The name is not the server's.
    ]
    with listening(service, credentials) as (_, url):
        with RerankClient(url, tls=friend, timeout=60) as client:
            assert len(client.rank("query", ["x"])) == 1
        for tls in refused:
            client = RerankClient(url, tls=tls, timeout=60)
            with client, pytest.raises(ServerUnavailableError):
                client.rank("query", ["x"])
    assert service.sizes == [1]


def test_table_is_cut_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = format_table([RankedDocument(3, 0.5, -1.25, "日本\n語" * 20)])
    assert "\x1b" not in format_table([RankedDocument(0, 0.5, 0.0, "\x1b[2J a terminal's command")])
    header, row = table.splitlines()
    assert row.startswith("   1  0.5000   -1.250      3  日本 語")
    assert row.endswith("…")
    wide = sum(2 if ord(character) > 0x3000 else 1 for character in row)
    assert len(header) - len("document") + 20 < wide <= 60


def test_table_tells_what_was_read() -> None:
    part = RankedDocument(0, 0.5, 0, "some tea", truncated=False, passage=(5, 8))
    cut = RankedDocument(1, 0.5, 0, "some tea", truncated=True, passage=(0, 4))
    whole = RankedDocument(2, 0.5, 0, "some tea", truncated=False, passage=(0, 8))
    query_cut = RankedDocument(3, 0.5, 0, "some tea", truncated=True, passage=(0, 8))
    lines = format_table([part, cut, whole, query_cut]).splitlines()
    texts = ["[5:8] tea", "[0:4, cut] some", "some tea", "[0:8, cut] some tea"]
    assert [line.split(maxsplit=4)[4] for line in lines[1:]] == texts
    assert [each.read for each in (part, cut, whole)] == [
        {"start": 5, "end": 8},
        {"start": 0, "end": 4, "truncated": True},
        None,
    ]


def test_rank_command(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("a\n\n긴 문서\r\nunit\u2028separator", encoding="utf-8")
    assert main(["rank", "query", str(file), "--url", url, "--top-k", "2"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in output[1:]] == ["3", "2"]
    assert main(["rank", "query", str(tmp_path / "none"), "--url", url]) == 1
    assert "No such file" in capsys.readouterr().err
    file.write_bytes(b"\xff")
    assert main(["rank", "query", str(file), "--url", url]) == 1
    assert "line 1 of" in capsys.readouterr().err
    assert main(["rank", "query", str(file), "--url", f"http://{url}"]) == 1
    assert capsys.readouterr().err
    file.write_bytes(b"\xef\xbb\xbfa")
    assert main(["rank", "query", str(file), "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["document"] == "a"


@pytest.mark.parametrize(
    ("arguments", "redirections", "message"),
    [
        (["query", "{file}", "--timeout=nan"], "", "timeout is nan: pass seconds"),
        (["query", "{file}", "--timeout=0"], "", "pass a longer timeout"),
        (["query", "{file}", "--url=127.0.0.1:9"], "", "Connection refused"),
        (["query", "{file}", "--url="], "", "pass HOST:PORT"),
        (["query", "{file}", "--root-certificates={file}"], "", "pass PEM files"),
        (["\udcff", "{file}"], "", "query has half of a surrogate pair"),
        (["query", "/"], "", "Is a directory"),
        (["query"], "<&-", "standard input is closed: name a file"),
        (["query", "{file}"], ">&-", "standard output is closed"),
        (["query", "{file}"], ">/dev/full", "No space left on device"),
    ],
)
def test_rank_command_fails_in_one_line(
    url: str, tmp_path: Path, arguments: list[str], redirections: str, message: str
) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("a\nb\n")
    rank = [each.format(file=file) for each in arguments]
    if not any("--url" in each for each in rank):
        rank.append(f"--url={url}")
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh"]
    command = [*shell, sys.executable, "-m", "tritonrank", "rank", *rank]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("tritonrank: ")
    assert message in line


def test_rank_command_writes_utf_8(url: str) -> None:
    command = [sys.executable, "-m", "tritonrank", "rank", "query", f"--url={url}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input="일".encode(), capture_output=True, env=environment)
    assert done.stdout.decode().endswith("일\n")


def test_the_client_needs_no_package_of_the_server() -> None:
    others = ["onnx", "onnxruntime", "tokenizers", "torch", "transformers", "tritonrank_server"]
    script = f"import sys; sys.modules.update(dict.fromkeys({others})); import tritonrank.cli"
    subprocess.run([sys.executable, "-c", script], check=True)
    # As installed: with the server's modules, without their packages.
    without = "import sys; sys.modules['tokenizers'] = None; import tritonrank.cli"
    command = f"{without}; sys.exit(tritonrank.cli.main(['demo']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("pip install '.[serving]'")
    command = f"{script}; sys.exit(tritonrank.cli.main(['serve']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install '.[serving]'")


@pytest.mark.parametrize(
    ("count", "bulk", "level"),
    [(4, False, (0, False)), (3, True, (2, True)), (5, False, (2, True))],
)
def test_a_bulk_call_says_so(count: int, bulk: bool, level: tuple[int, bool]) -> None:
    service = Service()
    with listening(service) as (_, url), RerankClient(url) as client:
        assert len(client.rank("q", ["a"] * count, bulk=bulk)) == count
    assert {*service.levels} == {level}


def test_a_bulk_call_is_in_small_parts() -> None:
    for bulk, sizes in ((True, [27, 27, 26]), (False, [80])):
        parts = protocol.parts(["a"] * 80, Options(bulk=bulk), 1024)
        assert [len(texts) for _, texts in parts] == sizes
    texts = ["a" * size for size in (10_000, 100, 2000, 2000, 200)]
    assert protocol.passages(texts, 20) == [20, 1, 16, 16, 2]
    assert protocol.usual_passages(texts, 20) == 20 + 1 + 4 + 4 + 1
    parts = protocol.parts(texts, Options(20, bulk=True), 1024)
    assert [(start, len(some)) for start, some in parts] == [(0, 2), (2, 1), (3, 2)]
    assert protocol.parts([], Options(), 1024) == [(0, [])]


def test_few_parts_are_under_way(
    rank: Rank, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PARTS_UNDER_WAY", 3)
    service.delay = 0.05
    documents = ["x" * i for i in range(10 * LIMIT)]
    assert [each.document for each in rank("query", documents)] == documents[::-1]
    assert service.most_under_way == 3
