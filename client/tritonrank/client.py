"""The synchronous client."""

from __future__ import annotations

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


class RerankClient:
    """Ranks documents on one or more servers, over one channel that all calls and threads share.

    Args:
        url: ``HOST:PORT``, or several; calls go round the servers that are up.
        timeout: seconds that a call may take, retries included.
        tls: transport security; default, none.
        cache: how many pairs to remember the scores of, for an update of the model at most a
            second longer than it is served; default, none.

    Attributes:
        cache: that, or None.

    Raises:
        TypeError, ValueError: an argument that cannot be meant; the message names it.
        OSError: a file of ``tls`` cannot be read.
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
        self._channel = self._endpoint.open(grpc)
        self._closed = False
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._limit: int | None = None
        self.cache = PairCache(cache) if cache else None

    def __enter__(self) -> RerankClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls that still run fail, as later ones do."""
        self._closed = True
        self._channel.close()

    def rank(
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
        """Ranks the documents by how well they answer the query, best first.

        More documents than a request may have are split, scored concurrently and merged.

        Args:
            query: not blank.
            documents: one or more, in an order, whatever holds them: an index is a position in it.
                An empty string is one.
            top_k: how many to return, 1 or more; default, all.
            timeout: seconds, in place of the client's own; 0 and less fail at once.
            bulk: whether it goes after all calls that are not, in small parts, so that they wait
                for one at most. A call of more documents than a request may have always does.
            request_id: stands in the server's log and traces.
            metadata: of the gRPC call, such as ``traceparent``.
            max_passages: in how many passages a document that does not fit the model is read, 1 or
                more, of which the best counts; default, 1: what does not fit is left unread.
            max_document_tokens: how many tokens of a document are read, 1 or more; default, all
                that fit.

        Raises:
            InvalidRequestError: the server refused the request, and says why.
            ServerUnavailableError: no server answered, or all were too busy.
            RerankTimeoutError: the deadline passed.
            RerankError: any other failure, also of a client that is or gets closed.
            TypeError: an argument, or one of ``documents``, of another type.
            ValueError: half of a surrogate pair in a text, or a ``timeout`` that is no number or
                more than a year.
        """
        timeout = self._timeout if timeout is None else arguments.seconds(timeout)
        options = Options(max_passages, max_document_tokens, bulk, request_id)
        arguments.check(query, top_k, options)
        documents = arguments.texts("documents", documents)
        deadline = time.monotonic() + timeout
        ask = partial(self._ask, query, options, deadline, metadata)
        if not self.cache or not documents or (top_k is not None and top_k < 1):
            return ask(documents, top_k)
        steps = self.cache.rank(query, documents, top_k, options)
        answer: Ranking | None = None
        while True:
            try:
                asked = steps.send(answer)  # type: ignore[arg-type]
            except StopIteration as end:
                ranking: Ranking = end.value
                return ranking
            answer = ask(asked, None)

    def _ask(
        self,
        query: str,
        options: Options,
        deadline: float,
        metadata: Sequence[tuple[str, str]],
        documents: Sequence[str],
        top_k: int | None,
    ) -> Ranking:
        try:
            limit = self._passage_limit(deadline)
            usual = protocol.usual_passages(documents, options.max_passages)
            options = replace(options, bulk=options.bulk or usual > limit)
            parts = protocol.parts(documents, options, limit)
            calls: list[Any] = []
            if len(parts) == 1:  # Not by a future, whose thread takes a quarter of a millisecond.
                remaining = deadline - time.monotonic()
                message = protocol.request(query, documents, top_k, options, remaining)
                response = self._stub.ModelInfer(message, timeout=remaining, metadata=metadata)
                return protocol.ranking(response, 0, documents)
            try:
                for _, texts in parts:
                    if len(calls) >= protocol.PARTS_UNDER_WAY:
                        calls[-protocol.PARTS_UNDER_WAY].result()
                    remaining = deadline - time.monotonic()
                    message = protocol.request(query, texts, top_k, options, remaining)
                    calls.append(
                        self._stub.ModelInfer.future(message, timeout=remaining, metadata=metadata)
                    )
                responses = [call.result() for call in calls]
            finally:  # Does nothing to a call that is done.
                for call in calls:
                    call.cancel()
        except (grpc.RpcError, ValueError) as error:  # The latter by a channel that is closed.
            if self._closed:
                raise closed() from error
            if isinstance(error, grpc.RpcError):
                raise from_rpc(error, self._endpoint.proxy) from error
            raise
        rankings = (protocol.ranking(r, *part) for r, part in zip(responses, parts))
        return protocol.merge(rankings, top_k)

    def is_ready(self, timeout: float | None = None) -> bool:
        """Whether a server that is up is ready to rank; a server that does not answer is not."""
        timeout = self._timeout if timeout is None else arguments.seconds(timeout)
        try:
            answer = self._stub.ModelReady(protocol.READY_REQUEST, timeout=timeout)
        except grpc.RpcError:
            return False
        ready: bool = answer.ready
        return ready

    def _passage_limit(self, deadline: float) -> int:
        if self._limit is None:
            remaining = deadline - time.monotonic()
            answer = self._stub.ModelConfig(protocol.LIMIT_REQUEST, timeout=remaining)
            self._limit = answer.config.max_batch_size
        return self._limit
