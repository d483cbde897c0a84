"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import protocol
from .connection import TLS, open_channel
from .errors import from_rpc
from .protocol import RankedDocument


class RerankClient:
    """Ranks documents on one or more servers, over one channel that all calls and threads share.

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
        self._channel = open_channel(grpc, url, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._limit: int | None = None

    def __enter__(self) -> RerankClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls that still run are cancelled."""
        self._channel.close()

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        timeout: float | None = None,
        bulk: bool = False,
        request_id: str = "",
    ) -> list[RankedDocument]:
        """Ranks the documents by how well they answer the query, best first.

        More documents than a request may have are split, scored concurrently and merged.

        Args:
            query: not blank.
            documents: one or more; an empty string is one.
            top_k: how many to return, 1 or more; default, all.
            timeout: seconds, in place of the client's own.
            bulk: whether it goes after all calls that are not, in small parts, so that they wait
                for one at most. A call of more documents than a request may have always does.
            request_id: stands in the server's log and traces.

        Raises:
            InvalidRequestError: the server refused the request, and says why.
            ServerUnavailableError: no server answered, or all were too busy.
            RerankTimeoutError: the deadline passed.
            RerankError: any other failure.
            TypeError: ``documents`` is one string, or holds something else than strings.
            ValueError: ``timeout`` is no number, or more than a year.
        """
        timeout = self._timeout if timeout is None else timeout
        protocol.check(documents, top_k, timeout)
        deadline = time.monotonic() + timeout
        try:
            limit = self._document_limit(deadline)
            bulk = bulk or len(documents) > limit
            parts = protocol.parts(documents, bulk, limit)
            calls: list[Any] = []
            try:
                for _, texts in parts:
                    if len(calls) >= protocol.PARTS_UNDER_WAY:
                        calls[-protocol.PARTS_UNDER_WAY].result()
                    remaining = deadline - time.monotonic()
                    message = protocol.request(query, texts, top_k, remaining, bulk, request_id)
                    calls.append(self._stub.ModelInfer.future(message, timeout=remaining))
                responses = [call.result() for call in calls]
            finally:  # Does nothing to a call that is done.
                for call in calls:
                    call.cancel()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        rankings = (protocol.ranking(r, *part) for r, part in zip(responses, parts))
        return protocol.merge(rankings, top_k)

    def _document_limit(self, deadline: float) -> int:
        if self._limit is None:
            remaining = deadline - time.monotonic()
            answer = self._stub.ModelConfig(protocol.LIMIT_REQUEST, timeout=remaining)
            self._limit = answer.config.max_batch_size
        return self._limit
