"""Scores that are known already: a score depends on its query and document alone."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from hashlib import blake2b
from threading import Lock

from .protocol import Model, Options, RankedDocument, Ranking, merge

#: Seconds for which the model that answered last is taken to be the one that is served.
FRESH = 1.0


class PairCache:
    """The last pairs that were scored, and what their scores were. No I/O; for all threads.

    A pair's key has the revision of the model, so that an update of the model leaves none of the
    old scores in use: the model is that of the last answer, and where no answer came for
    ``FRESH`` seconds, one document of the call is sent although it is known.

    Args:
        pairs: the most of them; each takes about half a kilobyte.

    Attributes:
        hits, misses: pairs that were known, and that were not.

    Raises:
        TypeError, ValueError: ``pairs`` is no number of 1 or more.
        ModuleNotFoundError: the extra ``cache`` is not installed.
    """

    def __init__(self, pairs: int) -> None:
        if isinstance(pairs, bool) or not isinstance(pairs, int):
            raise TypeError(f"cache is of type {type(pairs).__name__}: pass a number of pairs")
        if pairs < 0:
            raise ValueError(f"cache is {pairs}: pass a number of pairs, or 0 for none")
        try:
            from cachetools import LRUCache
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a cache needs cachetools: in a checkout, pip install '.[cache]'", name=error.name
            ) from error
        self._known: LRUCache[bytes, RankedDocument] = LRUCache(pairs)
        self._lock = Lock()
        self._model: Model | None = None
        self._seen = -FRESH
        self.hits = self.misses = 0

    def rank(
        self, query: str, documents: Sequence[str], top_k: int | None, options: Options
    ) -> Generator[Sequence[str], Ranking, Ranking]:
        """Ranks documents, one or more: yields those to ask a server for, takes their ranking."""
        model = self._model
        found = self._find(model, query, documents, options)
        asked = [i for i in range(len(documents)) if i not in found]
        self.misses += len(asked)
        self.hits += len(found)
        if not asked and time.monotonic() - self._seen > FRESH:
            asked = [min(found, key=lambda i: len(documents[i]))]
        parts = []
        if asked:
            answer = yield [documents[i] for i in asked]
            if answer.model != model and len(asked) < len(documents):
                # What was found is another model's.
                asked, found = list(range(len(documents))), {}
                answer = yield documents
            self._add(query, answer, options)
            new = (replace(each, index=asked[each.index]) for each in answer)
            parts.append(Ranking(new, answer.model))
            for i in asked:
                found.pop(i, None)
        if found:
            known = (replace(found[i], index=i, document=documents[i]) for i in found)
            parts.append(Ranking(known, model))
        return merge(parts, top_k)

    def _find(
        self, model: Model | None, query: str, documents: Sequence[str], options: Options
    ) -> dict[int, RankedDocument]:
        if model is None:
            return {}
        keys = _keys(model, query, documents, options)
        with self._lock:
            every = [self._known.get(key) for key in keys]
        return {i: known for i, known in enumerate(every) if known}

    def _add(self, query: str, answer: Ranking, options: Options) -> None:
        if answer.model is None:  # Nobody could tell when to forget it.
            return
        keys = _keys(answer.model, query, [each.document for each in answer], options)
        with self._lock:
            self._model, self._seen = answer.model, time.monotonic()
            for key, each in zip(keys, answer):
                # Not its text, of which the key is made.
                self._known[key] = replace(each, index=0, document="")


def _keys(model: Model, query: str, documents: Sequence[str], options: Options) -> list[bytes]:
    """A digest a pair. The query's length tells where it ends and the document begins."""
    most = 1 if options.max_passages is None else options.max_passages
    extent = f"{model.revision} {most} {options.max_document_tokens}"
    start = blake2b(extent.encode(), digest_size=16)
    encoded = query.encode()
    start.update(len(encoded).to_bytes(8, "little") + encoded)
    keys = []
    for document in documents:
        digest = start.copy()
        digest.update(document.encode())
        keys.append(digest.digest())
    return keys
