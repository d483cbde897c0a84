"""``make loadtest``: offers more and more load, finds the knee, and goes beyond it.

Each step is Locust, open loop (``locustfile.ArrivalUser``), so that waiting is counted. Queue and
compute times and batch sizes are Triton's own metrics over the same step.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tritonrank_server.serve import EmbeddedServer, ServerError, Settings, die_with_parent

from .bench import commit, hardware
from .sweep_report import write_report
from .workloads import WORKLOADS

HERE = Path(__file__).parent
LOCUST = (sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"))
STAGES = ("tokenizer", "cross_encoder", "sorter")
#: Offered load of the rising steps, as shares of what clients that wait for answers reach.
SHARES = (0.2, 0.4, 0.6, 0.75, 0.9, 1.1)
OVERLOAD = 3
#: Of what the knee's rate is, for the steps that look for what else disturbs.
CALM = 0.5


@dataclass(frozen=True)
class Step:
    """One rate of arrival.

    Attributes:
        name: what it is for: ``rising``, ``overload``, ``after overload``, ``beside a bulk job``.
        offered, answered: requests a second, as they came and as they were answered.
        requests: how many came.
        errors: how many of them failed, by the error's type.
        p50_ms, p95_ms, p99_ms: response times of those answered, from when each was due; to two
            digits, as Locust keeps them.
        slowest_error_ms: the longest that a failure took.
        queue_ms, compute_ms: of a request that a stage answered, on average, by stage.
        requests_per_execution, documents_per_execution: of the cross-encoder.
        documents, tokens: a second, through the tokenizer, whatever sent them.
        memory_mb: of the embedded server's processes at the step's end, and of what they share.
    """

    name: str
    offered: float
    answered: float
    requests: int
    errors: dict[str, int]
    p50_ms: float
    p95_ms: float
    p99_ms: float
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
        p95_ms: the most that 95 of 100 answers may take.
        error_rate: the largest share of failures.
    """

    p95_ms: float
    error_rate: float

    def held(self, step: Step) -> bool:
        """Whether the step stayed within them; one without requests says nothing."""
        within = step.p95_ms <= self.p95_ms and step.error_rate <= self.error_rate
        return step.requests > 0 and within

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
    seconds: int
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
            *("--run-time", f"{self.seconds}s", "--stop-timeout", str(round(2 * self.timeout))),
        ]
        before = _metrics(self.metrics_url)
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, preexec_fn=die_with_parent)
        if done.returncode:
            raise SystemExit(f"Locust failed: {done.stderr.decode()}")
        elapsed = time.monotonic() - started
        after = _metrics(self.metrics_url)
        moved = Counter({key: after[key] - before[key] for key in after})
        return _step(name, rate, json.loads(done.stdout), moved, elapsed, self._memory())

    def _memory(self) -> dict[str, float]:
        if self.pid is None:
            return {}
        process = psutil.Process(self.pid)
        every = [process, *process.children(recursive=True)]
        return {
            "processes": sum(each.memory_info().rss for each in every) / 2**20,
            "/dev/shm": shutil.disk_usage("/dev/shm").used / 2**20,
        }


def _step(
    name: str,
    rate: float,
    rows: list[dict[str, Any]],
    metrics: Counter[str],
    elapsed: float,
    memory: dict[str, float],
) -> Step:
    """From Locust's rows, of answers and of each kind of failure, and how far metrics moved."""
    good = next((row for row in rows if not row["num_failures"]), None)
    bad = [row for row in rows if row is not good]
    errors = {row["name"].rpartition(": ")[2]: row["num_failures"] for row in bad}
    answered = good["num_requests"] if good else 0
    requests = answered + sum(errors.values())
    # Until the last answer, or for as long as so many requests take to come.
    lasted = max(
        good["last_request_timestamp"] - good["start_time"] if good else 0, requests / rate
    )

    times = (
        sorted((float(ms), count) for ms, count in good["response_times"].items()) if good else []
    )
    every = np.repeat(*np.transpose(times).astype(int)) if times else np.array([np.nan])

    def mean_ms(part: str) -> dict[str, float]:
        return {
            stage: metrics[f"nv_inference_{part}_duration_us {stage}"]
            / max(1, metrics[f"nv_inference_request_success {stage}"])
            / 1000
            for stage in STAGES
        }

    executions = max(1, metrics["nv_inference_exec_count cross_encoder"])
    return Step(
        name=name,
        offered=rate,
        answered=answered / lasted if answered else 0.0,
        requests=requests,
        errors=errors,
        p50_ms=float(np.quantile(every, 0.5, method="inverted_cdf")),
        p95_ms=float(np.quantile(every, 0.95, method="inverted_cdf")),
        p99_ms=float(np.quantile(every, 0.99, method="inverted_cdf")),
        slowest_error_ms=max((row["max_response_time"] for row in bad), default=0.0),
        queue_ms=mean_ms("queue"),
        compute_ms=mean_ms("compute_infer"),
        requests_per_execution=metrics["nv_inference_request_success cross_encoder"] / executions,
        documents_per_execution=metrics["nv_inference_count cross_encoder"] / executions,
        documents=metrics["tritonrank_documents_total"] / elapsed,
        tokens=metrics["tritonrank_tokens_total"] / elapsed,
        memory_mb=memory,
    )


