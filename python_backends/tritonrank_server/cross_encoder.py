"""Second stage: token ids → logits and scores, by the exported ragged graph on ONNX Runtime.

This is the scorer of the embedded server (``configs/cpu.pbtxt``). In production Triton's own ONNX
Runtime backend runs the same graph, and this file is not used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .tokenizer import Tokens

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Relevance:
    """What the graph says of one request's documents: ``logits`` and ``scores``, FP32 [N]."""

    logits: Float32
    scores: Float32


class CrossEncoder:
    """The exported graph in ONNX Runtime, one document an execution, one execution a core.

    A document alone needs no padding, and its score cannot depend on its batch-mates, whereas
    dynamic INT8 takes its activation scales from the whole input. It costs no speed: a core gains
    nothing from matrices larger than one document's.

    Args:
        graph: ``model.onnx`` of an export.
        threads: documents scored at a time; default, the cores this process may use.
    """

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        # Only here, since in production the other stages run where there is no such package.
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            # Its kernel took as long as five additions and normalisations apart.
            disabled_optimizers=["SkipLayerNormFusion"],
        )
        self._pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)))

    def score(self, batch: Sequence[Tokens]) -> list[Relevance]:
        """Scores the documents of several requests; one result a request, in their order."""
        documents = [document for tokens in batch for document in tokens.documents()]
        # The longest first, so that no core is left with a long document at the end.
        order = sorted(range(len(documents)), key=lambda i: -documents[i].input_ids.size)
        results = np.empty((len(documents), 2), np.float32)
        results[order] = list(self._pool.map(self._run, [documents[i] for i in order]))
        ends = np.cumsum([len(tokens.lengths) for tokens in batch])
        return [Relevance(*part.T) for part in np.split(results, ends[:-1])]

    def _run(self, tokens: Tokens) -> tuple[float, float]:
        logits, scores = self._session.run(
            ["logits", "scores"],
            {
                "input_ids": tokens.input_ids.reshape(-1),
                "lengths": tokens.lengths[:, None],
                "query_lengths": tokens.query_lengths[:, None],
            },
        )
        return logits.item(), scores.item()
