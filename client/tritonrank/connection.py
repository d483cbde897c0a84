"""How a channel to the servers is set up, alike for both clients."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

#: gRPC's own balancing and retrying, with its own jitter. A retry is safe, since a ranking changes
#: nothing on the server, and of use only where another try can succeed.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # Where more than half of the calls fail, retries stop, so as not to add to an overload. Half do
    # while one of two servers starts anew.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 1},
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}

OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC keeps a request for its retries only up to this size, by default 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 2**30),
    # Servers that come and go behind one name are seen as soon as a connection ends.
    ("grpc.dns_min_time_between_resolutions_ms", 5000),
    # A server that is back is used again within 2 s; gRPC's own limit is 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A machine that is gone closes no connection. Where calls wait and nothing has come for 5 s, it
    # is asked, and without an answer within 5 s they are tried elsewhere. A server must allow that:
    # --grpc-http2-min-recv-ping-interval-without-data.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True)
class TLS:
    """Transport security: PEM files, and for mutual TLS the client's own key and certificate.

    Attributes:
        root_certificates: who may vouch for the server; default, the system's.
        private_key: the client's key.
        certificate_chain: the client's certificate.
        server_name: the name in the servers' certificates, where it is not the host of the URL;
            needed for a list of several.
    """

    root_certificates: Path | None = None
    private_key: Path | None = None
    certificate_chain: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The files' content as gRPC takes it.

        Raises:
            ValueError: a key without its certificate, or the other way round.
        """
        if bool(self.private_key) != bool(self.certificate_chain):
            raise ValueError("pass private_key and certificate_chain together")
        paths = (self.root_certificates, self.private_key, self.certificate_chain)
        return grpc.ssl_channel_credentials(*(path and Path(path).read_bytes() for path in paths))

    def options(self) -> list[tuple[str, str]]:
        """Channel options that go with the credentials."""
        name = self.server_name
        return [("grpc.ssl_target_name_override", name)] if name else []


def open_channel(kind: ModuleType, url: str | Sequence[str], tls: TLS | None) -> Any:
    """A channel of ``kind``, which is ``grpc`` or ``grpc.aio``, to one or more endpoints."""
    if tls and not tls.server_name and not isinstance(url, str) and len(url) > 1:
        raise ValueError("pass TLS(server_name=…), the name in the certificates of all these URLs")
    if tls is None:
        return kind.insecure_channel(_target(url), OPTIONS)
    return kind.secure_channel(_target(url), tls.credentials(), [*OPTIONS, *tls.options()])


def _target(url: str | Sequence[str]) -> str:
    """GRPC's name for one endpoint, whose name may stand for many servers, or for several.

    Args:
        url: ``HOST:PORT``, or several of them. One name is looked up again by gRPC as servers come
            and go; several are looked up once, here, since gRPC takes only addresses in a list.

    Raises:
        ValueError: no URL; one that is not ``HOST:PORT``; or a list of which no host is known, or
            whose hosts have no kind of address, IPv4 or IPv6, in common.
    """
    urls = [url] if isinstance(url, str) else list(url)
    for each in urls:
        if "://" in each:
            raise ValueError(f"{each} has a scheme: pass HOST:PORT of the gRPC service")
        if not re.fullmatch(r".+:\d{1,5}", each) or int(each.rpartition(":")[2]) > 65535:
            raise ValueError(f"{each} is no address: pass HOST:PORT of the gRPC service")
    if not urls:
        raise ValueError("no URL: pass HOST:PORT of the gRPC service")
    if len(urls) == 1:
        return f"dns:///{urls[0]}"
    # A server that is away for a moment may have no address.
    found = [addresses for each in urls if (addresses := _addresses(each))]
    if not found:
        raise ValueError(f"{', '.join(urls)}: no host is known by these names")
    for family in found[0]:  # As the system prefers.
        if all(family in addresses for addresses in found):
            return f"{family}:{','.join(each for addresses in found for each in addresses[family])}"
    raise ValueError(f"{', '.join(urls)}: pass addresses that are all IPv4, or all IPv6")


def _addresses(url: str) -> dict[str, list[str]]:
    """The addresses of a URL, by their kind in gRPC's words; none if the host is unknown."""
    host, _, port = url.rpartition(":")
    try:
        every = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except socket.gaierror:
        return {}
    found: dict[str, list[str]] = {}
    for kind, *_, address in every:
        family, form = ("ipv6", "[{}]:{}") if kind == socket.AF_INET6 else ("ipv4", "{}:{}")
        found.setdefault(family, []).append(form.format(*address[:2]))
    return found
