"""Load tests: their requests, and Locust's users against real servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import GatewayProcess, pipeline, start
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonrank.cli import main
from tritonrank_server.serving.serve import EmbeddedServer

from loadtest import sweep
from loadtest.planted import CUT, Scorer, Setting, Texts, summary
from loadtest.sweep import Limits, Step
from loadtest.workloads import WORKLOADS, stream

LOADTEST = Path(__file__).parents[1] / "loadtest"


def test_workloads_are_the_same_at_each_run() -> None:
    for name in WORKLOADS:
        first = list(islice(stream(name, 1), 5))
        assert first == list(islice(stream(name, 1), 5))
        assert first != list(islice(stream(name, 2), 5))
    sizes = {name: len(next(stream(name))[1]) for name in ("search", "rag", "autocomplete")}
    assert sizes == {"search": 100, "rag": 20, "autocomplete": 10}
    assert {len(each.documents) for each in islice(stream("spiky"), 99)} == {10, 300}
    _, documents, max_passages = next(stream("long"))
    assert (len(documents), max_passages) == (10, 16)
    lengths = [len(text.split()) for text in documents]
    assert 500 <= min(lengths) < 2000 < 3500 < max(lengths) <= 5000
    mixed = "".join(each.query for each in islice(stream("mixed"), 60))
    assert any("가" <= letter <= "힣" for letter in mixed)
    assert any("ぁ" <= letter <= "ん" for letter in mixed)


def test_own_requests(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"query": "차", "documents": ["a", "b"]}\n'
        '{"query": "q", "documents": ["c"], "max_passages": 2}\n'
    )
    found = list(islice(stream(str(path)), 4))
    assert sorted(found[:2]) == [("q", ["c"], 2), ("차", ["a", "b"], None)]
    assert found[2:] == found[:2]


def locust(url: str, *arguments: str) -> tuple[dict[str, int], str]:
    """Runs Locust without its page; gives its count of requests by name, and what it printed."""
    command = [sys.executable, "-m", "locust", "-f", str(LOADTEST / "locustfile.py"), "--headless"]
    done = subprocess.run(
        [*command, "--json", "--host", url, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # Each worker prints an empty list, too.
    lists = json.loads("[" + re.sub(r"\n\[", ",[", done.stdout) + "]")
    return {row["name"]: row["num_requests"] for rows in lists for row in rows}, done.stderr


def documents_ranked(printed: str) -> int:
    """By the locustfile's own count."""
    [total] = re.findall(r"^documents: (\d+),", printed, re.M)
    return int(total)


USERS = ("RerankUser", "TritonUser", "ArrivalUser")


@pytest.mark.parametrize("user", USERS)
def test_users_on_a_real_server(
    int8_server: EmbeddedServer, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # Which is not for this machine.
    many = ["--users=4", "--spawn-rate=4", "--run-time=4s", "--stop-timeout=30"]
    options = ["--workload=autocomplete", "--timeout=60"]
    counts, printed = locust(int8_server.grpc_url, *many, *options, user)
    assert set(counts) == {"autocomplete"}  # Failures would have a name of their own.
    assert documents_ranked(printed) == 10 * counts["autocomplete"] > 0


@pytest.mark.parametrize("user", USERS)
def test_users_ask_for_passages(int8_server: EmbeddedServer, tmp_path: Path, user: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"query": "q", "documents": ["water " * 5000], "max_passages": 3}))
    before = sweep.metrics(int8_server.metrics_url)
    many = ["--users=1", "--run-time=2s", "--stop-timeout=30", "--workload", str(own)]
    counts, _ = locust(int8_server.grpc_url, *many, user)
    after = sweep.metrics(int8_server.metrics_url)
    passages = "nv_inference_count cross_encoder"
    assert after[passages] - before[passages] == 3 * counts[str(own)] > 0


def test_requests_of_perf_analyzer(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"query": "q", "documents": ["a", "b"], "max_passages": 3}))
    command = [sys.executable, "-m", "loadtest.perf_analyzer", str(own), "--requests=2"]
    done = subprocess.run(command, cwd=LOADTEST.parent, capture_output=True, check=True)
    [first, second] = json.loads(done.stdout)["data"]
    assert first == second
    assert {name: (each["content"], each["shape"]) for name, each in first.items()} == {
        "QUERY": (["q"], [1]),
        "DOCUMENTS": (["a", "b"], [2]),
        "MAX_PASSAGES": ([3], [1]),
    }


