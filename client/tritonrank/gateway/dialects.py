"""Every dialect of ``/rerank``: a body → what it asks for; a ranking → its answer. No I/O.

The fields of a body tell its dialect: no server serves them all, and no client sends what it does
not mean. A prefix of the path forces one where bodies are equal and answers are not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol import Model, RankedDocument, Ranking
from .fields import (
    InvalidField,
    boolean,
    bounded,
    integer,
    several,
    share,
    shown,
    string,
    strings,
    text,
)

Body = Mapping[str, Any]
Documents = Sequence[RankedDocument]

#: Cohere's unit of billing: a query with so many documents, a longer one counted once for each
#: chunk of so many tokens, the query's included.
DOCUMENTS_PER_UNIT, TOKENS_PER_CHUNK = 100, 500
#: SiliconFlow's largest.
MOST_OVERLAP = 80
#: Cohere's least score of a relevant span, where a request does not say.
SPAN_THRESHOLD = 0.1


@dataclass(frozen=True)
class Call:
    """What a body asks for, whatever its dialect.

    Attributes:
        queries: one, or one a document.
        documents: their texts.
        sent: the documents as they were sent.
        top_n: how many to return; None for all.
        returns_documents: whether the answer has them.
        raw: whether it has logits in place of scores.
        whole: the field by which a text that is not read whole is an error.
        lengths: fields that limit tokens, which nothing shorter than the model's may do.
        model: the one asked for.
        max_passages: in how many passages each document is read, at most; None if it does not say.
        max_document_tokens: how many tokens of each document are read, at most; None for all.
        span_threshold: the least score of a relevant span; None where none are asked for.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    sent: Sequence[object]
    top_n: int | None
    returns_documents: bool
    raw: bool
    whole: str | None
    lengths: Mapping[str, int]
    model: str | None
    max_passages: int | None
    max_document_tokens: int | None
    span_threshold: float | None

    def refuse_short_lengths(self, model: Model | None) -> None:
        """Where the model would read more of a text than the call allows.

        Args:
            model: None where it is not known.

        Raises:
            InvalidField: the call has such a limit.
        """
        for name, length in self.lengths.items():
            if model and length < model.max_length:
                raise InvalidField(
                    name,
                    f"is {shown(length)}, and only the model cuts texts, at {model.max_length} "
                    "tokens of query and document: leave it out",
                )

    def refuse_unmet(self, ranked: Documents) -> None:
        """What only the ranking tells.

        Raises:
            InvalidField: the call forbids to cut texts, and one was cut, or may have been; or it
                asks for spans, and the server does not tell passages.
        """
        cut = sorted(each.index for each in ranked if each.truncated is not False)
        if self.whole and cut:
            several = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            limit = ", or a larger max_tokens_per_doc" if self.max_document_tokens else ""
            raise InvalidField(
                self.whole,
                f"forbids to cut, and of document {cut[0]}{several} with the query not all is "
                "read, or the server does not tell: shorten it, let it be cut, or send a larger "
                f"max_passages{limit}",
            )
        if self.span_threshold is not None and any(each.passage is None for each in ranked):
            raise InvalidField("relevant_spans", "is not supported by the server: leave it out")


