"""Fields of a body, as clients of many makes send them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

#: What the objects of a request may have, all together, and how deep they may be.
MOST_VALUES, MOST_DEPTH = 100_000, 64
#: How many names a field may have a list of.
MOST_NAMES = 100
#: libyaml, where there is one: Python's takes a second for a megabyte.
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
#: What it escapes although it need not: emoji, and whatever else is beyond 16 bits.
ESCAPED = re.compile(r"\\(\\|U[0-9A-F]{8})")


class InvalidField(ValueError):
    """A field that is not understood or not supported; the message says what to send.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


def boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """Also as a string, which RAGFlow sends; null is the default."""
    value = body.get(name)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidField(name, f"is {shown(value)}: send true or false")
    return value


def integer(body: Mapping[str, Any], name: str, least: int) -> int | None:
    """A number without a fraction."""
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidField(name, f"is {shown(value)}: send an integer of {least} or more")
    return value


def share(body: Mapping[str, Any], name: str, default: float) -> float:
    """A number from 0 to 1; null is the default."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidField(name, f"is {shown(value)}: send a number from 0 to 1")
    return value


def string(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidField(name, f"is {shown(value)}: send a string")
    return value


def strings(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidField(name, f"is {shown(value)}: send a list of strings")
    if len(value) > MOST_NAMES:
        raise InvalidField(name, f"has {len(value)}: send {MOST_NAMES} at most")
    return value


def several(body: Mapping[str, Any], name: str) -> list[Any]:
    """The items of a list, one or more."""
    value = body.get(name)
    if not isinstance(value, list):
        told = "is missing" if value is None else f"is {shown(value)}"
        raise InvalidField(name, f"{told}: send a list")
    if not value:
        raise InvalidField(name, "is empty: send at least one")
    return value


def bounded(name: str, values: Sequence[object]) -> None:
    """Refuses objects that take seconds to read as YAML, or are too deep to stand in an answer."""
    left = MOST_VALUES
    for _ in range(MOST_DEPTH):
        values = [inner for each in values for inner in _inner(each)]
        left -= len(values)
        if not values:
            return
        if left < 0:
            raise InvalidField(name, f"has objects of over {MOST_VALUES} values: send texts")
    raise InvalidField(name, f"has objects nested over {MOST_DEPTH} deep: send texts")


def _inner(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def text(value: object, name: str, rank_fields: Sequence[str] = ()) -> str:
    """What is read of a query or a document.

    Args:
        value: a string; ``{"text": …}``; ``{"content": …}``, a string or parts of type text, as of
            a chat; or any other object, which is read as YAML, as Cohere recommends.
        name: of the field.
        rank_fields: those of an object that are read, as YAML.

    Raises:
        InvalidField: it has no text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise InvalidField(name, f"is {shown(value)}: send a string, or an object with text")
    if rank_fields:
        found = {field: value[field] for field in rank_fields if field in value}
        if not found:
            raise InvalidField(name, f"has none of rank_fields, {', '.join(rank_fields)[:200]}")
        return _yaml(found)
    for key in ("text", "content"):
        content = value.get(key)
        if isinstance(content, str):
            return content
        if key in value and not isinstance(content, list):
            raise InvalidField(f"{name}.{key}", f"is {shown(content)}: send a string")
    if isinstance(value.get("content"), list):
        return "\n".join(_part(each, f"{name}.content") for each in value["content"])
    if not value or "image" in value:
        raise InvalidField(name, "has no text, and only text is ranked: send a string")
    return _yaml(value)


def _part(value: object, name: str) -> str:
    if isinstance(value, dict) and value.get("type", "text") == "text":
        found = value.get("text")
        if isinstance(found, str):
            return found
    raise InvalidField(name, "has a part that is not text, and only text is ranked")


def _yaml(value: dict[str, Any]) -> str:
    wide = 2**31 - 1
    dumped = yaml.dump(value, Dumper=DUMPER, sort_keys=False, allow_unicode=True, width=wide)
    return ESCAPED.sub(lambda found: found[0] if found[1] == "\\" else _letter(found[1]), dumped)


def _letter(escape: str) -> str:
    return chr(int(escape[1:], 16))


def shown(value: object) -> str:
    """A value's own name in JSON, or its kind."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()[:40]
    return {"str": "a string", "list": "a list"}.get(type(value).__name__, "an object")
