"""The client of a tritonrank server: raw strings in, a ranking out."""

from .aio import AsyncRerankClient
from .client import RerankClient
from .connection import TLS
from .errors import (
    InvalidRequestError,
    RerankError,
    RerankTimeoutError,
    ServerUnavailableError,
)
from .protocol import Model, RankedDocument, Ranking

__all__ = [
    "TLS",
    "AsyncRerankClient",
    "InvalidRequestError",
    "Model",
    "RankedDocument",
    "Ranking",
    "RerankClient",
    "RerankError",
    "RerankTimeoutError",
    "ServerUnavailableError",
]
