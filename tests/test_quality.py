"""nDCG@10 on TREC 2019 Deep Learning, BM25's top 100 reranked; skipped where the data is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import pipeline
from tritonrank import RerankClient
from tritonrank_server.serve import EmbeddedServer

from loadtest.data import DL19, ndcg_at_10, requests

pytestmark = pytest.mark.skipif(not DL19.exists(), reason=f"no evaluation data at {DL19}")


def mean_ndcg(order: Callable[[str, list[str]], Sequence[int]]) -> float:
    judged = requests(43)
    assert len(judged) == 43
    return float(np.mean([ndcg_at_10(each, order(each.query, each.documents)) for each in judged]))


def test_the_measure_itself_on_bm25() -> None:
    assert mean_ndcg(lambda _, documents: range(len(documents))) == pytest.approx(0.5058, abs=1e-4)


def test_fp32(fp32_repository: Path) -> None:
    oracle = pipeline(fp32_repository)
    value = mean_ndcg(lambda query, texts: oracle.rank(query, texts, 10).indices.tolist())
    assert value == pytest.approx(0.7216, abs=0.003)


def test_int8_through_the_server(int8_server: EmbeddedServer) -> None:
    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        value = mean_ndcg(
            lambda query, texts: [each.index for each in client.rank(query, texts, 10)]
        )
    assert value == pytest.approx(0.7216, abs=0.005)
