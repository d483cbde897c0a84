"""What a caller passes, checked alike for both clients before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import numpy as np

from .protocol import Options

#: The longest timeout, in seconds.
YEAR = 365 * 86400


def text(name: str, value: object) -> str:
    """The argument, which is a string that UTF-8 has a form for."""
    if not isinstance(value, str):
        raise _mistyped(name, value, "a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half of a surrogate pair at character {error.start}, which UTF-8 has no "
            "form for: do not cut the pair, or replace it: text.encode(errors='replace').decode()"
        ) from None
    return value


def texts(name: str, values: object, remedy: str = "a list of strings") -> list[str]:
    """The argument's strings, by position: of anything that has several, in an order."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{name} is one {type(values).__name__}: pass {remedy}")
    if isinstance(values, (set, frozenset, Mapping)) or getattr(values, "ndim", 1) != 1:
        # Of a mapping or a table, iteration would give the keys or the names of the columns.
        raise _mistyped(name, values, remedy)
    try:
        iterator = iter(values)  # type: ignore[call-overload]
    except TypeError:
        raise _mistyped(name, values, remedy) from None
    return [text(f"{name}[{index}]", value) for index, value in enumerate(iterator)]


def seconds(value: object) -> float:
    """The argument ``timeout``; none is left where it is negative."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _mistyped("timeout", value, "seconds, as a number")
    if not value < YEAR:
        raise ValueError(f"timeout is {value}: pass seconds, {YEAR} at most")
    return max(0.0, float(value))


def check(query: object, top_k: object, options: Options) -> None:
    """Refuses what would reach the server as something else than was meant.

    Raises:
        TypeError: an argument of another type.
        ValueError: half of a surrogate pair.
    """
    text("query", query)
    text("request_id", options.request_id)
    for name in ("top_k", "max_passages", "max_document_tokens"):
        value = top_k if name == "top_k" else getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer, type(None))):
            raise _mistyped(name, value, "an int or None")
    if not isinstance(options.bulk, (bool, np.bool_)):
        raise _mistyped("bulk", options.bulk, "True or False")


def _mistyped(name: str, value: object, remedy: str) -> TypeError:
    return TypeError(f"{name} is of type {type(value).__name__}: pass {remedy}")
