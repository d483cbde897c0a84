"""In which windows a long document is read best; a part of ``loadtest.passages``.

Answers are planted in long documents of other queries' passages, at random tokens, so that they
stand across the windows' borders, too. To choose on are TREC DL 2021's and 2022's queries, where an
answer is the passage that the model itself scores best; to judge the choice, once, are TREC DL
2019's with NIST's judgements.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tritonrank_server.stages import tokenizer
from tritonrank_server.stages.cross_encoder import Work
from tritonrank_server.stages.passages import NEAR, OVERLAP, SHORTEST, windows
from tritonrank_server.stages.pipeline import Pipeline
from tritonrank_server.stages.tokenizer import Extent

from . import data

#: Queries with their candidates, nobody's judgement of which is used.
UNLABELLED = data.DL19.parent / "trec-dl21-22" / "unlabelled.jsonl"
#: How many queries to choose on and to judge on, and the long documents of each.
QUERIES, JUDGED, DOCUMENTS = 10, 15, 10
#: Tokens of the long documents, evenly by their logarithm, and where in them the answers stand.
LEAST, MOST_TOKENS = 1000, 4000
DEPTHS = (0.05, 0.95)
FIFTHS = 5
#: The least logit of an answer.
CLEAR = 3.0
#: As many passages as there are, of a document and of a request.
EVERY, MOST = 1000, 10**6
RESAMPLES = 10_000

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A way to read a long document.

    Attributes:
        shortest: the share of what fits that a window has at least; 1 for windows as long as fit.
        overlap: as a share of the window, and ``near``.
        passages: how many at most; None for as many as there are.
    """

    shortest: float = SHORTEST
    overlap: float = OVERLAP
    near: float = NEAR
    passages: int | None = None

    @contextmanager
    def applied(self) -> Iterator[Extent]:
        """The stages read so meanwhile; gives the extent to ask for."""
        cut = partial(windows, overlap=self.overlap, near=self.near)
        with patch.multiple(tokenizer, windows=cut, SHORTEST=self.shortest):
            yield Extent(self.passages or EVERY)


CHOSEN, CUT, LONGEST_THAT_FIT = Setting(), Setting(passages=1), Setting(1)
SETTINGS = [
    CUT,
    Setting(1, 0),
    LONGEST_THAT_FIT,
    Setting(1, near=0),
    Setting(1, 0.25),
    Setting(1, 0.5),
    Setting(0.5),
    CHOSEN,
    Setting(near=0),
    Setting(overlap=0),
    Setting(overlap=0.25),
    Setting(0.125),
    Setting(passages=16),
    Setting(passages=8),
]


@dataclass(frozen=True)
class Topic:
    """A query with passages that answer it, and others about the same that do not, or less."""

    query: str
    answers: Sequence[str]
    others: Sequence[str]


@dataclass(frozen=True)
class Case:
    """A query's long documents, each without its answer and with it, ever deeper."""

    query: str
    answers: Sequence[str]
    without: Sequence[str]
    planted: Sequence[str]


