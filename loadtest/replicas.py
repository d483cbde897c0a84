"""``make replicas``: three servers under load, while they are killed, frozen, restarted, updated.

The load is clients that wait for each answer and compare it with what the model in use must say.
They reach the servers by the client's own round robin, or through nginx.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from tritonrank import RerankClient, RerankError
from tritonrank_server.export.command import export
from tritonrank_server.export.publish import use
from tritonrank_server.serving.serve import DYING_WITH_PARENT, EmbeddedServer, ServerError, Settings
from tritonrank_server.stages.pipeline import Pipeline

from .bench import commit, hardware, new_repository
from .sweep import metrics
from .workloads import stream

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "replicas" / "replicas.json"
NGINX = HERE.parent / "docker" / "nginx.conf"
#: Clients that wait for answers.
CLIENTS = 4
#: How long a client waits for an answer, retries included, in seconds.
TIMEOUT = 60.0


@dataclass(frozen=True)
class Phase:
    """What clients saw while something was done to the servers.

    Attributes:
        name: what was done.
        requests: how many ended.
        failures: how many of them failed, by the error's type, or by ``wrong answer``.
        p50_ms, p95_ms, slowest_ms: response times of those answered.
        shares: of the requests answered, by server; none where a server was started anew.
    """

    name: str
    requests: int
    failures: dict[str, int]
    p50_ms: float
    p95_ms: float
    slowest_ms: float
    shares: list[float]


@dataclass(frozen=True)
class Question:
    """A request, and the logits that are right, by the name of the export."""

    query: str
    documents: list[str]
    logits: dict[str, list[float]]


class Fleet:
    """A context manager: servers of one model repository, each on ports that it keeps.

    Attributes:
        starts: how many were started anew.
    """

    def __init__(self, repository: Path, count: int) -> None:
        self.repository = repository
        self.starts = 0
        self._count = count
        self._servers: list[EmbeddedServer] = []

    def __enter__(self) -> Fleet:
        try:
            while len(self._servers) < self._count:
                free = Settings(self.repository, grpc_port=0, http_port=0, metrics_port=0)
                log = self.repository.with_suffix(f".{len(self._servers)}.log")
                self._servers.append(EmbeddedServer(replace(free, log=log)).__enter__())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.__exit__()

    @property
    def urls(self) -> list[str]:
        """Their gRPC addresses."""
        return [server.grpc_url for server in self._servers]

    def answered(self) -> list[float]:
        """Requests that each has answered since its start."""
        name = "nv_inference_request_success reranker"
        return [metrics(server.metrics_url)[name] for server in self._servers]

    def signal(self, index: int, number: signal.Signals) -> None:
        os.kill(self._servers[index].pid, number)

    def restart(self, index: int) -> None:
        """Stops one and starts it anew.

        Raises:
            ServerError: it does not start; there is nothing on its ports then.
        """
        self.starts += 1
        self._servers[index].__exit__()
        self._servers[index].__enter__()

    def rolling_restart(self) -> None:
        """One after the other, each ready before the next."""
        for index in range(self._count):
            self.restart(index)


class Load:
    """A context manager: inside it, clients call the servers without a pause.

    Args:
        url: for ``RerankClient``.
        questions: what they ask, over and over.
    """

    def __init__(self, url: str | Sequence[str], questions: Sequence[Question]) -> None:
        self._client = RerankClient(url, timeout=TIMEOUT)
        self._questions = questions
        self._accepted: set[str] = set()
        self._seen: list[tuple[str, float]] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(CLIENTS)]

    def __enter__(self) -> Load:
        self._client.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def phase(
        self, name: str, fleet: Fleet, accepted: set[str], action: Callable[[], object]
    ) -> Phase:
        """Does something to the servers, and tells what the clients saw meanwhile."""
        self._accepted = accepted
        began, before, self._seen = fleet.starts, fleet.answered(), []
        action()
        seen, after = self._seen, fleet.answered()
        failures = Counter(kind for kind, _ in seen if kind)
        times = [1000 * seconds for kind, seconds in seen if not kind] or [math.nan]
        p50, p95 = np.quantile(times, [0.5, 0.95])
        more = np.subtract(after, before)
        shares = (more / more.sum()).tolist() if fleet.starts == began else []
        return Phase(name, len(seen), dict(failures), float(p50), float(p95), max(times), shares)

    def _work(self, turn: int) -> None:
        while not self._end.is_set():
            question = self._questions[turn % len(self._questions)]
            turn += CLIENTS
            began = time.monotonic()
            kind = self._outcome(question)
            self._seen.append((kind, time.monotonic() - began))

    def _outcome(self, question: Question) -> str:
        """Nothing if it was right, else how it failed."""
        try:
            ranking = self._client.rank(question.query, question.documents)
        except RerankError as error:
            return type(error).__name__
        logits = [each.logit for each in sorted(ranking, key=lambda each: each.index)]
        right = any(question.logits[export] == logits for export in self._accepted)
        return "" if right else "wrong answer"


def questions(exports: Path, names: Sequence[str]) -> list[Question]:
    """Small ones, with what the published folders answer without Triton."""
    pipelines = {name: Pipeline.of(exports / name, max_passages=10) for name in names}
    found = []
    for query, documents, _ in islice(stream("autocomplete"), 24):
        logits = {}
        for name, pipeline in pipelines.items():
            ranking = pipeline.rank(query, documents)
            logits[name] = ranking.logits[np.argsort(ranking.indices)].tolist()
        found.append(Question(query, documents, logits))
    return found


def scenario(
    fleet: Fleet, url: str | Sequence[str], before: str, after: str, seconds: float
) -> Iterator[Phase]:
    """Phase by phase, what clients see of what can happen to servers.

    Args:
        fleet: at least two servers, which serve ``before``.
        url: where clients reach them.
        before: a published folder of the repository.
        after: another.
        seconds: how long each phase goes on when all is done; a server is frozen for thrice that.
    """
    old, new, both = {before}, {after}, {before, after}
    exports = fleet.repository / "cross_encoder"
    asked = questions(exports, [before, after])

    def pause() -> None:
        time.sleep(seconds)

    def killed() -> None:
        fleet.signal(0, signal.SIGKILL)
        pause()
        fleet.restart(0)
        pause()

    def frozen() -> None:
        fleet.signal(1, signal.SIGSTOP)
        time.sleep(3 * seconds)
        fleet.signal(1, signal.SIGCONT)

    def updated(export: str) -> None:
        use(exports / export)
        fleet.rolling_restart()

    def broken_update() -> None:
        broken = exports / "export-broken"
        shutil.copytree(exports / before, broken, dirs_exist_ok=True)
        os.truncate(broken / "model.onnx", 1000)
        use(broken)
        with suppress(ServerError):
            fleet.restart(0)
            raise AssertionError("an export that cannot be loaded was served")
        pause()
        use(exports / before)
        fleet.restart(0)

    with Load(url, asked) as load:
        yield load.phase("nothing", fleet, old, pause)
        yield load.phase("one killed, and started anew", fleet, old, killed)
        yield load.phase("nothing, after that", fleet, old, pause)
        yield load.phase("one frozen", fleet, old, frozen)
        yield load.phase("rolling update", fleet, both, partial(updated, after))
        yield load.phase("nothing, after that", fleet, new, pause)
        yield load.phase("rolling back", fleet, both, partial(updated, before))
        yield load.phase("an update that does not load, and back", fleet, old, broken_update)
        yield load.phase("nothing, after that", fleet, old, pause)


@contextmanager
def nginx(urls: Sequence[str]) -> Iterator[str]:
    """``docker/nginx.conf`` in Debian's nginx, in front of these servers; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    text = NGINX.read_text().replace("listen 8001", f"listen {url}")
    for number, server in enumerate(urls, 1):
        text = text.replace(f"server-{number}:8001", server)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(text.replace("/tmp/nginx.pid", f"{folder}/nginx.pid"))
        foreground = "daemon off; master_process off;"
        command = [*DYING_WITH_PARENT, "nginx", "-p", folder, "-c", str(config), "-g", foreground]
        with subprocess.Popen(command) as process:
            try:
                yield url
            finally:
                process.terminate()


