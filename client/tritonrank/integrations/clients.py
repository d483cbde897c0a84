"""What the integrations have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .. import TLS, AsyncRerankClient, RankedDocument, RerankClient


def about(document: RankedDocument) -> dict[str, Any]:
    """What its metadata are told of what was read: ``relevant_passage``, where it is not all."""
    return {"relevant_passage": document.read} if document.read else {}


class Clients:
    """A client of each kind for the same servers, made when it is first needed.

    A copy, or what is unpickled, makes its own.

    Args:
        url: as for ``RerankClient``; default, its own.
        timeout: likewise.
        tls: likewise, or its attributes by their names.
        client: in place of these, a client of either kind. The other kind is made like it. The
            caller closes it.

    Attributes:
        settings: what was passed of ``url``, ``timeout`` and ``tls``, as JSON and YAML can have it.

    Raises:
        TypeError: another type of client.
        ValueError: a client and settings.
    """

    def __init__(
        self,
        url: str | list[str] | None = None,
        timeout: float | None = None,
        tls: TLS | Mapping[str, str] | None = None,
        client: RerankClient | AsyncRerankClient | None = None,
    ) -> None:
        if not isinstance(client, (RerankClient, AsyncRerankClient, type(None))):
            kind = type(client).__name__
            raise TypeError(f"client is of type {kind}: pass a RerankClient or AsyncRerankClient")
        if client is not None:
            if (url, timeout, tls) != (None, None, None):
                raise ValueError("client has url, timeout and tls of its own: pass it alone")
            url, timeout, tls = client._endpoint.urls, client._timeout, client._endpoint.tls
        if isinstance(tls, TLS):
            tls = {name: os.fspath(value) for name, value in asdict(tls).items() if value}
        passed: dict[str, Any] = {"url": url, "timeout": timeout, "tls": tls}
        self.settings = {name: value for name, value in passed.items() if value is not None}
        self._given = client
        self._synchronous = client if isinstance(client, RerankClient) else None
        self._asynchronous = client if isinstance(client, AsyncRerankClient) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Clients, tuple(self.settings.get(name) for name in ("url", "timeout", "tls"))

    @property
    def synchronous(self) -> RerankClient:
        """Raises what ``RerankClient`` raises."""
        if self._synchronous is None:
            self._synchronous = RerankClient(**self._arguments())
        return self._synchronous

    @property
    def asynchronous(self) -> AsyncRerankClient:
        """Raises what ``AsyncRerankClient`` raises. Without a call it opens no channel."""
        if self._asynchronous is None:
            self._asynchronous = AsyncRerankClient(**self._arguments())
        return self._asynchronous

    def close(self) -> None:
        """Closes the synchronous client, unless it is the caller's; a later call makes another."""
        if self._synchronous is not None and self._synchronous is not self._given:
            self._synchronous.close()
            self._synchronous = None

    async def aclose(self) -> None:
        """Closes the asynchronous client likewise."""
        if self._asynchronous is not None and self._asynchronous is not self._given:
            await self._asynchronous.close()
            self._asynchronous = None

    def _arguments(self) -> dict[str, Any]:
        tls = self.settings.get("tls")
        return self.settings | ({"tls": TLS(**tls)} if tls is not None else {})
