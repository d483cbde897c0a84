"""``make loadtest``: offers more and more load, finds the knee, and goes beyond it.

Each step is Locust, open loop (``locustfile.ArrivalUser``), so that waiting is counted. Queue and
compute times and batch sizes are Triton's own metrics over the same step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tritonrank_server.serving.serve import (
    DIRECT,
    DYING_WITH_PARENT,
    EmbeddedServer,
    ServerError,
    Settings,
)

from .bench import commit, hardware
from .sweep_report import write_report
from .workloads import WORKLOADS, stream

HERE = Path(__file__).parent
LOCUST = (
    *DYING_WITH_PARENT,
    *(sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py")),
)
STAGES = ("tokenizer", "cross_encoder", "sorter")
#: Offered load of the rising steps, as shares of what clients that wait for answers reach.
SHARES = (0.2, 0.4, 0.6, 0.75, 0.9, 1.1)
OVERLOAD = 3
#: Of the knee's rate, for the steps that look for what else disturbs.
CALM = 0.5
#: The largest share of failures, unless another is asked for.
ERROR_RATE = 0.01


@dataclass(frozen=True)
class Step:
    """One rate of arrival.

    Attributes:
        name: what it is for: ``rising``, ``overload``, ``after overload``, ``beside a bulk job``.
        rate: requests a second, on average, that were to come.
        offered, answered: requests a second, as they came and as they were answered.
        requests: how many came.
        errors: how many of them failed, by the error's type.
        p50_ms, p95_ms, p99_ms: response times of those answered, from when each was due; to two
            digits, as Locust keeps them. None where none was.
        slowest_error_ms: the longest that a failure took.
        queue_ms, compute_ms: of a request that a stage answered, on average, by stage.
        requests_per_execution, documents_per_execution: of the cross-encoder.
        documents, tokens: ranked a second, whatever sent them, Locust's start and end included.
        memory_mb: of the embedded server's processes at the step's end, and of what they share.
    """

    name: str
    rate: float
    offered: float
    answered: float
    requests: int
    errors: dict[str, int]
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    slowest_error_ms: float
    queue_ms: dict[str, float]
    compute_ms: dict[str, float]
    requests_per_execution: float
    documents_per_execution: float
    documents: float
    tokens: float
    memory_mb: dict[str, float]

    @property
    def error_rate(self) -> float:
        """Failures among the requests that came."""
        return sum(self.errors.values()) / max(1, self.requests)


@dataclass(frozen=True)
class Limits:
    """What a rate must hold to count as carried.

    Attributes:
        p95_ms: the most that 95 of 100 answers may take; None for no limit.
        error_rate: the largest share of failures.
    """

    p95_ms: float | None
    error_rate: float

    def held(self, step: Step) -> bool:
        """Whether the step stayed within them; one without answers did not."""
        if step.p95_ms is None or step.error_rate > self.error_rate:
            return False
        return self.p95_ms is None or step.p95_ms <= self.p95_ms

    def knee(self, steps: Sequence[Step]) -> Step | None:
        """The last of the rising steps before one that did not hold them."""
        best = None
        for step in steps:
            if not self.held(step):
                break
            best = step
        return best


@dataclass(frozen=True)
class Target:
    """A server under test, and what is sent to it.

    Attributes:
        url, metrics_url: ``HOST:PORT`` of gRPC and of the metrics.
        pid: of an embedded server, whose memory is measured.
        workload, seconds, timeout: of every step.
    """

    url: str
    metrics_url: str
    pid: int | None
    workload: str
    seconds: float
    timeout: float

    def offer(self, name: str, rate: float) -> Step:
        """Requests at random, so many a second."""
        return self._step(name, rate, "ArrivalUser", "--users=1", f"--rate={rate}")

    def capacity(self) -> float:
        """Requests a second that clients get who wait for their answers, 4 at a time."""
        return self._step("", float("inf"), "RerankUser", "--users=4", "--spawn-rate=4").answered

    def _step(self, name: str, rate: float, user: str, *options: str) -> Step:
        command = [
            *(*LOCUST, user, "--headless", "--json", "--exit-code-on-error=0"),
            *("--host", self.url, *options),
            *("--workload", self.workload, "--timeout", str(self.timeout)),
            *("--run-time", f"{math.ceil(self.seconds)}s"),
            *("--stop-timeout", str(math.ceil(self.timeout) + 5)),  # All that is under way.
        ]
        started, before = time.monotonic(), metrics(self.metrics_url)
        done = subprocess.run(command, capture_output=True, text=True)
        after, elapsed = metrics(self.metrics_url), time.monotonic() - started
        times = re.search(r"^sent for (\S+) s, answered within (\S+) s$", done.stderr, re.M)
        rows = json.loads(done.stdout) if times else []
        if not rows:
            raise SystemExit(f"Locust sent nothing:\n{done.stderr}")
        moved = Counter({key: (after[key] - before[key]) for key in after})
        sent, until = map(float, times.groups())  # type: ignore[union-attr]
        return _step(name, rate, rows, (sent, max(sent, until)), moved, elapsed, self._memory())

    def _memory(self) -> dict[str, float]:
        if self.pid is None:
            return {}
        process = psutil.Process(self.pid)
        every = [process, *process.children(recursive=True)]
        # Not all that is in use there: others leave things, too.
        regions = Path("/dev/shm").glob(f"tritonrank-{os.getpid()}-*")
        return {
            "processes": sum(each.memory_info().rss for each in every) / 2**20,
            "/dev/shm": sum(each.stat().st_blocks * 512 for each in regions) / 2**20,
        }


def _step(
    name: str,
    rate: float,
    rows: list[dict[str, Any]],
    seconds: tuple[float, float],
    moved: Counter[str],
    elapsed: float,
    memory: dict[str, float],
) -> Step:
    """From Locust's rows, of answers and of each kind of failure, and how far metrics moved.

    Requests came for ``seconds[0]``, and were answered within ``seconds[1]``; the metrics moved in
    ``elapsed`` seconds.
    """
    good = next((row for row in rows if not row["num_failures"]), None)
    bad = [row for row in rows if row is not good]
    errors = {row["name"].rpartition(": ")[2]: row["num_failures"] for row in bad}
    answered = good["num_requests"] if good else 0
    requests = answered + sum(errors.values())
    counts = good["response_times"] if good else {}
    times = np.repeat([float(ms) for ms in counts], list(counts.values()))

    def quantile(share: float) -> float | None:
        return float(np.quantile(times, share, method="inverted_cdf")) if good else None

    def mean_ms(part: str) -> dict[str, float]:
        return {
            stage: moved[f"nv_inference_{part}_duration_us {stage}"]
            / max(1, moved[f"nv_inference_request_success {stage}"])
            / 1000
            for stage in STAGES
        }

    executions = max(1, moved["nv_inference_exec_count cross_encoder"])
    documents = moved["nv_inference_count cross_encoder"]
    encoded = max(1, moved["tritonrank_documents_total"])
    tokens_of_a_document = moved["tritonrank_tokens_total"] / encoded
    return Step(
        name=name,
        rate=rate,
        offered=requests / seconds[0],
        answered=answered / seconds[1],
        requests=requests,
        errors=errors,
        p50_ms=quantile(0.5),
        p95_ms=quantile(0.95),
        p99_ms=quantile(0.99),
        slowest_error_ms=max((row["max_response_time"] for row in bad), default=0.0),
        queue_ms=mean_ms("queue"),
        compute_ms=mean_ms("compute_infer"),
        requests_per_execution=moved["nv_inference_request_success cross_encoder"] / executions,
        documents_per_execution=documents / executions,
        documents=documents / elapsed,
        tokens=documents * tokens_of_a_document / elapsed,
        memory_mb=memory,
    )


def metrics(url: str) -> Counter[str]:
    """Triton's counters, ``NAME MODEL``, over all GPUs and versions; our own, ``NAME``.

    Args:
        url: ``HOST:PORT`` of the metrics, for which no proxy is asked.
    """
    with DIRECT.open(f"http://{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: Counter[str] = Counter()
    for name, labels, value in re.findall(r"^(\w+)(?:{(.*)})? (\S+)$", text, re.M):
        model = re.search(r'\bmodel="(\w+)"', labels)
        found[f"{name} {model[1]}" if model else name] += float(value)  # type: ignore[assignment]
    return found


@contextmanager
def bulk_job(url: str) -> Iterator[None]:
    """A client beside the step, that ranks thousands of documents, over and over."""
    command = [*LOCUST, "RerankUser", "--headless", "--host", url]
    with subprocess.Popen(
        [*command, "--workload=bulk", "--timeout=3600"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield
            if process.poll() is not None:
                raise SystemExit("The bulk job ended before its time")
        finally:
            process.terminate()


def sweep(target: Target, given: Sequence[float] | None, limits: Limits | None) -> dict[str, Any]:
    """Rising rates; then, of the knee, what more does to it, and half of it in company.

    Args:
        target: the server.
        given: requests a second; default, shares of the server's capacity. With it,
            nothing follows.
        limits: what a rate must hold; default, all but 1 % answered, and 95 % of them within five
            times the median at the lowest rate.
    """
    capacity = None
    if not given:
        _say(f"How much {target.url} can do: 4 clients for {target.seconds} s …")
        capacity = target.capacity()
        if not capacity:
            raise SystemExit("No request was answered in time: try a longer --timeout")
    steps = []
    for rate in sorted(given or [share * capacity for share in SHARES]):  # type: ignore[operator]
        steps.append(_said(target.offer("rising", rate)))
    p50_ms = steps[0].p50_ms
    limits = limits or Limits(p50_ms and 5 * p50_ms, ERROR_RATE)
    knee = limits.knee(steps)
    if knee and not given:
        # Longer: at first clients' retries add to an overload, and half the rate is few requests.
        longer = replace(target, seconds=2 * target.seconds)
        steps.append(_said(longer.offer("overload", OVERLOAD * knee.rate)))
        steps.append(_said(longer.offer("after overload", CALM * knee.rate)))
        with bulk_job(target.url):
            steps.append(_said(longer.offer("beside a bulk job", CALM * knee.rate)))
    return {
        "workload": target.workload,
        "seconds": target.seconds,
        "timeout": target.timeout,
        "closed_loop": capacity,  # None: the rates were given, and nothing came after them.
        "limits": asdict(limits),
        "held": [limits.held(step) for step in steps],
        "knee": steps.index(knee) if knee else None,
        "steps": [asdict(step) for step in steps],
    }


def _said(step: Step) -> Step:
    errors = ", ".join(f"{count} {name}" for name, count in step.errors.items()) or "no failures"
    _say(
        f"{step.name}, {step.rate:.2f} requests/s: {step.offered:.2f} came, "
        f"{step.answered:.2f} answered, p95 {step.p95_ms or 0:.0f} ms, {errors}"
    )
    return step


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def target_of(arguments: argparse.Namespace) -> Iterator[Target]:
    """The server that was named, or an embedded one."""
    load = (arguments.workload, arguments.seconds, arguments.timeout)
    if arguments.url:
        host = arguments.url.rpartition(":")[0]
        yield Target(arguments.url, arguments.metrics_url or f"{host}:8002", None, *load)
        return
    _say("Starting Triton …")
    log = arguments.output / "triton.log"
    with EmbeddedServer(Settings(grpc_port=0, http_port=0, metrics_port=0, log=log)) as server:
        yield Target(server.grpc_url, server.metrics_url, server.pid, *load)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def main() -> int:
    """Load-tests a server: writes ``load.json``, ``load.html`` and plots into a folder.

    The exit code is 1 if a limit was given and a rate of ``--rates`` (by default, the lowest rate)
    did not hold it.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--url", help="HOST:PORT of gRPC; default, an embedded server")
    parser.add_argument("--metrics-url", help="HOST:PORT of its metrics; default, port 8002")
    names = ", ".join(WORKLOADS)
    parser.add_argument("--workload", default="search", help=f"{names}, or a JSONL file")
    parser.add_argument("--rates", type=_positive, nargs="+", help="requests a second")
    parser.add_argument("--seconds", type=_positive, default=30, help="of each rate")
    parser.add_argument("--timeout", type=_positive, default=10, help="seconds of a request")
    parser.add_argument("--p95-ms", type=float, help="the most that 95 %% of the answers may take")
    parser.add_argument(
        "--max-error-rate",
        type=float,
        help=f"the largest share of failures; {ERROR_RATE} if only --p95-ms is given",
    )
    parser.add_argument("--output", type=Path, default=Path("build/load"), help="a folder")
    arguments = parser.parse_args()
    try:
        next(stream(arguments.workload))
    except (OSError, ValueError, KeyError, StopIteration) as error:
        parser.error(f"--workload {arguments.workload}: {type(error).__name__}: {error}")
    limits = None
    if arguments.p95_ms is not None or arguments.max_error_rate is not None:
        share = arguments.max_error_rate
        limits = Limits(arguments.p95_ms, ERROR_RATE if share is None else share)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        with target_of(arguments) as target:
            result = sweep(target, arguments.rates, limits)
    except (ServerError, OSError) as error:
        _say(str(error))
        return 1
    result |= {
        "server": arguments.url or "embedded",
        "hardware": hardware(),
        "commit": commit(),
    }
    _say(f"Wrote {write_report(result, arguments.output)}")
    required = result["held"][: len(arguments.rates or [0])]
    return int(limits is not None and not all(required))


if __name__ == "__main__":
    sys.exit(main())
