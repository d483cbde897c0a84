"""What load tests send: named, seeded streams of requests, or a file of one's own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data import SHARE_OF_WORDS, WORDS


class Request(NamedTuple):
    """A query, its documents, and in how many passages each is read at most, if it says so."""

    query: str
    documents: list[str]
    max_passages: int | None = None


def stream(workload: str, seed: int = 0) -> Iterator[Request]:
    """Requests without end: of a workload, the same for the same seed, or of a file over and over.

    Args:
        workload: one of ``WORKLOADS``, or a JSONL file, ``{"query": …, "documents": […]}`` a line
            and ``max_passages`` where it has one.
        seed: tells the users of a test apart.
    """
    source = random.Random(f"{workload} {seed}")
    if workload in WORKLOADS:
        while True:
            yield WORKLOADS[workload](source)
    requests = _read(Path(workload).read_text("utf-8"))
    source.shuffle(requests)
    yield from cycle(requests)


def _text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS.split(), k=words))


def _search(source: random.Random, documents: int = 100) -> Request:
    """Passages as long as DL19's."""
    quantiles = [source.random() for _ in range(documents)]
    lengths = np.interp(quantiles, *np.transpose(SHARE_OF_WORDS))
    return Request(_text(source, 6), [_text(source, int(words)) for words in lengths])


def _rag(source: random.Random) -> Request:
    """Chunks of about 300 tokens."""
    chunks = [_text(source, source.randint(200, 300)) for _ in range(20)]
    return Request(_text(source, 12), chunks)


def _autocomplete(source: random.Random) -> Request:
    """Completions of what was typed."""
    completions = [_text(source, source.randint(2, 8)) for _ in range(10)]
    return Request(_text(source, 2), completions)


def _multilingual(source: random.Random) -> Request:
    """A query with a dozen documents of the sample, in English, Korean or Japanese."""
    return source.choice(sample())


@cache
def sample() -> list[Request]:
    """That of the demo and of the export's check: English, Korean and Japanese."""
    return _read((files("tritonrank_server") / "sample.jsonl").read_text("utf-8"))


def _read(jsonl: str) -> list[Request]:
    return [
        Request(each["query"], each["documents"], each.get("max_passages"))
        for each in map(json.loads, jsonl.splitlines())
    ]


def _mixed(source: random.Random) -> Request:
    return source.choice([_search, _rag, _autocomplete, _multilingual])(source)


def _spiky(source: random.Random) -> Request:
    """Small requests, of which one in twenty is thirty times as large."""
    return _search(source, 300 if source.random() < 0.05 else 10)


def _bulk(source: random.Random) -> Request:
    """A job that is in no hurry."""
    return _search(source, 5000)


def _long(source: random.Random) -> Request:
    """Whole documents of 500 to 5,000 tokens, read in passages."""
    documents = [_text(source, source.randint(500, 5000)) for _ in range(10)]
    return Request(_text(source, 12), documents, max_passages=16)


WORKLOADS: dict[str, Callable[[random.Random], Request]] = {
    "search": _search,
    "rag": _rag,
    "autocomplete": _autocomplete,
    "mixed": _mixed,
    "spiky": _spiky,
    "bulk": _bulk,
    "long": _long,
}
