"""A ranking as text, for terminals."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Sequence

from .protocol import RankedDocument

#: What a terminal would obey, in place of showing it.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def format_table(ranking: Sequence[RankedDocument]) -> str:
    """Rank, score, logit, index and text, a line each, cut to the terminal's width.

    The text is the passage that gave the logit, after its characters where it is not all, and
    ``cut`` where not all of the document was read.
    """
    lines = ["rank   score    logit  index  document"]
    room = max(20, shutil.get_terminal_size().columns - len(lines[0]) + len("document"))
    for rank, each in enumerate(ranking, 1):
        start, end = each.passage or (0, len(each.document))
        place = f"[{start}:{end}{', cut' if each.truncated else ''}] " if each.read else ""
        words = " ".join(each.document[start:end].split())
        text = _cut(place + CONTROL.sub("\N{REPLACEMENT CHARACTER}", words), room)
        lines.append(f"{rank:4}  {each.score:.4f}  {each.logit:7.3f}  {each.index:5}  {text}")
    return "\n".join(lines)


def _cut(text: str, columns: int) -> str:
    """The text, or as much of it as fits with an ellipsis."""
    used = 0
    for position, character in enumerate(text):
        used += _columns(character)
        if used > columns:
            kept = text[:position]
            while kept and sum(map(_columns, kept)) > columns - 1:
                kept = kept[:-1]
            return kept + "…"
    return text


def _columns(character: str) -> int:
    """Columns a character takes: East Asian wide ones two, combining ones none."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