def test_shapes_and_processes(int8_server: EmbeddedServer) -> None:
    shape = ["-f", f"{LOADTEST / 'locustfile.py'},{LOADTEST / 'shapes.py'}", "--shape=spike"]
    many = ["--peak=4", "--period=5", "--processes=2", "--stop-timeout=30"]
    options = ["--workload=autocomplete", "--timeout=60"]
    counts, printed = locust(int8_server.grpc_url, *shape, *many, *options, "RerankUser")
    assert documents_ranked(printed) == 10 * counts["autocomplete"] > 0


@pytest.mark.parametrize("user", USERS)
def test_failures_are_told_apart(int8_server: EmbeddedServer, tmp_path: Path, user: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"query": " ", "documents": ["a"]}')
    many = ["--users=1", "--run-time=2s", "--exit-code-on-error=0", "--workload", str(own)]
    counts, printed = locust(int8_server.grpc_url, *many, user)
    kind = "InferenceServerException" if user == "TritonUser" else "InvalidRequestError"
    assert set(counts) == {f"{own}: {kind}"}
    assert "QUERY is blank" in printed


def test_users_of_the_gateway(gateway: GatewayProcess, tmp_path: Path) -> None:
    counts, printed = locust(
        gateway.url, "--users=3", "--run-time=3s", "--workload=autocomplete", "GatewayUser"
    )
    assert set(counts) == {"autocomplete"}
    assert documents_ranked(printed) == 10 * counts["autocomplete"] > 0
    own = tmp_path / "own.jsonl"
    own.write_text('{"query": " ", "documents": ["a"]}')
    many = ["--users=1", "--run-time=2s", "--exit-code-on-error=0", "--workload", str(own)]
    counts, printed = locust(gateway.url, *many, "GatewayUser")
    assert set(counts) == {f"{own}: ConnectionError"}
    assert "QUERY is blank" in printed, printed


def answered(server: EmbeddedServer) -> float:
    return sweep.metrics(server.metrics_url)["nv_inference_request_success sorter"]


FAILING = ("--users=4", "--spawn-rate=4", "--exit-code-on-error=0", "--workload=autocomplete")


@pytest.mark.parametrize("processes", [[], ["--processes=2"]], ids=["one", "two"])
@pytest.mark.parametrize("user", USERS)
def test_users_end_where_no_server_is(user: str, processes: list[str]) -> None:
    counts, printed = locust("127.0.0.1:9", *FAILING, "--run-time=3s", *processes, user)
    assert sum(counts.values()) > 0
    assert "autocomplete" not in counts
    assert "Connection refused" in printed


@pytest.mark.parametrize("user", USERS)
def test_users_end_whose_server_has_died(int8_repository: Path, user: str) -> None:
    options = ["--run-time=8s", "--timeout=3", "--stop-timeout=5"]
    with start(int8_repository) as server, ThreadPoolExecutor(1) as pool:
        before = answered(server)
        run = pool.submit(locust, server.grpc_url, *FAILING, *options, user)
        while not run.done() and answered(server) == before:
            time.sleep(0.1)
        os.kill(server.pid, signal.SIGKILL)
        counts, _ = run.result()
    assert counts.pop("autocomplete") > 0
    assert sum(counts.values()) > 0


