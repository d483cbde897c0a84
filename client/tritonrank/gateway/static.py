"""What is served as it is: the page, and the API's description."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from importlib.resources import files

import orjson
from starlette.responses import Response


@dataclass
class Static:
    """A file that is served as it is."""

    content: bytes
    kind: str
    headers: dict[str, str]

    def response(self) -> Response:
        return Response(self.content, media_type=self.kind, headers=self.headers)


def every() -> dict[str, Static]:
    """By path."""
    document = files(__package__).joinpath("openapi.json").read_bytes()
    return {
        "": _page(),
        "openapi.json": Static(document, "application/json", {}),
        "docs": _docs(document),
    }


def _page() -> Static:
    """The page, which may run its own script and style, and nothing else."""
    content = files(__package__).joinpath("index.html").read_bytes()
    hashes = {}
    for element in (b"script", b"style"):
        [inner] = re.findall(rb"<%b>(.*?)</%b>" % (element, element), content, re.DOTALL)
        digest = base64.b64encode(sha256(inner).digest()).decode()
        hashes[element.decode()] = f"'sha256-{digest}'"
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Static(content, "text/html; charset=utf-8", headers)


def _docs(document: bytes) -> Static:
    """What the OpenAPI document says of each path, for people."""
    content = orjson.loads(document)
    rows = [
        f"<dt><code>{method.upper()} {path}</code></dt><dd>{escape(each['summary'])}</dd>"
        for path, methods in content["paths"].items()
        for method, each in methods.items()
    ]
    text = (
        '<!doctype html><html lang="en"><meta name="viewport" content="width=device-width">'
        f"<title>tritonrank</title><h1>tritonrank</h1><p>{escape(content['info']['description'])}"
        f'</p><dl>{"".join(rows)}</dl><p>All of it: <a href="openapi.json">openapi.json</a>. '
        '<a href="./">Try it</a>.</p></html>'
    )
    headers = {"content-security-policy": "default-src 'none'"}
    return Static(text.encode(), "text/html; charset=utf-8", headers)
