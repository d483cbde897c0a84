"""``make demo``: real questions ranked by the embedded server, printed as tables."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path

from tritonrank import RerankClient, RerankError
from tritonrank.table import format_table

from ..wheels import WheelError
from .serve import EmbeddedServer, ServerError, Settings

#: Said of what the default model does not read.
NOT_ENGLISH = "shown for its script: the default model reads English"
SAMPLE = files("tritonrank_server") / "sample.jsonl"


def main(argv: list[str] | None = None) -> int:
    """``tritonrank demo``: starts a server on free ports, ranks the sample, stops the server."""
    parser = argparse.ArgumentParser(prog="tritonrank demo", description=main.__doc__)
    parser.add_argument("--model-repository", type=Path, default=Settings.model_repository)
    repository = parser.parse_args(argv).model_repository
    settings = Settings(repository, grpc_port=0, http_port=0, metrics_port=0)
    try:
        with EmbeddedServer(settings) as server, RerankClient(server.grpc_url) as client:
            for line in SAMPLE.read_text(encoding="utf-8").splitlines():
                request = json.loads(line)
                ranking = client.rank(request["query"], request["documents"])
                note = "" if request["query"].isascii() else f"  ({NOT_ENGLISH})"
                print(f"{request['query']}{note}\n{format_table(ranking)}\n")
    except (WheelError, ServerError, RerankError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    return 0
