"""Queries with candidate passages: TREC DL 2019 where it is at hand, else generated text."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

#: MS MARCO's text is for research only, and so is no part of this project.
DL19 = Path(__file__).parents[2] / "shared" / "data" / "trec-dl19"

#: Words of a DL19 passage (BM25's top 100): this share of them has at most so many.
SHARE_OF_WORDS = ((0.0, 12), (0.1, 36), (0.25, 44), (0.5, 55), (0.75, 80), (0.9, 99), (1.0, 193))

WORDS = """the of a in to is and for that on with by from water city year people system state world
health music river government history school market energy plant animal language cell"""


@dataclass(frozen=True)
class Request:
    """A query and its candidates.

    Attributes:
        grades: of each document, 0 to 3, or none where nobody judged them.
        ideal: the best ten grades that the query has in the whole collection.
    """

    query: str
    documents: list[str]
    grades: list[int]
    ideal: list[int]


def requests(count: int) -> list[Request]:
    """The first ``count`` queries, with 100 documents each; at most 43 are judged."""
    return _dl19()[:count] if DL19.exists() else _generated(count)


def _dl19() -> list[Request]:
    judgements: dict[str, dict[str, int]] = defaultdict(dict)
    for line in (DL19 / "qrels.dl19-passage.txt").read_text().splitlines():
        query, _, document, grade = line.split()
        judgements[query][document] = int(grade)
    found = []
    for each in json.loads((DL19 / "retrieve_results_dl19.json").read_text()):
        hits = each["hits"]
        grades = judgements[str(hits[0]["qid"])]
        found.append(
            Request(
                query=each["query"],
                documents=[hit["content"] for hit in hits],
                grades=[grades.get(hit["docid"], 0) for hit in hits],
                ideal=sorted(grades.values(), reverse=True)[:10],
            )
        )
    return found


def _generated(count: int) -> list[Request]:
    """Sentences of common words, as long as DL19's passages are."""
    source = random.Random(19)
    vocabulary = WORDS.split()

    def text(words: int) -> str:
        return " ".join(source.choices(vocabulary, k=words))

    lengths = np.interp(
        [source.random() for _ in range(100 * count)], *np.transpose(SHARE_OF_WORDS)
    )
    documents = [text(int(words)) for words in lengths]
    return [Request(text(6), documents[100 * i : 100 * (i + 1)], [], []) for i in range(count)]


def ndcg_at_10(request: Request, order: Iterable[int]) -> float:
    """nDCG@10 with linear gain (Järvelin and Kekäläinen 2002) of an order of the documents."""
    discount = 1 / np.log2(np.arange(2, 12))
    gains = np.array([request.grades[i] for i in islice(order, 10)])
    ideal = np.array(request.ideal)
    return float((gains @ discount[: len(gains)]) / (ideal @ discount[: len(ideal)]))
