"""Long documents: the passages that they are read in, windows of their own tokens.

The best passage counts (MaxP: Dai and Callan 2019, https://arxiv.org/abs/1905.09217).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from math import ceil

import numpy as np

#: One row a passage: the position of its document, its first and one-past-last character, the
#: tokens that the model reads for it, and whether any text of the document is left unread.
PASSAGE = np.dtype([(name, "i4") for name in ("document", "start", "end", "tokens", "truncated")])

#: The share of its room that a window has at least, about. The shorter it is, the better an answer
#: stands out; what it has in common with the next counts less (loadtest/RESULTS.md).
SHORTEST = 0.25
#: Nor has it fewer tokens than a few sentences do, if as many fit.
SHORTEST_TOKENS = 64
#: The share of a window that it has in common with the next, at least and about.
OVERLAP = 0.125
#: How far before a window's last place a sentence's end is looked for, or a word's; likewise before
#: the next one's first.
NEAR = 0.125

#: Where a sentence ends: before white space, or at the full stops of Chinese and Japanese. With the
#: white space, so that a run of it is one match, however long.
SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？｡][」』”’）]*\s*|\n\s*")
#: Where a word does, or a clause in a script without spaces.
WORD = re.compile(r"(?<=\S)\s+|[、，；：]")


def windows(
    text: str,
    offsets: Sequence[tuple[int, int]],
    room: int,
    most: int,
    least: int = 1,
    overlap: float = OVERLAP,
    near: float = NEAR,
) -> list[tuple[int, int]]:
    """The windows of a document, from its start: each its first and one-past-last token.

    One if it fits. Else they are as short as so many windows can be that have all of it between
    them, and end at a sentence's end where one is near, or at a word's.

    Args:
        text: the document.
        offsets: of each token, its first and one-past-last character.
        room: the tokens that fit.
        most: how many windows there may be; the last is cut where its room ends.
        least: the tokens of the shortest, if there are as many.
        overlap: share of a window.
        near: share of a window.
    """
    found: list[tuple[int, int]] = []
    first, count = 0, len(offsets)
    starts = [start for start, _ in offsets]
    for left in range(most - 1, 0, -1) if count > room else ():  # Windows, beside this one.
        even = (count - first) / (1 + left * (1 - overlap - near))
        size = min(room, max(least, ceil(even)))
        if first + size >= count:
            break
        shared, slack = int(overlap * size), int(near * size)
        last = _place(text, starts, offsets, first + size - slack, first + size)
        found.append((first, last))
        first = _place(text, starts, offsets, last - shared - slack, last - shared)
    return [*found, (first, min(first + room, count))]


def end_of(text: str, offsets: Sequence[tuple[int, int]], last: int) -> int:
    """One past the last character before a token.

    What belongs to no token, as accents where they are taken off, is the one's before it; white
    space is not.
    """
    start, end = offsets[last - 1]
    return max(end, start + len(text[start : offsets[last][0]].rstrip()))


def _place(
    text: str, starts: list[int], offsets: Sequence[tuple[int, int]], low: int, high: int
) -> int:
    """The best token from ``low`` to ``high`` to begin with."""
    for ends in (SENTENCE, WORD):
        found = ends.finditer(text, starts[low - 1], starts[high] + 1)
        places = [each.start() + len(each[0].rstrip()) for each in found]
        for place in reversed(places):
            token = bisect_left(starts, place, low - 1, high)
            if token >= low and max(place, offsets[token - 1][1]) <= starts[token]:
                return token
    # Of a character that is several tokens, none is left behind.
    whole = (each for each in range(high, low - 1, -1) if offsets[each - 1][1] <= starts[each])
    return next(whole, high)
