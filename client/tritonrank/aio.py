"""The asynchronous client."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import arguments, protocol
from .cache import PairCache
from .connection import TLS, Endpoint
from .errors import closed, from_rpc
from .protocol import Options, Ranking


class AsyncRerankClient:
    """``RerankClient`` for asyncio. A task that is cancelled cancels its request on the server.

    It may be made anywhere, and used in any event loop: each has a channel of its own.

    Args:
        url: ``HOST:PORT``, or several; calls go round the servers that are up.
        timeout: seconds that a call may take, retries included.
        tls: transport security; default, none.
        cache: how many pairs to remember the scores of.

    Raises:
        TypeError, ValueError, OSError: see ``RerankClient``.
    """

    def __init__(
        self,
        url: str | Iterable[str] = "127.0.0.1:8001",
        *,
        timeout: float = 10.0,
        tls: TLS | None = None,
        cache: int = 0,
    ) -> None:
        self._timeout = arguments.seconds(timeout)
        self._endpoint = Endpoint.of(url, tls)
        self._channels: dict[asyncio.AbstractEventLoop, tuple[Any, Any]] = {}
        self._closed = False
        self._limit: int | None = None
        self.cache = PairCache(cache) if cache else None

    async def __aenter__(self) -> AsyncRerankClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all channels; calls that still run fail, as later ones do."""
        self._closed = True
        while self._channels:
            loop, (channel, _) = self._channels.popitem()
            if loop is asyncio.get_running_loop():
                await channel.close()
            elif loop.is_running():  # In another thread.
                asyncio.run_coroutine_threadsafe(channel.close(), loop)

    async def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        timeout: float | None = None,
        bulk: bool = False,
        request_id: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        max_passages: int | None = None,
        max_document_tokens: int | None = None,
    ) -> Ranking:
        """Ranks the documents; see ``RerankClient.rank``."""
        timeout = self._timeout if timeout is None else arguments.seconds(timeout)
        options = Options(max_passages, max_document_tokens, bulk, request_id)
        arguments.check(query, top_k, options)
        documents = arguments.texts("documents", documents)
        deadline = time.monotonic() + timeout
        ask = partial(self._ask, query, options, deadline, metadata)
        if not self.cache or not documents or (top_k is not None and top_k < 1):
            return await ask(documents, top_k)
        steps = self.cache.rank(query, documents, top_k, options)
        answer: Ranking | None = None
        while True:
            try:
                asked = steps.send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                ranking: Ranking = end.value
                return ranking
            answer = await ask(asked, None)

    async def _ask(
        self,
        query: str,
        options: Options,
        deadline: float,
        metadata: Sequence[tuple[str, str]],
        documents: Sequence[str],
        top_k: int | None,
    ) -> Ranking:
        try:
            limit = await self._passage_limit(deadline)
            usual = protocol.usual_passages(documents, options.max_passages)
            options = replace(options, bulk=options.bulk or usual > limit)
            parts = protocol.parts(documents, options, limit)
            calls: list[Any] = []
            try:
                for _, texts in parts:
                    if len(calls) >= protocol.PARTS_UNDER_WAY:
                        await calls[-protocol.PARTS_UNDER_WAY]
                    remaining = deadline - time.monotonic()
                    message = protocol.request(query, texts, top_k, options, remaining)
                    calls.append(
                        self._stub.ModelInfer(message, timeout=remaining, metadata=metadata)
                    )
                responses = await asyncio.gather(*calls)
            finally:  # Does nothing to a call that is done.
                for call in calls:
                    call.cancel()
        except grpc.RpcError as error:
            raise from_rpc(error, self._endpoint.proxy) from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            if self._closed and not _cancelling():
                raise closed() from error
            raise
        rankings = (protocol.ranking(r, *part) for r, part in zip(responses, parts))
        return protocol.merge(rankings, top_k)

    async def is_ready(self, timeout: float | None = None) -> bool:
        """Whether a server is ready to rank; see ``RerankClient.is_ready``."""
        timeout = self._timeout if timeout is None else arguments.seconds(timeout)
        try:
            answer = await self._stub.ModelReady(protocol.READY_REQUEST, timeout=timeout)
        except grpc.RpcError:
            return False
        ready: bool = answer.ready
        return ready

    @property
    def _stub(self) -> Any:
        """Of the loop that runs, to which gRPC ties a channel."""
        if self._closed:
            raise closed()
        loop = asyncio.get_running_loop()
        if loop not in self._channels:
            for ended in [each for each in list(self._channels) if each.is_closed()]:
                self._channels.pop(ended, None)
            channel = self._endpoint.open(grpc.aio)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            self._channels[loop] = channel, stub
        return self._channels[loop][1]

    async def _passage_limit(self, deadline: float) -> int:
        if self._limit is None:
            remaining = deadline - time.monotonic()
            answer = await self._stub.ModelConfig(protocol.LIMIT_REQUEST, timeout=remaining)
            self._limit = answer.config.max_batch_size
        return self._limit


def _cancelling() -> bool:
    """Whether it is the caller's own task that is cancelled; Python 3.10 cannot tell."""
    task = asyncio.current_task()
    return sys.version_info >= (3, 11) and task is not None and task.cancelling() > 0
