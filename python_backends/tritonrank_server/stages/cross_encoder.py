"""Second stage: token ids → logits and scores, by the exported ragged graph on ONNX Runtime.

This is the scorer of the embedded server (``configs/cpu.pbtxt``). In production Triton's own ONNX
Runtime backend runs the same graph, and this file is not used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedGraph
from .tokenizer import Tokens

Float32 = npt.NDArray[np.float32]
#: What yields to everything else that would run; see nice(2).
LOWEST = 19


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Work:
    """A request to score.

    Attributes:
        tokens: its pairs.
        is_given_up: whether nobody waits for it any more, asked before each document.
        bulk: whether it takes only what others leave of the cores.
    """

    tokens: Tokens
    is_given_up: Callable[[], bool] = _never
    bulk: bool = False


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

    Raises:
        UnsupportedGraph: the graph is for a GPU.
    """

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        threads = threads or len(os.sched_getaffinity(0))
        self._narrow, self._wide = _session(graph, 1), _session(graph, threads)
        self._pool = ThreadPoolExecutor(threads)
        self._bulk_pool = ThreadPoolExecutor(threads, initializer=_yield_to_others)

    def score(self, batch: Sequence[Work]) -> list[Relevance | None]:
        """Scores the documents of several requests.

        Returns:
            One result a request, in their order; None for one that was given up meanwhile, whose
            other documents are not scored.
        """
        documents = [(work, each) for work in batch for each in work.tokens.documents()]
        lone = len(documents) == 1 and not documents[0][0].bulk
        run = partial(_run, self._wide if lone else self._narrow)
        # The longest first, so that no core is left with a long document at the end.
        order = sorted(range(len(documents)), key=lambda i: -documents[i][1].input_ids.size)
        futures = {}
        for i in order:
            pool = self._bulk_pool if documents[i][0].bulk else self._pool
            futures[i] = pool.submit(run, *documents[i])
        results = (futures[i].result() for i in range(len(documents)))
        return [_gathered([next(results) for _ in work.tokens.lengths]) for work in batch]


def _run(session: Any, work: Work, document: Tokens) -> tuple[float, float] | None:
    if work.is_given_up():
        return None
    logits, scores = session.run(["logits", "scores"], document.inputs())
    return logits.item(), scores.item()


def _yield_to_others() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


def _session(graph: Path, threads: int) -> Any:
    # Only here, since in production the other stages run where there is no such package.
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would keep the cores busy after their work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            # Its kernel took three times as long as an addition and a normalisation apart.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
    except NoKernel as error:
        raise UnsupportedGraph(
            f"{graph} is for a GPU: export with --precision int8 for a CPU, if the model has "
            f"less than 536 million parameters, or serve it on a GPU ({error})"
        ) from error


def _gathered(results: list[tuple[float, float] | None]) -> Relevance | None:
    """One request's documents together, unless one was left out."""
    scored = [result for result in results if result]
    if len(scored) < len(results):
        return None
    logits, scores = np.array(scored, np.float32).T
    return Relevance(logits, scores)
