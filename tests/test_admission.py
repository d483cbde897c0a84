"""Which requests are taken, by a clock of the test's own; the real server is in ``test_server``."""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tritonrank_server.errors import Overloaded
from tritonrank_server.stages.admission import Ledger, Size


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", Size(math.inf, 1000, 1e6))


def request(documents: int = 100) -> Size:
    return Size(work=4096 + 400 * documents, documents=documents, memory=400 * documents)


def paced(ledger: Ledger, clock: Clock, seconds: float = 1.0) -> None:
    """Lets the ledger see that a request of 100 documents takes so long."""
    ticket = ledger.take(request())
    clock.now += seconds
    ledger.strike_out(ticket)


def test_size_counts_what_is_read_and_what_is_held() -> None:
    size = Size.of(b"tea", [b"x" * 100, b"", b"y" * 5000], 512, [1, 1, 1])
    assert size == Size(work=4096 + 103 + 3 + 2048, documents=3, memory=3 + 5100)


def test_an_idle_server_takes_any_request(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock, 10)
    ledger.take(request(), timeout=0.001)


def test_a_deadline_behind_the_work_that_waits_is_refused(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock)
    tickets = [ledger.take(request()) for _ in range(3)]
    with pytest.raises(Overloaded, match=r"about 3\.0 s, and its own 1\.0 s, .* timeout of 4\.0 s"):
        ledger.take(request(), timeout=4)
    ledger.take(request(), timeout=6)
    ledger.take(request())  # No deadline.
    clock.now += 1
    ledger.strike_out(tickets[0])
    ledger.take(request(), timeout=8)
    clock.now += 1.5  # Two at once: one is a half second late, and the next one early.
    ledger.strike_out(tickets[1])
    ledger.strike_out(tickets[2])
    with pytest.raises(Overloaded):
        ledger.take(request(), timeout=2)


def test_the_pace_is_that_of_what_was_done(ledger: Ledger, clock: Clock) -> None:
    """Of what was given up on its way nothing was done; and two at a time end in any order."""
    paced(ledger, clock)
    for _ in range(20):
        tickets = [ledger.take(request()) for _ in range(4)]
        clock.now += 2
        ledger.strike_out(tickets[3])
        ledger.strike_out(tickets[1])
    ledger.take(request())
    ledger.take(request())
    with pytest.raises(Overloaded, match=r"about 1\.8 s, and its own 0\.9 s"):
        ledger.take(request(), timeout=3)


def test_a_refused_request_leaves_no_trace(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock)
    ledger.take(request())
    for _ in range(100):
        with pytest.raises(Overloaded):
            ledger.take(request(), timeout=1)
    ledger.take(request(), timeout=3)


def test_a_short_first_request_does_not_set_the_pace_of_long_ones(
    ledger: Ledger, clock: Clock
) -> None:
    ticket = ledger.take(Size.of(b"a", [b""], 512, [1]))
    clock.now += 0.01
    ledger.strike_out(ticket)
    for _ in range(4):
        ledger.take(Size.of(b"tea", [b"x" * 400] * 100, 512, [1] * 100), timeout=1)


def test_a_large_request_is_not_judged_by_the_pace_of_small_ones(
    ledger: Ledger, clock: Clock
) -> None:
    for _ in range(1000):
        ticket = ledger.take(request(1))
        clock.now += 0.1  # As a hundred of them take.
        ledger.strike_out(ticket)
    ledger.take(request(1))
    ledger.take(request(1), timeout=1)
    ledger.take(request(300), timeout=1)


@pytest.mark.parametrize(
    ("size", "message"),
    [(Size(0, 800, 0), "1100 documents"), (Size(0, 1, 980_000), r"1 MiB .* 1000 with 1 MiB may")],
)
def test_what_waits_is_bounded(ledger: Ledger, clock: Clock, size: Size, message: str) -> None:
    paced(ledger, clock)
    tickets = [ledger.take(request()) for _ in range(3)]
    with pytest.raises(Overloaded, match=message):
        ledger.take(size)
    for ticket in tickets:
        clock.now += 1
        ledger.strike_out(ticket)
    ledger.take(size)


@pytest.mark.parametrize("followed", [True, False])
def test_what_was_given_up_on_its_way_is_forgotten(
    ledger: Ledger, clock: Clock, followed: bool
) -> None:
    paced(ledger, clock)
    ledger.take(request(900))  # No answer will come.
    if followed:
        ticket = ledger.take(request(50))
        clock.now += 0.5
        ledger.strike_out(ticket)
    else:
        clock.now += 9.5
    ticket = ledger.take(request(900))
    clock.now += 9
    ledger.strike_out(ticket)
    ledger.take(request(900))
    ledger.take(request(100))


