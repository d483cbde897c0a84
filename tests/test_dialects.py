"""Properties of the dialects: of the functions alone, and of the real gateway with a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
import yaml
from conftest import GatewayProcess
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tritonrank import RankedDocument, RerankClient
from tritonrank.gateway import dialects, fields
from tritonrank.gateway.dialects import Answered, Call, Dialect
from tritonrank.gateway.fields import InvalidField
from tritonrank.protocol import Model, Ranking
from tritonrank_server.serving.serve import EmbeddedServer

MODEL = Model("a", "int8", 512, "Sigmoid", "0")
EVERY = [*dialects.PREFIXES.values(), dialects.SCORE, dialects.DEEPINFRA]
#: Every field that means something, and some that do not.
NAMES = [
    *("query", "queries", "documents", "texts", "passages", "items", "text_1", "text_2", "data_1"),
    *("data_2", "model", "top_n", "top_k", "return_documents", "return_text", "rank_fields"),
    *("raw_scores", "use_activation", "truncate", "truncation", "property", "relevant_spans"),
    *("user", "priority", "overlap_tokens", *dialects.MAX_PASSAGES, *dialects.MAX_DOCUMENT_TOKENS),
    *dialects.LENGTHS,
    *dialects.UNSUPPORTED,
]

texts = st.text(st.characters(codec="utf-8"), max_size=20)
#: Without what PyYAML takes for ends of lines.
lines = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts
values = st.recursive(
    scalars | st.sampled_from(["tea", "true", "NONE", 1, [], {}]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["text", "content", "type", "image"]) | texts, inner)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(st.sampled_from(NAMES), values, max_size=8)
#: Of JSON, which has no other numbers.
finite = bodies.map(lambda body: orjson.loads(orjson.dumps(body)))
#: A visible character makes them queries.
queries = texts.map("tea {}".format)

real = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def triton(int8_server: EmbeddedServer) -> Iterator[RerankClient]:
    with RerankClient(int8_server.grpc_url, timeout=60) as client:
        yield client


def floats(value: object) -> list[object]:
    """All that stand where a score does."""
    if isinstance(value, dict):
        named = [value[name] for name in ("score", "relevance_score", "logit") if name in value]
        return named + [each for inner in value.values() for each in floats(inner)]
    return [each for inner in value for each in floats(inner)] if isinstance(value, list) else []


def check_refusal(dialect: Dialect, error: InvalidField) -> None:
    assert str(error).startswith(error.field)
    assert re.split(r"[.[]", error.field)[0] in NAMES
    assert orjson.dumps(dialect.error(str(error), dialect.invalid, "id", error.field))


# Any body.


# Those that are drawn are seldom whole.
@example(None, "rerank", {"query": "a", "documents": ["b", {"c": 1}], "return_documents": True})
@example(None, "rerank", {"query": "a", "texts": ["b"], "return_text": "true"})
@example(None, "rerank", {"query": {"text": "a"}, "passages": [{"text": "b"}]})
@example(None, "rerank", {"query": "a", "documents": ["b"], "top_k": 1})
@example(None, "rerank", {"query": "a", "documents": ["b"], "property": ""})
@example(None, "score", {"text_1": ["a", "b"], "text_2": ["c", "d"]})
@example(dialects.VLLM, "rerank", {"query": "a", "documents": "b", "use_activation": False})
@example(dialects.INFINITY, "rerank", {"query": "a", "documents": ["b"]})
@example(None, "rerank", {"query": "a", "documents": ["b"], "relevant_spans": {"mode": "enabled"}})
@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from([None, *dialects.PREFIXES.values()]),
    st.sampled_from(["rerank", "score"]),
    finite,
)
def test_any_body_is_understood_or_refused_by_name(
    forced: Dialect | None, path: str, body: dict[str, Any]
) -> None:
    dialect = dialects.dialect(forced, path, body)
    try:
        call = dialect.read(body)
    except InvalidField as error:
        check_refusal(dialect, error)
        return
    assert len(call.queries) in (1, len(call.documents))
    assert all(isinstance(text, str) for text in (*call.queries, *call.documents))
    assert call.top_n is None or call.top_n > 0
    ranked = [
        RankedDocument(i, 0.5, 0.0, text, 1, False, (0, 1)) for i, text in enumerate(call.documents)
    ]
    answer = orjson.dumps(dialect.answer(Answered(call, Ranking(ranked, MODEL), "a", "id")))
    assert all(isinstance(each, float) for each in floats(json.loads(answer)))


@real
@given(
    st.sampled_from(["/rerank", "/v1/ranking", "/score", "/inference/a", "/tei", "/vllm/rerank"]),
    finite,
)
def test_the_gateway_answers_any_body(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(path, content=orjson.dumps(body))
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code != 200:
        assert answer.json()["message"]


@real
@given(st.binary(max_size=100))
def test_the_gateway_answers_any_bytes(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/rerank", content=content)
    assert answer.status_code in (400, 422)
    assert answer.json()["message"]


@settings(deadline=None)
@given(finite, st.sampled_from([None, *dialects.PREFIXES.values()]))
def test_null_is_the_same_as_nothing(body: dict[str, Any], forced: Dialect | None) -> None:
    """In what a body asks for; that a field is there may still tell the dialect."""

    def asked(body: dict[str, Any]) -> Call | str:
        try:
            return dialect.read(body)
        except InvalidField as error:
            return str(error)

    dialect = dialects.dialect(forced, "rerank", body)
    nulls = {name: None for name in NAMES if name not in body}
    assert asked({**nulls, **body}) == asked(body)
    other = dialects.dialect(forced, "rerank", {**body, **nulls} | {"top_k": 1})
    telling = {name: None for name in nulls if name not in dialects.TELLING}
    assert dialects.dialect(forced, "rerank", body | telling) is dialect
    assert other in EVERY


# Texts.


@given(texts, st.dictionaries(texts, values.filter(lambda value: value == value), max_size=4))
def test_text_is_found_wherever_it_is(text: str, others: dict[str, Any]) -> None:
    assert fields.text(text, "a") == text
    assert fields.text({**others, "text": text}, "a") == text
    assert fields.text({"content": text}, "a") == text
    assert fields.text({"content": [{"type": "text", "text": text}] * 2}, "a") == f"{text}\n{text}"


@settings(deadline=None)
@given(st.dictionaries(lines, lines | st.lists(lines, max_size=3), min_size=1, max_size=4))
def test_other_objects_are_read_as_yaml(value: dict[str, Any]) -> None:
    if {"text", "content", "image"} & value.keys():
        return
    assert yaml.safe_load(fields.text(value, "a")) == value
    name = next(iter(value))
    absent = "".join(value) + "."
    assert yaml.safe_load(fields.text(value, "a", [name, absent])) == {name: value[name]}


@given(
    st.lists(st.sampled_from(["v1", "v2", *dialects.PREFIXES, "rerank", "score", ""]), max_size=5)
)
def test_versions_of_a_path_mean_nothing(parts: list[str]) -> None:
    forced, left = dialects.resource("/" + "/".join(parts))
    assert forced is (dialects.PREFIXES.get(next(filter(None, parts), "")))
    assert not left.startswith(("v1/", "v2/"))


# Rankings.

#: A path, the fields of its documents and of how many are wanted; where its answer has the
#: documents, and their scores.
SPOKEN = {
    "Cohere v1": ("/v1/rerank", "documents", "top_n", "results", "relevance_score"),
    "Cohere v2": ("/v2/rerank", "documents", "top_n", "results", "relevance_score"),
    "Jina": ("/jina/v1/rerank", "documents", "top_n", "results", "relevance_score"),
    "infinity": ("/infinity/rerank", "documents", "top_n", "results", "relevance_score"),
    "vLLM": ("/vllm/v1/rerank", "documents", "top_n", "results", "relevance_score"),
    "Voyage": ("/v1/rerank", "documents", "top_k", "data", "relevance_score"),
    "TEI": ("/rerank", "texts", "top_n", None, "score"),
    "NIM": ("/v1/ranking", "passages", "top_n", "rankings", "logit"),
}


@pytest.mark.parametrize("name", SPOKEN)
@settings(real, max_examples=15)
@given(query=queries, several=st.lists(texts, min_size=1, max_size=8), top=st.integers(0, 10))
def test_every_dialect_ranks_as_the_client_does(
    client: httpx.Client, triton: RerankClient, name: str, query: str, several: list[str], top: int
) -> None:
    path, documents, top_n, listed, score = SPOKEN[name]
    answer = client.post(path, json={"query": query, documents: several, top_n: top})
    assert answer.status_code == 200, answer.text
    found = answer.json()[listed] if listed else answer.json()
    expected = triton.rank(query, several)[: top or None]
    assert [each["index"] for each in found] == [each.index for each in expected]
    exact = [each.logit if score == "logit" else each.score for each in expected]
    assert [each[score] for each in found] == exact
    assert all(isinstance(each[score], float) and math.isfinite(each[score]) for each in found)


@settings(real, max_examples=15)
@given(query=queries, documents=st.lists(texts, min_size=1, max_size=8))
def test_scores_stand_in_the_order_of_the_documents(
    client: httpx.Client, triton: RerankClient, query: str, documents: list[str]
) -> None:
    ranked = sorted(triton.rank(query, documents), key=lambda each: each.index)
    expected = [each.score for each in ranked]
    pairs = {"text_1": query, "text_2": documents}
    data = client.post("/score", json=pairs).json()["data"]
    assert [each["score"] for each in data] == expected
    body = {"query": query, "documents": documents, "property": ""}
    scores = client.post("/rerank", json=body).json()["scores"]
    assert scores == [{"document": each.document, "score": each.score} for each in ranked]
    body = {"queries": [query], "documents": documents}
    assert client.post("/inference/a", json=body).json()["scores"] == expected


# Long documents.

FILLER = "The 🚂 leaves the station at noon, and the platform is empty again. "
ANSWER = "Green tea is what people drink with a meal. "
#: What answers stands where one passage does not reach; beside it texts of other sizes.
LONG = FILLER * 60 + ANSWER + FILLER * 20
SIZES = [LONG, "a red car", "", FILLER * 4, "물 한 잔 🍵 " * 400, ANSWER]
DRINK = "something to drink"


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize(
    "asked",
    [
        {"max_chunks_per_doc": 1024, "overlap_tokens": 80},
        {"max_passages": 3},
        {"max_chunks_per_doc": None, "max_passages": 2, "max_tokens_per_doc": 600},
        {"max_passages": 0, "max_doc_length": 5},
        {"max_tokens_per_doc": 0, "max_doc_length": 100, "max_passages": 1},
    ],
    ids=json.dumps,
)
def test_every_dialect_reads_as_much_as_the_client_does(
    client: httpx.Client, triton: RerankClient, name: str, asked: dict[str, Any]
) -> None:
    path, documents, top_n, listed, score = SPOKEN[name]
    answer = client.post(path, json={"query": DRINK, documents: SIZES, top_n: None, **asked})
    assert answer.status_code == 200, answer.text
    found = answer.json()[listed] if listed else answer.json()
    most = asked.get("max_chunks_per_doc") or asked.get("max_passages") or None
    tokens = asked.get("max_tokens_per_doc") or asked.get("max_doc_length")
    expected = triton.rank(DRINK, SIZES, max_passages=most, max_document_tokens=tokens)
    exact = [(each.index, each.logit if score == "logit" else each.score) for each in expected]
    assert [(each["index"], each[score]) for each in found] == exact
    assert [each.logit for each in expected] != [each.logit for each in triton.rank(DRINK, SIZES)]


def test_pairs_are_read_in_passages(client: httpx.Client, triton: RerankClient) -> None:
    queries = [DRINK, "a train"] * 3
    body = {"text_1": queries, "text_2": SIZES, "max_passages": 8}
    data = client.post("/score", json=body).json()["data"]
    ranked = [triton.rank(*pair, max_passages=8)[0] for pair in zip(queries, ([s] for s in SIZES))]
    assert [each["score"] for each in data] == [each.score for each in ranked]


def test_the_passage_and_the_spans_are_told(client: httpx.Client, triton: RerankClient) -> None:
    body = {"query": DRINK, "documents": SIZES, "max_passages": 100}
    expected = triton.rank(DRINK, SIZES, max_passages=100)
    for path in ("/v2/rerank", "/jina/v1/rerank", "/vllm/rerank", "/infinity/rerank"):
        results = client.post(path, json=body).json()["results"]
        told = {each["index"]: each["passage"] for each in results if "passage" in each}
        assert told == {
            each.index: dict(zip(("start", "end"), each.passage))
            for each in expected
            if each.passage and len(each.document) > 1000
        }
        assert ANSWER.strip() in LONG[told[0]["start"] : told[0]["end"]]
        assert not any("relevant_spans" in each for each in results)
        results = client.post(path, json={**body, "max_passages": 1}).json()["results"]
        told = {each["index"]: each["passage"] for each in results if "passage" in each}
        assert all(passage["truncated"] is True for passage in told.values())
        assert told[0]["start"] == 0
    for spans, threshold in (
        ({"mode": "enabled"}, 0.1),
        ({"mode": "enabled", "threshold": 0, "max_spans": 3}, 0),
        ({"mode": "enabled", "threshold": 1, "max_spans": None}, 1),
    ):
        # Of logits no threshold is from 0 to 1: a span's score is.
        for raw in (False, True):
            asked = {**body, "relevant_spans": spans, "raw_scores": raw}
            results = client.post("/v2/rerank", json=asked).json()["results"]
            assert [each["relevant_spans"] for each in results] == [
                [{"start": each.passage[0], "end": each.passage[1], "score": each.score}]
                if each.passage and each.score >= threshold
                else []
                for each in expected
            ]
    disabled = client.post("/v2/rerank", json={**body, "relevant_spans": {"mode": "disabled"}})
    assert not any("relevant_spans" in each for each in disabled.json()["results"])


@pytest.mark.parametrize("forbids", [{"truncation": False}, {"truncate": "NONE"}])
def test_what_is_left_unread_is_refused_where_it_may_not_be(
    client: httpx.Client, forbids: dict[str, Any]
) -> None:
    body = {"query": DRINK, "documents": ["a red car", LONG], **forbids}
    for asked, status in (
        ({}, 422),
        ({"max_chunks_per_doc": 2}, 422),
        ({"max_chunks_per_doc": 8}, 200),
        ({"max_chunks_per_doc": 8, "max_tokens_per_doc": 100}, 422),
    ):
        answer = client.post("/rerank", json={**body, **asked})
        assert answer.status_code == status, answer.text
        assert status == 200 or "forbids to cut, and of document 1" in answer.json()["message"]


def test_search_units_are_coheres(client: httpx.Client, triton: RerankClient) -> None:
    def units(documents: list[str], **asked: int) -> int:
        answer = client.post("/v2/rerank", json={"query": "a", "documents": documents, **asked})
        return answer.json()["meta"]["billed_units"]["search_units"]

    assert units(["tea"] * 100) == 1
    assert units(["tea"] * 101) == 2
    [read] = triton.rank("a", [LONG], max_passages=100)
    assert read.tokens
    chunks = -(-read.tokens // 500)
    assert units([LONG] + ["tea"] * (100 - chunks), max_passages=100) == 1
    assert units([LONG] + ["tea"] * (101 - chunks), max_passages=100) == 2
