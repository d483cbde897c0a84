"""uvicorn's HTTP, with limits for those who are slow, or never end, around a request's body."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .dialects import COHERE

#: Seconds for a request's line and headers, and for what is left of a body that was refused.
HEAD_SECONDS = 20.0
#: The most bytes that may come while neither a request begins nor any of its body comes.
HEAD_BYTES = 64 * 1024


#: By it the parser ends a request at its headers, without its body. Java's clients send it, to ask
#: for HTTP/2, which a server may leave unheard.
UPGRADE = re.compile(rb"(?i)\r\nupgrade:")


class Guarded(HttpToolsProtocol):
    """Ends a connection whose request does not come or end, or whose headers are too long.

    uvicorn waits for ever for the first request and for the rest of one that is answered, takes
    headers and trailers of any size, and answers what is no HTTP by plain text.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._in_body = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await(transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes += len(data)
        if not self._in_body:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        super().data_received(data)
        if self._bytes > HEAD_BYTES:
            self._refuse(431, f"the headers have more than {HEAD_BYTES} bytes: send fewer")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._bytes = 0
        self._await(self._slow)

    def on_headers_complete(self) -> None:
        self._end_timer()
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_timer()
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._await(self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request: send HTTP/1.1, without TLS if it is http://")

    def _slow(self) -> None:
        self._refuse(408, f"no whole headers within {HEAD_SECONDS:g} s")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps(COHERE.error(message, status, uuid.uuid4().hex))
        headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head = STATUS_LINE[status] + headers.encode() + b"connection: close\r\n\r\n"
        self.transport.write(head + body)
        self.transport.close()

    def _await(self, otherwise: Callable[[], None]) -> None:
        self._end_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, otherwise)

    def _end_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
