"""A request's way through the gateway: key, limits, body, dialect, ranking, answer, log line."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import grpc
import orjson
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..aio import AsyncRerankClient
from ..errors import (
    InvalidRequestError,
    RerankError,
    RerankTimeoutError,
    ServerUnavailableError,
)
from ..protocol import Model, Ranking, merge, usual_passages
from . import dialects, static
from .dialects import Answered, Call, Dialect
from .fields import InvalidField
from .keys import Keys
from .metrics import Metrics, Seen

#: The most text of all requests together, from when it comes until it is answered.
MOST_BYTES = 512 * 1024 * 1024
#: The most lists and objects of a body; each takes a hundred bytes of memory, or more.
MOST_CONTAINERS = 1_000_000
#: A body of fewer is read at once; others in a thread, so that nobody waits for one with objects.
QUICK_BYTES = 64 * 1024
#: Of one request with a query a document, so many queries are asked for at a time.
QUERIES_AT_A_TIME = 32
#: Seconds for which the server is taken to be as ready as it was.
READINESS_HOLDS = 0.5
#: Of what Triton says beside that it is busy: the time was over as a stage had the request; and a
#: server that stops no longer knows its models.
STATUSES = {grpc.StatusCode.CANCELLED: 504, grpc.StatusCode.NOT_FOUND: 503}
#: A client that hung up gets no answer; nginx's status for it, for the log.
GONE = 499

access = logging.getLogger("tritonrank.access")
log = logging.getLogger(__name__)

#: What infinity's client calls a model that it was given no name of.
INFINITYS_DEFAULT = "default/not-specified"
#: An id that may stand in logs and headers.
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
#: W3C's; gRPC fails on what is not printable, or long.
TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[\x21-\x7e]{0,200})?")


@dataclass(frozen=True)
class Limits:
    """What the gateway takes. A document counts once for each passage that it is expected to have.

    Attributes:
        body_bytes: of a request.
        documents: of a request.
        documents_under_way: of all; while there are as many, requests are refused with 429.
        seconds: of a request: to send its body, and again to rank it.
    """

    body_bytes: int = 32 * 1024 * 1024
    documents: int = 10_000
    documents_under_way: int = 65_536
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit of {name} is {value}: pass a number above 0")


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, field: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.field = status, field
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Gateway:
    """An ASGI application, without state but for what is under way and the cache of its client.

    Args:
        client: of the servers.
        limits: of requests.
        keys: without one of which only health is told; default, none are asked for.
        names: what the model may be called. If there are any, others are not known (404); else a
            request may call it as it likes.
        max_passages: in how many passages documents are read where a request does not say.

    Raises:
        ValueError: ``max_passages`` is below 1.
    """

    def __init__(
        self,
        client: AsyncRerankClient,
        limits: Limits,
        keys: Keys | None = None,
        names: Sequence[str] = (),
        max_passages: int = 1,
    ) -> None:
        if max_passages < 1:
            raise ValueError(f"max_passages is {max_passages}: pass 1 or more")
        self._client, self._limits, self._keys, self._names = client, limits, keys, names
        self._max_passages = max_passages
        self._documents = self._bytes = 0
        self._model: Model | None = None
        self._ready, self._asked = False, -READINESS_HOLDS
        self._started = int(time.time())
        self.metrics = Metrics(lambda: self._documents, client.cache)
        self._static = static.every()
        self._open: dict[str, Callable[[], Awaitable[Response]]] = {
            "health": self._health,
            "health/ready": self._health,
            "health/live": self._live,
            "ping": self._health,
            ".well-known/ready": self._health,
            ".well-known/live": self._live,
            "metrics": self._metrics,
        }
        self._closed: dict[str, Callable[[], Awaitable[Response]]] = {
            "info": self._info,
            "meta": self._meta,
            "models": self._models,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = time.perf_counter()
        request = Request(scope, receive)
        seen = Seen(_request_id(request), scope["path"])
        try:
            response = await self._answer(request, seen)
        except _Refused as refused:
            response = self._error(refused, seen)
        except ClientDisconnect:
            seen.status, seen.error = GONE, "the client hung up"
            response = None
        except Exception:  # Never shown to a client.
            log.exception("request %s failed", seen.id)
            response = self._error(_Refused(500, "the gateway failed; its log says why"), seen)
        try:
            if response:
                seen.status = response.status_code
                response.headers["x-request-id"] = seen.id
                with suppress(OSError):  # Of a client that is gone.
                    await response(scope, receive, _drained(send))
        finally:
            self._bytes -= seen.bytes
        if seen.dialect or seen.error:
            seen.seconds = time.perf_counter() - begun
            self.metrics.add(seen)
            access.info("", extra={"seen": seen})

    async def _answer(self, request: Request, seen: Seen) -> Response:
        forced, path = dialects.resource(request.scope["path"])
        if request.method in ("GET", "HEAD"):
            if file := self._static.get(path):
                return file.response()
            # Under this name alone, so that a proxy can keep it back.
            if path in self._open and (path != "metrics" or request.scope["path"] == "/metrics"):
                return await self._open[path]()
            if path in self._closed:
                self._admit(request)
                return await self._closed[path]()
        elif request.method == "POST" and path in dialects.PATHS:
            seen.dialect = forced or (dialects.SCORE if path == "score" else dialects.COHERE)
            return await self._rerank(request, seen, forced, path)
        if path in dialects.PATHS:
            raise _Refused(405, f"{request.method} is not for this path: use POST", allow="POST")
        if path in self._open or path in self._closed or path in self._static:
            raise _Refused(405, f"{request.method} is not for this path: use GET", allow="GET")
        raise _Refused(
            404, f"there is no {request.url.path[:200]}: POST to /rerank, see /openapi.json"
        )

    async def _rerank(
        self, request: Request, seen: Seen, forced: Dialect | None, path: str
    ) -> Response:
        self._admit(request)
        if self._documents >= self._limits.documents_under_way:
            raise _busy(f"{self._documents} documents are under way")
        body = _parsed(await self._body(request, seen))
        seen.dialect = dialect = dialects.dialect(forced, path, body)
        try:
            if seen.bytes < QUICK_BYTES:
                call = dialect.read(body, self._limits.documents)
            else:
                call = await asyncio.to_thread(dialect.read, body, self._limits.documents)
            del body  # Ranking takes long.
            seen.documents = len(call.documents)
            name = self._name(call)
            call.refuse_short_lengths(self._model)
            count = usual_passages(call.documents, self._most(call))
            if count > self._limits.documents:
                raise InvalidField(
                    dialect.documents,
                    f"has {len(call.documents)} of about {count} passages, and a request may have "
                    f"{self._limits.documents}: split it, or let documents have fewer passages",
                )
            answered = await self._ranked(request, seen, call, count, name)
        except InvalidField as error:
            raise _Refused(dialect.invalid, str(error), error.field) from error
        seen.tokens = answered.tokens
        return _json(dialect.answer(answered))

    def _most(self, call: Call) -> int:
        return call.max_passages or self._max_passages

    async def _ranked(
        self, request: Request, seen: Seen, call: Call, count: int, name: str | None
    ) -> Answered:
        """Ranks a call; one whose client hangs up is cancelled, in Triton too."""
        # Others may have come since it was asked; alone, a request may have more.
        most = self._limits.documents_under_way
        if self._documents and self._documents + count > most:
            raise _busy(f"{self._documents} documents are under way")
        self._documents += count
        ranking = asyncio.ensure_future(self._rank(call, request, seen.id))
        gone = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait((ranking, gone), return_when=asyncio.FIRST_COMPLETED)
            if not ranking.done():
                raise ClientDisconnect
            ranked = await ranking
        except InvalidRequestError as error:
            raise InvalidField("the request", f"was refused: {error}") from error
        except RerankTimeoutError as error:
            raise _Refused(
                504,
                f"no ranking within {self._limits.seconds:g} s: send fewer documents, or fewer "
                "passages of them, or start the gateway with a longer --timeout",
            ) from error
        except ServerUnavailableError as error:
            if await self._is_ready(anew=True):
                raise _busy(str(error)) from error
            raise _Refused(503, str(error), retry_after="1") from error
        except RerankError as error:
            raise _Refused(STATUSES.get(error.code, 500), str(error)) from error
        finally:
            self._documents -= count
            ranking.cancel()
            gone.cancel()
        self._model = ranked.model or self._model
        call.refuse_short_lengths(ranked.model)
        call.refuse_unmet(ranked)
        return Answered(call, ranked, name or self._called(ranked.model), seen.id)

    async def _rank(self, call: Call, request: Request, id: str) -> Ranking:
        """All documents, best first; indices are those of the call."""
        trace = request.headers.get("traceparent", "")
        metadata = [("traceparent", trace)] if TRACE.fullmatch(trace) else []
        deadline = time.monotonic() + self._limits.seconds
        most = self._most(call)

        async def rank(query: str, documents: Sequence[str]) -> Ranking:
            return await self._client.rank(
                query,
                documents,
                timeout=deadline - time.monotonic(),
                request_id=id,
                metadata=metadata,
                max_passages=most if most > 1 else None,  # A server before 0.5 takes no other.
                max_document_tokens=call.max_document_tokens,
            )

        if len(call.queries) == 1:
            return await rank(call.queries[0], call.documents)
        places: dict[str, list[int]] = {}
        for i, query in enumerate(call.queries):
            places.setdefault(query, []).append(i)
        few = asyncio.Semaphore(QUERIES_AT_A_TIME)

        async def one(query: str, indices: list[int]) -> Ranking:
            async with few:
                ranking = await rank(query, [call.documents[i] for i in indices])
            placed = (replace(each, index=indices[each.index]) for each in ranking)
            return Ranking(placed, ranking.model)

        tasks = [asyncio.ensure_future(one(*each)) for each in places.items()]
        try:
            return merge(await asyncio.gather(*tasks), None)
        finally:
            for task in tasks:
                task.cancel()

    # What goes before.

    def _admit(self, request: Request) -> None:
        if self._keys and not self._keys.admit(request.headers):
            raise _Refused(
                401, "no valid key: send Authorization: Bearer KEY", www_authenticate="Bearer"
            )

    async def _body(self, request: Request, seen: Seen) -> bytearray:
        """The whole body, within its limits."""
        headers = request.headers
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise _Refused(415, "send the body as it is, not encoded", accept_encoding="identity")
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise _Refused(415, f"the content type is {kind[:200]}: send application/json")
        try:
            return await asyncio.wait_for(self._received(request, seen), self._limits.seconds)
        except asyncio.TimeoutError:
            raise _Refused(
                408, f"no whole body within {self._limits.seconds:g} s", connection="close"
            ) from None

    async def _received(self, request: Request, seen: Seen) -> bytearray:
        told = request.headers.get("content-length", "")
        size, body = int(told) if told.isdecimal() else 0, bytearray()
        stream = request.stream()
        while True:
            if max(size, len(body)) > self._limits.body_bytes:
                raise _Refused(
                    413,
                    f"the body has more than {self._limits.body_bytes} bytes: send fewer "
                    "documents, or shorter ones",
                    connection="close",
                )
            if self._bytes > MOST_BYTES:
                raise _busy("too much text is on its way", connection="close")
            if (chunk := await anext(stream, None)) is None:
                return body
            body += chunk
            seen.bytes += len(chunk)
            self._bytes += len(chunk)

    def _name(self, call: Call) -> str | None:
        """What the model is called in the answer, if the request may say so."""
        if not self._names or call.model in (None, "", INFINITYS_DEFAULT):
            return None
        if call.model not in self._names:
            raise _Refused(
                404, f"there is no model {call.model[:200]}: use {', '.join(self._names)}"
            )
        return call.model

    # What is told.

    def _called(self, model: Model | None) -> str:
        return self._names[0] if self._names else model.name if model else "reranker"

    def _error(self, refused: _Refused, seen: Seen) -> Response:
        dialect, seen.error = seen.dialect or dialects.COHERE, str(refused)
        content = dialect.error(str(refused), refused.status, seen.id, refused.field)
        return _json(content, refused.status, refused.headers)

    async def _is_ready(self, anew: bool = False) -> bool:
        if anew or time.monotonic() - self._asked > READINESS_HOLDS:
            self._ready = await self._client.is_ready(timeout=2)
            self._asked = time.monotonic()
        return self._ready

    async def _health(self) -> Response:
        """As NVIDIA NIM and infinity tell it."""
        ready = await self._is_ready()
        status = "ready" if ready else "not ready: no server answers, or its models are not loaded"
        content = {"object": "health.response", "message": status, "status": status}
        return _json(content | {"unix": time.time()}, 200 if ready else 503)

    async def _live(self) -> Response:
        return _json({"object": "health.response", "message": "live", "status": "live"})

    async def _metrics(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain")

    async def _served(self) -> Model | None:
        """The model that answered last; else one short pair is ranked, to see which it is."""
        if self._model is None:
            try:
                self._model = (await self._client.rank("a", ["a"], timeout=5)).model
            except RerankError as error:
                raise _Refused(503, str(error), retry_after="1") from error
        return self._model

    async def _info(self) -> Response:
        """As text-embeddings-inference tells it."""
        model = await self._served()
        told = {
            "model_id": self._called(model),
            "served_model_name": self._called(model),
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": self._limits.documents_under_way,
            "max_client_batch_size": self._limits.documents,
            "auto_truncate": True,
            "version": version("tritonrank"),
        }
        if model:
            told["model_sha"], told["model_dtype"] = model.revision, model.precision
            told["max_input_length"] = model.max_length
        return _json(told)

    async def _meta(self) -> Response:
        """As Weaviate asks for it."""
        return _json({"model_path": self._called(await self._served())})

    async def _models(self) -> Response:
        """As OpenAI's clients ask for it."""
        served = self._called(await self._served())
        data = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "tritonrank",
                "root": served,
            }
            for name in self._names or [served]
        ]
        return _json({"object": "list", "data": data})


def _drained(send: Send) -> Send:
    """Ends only when a large answer is on its way: till then its text is counted."""

    async def drained(message: Message) -> None:
        if len(message.get("body", b"")) > QUICK_BYTES:
            await send({**message, "more_body": True})
            message = {"type": message["type"], "body": b""}
        await send(message)

    return drained


def _parsed(body: bytearray) -> dict[str, Any]:
    if body.count(b"[") + body.count(b"{") > MOST_CONTAINERS:
        raise _Refused(413, f"the body has over {MOST_CONTAINERS} lists and objects: send texts")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _Refused(400, f"the body is no JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise _Refused(400, "the body is no JSON object: send one with query and documents")
    return content


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Floats keep their point or exponent, without which some clients would read integers.
    return Response(orjson.dumps(content), status, headers, "application/json")


def _busy(message: str, **headers: str) -> _Refused:
    return _Refused(429, f"{message}: try again in a second", retry_after="1", **headers)


def _request_id(request: Request) -> str:
    """The client's own, if it is one, else a new one."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
