"""Fields of a body, as clients of many makes send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


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
        raise InvalidField(name, f"is {_shown(value)}: send true or false")
    return value


def integer(body: Mapping[str, Any], name: str, least: int) -> int | None:
    """A number without a fraction."""
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidField(name, f"is {_shown(value)}: send an integer of {least} or more")
    return value


def string(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidField(name, f"is {_shown(value)}: send a string")
    return value


def strings(body: Mapping[str, Any], name: str) -> list[str]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidField(name, f"is {_shown(value)}: send a list of strings")
    return value


def several(body: Mapping[str, Any], name: str) -> list[Any]:
    """The items of a list, one or more."""
    value = body.get(name)
    if not isinstance(value, list):
        raise InvalidField(name, f"is {_shown(value)}: send a list")
    if not value:
        raise InvalidField(name, "is empty: send at least one")
    return value


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
        raise InvalidField(name, f"is {_shown(value)}: send a string, or an object with text")
    if rank_fields:
        found = {field: value[field] for field in rank_fields if field in value}
        if not found:
            raise InvalidField(name, f"has none of rank_fields, {', '.join(rank_fields)}")
        return _yaml(found)
    for key in ("text", "content"):
        if isinstance(value.get(key), str):
            content: str = value[key]
            return content
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
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=2**31))


def _shown(value: object) -> str:
    """A value's own name in JSON, or its kind."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return str(value).lower()[:40]
    return {"str": "a string", "list": "a list"}.get(type(value).__name__, "an object")
