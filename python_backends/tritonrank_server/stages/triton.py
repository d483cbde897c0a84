"""The adapter: the only file that speaks to Triton's Python backend.

A model loads in ``initialize``; its ``execute`` decodes each request, runs the stage once over all
of them, encodes the results and sends them. A request that fails is answered with its own error,
and the rest of the batch goes on. No stage asks whether a request was cancelled: to ask is to send
the server a message, and Triton tells a cancellation to the steps that it begins later alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils

from ..errors import InvalidInput, InvalidOutput, Overloaded
from . import card, numpy2
from .admission import UNBOUNDED, Float64, Ledger, Size
from .cross_encoder import CrossEncoder, Relevance, Scoring, Work, is_lone
from .passages import PASSAGE
from .shm import stages_prefix
from .sorter import rank
from .tokenizer import Extent, Pairs, PairTokenizer, Tokens

# Stubs of the embedded server may be older than this NumPy.
if numpy2.SWITCH in os.environ:
    numpy2.mend()

#: Seconds that a thread may keep the interpreter. With Python's own 5 ms, a core waited as long for
#: its next document while another thread took a batch, or answered one.
SWITCH_INTERVAL = 2e-4

Decoded = TypeVar("Decoded")
Result = TypeVar("Result")
_Sorted = dict[str, np.ndarray[Any, Any]]


class _Stage(ABC, Generic[Decoded, Result]):
    """One stage of the ensemble as a Python-backend model."""

    def initialize(self, args: dict[str, str]) -> None:
        # Triton counts a request that is answered by an error of its own among the successes.
        self._failures = {
            code: _Counter("failures", "Requests failed", stage=args["model_name"], reason=reason)
            for code, reason in (
                (pb_utils.TritonError.INVALID_ARG, "invalid"),
                (pb_utils.TritonError.UNAVAILABLE, "refused"),
                (pb_utils.TritonError.CANCELLED, "cancelled"),
                (pb_utils.TritonError.INTERNAL, "internal"),
            )
        }
        self.load(args)

    @abstractmethod
    def load(self, args: dict[str, str]) -> None: ...

    @abstractmethod
    def decode(self, request: Any) -> Decoded: ...

    @abstractmethod
    def run(self, batch: Sequence[Decoded]) -> Sequence[Result | None]:
        """One result a request, or None for one that was given up meanwhile."""

    @abstractmethod
    def encode(self, result: Result) -> dict[str, np.ndarray[Any, Any]]: ...

    def count(self, result: Result) -> None:
        """Adds a result to the stage's counters."""

    def execute(self, requests: Sequence[Any]) -> None:
        self._answer(requests, self._results(requests))

    def _results(self, requests: Sequence[Any]) -> list[Any]:
        """A result or an error, one a request; None for one that was given up."""
        decoded = [_attempt(self.decode, request) for request in requests]
        good = [value for value in decoded if not _is_error(value)]
        results = iter(self._run(good) if good else [])
        return [value if _is_error(value) else next(results) for value in decoded]

    def _run(self, batch: Sequence[Decoded]) -> Sequence[Any]:
        """Results or errors, one a request; if the batch fails, each request is run alone."""
        results = _attempt(self.run, batch)
        if not _is_error(results):
            return results  # type: ignore[no-any-return]
        if len(batch) == 1:
            return [results]
        # Also an error of its own for each: Triton crashes on one that stands in two responses.
        return [_attempt(lambda one: self.run([one])[0], each) for each in batch]

    def _answer(self, requests: Sequence[Any], results: Iterable[Any]) -> None:
        """Sends each request its result, and counts only then.

        To count is to send the server a message and to wait until it is read, which takes as long
        as all else that is done for a small request.
        """
        answered = []
        for request, result in zip(requests, results):
            if result is None:  # The client gave it up; whatever is spent on it is lost.
                code = pb_utils.TritonError.CANCELLED
                result = pb_utils.TritonError("given up by the client", code)
            sender = request.get_response_sender()
            send = partial(sender.send, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            _attempt(send, self._response(request, result))
            answered.append(result)
        for result in answered:
            _attempt(self._count, result)

    def _count(self, result: Any) -> None:
        if _is_error(result):
            self._failures[result.code()].add(1)
        else:
            self.count(result)

    def _response(self, request: Any, result: Any) -> Any:
        if _is_error(result):
            internal = result.code() == pb_utils.TritonError.INTERNAL
            log = pb_utils.Logger.log_error if internal else pb_utils.Logger.log_verbose
            log(f"[request id: {request.request_id()}] {result.message()}")
            return pb_utils.InferenceResponse(error=result)
        tensor = numpy2.tensor if numpy2.SWITCH in os.environ else pb_utils.Tensor
        outputs = [tensor(name, data) for name, data in self.encode(result).items()]
        return pb_utils.InferenceResponse(outputs)


def _is_error(result: Any) -> bool:
    return isinstance(result, pb_utils.TritonError)


def _attempt(function: Any, argument: Any) -> Any:
    """What the function returns, or the ``TritonError`` that tells the client why it did not."""
    try:
        return function(argument)
    except InvalidInput as error:
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    except Overloaded as error:
        return pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
    except InvalidOutput as error:
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
    except Exception as error:  # The client gets one line, the log what happened.
        pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
        return pb_utils.TritonError(
            "the server failed on this request; its log says why", pb_utils.TritonError.INTERNAL
        )


def _version_folder(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"]


def _array(request: Any, name: str) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return array


def _optional(request: Any, *names: str) -> dict[str, np.ndarray[Any, Any]]:
    """Those of the inputs that the request has."""
    found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in names}
    return {name: each.as_numpy() for name, each in found.items() if each is not None}


def _integer(inputs: dict[str, np.ndarray[Any, Any]], name: str) -> int | None:
    return int(inputs[name].item()) if name in inputs else None


def _timeout(request: Any) -> float:
    """Seconds that the client gave it, counted from its entry into this stage's queue."""
    return request.timeout() / 1e6 or math.inf


def _is_bulk(request: Any) -> bool:
    return json.loads(request.parameters() or "{}").get("bulk") is True


def _ledger(most: Size = UNBOUNDED) -> Ledger:
    """That of this server."""
    return Ledger(Path("/dev/shm", f"{stages_prefix(os.getppid())}ledger"), most)


class _Counter:
    """A counter among Triton's metrics, ``tritonrank_NAME_total``, shared by all instances."""

    def __init__(self, name: str, description: str, **labels: str) -> None:
        self._family = pb_utils.MetricFamily(
            name=f"tritonrank_{name}_total",
            description=description,
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._metric = self._family.Metric(labels=labels)
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:  # Triton's own counts by one thread at a time, else it crashes.
            self._metric.increment(count)


class TokenizerModel(_Stage[tuple[Pairs, Float64], tuple[Tokens, Float64]]):
    """QUERY BYTES [1, 1], DOCUMENTS BYTES [1, N], MAX_PASSAGES and MAX_DOCUMENT_TOKENS INT32
    [1, 1]? → the graph's inputs, batch size M; which passage each is; the request's ticket.
    """

    def load(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        most = {name: int(value["string_value"]) for name, value in parameters.items()}
        self._tokenizer = PairTokenizer.of(_version_folder(args), most["max_passages"])
        waiting = Size(math.inf, most["max_waiting_documents"], most["max_waiting_bytes"])
        self._ledger = _ledger(waiting)
        self._documents = _Counter("documents", "Documents of valid requests")
        self._passages = _Counter("passages", "Passages that they were read in")
        self._truncated = _Counter("truncated_documents", "Documents cut to fit the model")
        self._tokens = _Counter("tokens", "Tokens of query-document pairs, without padding")

    def finalize(self) -> None:
        self._ledger.close()

    def decode(self, request: Any) -> tuple[Pairs, Float64]:
        query = _array(request, "QUERY").item()
        documents = _array(request, "DOCUMENTS").ravel().tolist()
        most = _optional(request, "MAX_PASSAGES", "MAX_DOCUMENT_TOKENS")
        passages, tokens = _integer(most, "MAX_PASSAGES"), _integer(most, "MAX_DOCUMENT_TOKENS")
        extent = Extent(1 if passages is None else passages, tokens)
        pairs = self._tokenizer.read(query, documents, extent)
        size = Size.of(query, documents, self._tokenizer.max_length, pairs.passages)
        return pairs, self._ledger.take(size, _timeout(request), _is_bulk(request))

    def run(self, batch: Sequence[tuple[Pairs, Float64]]) -> Sequence[tuple[Tokens, Float64]]:
        results = self._tokenizer.encode([pairs for pairs, _ in batch])
        return [(tokens, ticket) for tokens, (_, ticket) in zip(results, batch)]

    def count(self, result: tuple[Tokens, Float64]) -> None:
        tokens, _ = result
        documents, firsts = np.unique(tokens.passages["document"], return_index=True)
        self._documents.add(len(documents))
        self._passages.add(len(tokens.lengths))
        self._truncated.add(int(tokens.passages["truncated"][firsts].sum()))
        self._tokens.add(int(tokens.lengths.sum()))

    def encode(self, result: tuple[Tokens, Float64]) -> dict[str, np.ndarray[Any, Any]]:
        tokens, ticket = result
        return {
            "input_ids": tokens.rows(),
            "lengths": tokens.lengths[:, None],
            "query_lengths": tokens.query_lengths[:, None],
            "passages": tokens.passages.view(np.int32).reshape(len(tokens.passages), -1),
            "ticket": ticket[None],
        }


class CrossEncoderModel(_Stage[Work, Any]):
    """The graph's inputs, batch size N → logits FP32 [N, 1], scores FP32 [N, 1].

    Triton hands over a batch when ``execute`` has returned from the one before. It does so while
    the last documents wait, one a core, and another thread awaits them and answers: so the cores
    stay busy, and one process is enough.
    """

    def load(self, args: dict[str, str]) -> None:
        self._cross_encoder = CrossEncoder(_version_folder(args) / "model.onnx")
        self._answers = ThreadPoolExecutor()
        self._warm = False
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._computed = _Counter("computed_tokens", "Places the graph ran on, padding included")

    def decode(self, request: Any) -> Work:
        lengths, query_lengths = _array(request, "lengths"), _array(request, "query_lengths")
        filled = _array(request, "input_ids").ravel()
        real = filled >= 0
        ids = filled[: real.sum()]
        if lengths.min() < 1 or lengths.sum() != len(ids) or not real[: len(ids)].all():
            raise InvalidInput("lengths are not those of input_ids: send the request to reranker")
        tokens = Tokens(ids, lengths[:, 0], query_lengths[:, 0])
        # Counted from here, it bounds what is spent on a client that is gone.
        deadline = time.monotonic() + _timeout(request)
        return Work(tokens, lambda: time.monotonic() > deadline, _is_bulk(request))

    def execute(self, requests: Sequence[Any]) -> None:
        scorings = self._results(requests)
        results = map(self._result, scorings)  # As each is done.
        # The first is the warm-up. Answered by another thread, it may have been what ended two of
        # some 1,500 servers at their start (boost::interprocess::lock_exception).
        first, self._warm = not self._warm, True
        if first or is_lone([each.work for each in scorings if isinstance(each, Scoring)]):
            self._answer(requests, results)
        else:
            self._answers.submit(self._answer, requests, results)

    def finalize(self) -> None:
        self._answers.shutdown()

    def run(self, batch: Sequence[Work]) -> Sequence[Scoring]:
        return self._cross_encoder.begin(batch)

    def _result(self, scoring: Any) -> Any:
        return scoring if _is_error(scoring) else _attempt(self._relevance, scoring)

    def _relevance(self, scoring: Scoring) -> tuple[Relevance, Tokens] | None:
        relevance = scoring.result()
        return (relevance, scoring.work.tokens) if relevance else None

    def encode(self, result: tuple[Relevance, Tokens]) -> dict[str, np.ndarray[Any, Any]]:
        relevance, _ = result
        return {"logits": relevance.logits[:, None], "scores": relevance.scores[:, None]}

    def count(self, result: tuple[Relevance, Tokens]) -> None:
        _, tokens = result
        # One document an execution: no place of it is padding.
        self._computed.add(int(tokens.lengths.sum()))


class SorterModel(_Stage[_Sorted, _Sorted]):
    """logits and scores FP32 [M, 1], passages INT32 [M, 5]?, ticket FP64 [1, 6]?, TOP_K INT32 [1]?
    → the outputs [K], and MODEL UINT8 [B].
    """

    def load(self, args: dict[str, str]) -> None:
        self._ledger = _ledger()
        self._model = np.array(list(card.identity(_version_folder(args))), np.uint8)

    def finalize(self) -> None:
        self._ledger.close()

    def decode(self, request: Any) -> _Sorted:
        # Those of the tokenizer are there where it came by way of the ensemble.
        optional = _optional(request, "passages", "ticket", "TOP_K")
        for row in optional.get("ticket", ()):
            self._ledger.strike_out(row)
        passages = optional.get("passages")
        ranking = rank(
            Relevance(_array(request, "logits")[:, 0], _array(request, "scores")[:, 0]),
            _integer(optional, "TOP_K"),
            None if passages is None else passages.view(PASSAGE)[:, 0],
        )
        outputs: _Sorted = {
            "INDICES": ranking.indices,
            "SCORES": ranking.scores,
            "LOGITS": ranking.logits,
            "MODEL": self._model,
        }
        if ranking.read:
            outputs["PASSAGES"] = ranking.read.passages
            outputs["TOKENS"] = ranking.read.tokens
            outputs["TRUNCATED"] = ranking.read.truncated
        return outputs

    def run(self, batch: Sequence[_Sorted]) -> Sequence[_Sorted]:
        return batch

    def encode(self, result: _Sorted) -> _Sorted:
        return result