def test_a_long_one_that_is_gone_keeps_nobody_away_for_long(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock)
    ledger.take(request(900))  # Cancelled.
    clock.now += 1.9
    with pytest.raises(Overloaded):
        ledger.take(request(1), timeout=5)
    clock.now += 0.2
    scout = ledger.take(request(1), timeout=5)
    with pytest.raises(Overloaded):
        ledger.take(request(1), timeout=5)
    clock.now += 0.01
    ledger.strike_out(scout)
    ledger.take(request(1), timeout=5)


def test_where_all_of_it_is_there_one_scout_is_sent_in_its_time(
    ledger: Ledger, clock: Clock
) -> None:
    paced(ledger, clock)
    ledger.take(request(900))
    taken = []
    for second in range(1, 9):
        clock.now += 0.9
        with suppress(Overloaded):
            ledger.take(request(1), timeout=0.5 * second)
            taken.append(second)
    assert taken == [3, 5, 7, 8]  # The last two are none: by then there is time.


def test_a_deadline_bounds_what_is_spent(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock)
    ledger.take(request(500), timeout=2)  # It takes 5 s, and is given up after 2.
    ledger.take(request(), timeout=4.5)
    with pytest.raises(Overloaded, match=r"about 3\.0 s"):
        ledger.take(request(), timeout=4.5)


def test_bulk_waits_behind_all_others_and_holds_none_of_them_up(
    ledger: Ledger, clock: Clock
) -> None:
    paced(ledger, clock)
    for _ in range(10):
        ledger.take(request(), timeout=1, bulk=True)
    ledger.take(request(), timeout=2)
    ledger.take(request(), bulk=True)  # A scout: never has any answer come.
    with pytest.raises(Overloaded, match="1200 documents"):
        ledger.take(request(), bulk=True)


def test_tickets_that_were_never_given_change_nothing(ledger: Ledger, clock: Clock) -> None:
    paced(ledger, clock)
    ledger.take(request())
    ticket = ledger.take(request())
    for forged in (math.nan, math.inf):
        for i in range(1, len(ticket)):
            ledger.strike_out(np.where(np.arange(len(ticket)) == i, forged, ticket))
    ledger.strike_out(0 * ticket)
    with pytest.raises(Overloaded, match=r"about 2\.0 s"):
        ledger.take(request(), timeout=1)


def _take(path: Path, count: int) -> None:
    ledger = Ledger(path)
    for _ in range(count):
        ledger.take(request())


def test_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path, Size(math.inf, 400_050, math.inf))
    clock = time.monotonic()
    ticket = ledger.take(Size(1, 0, 0))
    while time.monotonic() < clock + 0.001:
        pass
    ledger.strike_out(ticket)
    processes = [multiprocessing.Process(target=_take, args=(path, 1000)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    ledger.take(request(50))
    with pytest.raises(Overloaded, match="400051 documents"):
        ledger.take(request(1))
    ledger.close()
    assert not path.exists()


@pytest.mark.parametrize("load", [1.5, 3.0, 10.0])
def test_under_overload_what_is_taken_is_answered_in_time(
    ledger: Ledger, clock: Clock, load: float
) -> None:
    """Random arrivals at one server, of requests of all sizes, whose pace is not steady."""
    source = random.Random(load)
    free = start = clock.now  # When the server has done what it was given.
    under_way: list[tuple[float, float, np.ndarray]] = []
    late = in_time = 0.0
    while clock.now < start + 2000:
        size = request(source.choice([1, 10, 10, 100, 100, 300]))
        clock.now += source.expovariate(load * 100 / 86.8)
        arrived = clock.now
        while under_way and under_way[0][0] <= arrived:
            clock.now, seconds, ticket = under_way.pop(0)
            ledger.strike_out(ticket)
        clock.now = arrived
        try:
            ticket = ledger.take(size, timeout=10)
        except Overloaded:
            continue
        seconds = size.documents / 100 * source.uniform(0.8, 1.2)
        free = max(free, arrived) + seconds
        under_way.append((free, seconds, ticket))
        if free - arrived <= 10:
            in_time += seconds
        else:
            late += seconds
    assert in_time / (clock.now - start) > 0.95
    assert late < 0.01 * in_time  # At first the pace is not known.
