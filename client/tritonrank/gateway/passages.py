"""How many passages a document has, as far as its size tells: only a server tokenizes. No I/O.

Clients ask for up to 1,024 for each of their documents, most of which are short. Asked of the
server as it is, that would make a call of each document, and count as a thousand.
"""

from __future__ import annotations

#: A passage has so great a share of the model's positions to itself, or more: a query leaves half,
#: of which the next passage has three eighths in common with it at most.
OWN_SHARE = 0.25
#: Bytes of text that are expected for each position, as the server does. A token has one at least.
BYTES_PER_POSITION = 4


def most(size: int, asked: int, positions: int) -> int:
    """As many as are enough for all of a document, a power of two; or as were asked for.

    By a power of two most documents of a call are alike, and can be asked for together.

    Args:
        size: its bytes.
        asked: how many at most.
        positions: of the model.
    """
    enough = int(size / (OWN_SHARE * positions))
    return min(asked, 1 << enough.bit_length())


def expected(size: int, asked: int, positions: int) -> int:
    """As how many documents it counts: the passages of ordinary text, one at least."""
    beside = positions * BYTES_PER_POSITION // 2  # As much as a query leaves.
    return min(asked, -(-size // beside) or 1)
