"""The gateway on a real server: what it tells, what it passes on, overload, deadlines, TLS."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from conftest import GatewayProcess, gateway_at, gateway_of, start
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonrank import RerankClient
from tritonrank.protocol import USUAL_BYTES_PER_PASSAGE
from tritonrank_server.serving.serve import EmbeddedServer

CALL = {"query": "tea", "documents": ["a car", "green tea", "차 한 잔"]}


FILLER = "The train leaves the station at noon, and the platform is empty again. "
LONG = FILLER * 60 + "Green tea is what people drink with a meal. " + FILLER * 20


@contextmanager
def serving(service: Any) -> Iterator[str]:
    """A server of the wire contract that a test makes, for what a real one does too seldom."""
    server = grpc.server(ThreadPoolExecutor(8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers a call as it is told to, and keeps what it was asked."""

    def __init__(self, code: grpc.StatusCode | None = None, ready: bool = True) -> None:
        self.code, self.ready = code, ready
        self.seen: list[tuple[str, dict[str, str], int]] = []
        self.bulk: set[bool] = set()
        self.go, self.cancelled = threading.Event(), threading.Event()

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = 1024
        return answer

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.seen.append((request.id, metadata, request.parameters["timeout"].int64_param))
        self.bulk.add(request.parameters["bulk"].bool_param)
        context.add_callback(lambda: self.go.is_set() or self.cancelled.set())
        if self.code is None:
            self.go.wait(30)
            self.code = grpc.StatusCode.INTERNAL
        context.abort(self.code, "as the test says")


# What it tells.


def test_it_tells_what_clients_ask(gateway: GatewayProcess, int8_server: EmbeddedServer) -> None:
    with RerankClient(int8_server.grpc_url) as client:
        model = client.rank("tea", ["tea"]).model
    assert model
    with httpx.Client(base_url=gateway.url) as http:
        info = http.get("/info").json()
        assert info["model_id"] == model.name
        assert info["model_sha"] == model.revision
        assert info["max_input_length"] == model.max_length == 512
        assert "reranker" in info["model_type"]
        assert info["max_client_batch_size"] >= 1000
        for path in ("/v1/models", "/models", "/infinity/models"):
            [told] = http.get(path).json()["data"]
            assert told["id"] == model.name
        healthy = ("/health", "/v1/health/ready", "/health/live", "/ping", "/.well-known/ready")
        for path in (
            *healthy,
            "/.well-known/live",
            "/meta",
            "/tei/health",
            "/openapi.json",
            "/docs",
            "/",
        ):
            assert http.get(path).status_code == 200, path
            assert http.head(path).status_code == 200, path
        for method, path, status in (
            ("GET", "/rerank", 405),
            ("POST", "/health", 405),
            ("DELETE", "/rerank", 405),
            ("GET", "/nowhere", 404),
            ("POST", "/nowhere", 404),
        ):
            answer = http.request(method, path, json=CALL)
            assert answer.status_code == status, path
            assert answer.json()["message"]


