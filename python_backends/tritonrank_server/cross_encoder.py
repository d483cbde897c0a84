"""Second stage: token ids → logits and scores, by the exported ragged graph on ONNX Runtime.

This is the scorer of the embedded server (``configs/cpu.pbtxt``). In production Triton's own ONNX
Runtime backend runs the same graph, and this file is not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .tokenizer import Tokens

Float32 = npt.NDArray[np.float32]
#: Whether nobody waits for a request any more, asked before each of its documents.
IsGivenUp = Callable[[], bool]


@dataclass(frozen=True)
class Relevance:
    """What the graph says of one request's documents: ``logits`` and ``scores``, FP32 [N]."""

    logits: Float32
    scores: Float32


class CrossEncoder:
    """The exported graph in ONNX Runtime, one document an execution, one execution a core.

    A document alone needs no padding, and its score cannot depend on its batch-mates, whereas
    dynamic INT8 takes its activation scales from the whole input. It costs no speed: a core gains
    nothing from matrices larger than one document's. A lone document has all cores.

    Args:
        graph: ``model.onnx`` of an export.
        threads: documents scored at a time; default, the cores this process may use.
    """

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        threads = threads or len(os.sched_getaffinity(0))
        self._narrow, self._wide = _session(graph, 1), _session(graph, threads)
        self._pool = ThreadPoolExecutor(threads)

    def score(self, batch: Sequence[tuple[Tokens, IsGivenUp]]) -> list[Relevance | None]:
        """Scores the documents of several requests.

        Returns:
            One result a request, in their order; None for one that was given up meanwhile, whose
            other documents are not scored.
        """
        documents = [
            (document, is_given_up)
            for tokens, is_given_up in batch
            for document in tokens.documents()
        ]
        run = partial(self._run, self._wide if len(documents) == 1 else self._narrow)
        # The longest first, so that no core is left with a long document at the end.
        order = sorted(range(len(documents)), key=lambda i: -documents[i][0].input_ids.size)
        results: list[tuple[float, float] | None] = [None] * len(documents)
        for i, result in zip(order, self._pool.map(run, [documents[i] for i in order])):
            results[i] = result
        every = iter(results)
        return [_gathered([next(every) for _ in tokens.lengths]) for tokens, _ in batch]

    @staticmethod
    def _run(session: Any, document: tuple[Tokens, IsGivenUp]) -> tuple[float, float] | None:
        tokens, is_given_up = document
        if is_given_up():
            return None
        logits, scores = session.run(["logits", "scores"], tokens.inputs())
        return logits.item(), scores.item()


def _session(graph: Path, threads: int) -> Any:
    # Only here, since in production the other stages run where there is no such package.
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would keep the cores busy after their work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        graph,
        options,
        providers=["CPUExecutionProvider"],
        # Its kernel took three times as long as an addition and a normalisation apart.
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def _gathered(results: list[tuple[float, float] | None]) -> Relevance | None:
    """One request's documents together, unless one was left out."""
    scored = [result for result in results if result]
    if len(scored) < len(results):
        return None
    logits, scores = np.array(scored, np.float32).T
    return Relevance(logits, scores)
