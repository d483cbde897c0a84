"""How a channel to the servers is set up, alike for both clients."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from . import arguments

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

#: ``HOST:PORT`` as gRPC reads it in full: of other texts it would take a part.
ADDRESS = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+):(?P<port>[0-9]{1,5})", re.ASCII | re.IGNORECASE)
#: A proxy; without its credentials, since it is shown.
PROXY = re.compile(r"http://(?:[^/?#]*@)?((?:\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::[0-9]+)?)(?:[/?#]|$)")
#: What of ``TLS`` is a path, in gRPC's order.
FILES = ("root_certificates", "private_key", "certificate_chain")


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
        """The files' content as gRPC takes it, which says nothing of files that it cannot use.

        Raises:
            TypeError: something else than a path.
            ValueError: a key without its certificate, or the other way round, or what is no PEM.
        """
        if bool(self.private_key) != bool(self.certificate_chain):
            raise ValueError("pass private_key and certificate_chain together")
        contents = [self._read(name) for name in FILES]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.root_certificates:
                context.load_verify_locations(self.root_certificates)
            if self.private_key and self.certificate_chain:
                # With a password, so that none is asked for: gRPC takes no key that has one.
                context.load_cert_chain(self.certificate_chain, self.private_key, password="")
        except ssl.SSLError as error:
            names = ", ".join(str(path) for name in FILES if (path := getattr(self, name)))
            reason = error.reason or "not usable"
            raise ValueError(
                f"{names}: {reason}: pass PEM files, and a key that is the certificate's and has "
                "no password"
            ) from None
        return grpc.ssl_channel_credentials(*contents)

    def _read(self, name: str) -> bytes | None:
        path = getattr(self, name)
        if not isinstance(path, (str, os.PathLike, type(None))):
            kind = type(path).__name__
            raise TypeError(f"tls.{name} is of type {kind}: pass the path of a PEM file")
        return Path(path).read_bytes() if path else None


@dataclass(frozen=True)
class Endpoint:
    """Where channels lead.

    Attributes:
        urls: each ``HOST:PORT``.
        tls: as it was passed.
        target: gRPC's name for the servers.
        options: of the channel, and for TLS ``credentials``.
        proxy: ``HOST:PORT of VARIABLE``, if there is one on the way.
    """

    urls: list[str]
    tls: TLS | None
    target: str
    options: list[tuple[str, Any]]
    credentials: grpc.ChannelCredentials | None
    proxy: str | None

    @classmethod
    def of(cls, url: object, tls: object) -> Endpoint:
        """Checks all that can be known before a server is asked.

        Raises:
            TypeError: an argument of another type.
            ValueError: what ``TLS.credentials`` and ``_target`` raise.
            OSError: a file cannot be read.
        """
        remedy = "HOST:PORT, or a list of them"
        one = isinstance(url, str)
        urls = [arguments.text("url", url)] if one else arguments.texts("url", url, remedy)
        target, proxy = _target(urls), _proxy(urls)
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(proxy is not None))]
        if tls is None:
            return cls(urls, None, target, options, None, proxy)
        if not isinstance(tls, TLS):
            raise TypeError(f"tls is of type {type(tls).__name__}: pass TLS(…)")
        if tls.server_name:
            name = arguments.text("tls.server_name", tls.server_name)
            options.append(("grpc.ssl_target_name_override", name))
        elif len(urls) > 1:
            raise ValueError("pass TLS(server_name=…), the name in these URLs' certificates")
        return cls(urls, tls, target, options, tls.credentials(), proxy)

    def open(self, kind: ModuleType) -> Any:
        """A channel of ``kind``, which is ``grpc`` or ``grpc.aio``."""
        if self.credentials is None:
            return kind.insecure_channel(self.target, self.options)
        return kind.secure_channel(self.target, self.credentials, self.options)


def _target(urls: list[str]) -> str:
    """GRPC's name for one endpoint, whose name may stand for many servers, or for several.

    Args:
        urls: each ``HOST:PORT``. One name is looked up again by gRPC as servers come and go;
            several are looked up once, here, since gRPC takes only addresses in a list.

    Raises:
        ValueError: no URL; one that is not ``HOST:PORT``; or a list of which no host is known, or
            whose hosts have no kind of address, IPv4 or IPv6, in common.
    """
    for each in urls:
        if "://" in each:
            raise ValueError(f"{each!r} has a scheme: pass HOST:PORT of the gRPC service")
        found = ADDRESS.fullmatch(each)
        if not found or not 0 < int(found["port"]) < 2**16:
            raise ValueError(f"{each!r} is no address: pass HOST:PORT of the gRPC service")
    if not urls:
        raise ValueError("no URL: pass HOST:PORT of the gRPC service")
    if len(urls) == 1:
        return f"dns:///{urls[0]}"
    # A server that is away for a moment may have no address.
    known = [addresses for each in urls if (addresses := _addresses(each))]
    if not known:
        raise ValueError(f"{', '.join(urls)}: no host is known by these names")
    for family in known[0]:  # As the system prefers.
        if all(family in addresses for addresses in known):
            return f"{family}:{','.join(each for addresses in known for each in addresses[family])}"
    raise ValueError(f"{', '.join(urls)}: pass addresses that are all IPv4, or all IPv6")


def _proxy(urls: list[str]) -> str | None:
    """The proxy that the environment names for this, by gRPC's own rules.

    Not for a list, which gRPC would ask the proxy for as if it were one host, and not for addresses
    of this machine.
    """
    host = urls[0].rpartition(":")[0].strip("[]")
    name, value = _variable("grpc_proxy", "https_proxy", "http_proxy")
    _, excepted = _variable("no_grpc_proxy", "no_proxy")
    found = PROXY.match(value)
    if not found or len(urls) > 1 or _is_among(host, excepted) or _is_here(host):
        return None
    return f"{found[1]} of {name}"


def _variable(*names: str) -> tuple[str, str]:
    """The first of them that the environment has, and its value."""
    return next(((name, os.environ[name]) for name in names if name in os.environ), ("", ""))


def _is_among(host: str, excepted: str) -> bool:
    """Whether a host is in a list of ends of names, and of networks."""
    for entry in map(str.strip, filter(None, excepted.split(","))):
        if host.lower().endswith(entry.lower()):
            return True
        with suppress(ValueError):  # One of both is a name.
            if ip_address(host) in ip_network(entry, strict=False):
                return True
    return False


def _is_here(host: str) -> bool:
    """Whether all of the host's addresses are this machine's: there a socket can be bound."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(address)
    except (OSError, UnicodeError):
        return False
    return True


def _addresses(url: str) -> dict[str, list[str]]:
    """The addresses of a URL, by their kind in gRPC's words; none if the host is unknown."""
    host, _, port = url.rpartition(":")
    try:
        every = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return {}
    found: dict[str, list[str]] = {}
    for kind, *_, address in every:
        family, form = ("ipv6", "[{}]:{}") if kind == socket.AF_INET6 else ("ipv4", "{}:{}")
        found.setdefault(family, []).append(form.format(*address[:2]))
    return found
