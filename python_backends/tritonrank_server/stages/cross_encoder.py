"""Second stage: token ids → logits and scores, by the exported ragged graph on ONNX Runtime.

This is the scorer of the embedded server (``configs/cpu.pbtxt``). In production Triton's own ONNX
Runtime backend runs the same graph, and this file is not used.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedGraph
from .tokenizer import Tokens

Float32 = npt.NDArray[np.float32]
#: The kernel of the first took three times as long as an addition and a normalisation apart.
#: By the second, ONNX Runtime 1.32 ends with a signal on DeBERTa in FP16.
SLOWER_OR_BROKEN = ["SkipLayerNormFusion", "MatmulTransposeFusion"]
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


class Scoring:
    """A request whose documents are under way."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._documents = list(work.tokens.documents())
        # By position: the logit and the score, or None, or what went wrong.
        self._found: dict[int, tuple[float, float] | Exception | None] = {}
        self._done = threading.Event()

    def score(self, session: Any, i: int) -> None:
        """Scores a document; each is some thread's."""
        found: tuple[float, float] | Exception | None = None
        try:
            if not self.work.is_given_up():
                outputs = session.run(["logits", "scores"], self._documents[i].inputs())
                logit, score = (each.item() for each in outputs)
                found = logit, score
        except Exception as error:  # For the thread that waits.
            found = error
        self._found[i] = found
        if len(self._found) == len(self._documents):
            self._done.set()

    def result(self) -> Relevance | None:
        """Waits for it; None if it was given up meanwhile. Raises what went wrong with it."""
        self._done.wait()
        scored = []
        for i in range(len(self._documents)):
            found = self._found[i]
            if isinstance(found, Exception):
                raise found
            if found is None:
                return None
            scored.append(found)
        logits, scores = np.array(scored, np.float32).T
        return Relevance(logits, scores)


class CrossEncoder:
    """The exported graph in ONNX Runtime, one document an execution, one execution a core.

    A document alone needs no padding, and its score cannot depend on its batch-mates, whereas
    dynamic INT8 takes its activation scales from the whole input. It costs no speed: a core gains
    nothing from matrices larger than one document's. A lone document has all cores.

    The weights are in memory once, as the processor's kernels want them, in a file without a name
    that both sessions map.

    Args:
        graph: ``model.onnx`` of an export.
        threads: documents scored at a time; default, the cores this process may use.

    Raises:
        UnsupportedGraph: the graph is for a GPU.
        OSError: there is no room for the file.
    """

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        threads = threads or len(os.sched_getaffinity(0))
        with TemporaryDirectory(prefix="tritonrank-", dir=_disk()) as folder:
            packed = _packed(graph, Path(folder))
            self._narrow, self._wide = _sessions(packed, 1, threads)
        # Else glibc keeps what was freed since, up to the size of the graph.
        ctypes.CDLL(None).malloc_trim(0)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._bulk_pool = ThreadPoolExecutor(threads, initializer=_yield_to_others)

    def score(self, batch: Sequence[Work]) -> list[Relevance | None]:
        """Scores the documents of several requests.

        Returns:
            One result a request, in their order; None for one that was given up meanwhile, whose
            other documents are not scored.
        """
        return [scoring.result() for scoring in self.begin(batch)]

    def begin(self, batch: Sequence[Work]) -> list[Scoring]:
        """The same, but returns when no more of its documents wait than there are cores."""
        scorings = list(map(Scoring, batch))
        if is_lone(batch):
            scorings[0].score(self._wide, 0)
            return scorings
        for bulk, pool in ((False, self._pool), (True, self._bulk_pool)):
            # A request after the other, so that none waits for all of its batch; of each the
            # longest first, so that no core is left with a long document at the end.
            order = [
                (scoring, i)
                for scoring in scorings
                if scoring.work.bulk == bulk
                for i in np.argsort(-scoring.work.tokens.lengths, kind="stable").tolist()
            ]
            if order:
                self._score(order, pool)
        return scorings

    def _score(self, order: Sequence[tuple[Scoring, int]], pool: ThreadPoolExecutor) -> None:
        """Returns when no more of them wait than there are cores."""
        few_wait = threading.Event()
        last = max(0, len(order) - self._threads - 1)
        waiting = iter([(*each, place == last) for place, each in enumerate(order)])

        def run() -> None:
            for scoring, i, is_last in waiting:  # An iterator of a list gives each once.
                if is_last:
                    few_wait.set()
                scoring.score(self._narrow, i)

        for _ in order[: self._threads]:
            pool.submit(run)
        if len(order) > self._threads:
            few_wait.wait()


def is_lone(batch: Sequence[Work]) -> bool:
    """Whether the batch is one document, which has all cores."""
    return len(batch) == 1 and len(batch[0].tokens.lengths) == 1 and not batch[0].bulk


def _yield_to_others() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)


def _packed(graph: Path, folder: Path) -> Path:
    """Writes the graph as this processor runs it: optimised, weights as its kernels read them.

    Kernels copy their weights into an order of their own, each session anew. From a file that has
    them in that order they are mapped, as all else that is constant.
    """
    # Only here, since in production the other stages run where there is no such package.
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = _options(1)
    options.log_severity_level = 3  # It warns that other processors may not run it.
    options.optimized_model_filepath = str(folder / graph.name)
    for name, value in (
        ("optimized_model_external_initializers_file_name", f"{graph.name}.data"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{name}", value)
    try:
        ort.InferenceSession(
            graph,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=SLOWER_OR_BROKEN,
        )
    except NoKernel as error:
        raise UnsupportedGraph(
            f"{graph} is for a GPU: export with --precision int8 for a CPU, or serve it on a GPU "
            f"({error})"
        ) from error
    except Fail as error:
        raise OSError(
            f"{graph} cannot be unpacked into {folder.parent}: free twice its size there, or name "
            f"another folder on a disk in TMPDIR ({error})"
        ) from error
    return folder / graph.name


def _sessions(packed: Path, *threads: int) -> list[Any]:
    """One for each number of threads; all compute in one arena of this process."""
    import onnxruntime as ort

    where = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(where, ort.OrtArenaCfg({}))
    every = [_options(each) for each in threads]
    for options in every:
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Done already.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    return [ort.InferenceSession(packed, options, providers=providers) for options in every]


def _options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would keep the cores busy after their work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _disk() -> str | None:
    """A folder for large files, by the usual rule; /tmp, the last choice, often lies in memory."""
    places = (os.environ.get("TMPDIR", ""), "/var/tmp")
    return next((place for place in places if os.access(place, os.W_OK)), None)