def test_the_document_names_what_there_is(gateway: GatewayProcess) -> None:
    document = httpx.get(f"{gateway.url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            body = {"text_1": "a", "text_2": ["b"]} if path == "/score" else CALL
            content = {"json": body} if method == "post" else {}
            answer = httpx.request(method, gateway.url + path, timeout=30, **content)
            assert answer.status_code == 200, path


def test_metrics_and_log_lines(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    with gateway_of(int8_server, tmp_path / "log", "--log-json", "--cache=100") as gateway:
        for _ in range(2):
            answer = httpx.post(
                f"{gateway.url}/tei/rerank",
                json={"query": "tea", "texts": CALL["documents"]},
                headers={"x-request-id": "from-afar"},
            )
            assert answer.headers["x-request-id"] == "from-afar"
        tokens = httpx.post(f"{gateway.url}/rerank", json=CALL).json()["usage"]["total_tokens"]
        other = httpx.post(f"{gateway.url}/rerank", json={}, headers={"x-request-id": "a b"})
        assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"])
        metrics = httpx.get(f"{gateway.url}/metrics").text
    for line in (
        'requests_total{dialect="tei",status="200"} 2.0',
        'requests_total{dialect="cohere",status="200"} 1.0',
        'requests_total{dialect="cohere",status="422"} 1.0',
        "documents_total 9.0",
        f"tokens_total {3 * tokens}.0",
        "documents_under_way 0.0",
        "cache_hits_total 6.0",
        "cache_misses_total 3.0",
        "request_seconds_count 4.0",
    ):
        assert f"tritonrank_gateway_{line}\n" in metrics
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines()[1:]]
    first, *_, last = (line for line in lines if "dialect" in line)
    assert first["id"] == "from-afar"
    assert (first["documents"], first["tokens"], first["status"]) == (3, tokens, 200)
    assert (last["documents"], last["tokens"], last["status"]) == (0, None, 422)


def test_what_is_refused_is_in_the_log(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    with gateway_of(int8_server, tmp_path / "log") as gateway:
        for path in ("/rerank", "/nowhere/a%0Ab=c", "/v3/rerank"):
            httpx.post(gateway.url + path, json={"query": "tea"})
        httpx.get(f"{gateway.url}/health")
        assert 'dialect="none",status="404"} 2.0' in httpx.get(f"{gateway.url}/metrics").text
        _, *lines = gateway.log.read_text().splitlines()
    assert len(lines) == 3
    assert 'path="/rerank"' in lines[0]
    assert 'error="documents is missing: send a list"' in lines[0]
    assert 'path="/nowhere/' in lines[1]
    assert "status=404" in lines[2]


def test_names_of_the_model(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    names = ["--served-model-name=rerank-1", "--served-model-name=rerank-2"]
    with (
        gateway_of(int8_server, tmp_path / "log", *names) as gateway,
        httpx.Client(base_url=gateway.url, timeout=30) as http,
    ):
        assert [each["id"] for each in http.get("/models").json()["data"]] == [
            "rerank-1",
            "rerank-2",
        ]
        for asked, told in ((None, "rerank-1"), ("rerank-2", "rerank-2"), ("", "rerank-1")):
            answer = http.post("/v2/rerank", json={**CALL, "model": asked})
            assert answer.json()["model"] == told
        refused = http.post("/v2/rerank", json={**CALL, "model": "gpt"})
        assert refused.status_code == 404
        assert "use rerank-1, rerank-2" in refused.json()["message"]


def test_passages_where_a_request_does_not_say(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    options = ["--max-passages=8", "--cache=100"]
    with (
        gateway_of(int8_server, tmp_path / "log", *options) as gateway,
        RerankClient(int8_server.grpc_url) as client,
    ):
        body = {"query": "something to drink", "documents": [LONG, "a car"]}
        for asked, most in (
            ({}, 8),
            ({"max_chunks_per_doc": 1}, 1),
            ({"max_passages": 2}, 2),
            ({"max_chunks_per_doc": None}, 8),
        ):
            answer = httpx.post(f"{gateway.url}/rerank", json={**body, **asked}, timeout=60).json()
            expected = client.rank(*body.values(), max_passages=most)
            assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [
                (each.index, each.score) for each in expected
            ]
            assert answer["usage"]["total_tokens"] == sum(each.tokens or 0 for each in expected)
        # Each once for each number of passages.
        assert "cache_misses_total 6.0" in httpx.get(f"{gateway.url}/metrics").text


def test_pages_of_other_origins(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    ours = {"origin": "https://ours.example"}
    preflight = {**ours, "access-control-request-method": "POST"}
    options = ["--cors-origin=https://ours.example"]
    with gateway_of(int8_server, tmp_path / "log", *options) as gateway:
        url = f"{gateway.url}/rerank"
        assert httpx.options(url, headers=preflight).status_code == 200
        answer = httpx.post(url, json=CALL, headers=ours)
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        other = httpx.post(url, json=CALL, headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_without_origins_there_are_none(gateway: GatewayProcess) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{gateway.url}/rerank", headers=headers)
    assert answer.status_code == 405
    assert not any("access-control" in name for name in answer.headers)
    # What a form of another page can send without being asked first.
    simple = httpx.post(
        f"{gateway.url}/rerank",
        content=json.dumps(CALL),
        headers={
            "content-type": "text/plain",
            "origin": "https://a.example",
        },
    )
    assert simple.status_code == 415


def test_tls(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key")
    for each in certificate.cert_chain_pems:
        each.write_to_path(tmp_path / "chain", append=True)
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    files = [f"--ssl-keyfile={tmp_path / 'key'}", f"--ssl-certfile={tmp_path / 'chain'}"]
    with gateway_of(int8_server, tmp_path / "log", *files) as gateway:
        assert gateway.url.startswith("https://")
        answer = httpx.post(f"{gateway.url}/rerank", json=CALL, verify=str(tmp_path / "ca"))
        assert answer.json()["results"][0]["index"] == 1


# What it passes on, and what becomes of the server's errors.


@pytest.mark.parametrize(
    ("code", "ready", "status"),
    [
        (grpc.StatusCode.UNAVAILABLE, True, 429),
        (grpc.StatusCode.UNAVAILABLE, False, 503),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, True, 429),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True, 504),
        (grpc.StatusCode.INVALID_ARGUMENT, True, 422),
        (grpc.StatusCode.INTERNAL, True, 500),
        (grpc.StatusCode.CANCELLED, True, 504),
        (grpc.StatusCode.NOT_FOUND, True, 503),
    ],
)
def test_errors_of_the_server(
    code: grpc.StatusCode, ready: bool, status: int, tmp_path: Path
) -> None:
    service = Scripted(code, ready)
    headers = {"x-request-id": "mine", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    with serving(service) as url, gateway_at(url, tmp_path / "log", "--timeout=20") as gateway:
        answer = httpx.post(f"{gateway.url}/rerank", json=CALL, headers=headers, timeout=40)
        health = httpx.get(f"{gateway.url}/health").status_code
    assert answer.status_code == status
    assert answer.json()["id"] == "mine"
    busy = status in (429, 503) and code != grpc.StatusCode.NOT_FOUND
    assert ("retry-after" in answer.headers) == busy
    assert health == (200 if ready else 503)
    id, metadata, timeout = service.seen[0]
    assert id == "mine"
    assert metadata["traceparent"] == headers["traceparent"]
    assert 15e6 < timeout <= 20e6


def test_without_a_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        url = f"127.0.0.1:{occupied.getsockname()[1]}"
    with gateway_at(url, tmp_path / "log", "--timeout=3") as gateway:
        assert httpx.post(f"{gateway.url}/rerank", json=CALL, timeout=20).status_code in (503, 504)
        assert httpx.get(f"{gateway.url}/health", timeout=20).status_code == 503
        assert httpx.get(f"{gateway.url}/info", timeout=20).status_code == 503
        assert httpx.get(f"{gateway.url}/health/live").status_code == 200
        assert f"no server is ready at ['{url}']" in gateway.log.read_text()


def test_too_many_documents_under_way(tmp_path: Path) -> None:
    service = Scripted()
    options = ["--max-documents-under-way=3", "--timeout=25"]
    with (
        serving(service) as url,
        gateway_at(url, tmp_path / "log", *options) as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        rerank = f"{gateway.url}/rerank"
        first = pool.submit(httpx.post, rerank, json=CALL, timeout=40)
        while not service.seen:
            time.sleep(0.01)
        # Before its body is there.
        refused = httpx.post(rerank, content=b"{", headers={"content-type": "application/json"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        service.go.set()
        assert first.result().status_code == 500


def test_documents_under_way_are_counted_when_they_are_known(tmp_path: Path) -> None:
    service = Scripted()
    options = ["--max-documents-under-way=4", "--timeout=25"]
    with (
        serving(service) as url,
        gateway_at(url, tmp_path / "log", *options) as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        rerank = f"{gateway.url}/rerank"
        first = pool.submit(httpx.post, rerank, json=CALL, timeout=40)
        while not service.seen:
            time.sleep(0.01)
        assert httpx.post(rerank, json=CALL).status_code == 429  # Three more are six.
        service.go.set()
        first.result()


class Known(Scripted):
    """Tells its model, which the gateway asks for with a pair of its own."""

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.id:
            return super().ModelInfer(request, context)
        answer = service_pb2.ModelInferResponse()
        model = {"name": "a", "precision": "int8", "activation": "Sigmoid", "revision": "0"}
        for name, raw in (
            ("INDICES", bytes(4)),
            ("SCORES", bytes(4)),
            ("LOGITS", bytes(4)),
            ("MODEL", json.dumps({**model, "max_length": 512}).encode()),
        ):
            answer.outputs.add(name=name)
            answer.raw_output_contents.append(raw)
        return answer


def test_a_document_counts_for_its_passages(tmp_path: Path) -> None:
    service, each = Known(), len(LONG.encode()) // USUAL_BYTES_PER_PASSAGE + 1
    options = [f"--max-documents={10 * each}", f"--max-documents-under-way={10 * each + 50}"]
    many = {"query": "tea", "documents": [LONG] * 10, "max_chunks_per_doc": 100_000}
    few = {**many, "documents": ["a cup of tea"] * 50}
    with (
        serving(service) as url,
        gateway_at(url, tmp_path / "log", *options) as gateway,
        ThreadPoolExecutor(2) as pool,
    ):

        def under_way(documents: int) -> None:
            while f"under_way {documents}.0" not in httpx.get(f"{gateway.url}/metrics").text:
                time.sleep(0.01)

        rerank = f"{gateway.url}/rerank"
        more = {**many, "documents": [*many["documents"], "tea"]}
        refused = httpx.post(rerank, json=more)
        assert refused.status_code == 422
        assert f"of about {10 * each + 1} passages" in refused.json()["message"]
        pool.submit(httpx.post, rerank, json=many, timeout=60)
        under_way(10 * each)
        assert httpx.post(rerank, json={**many, "documents": [LONG] * 9}).status_code == 429
        pool.submit(httpx.post, rerank, json=few, timeout=60)
        under_way(10 * each + 50)
        assert httpx.post(rerank, json={**many, "documents": ["tea"]}).status_code == 429
        service.go.set()


@pytest.mark.parametrize(("documents", "bulk"), [(1024, False), (1025, True)])
def test_many_passages_go_after_all_others(documents: int, bulk: bool, tmp_path: Path) -> None:
    long = "tea " * (7 * USUAL_BYTES_PER_PASSAGE // 4)  # Eight passages by its size.
    body = {"query": "tea", "documents": [long] * (documents // 8) + ["tea"] * (documents % 8)}
    service = Known(grpc.StatusCode.INTERNAL)
    with serving(service) as url, gateway_at(url, tmp_path / "log") as gateway:
        answer = httpx.post(f"{gateway.url}/rerank", json={**body, "max_passages": 8}, timeout=60)
    assert answer.status_code == 500
    assert service.bulk == {bulk}


class Slow(Scripted):
    """Takes half a second for each call."""

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(0.5)
        return super().ModelInfer(request, context)


def test_many_queries_share_one_deadline(tmp_path: Path) -> None:
    pairs = {"text_1": [f"q{i}" for i in range(500)], "text_2": ["d"] * 500}
    with (
        serving(Slow(grpc.StatusCode.DEADLINE_EXCEEDED)) as url,
        gateway_at(url, tmp_path / "log", "--timeout=2") as gateway,
    ):
        assert httpx.post(f"{gateway.url}/score", json=pairs, timeout=60).status_code == 504


def test_who_hangs_up_is_not_waited_for(tmp_path: Path) -> None:
    service = Scripted()
    with serving(service) as url, gateway_at(url, tmp_path / "log") as gateway:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{gateway.url}/rerank", json=CALL, timeout=1)
        assert service.cancelled.wait(10)
        service.go.set()
        assert "under_way 0.0" in httpx.get(f"{gateway.url}/metrics").text
        assert "status=499" in gateway.log.read_text()


def test_what_was_begun_is_answered(int8_repository: Path, tmp_path: Path) -> None:
    with start(int8_repository) as server, gateway_of(server, tmp_path / "log") as gateway:
        many = {"query": "tea", "documents": [f"{i} cups of tea " * 20 for i in range(200)]}
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(httpx.post, f"{gateway.url}/rerank", json=many, timeout=60)
            while "under_way 200.0" not in httpx.get(f"{gateway.url}/metrics").text:
                time.sleep(0.01)
            gateway.process.send_signal(signal.SIGTERM)
            assert len(under_way.result().json()["results"]) == 200
        assert gateway.process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port=99999"], "cannot listen on"),
        (["--api-key-file=/nowhere"], "cannot be read"),
        (["--url=http://a:1"], "has a scheme"),
        (["--timeout=-1"], "limit of seconds"),
        (["--cache=-1"], "cache is -1"),
        (["--ssl-certfile=/nowhere", "--ssl-keyfile=/nowhere"], "/nowhere"),
        (["--ssl-keyfile=/etc/hostname"], "together"),
        (["--ssl-keyfile=/etc/hostname", "--ssl-certfile=/etc/hostname"], "/etc/hostname"),
        (["--cors-origin=a.example"], "a.example is no origin"),
        (["--max-documents=0"], "limit of documents"),
        (["--max-passages=0"], "max_passages is 0"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(
    options: list[str], message: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(AssertionError),
        gateway_at("127.0.0.1:1", tmp_path / "log", *options),
    ):
        pass
    printed = (tmp_path / "log").read_text()
    assert message in printed.splitlines()[-1]
    assert "Traceback" not in printed
