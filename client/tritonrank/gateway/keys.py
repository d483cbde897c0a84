"""The keys of the API, from a file."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

#: Seconds between two looks at the file.
INTERVAL = 1.0

log = logging.getLogger(__name__)


class KeyFileError(ValueError):
    """The file cannot be read, or has no key."""


class Keys:
    """One key a line; read again when the file changes, and kept while it cannot be read.

    Raises:
        KeyFileError: the file cannot be read, or has no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: list[bytes] = []
        self._stamp: object = None
        self._looked = 0.0
        self._read()

    def admit(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has one of them, as a bearer token, ``api-key`` or ``x-api-key``."""
        if time.monotonic() - self._looked > INTERVAL:
            try:
                self._read()
            except KeyFileError as error:
                log.warning("%s: the keys read before stay in force", error)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given += [headers[name] for name in ("x-api-key", "api-key") if name in headers]
        digests = [sha256(each.encode()).digest() for each in given]
        # All of them, so that the time does not tell which one is near.
        return any([hmac.compare_digest(a, b) for a in digests for b in self._digests])

    def _read(self) -> None:
        self._looked = time.monotonic()
        try:
            status = self._path.stat()
            stamp = status.st_mtime_ns, status.st_ino, status.st_size
            if stamp == self._stamp:
                return
            lines = self._path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"the key file {self._path} cannot be read ({error})") from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise KeyFileError(f"the key file {self._path} has no key: write one a line")
        if not all(key.isascii() for key in keys):
            raise KeyFileError(f"the key file {self._path} has a key that is not ASCII: change it")
        self._stamp = stamp
        self._digests = [sha256(key.encode()).digest() for key in keys]
