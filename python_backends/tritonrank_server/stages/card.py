"""The card of an export, ``export.json``: what it was made of, and how."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

NAME = "export.json"


def read(folder: Path) -> dict[str, Any]:
    """The card of an export's folder."""
    card: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return card


def identity(folder: Path) -> bytes:
    """What clients are told of the model that answers: JSON, the same for the same export.

    ``revision`` stands for all files of the export, whose hashes are on the card.
    """
    card = read(folder)
    name = card["checkpoint"]
    content = {
        # Where a local folder lies is nobody's business.
        "name": Path(name).name if name[0] in "/.~" else name,
        "precision": card["precision"],
        "max_length": card["max_length"],
        # Exports made before 0.4 do not tell, and most are sigmoids.
        "activation": card.get("activation", "Sigmoid"),
        "revision": sha256((folder / NAME).read_bytes()).hexdigest()[:16],
    }
    return json.dumps(content, ensure_ascii=False).encode()
