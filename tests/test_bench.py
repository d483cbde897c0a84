"""The benchmark on a few pairs: its contestants agree, and what it writes can be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loadtest import bench, data, report
from loadtest.bench import Contestant
from loadtest.data import Request


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
    names = ["packed", "padded:longest", "padded:512", "padded:4096", "transformers:"]
    exact = [Contestant(name, "ladder", name, share=(1, 2)) for name in names]
    reference, int8 = (
        Contestant("packed", "ladder", "all"),
        Contestant("pipeline:int8", "peers", "i"),
    )
    absent = Contestant("peer:torch", "peers", "a peer", environment="not-installed")
    failures = bench.measure([reference, *exact, int8, absent], every)
    assert len(failures) == 1
    assert "not-installed" in failures[0]
    rows = [bench.row(each, every, reference) for each in (*exact, int8)]
    assert all(row["largest_logit_error"] < 1e-4 for row in rows[:-1])
    assert [row["pairs"] for row in rows] == [2] * len(exact) + [24]
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
    (tmp_path / "result.json").write_text(json.dumps(result))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "result.json")])
    report.main()
    text = readme.read_text()
    assert "old" not in text
    assert "| padded:4096 |" in text
    assert "Left out: " in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (tmp_path / "result.png").stat().st_size > 1000
