"""The cache of pairs: the same rankings to the bit, fewer pairs sent, and none of an old model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import start
from tritonrank import AsyncRerankClient, InvalidRequestError, RankedDocument, RerankClient
from tritonrank.cache import FRESH, PairCache
from tritonrank.protocol import Model, Options, Ranking
from tritonrank_server.serving.serve import EmbeddedServer, Settings

from loadtest import sweep

DOCUMENTS = ["a red car", "green tea", "차 한 잔", "", "green tea"]


def scored(server: EmbeddedServer) -> float:
    return sweep.metrics(server.metrics_url)["tritonrank_documents_total"]


def test_only_what_is_missing_is_sent(int8_server: EmbeddedServer) -> None:
    with RerankClient(int8_server.grpc_url, cache=1000) as cached:
        plain = RerankClient(int8_server.grpc_url)
        for documents, new in ((DOCUMENTS, 5), (DOCUMENTS, 0), ([*DOCUMENTS[::-1], "water"], 1)):
            expected = plain.rank("tea", documents, 4)
            before = scored(int8_server)
            ranking = cached.rank("tea", documents, 4)
            assert ranking == expected
            assert ranking.model == expected.model
            assert scored(int8_server) - before == new
        assert cached.cache
        assert (cached.cache.hits, cached.cache.misses) == (10, 6)
        assert cached.rank("te", ["agreen tea"]) == plain.rank("te", ["agreen tea"])
        assert cached.rank("tea", ["green tea"]) == plain.rank("tea", ["green tea"])
        plain.close()


def test_what_was_read_otherwise_is_another_pair(int8_server: EmbeddedServer) -> None:
    long = "The sun is far away. " * 300 + "Green tea is drunk hot."
    with RerankClient(int8_server.grpc_url, cache=1000) as cached:
        plain = RerankClient(int8_server.grpc_url)
        extents: list[dict[str, int | None]]
        extents = [{}, {"max_passages": 9}, {"max_passages": 2}, {"max_document_tokens": 5}]
        for extent in 2 * extents:
            expected = plain.rank("tea", [long, "tea"], None, **extent)  # type: ignore[arg-type]
            ranking = cached.rank("tea", [long, "tea"], None, **extent)  # type: ignore[arg-type]
            assert ranking == expected
        assert cached.cache
        assert (cached.cache.hits, cached.cache.misses) == (8, 8)
        with pytest.raises(InvalidRequestError, match="MAX_PASSAGES is 0"):
            cached.rank("tea", ["tea"], max_passages=0)
        plain.close()


def test_the_asynchronous_client(int8_server: EmbeddedServer) -> None:
    async def twice() -> None:
        async with AsyncRerankClient(int8_server.grpc_url, cache=1000) as client:
            first = await client.rank("tea", DOCUMENTS)
            assert await client.rank("tea", DOCUMENTS) == first
            assert client.cache
            assert client.cache.hits == len(DOCUMENTS)

    asyncio.run(twice())


def test_an_update_of_the_model_is_seen(
    int8_repository: Path, fp32_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(int8_repository) as server:
        settings = server.settings
        client = RerankClient(server.grpc_url, timeout=30, cache=1000)
        old = client.rank("tea", DOCUMENTS)
    with (
        EmbeddedServer(
            Settings(fp32_repository, settings.host, settings.grpc_port, 0, 0, log=settings.log)
        ) as server,
        RerankClient(server.grpc_url) as plain,
    ):
        # The address is one that gRPC has seen without a server, which all channels share.
        while not plain.is_ready(1):
            time.sleep(0.1)
        new = plain.rank("tea", DOCUMENTS)
        assert [each.logit for each in new] != [each.logit for each in old]
        monkeypatch.setattr("tritonrank.cache.FRESH", 0.0)
        assert client.rank("tea", DOCUMENTS) == new
        assert client.rank("tea", [*DOCUMENTS, "water"]) == plain.rank("tea", [*DOCUMENTS, "water"])
        client.close()


def test_scores_of_two_models_are_never_mixed(
    int8_server: EmbeddedServer, fp32_server: EmbeddedServer
) -> None:
    urls = [int8_server.grpc_url, fp32_server.grpc_url]
    plain = [RerankClient(url) for url in urls]
    with RerankClient(urls, cache=1000) as cached:
        for end in (2, 5, 3, 5, 4, 5, 1, 5):
            either = [client.rank("tea", DOCUMENTS[:end]) for client in plain]
            assert cached.rank("tea", DOCUMENTS[:end]) in either
    for client in plain:
        client.close()


MODEL = Model("m", "fp32", 512, "Sigmoid", "1")


def answer(documents: list[str], model: Model | None = MODEL) -> Ranking:
    ranked = [RankedDocument(i, 0.5, float(-i), text) for i, text in enumerate(documents)]
    return Ranking(ranked, model)


def asked(cache: PairCache, documents: list[str], model: Model | None = MODEL) -> list[list[str]]:
    """What it asks for, answered by the model."""
    steps, every = cache.rank("q", documents, None, Options()), []
    try:
        wanted = next(steps)
        while True:
            every.append([*wanted])
            wanted = steps.send(answer([*wanted], model))
    except StopIteration:
        return every


def test_it_is_bounded_and_forgets_what_is_used_least() -> None:
    cache = PairCache(2)
    assert asked(cache, ["a", "b"]) == [["a", "b"]]
    assert asked(cache, ["a"]) == []
    assert asked(cache, ["c"]) == [["c"]]
    assert asked(cache, ["a", "c"]) == []
    assert asked(cache, ["b"]) == [["b"]]


def test_without_a_model_nothing_is_kept() -> None:
    cache = PairCache(9)
    assert asked(cache, ["a"], None) == [["a"]]
    assert asked(cache, ["a"], None) == [["a"]]


def test_another_model_is_asked_for_all() -> None:
    cache = PairCache(9)
    assert asked(cache, ["a", "b"]) == [["a", "b"]]
    other = replace(MODEL, revision="2")
    assert asked(cache, ["a", "b", "c"], other) == [["c"], ["a", "b", "c"]]
    cache._seen -= 2 * FRESH
    assert asked(cache, ["aa", "b"], replace(MODEL, revision="3")) == [["aa"], ["aa", "b"]]
    cache._seen -= 2 * FRESH
    assert asked(cache, ["aa", "b"], replace(MODEL, revision="3")) == [["b"]]


@pytest.mark.parametrize(
    ("pairs", "error"), [(-1, ValueError), (True, TypeError), ("9", TypeError)]
)
def test_sizes_that_cannot_be_meant(pairs: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="cache"):
        RerankClient(cache=pairs)  # type: ignore[arg-type]
