"""Whether ``nanotoken`` reads what an exported tokenizer reads: the proof that its card stands for.

Of two programs on all texts there is no proof; so this goes through all characters, in contexts in
which the rules of a WordPiece tokenizer (normalisation, where words end, what belongs to one) can
tell them apart, and through many random texts of what these rules know.
"""

from __future__ import annotations

import random
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from ..stages.wordpiece import NAME, Int32, WordPiece
from .progress import shown
from .reading import COMPATIBLE, EDGES, SCRIPTS

#: Where a character stands: alone; within a word of letters, of accents, of Hangul and ideographs.
CONTEXTS = ("{}", "a{}b", "e\u0301{}\u0301", "한{}漢")
#: Ideographs, syllables, and planes without characters, which rules know by their ranges: of these
#: one in so many stands in other contexts than alone.
UNIFORM = (
    *(range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0x17000, 0x18E00)),
    *(range(0x20000, 0xE0000), range(0xE1000, sys.maxunicode + 1)),
)
ONE_IN = 16
#: Characters to a text, each a word, and texts to a call.
WORDS, TEXTS = 64, 512
RANDOM_TEXTS = 20_000
#: Tokens that a text is cut to.
LENGTHS = (1, 7, 64, 513)


def wordpiece(tokenizer_json: Path) -> WordPiece | None:
    """The tokenizer by ``nanotoken``, if the two are equal; it takes some 3 s on 2 cores."""
    try:
        fast = WordPiece(tokenizer_json)
    except (ModuleNotFoundError, ValueError):
        return None
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    added = [each.content for each in tokenizer.get_added_tokens_decoder().values()]
    if any(re.search(r"\s", each) for each in added):  # Where a text is cut, it might be in two.
        return None
    texts = [edge.format(script) for script in (*SCRIPTS, COMPATIBLE) for edge in EDGES]
    generated = _random_texts([*tokenizer.get_vocab()], added)
    batches = [texts, list(islice(generated, RANDOM_TEXTS)), *_characters()]
    for batch in shown(batches, f"Comparing with {NAME}"):
        if not _are_equal(tokenizer, fast, batch):
            return None
    cut = all(_are_equal_cut(tokenizer, fast, texts, length) for length in LENGTHS)
    return fast if cut else None


def _are_equal(tokenizer: Tokenizer, fast: WordPiece, texts: Sequence[str]) -> bool:
    found = fast.encode(texts, sys.maxsize)
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return found is not None and all(map(_same, (each.ids for each in expected), found))


def _are_equal_cut(tokenizer: Tokenizer, fast: WordPiece, texts: Sequence[str], most: int) -> bool:
    """Of texts that are cut, also where no more of them is read than is needed."""
    long = [" ".join([text, *texts]) for text in texts]
    found = fast.encode(long, most)
    expected = tokenizer.encode_batch_fast(long, add_special_tokens=False)
    heads = [fast.head(text, most) for text in long]
    of_heads = tokenizer.encode_batch_fast(heads, add_special_tokens=False)
    return found is not None and all(
        _same(each.ids[:most], cut) and each.ids[:most] == head.ids[:most]
        for each, cut, head in zip(expected, found, of_heads)
    )


def _same(expected: Sequence[int], found: Int32) -> bool:
    return len(expected) == len(found) and list(expected) == found.tolist()


def _characters() -> Iterator[list[str]]:
    """All of Unicode's in each context, as many texts together as are encoded at a time."""
    every = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    uniform = {point for points in UNIFORM for point in points if point % ONE_IN}
    some = [point for point in every if point not in uniform]
    for context, points in zip(CONTEXTS, (every, some, some, some)):
        words = [context.format(chr(point)) for point in points]
        texts = [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]
        yield from (texts[i : i + TEXTS] for i in range(0, len(texts), TEXTS))


def _random_texts(vocabulary: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """Of the vocabulary, special tokens, accents, white space, signs, and whatever there is."""
    source = random.Random(0)
    assigned = [chr(each) for each in range(sys.maxunicode + 1) if _is_assigned(chr(each))]
    by_kind = {
        kind: [each for each in assigned if unicodedata.category(each)[0] == kind]
        for kind in "LMPSZC"
    }
    pieces = [
        *(list(vocabulary), [*added, *(each.lower() for each in added)], [" ", "  ", "\n", "\t"]),
        *by_kind.values(),
    ]
    while True:
        pools = source.sample(pieces, source.randint(1, 4))
        yield "".join(
            source.choice(source.choice(pools)) for _ in range(source.choice((1, 2, 3, 5, 13, 40)))
        )


def _is_assigned(character: str) -> bool:
    return unicodedata.category(character) not in ("Cn", "Co", "Cs")
