"""Hostile requests and connections at the gateway, beside a good client that notices nothing."""

from __future__ import annotations

import gzip
import json
import re
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import GatewayProcess, gateway_of
from tritonrank_server.serving.serve import EmbeddedServer

#: Seconds of the gateway under test; what a good client waits at most, on a busy machine.
TIMEOUT, PATIENCE = 5, 30
BYTES, DOCUMENTS = 4 << 20, 1000
#: What the gateway's memory may have grown by after an attack.
MEMORY = 512 << 20
CONNECTIONS = 10_000
#: As many documents as a request may have; some seconds of work.
LONG = {"query": "tea", "documents": [f"green tea {i} " * 150 for i in range(DOCUMENTS)]}


def body(**fields: Any) -> bytes:
    return json.dumps({"query": "tea", "documents": ["a car", "green tea"]} | fields).encode()


def head(*headers: str, first: str = "POST /rerank HTTP/1.1") -> bytes:
    return "\r\n".join([first, "Host: a", *headers, "", ""]).encode("latin-1")


def request(*headers: str, content: bytes = body(), **options: str) -> bytes:
    return head(f"Content-Length: {len(content)}", *headers, **options) + content


def nested(start: bytes, end: bytes, depth: int) -> bytes:
    return b'{"query": "tea", "documents": [%b]}' % (start * depth + b'"tea"' + end * depth)


