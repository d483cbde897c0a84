"""The stages and the adapter without a server."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import MAX_DOCUMENTS
from tritonrank_server import stages
from tritonrank_server.errors import InvalidInput, InvalidOutput
from tritonrank_server.stages.cross_encoder import CrossEncoder, Relevance, Work
from tritonrank_server.stages.sorter import rank
from tritonrank_server.stages.tokenizer import PairTokenizer


@pytest.fixture(scope="module")
def tokenizer(int8_repository: Path) -> PairTokenizer:
    return PairTokenizer(int8_repository / "tokenizer" / "1" / "tokenizer.json", MAX_DOCUMENTS)


def test_tokens_of_a_batch(tokenizer: PairTokenizer) -> None:
    requests = [(b"tea", [b"green tea", b"", b"a"]), (b"black coffee", [b"milk"])]
    one, other = tokenizer.encode([tokenizer.read(*request) for request in requests])
    cls, sep, tea, green, a = 101, 102, 5572, 2665, 1037
    rows = [[cls, tea, sep, green, tea, sep], [cls, tea, sep, sep], [cls, tea, sep, a, sep]]
    assert one.input_ids.tolist() == [*chain(*rows)]
    assert [each.input_ids.tolist() for each in one.documents()] == rows
    assert one.rows().tolist() == [rows[0][:5], [sep, *rows[1]], [*rows[2]]]
    assert one.lengths.tolist() == [6, 4, 5]
    assert one.query_lengths.tolist() == [3, 3, 3]
    assert other.query_lengths.tolist() == [4]
    assert {one.input_ids.dtype, one.lengths.dtype, one.query_lengths.dtype} == {np.dtype("i4")}


def test_only_the_document_is_cut(tokenizer: PairTokenizer) -> None:
    [tokens] = tokenizer.encode([tokenizer.read(b"tea " * 100, [b"green " * 1000, b"green"])])
    assert tokens.lengths.tolist() == [512, 104]
    assert tokens.query_lengths.tolist() == [102, 102]
    assert tokens.input_ids[511] == 102


@pytest.mark.parametrize(("words", "kept"), [(254, 254), (255, 254), (512, 254)])
def test_a_query_is_cut_beyond_its_share(tokenizer: PairTokenizer, words: int, kept: int) -> None:
    [tokens] = tokenizer.encode([tokenizer.read(b"tea " * words, [b"green " * 1000])])
    assert tokens.query_lengths.tolist() == [kept + 2]
    assert tokens.lengths.tolist() == [512]


def test_a_query_beyond_the_model_is_refused(tokenizer: PairTokenizer) -> None:
    with pytest.raises(InvalidInput, match="more tokens than the model has positions, 512"):
        tokenizer.read(b"tea " * 513, [b"green"])


def test_what_is_given_up_is_scored_no_further(
    int8_repository: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CrossEncoder(int8_repository / "cross_encoder" / "1" / "model.onnx", threads=1)
    session, executions, asked = encoder._narrow, [], []

    def run(*arguments: Any) -> Any:
        executions.append(1)
        return session.run(*arguments)

    def is_given_up() -> bool:
        asked.append(1)
        return len(asked) > 3

    monkeypatch.setattr(encoder, "_narrow", SimpleNamespace(run=run))
    pairs = [tokenizer.read(b"tea", [b"green tea"] * count) for count in (50, 2)]
    given_up, kept = tokenizer.encode(pairs)
    none, scored = encoder.score([Work(given_up, is_given_up), Work(kept)])
    assert none is None
    assert scored is not None
    assert scored.logits.shape == scored.scores.shape == (2,)
    assert len(executions) == 3 + 2


def test_bulk_yields_the_cores(
    int8_repository: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CrossEncoder(int8_repository / "cross_encoder" / "1" / "model.onnx", threads=2)
    session, niceness = encoder._narrow, []

    def run(*arguments: Any) -> Any:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return session.run(*arguments)

    monkeypatch.setattr(encoder, "_narrow", SimpleNamespace(run=run))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    [tokens] = tokenizer.encode([tokenizer.read(b"tea", [b"green tea", b"a car"])])
    [expected] = encoder.score([Work(tokens)])
    [bulk] = encoder.score([Work(tokens, bulk=True)])
    assert niceness == [own, own, 19, 19]
    assert bulk is not None
    assert expected is not None
    assert bulk.logits.tolist() == expected.logits.tolist()


def test_others_may_begin_before_the_last_document_is_done(
    int8_repository: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CrossEncoder(int8_repository / "cross_encoder" / "1" / "model.onnx", threads=1)
    session, turns = encoder._narrow, threading.Semaphore(0)

    def run(*arguments: Any) -> Any:
        turns.acquire()
        return session.run(*arguments)

    monkeypatch.setattr(encoder, "_narrow", SimpleNamespace(run=run))
    [tokens] = tokenizer.encode([tokenizer.read(b"tea", [b"green tea", b"a cup", b"a"])])
    with ThreadPoolExecutor(1) as pool:
        beginning = pool.submit(encoder.begin, [Work(tokens)])
        with pytest.raises(TimeoutError):
            beginning.result(timeout=0.2)  # Two wait for the only core.
        turns.release()
        [scoring] = beginning.result(timeout=10)
        waiting = pool.submit(scoring.result)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        turns.release(2)
        result = waiting.result(timeout=10)
    assert result is not None
    assert result.logits.shape == (3,)


def test_no_room_for_the_weights(int8_repository: Path) -> None:
    graph = int8_repository / "cross_encoder" / "1" / "model.onnx"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"free twice its size there, or name .* in TMPDIR"):
            CrossEncoder(graph)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def relevance(*logits: float) -> Relevance:
    return Relevance(np.float32(logits), 1 / (1 + np.exp(-np.float32(logits))))


def test_rank_sorts_by_logit_and_ties_by_index() -> None:
    # 20 and 30 are one score: the sigmoid of both is 1 in FP32.
    ranking = rank(relevance(20, -1, 30, 20, -1))
    assert ranking.indices.tolist() == [2, 0, 3, 1, 4]
    assert ranking.logits.tolist() == [30, 20, 20, -1, -1]
    assert ranking.scores[0] == ranking.scores[1] == 1
    assert ranking.indices.dtype == np.int32


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [1]), (2, [1, 0]), (9, [1, 0]), (None, [1, 0])]
)
def test_rank_top_k(top_k: int | None, expected: list[int]) -> None:
    assert rank(relevance(1, 2), top_k).indices.tolist() == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rank_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(InvalidOutput, match=r"DOCUMENTS\[1\]"):
        rank(relevance(1, value, 2))


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapter on a small fake of Triton's module."""

    class TritonError(Exception):
        INVALID_ARG, INTERNAL, CANCELLED = "INVALID_ARG", "INTERNAL", "CANCELLED"
        UNAVAILABLE = "UNAVAILABLE"

        def __init__(self, message: str, code: str) -> None:
            super().__init__(message)
            self.code, self.message = lambda: code, lambda: message

    class MetricFamily:
        COUNTER = "COUNTER"
        counts: ClassVar[Counter[str]] = Counter()

        def __init__(self, **_: str) -> None:
            """Of whatever name."""

        def Metric(self, labels: dict[str, str]) -> Any:
            def increment(count: int) -> None:
                self.counts[labels["reason"]] += count

            return SimpleNamespace(increment=increment)

    fake: Any = ModuleType("triton_python_backend_utils")
    fake.TritonError = TritonError
    fake.Tensor = lambda name, data: (name, data)
    fake.InferenceResponse = lambda outputs=(), error=None: SimpleNamespace(
        outputs=dict(outputs), error=error
    )
    fake.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    fake.Logger = SimpleNamespace(log_error=lambda _: None, log_verbose=lambda _: None)
    fake.MetricFamily = MetricFamily
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    from tritonrank_server.stages import triton

    yield triton
    # So that the next test imports it on its own fake.
    monkeypatch.delitem(sys.modules, triton.__name__)
    monkeypatch.delattr(stages, "triton")


