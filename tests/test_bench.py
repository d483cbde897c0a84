"""The benchmark on a few pairs: its contestants agree, and what it writes can be read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import start
from tritonrank import RerankClient
from tritonrank_server.serving.serve import EmbeddedServer

from loadtest import bench, contestant, data, gpu, growth, own_cost, report
from loadtest.anatomy import anatomy
from loadtest.bench import Contestant
from loadtest.data import Request
from loadtest.replicas import Phase


def test_ndcg() -> None:
    request = Request("q", ["a", "b", "c"], grades=[0, 3, 1], ideal=[3, 2, 1])
    best = 3 + 2 / np.log2(3) + 1 / 2
    assert data.ndcg_at_10(request, [1, 2, 0]) == pytest.approx((3 + 1 / np.log2(3)) / best)
    assert data.ndcg_at_10(request, [0]) == 0


def test_generated_text_is_as_long_as_the_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DL19", Path("nowhere"))
    every = data.requests(5)
    words = [len(document.split()) for each in every for document in each.documents]
    assert [len(each.documents) for each in every] == [100] * 5
    assert np.median(words) == pytest.approx(55, abs=5)
    assert every == data.requests(5)


def test_contestants_agree_and_are_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: list[tuple[str, list[str]]],
    fp32_repository: Path,
    int8_repository: Path,
) -> None:
    monkeypatch.setattr(bench, "MODELS", tmp_path)
    monkeypatch.setattr(bench, "export", lambda _, precision, __: published[precision])
    published = {
        "fp32": (fp32_repository / "cross_encoder" / "current").resolve(),
        "int8": (int8_repository / "cross_encoder" / "current").resolve(),
    }
    bench.prepare()
    every = [Request(query, texts, [0] * 11 + [3], [3]) for query, texts in sample[:2]]
    labels = {
        "packed:fp32": bench.PADDED,
        "padded:longest": "the longest",
        "padded:4096": "4096",
        "transformers:": bench.SERVED,
    }
    exact = [Contestant(name, "ladder", label, share=(1, 1)) for name, label in labels.items()]
    reference, int8 = (
        Contestant("packed:fp32", "ladder", "all"),
        Contestant("pipeline:int8", "peers", "i"),
    )
    absent = Contestant("peer:torch", "peers", "a peer", environment="not-installed")
    failures = bench.measure([reference, *exact, int8, absent], every)
    assert len(failures) == 1
    assert "not-installed" in failures[0]
    rows = [bench.row(each, every, reference) for each in (*exact, int8)]
    assert all(row["largest_logit_error"] < 1e-4 for row in rows[:-1])
    assert [row["pairs"] for row in rows] == [1] * len(exact) + [24]
    assert 0 < rows[-1]["largest_logit_error"] < 3
    assert rows[-1]["ndcg_at_10_of_fp32"] > 0
    result = {
        "hardware": bench.hardware(),
        "versions": {},
        "commit": "none",
        "data": "the sample",
        "queries": 2,
        "rows": rows,
        "left_out": failures,
    }
    results = tmp_path / "loadtest" / "results"
    (results / "replicas").mkdir(parents=True)
    (results / "result.json").write_text(json.dumps(result))
    phase = Phase("one killed", 7, {"wrong answer": 2}, 1.0, 2.0, 3.0, [0.25, 0.75])
    ways = {"nginx": [asdict(phase)]}
    of_replicas = {name: result[name] for name in ("hardware", "commit")}
    (results / "replicas" / "replicas.json").write_text(
        json.dumps({**of_replicas, "seconds": 1, "ways": ways})
    )
    marks = "".join([report.BEGIN, "old\n", report.END])
    readme, tables, operations = (
        tmp_path / name for name in ("README.md", "loadtest/RESULTS.md", "docker/README.md")
    )
    operations.parent.mkdir()
    readme.write_text(marks.format("figures", "figures"))
    (results / "memory").mkdir()
    measured = {"checkpoint": "a/large", "precision": "int8", "graph": 5e8, "fp32": 2e9}
    taken = {"export_peak": 4e9, "started": [["tritonserver", 6e8]], "most_total": 7e8}
    (results / "memory" / "large-int8.json").write_text(
        json.dumps(measured | taken | {"share_of_bound": 0.5, "hardware": result["hardware"]})
    )
    (results / "gateway").mkdir()
    cost = {"grpc_ms": 2.0, "gateway_ms": 3.5, "added_ms": 1.5, "requests_per_second": 700.4}
    (results / "gateway" / "cpu.json").write_text(
        json.dumps(cost | {"hardware": result["hardware"]})
    )
    (results / "passages").mkdir()
    more, scored = [0.1, 0.0, 0.2], {"pairs": 100, "right": 87, "right_by_fifth": [0.5] * 5}
    way = {"shortest": 0.25, "overlap": 0, "near": 0.125, "passages": 8, "read": 1.25}
    way |= {**scored, "mrr": 0.7, "more_mrr": more, "median_lost": 2.0, "more_logit": more}
    times = [
        {"way": "cut", "tokens": 100, "ms": 5.0},
        {"way": "whole", "tokens": 800, "ms": 60.0},
    ]
    long = {"chosen_on": [way], "judged_on": [way], "cost": {"default": times}}
    (results / "passages" / "cpu.json").write_text(json.dumps(long | of_replicas))
    names = ("benchmark", "gpu", "load", "memory", "own cost", "gateway", "passages")
    blocks = [marks.format(name, name) for name in names]
    tables.write_text(f"before\n{blocks[0]}between\n{''.join(blocks[1:])}after\n")
    operations.write_text(marks.format("replicas", "replicas"))
    report.main(tmp_path)
    text = tables.read_text()
    assert "old" not in readme.read_text() + text + operations.read_text()
    row = "| one killed | 7 | 2 wrong answer | 1 | 2 | 3 | 0.25 0.75 |"
    assert row in operations.read_text()
    assert "| 4096 |" in text
    assert "| 2.0 ms | 3.5 ms | 1.5 ms | 700 requests/s |" in text
    assert "| 0.25 of it, overlap 0, near 0.125, 8 at most | 87 of 100 | 0.50 0.50 " in text
    assert "| default | whole | 800 | 60 | 8.00 | 12.00 | 1.50 |" in text
    assert "Left out: " in text
    assert "GPU: not measured" in text
    assert "Not measured." in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for plot in ("overview.png", "result.png", "result-latency.png", "passages/cpu.png"):
        assert (results / plot).stat().st_size > 1000
    # Without nDCG nothing is said to be equal.
    assert "not measured" in readme.read_text()


def test_the_readme_compares_with_backends_of_equal_quality() -> None:
    def row(label: str, rate: float, ndcg: float, table: str = "peers") -> report.Row:
        spread = {"median": rate, "min": rate, "max": rate}
        known = {"label": label, "table": table, "clients": 1, "pairs": 800, "requests": 8}
        quality = {"ndcg_at_10": ndcg, "ndcg_at_10_of_fp32": 0.7}
        return {**known, **quality, "pairs_per_second": spread, "latency_ms": {"median": 900.0}}

    rows = [
        row(bench.PADDED, 5, 0.7, "ladder"),
        row(bench.SERVED, 100, 0.699, "ladder"),
        row("sentence-transformers, a", 10, 0.7),
        row("sentence-transformers, b", 40, 0.696),
        row("sentence-transformers, c", 80, 0.71),
    ]
    result = {"hardware": bench.hardware(), "queries": 8, "rows": rows}
    found = report.figures([result, {**result, "rows": rows[2:]}])
    assert "| **2.5 ×** its fastest of equal nDCG@10, b; 1.2 × its fastest, c |" in found
    assert "| **100**, 100 documents in 900 ms;" in found
    assert "| **20.0 ×** |" in found
    # The other machine had no server.
    assert len(found.splitlines()[0].split(" | ")) == 2


def test_concurrent_requests_are_answered_in_order(
    int8_server: EmbeddedServer, tmp_path: Path, sample: list[tuple[str, list[str]]]
) -> None:
    command = [sys.executable, contestant.__file__, f"triton:{int8_server.grpc_url}", ".", "4"]
    done = subprocess.run(
        command, input=json.dumps(sample) + "\n", capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout.splitlines()[1])
    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        for (query, documents), logits in zip(sample, answer["logits"], strict=True):
            alone = {each.index: each.logit for each in client.rank(query, documents)}
            assert dict(enumerate(logits)) == alone
    assert max(answer["latencies"]) <= answer["seconds"] <= sum(answer["latencies"])


def test_a_request_taken_apart(int8_repository: Path, sample: list[tuple[str, list[str]]]) -> None:
    every = [Request(query, texts, [], []) for query, texts in sample]
    # Of its own, since what other tests gave up may still be under way in theirs.
    with start(int8_repository) as server:
        parts = anatomy(server.grpc_url, int8_repository / "cross_encoder" / "current", every)
    stages = parts["stages"]
    assert all(ms > 0 for ms in stages.values())
    assert max(stages, key=stages.__getitem__) == "cross_encoder"
    assert 0.2 < parts["real_tokens"] < 1
    assert parts["limit"]["reached"] > 0.1


def test_the_share_of_what_a_gpu_allows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sample: list[tuple[str, list[str]]],
    fp32_repository: Path,
) -> None:
    monkeypatch.setattr(bench, "MODELS", tmp_path)
    (tmp_path / "fp32").symlink_to((fp32_repository / "cross_encoder" / "current").resolve())
    every = [Request(query, texts, [], []) for query, texts in sample]
    found = bench.limit_of_gpu(every, 7)
    assert found["reached"] == 7 / found["fp16_pairs_per_second"]
    for precision in ("fp32", "fp16"):
        flop = found["gflop"] * found[f"{precision}_pairs_per_second"]
        assert flop == pytest.approx(found[f"{precision}_gflop_per_second"])
    # Twelve layers, of which each multiplies a token by 12 · 384² weights.
    assert found["gflop"] == 12 * 2 * found["tokens"] * 12 * 384**2 / 1e9
    text = report._limit(found)
    assert "ONNX Runtime's own products, not of the processor's" in text
    assert "in FP32" in text
    assert "in FP16" in text


def test_growth(
    monkeypatch: pytest.MonkeyPatch,
    int8_server: EmbeddedServer,
    int8_repository: Path,
    sample: list[tuple[str, list[str]]],
) -> None:
    monkeypatch.setattr(growth, "DOCUMENTS", (1, 3))
    monkeypatch.setattr(growth, "LENGTHS", (16, 64))
    monkeypatch.setattr(growth, "CLIENTS", (4,))
    every = [Request(query, texts[:10], [], []) for query, texts in sample]
    tokenizer = int8_repository / "tokenizer" / "1" / "tokenizer.json"
    curves = growth.growth(int8_server.grpc_url, tokenizer, every)
    assert [point["documents"] for point in curves["documents"]] == [1, 3]
    assert [point["tokens"] for point in curves["lengths"]] == [160, 640, 64 + 99 * 16]
    assert curves["lengths"][-1]["places_padded_to_longest"] == 6400
    [clients] = curves["clients"]
    assert 1 <= clients["executions"] <= clients["requests"] == 5


def test_queue_delay(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    int8_repository: Path,
    sample: list[tuple[str, list[str]]],
) -> None:
    monkeypatch.setattr(growth, "DELAYS_US", (200_000,))
    repository = Path(shutil.copytree(int8_repository, tmp_path / "repository", symlinks=True))
    config = repository / "cross_encoder" / "configs" / "cpu.pbtxt"
    before = config.read_text()
    points = growth.queue_delay(repository, [Request(sample[0][0], ["a"] * 10, [], [])])
    assert [point["clients"] for point in points] == [1, 8]
    assert points[0]["median_ms"] > 200  # It was waited for.
    assert config.read_text() == before


def test_the_ensembles_own_cost(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    int8_repository: Path,
    sample: list[tuple[str, list[str]]],
) -> None:
    monkeypatch.setattr(own_cost, "SECONDS", 0.5)
    published = (int8_repository / "cross_encoder" / "current").readlink()
    every = [Request(query, texts, [], []) for query, texts in sample]
    points = own_cost.own_cost(int8_repository, every)
    shapes = [(point["documents"], point["clients"]) for point in points]
    assert shapes == [(1, 1), (1, 16), (12, 1), (12, 16)]
    for point in points:
        assert point["median_ms"] <= point["p99_ms"] <= point["largest_ms"]
        assert point["requests"] >= point["clients"]
    assert (int8_repository / "cross_encoder" / "current").readlink() == published
    (tmp_path / "own-cost").mkdir()
    machine = {"gpu": None, "cores": 2, "cpu": "a"}
    result = {"points": points, "commit": "abc", "hardware": machine}
    (tmp_path / "own-cost" / "cpu.json").write_text(json.dumps(result))
    assert report.own_cost(tmp_path).count("\n| 12 | 16 |") == 1


def test_a_gpu_under_load(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    int8_repository: Path,
    sample: list[tuple[str, list[str]]],
) -> None:
    monkeypatch.setattr(gpu, "MODELS", tmp_path)
    monkeypatch.setattr(gpu, "WARM", 0.5)
    monkeypatch.setattr(gpu, "SECONDS", 1.0)
    monkeypatch.setattr(gpu, "requests", lambda _: [Request(*each, [], []) for each in sample])
    monkeypatch.setattr(gpu, "peers", lambda *_: {"peers": {}, "left_out": ["a peer: why"]})
    folder = tmp_path / "default-int8"
    shutil.copytree(int8_repository, folder / "repository", symlinks=True)
    (folder / "checkpoint").mkdir()
    config = json.dumps(gpu.default_model.CONFIG | {"num_hidden_layers": 1})
    (folder / "checkpoint" / "config.json").write_text(config)
    # One that writes what NVIDIA's does, until it is stopped.
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 40; echo '[N/A]'; echo 60; exec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    output = tmp_path / "loadtest" / "gpu" / "cpu.json"
    options = ["--models", "default", "--documents", "1", "3", "--clients", "1", "5"]
    monkeypatch.setattr(sys, "argv", ["gpu", *options, "--output", str(output)])
    gpu.main()
    found = json.loads(output.read_text())["models"]["default"]
    assert [point["documents"] for point in found["alone"]] == [1, 3]
    assert [point["clients"] for point in found["clients"]] == [1, 5]
    for point in found["clients"]:
        assert point["gpu_percent"] == 50
        assert point["pairs_per_second"] == 12 * point["requests"]
        assert max(point["stages"], key=point["stages"].__getitem__) in ("cross_encoder", "queue")
        assert 0 < point["busiest_sender"] < 0.5
    found["clients"].append({"clients": 64, "left_out": "refused"})
    assert (tables := report.gpu(output.parents[1])).count("| 50 % |") == 4, tables
    assert "Left out: 64 clients: refused; a peer: why." not in tables
    output.write_text(json.dumps(json.loads(output.read_text()) | {"models": {"default": found}}))
    assert "Left out: 64 clients: refused; a peer: why." in report.gpu(output.parents[1])
