"""What takes long, shown on a terminal, and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def shown(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, with a bar of how many are done."""
    yield from bar(what, iterable=items)


def bar(what: str, **options: Any) -> Any:
    """A bar of tqdm's, which is gone when it is full."""
    return tqdm(desc=what, leave=False, disable=None, **options)