def answers_of(model: Any, *requests: dict[str, Any]) -> list[Any]:
    """What a model sends for each request, of these tensors."""
    answers: list[Any] = []

    def request(tensors: dict[str, Any]) -> SimpleNamespace:
        wrapped = {
            name: SimpleNamespace(as_numpy=lambda v=value: v) for name, value in tensors.items()
        }
        sender = SimpleNamespace(send=lambda answer, flags: answers.append(answer))
        return SimpleNamespace(
            tensors=wrapped, get_response_sender=lambda: sender, request_id=lambda: "search-1"
        )

    model.execute(list(map(request, requests)))
    return answers


def column(*values: float) -> np.ndarray:
    return np.float32(values)[:, None]


def sorter(repository: Path) -> dict[str, str]:
    """Triton's arguments for it."""
    folder = str(repository / "sorter")
    return {"model_name": "sorter", "model_repository": folder, "model_version": "1"}


def test_each_request_of_a_batch_gets_its_own_answer(
    adapter: ModuleType, int8_repository: Path
) -> None:
    model = adapter.SorterModel()
    model.initialize(sorter(int8_repository))
    good = {"logits": column(1, 2), "scores": column(0.1, 0.2)}
    answers = answers_of(
        model,
        good,
        {**good, "TOP_K": np.int32([0])},
        {"logits": column(np.nan), "scores": column(np.nan)},
        {"logits": None},
        {**good, "TOP_K": np.int32([1])},
    )
    codes = [answer.error and answer.error.code() for answer in answers]
    assert codes == [None, "INVALID_ARG", "INTERNAL", "INTERNAL", None]
    model.finalize()
    counts = adapter.pb_utils.MetricFamily.counts
    assert counts == {"invalid": 1, "internal": 2}
    assert answers[0].outputs["INDICES"].tolist() == [1, 0]
    assert answers[4].outputs["INDICES"].tolist() == [1]
    assert "the server failed" in str(answers[3].error)


def test_what_fails_the_batch_fails_alone(adapter: ModuleType, int8_repository: Path) -> None:
    class Picky(adapter.SorterModel):  # type: ignore[name-defined,misc]
        def run(self, batch: Any) -> Any:
            if any(ranking["LOGITS"].max() > 9 for ranking in batch):
                raise MemoryError
            return [None if ranking["LOGITS"].max() > 7 else ranking for ranking in batch]

    good = {"logits": column(1, 2), "scores": column(0.1, 0.2)}
    poison = {"logits": column(10), "scores": column(1)}
    model = Picky()
    model.initialize(sorter(int8_repository))
    given_up = {"logits": column(8), "scores": column(1)}
    answers = answers_of(model, good, poison, good, poison, given_up)
    model.finalize()
    codes = [answer.error and answer.error.code() for answer in answers]
    assert codes == [None, "INTERNAL", None, "INTERNAL", "CANCELLED"]
    assert adapter.pb_utils.MetricFamily.counts["cancelled"] == 1
    assert answers[2].outputs["INDICES"].tolist() == [1, 0]
    assert answers[1].error is not answers[3].error
