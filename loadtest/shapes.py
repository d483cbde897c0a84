"""How the number of users changes, by ``--shape``, with this file given to ``-f``, too.

With ``ArrivalUser`` the users are requests a second, so these are shapes of the offered load, too.
"""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape, events


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("shape")
    group.add_argument("--shape", choices=SHAPES, default="ramp", help="how users change")
    group.add_argument("--peak", type=int, default=10, help="the most users")
    group.add_argument("--period", type=float, default=60, help="seconds of the whole shape")


def ramp(progress: float) -> float:
    """From none to the peak, evenly."""
    return progress


def step(progress: float) -> float:
    """A quarter of the peak more at each quarter of the period."""
    return (int(4 * progress) + 1) / 4


def spike(progress: float) -> float:
    """A tenth of the peak, but all of it in the middle fifth."""
    return 1.0 if 0.4 <= progress < 0.6 else 0.1


def soak(progress: float) -> float:
    """The peak, all the time."""
    return 1.0


SHAPES = {each.__name__: each for each in (ramp, step, spike, soak)}


class Shape(LoadTestShape):  # type: ignore[misc]
    """The shape that was asked for, until its period is over."""

    def tick(self) -> tuple[int, float] | None:
        """How many users there are to be, and how many of them a second may start."""
        options = self.runner.environment.parsed_options
        progress = self.get_run_time() / options.period
        if progress >= 1:
            return None
        users = max(1, round(options.peak * SHAPES[options.shape](progress)))
        return users, options.peak