@dataclass(frozen=True)
class Answered:
    """A call's ranking, and what else answers tell.

    Attributes:
        call: that was answered.
        ranked: all its documents, best first.
        name: what it is called.
        id: of the request.
    """

    call: Call
    ranked: Ranking
    name: str
    id: str

    @property
    def best(self) -> Documents:
        """Those that were asked for."""
        return self.ranked[: self.call.top_n]

    @property
    def tokens(self) -> int | None:
        """Of all pairs, as the model read them; None if the server does not count them."""
        counts = [each.tokens for each in self.ranked]
        return None if None in counts else sum(filter(None, counts))

    @property
    def usage(self) -> dict[str, Any]:
        if self.tokens is None:
            return {}
        return {"usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens}}

    @property
    def search_units(self) -> int:
        """As Cohere counts them."""
        chunks = sum(-(-(each.tokens or 1) // TOKENS_PER_CHUNK) for each in self.ranked)
        return -(-chunks // DOCUMENTS_PER_UNIT)

    def score(self, each: RankedDocument) -> float:
        """From 0 to 1, or the logit, where it is asked for."""
        return each.logit if self.call.raw else self.share(each)

    def share(self, each: RankedDocument) -> float:
        """From 0 to 1, which clients' thresholds go by."""
        model = self.ranked.model
        if model and model.activation == "Identity":  # Its scores are logits.
            return 1 / (1 + math.exp(-each.logit)) if each.logit > -700 else 0.0
        return each.score

    def place(self, each: RankedDocument) -> dict[str, Any]:
        """The passage that gave the score: where it is not all of the text, and as Cohere's span.

        In code points of the text that was read.
        """
        told: dict[str, Any] = {"passage": each.read} if each.read else {}
        threshold = self.call.span_threshold
        if threshold is not None and each.passage is not None:
            start, end = each.passage
            span = {"start": start, "end": end, "score": self.share(each)}
            told["relevant_spans"] = [span] if span["score"] >= threshold else []
        return told

    def document(self, each: RankedDocument) -> dict[str, Any]:
        """An object with the text, whatever was sent."""
        sent = self.call.sent[each.index]
        return {"text": each.document, **(sent if isinstance(sent, dict) else {})}


@dataclass(frozen=True)
class Dialect:
    """One way of asking and answering.

    Attributes:
        name: in logs and metrics.
        documents: the field that has them.
        answer: a ranking → the answer's JSON.
        returns: the field that asks for documents in the answer, and what it is by default.
        invalid: the status of a body that is refused.
        nested: whether an error is an object, as OpenAI's clients expect.
        lone: whether one document may stand for a list of it.
        images: whether documents' images are to be ranked, which is refused.
    """

    name: str
    documents: str
    answer: Callable[[Answered], object]
    returns: tuple[str, bool] = ("return_documents", False)
    invalid: int = 422
    nested: bool = False
    lone: bool = False
    images: bool = False

    def read(self, body: Body, most: float = math.inf) -> Call:
        """What the body asks for, with so many documents at most.

        Raises:
            InvalidField: a field is wrong, or is not supported and would change scores.
        """
        _refuse_unsupported(body)
        rank_fields = strings(body, "rank_fields")
        sent = (_listed if self.lone else several)(body, self.documents)
        _refuse_many(self.documents, sent, most)
        if self.images:
            _refuse_images(self.documents, sent)
        bounded("query", [body.get("query")])
        field, default = self.returns
        return _call(
            body,
            queries=[text(body.get("query"), "query")],
            documents=[
                text(each, f"{self.documents}[{i}]", rank_fields) for i, each in enumerate(sent)
            ],
            sent=sent,
            returns_documents=boolean(body, field, default),
        )

    def error(self, message: str, status: int, id: str, field: str | None = None) -> object:
        """One body for an error that every client of the dialect can print."""
        kind = ERROR_TYPES.get(status, "Backend" if status >= 500 else "Validation")
        if self.nested:
            error = {"message": message, "type": kind, "param": field, "code": status}
            return {"error": error, "message": message, "detail": message, "id": id}
        return {
            "message": message,
            "detail": message,
            "error": message,
            "error_type": kind,
            "id": id,
        }


#: By TEI's names.
ERROR_TYPES = {429: "Overloaded", 503: "Unhealthy"}


def _call(body: Body, **others: Any) -> Call:
    """With the fields that mean the same in all dialects."""
    overlap = integer(body, "overlap_tokens", 0)
    if overlap and overlap > MOST_OVERLAP:
        raise InvalidField(
            "overlap_tokens",
            f"is {shown(overlap)}, and the server chooses what passages have in common: leave it "
            "out",
        )
    lengths = {name: integer(body, name, least) for name, least in LENGTHS.items()}
    return Call(
        top_n=_either(body, "top_n", "top_k"),
        raw=boolean(body, "raw_scores", False) or not boolean(body, "use_activation", True),
        whole=_whole(body),
        # 0 and -1 are no limit.
        lengths={name: value for name, value in lengths.items() if value and value > 0},
        model=string(body, "model"),
        max_passages=_either(body, *MAX_PASSAGES),
        max_document_tokens=_either(body, *MAX_DOCUMENT_TOKENS),
        span_threshold=_span_threshold(body),
        **others,
    )


def _either(body: Body, *names: str) -> int | None:
    """The first of several names that is given; 0 is not, as vLLM has it."""
    return next(filter(None, [integer(body, name, 0) for name in names]), None)


def _span_threshold(body: Body) -> float | None:
    """Of Cohere's ``relevant_spans``, if they are enabled. There is one at most, its passage."""
    spans = body.get("relevant_spans")
    if not spans:
        return None
    if not isinstance(spans, dict):
        raise InvalidField("relevant_spans", "is no object: send one with mode, or leave it out")
    if spans.get("mode") not in ("enabled", "disabled"):
        raise InvalidField("relevant_spans.mode", "is neither enabled nor disabled: send one")
    named = {f"relevant_spans.{name}": value for name, value in spans.items()}
    integer(named, "relevant_spans.max_spans", 1)
    threshold = share(named, "relevant_spans.threshold", SPAN_THRESHOLD)
    return threshold if spans["mode"] == "enabled" else None


#: Names of Cohere, SiliconFlow, and our own.
MAX_PASSAGES = ("max_chunks_per_doc", "max_passages")
#: Names of Cohere and vLLM, and of Jina.
MAX_DOCUMENT_TOKENS = ("max_tokens_per_doc", "max_doc_length")
#: Other fields that limit tokens, and their least value.
LENGTHS = {
    "max_length": 0,
    "max_tokens_per_query": 0,
    "truncate_prompt_tokens": -1,
}
#: Fields that would change scores: each is refused, unless it has nothing in it or these values.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "instruction": (),
    "instruct": (),
    "chat_template_kwargs": (),
    "mm_processor_kwargs": (),
    "kwargs": ("{}",),
    "truncation_direction": ("Right", "right"),
    "truncation_side": ("Right", "right"),
}


def _refuse_unsupported(body: Body) -> None:
    for name, harmless in UNSUPPORTED.items():
        value = body.get(name)
        if value and value not in harmless:
            raise InvalidField(name, "is not supported, and would change the answer: leave it out")
    if boolean(body, "return_embeddings", False):
        raise InvalidField("return_embeddings", "is not supported: leave it out")


def _whole(body: Body) -> str | None:
    """The field that forbids to cut texts."""
    for name in ("truncate", "truncation"):
        value = body.get(name)
        if isinstance(value, str) and value.upper() in {"NONE", "END", "START"}:  # NVIDIA's.
            if value.upper() == "START":
                raise InvalidField(name, "is START, and texts are cut at their end: send END")
            if value.upper() == "NONE":
                return name
        elif not boolean(body, name, True):
            return name
    return None


def _listed(body: Body, name: str) -> list[Any]:
    """Where one item may stand for a list of it."""
    return [body[name]] if isinstance(body.get(name), (str, dict)) else several(body, name)


def _refuse_many(name: str, documents: Sequence[object], most: float) -> None:
    if len(documents) > most:
        raise InvalidField(name, f"has {len(documents)}, and a request may have {most}: split it")
    bounded(name, documents)


def _refuse_images(name: str, documents: Sequence[object]) -> None:
    """Where they are something to rank; elsewhere they are what a document comes with."""
    for i, each in enumerate(documents):
        if isinstance(each, dict) and each.get("image"):
            raise InvalidField(f"{name}[{i}].image", "is not supported, only text is: leave it out")


def _results(answered: Answered, document: Callable[[RankedDocument], object]) -> dict[str, Any]:
    """What Cohere, Jina, vLLM, Xinference and infinity have in common, and more."""
    results = []
    for each in answered.best:
        result: dict[str, object]
        result = {"index": each.index, "relevance_score": answered.score(each)}
        if answered.call.returns_documents:
            result["document"] = document(each)
        results.append(result | answered.place(each))
    # No "object", which infinity's client would refuse.
    return {"id": answered.id, "model": answered.name, "results": results, **answered.usage}


def _superset(answered: Answered) -> object:
    tokens = {} if answered.tokens is None else {"input_tokens": answered.tokens}
    meta = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": answered.search_units},
        "tokens": {**tokens, "output_tokens": 0},
    }
    return _results(answered, answered.document) | {"meta": meta}


def _infinity(answered: Answered) -> object:
    answer = _results(answered, lambda each: each.document)
    return answer | {"object": "rerank", "created": int(time.time())}


def _vllm(answered: Answered) -> object:
    return _results(answered, lambda each: {**answered.document(each), "multi_modal": None})


def _voyage(answered: Answered) -> object:
    data = []
    for each in answered.best:
        result: dict[str, object]
        result = {"index": each.index, "relevance_score": answered.score(each)}
        if answered.call.returns_documents:
            result["document"] = each.document
        data.append(result)
    usage = {} if answered.tokens is None else {"usage": {"total_tokens": answered.tokens}}
    return {"object": "list", "data": data, "model": answered.name, **usage}


def _tei(answered: Answered) -> object:
    texts = answered.call.returns_documents
    return [
        {"index": each.index, "score": answered.score(each)}
        | ({"text": each.document} if texts else {})
        for each in answered.best
    ]


def _nim(answered: Answered) -> object:
    rankings = [{"index": each.index, "logit": each.logit} for each in answered.best]
    return {"rankings": rankings, **answered.usage}


def _weaviate(answered: Answered) -> object:
    scores = [
        {"document": each.document, "score": answered.score(each)}
        for each in sorted(answered.best, key=lambda each: each.index)
    ]
    return {"query": answered.call.queries[0], "property": "", "scores": scores}


def _scores(answered: Answered) -> object:
    raw = answered.call.raw
    data = [
        {"index": each.index, "object": "score", "score": each.logit if raw else each.score}
        for each in sorted(answered.ranked, key=lambda each: each.index)
    ]
    return {
        "id": answered.id,
        "object": "list",
        "created": int(time.time()),
        "model": answered.name,
        "data": data,
        **answered.usage,
    }


def _deepinfra(answered: Answered) -> object:
    scores = [answered.score(each) for each in sorted(answered.ranked, key=lambda each: each.index)]
    return {"scores": scores, "input_tokens": answered.tokens, "request_id": answered.id}


class _Score(Dialect):
    """vLLM's ``/score``: pairs, one query with many documents or one with each."""

    def read(self, body: Body, most: float = math.inf) -> Call:
        _refuse_unsupported(body)
        names = next((names for names in PAIRS if body.get(names[1]) is not None), None)
        if names is None:
            raise InvalidField(
                "queries", "and documents are missing: send both, or text_1 and text_2"
            )
        queries, documents = (_listed(body, name) for name in names)
        _refuse_many(names[1], documents, most)
        bounded(names[0], queries)
        if len(queries) not in (1, len(documents)):
            raise InvalidField(
                names[0],
                f"has {len(queries)} and {names[1]} {len(documents)}: send one, or as many",
            )
        return _call(
            body,
            queries=[text(each, f"{names[0]}[{i}]") for i, each in enumerate(queries)],
            documents=[text(each, f"{names[1]}[{i}]") for i, each in enumerate(documents)],
            sent=documents,
            returns_documents=False,
        )


#: The fields of ``/score``, by their names in turn.
PAIRS = (
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)

COHERE = Dialect("cohere", "documents", _superset)
JINA = Dialect("jina", "documents", _superset, ("return_documents", True), images=True)
VOYAGE = Dialect("voyage", "documents", _voyage)
TEI = Dialect("tei", "texts", _tei, ("return_text", False))
INFINITY = Dialect("infinity", "documents", _infinity)
# Its documents come back whatever is asked: no field has that name.
VLLM = Dialect("vllm", "documents", _vllm, ("", True), invalid=400, nested=True, lone=True)
NIM = Dialect("nim", "passages", _nim, images=True)
WEAVIATE = Dialect("weaviate", "documents", _weaviate)
SCORE = _Score("score", "documents", _scores, invalid=400, nested=True)
DEEPINFRA = _Score("deepinfra", "documents", _deepinfra)

#: By the first part of a path that forces one.
PREFIXES = {each.name: each for each in (COHERE, JINA, VOYAGE, TEI, INFINITY, VLLM, NIM, WEAVIATE)}
#: The last parts of paths, behind a prefix and versions; some name a model as well.
PATHS = {"", "rerank", "reranking", "ranking", "score", "inference", "invocations", "vertex"}


def resource(path: str) -> tuple[Dialect | None, str]:
    """The dialect that a path forces, and what is left of it.

    Versions are left out, once or twice: a client whose base URL has one adds its own.
    """
    parts = [part for part in path.split("/") if part]
    forced = PREFIXES.get(parts[0]) if parts else None
    parts = parts[1:] if forced else parts
    while parts and parts[0] in ("v1", "v2"):
        parts = parts[1:]
    if parts[:1] == ["retrieval"] and parts[-1] == "reranking":
        parts = ["ranking"]
    if parts[:1] == ["inference"]:
        parts = parts[:1]
    return forced, "/".join(parts)


#: Fields that tell the dialect by being there.
TELLING = {"property", "top_k", "truncation"}


def dialect(forced: Dialect | None, path: str, body: Body) -> Dialect:
    """That of a body, by its fields; a path that forces one yields only to another's documents.

    Documents that are null are none; of other fields, clients send null for what they mean.
    """
    body = {name: value for name, value in body.items() if value is not None or name in TELLING}
    if path == "inference":
        return DEEPINFRA
    if path == "score" or (
        not forced and any(name in body for name in ("queries", "text_1", "data_1"))
    ):
        return SCORE
    if forced and forced.documents in body:
        return forced
    if "passages" in body:
        return NIM
    if "texts" in body and "documents" not in body:
        return TEI
    if forced:
        return forced
    if "property" in body:
        return WEAVIATE
    if "top_k" in body or "truncation" in body:
        return VOYAGE
    return COHERE