def main() -> None:
    """Runs the scenario twice, prints each phase, and writes ``RESULTS``."""
    parser = argparse.ArgumentParser(prog="loadtest.replicas", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    seconds = parser.parse_args().seconds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        repository = new_repository(Path(folder, "repository"))
        after, before = (export("default", p, repository).name for p in ("fp32", "int8"))
        with Fleet(repository, 3) as fleet:
            ways: dict[str, AbstractContextManager[str | list[str]]]
            ways = {"the client's round robin": nullcontext(fleet.urls)}
            if shutil.which("nginx"):
                ways["nginx"] = nginx(fleet.urls)
            for name, way in ways.items():
                with way as url:
                    phases = map(_said, scenario(fleet, url, before, after, seconds))
                    found[name] = [asdict(phase) for phase in phases]
    result = {"commit": commit(), "hardware": hardware(), "seconds": seconds, "ways": found}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _said(phase: Phase) -> Phase:
    print(
        f"{phase.name}: {phase.requests} requests, failures {phase.failures or 'none'}, "
        f"p95 {phase.p95_ms:.0f} ms, slowest {phase.slowest_ms:.0f} ms, "
        f"shares {[round(share, 2) for share in phase.shares]}",
        flush=True,
    )
    return phase


if __name__ == "__main__":
    main()
