"""The wire contract: requests and answers as protobuf messages, splitting, merging. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise, repeat

import numpy as np
from tritonclient.grpc import service_pb2

#: The model whose batch size is the server's limit of documents.
LIMIT_REQUEST = service_pb2.ModelConfigRequest(name="cross_encoder")

#: Ready when all its stages are.
READY_REQUEST = service_pb2.ModelReadyRequest(name="reranker")

#: The most passages of a part of a bulk call: what an execution of the CPU scorer has, so that few
#: other requests are answered together with it. The others wait for the one that runs, at most.
BULK_PASSAGES = 32
#: The most parts of a call under way: enough for an execution while the next one waits, and few
#: enough for a call that is given up, of which the server computes what it has.
PARTS_UNDER_WAY = 16
#: The server's level for what goes after everything else; 1 is the default.
BULK_PRIORITY = 2


@dataclass(frozen=True)
class RankedDocument:
    """One document of a ranking.

    Attributes:
        index: its position in the request's documents.
        score: after the model's activation; for a sigmoid, between 0 and 1.
        logit: before it; it tells documents apart where the scores are all near 1.
        document: its text.
        tokens: that the model read of the pair, in all passages; None from a server before 0.4,
            as the next one.
        truncated: whether any text of the pair was left unread.
        passage: the first and one-past-last character of what gave the logit; None from a server
            before 0.5.
    """

    index: int
    score: float
    logit: float
    document: str
    tokens: int | None = None
    truncated: bool | None = None
    passage: tuple[int, int] | None = None

    @property
    def read(self) -> dict[str, int | bool] | None:
        """What was read of it as answers of others are told: None where it was all, or is unknown.

        ``start`` and ``end`` of the passage, and ``truncated`` where text was left unread.
        """
        if self.passage is None or (self.passage == (0, len(self.document)) and not self.truncated):
            return None
        told: dict[str, int | bool] = dict(zip(("start", "end"), self.passage))
        return told | ({"truncated": True} if self.truncated else {})


@dataclass(frozen=True)
class Model:
    """The model that answered.

    Attributes:
        name: of its checkpoint.
        precision: ``fp32``, ``fp16`` or ``int8``.
        max_length: the most tokens of a pair; what is beyond is left unread.
        activation: what makes scores of logits, by ONNX's name.
        revision: of its export: another one may give other scores.
    """

    name: str
    precision: str
    max_length: int
    activation: str
    revision: str


class Ranking(list[RankedDocument]):
    """Documents, best first.

    Attributes:
        model: that scored them; None if the server does not tell, or if several servers answered
            parts of the call with different ones.
    """

    def __init__(self, documents: Iterable[RankedDocument], model: Model | None) -> None:
        super().__init__(documents)
        self.model = model


#: The outputs of a request's documents, and the types of an element.
COLUMNS = (
    ("INDICES", np.dtype("<i4")),
    ("SCORES", np.dtype("<f4")),
    ("LOGITS", np.dtype("<f4")),
    ("TOKENS", np.dtype("<i4")),
    ("TRUNCATED", np.dtype("?")),
    # As a record, whose elements are tuples.
    ("PASSAGES", np.dtype([("start", "<i4"), ("end", "<i4")])),
)

#: The index that it starts at, and its documents.
Part = tuple[int, Sequence[str]]

#: The most passages of a request, whatever is asked for.
MOST_PASSAGES = 1024
#: A document has no more than one, and one for each so many of its bytes: by the server's own rule
#: for models of 256 tokens, and twice as many as by that for those of 512.
BYTES_PER_PASSAGE = 128
#: Ordinary texts have fewer: with most models, so many bytes are the shortest.
USUAL_BYTES_PER_PASSAGE = 512


@dataclass(frozen=True)
class Options:
    """What a call says beside its query and documents.

    Attributes:
        max_passages: in how many passages each document is read, at most; None for one.
        max_document_tokens: how many of its tokens are read, at most; None for all that fit.
        bulk: whether it goes after all calls that are not.
        request_id: for the server's log and traces.
    """

    max_passages: int | None = None
    max_document_tokens: int | None = None
    bulk: bool = False
    request_id: str = ""


def passages(
    documents: Sequence[str], max_passages: int | None, size: int = BYTES_PER_PASSAGE
) -> list[int]:
    """The most passages of each document, if one has so many bytes."""
    most = min(max(1, max_passages or 1), MOST_PASSAGES)
    if most == 1:
        return [1] * len(documents)
    return [min(most, 1 + len(text.encode()) // size) for text in documents]


def usual_passages(documents: Sequence[str], max_passages: int | None) -> int:
    """How many passages all of them are expected to have."""
    return sum(passages(documents, max_passages, USUAL_BYTES_PER_PASSAGE))


def parts(documents: Sequence[str], options: Options, limit: int) -> list[Part]:
    """The parts of a call, about even: within the server's limit, for a bulk call small ones.

    No document gives one empty part: it is for the server to refuse it.

    Args:
        documents: all.
        options: of the call.
        limit: the most passages of a request.
    """
    sizes = passages(documents, options.max_passages)
    most, total = min(limit, BULK_PASSAGES) if options.bulk else limit, sum(sizes)
    even = -(-total // max(1, -(-total // most)))
    starts, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > even:
            starts.append(i)
            filled = 0
        filled += size
    return [(start, documents[start:end]) for start, end in pairwise([*starts, len(documents)])]


def request(
    query: str,
    documents: Sequence[str],
    top_k: int | None,
    options: Options,
    timeout: float,
) -> service_pb2.ModelInferRequest:
    """One call of the ensemble, which the server gives up, too, after ``timeout`` seconds.

    Triton's queues go by its own parameter ``priority``, which models do not see; by ``bulk`` the
    scorer of a CPU leaves the cores to others.
    """
    message = service_pb2.ModelInferRequest(model_name="reranker", id=options.request_id)
    message.parameters["timeout"].int64_param = max(1, int(timeout * 1e6))
    if options.bulk:
        message.parameters["priority"].int64_param = BULK_PRIORITY
        message.parameters["bulk"].bool_param = True
    _add(message, "QUERY", "BYTES", 1, _strings([query]))
    _add(message, "DOCUMENTS", "BYTES", len(documents), _strings(documents))
    for name, value in (
        ("TOP_K", top_k),
        ("MAX_PASSAGES", options.max_passages),
        ("MAX_DOCUMENT_TOKENS", options.max_document_tokens),
    ):
        if value is not None:
            # Beyond INT32 is beyond any number of documents, or of tokens.
            within = np.clip(value, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
            _add(message, name, "INT32", 1, np.array(within, "<i4").tobytes())
    return message


def _add(
    message: service_pb2.ModelInferRequest, name: str, datatype: str, size: int, raw: bytes
) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=[size])
    message.raw_input_contents.append(raw)


def _strings(texts: Sequence[str]) -> bytes:
    """BYTES on the wire: before each element its size, as 4 bytes, little-endian."""
    encoded = [text.encode("utf-8") for text in texts]
    return b"".join(part for each in encoded for part in (len(each).to_bytes(4, "little"), each))


def ranking(
    response: service_pb2.ModelInferResponse, start: int, documents: Sequence[str]
) -> Ranking:
    """The ranking of the part that starts at index ``start``."""
    raw = dict(zip((each.name for each in response.outputs), response.raw_output_contents))
    columns = (
        np.frombuffer(raw[name], dtype).tolist() if name in raw else repeat(None)
        for name, dtype in COLUMNS
    )
    ranked = (
        RankedDocument(start + index, score, logit, documents[index], *others)
        for index, score, logit, *others in zip(*columns)
    )
    return Ranking(ranked, _model(raw["MODEL"]) if "MODEL" in raw else None)


@lru_cache(16)
def _model(content: bytes) -> Model:
    known = json.loads(content)
    return Model(*(known[each.name] for each in fields(Model)))


def merge(rankings: Iterable[Ranking], top_k: int | None) -> Ranking:
    """One ranking of all parts: by logit, descending, ties by index."""
    rankings = list(rankings)
    every = (document for ranking in rankings for document in ranking)
    ordered = sorted(every, key=lambda each: (-each.logit, each.index))[:top_k]
    models = {ranking.model for ranking in rankings}
    return Ranking(ordered, models.pop() if len(models) == 1 else None)
