"""nDCG@10 on TREC 2019 Deep Learning, BM25's top 100 reranked; skipped where the data is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import pipeline
from tritonrank import RerankClient
from tritonrank_server.serving.serve import EmbeddedServer

from loadtest.data import DL19, ndcg_at_10, requests

pytestmark = pytest.mark.skipif(not DL19.exists(), reason=f"no evaluation data at {DL19}")


#: Of 100, INT8's best are rescored in FP32: nDCG@10 is then that of all, and five times as soon.
RESCORED = 20


def mean_ndcg(orders: Sequence[Sequence[int]]) -> float:
    return float(np.mean([ndcg_at_10(*each) for each in zip(requests(43), orders, strict=True)]))


@pytest.fixture(scope="module")
def int8_orders(int8_server: EmbeddedServer) -> list[list[int]]:
    """The ranking of every query, through the server."""
    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        rankings = [client.rank(each.query, each.documents) for each in requests(43)]
    return [[each.index for each in ranking] for ranking in rankings]


def test_the_measure_itself_on_bm25() -> None:
    orders = [range(len(each.documents)) for each in requests(43)]
    assert mean_ndcg(orders) == pytest.approx(0.5058, abs=1e-4)


def test_int8_through_the_server(int8_orders: list[list[int]]) -> None:
    assert mean_ndcg(int8_orders) == pytest.approx(0.7216, abs=0.005)


def test_fp32(fp32_repository: Path, int8_orders: list[list[int]]) -> None:
    oracle = pipeline(fp32_repository)
    orders = []
    for each, order in zip(requests(43), int8_orders):
        best = sorted(order[:RESCORED])  # In BM25's order, so that INT8's is no help.
        ranking = oracle.rank(each.query, [each.documents[index] for index in best])
        orders.append([best[position] for position in ranking.indices])
    assert mean_ndcg(orders) == pytest.approx(0.7216, abs=0.003)
