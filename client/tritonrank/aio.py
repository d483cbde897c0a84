"""The asynchronous client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import protocol
from .connection import TLS, open_channel
from .errors import from_rpc
from .protocol import RankedDocument


class AsyncRerankClient:
    """``RerankClient`` for asyncio. A task that is cancelled cancels its request on the server.

    Args:
        url: ``HOST:PORT``, or several; calls go round the servers that are up.
        timeout: seconds that a call may take, retries included.
        tls: transport security; default, none.
    """

    def __init__(
        self,
        url: str | Sequence[str] = "127.0.0.1:8001",
        *,
        timeout: float = 10.0,
        tls: TLS | None = None,
    ) -> None:
        self._timeout = timeout
        self._channel = open_channel(grpc.aio, url, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._limit: int | None = None

    async def __aenter__(self) -> AsyncRerankClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        await self._channel.close()

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        timeout: float | None = None,
        bulk: bool = False,
        request_id: str = "",
    ) -> list[RankedDocument]:
        """Ranks the documents; see ``RerankClient.rank``."""
        timeout = self._timeout if timeout is None else timeout
        protocol.check(documents, top_k, timeout)
        deadline = time.monotonic() + timeout
        try:
            limit = await self._document_limit(deadline)
            bulk = bulk or len(documents) > limit
            parts = protocol.parts(documents, bulk, limit)
            calls: list[Any] = []
            try:
                for _, texts in parts:
                    if len(calls) >= protocol.PARTS_UNDER_WAY:
                        await calls[-protocol.PARTS_UNDER_WAY]
                    remaining = deadline - time.monotonic()
                    message = protocol.request(query, texts, top_k, remaining, bulk, request_id)
                    calls.append(self._stub.ModelInfer(message, timeout=remaining))
                responses = await asyncio.gather(*calls)
            finally:  # Does nothing to a call that is done.
                for call in calls:
                    call.cancel()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        rankings = (protocol.ranking(r, *part) for r, part in zip(responses, parts))
        return protocol.merge(rankings, top_k)

    async def _document_limit(self, deadline: float) -> int:
        if self._limit is None:
            remaining = deadline - time.monotonic()
            answer = await self._stub.ModelConfig(protocol.LIMIT_REQUEST, timeout=remaining)
            self._limit = answer.config.max_batch_size
        return self._limit