@pytest.fixture(scope="module")
def hostile(
    int8_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    """A gateway that gives up sooner, and takes less."""
    limits = f"--timeout={TIMEOUT}", f"--max-body-bytes={BYTES}", f"--max-documents={DOCUMENTS}"
    with gateway_of(int8_server, tmp_path_factory.mktemp("hostile") / "log", *limits) as started:
        yield started
        log = started.log.read_text()
        assert "Traceback" not in log, log


@contextmanager
def undisturbed(gateway: GatewayProcess) -> Iterator[None]:
    """Meanwhile a good client gets its answers; then nothing is under way, and memory is free."""
    ended = threading.Event()

    def ask() -> int:
        answers = 0
        with httpx.Client(base_url=gateway.url, timeout=PATIENCE) as client:
            while not ended.is_set() or answers < 3:
                answer = client.post("/rerank", content=body())
                assert answer.status_code == 200, answer.text
                assert [each["index"] for each in answer.json()["results"]] == [1, 0]
                answers += 1
                time.sleep(0.02)
        return answers

    before = psutil.Process(gateway.process.pid).memory_info().rss
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(ask)
        try:
            yield
        finally:
            ended.set()
        good.result()
    await_(lambda: metric(f"{gateway.url}/metrics", "documents_under_way") == 0)
    assert psutil.Process(gateway.process.pid).memory_info().rss < before + MEMORY


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metric(url: str, pattern: str) -> float:
    """The sum of all lines whose name and labels match."""
    lines = re.findall(
        rf"^[^#\n]*(?:{pattern})[^\n]* ([\d.e+]+)$", httpx.get(url).text, re.MULTILINE
    )
    return sum(map(float, lines))


def connected(gateway: GatewayProcess) -> socket.socket:
    return socket.create_connection((httpx.URL(gateway.url).host, httpx.URL(gateway.url).port), 60)


def received(connection: socket.socket) -> bytes:
    """All until its end."""
    parts = []
    with suppress(ConnectionResetError):  # By a gateway that did not read all that was sent.
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer_to(gateway: GatewayProcess, sent: Iterable[bytes]) -> bytes:
    with connected(gateway) as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            for part in sent:
                connection.sendall(part)
        return received(connection)


def check_error(answer: httpx.Response, status: int, names: str) -> None:
    """It is of this status, and says what is wrong in every client's words, not at length."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()
    assert names in told["message"]
    assert told["detail"] == told["message"]
    error = told["error"]
    assert (error if isinstance(error, str) else error["message"]) == told["message"]
    assert len(answer.content) < 4096


# Bodies.

BAD: dict[str, tuple[int, bytes, str]] = {
    "empty": (400, b"", "JSON"),
    "text": (400, b"tea", "JSON"),
    "half": (400, body()[:-1], "JSON"),
    "two": (400, body() * 2, "JSON"),
    "a list": (400, b"[]", "object"),
    "a number": (400, b"1", "object"),
    "a string": (400, b'"tea"', "object"),
    "null": (400, b"null", "object"),
    "NUL": (400, b"\0" + body(), "JSON"),
    "a NUL in a string": (400, b'{"query": "\0"}', "JSON"),
    "NaN": (400, b'{"top_n": NaN}', "JSON"),
    "infinity": (400, b'{"top_n": -Infinity}', "JSON"),
    "a huge number": (400, b'{"top_n": 1e999}', "JSON"),
    "many digits": (400, b'{"top_n": %b}' % (b"9" * 100_000), "JSON"),
    "half a surrogate pair": (400, b'{"query": "\\ud83c"}', "JSON"),
    "an encoded surrogate": (400, b'{"query": "\xed\xa0\xbc"}', "JSON"),
    "UTF-16": (400, body().decode().encode("utf-16"), "UTF-8"),
    "BOM": (400, b"\xef\xbb\xbf" + body(), "UTF-8"),
    "Latin-1": (400, '{"query": "thé"}'.encode("latin-1"), "UTF-8"),
    "deep lists": (400, nested(b"[", b"]", 100_000), "JSON"),
    "deep objects": (400, nested(b'{"a": ', b"}", 100_000), "JSON"),
    "objects too deep for YAML": (422, nested(b'{"a": ', b"}", 500), "documents"),
    "objects too deep for the answer": (
        422,
        body(
            return_documents=True, documents=[{"text": "", "a": json.loads("[" * 300 + "]" * 300)}]
        ),
        "documents",
    ),
    "a deep query": (422, body(query=json.loads(nested(b'{"a": ', b"}", 500))), "query"),
    "too many values": (422, body(documents=[{"a": [1] * 200_000}]), "100000"),
    "too many documents": (
        422,
        body(documents=["tea"] * 1001),
        "1001, and a request may have 1000",
    ),
    "far too many documents": (422, body(documents=[""] * 1_000_000), "may have 1000"),
    "too many texts": (422, body(documents=None, texts=["tea"] * 1001), "texts"),
    "too many pairs": (400, b'{"text_1": "a", "text_2": ["b"%b]}' % (b', "b"' * 1000), "text_2"),
    "uneven pairs": (400, b'{"queries": ["a", "b"], "documents": ["c"]}', "queries has 2"),
    "a blank query": (422, body(query=" \n"), "blank"),
    "a long query": (422, body(query="tea " * 500_000), "characters"),
    "no query": (422, b'{"documents": ["tea"]}', "query"),
    "no documents": (422, b'{"query": "tea"}', "documents"),
    "many names": (422, body(rank_fields=["a"] * 101), "rank_fields"),
    "no such name": (422, body(documents=[{"a": ""}], rank_fields=["b" * 10_000]), "documents[0]"),
    "a text that is null": (422, body(documents=[{"text": None}]), "documents[0].text is null"),
    "a number as text": (422, body(documents=["tea", {"text": 5}]), "documents[1].text is 5"),
    "no pairs": (400, b'{"queries": ["a"]}', "documents are missing"),
    "a bomb of lists": (413, b'{"a": [%b]}' % (b"[]," * 1_000_001 + b"0"), "lists and objects"),
    "an image beside a text": (
        422,
        b'{"query": {"text": "a"}, "passages": [{"text": "b", "image": "data:"}]}',
        "passages[0].image",
    ),
    "an image": (422, body(documents=[{"image": "data:"}]), "documents[0]"),
    "a short limit": (422, body(max_length=1), "max_length"),
    "passages without end": (
        422,
        body(documents=["green tea " * 400_000], max_chunks_per_doc=10**9),
        "and a request may have 1000",
    ),
    "spans without a mode": (422, body(relevant_spans={"threshold": 0}), "relevant_spans.mode"),
    "spans of any score": (
        422,
        body(relevant_spans={"mode": "enabled", "threshold": 2}),
        "relevant_spans.threshold is 2",
    ),
    "no spans": (
        422,
        body(relevant_spans={"mode": "enabled", "max_spans": 0}),
        "relevant_spans.max_spans is 0",
    ),
}
for field, values in {
    "query": [None, 1, True, [], {}, {"image": ""}],
    "documents": [None, "tea", 1, True, {}, [], [None], [1], [[]], [{}], [{"content": [{}]}]],
    "texts": [[], [None], "tea"],
    "passages": [[], [None], "tea"],
    "top_n": ["2", 1.5, -1, True, [], {}, -1e300],
    "top_k": ["2", 1.5, -1, True, [], {}],
    "model": [1, True, [], {}],
    "return_documents": [0, 1, "yes", [], {}],
    "raw_scores": [1, "yes", [], {}],
    "rank_fields": ["a", 1, {}, [1], [None]],
    "truncation": [1, "yes", "START", [], {}],
    "max_tokens_per_doc": [-1, "9", 1.5, True, []],
    "max_doc_length": [-1, "9"],
    "max_chunks_per_doc": [-1, "9", 1.5, True, []],
    "max_passages": [-1, "9"],
    "overlap_tokens": [-1, "9", 81],
    "truncate_prompt_tokens": [-2, "9"],
    "instruction": ["read well"],
    "relevant_spans": [True, "enabled", [1], {"mode": True}, {"mode": "on"}],
}.items():
    for value in values:
        others = {"documents": None} if field in ("texts", "passages") else {}
        BAD[f"{field}: {json.dumps(value)}"] = 422, body(**{**others, field: value}), field


@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_refused_by_name(hostile: GatewayProcess, case: str) -> None:
    status, content, names = BAD[case]
    check_error(httpx.post(f"{hostile.url}/rerank", content=content, timeout=60), status, names)


ODD = {
    "duplicate keys": b'{"query": "car", "query": "tea", "documents": ["a car", "green tea"]}',
    "null": body(top_n=None, return_documents=None, model=None, rank_fields=None),
    "an empty document": body(documents=["a car", "green tea", ""]),
    "an escaped NUL": body(documents=["a car", "green tea", "\0"]),
    "one huge document": body(documents=["a car", "green tea " * 400_000]),
    "one huge object": body(documents=[{"a": "car"}, {"a": "green tea 🍵 " * 150_000}]),
    "a huge top_n": body(top_n=1e300),
    "a huge limit": body(max_tokens_per_doc=1e300),
    "passages without end": body(documents=["tea"] * 1000, max_chunks_per_doc=1e300),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_body_is_ranked(hostile: GatewayProcess, case: str) -> None:
    answer = httpx.post(f"{hostile.url}/rerank", content=ODD[case], timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity", "tea"])
def test_an_encoded_body_is_not_decoded(hostile: GatewayProcess, encoding: str) -> None:
    bomb = gzip.compress(bytes(100 << 20))
    with undisturbed(hostile):
        headers = {"content-encoding": encoding}
        answer = httpx.post(f"{hostile.url}/rerank", content=bomb, headers=headers)
    check_error(answer, 415, "not encoded")
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data; boundary=a", "b" * 9999])
def test_another_content_type_is_refused(hostile: GatewayProcess, kind: str) -> None:
    answer = httpx.post(f"{hostile.url}/rerank", content=body(), headers={"content-type": kind})
    check_error(answer, 415, "application/json")


def test_other_paths_and_methods_are_refused(hostile: GatewayProcess) -> None:
    with httpx.Client(base_url=hostile.url) as client:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            check_error(client.request(method, "/v1/rerank"), 405, "POST")
        check_error(client.post("/health"), 405, "GET")
        for path in ("/tea", "/%ff%00", "/..%2f..%2fetc/passwd", "/" + "a" * 50_000):
            check_error(client.post(path), 404, "/rerank")
            check_error(client.get(path), 404, "/rerank")


def test_too_large_a_body_is_refused(hostile: GatewayProcess) -> None:
    chunks = (b" " * 65536 for _ in range(1000))  # Without a length.
    for content in (b" " * (BYTES + 1), chunks):
        with undisturbed(hostile):
            answer = httpx.post(f"{hostile.url}/rerank", content=content, timeout=60)
        check_error(answer, 413, f"{BYTES} bytes")


# What is hardly HTTP.

CHUNKED = "Transfer-Encoding: chunked"
ENDLESS = [b"a" * 65536] * 200

RAW: dict[str, tuple[int, list[bytes]]] = {
    "TLS": (400, [bytes.fromhex("16030100f5010000f10303"), bytes(240)]),
    "HTTP/2": (400, [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
    "HTTP/9.9": (400, [request(first="POST /rerank HTTP/9.9")]),
    "no method": (400, [request(first="/rerank HTTP/1.1")]),
    "CONNECT": (400, [head(first="CONNECT a:1 HTTP/1.1")]),
    "a path beyond ASCII": (400, [head(first="GET /th\xe9 HTTP/1.1")]),
    "no colon": (400, [request("tea")]),
    "a NUL": (400, [request("a: \0")]),
    "a folded header": (400, [request("a: b\r\n c")]),
    "a negative length": (400, [head("Content-Length: -1")]),
    "a huge length": (413, [head("Content-Length: 999999999999")]),
    "a huge length, and to be asked for": (
        413,
        [head("Content-Length: 999999999999", "Expect: 100-continue")],
    ),
    "a length beyond 64 bits": (400, [head("Content-Length: " + "9" * 5000)]),
    "two lengths": (400, [request("Content-Length: 3")]),
    "chunks and a length": (400, [request(CHUNKED)]),
    "chunks twice": (400, [head(CHUNKED, CHUNKED), b"0\r\n\r\n"]),
    "an encoding that is not the last": (400, [head("Transfer-Encoding: gzip")]),
    "no chunk": (400, [head(CHUNKED), b"tea\r\n"]),
    "a negative chunk": (400, [head(CHUNKED), b"-1\r\n"]),
    "a chunk beyond 64 bits": (400, [head(CHUNKED), b"f" * 17 + b"\r\n"]),
    "an endless line": (431, [b"GET /", *ENDLESS]),
    "an endless header": (431, [head()[:-2], b"a: ", *ENDLESS]),
    "endless headers": (431, [head()[:-2], *[b"a: b\r\n" * 10_000] * 100]),
    "endless trailers": (431, [head(CHUNKED), b"0\r\n", *[b"a: b\r\n" * 10_000] * 100]),
    "an endless chunk extension": (431, [head(CHUNKED), b"1;", *ENDLESS]),
}


@pytest.mark.parametrize("case", RAW)
def test_what_is_hardly_http_is_refused(hostile: GatewayProcess, case: str) -> None:
    status, sent = RAW[case]
    with undisturbed(hostile):
        told, _, content = answer_to(hostile, sent).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 %d " % status), told
    assert json.loads(content)["message"]


def test_old_and_rare_http_is_understood(hostile: GatewayProcess) -> None:
    last = "Connection: close"
    old = answer_to(hostile, [request(first="POST /rerank HTTP/1.0")])
    assert old.startswith(b"HTTP/1.1 200 ")
    chunks = [b"%x\r\n%c\r\n" % (1, byte) for byte in body()]
    assert b" 200 OK" in answer_to(hostile, [head(CHUNKED, last), *chunks, b"0\r\n\r\n"])
    for trace in ("a\tb", "a" * 20_000, "\xff", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"):
        assert b" 200 OK" in answer_to(hostile, [request(f"traceparent: {trace}", last)])
    with connected(hostile) as connection:
        connection.sendall(head(f"Content-Length: {len(body())}", "Expect: 100-continue", last))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body())
        assert received(connection).startswith(b"HTTP/1.1 200 ")
    # As Java's and curl's clients ask for HTTP/2; with the body at once, and after the headers.
    upgrade = "Connection: close, Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"
    assert b" 200 OK" in answer_to(hostile, [request(*upgrade)])
    parts = [head(f"Content-Length: {len(body())}", *upgrade), body()]
    assert b" 200 OK" in answer_to(hostile, parts)
    pipelined = [request(f"x-request-id: {i}", *[last] * (i == 99)) for i in range(100)]
    answers = answer_to(hostile, [b"".join(pipelined)])
    assert re.findall(rb'"id":"(\d+)"', answers) == [b"%d" % i for i in range(100)]


# Many, slow and half.


@pytest.fixture
def many() -> Iterator[int]:
    """How many connections this process may have, up to what is wanted."""
    limits = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, max(soft, CONNECTIONS + 1000))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield min(CONNECTIONS, wanted - 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_idle_connections_disturb_nobody(hostile: GatewayProcess, many: int) -> None:
    with ExitStack() as stack, undisturbed(hostile):
        for _ in range(many):
            stack.enter_context(connected(hostile))


def test_half_bodies_disturb_nobody(hostile: GatewayProcess, many: int) -> None:
    """Also by what they announce."""
    with ExitStack() as stack, undisturbed(hostile):
        half = [stack.enter_context(connected(hostile)) for _ in range(min(many, 1000))]
        for connection in half:
            connection.sendall(head(f"Content-Length: {BYTES}") + b"{")
        for connection in half:
            assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_resets_disturb_nobody(hostile: GatewayProcess) -> None:
    with undisturbed(hostile):
        for sent in [request()[:20], request()[:-5], request(), request() * 10] * 25:
            with connected(hostile) as connection:
                connection.sendall(sent)
                time.sleep(0.005)
                reset = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)


def test_who_is_slow_is_ended(hostile: GatewayProcess) -> None:
    """A head, a body, one that was refused already: byte by byte; and an answer never read."""
    length = f"Content-Length: {BYTES}"
    slow = {
        "head": (head()[:-2], b"HTTP/1.1 408 "),
        "body": (head(length), b"HTTP/1.1 408 "),
        "refused": (head(length, first="POST /tea HTTP/1.1"), b"HTTP/1.1 404 "),
    }

    def is_open(connection: socket.socket) -> bool:
        """At the gateway's end, whatever there is to read at this one."""
        own = connection.getsockname()
        every = psutil.Process(hostile.process.pid).net_connections("tcp")
        return any(each.raddr == own for each in every)

    def drip(start: bytes) -> bytes:
        with connected(hostile) as connection:
            connection.sendall(start)
            await_(lambda: is_open(connection))
            while is_open(connection):
                with suppress(ConnectionResetError, BrokenPipeError):
                    connection.sendall(b"a")
                time.sleep(0.2)
            return received(connection)

    with undisturbed(hostile), ThreadPoolExecutor(3) as pool, ExitStack() as stack:
        silent, deaf = stack.enter_context(connected(hostile)), stack.enter_context(socket.socket())
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(silent.getpeername())
        long = body(documents=["tea" * (1 << 20)], return_documents=True)
        deaf.sendall(request(content=long))
        answers = pool.map(drip, [start for start, _ in slow.values()])
        for answer, (_, expected) in zip(answers, slow.values()):
            assert answer.startswith(expected)
        assert received(silent) == b""
        await_(lambda: not is_open(deaf))


# Giving up, and ending.


def test_a_client_that_hangs_up_cancels_its_call(
    hostile: GatewayProcess, int8_server: EmbeddedServer
) -> None:
    triton = f"http://{int8_server.metrics_url}/metrics"
    gauge = f"{hostile.url}/metrics"
    count = 'nv_inference_count{model="cross_encoder"'
    scored = metric(triton, count)
    cancelled = metric(triton, "CANCELED|cancelled")
    with connected(hostile) as connection:
        connection.sendall(request(content=json.dumps(LONG).encode()))
        await_(lambda: metric(gauge, "documents_under_way") == DOCUMENTS)
        time.sleep(0.3)
    await_(lambda: metric(gauge, "documents_under_way") == 0)
    await_(lambda: metric(triton, "CANCELED|cancelled") > cancelled)
    await_(lambda: metric(gauge, 'requests_total.*status="499"') > 0)
    with undisturbed(hostile):
        pass
    assert metric(triton, count) - scored < DOCUMENTS / 2


def test_sigterm_answers_what_is_under_way(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    few = {**LONG, "documents": LONG["documents"][:20]}
    with gateway_of(int8_server, tmp_path / "log") as gateway, ThreadPoolExecutor(1) as pool:
        with connected(gateway), connected(gateway) as half:
            half.sendall(head()[:20])
            ranking = pool.submit(httpx.post, f"{gateway.url}/rerank", json=few, timeout=60)
            await_(lambda: metric(f"{gateway.url}/metrics", "documents_under_way") == 20)
            gateway.process.send_signal(signal.SIGTERM)
            assert len(ranking.result().json()["results"]) == 20
            assert gateway.process.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(gateway.url)
        assert "Traceback" not in gateway.log.read_text()


def test_keys(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\n\nsecond-key\r\n")
    with gateway_of(int8_server, tmp_path / "log", f"--api-key-file={keys}") as gateway:

        def status(path: str = "/rerank", **headers: str) -> int:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            content = None if path != "/rerank" else body()
            method = "GET" if content is None else "POST"
            url = gateway.url + path
            return httpx.request(method, url, content=content, headers=named).status_code

        for path in ("/", "/health", "/health/live", "/ping", "/metrics", "/openapi.json"):
            assert status(path) == 200
        for path in ("/rerank", "/info", "/v1/models", "/meta"):
            assert status(path) == 401
        wrong = [
            "",
            "Bearer",
            "Bearer wrong-key",
            "Basic first-key",
            "Bearer first-key2",
        ]
        for value in wrong:
            assert status(authorization=value) == 401
        check_error(httpx.post(f"{gateway.url}/rerank", content=b"{"), 401, "Bearer KEY")
        assert b" 401 " in answer_to(
            gateway, [head("Content-Length: 9", "Expect: 100-continue", "Connection: close")]
        )
        assert b" 401 " in answer_to(gateway, [request("x-api-key: \xff", "Connection: close")])
        for good in ("authorization", "api_key", "x_api_key"):
            scheme = "bearer " if good == "authorization" else ""
            assert status(**{good: f"{scheme}second-key"}) == 200
        keys.write_text("third-key")
        await_(lambda: status(x_api_key="third-key") == 200)
        assert status(x_api_key="first-key") == 401
        keys.write_text("")  # As an editor leaves it for a moment.
        time.sleep(1.1)
        assert status(x_api_key="third-key") == 200
        keys.unlink()
        time.sleep(1.1)
        assert status(x_api_key="third-key") == 200
        log = gateway.log.read_text()
        assert "stay in force" in log
        assert not re.search("first-key|second-key|third-key|wrong-key|Traceback", log)
