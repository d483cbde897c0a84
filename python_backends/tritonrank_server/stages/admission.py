"""Which requests are taken: as many as memory holds, and none whose deadline cannot be met.

A request that waits in vain costs its client the wait, and a server that computes for clients who
have gone does nothing for those who have not. So what a request would have to wait for is known
before it is taken: the stages of a server share a ledger, in which the tokenizer enters requests,
and from which the sorter strikes them out. Between the two they go in the order of their coming.

No stage learns of a request that is given up on its way. It is struck out with the next one behind
it, or forgotten when all that was taken should be done. So that a long one that is gone does not
keep others away meanwhile, one is taken all the same where no answer has come for a while: a scout,
whose own answer tells that the way is free.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from operator import add, le, sub
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import Overloaded
from .passages import NEAR, OVERLAP, SHORTEST, SHORTEST_TOKENS

Float64 = npt.NDArray[np.float64]

#: Bytes of text that are read for each position of the model, about. Work is counted in them, since
#: they are known before a text is tokenized, which would cost as much as a GPU takes for the rest.
BYTES_PER_POSITION = 4
#: What a request costs however short it is; else the pace of short ones would be far above others'.
OWN_WORK = 4096
#: The pace is a mean over so much work, about seven requests of 100 passages: answers come by
#: twos, where two executions run at a time.
PACE_OF = 2.0**18
#: The share of a deadline that a request may be expected to take, since it may take more: a server
#: whose queue is as long as its deadlines works for clients who are gone.
SHARE_OF_TIMEOUT = 0.75
#: The share up to which its own work counts: by a pace of smaller requests it may be overestimated,
#: and it must not be refused for that alone.
OWN_SHARE_OF_TIMEOUT = 0.5


class Size(NamedTuple):
    """What a request asks for.

    Attributes:
        work: bytes of text that the model reads, queries included; time grows with them.
        documents: how many, each counted once for each passage of it.
        memory: bytes of text that are held until it is answered.
    """

    work: float
    documents: float
    memory: float

    @classmethod
    def of(
        cls, query: bytes, documents: Sequence[bytes], positions: int, most: Sequence[int]
    ) -> Size:
        """That of a request to a model of so many positions, with the most passages of each."""
        room = BYTES_PER_POSITION * positions
        asked = min(len(query), room // 2)  # A query takes half of the positions at most.
        lengths = [len(document) for document in documents]
        found = [_passages(*each, asked, room - asked) for each in zip(lengths, most)]
        work = OWN_WORK + sum(count * (asked + size) for count, size in found)
        return cls(work, sum(count for count, _ in found), len(query) + sum(lengths))


def _passages(length: int, most: int, query: int, room: int) -> tuple[int, float]:
    """How many passages a document is expected to have, and the bytes of each."""
    if length <= room or most == 1:
        return 1, min(length, room)
    step = 1 - OVERLAP - NEAR
    shortest = max(SHORTEST * room, SHORTEST_TOKENS * BYTES_PER_POSITION, query)
    size = min(room, max(shortest, length / (1 + (most - 1) * step)))
    return min(most, 1 + ceil((length - size) / (step * size))), size


#: After so many seconds without an answer a scout is sent, and not before twice the time that the
#: slowest of the last answers took. One that has none itself is gone after so many seconds.
QUIET, SCOUT = 1.0, 60.0

UNBOUNDED = Size(math.inf, math.inf, math.inf)


@dataclass
class _Queue:
    """A part of the ledger.

    Attributes:
        until, since, scout: by the system's monotonic clock, in seconds: when all that was taken
            should be done, when the last answer came, and when a scout that has none by then is
            gone.
        pace, slowest: seconds for a unit of work, and for an answer.
        taken, answered: sizes, added up.
    """

    until: float
    since: float
    scout: float
    pace: float
    slowest: float
    taken: Size
    answered: Size


#: A queue in the file: as many numbers as it has, of which three are a size's.
_LAYOUT = Struct("5d3d3d")


class Ledger:
    """What was taken and is not yet answered, shared by the processes of a server.

    It has two queues, of interactive requests and of bulk ones, which go after all others, and wait
    for as long as their clients do.

    Args:
        path: a file in memory, made where it is not there. What a server that is gone left in it
            does no harm.
        most: what may wait in a queue.
    """

    def __init__(self, path: Path, most: Size = UNBOUNDED) -> None:
        self._path, self._most = path, most
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.ftruncate(self._file, mmap.PAGESIZE)
        self._queues = mmap.mmap(self._file, mmap.PAGESIZE)

    def close(self) -> None:
        """Removes the file; those who have it go on with it."""
        self._path.unlink(missing_ok=True)

    def take(self, size: Size, timeout: float = math.inf, bulk: bool = False) -> Float64:
        """Enters a request; gives its ticket, FP64 [6], for ``strike_out``.

        Args:
            size: of the request.
            timeout: seconds until its deadline.
            bulk: whether it goes after all that are not.

        Raises:
            Overloaded: too much waits already, or more than its deadline leaves time for.
        """
        with self._locked(bulk) as queue:
            now, pace = time.monotonic(), queue.pace
            wait = max(0.0, queue.until - now)
            try:
                if wait or not pace:  # Else all that was taken and has no answer is gone.
                    self._check_room(queue, size)
                if wait and not bulk:
                    _check_deadline(wait, pace * size.work, timeout)
            except Overloaded:
                free = max(queue.since + max(QUIET, 2 * queue.slowest), queue.scout)
                if now <= free or pace * size.work > QUIET:  # A long one would cost too much.
                    raise
                queue.scout = now + min(timeout, SCOUT)
            spent = min(pace * size.work, timeout)  # No more than that.
            units = spent / pace if pace else size.work
            queue.taken = Size(*map(add, queue.taken, size._replace(work=units)))
            queue.until = now + wait + spent
            return np.array([bulk, now, size.work, *queue.taken])

    def strike_out(self, ticket: Float64) -> None:
        """Notes that a request has its answer, and with it all that were taken before it.

        How long it took, since it was taken or since the answer before, tells the server's pace.
        """
        bulk, taken_at, work, *rest = ticket.tolist()
        position = Size(*rest)
        with self._locked(bool(bulk)) as queue:
            now = time.monotonic()
            # Whoever reaches the sorter can send one that was never given.
            if not (taken_at <= now and 1 <= work < math.inf and min(position) >= 0):
                return
            if not all(map(le, position, queue.taken)):
                return
            seconds = max(0.0, now - max(queue.since, taken_at))
            weight = min(1.0, work / PACE_OF) if queue.pace else 1.0
            queue.pace += weight * (seconds / work - queue.pace)
            queue.slowest = max(seconds, queue.slowest / 2)
            queue.since, queue.scout = now, 0
            if position.work > queue.answered.work:  # Else one that was taken later was first.
                queue.answered = position
            left = queue.taken.work - queue.answered.work
            queue.until = now + queue.pace * left

    @contextmanager
    def _locked(self, bulk: bool) -> Iterator[_Queue]:
        place = bulk * _LAYOUT.size
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            until, since, scout, pace, slowest, *sizes = _LAYOUT.unpack_from(self._queues, place)
            taken, answered = Size(*sizes[:3]), Size(*sizes[3:])
            queue = _Queue(until, since, scout, pace, slowest, taken, answered)
            yield queue
            times = (queue.until, queue.since, queue.scout, queue.pace, queue.slowest)
            _LAYOUT.pack_into(self._queues, place, *times, *queue.taken, *queue.answered)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _check_room(self, queue: _Queue, size: Size) -> None:
        waiting = map(sub, queue.taken, queue.answered)
        _, documents, memory = map(add, waiting, size)
        if documents > self._most.documents or memory > self._most.memory:
            raise Overloaded(
                f"{documents:.0f} documents with {memory / 2**20:.0f} MiB of text would wait, and "
                f"{self._most.documents:.0f} with {self._most.memory / 2**20:.0f} MiB may: try "
                "again later, or another server"
            )


def _check_deadline(wait: float, work: float, timeout: float) -> None:
    if wait + min(work, OWN_SHARE_OF_TIMEOUT * timeout) > SHARE_OF_TIMEOUT * timeout:
        raise Overloaded(
            f"the work before this request takes about {wait:.1f} s, and its own {work:.1f} s, for "
            f"which its timeout of {timeout:.1f} s has no room: try again later, another server, "
            "or a longer timeout"
        )
