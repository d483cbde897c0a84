"""Long documents: ``python -m loadtest.passages``, into ``results/passages``.

How well they are ranked, by windows and overlaps (``planted``), and what they cost: cut, in
passages, and whole, where a model takes them whole.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tritonrank_server.stages.pipeline import Pipeline
from tritonrank_server.stages.tokenizer import Extent

from . import planted
from .bench import HERE, commit, hardware, new_repository
from .data import WORDS
from .large import write_checkpoint
from .planted import EVERY, MOST, Texts

RESULTS = HERE / "results" / "passages"
DEFAULT = HERE.parent / "model_repository" / "cross_encoder" / "current"
#: A model of random weights that takes a long document whole, and where it is told to cut.
LONG, SHORT_LENGTH, WHOLE_LENGTH = "xlm-roberta-small-8192", 512, 8192
#: Tokens of the documents of a request, how many these are, and how often it is sent.
TOKENS, DOCUMENTS, TURNS = 4000, 2, 7

Row = dict[str, Any]


def cost() -> dict[str, list[Row]]:
    """Of each model, a row for each way to read a long document."""
    with tempfile.TemporaryDirectory() as scratch:
        short, long = _exports(Path(scratch))
        return {
            "default": _by_turns(_ways(DEFAULT)),
            LONG: _by_turns({**_ways(short), "whole": (long, 1)}),
        }


def _ways(folder: Path) -> dict[str, tuple[Path, int]]:
    return {
        "cut": (folder, 1),
        "in ten passages, as long as fit": (folder, 10),
        "in the shortest": (folder, EVERY),
    }


def _exports(scratch: Path) -> list[Path]:
    """Two of the same weights, of which one is told to cut."""
    checkpoint, found = scratch / LONG, []
    write_checkpoint(LONG, checkpoint)
    config = checkpoint / "tokenizer_config.json"
    for length in (SHORT_LENGTH, WHOLE_LENGTH):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": length}))
        repository = new_repository(scratch / str(length))
        command = [sys.executable, "-m", "tritonrank", "export", str(checkpoint)]
        subprocess.run([*command, f"--model-repository={repository}"], check=True)
        found.append(repository / "cross_encoder" / "current")
    return found


def _by_turns(ways: dict[str, tuple[Path, int]]) -> list[Row]:
    """Medians of one request, which each way has in turn."""
    pipelines = {folder: Pipeline.of(folder, MOST) for folder, _ in ways.values()}
    words = " ".join(random.Random(0).choices(WORDS.split(), k=TOKENS))
    texts = {each: words[: Texts(each).places(words)[TOKENS - 1][1]] for each in pipelines}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens = {}
    for _ in range(TURNS):
        for way, (folder, passages) in ways.items():
            begun = time.perf_counter()
            ranking = pipelines[folder].rank(
                "water", [texts[folder]] * DOCUMENTS, None, Extent(passages)
            )
            seconds[way].append(time.perf_counter() - begun)
            assert ranking.read
            tokens[way] = int(ranking.read.tokens.sum())
    return [
        {"way": way, "tokens": tokens[way], "ms": 1000 * float(np.median(seconds[way]))}
        for way in ways
    ]


def main() -> None:
    """Measures all of it, and writes ``cpu.json``."""
    if not planted.UNLABELLED.exists():
        raise SystemExit(f"No {planted.UNLABELLED}: MS MARCO's text is no part of this project")
    result = {"commit": commit(), "hardware": hardware(), "cost": cost(), **planted.study(DEFAULT)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = Path(RESULTS / "cpu.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
