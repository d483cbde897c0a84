"""Last stage: logits and scores → ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, InvalidOutput
from .cross_encoder import Relevance


@dataclass(frozen=True)
class Ranking:
    """The best K of a request's documents, best first.

    Attributes:
        indices: INT32 [K], positions among the request's documents.
        scores: FP32 [K], after the model's activation.
        logits: FP32 [K], before it.
    """

    indices: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def rank(relevance: Relevance, top_k: int | None = None) -> Ranking:
    """Sorts by logit, descending, ties by index; ``top_k`` beyond N means N, absent means N.

    Raises:
        InvalidInput: ``top_k`` is below 1.
        InvalidOutput: a logit is NaN or infinite.
    """
    if top_k is not None and top_k < 1:
        raise InvalidInput(f"TOP_K is {top_k}: send 1 or more, or leave it out to rank all")
    finite = np.isfinite(relevance.logits)
    if not finite.all():
        raise InvalidOutput(
            f"the model gave no finite logit for DOCUMENTS[{finite.argmin()}]: "
            "export it again at a higher precision"
        )
    order = np.argsort(-relevance.logits, kind="stable")[:top_k]
    return Ranking(order.astype(np.int32), relevance.scores[order], relevance.logits[order])
