"""uvicorn's HTTP, with limits for those who are slow, or never end, before a request is there."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

#: Seconds for a request's line and headers, and their most bytes.
HEAD_SECONDS, HEAD_BYTES = 20.0, 64 * 1024


class Guarded(HttpToolsProtocol):
    """Ends a connection whose request does not come, or whose headers are too long.

    uvicorn waits for ever for the first request, and takes headers of any size.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._bytes += len(data)
        if self._head and self._bytes > HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(STATUS_LINE[431] + b"connection: close\r\n\r\n")
            self.transport.close()

    def _await_head(self) -> None:
        self._end_head()
        self._bytes = 0
        self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._head:
            self._head.cancel()
            self._head = None
