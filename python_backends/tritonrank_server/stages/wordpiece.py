"""WordPiece by ``nanotoken``, for exports whose tokenizer it was seen to be equal to.

It gives the ids that ``tokenizers`` gives, in a tenth of the time, as one array; not the characters
of a token. The comparison is made as a checkpoint is exported (``export/comparison.py``), and the
card has the version that it was made with. There is nothing of the kind for BPE and Unigram: the
libraries that were tried differ from ``tokenizers`` on some texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import card

Int32 = npt.NDArray[np.int32]

#: The package, and the key of the card with its version.
NAME = "nanotoken"
#: Words that are kept with their ids, of the most that it allows.
CACHED_WORDS = 1 << 16
#: A text that is cut is read up to the first white space after so many characters a token.
CHARACTERS_PER_TOKEN = 6
#: What no token of WordPiece has in it, and no normalizer changes.
SPACE = re.compile(r"[ \n]")


class WordPiece:
    """A tokenizer's ids, without its special tokens.

    Args:
        tokenizer_json: of an export.

    Raises:
        ModuleNotFoundError: there is no ``nanotoken``.
        ValueError: the tokenizer is of another kind, or has something that it does not know.
    """

    def __init__(self, tokenizer_json: Path) -> None:
        # Only here, since it is for x86-64 and ARM alone, and whoever wants none may do without.
        import nanotoken

        nanotoken.set_cache_entries(CACHED_WORDS)
        self._tokenizer = nanotoken.WordPieceTokenizer.from_json(tokenizer_json.read_bytes())

    @classmethod
    def of(cls, folder: Path) -> WordPiece | None:
        """That of an export's folder; None if this version was not compared with it."""
        try:
            compared = card.read(folder).get(NAME) == version(NAME)
        except PackageNotFoundError:
            return None
        return cls(folder / "tokenizer.json") if compared else None

    def encode(self, texts: Sequence[str], most: int) -> list[Int32] | None:
        """The ids of each text, ``most`` at most; None if it panicked, as on no text it should."""
        try:
            ids, ends = self._tokenizer.encode_batch(
                texts, add_special_tokens=False, max_length=most, parallel=False
            )
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            return None
        ids, places = ids.view(np.int32), ends.tolist()
        return [ids[start:end] for start, end in pairwise(places)]

    def head(self, text: str, most: int) -> str:
        """As much of a text as has its first ``most`` tokens, if that is easily seen."""
        space = SPACE.search(text, CHARACTERS_PER_TOKEN * most)
        if space is None:
            return text
        head = text[: space.start()]
        found = self.encode([head], most)
        return head if found and len(found[0]) == most else text
