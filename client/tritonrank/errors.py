"""What a call can raise. Each carries the server's own words, or gRPC's."""

from __future__ import annotations

import grpc


class RerankError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status.
    """

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


class InvalidRequestError(RerankError, ValueError):
    """The server refused the request; the message names the input, the limit and the remedy."""


class ServerUnavailableError(RerankError, ConnectionError):
    """No server answered, or all were too busy, also after the retries."""


class RerankTimeoutError(RerankError, TimeoutError):
    """The deadline passed before the ranking was there."""


_TYPES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: RerankTimeoutError,
}


def from_rpc(error: grpc.RpcError, proxy: str | None) -> RerankError:
    """The typed exception for what gRPC raised, which does not say that a proxy was in between."""
    code, details = error.code(), error.details() or error.code().name
    details = details.removeprefix("in ensemble 'reranker', ")  # Triton's word for where it was.
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "no ranking before the deadline: pass a longer timeout, or less to read"
    kind = _TYPES.get(code, RerankError)
    if proxy and kind in (ServerUnavailableError, RerankTimeoutError):
        details += f" (by way of the proxy {proxy}; to go past it, name the host in no_proxy)"
    return kind(details, code)


def closed() -> RerankError:
    """For a call that comes after ``close``, or that was under way."""
    message = "the client is closed: make another one, and close it when its calls are done"
    return RerankError(message, grpc.StatusCode.CANCELLED)
