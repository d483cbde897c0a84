"""nDCG@10 on TREC 2019 Deep Learning, BM25's top 100 reranked; skipped where the data is not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import pipeline
from tritonrank import RerankClient
from tritonrank_server.serve import EmbeddedServer

DATA = Path(__file__).parents[2] / "shared" / "data" / "trec-dl19"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"no evaluation data at {DATA}")

Order = Callable[[str, list[str]], Sequence[int]]


def ndcg_at_10(order: Order) -> float:
    """Mean nDCG@10 with linear gain over the judged queries."""
    judgements: dict[str, dict[str, int]] = defaultdict(dict)
    for line in (DATA / "qrels.dl19-passage.txt").read_text().splitlines():
        query, _, document, grade = line.split()
        judgements[query][document] = int(grade)
    discount = 1 / np.log2(np.arange(2, 12))
    values = []
    for request in json.loads((DATA / "retrieve_results_dl19.json").read_text()):
        hits = request["hits"]
        grades = judgements[str(hits[0]["qid"])]
        ranked = order(request["query"], [hit["content"] for hit in hits])[:10]
        gains = np.array([grades.get(hits[i]["docid"], 0) for i in ranked])
        ideal = np.sort(list(grades.values()))[::-1][:10]
        values.append((gains * discount).sum() / (ideal * discount[: len(ideal)]).sum())
    return float(np.mean(values))


def test_the_measure_itself_on_bm25() -> None:
    assert ndcg_at_10(lambda _, documents: range(len(documents))) == pytest.approx(0.5058, abs=1e-4)


def test_fp32(fp32_repository: Path) -> None:
    oracle = pipeline(fp32_repository)
    value = ndcg_at_10(lambda query, texts: oracle.rank(query, texts, 10).indices.tolist())
    assert value == pytest.approx(0.7216, abs=0.003)


def test_int8_through_the_server(int8_server: EmbeddedServer) -> None:
    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        value = ndcg_at_10(
            lambda query, texts: [each.index for each in client.rank(query, texts, 10)]
        )
    assert value == pytest.approx(0.7216, abs=0.005)