def _metrics(url: str) -> Counter[str]:
    """Triton's counters, by name and model."""
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: Counter[str] = Counter()
    for name, model, value in re.findall(r'^(\w+)(?:{(?:model="(\w+)")?.*?})? (\S+)$', text, re.M):
        found[f"{name} {model}".strip()] += float(value)  # type: ignore[assignment]
    return found


@contextmanager
def bulk_job(url: str) -> Iterator[None]:
    """A client beside the step, that ranks thousands of documents, over and over."""
    command = [*LOCUST, "RerankUser", "--headless", "--host", url]
    with subprocess.Popen(
        [*command, "--workload=bulk", "--timeout=3600"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def sweep(target: Target, given: Sequence[float] | None, limits: Limits | None) -> dict[str, Any]:
    """Rising rates; then, of the knee, what more does to it, and half of it in company.

    Args:
        target: the server.
        given: requests a second, rising; default, shares of the server's capacity. With it,
            nothing follows.
        limits: what a rate must hold; default, all but 1 % answered, and 95 % of them within five
            times the median at the lowest rate.
    """
    capacity = None
    if not given:
        _say(f"How much {target.url} can do: 4 clients for {target.seconds} s …")
        capacity = target.capacity()
        if not capacity:
            raise SystemExit("No request was answered: is the model loaded? Try a longer --timeout")
    steps = []
    for rate in given or [share * capacity for share in SHARES]:  # type: ignore[operator]
        steps.append(_said(target.offer("rising", rate)))
    limits = limits or Limits(5 * steps[0].p50_ms, 0.01)
    knee = limits.knee(steps)
    if knee and not given:
        # Longer, since at first the clients' retries add to it.
        longer = replace(target, seconds=2 * target.seconds)
        steps.append(_said(longer.offer("overload", OVERLOAD * knee.offered)))
        steps.append(_said(target.offer("after overload", CALM * knee.offered)))
        with bulk_job(target.url):
            steps.append(_said(target.offer("beside a bulk job", CALM * knee.offered)))
    return {
        "workload": target.workload,
        "seconds": target.seconds,
        "timeout": target.timeout,
        "closed_loop": capacity,
        "limits": asdict(limits),
        "held": [limits.held(step) for step in steps],
        "knee": steps.index(knee) if knee else None,
        "steps": [asdict(step) for step in steps],
    }


def _said(step: Step) -> Step:
    errors = ", ".join(f"{count} {name}" for name, count in step.errors.items()) or "no failures"
    _say(
        f"{step.name}: {step.offered:.2f} requests/s offered, {step.answered:.2f} answered, "
        f"p95 {step.p95_ms:.0f} ms, {errors}"
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
    parser.add_argument("--rates", type=float, nargs="+", help="requests a second, rising")
    parser.add_argument("--seconds", type=int, default=30, help="of each rate")
    parser.add_argument("--timeout", type=float, default=10, help="seconds of a request")
    parser.add_argument("--p95-ms", type=float, help="the most that 95 %% of the answers may take")
    parser.add_argument("--max-error-rate", type=float, help="the largest share of failures")
    parser.add_argument("--output", type=Path, default=Path("build/load"), help="a folder")
    arguments = parser.parse_args()
    limits = None
    if arguments.p95_ms is not None or arguments.max_error_rate is not None:
        limits = Limits(arguments.p95_ms or float("inf"), arguments.max_error_rate or 0.0)
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
