"""Last stage: logits and scores of passages → ranking of documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, InvalidOutput
from .cross_encoder import Relevance

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ranking:
    """The best K of a request's documents, best first.

    Attributes:
        indices: INT32 [K], positions among the request's documents.
        scores: FP32 [K], after the model's activation.
        logits: FP32 [K], before it; the largest of the document's passages.
        read: what was read of each, if it is known.
    """

    indices: Int32
    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    read: Read | None = None


@dataclass(frozen=True)
class Read:
    """What was read of K documents.

    Attributes:
        passages: INT32 [K, 2], first and one-past-last character of the passage with the logit.
        tokens: INT32 [K], of all passages, with the query in each.
        truncated: BOOL [K], whether any text of the pair was left unread.
    """

    passages: Int32
    tokens: Int32
    truncated: npt.NDArray[np.bool_]


def rank(
    relevance: Relevance, top_k: int | None = None, passages: npt.NDArray[np.void] | None = None
) -> Ranking:
    """Sorts by logit, descending, ties by index; ``top_k`` beyond N means N, absent means N.

    Args:
        relevance: of M passages.
        top_k: how many documents.
        passages: ``PASSAGE`` [M], by document; absent where each is one.

    Raises:
        InvalidInput: ``top_k`` is below 1, or the passages are not those of the logits.
        InvalidOutput: a logit is NaN or infinite.
    """
    if top_k is not None and top_k < 1:
        raise InvalidInput(f"TOP_K is {top_k}: send 1 or more, or leave it out to rank all")
    logits, scores = relevance.logits, relevance.scores
    documents = np.arange(len(logits)) if passages is None else passages["document"]
    # 1 at the first passage of each document, else 0.
    steps = documents[1:] - documents[:-1]
    if not (
        len(documents) == len(logits) == len(scores) > 0
        and documents[0] == 0
        and ((steps == 0) | (steps == 1)).all()
    ):
        raise InvalidInput(
            "passages and scores are not those of the logits: send the request to reranker"
        )
    finite = np.isfinite(logits)
    if not finite.all():
        raise InvalidOutput(
            f"the model gave no finite logit for DOCUMENTS[{documents[finite.argmin()]}]: "
            "export it again at a higher precision"
        )
    firsts = np.concatenate(([0], steps.nonzero()[0] + 1))
    # Both sorts are stable: of equal logits the first passage counts, and the first document.
    best = np.lexsort((-logits, documents))[firsts]
    order = np.argsort(-logits[best], kind="stable")[:top_k]
    rows = best[order]
    read = None
    if passages is not None:
        chosen = passages[rows]
        read = Read(
            np.stack((chosen["start"], chosen["end"]), axis=1),
            np.add.reduceat(passages["tokens"], firsts, dtype=np.int32)[order],
            chosen["truncated"].astype(np.bool_),
        )
    return Ranking(order.astype(np.int32), scores[rows], logits[rows], read)
