"""The client against servers that fail in ways a real one does only under load."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from tritonrank.table import format_table

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
    service: Service, credentials: grpc.ServerCredentials | None = None
) -> Iterator[tuple[grpc.Server, str]]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    if credentials:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
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


@pytest.mark.parametrize(
    ("documents", "message"),
    [("one string", "pass a list"), (b"bytes", "pass a list"), (["a", None], r"documents\[1\] is")],
)
def test_what_is_no_list_of_strings(rank: Rank, documents: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rank("query", documents)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ([], "no URL"),
        (["one.invalid:8001", "other.invalid:8001"], "no host is known"),
        (["127.0.0.1:8001", "[::1]:8001"], "all IPv4, or all IPv6"),
        ("127.0.0.1", "pass HOST:PORT"),
        (["127.0.0.1:8001", "127.0.0.1:99999"], "127.0.0.1:99999 is no address"),
    ],
)
def test_urls_that_lead_nowhere(url: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RerankClient(url)


def test_a_name_without_an_address_is_left_out(url: str) -> None:
    with RerankClient([url, "no.such.host.invalid:8001"]) as client:
        assert client.rank("q", ["a"])


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), 1e30])
def test_a_timeout_beyond_all_bounds(rank: Rank, timeout: float) -> None:
    with pytest.raises(ValueError, match="pass seconds"):
        rank("q", ["a"], timeout=timeout)


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
    header, row = table.splitlines()
    assert row.startswith("   1  0.5000   -1.250      3  日本 語")
    assert row.endswith("…")
    wide = sum(2 if ord(character) > 0x3000 else 1 for character in row)
    assert len(header) - len("document") + 20 < wide <= 60


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
        parts = protocol.parts(["a"] * 80, bulk, 1024)
        assert [len(texts) for _, texts in parts] == sizes


def test_few_parts_are_under_way(
    rank: Rank, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PARTS_UNDER_WAY", 3)
    service.delay = 0.05
    documents = ["x" * i for i in range(10 * LIMIT)]
    assert [each.document for each in rank("query", documents)] == documents[::-1]
    assert service.most_under_way == 3
