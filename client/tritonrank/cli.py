"""The ``tritonrank`` command."""

from __future__ import annotations

import argparse
import codecs
import importlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

from .client import RerankClient
from .connection import TLS
from .errors import RerankError
from .table import format_table

#: Commands that the client installs without: module, the extra that it needs.
FURTHER_COMMANDS = {
    "gateway": (
        "tritonrank.gateway.command",
        "gateway",
        "serve the rerank APIs of others over HTTP, in front of Triton",
    ),
    "serve": (
        "tritonrank_server.serving.serve",
        "serving",
        "serve the model repository with the embedded Triton",
    ),
    "export": (
        "tritonrank_server.export.command",
        "export",
        "export a checkpoint into the model repository",
    ),
    "demo": (
        "tritonrank_server.serving.demo",
        "serving",
        "rank a sample with the embedded Triton",
    ),
    "capacity": (
        "tritonrank_server.serving.capacity",
        "serving",
        "tell how many servers a load needs, from a load test",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; gives the exit status: 0, or 1 after one line on standard error."""
    arguments = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # As what comes in.
    try:
        if arguments and arguments[0] in FURTHER_COMMANDS:
            status = _further_command(*arguments)
        else:
            status = _rank(_parser().parse_args(arguments))
        print(end="", flush=True)
        return status
    except OSError as error:  # Of the output: what is left of it would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # The reader, `head` say, has seen enough.
            return 0
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _further_command(name: str, *arguments: str) -> int:
    path, extra, _ = FURTHER_COMMANDS[name]
    try:
        module = importlib.import_module(path)
        status: int = module.main(list(arguments))
    except ModuleNotFoundError as error:
        print(
            f"tritonrank: {name} needs the package {error.name}: in a checkout of tritonrank, "
            f"pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonrank", description="Rerank documents on Triton.")
    parser.add_argument("--version", action="version", version=version("tritonrank"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    rank = commands.add_parser(
        "rank",
        help="rank the lines of a file by a query",
        description="Rank the lines of a file by a query. An empty line is an empty document, so "
        "that an index is always the number of the line, from 0.",
    )
    rank.add_argument("query")
    rank.add_argument(
        "file", nargs="?", default="-", help="one document a line; - is standard input"
    )
    rank.add_argument("--top-k", type=int, metavar="K", help="print the best K only")
    rank.add_argument(
        "--max-passages",
        type=int,
        metavar="P",
        help="read what does not fit the model in up to P passages, and show the best",
    )
    rank.add_argument(
        "--max-document-tokens", type=int, metavar="T", help="read T tokens of a document at most"
    )
    rank.add_argument("--json", action="store_true", help="print JSON in place of a table")
    rank.add_argument(
        "--url",
        action="append",
        metavar="HOST:PORT",
        help="gRPC address of the server, more than once for several (default 127.0.0.1:8001)",
    )
    rank.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    tls = rank.add_argument_group("TLS", "PEM files, any of which asks for it.")
    for name in ("root-certificates", "private-key", "certificate-chain"):
        tls.add_argument(f"--{name}", type=Path, metavar="FILE")
    for name, (_, _, text) in FURTHER_COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _rank(arguments: argparse.Namespace) -> int:
    url = arguments.url or "127.0.0.1:8001"
    tls = TLS(arguments.root_certificates, arguments.private_key, arguments.certificate_chain)
    tls_or_none = None if tls == TLS() else tls
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed: there is nowhere to print to")
        documents = _lines(arguments.file)
        with RerankClient(url, timeout=arguments.timeout, tls=tls_or_none) as client:
            ranking = client.rank(
                arguments.query,
                documents,
                arguments.top_k,
                max_passages=arguments.max_passages,
                max_document_tokens=arguments.max_document_tokens,
            )
    except (RerankError, OSError, ValueError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps([asdict(each) for each in ranking], ensure_ascii=False, indent=2))
    else:
        print(format_table(ranking))
    return 0


def _lines(path: str) -> list[str]:
    """The documents. Not str.splitlines, which also splits at characters inside a line."""
    if path == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed: name a file")
        content = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            content = file.read()
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    try:
        return [line.decode("utf-8").rstrip("\r") for line in lines]
    except UnicodeDecodeError as error:
        source = "standard input" if path == "-" else path
        number = lines.index(error.object) + 1
        raise ValueError(f"line {number} of {source} is not UTF-8: convert the file") from None