class Texts:
    """Makes long documents of a model's tokens."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()

    def places(self, text: str) -> list[tuple[int, int]]:
        """Of each token, its first and one-past-last character."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def case(self, topic: Topic, fillers: Sequence[str], source: random.Random) -> Case:
        """Documents with an answer each, from the first's near its start to the last's."""
        answers, without, planted = [], [], []
        for i in range(DOCUMENTS):
            depth = float(np.interp((i + source.random()) / DOCUMENTS, (0, 1), DEPTHS))
            tokens = int(LEAST * (MOST_TOKENS / LEAST) ** source.random())
            text = " ".join(source.sample(fillers, tokens // 20))
            text = text[: self.places(text)[tokens - 1][1]]
            answers.append(source.choice(topic.answers))
            without.append(self.plant(source.choice(topic.others), text, (depth + 0.5) % 1))
            planted.append(self.plant(answers[-1], without[-1], depth))
        return Case(topic.query, answers, without, planted)

    def plant(self, passage: str, text: str, depth: float) -> str:
        """Puts it in the place of as many tokens that begin and end a word."""
        places, size = self.places(text), len(self.places(passage))
        first = next(
            i
            for i in range(int(depth * (len(places) - size)), len(places))
            if places[i - 1][1] < places[i][0] and places[i + size - 1][1] < places[i + size][0]
        )
        return f"{text[: places[first][0]]}{passage} {text[places[first + size][0] :]}"


class Scorer:
    """Logits of documents of one query at a time; no passage is scored twice."""

    def __init__(self, pipeline: Pipeline, query: str) -> None:
        self._pipeline, self._query = pipeline, query.encode()
        self._known: dict[bytes, float] = {}

    def logits(self, documents: Sequence[str], setting: Setting = CUT) -> tuple[Floats, int]:
        """The best passage's of each, and the tokens that are read in all."""
        with setting.applied() as extent:
            texts = [text.encode() for text in documents]
            pairs = self._pipeline.tokenizer.read(self._query, texts, extent)
            [tokens] = self._pipeline.tokenizer.encode([pairs])
        rows = {each.input_ids.tobytes(): each for each in tokens.documents()}
        new = [ids for ids in rows if ids not in self._known]
        found = self._pipeline.cross_encoder.score([Work(rows[ids]) for ids in new])
        self._known |= {ids: each.logits.item() for ids, each in zip(new, found) if each}
        logits = np.full(len(documents), -np.inf)
        passages = [self._known[each.input_ids.tobytes()] for each in tokens.documents()]
        np.maximum.at(logits, tokens.passages["document"], passages)
        return logits, int(tokens.lengths.sum())


def unlabelled(pipeline: Pipeline, source: random.Random) -> Iterator[tuple[Topic, list[str]]]:
    """Queries that the model answers clearly, with what it thinks their best passage.

    Each comes with other queries' passages. The others about the same are the lower half of its
    own.
    """
    every = [json.loads(line) for line in UNLABELLED.read_text().splitlines()]
    for each in source.sample(every, len(every)):
        query, documents = each["query"], each["documents"]
        logits, _ = Scorer(pipeline, query).logits(documents)
        ranked = [documents[i] for i in np.argsort(-logits)]
        if logits.max() > CLEAR:
            fillers = [text for other in every if other is not each for text in other["documents"]]
            yield Topic(query, ranked[:1], ranked[len(ranked) // 2 :]), fillers


def judged(source: random.Random) -> Iterator[tuple[Topic, list[str]]]:
    """Those of DL19: answers have grade 2 or 3, the others about the same have 0."""
    every = data.requests(10**9)
    for each in source.sample(every, len(every)):
        graded = list(zip(each.documents, each.grades))
        answers = [text for text, grade in graded if grade >= 2]
        others = [text for text, grade in graded if grade == 0]
        if answers and others:
            fillers = [text for other in every if other is not each for text in other.documents]
            yield Topic(each.query, answers, others), fillers


def study(folder: Path) -> dict[str, list[Row]]:
    """Of an export: a row for each setting to choose on, and two of what was chosen to judge on."""
    pipeline, texts = Pipeline.of(folder, MOST), Texts(folder)
    source, of_judged = random.Random(0), random.Random(0)
    clear = islice(unlabelled(pipeline, source), QUERIES)
    graded = islice(judged(of_judged), JUDGED)
    return {
        "chosen_on": _rows(pipeline, texts, clear, SETTINGS, source),
        "judged_on": _rows(pipeline, texts, graded, [CUT, LONGEST_THAT_FIT, CHOSEN], of_judged),
    }


def _rows(
    pipeline: Pipeline,
    texts: Texts,
    topics: Iterable[tuple[Topic, list[str]]],
    settings: Sequence[Setting],
    source: random.Random,
) -> list[Row]:
    found: dict[Setting, list[Floats]] = {setting: [] for setting in settings}
    read, once = dict.fromkeys(settings, 0), 0
    for topic, fillers in topics:
        case = texts.case(topic, fillers, source)
        scorer = Scorer(pipeline, case.query)
        own, _ = scorer.logits(case.answers)
        once += sum(len(texts.places(text)) for text in case.without)
        for setting in settings:
            without, tokens = scorer.logits(case.without, setting)
            planted, _ = scorer.logits(case.planted, setting)
            read[setting] += tokens
            found[setting].append(np.stack((own, without, planted)))
    every = {setting: np.stack(each, axis=1) for setting, each in found.items()}
    return [
        {**vars(setting), "read": read[setting] / once, **summary(each, every[CHOSEN])}
        for setting, each in every.items()
    ]


def summary(found: Floats, chosen: Floats) -> Row:
    """Of logits [the answers' own, without them, with them; queries; documents].

    What is more is more than with the chosen setting.
    """
    own, without, planted = found
    right = planted > without
    ranks = _reciprocal_ranks(found)
    return {
        "pairs": right.size,
        "right": int(right.sum()),
        "right_by_fifth": right.reshape(len(right), FIFTHS, -1).mean(axis=(0, 2)).tolist(),
        "mrr": float(ranks.mean()),
        "more_mrr": _mean_and_interval(ranks - _reciprocal_ranks(chosen)),
        "median_lost": float(np.median(own - planted)),
        "more_logit": _mean_and_interval(planted - chosen[2]),
    }


def _reciprocal_ranks(found: Floats) -> Floats:
    """Of each document with its answer among all of the query's without."""
    _, without, planted = found
    ranks: Floats = 1 / (1 + (without[:, None, :] >= planted[:, :, None]).sum(axis=2))
    return ranks


def _mean_and_interval(values: Floats) -> list[float]:
    """The mean, and in which interval 95 % of the means of resampled queries are."""
    of_queries = values.mean(axis=1)
    drawn = np.random.default_rng(0).choice(of_queries, (RESAMPLES, len(of_queries)))
    return [float(values.mean()), *np.quantile(drawn.mean(axis=1), (0.025, 0.975)).tolist()]
