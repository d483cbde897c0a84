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
from .protocol import RankedDocument

__all__ = [
    "TLS",
    "AsyncRerankClient",
    "InvalidRequestError",
    "RankedDocument",
    "RerankClient",
    "RerankError",
    "RerankTimeoutError",
    "ServerUnavailableError",
]