@pytest.mark.parametrize("user", USERS)
def test_users_end_whose_server_says_nothing(user: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        counts, _ = locust(url, *FAILING, "--run-time=5s", "--timeout=0.5", user)
    assert sum(counts.values()) > 0


@dataclass
class Slow(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers when so many requests are there at a time."""

    crowd: threading.Barrier = field(default_factory=lambda: threading.Barrier(100))

    def ModelConfig(self, request: object, context: grpc.ServicerContext) -> object:
        response = service_pb2.ModelConfigResponse()
        response.config.max_batch_size = 1024
        return response

    def ModelInfer(self, request: object, context: grpc.ServicerContext) -> object:
        self.crowd.wait(60)
        response = service_pb2.ModelInferResponse()
        for name, dtype in (("INDICES", "<i4"), ("SCORES", "<f4"), ("LOGITS", "<f4")):
            response.outputs.add(name=name)
            response.raw_output_contents.append(np.zeros(1, dtype).tobytes())
        return response


def test_100_users_run_at_a_time(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(128))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Slow(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        own = tmp_path / "one.jsonl"
        own.write_text(json.dumps({"query": "q", "documents": ["d"]}))
        many = ["--users=100", "--spawn-rate=100", "--run-time=5s"]
        options = ["--workload", str(own), "--timeout=60"]
        counts, _ = locust(f"127.0.0.1:{port}", *many, *options, "RerankUser")
    finally:
        server.stop(None)
    assert counts[str(own)] >= 100


def test_a_sweep_reports_and_judges(int8_server: EmbeddedServer, tmp_path: Path) -> None:
    urls = ["--url", int8_server.grpc_url, "--metrics-url", int8_server.metrics_url]
    command = [sys.executable, "-m", "loadtest.sweep", *urls, "--workload=autocomplete"]
    load = ["--rates", "3", "6", "--seconds=4", "--timeout=60", "--output", str(tmp_path)]
    held = subprocess.run([*command, *load, "--p95-ms=60000"], cwd=LOADTEST.parent, timeout=300)
    assert held.returncode == 0
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["knee"] == 1
    assert [step["rate"] for step in result["steps"]] == [3, 6]
    for step in result["steps"]:
        assert 0.3 < step["offered"] / step["rate"] < 1.7
        assert 0 < step["answered"] <= step["offered"]
        assert step["errors"] == {}
        assert 0 < step["p50_ms"] <= step["p95_ms"] <= step["p99_ms"]
        assert step["requests_per_execution"] >= 1
        assert step["documents_per_execution"] == pytest.approx(10 * step["requests_per_execution"])
        assert step["compute_ms"]["cross_encoder"] > step["compute_ms"]["sorter"] > 0
        assert step["tokens"] > step["documents"] > 0
    page = (tmp_path / "load.html").read_text()
    assert f"{result['steps'][1]['answered']:.2f}" in page
    assert page.count("data:image/png;base64,") == 2
    for plot in ("load.png", "bars.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    load[2:4] = ["--seconds=1"]
    missed = subprocess.run([*command, *load, "--p95-ms=0.1"], cwd=LOADTEST.parent, timeout=300)
    assert missed.returncode == 1
    assert json.loads((tmp_path / "load.json").read_text())["knee"] is None


def test_the_knee_is_before_the_first_miss() -> None:
    def step(rate: float, p95_ms: float, failed: int = 0) -> Step:
        values = {each.name: 0.0 for each in fields(Step)}
        known = {"rate": rate, "p95_ms": p95_ms, "requests": 100, "errors": {"E": failed}}
        return Step(**values | known)  # type: ignore[arg-type]

    limits = Limits(p95_ms=50, error_rate=0.01)
    good, slow, failing, lucky = step(1, 50), step(2, 51), step(2, 9, failed=2), step(3, 9)
    assert limits.knee([good, step(2, 9, failed=1), slow]) == step(2, 9, failed=1)
    assert limits.knee([good, slow, lucky]) == limits.knee([good, failing]) == good
    assert limits.knee([slow, lucky]) is None
    assert not limits.held(replace(good, p95_ms=None))
    assert Limits(None, 0.5).held(slow)


def test_metrics_of_gpus_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"""# TYPE nv_inference_count counter
nv_inference_count{gpu_uuid="GPU-1",model="cross_encoder",version="1"} 2
nv_inference_count{model="cross_encoder",version="1"} 3
nv_inference_count{model="sorter",version="1"} 4
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.5
tritonrank_tokens_total 5
"""
    monkeypatch.setattr(sweep.DIRECT, "open", lambda *_, **__: BytesIO(text))
    found = sweep.metrics("nowhere")
    assert found["nv_inference_count cross_encoder"] == 5
    assert found["nv_inference_count sorter"] == 4
    assert found["tritonrank_tokens_total"] == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--rates=0", "above 0"),
        ("--rates=-1", "above 0"),
        ("--seconds=0", "above 0"),
        ("--workload=serach", "--workload serach: FileNotFoundError"),
    ],
)
def test_a_sweep_of_nothing_is_refused(option: str, message: str) -> None:
    command = [sys.executable, "-m", "loadtest.sweep", option]
    done = subprocess.run(command, cwd=LOADTEST.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


def test_answers_are_planted_at_a_depth(int8_repository: Path) -> None:
    texts = Texts(int8_repository / "cross_encoder" / "current")
    text, answer = "unaffordable water " * 500, "An unaffordable answer"
    for depth in (0.0, 0.31, 0.95):
        planted = texts.plant(answer, text, depth)
        before, after = planted.split(answer)
        assert text.startswith(before)
        assert text.endswith(after.lstrip())
        assert len(texts.places(planted)) == len(texts.places(text))
        assert len(before) / len(planted) == pytest.approx(depth, abs=0.02)


def test_ways_to_read_a_long_document(int8_repository: Path) -> None:
    scorer, text = Scorer(pipeline(int8_repository), "water"), "an ocean of water. " * 200
    kinds = (CUT, Setting(1, 0, 0), Setting(1, 0.5, 0), Setting(1, 0.5, 0.25), Setting(0.2, 0, 0))
    read = [scorer.logits([text], each)[1] for each in kinds]
    # Besides its 1,000 tokens, the query and three special ones in each passage.
    assert read[:2] == [512, 1000 + 2 * 4]
    assert read[4] == 1000 + 10 * 4
    assert read[1] < read[2] < read[3]
    [best], _ = scorer.logits([text], Setting(1, 0.5, 0))
    [first], _ = scorer.logits([text], CUT)
    assert best >= first


def test_what_is_said_of_planted_answers() -> None:
    own, without = np.full((2, 10), 8.0), np.arange(20.0).reshape(2, 10) - 20
    found = np.stack((own, without, own - 1))
    chosen = np.stack((own, without, without))
    row = summary(found, chosen)
    assert (row["right"], row["pairs"], row["mrr"], row["median_lost"]) == (20, 20, 1, 1)
    assert summary(chosen, chosen)["right"] == 0
    # Among its ten without, a document that gained nothing is behind all that are as good.
    assert summary(chosen, chosen)["mrr"] == pytest.approx(sum(1 / i for i in range(2, 12)) / 10)
    for name in ("more_mrr", "more_logit"):
        mean, low, high = row[name]
        assert 0 < low <= mean <= high
        assert summary(chosen, chosen)[name] == [0, 0, 0]
    found[2, 0, :2] = without[0, :2]
    assert summary(found, chosen)["right_by_fifth"] == [0.5, 1, 1, 1, 1]


def test_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knee = {"tokens": 9000.0, "documents": 100.0, "p95_ms": 150.0}
    facts = {"workload": "search", "server": "a", "hardware": {"cpu": "b"}, "commit": "c"}
    report = tmp_path / "load.json"
    report.write_text(json.dumps({"steps": [{}, knee], "knee": 1, **facts}))
    # 10 × 100 × 90 tokens/s are 10 servers that are always busy.
    command = ["capacity", str(report), "--requests=10", "--utilisation=0.5", "--spare=2"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("22 servers: 20.00 for 10 requests/s of 100 doc")
    assert main([*command, "--tokens=9", "--documents=50"]) == 0
    assert capsys.readouterr().out.startswith("3 servers: 1.00 for 10 requests/s of 50 doc")
    odd = [{"tokens": 0, "documents": 1, "p95_ms": 1}, {"tokens": "x"}, {}]
    reports = [{"steps": [each], "knee": 0, **facts} for each in odd]
    reports += [{"steps": [knee], "knee": each, **facts} for each in (None, 7, "0")]
    for content in (*map(json.dumps, reports), "no JSON", "[" * 100_000):
        report.write_text(content)
        assert main(command) == 1
        assert "measure one with make loadtest URL=" in capsys.readouterr().err
    for wrong in ("--requests=0", "--utilisation=1", "--requests=nan"):
        with pytest.raises(SystemExit):
            main(["capacity", str(report), "--requests=1", wrong])


def test_capacity_reads_what_a_load_test_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    report = Path(__file__).parents[1] / "loadtest" / "results" / "search" / "load.json"
    assert main(["capacity", str(report), "--requests=1"]) == 0
    result = json.loads(report.read_text())
    tokens = result["steps"][result["knee"]]["tokens"]
    assert f"measured: {tokens:.0f} tokens/s at the knee" in capsys.readouterr().out
