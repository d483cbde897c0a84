"""``tritonrank gateway``: the HTTP server in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import re
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from starlette.middleware.cors import CORSMiddleware

from ..aio import AsyncRerankClient
from ..connection import TLS
from .app import Gateway, Limits
from .keys import Keys
from .protocol import Guarded

log = logging.getLogger(__name__)

#: Seconds for which a connection without a request is kept; longer than what proxies use.
KEEP_ALIVE = 75
#: malloc.h's number for the size from which memory is mapped, and so given back.
M_MMAP_THRESHOLD = -3
#: Seconds for what was begun, at the end.
GRACE = 30


def main(argv: list[str] | None = None) -> int:
    """Runs the gateway; gives the exit status."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _log(arguments.log_json)
    try:
        return asyncio.run(_serve(arguments))
    except (OSError, ValueError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="tritonrank gateway",
        description="Serve the rerank APIs of Cohere, Jina, Voyage, text-embeddings-inference, "
        "vLLM, NVIDIA NIM and others over HTTP, in front of one or several Triton servers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--url",
        action="append",
        metavar="HOST:PORT",
        help="gRPC address of a server, more than once for several (default: 127.0.0.1:8001)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free port")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="keys of the API, one a line; without, none is asked for",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        type=_origin,
        default=argparse.SUPPRESS,
        metavar="ORIGIN",
        help="whose pages may call it, more than once for several; * is any",
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="what requests may call the model, more than once for several; without, as they like",
    )
    parser.add_argument(
        "--cache", type=int, default=0, metavar="PAIRS", help="remember the scores of so many pairs"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=limits.seconds,
        metavar="SECONDS",
        help="of a request, else 504",
    )
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=limits.body_bytes,
        metavar="BYTES",
        help="of a request, else 413",
    )
    parser.add_argument(
        "--max-documents",
        type=int,
        default=limits.documents,
        metavar="N",
        help="of a request, else 422",
    )
    parser.add_argument(
        "--max-documents-under-way",
        type=int,
        default=limits.documents_under_way,
        metavar="N",
        help="while there are as many, requests get 429",
    )
    parser.add_argument(
        "--max-passages",
        type=int,
        default=1,
        metavar="P",
        help="in how many passages a long document is read, at most, where a request does not say",
    )
    parser.add_argument("--log-json", action="store_true", help="log lines as JSON")
    tls = parser.add_argument_group("TLS of its clients", "PEM files")
    for name in ("ssl-certfile", "ssl-keyfile"):
        tls.add_argument(f"--{name}", type=Path, metavar="FILE")
    tls = parser.add_argument_group("TLS to Triton", "PEM files, any of which asks for it")
    for name in ("root-certificates", "private-key", "certificate-chain"):
        tls.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def _origin(value: str) -> str:
    if not re.fullmatch(r"\*|https?://[^/\s]+", value):
        raise argparse.ArgumentTypeError(f"{value} is no origin: pass https://HOST, or *")
    return value


async def _serve(arguments: argparse.Namespace) -> int:
    with suppress(AttributeError):  # glibc's: else what large bodies took is never given back.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1024 * 1024)
    # A connection is a file, and the usual limit of 1,024 is soon reached.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limits = Limits(
        body_bytes=arguments.max_body_bytes,
        documents=arguments.max_documents,
        documents_under_way=arguments.max_documents_under_way,
        seconds=arguments.timeout,
    )
    keys = Keys(arguments.api_key_file) if "api_key_file" in arguments else None
    tls = TLS(arguments.root_certificates, arguments.private_key, arguments.certificate_chain)
    url = getattr(arguments, "url", "127.0.0.1:8001")
    client = AsyncRerankClient(
        url,
        timeout=arguments.timeout,
        tls=None if tls == TLS() else tls,
        cache=arguments.cache,
    )
    names = getattr(arguments, "served_model_name", ())
    app: Any = Gateway(client, limits, keys, names, arguments.max_passages)
    if "cors_origin" in arguments:
        app = CORSMiddleware(
            app,
            allow_origins=arguments.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=Guarded,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
    )
    _check_files(arguments.ssl_certfile, arguments.ssl_keyfile)
    config.load()
    with _listening(arguments.host, arguments.port) as listening:
        scheme = "https" if arguments.ssl_certfile else "http"
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Rerank API and a page to try it: {scheme}://{shown}:{port}", file=sys.stderr)
        async with client:
            if not await client.is_ready(timeout=1):
                log.warning("no server is ready at %s: requests get 503 until one is", url)
            await uvicorn.Server(config).serve(sockets=[listening])
    return 0


def _check_files(certificate: Path | None, key: Path | None) -> None:
    """Whether TLS can be had of them, in words that name them."""
    if (certificate is None) != (key is None):
        raise ValueError("pass --ssl-certfile and --ssl-keyfile together")
    if certificate and key:
        for path in (certificate, key):
            path.read_bytes()  # Its error names the file.
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"{certificate}, {key}: {error.reason or 'not usable'}: pass PEM files, and a key "
                "that is the certificate's and has no password"
            ) from None


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((address[0], port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): choose another port") from error
    # Inherited by connections. Else an answer's body waits for the acknowledgement of its head,
    # which clients delay by 40 ms; asyncio sees to it only where the socket names its protocol.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Who reads no answer would keep it for ever.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * GRACE)
    return listening


class _Lines(logging.Formatter):
    """One line a request, for people or as JSON."""

    def __init__(self, as_json: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        seen = getattr(record, "seen", None)
        if seen is None:
            if not self._as_json:
                return super().format(record)
            told = {"level": record.levelname, "message": record.getMessage()}
            if record.exc_info:
                told["exception"] = self.formatException(record.exc_info)
            return self._json(record, told)
        fields: dict[str, object] = {
            "id": seen.id,
            "path": seen.path[:200],
            "dialect": seen.dialect.name if seen.dialect else None,
            "documents": seen.documents,
            "tokens": seen.tokens,
            "milliseconds": round(1000 * seen.seconds, 1),
            "status": seen.status,
        }
        if seen.error:
            fields["error"] = seen.error
        if self._as_json:
            return self._json(record, fields)
        # As JSON in ASCII, so that no value can look like another line, or move a terminal.
        pairs = (f"{name}={json.dumps(value)}" for name, value in fields.items())
        return f"{self.formatTime(record)} {' '.join(pairs)}"

    def _json(self, record: logging.LogRecord, fields: Mapping[str, object]) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return orjson.dumps({"time": f"{stamp}.{int(record.msecs):03}Z", **fields}).decode()


def _log(as_json: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(as_json))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It tells of each connection, and of each request that is no HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
