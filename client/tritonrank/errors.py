"""What a call can raise. Each carries the server's own words."""

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


def from_rpc(error: grpc.RpcError) -> RerankError:
    """The typed exception for what gRPC raised."""
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "no ranking before the deadline: pass a longer timeout, or fewer documents"
    return _TYPES.get(code, RerankError)(details or code.name, code)
