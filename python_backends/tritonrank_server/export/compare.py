"""How far an exported graph is from what the checkpoint's publisher runs, and how far it may be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..errors import ExportRefused
from ..stages.cross_encoder import CrossEncoder, Work
from ..stages.tokenizer import PairTokenizer, Tokens
from . import reading
from .progress import shown
from .source import Source

Float32 = npt.NDArray[np.float32]
Request = dict[str, Any]
#: The tokens of the longest documents whose logits are compared, unless the model takes fewer.
LONG = 512


@dataclass(frozen=True)
class Difference:
    """How far an exported graph is from its FP32 reference.

    Rankings are those of the sample's queries; errors are also of its first documents made long.

    Attributes:
        logit_error: the largest absolute difference of a logit.
        relative_error: that, as a share of the range of the reference's logits.
        kendall_tau: Kendall's τ of the two rankings of a query, mean over queries.
        top_5_overlap: the share of the reference's best five among the graph's, mean over queries.
        batch_error: how far a document's logit moves when all documents share one execution, as in
            Triton's own backend; a share of the range, too. None of INT8, which takes one document
            an execution.
    """

    logit_error: float
    relative_error: float
    kendall_tau: float
    top_5_overlap: float
    batch_error: float | None


#: Those in which documents of all requests are run together.
EXECUTIONS = 6

#: What a precision may cost: (attribute, limit, whether the limit is a ceiling). FP32 computes the
#: same numbers in another order. FP16 keeps 11 bits of each. INT8 moves logits visibly, so there it
#: is the ranking that must hold, and of documents alone: its graph takes one an execution, since
#: dynamic INT8 takes its scales from all that it is given.
LIMITS = {
    "fp32": [("logit_error", 1e-4, True), ("batch_error", 1e-4, True)],
    "fp16": [
        ("relative_error", 0.01, True),
        ("kendall_tau", 0.97, False),
        ("batch_error", 0.01, True),
    ],
    "int8": [("kendall_tau", 0.85, False), ("top_5_overlap", 0.8, False)],
}

#: What to do about a graph that is too far.
NEARER = {
    "fp32": "it is a fault of this exporter, to be reported",
    "fp16": "use --precision fp32",
    "int8": "use --precision fp32, or fp16 for a GPU",
}


@dataclass(frozen=True)
class Expected:
    """What the checkpoint's own FP32 model says of the sample.

    Attributes:
        requests: the sample's, and one of long documents.
        logits: of each request, FP32 [N].
    """

    requests: Sequence[Request]
    logits: Sequence[Float32]

    @classmethod
    def of(cls, source: Source) -> Expected:
        """By the source's reference.

        Raises:
            ExportRefused: it ranks nothing.
        """
        requests = _sample(source)
        bars = shown(requests, "Running the checkpoint's own model")
        logits = [source.reference(each["query"], each["documents"]) for each in bars]
        if np.ptp(np.concatenate(logits)) == 0:
            raise ExportRefused(
                "the checkpoint's own model gives every document of the sample the same logit: use "
                "one that was trained to rank. Nothing was published"
            )
        return cls(requests, logits)

    def difference(self, graph: Path, pairs: PairTokenizer, precision: str) -> Difference:
        """How far an exported graph is from it, one that any processor runs.

        Raises:
            ExportRefused: the graph gives NaN or infinity.
        """
        requests = [
            pairs.read(each["query"].encode(), [text.encode() for text in each["documents"]])
            for each in self.requests
        ]
        batch = pairs.encode(requests)
        run = _by_session if precision == "fp16" else _by_scorer
        actual = [_of_finite(logits) for logits in run(graph, batch)]
        every, alone = np.concatenate(self.logits), np.concatenate(actual)
        spread, error = float(np.ptp(every)), float(np.abs(every - alone).max())
        batch_error = None
        if precision != "int8":
            together = _together(graph, batch)
            batch_error = float(np.abs(together - alone).max()) / spread
        rankings = list(zip(self.logits, actual))[:-1]
        return Difference(
            logit_error=error,
            relative_error=error / spread,
            batch_error=batch_error,
            kendall_tau=float(np.mean([_kendall_tau(*pair) for pair in rankings])),
            top_5_overlap=float(np.mean([_overlap(*pair, 5) for pair in rankings])),
        )


def _sample(source: Source) -> list[Request]:
    """The sample's requests, and one more, of documents that take all of the model's positions.

    Or ``LONG`` of them, where there are very many, lest the check take many minutes.
    """
    lines = (files("tritonrank_server") / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    texts = [" ".join(request["documents"]) for request in requests]
    length = min(source.max_length, LONG)
    long = [reading.longer_than(length, [text], source.tokenizer) for text in texts]
    return [*requests, {"query": requests[0]["query"], "documents": long}]


def _by_scorer(graph: Path, batch: Sequence[Tokens]) -> Iterator[Float32]:
    """Logits of each request, FP32 [N], as they are served on a CPU."""
    scorer = CrossEncoder(graph)
    for tokens in shown(batch, "Running the graph"):
        [relevance] = scorer.score([Work(tokens)])
        assert relevance  # Only a cancelled request has none.
        yield relevance.logits


def _by_session(graph: Path, batch: Sequence[Tokens]) -> Iterator[Float32]:
    """The same, of a graph that is not: the scorer would write its weights in FP32."""
    session = _session(graph)
    for tokens in shown(batch, "Running the graph"):
        yield np.concatenate([_logits(session, each.inputs()) for each in tokens.documents()])


def _session(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # It would have the weights twice, for a little speed.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _logits(session: ort.InferenceSession, feed: dict[str, Any]) -> Float32:
    logits: Float32 = session.run(["logits"], feed)[0][:, 0]
    return logits


def _together(graph: Path, batch: Sequence[Tokens]) -> Float32:
    """FP32 [N] of all documents, many an execution, concatenated as Triton does for its backend.

    Each execution has some of every request, long ones and short ones; all in one would take more
    memory than the weights do.
    """
    session = _session(graph)
    logits = [np.zeros(len(tokens.lengths), np.float32) for tokens in batch]
    for i in range(EXECUTIONS):
        some = slice(i, None, EXECUTIONS)
        documents = [one for each in batch for one in list(each.documents())[some]]
        found = iter(_logits(session, Tokens.joined(documents).inputs()))
        for whole in logits:
            whole[some] = [next(found) for _ in whole[some]]
    return np.concatenate(logits)


def _of_finite(logits: Float32) -> Float32:
    if not np.isfinite(logits).all():
        raise ExportRefused(
            "the graph gives no finite logit for a document of the sample: export it at a higher "
            "precision. Nothing was published"
        )
    return logits


def _kendall_tau(a: Float32, b: Float32) -> float:
    """Concordant less discordant pairs, over all pairs (Kendall 1938; real logits have no ties)."""
    signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in combinations(range(len(a)), 2)]
    return float(np.mean(signs))


def _overlap(a: Float32, b: Float32, k: int) -> float:
    best_a, best_b = (set(np.argsort(-logits, kind="stable")[:k].tolist()) for logits in (a, b))
    return len(best_a & best_b) / k


def refuse_beyond_limits(difference: Difference, precision: str) -> None:
    for attribute, limit, ceiling in LIMITS[precision]:
        value = getattr(difference, attribute)
        # Written so that NaN is beyond any limit.
        if not (value <= limit if ceiling else value >= limit):
            raise ExportRefused(
                f"{precision} is too far from FP32: {attribute} is {value:.3g}, and the limit is "
                f"{limit:g}. Nothing was published: {NEARER[precision]}"
            )
