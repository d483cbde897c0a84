"""Real servers with the real model, shared by all tests of a run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pytest
from filelock import FileLock
from tritonrank_server.export.command import export
from tritonrank_server.serving.serve import EmbeddedServer, Settings
from tritonrank_server.stages.pipeline import Pipeline

from loadtest.bench import new_repository

MAX_DOCUMENTS = 1024


# A shell starts what runs in the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def start(repository: Path) -> AbstractContextManager[EmbeddedServer]:
    """A server on free ports, its log beside the repository."""
    log = repository.with_suffix(".log")
    return EmbeddedServer(Settings(repository, grpc_port=0, http_port=0, metrics_port=0, log=log))


def pipeline(repository: Path) -> Pipeline:
    """The same stages in this process, without Triton."""
    return Pipeline.of(repository / "cross_encoder" / "current", MAX_DOCUMENTS)


@pytest.fixture(scope="session")
def sample() -> list[tuple[str, list[str]]]:
    """Queries with a dozen documents each, in English, Korean and Japanese."""
    lines = (files("tritonrank_server") / "sample.jsonl").read_text("utf-8").splitlines()
    return [(each["query"], each["documents"]) for each in map(json.loads, lines)]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of this run, for all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


def exported(shared: Path, precision: str) -> Path:
    """The default model's repository, by whichever process asks first. Only to be read."""
    repository = shared / precision / "repository"
    with FileLock(shared / f"{precision}.lock"):
        if not repository.exists():
            export("default", precision, new_repository(repository))
    return repository


@pytest.fixture(scope="session")
def int8_repository(shared: Path) -> Path:
    return exported(shared, "int8")


@pytest.fixture(scope="session")
def fp32_repository(shared: Path) -> Path:
    return exported(shared, "fp32")


@pytest.fixture(scope="session")
def int8_server(int8_repository: Path) -> Iterator[EmbeddedServer]:
    with start(int8_repository) as server:
        yield server


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway: where it is, its process, and what it wrote."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def gateway_at(
    url: str,
    log: Path,
    *options: str,
    start: Sequence[str] = (sys.executable, "-m", "tritonrank", "gateway"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[GatewayProcess]:
    """The real command, in front of the server at an address, at a free port."""
    command = [*start, "--url", url, "--port=0", *options]
    with (
        open(log, "wb") as file,
        subprocess.Popen(command, stderr=file, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while not (found := re.search(r"Rerank API.*(https?://\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield GatewayProcess(found[1], process, log)
        finally:
            process.terminate()
            process.wait(60)


def gateway_of(
    server: EmbeddedServer, log: Path, *options: str
) -> AbstractContextManager[GatewayProcess]:
    """The real command, in front of a server, at a free port."""
    return gateway_at(server.grpc_url, log, *options)


@pytest.fixture(scope="session")
def gateway(
    int8_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    with gateway_of(int8_server, tmp_path_factory.mktemp("gateway") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def fp32_server(fp32_repository: Path) -> Iterator[EmbeddedServer]:
    with start(fp32_repository) as server:
        yield server
