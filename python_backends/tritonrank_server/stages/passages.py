"""Long documents: the passages that they are read in, windows of their own tokens.

The best passage counts (MaxP: Dai and Callan 2019, https://arxiv.org/abs/1905.09217).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

#: One row a passage: the position of its document, its first and one-past-last character, the
#: tokens that the model reads for it, and whether any text of the document is left unread.
PASSAGE = np.dtype([(name, "i4") for name in ("document", "start", "end", "tokens", "truncated")])

#: The share of its room that a window has in common with the next, at least and about. Of 100
#: planted answers 78 are ranked right: 73 with none, 81 with a quarter; with a half 92, but for 1.7
#: times the tokens (loadtest/RESULTS.md).
OVERLAP = 0.125
#: How far before a window's last place a sentence's end is looked for, or a word's; likewise before
#: the next one's first. Without it 80, which is not distinguishable, but with half in common 88.
NEAR = 0.125

#: Where a sentence ends: before white space, or at the full stops of Chinese and Japanese.
SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s)|[。！？｡][」』”’）]*|(?=\n)")
#: Where a word does, or a clause in a script without spaces.
WORD = re.compile(r"(?<=\S)(?=\s)|[、，；：]")


def windows(
    text: str,
    offsets: Sequence[tuple[int, int]],
    room: int,
    most: int,
    overlap: float = OVERLAP,
    near: float = NEAR,
) -> list[tuple[int, int]]:
    """The windows of a document, from its start: each its first and one-past-last token.

    All have as many tokens as fit, less those behind the last end of a sentence, or of a word.

    Args:
        text: the document.
        offsets: of each token, its first and one-past-last character.
        room: the tokens that fit.
        most: how many windows there may be; the last is cut where its room ends.
        overlap: share of the room.
        near: share of the room.
    """
    shared, slack = int(overlap * room), int(near * room)
    starts = [start for start, _ in offsets]
    found: list[tuple[int, int]] = []
    first = 0
    while first + room < len(offsets) and len(found) < most - 1:
        last = _place(text, starts, offsets, first + room - slack, first + room)
        found.append((first, last))
        first = _place(text, starts, offsets, last - shared - slack, last - shared)
    return [*found, (first, min(first + room, len(offsets)))]


def _place(
    text: str, starts: list[int], offsets: Sequence[tuple[int, int]], low: int, high: int
) -> int:
    """The best token from ``low`` to ``high`` to begin with."""
    for end in (SENTENCE, WORD):
        places = [each.end() for each in end.finditer(text, starts[low - 1], starts[high] + 1)]
        for place in reversed(places):
            token = bisect_left(starts, place, low, high)
            if max(place, offsets[token - 1][1]) <= starts[token]:
                return token
    # Of a character that is several tokens, none is left behind.
    while high > low and offsets[high - 1][1] > starts[high]:
        high -= 1
    return high
