"""First stage: a query and its documents → token ids, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ..errors import InvalidInput
from . import card
from .passages import PASSAGE, SHORTEST, SHORTEST_TOKENS, end_of, windows
from .wordpiece import WordPiece

Int32 = npt.NDArray[np.int32]
#: A passage's tokens, its first and one-past-last character, whether its document is cut.
_Read = tuple[Int32, int, int, bool]
#: A text's tokens, and the characters of each, where it is to be cut.
_Encoded = tuple[Int32, Sequence[tuple[int, int]] | None]

#: What ``input_ids`` are filled up with. No token has this id, whereas the id of ``[PAD]`` stands
#: in any document that contains that text.
FILL = -1

#: The share of the model's positions that a query may take; what is beyond is cut. It leaves the
#: document the other half.
QUERY_SHARE = 0.5

#: A text is read up to this many characters for each position of the model, and each passage. It
#: bounds the work that one text can ask for and is far more than fits: a token of English is 4
#: characters, of Korean or Japanese 1 or 2.
CHARACTERS_PER_POSITION = 64
#: Of a text of more, it is expected to be cut, and so its tokens' characters are asked for at once,
#: which takes an eighth longer.
LONG_CHARACTERS_PER_POSITION = 2
#: No more of any text, and of texts together, are encoded at a time: while it is, a character takes
#: up to 700 bytes.
CHARACTERS_AT_A_TIME = 2**20
#: A document has no more passages than one, and one for each so many of its bytes, or for half as
#: many as the model has positions if these are fewer: so how many a request may have is known
#: before it is tokenized. Passages are longer then where a text has many tokens for its bytes.
BYTES_PER_PASSAGE = 256

#: Unicode's categories of what shows nothing: controls, formats and separators,
INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
#: and what it counts among letters, marks or symbols: fillers, a blank, a joiner, selectors of
#: glyphs.
FILLERS = frozenset(
    chain(
        "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0",
        map(chr, range(0xFE00, 0xFE10)),
        map(chr, range(0xE0100, 0xE01F0)),
    )
)


@dataclass(frozen=True)
class Tokens:
    """One request's pairs of its query and a passage, as the graph takes them.

    Attributes:
        input_ids: INT32 [T], the tokens of all pairs, one pair after the other.
        lengths: INT32 [N], the tokens of each pair.
        query_lengths: INT32 [N], the tokens of ``[CLS] query [SEP]`` that each pair begins with.
        passages: ``PASSAGE`` [N], what was read of which document; empty where only the graph has
            the pairs.
    """

    input_ids: Int32
    lengths: Int32
    query_lengths: Int32
    passages: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, PASSAGE))

    def inputs(self) -> dict[str, Int32]:
        """The graph's inputs: ``input_ids`` [T], ``lengths`` and ``query_lengths`` [N, 1]."""
        return {
            "input_ids": self.input_ids,
            "lengths": self.lengths[:, None],
            "query_lengths": self.query_lengths[:, None],
        }

    def rows(self) -> Int32:
        """``input_ids`` as N rows of the same length, which Triton wants of a batch of N.

        INT32 [N, ceil(T / N)], the last filled up with ``FILL``: a row is no pair.
        """
        rows = len(self.lengths)
        filled = np.full((rows, -(-len(self.input_ids) // rows)), FILL, np.int32)
        filled.ravel()[: len(self.input_ids)] = self.input_ids
        return filled

    @classmethod
    def joined(cls, several: Sequence[Tokens]) -> Tokens:
        """The pairs of several, for the graph."""
        columns = ((each.input_ids, each.lengths, each.query_lengths) for each in several)
        return cls(*map(np.concatenate, zip(*columns)))

    def documents(self) -> Iterator[Tokens]:
        """The same pairs one by one: N results with N = 1."""
        ends = np.cumsum(self.lengths).tolist()
        for i, (start, end) in enumerate(zip([0, *ends], ends)):
            one = slice(i, i + 1)
            yield Tokens(self.input_ids[start:end], self.lengths[one], self.query_lengths[one])


@dataclass(frozen=True)
class Pairs:
    """One valid request.

    Attributes:
        query_ids: INT32 [Q], the ids of ``[CLS] query [SEP]``.
        documents: as much of each text as is read.
        passages: the most of each.
        truncated: of each, whether what is read of it, or of the query, is not all.
        tokens: how many of its own are read of each, at most; None for all.
    """

    query_ids: Int32
    documents: list[str]
    passages: list[int]
    truncated: list[bool]
    tokens: int | None


@dataclass(frozen=True)
class Extent:
    """How much of each document is read.

    Attributes:
        passages: how many, at most.
        tokens: how many of its own, at most; None for all.
    """

    passages: int = 1
    tokens: int | None = None


#: What fits beside the query, and no more.
ONE_PASSAGE = Extent()


@dataclass(frozen=True)
class Prompt:
    """What a model reads around a query and a document.

    A query is read in one piece with what stands ``before`` and ``between``, a document with what
    is ``leading`` to it: so these must end where the tokenizer ends a word whatever follows.

    Attributes:
        whole: whether this is all. Else it stands inside the tokenizer's own special tokens.
    """

    before: str = ""
    between: str = ""
    leading: str = ""
    after: str = ""
    whole: bool = False


NO_PROMPT = Prompt()


class PairTokenizer:
    """Encodes query–document pairs as the checkpoint's own tokenizer does, but each query once.

    Max length and the template of special tokens come from ``tokenizer.json`` itself. Only
    documents are cut to fit, and a query beyond its share (``QUERY_SHARE``).

    Not for sharing between threads; one batch call already uses all cores.

    Args:
        path: ``tokenizer.json`` of an export, with truncation set to the model's max length.
        max_passages: the most passages that a request may have.
        prompt: what the model reads besides.
        wordpiece: the same tokenizer, where there is a faster one.

    Attributes:
        max_length: positions of the model.
    """

    def __init__(
        self,
        path: Path,
        max_passages: int,
        prompt: Prompt = NO_PROMPT,
        wordpiece: WordPiece | None = None,
    ) -> None:
        self._wordpiece = wordpiece
        self._tokenizer = Tokenizer.from_file(str(path))
        truncation = self._tokenizer.truncation
        if truncation is None:
            raise ValueError(f"{path} has no truncation, which is to say no max length")
        self.max_length: int = truncation["max_length"]
        self._max_passages = max_passages
        self._max_characters = CHARACTERS_PER_POSITION * self.max_length
        self._long = LONG_CHARACTERS_PER_POSITION * self.max_length
        self._prompt = prompt
        self._prefix, self._middle, suffix = _pair_template(self._tokenizer, prompt)
        self._suffix = np.array(suffix, np.int32)
        self._enable_truncation()

    @classmethod
    def of(cls, folder: Path, max_passages: int) -> PairTokenizer:
        """That of an export's folder."""
        prompt = Prompt(**card.read(folder).get("prompt", {}))
        return cls(folder / "tokenizer.json", max_passages, prompt, WordPiece.of(folder))

    def read(self, query: bytes, documents: Sequence[bytes], extent: Extent = ONE_PASSAGE) -> Pairs:
        """Checks one request, and encodes its query.

        Raises:
            InvalidInput: no document, or too many; an extent below 1; a text that is not UTF-8; a
                query that is blank or longer than the model.
        """
        passages = self._passages(documents, extent)
        texts = [_decode(document, f"DOCUMENTS[{i}]") for i, document in enumerate(documents)]
        query_ids, cut = self._encode_query(_decode(query, "QUERY"))
        most = [min(self._max_characters * each, CHARACTERS_AT_A_TIME) for each in passages]
        truncated = [cut or len(text) > length for text, length in zip(texts, most)]
        texts = [text[:length] for text, length in zip(texts, most)]
        return Pairs(query_ids, texts, passages, truncated, extent.tokens)

    def encode(self, batch: Sequence[Pairs]) -> list[Tokens]:
        """Encodes the documents of several requests; one result a request."""
        return [self._assemble(pairs) for pairs in batch]

    def _passages(self, documents: Sequence[bytes], extent: Extent) -> list[int]:
        """The most of each document."""
        if not documents:
            raise InvalidInput("DOCUMENTS is empty: send at least one document")
        for name, value in (("PASSAGES", extent.passages), ("DOCUMENT_TOKENS", extent.tokens)):
            if value is not None and value < 1:
                raise InvalidInput(f"MAX_{name} is {value}: send 1 or more, or leave it out")
        limit = self._max_passages
        most = min(extent.passages, limit)
        size = min(BYTES_PER_PASSAGE, self.max_length // 2)
        passages = [min(most, 1 + len(text) // size) for text in documents]
        if sum(passages) > limit:
            of, remedy = "", ""
            if most > 1:
                of = f" of up to {sum(passages)} passages"
                remedy = ", or send a smaller MAX_PASSAGES"
            raise InvalidInput(
                f"DOCUMENTS has {len(documents)} documents{of}, and a request may have {limit}: "
                f"split it, and merge the rankings by LOGITS{remedy}"
            )
        return passages

    def _enable_truncation(self, passages: int = 1) -> None:
        """Of one token more than is read, so that what is too long shows."""
        self._most = self.max_length * passages + 1
        self._tokenizer.enable_truncation(self._most)

    def _encode_query(self, query: str) -> tuple[Int32, bool]:
        """With what stands around it; and whether it was cut."""
        if not any(map(_is_visible, query)):
            raise InvalidInput("QUERY is blank: send a query with at least one visible character")
        if len(query) > self._max_characters:
            raise InvalidInput(
                f"QUERY has {len(query)} characters, and {self._max_characters} are read at most: "
                "shorten it"
            )
        encoding = self._encode(query)
        ids = encoding.ids
        if len(ids) > self.max_length:
            raise InvalidInput(
                f"QUERY has more tokens than the model has positions, {self.max_length}: "
                "shorten it, or send the long text as a document"
            )
        cut = len(ids) > self._share
        if cut:
            end = len(self._prompt.before) + len(query)
            last = len(ids) - sum(start >= end for start, _ in encoding.offsets)
            ids = [*ids[: self._share - len(ids) + last], *ids[last:]]
        return np.array([*self._prefix, *ids, *self._middle], np.int32), cut

    def is_cut(self, query: str) -> bool:
        """Whether a query has more tokens than its share."""
        return len(self._encode(query)) > self._share

    def _encode(self, query: str) -> Any:
        text = self._prompt.before + query + self._prompt.between
        return self._tokenizer.encode(text, add_special_tokens=False)

    @property
    def _share(self) -> int:
        return int(QUERY_SHARE * self.max_length) - len(self._prefix) - len(self._middle)

    def _assemble(self, pairs: Pairs) -> Tokens:
        query_ids = pairs.query_ids
        room = self.max_length - len(query_ids) - len(self._suffix)
        self._enable_truncation(max(pairs.passages))
        around = len(query_ids) + len(self._suffix)
        parts: list[Int32] = []
        passages = []
        for i, read in enumerate(self._read_documents(pairs, room)):
            for ids, start, end, truncated in read:
                parts += (query_ids, ids, self._suffix)
                passages.append((i, start, end, around + len(ids), truncated))
        table = np.array(passages, PASSAGE)
        lengths = np.ascontiguousarray(table["tokens"])
        input_ids = np.concatenate(parts, dtype=np.int32)
        return Tokens(input_ids, lengths, np.full_like(lengths, len(query_ids)), table)

    def _read_documents(self, pairs: Pairs, room: int) -> Iterator[list[_Read]]:
        """The passages of each document, of which so many tokens fit."""
        leading = len(self._prompt.leading)
        most = min(room, pairs.tokens or room)
        # With a shorter one, the query would take more of the time than the document.
        least = max(int(SHORTEST * room), SHORTEST_TOKENS, len(pairs.query_ids))
        texts = [self._prompt.leading + text for text in pairs.documents]
        every = zip(texts, self._encodings(texts, most), pairs.passages, pairs.truncated)
        for text, (ids, offsets), passages, cut in every:
            if offsets is None:
                yield [(ids, 0, len(text) - leading, cut)]
                continue
            places = windows(text, offsets[: pairs.tokens], room, passages, least)
            is_cut = cut or places[-1][1] < len(ids)
            starts = [0, *(offsets[first][0] for first, _ in places[1:])]
            ends = [
                end_of(text, offsets, last) if last < len(ids) else len(text) for _, last in places
            ]
            yield [
                (ids[first:last], max(0, start - leading), max(0, end - leading), is_cut)
                for (first, last), start, end in zip(places, starts, ends)
            ]

    def _encodings(self, texts: Sequence[str], most: int) -> Iterator[_Encoded]:
        """With the characters of tokens where there are more than ``most``."""
        for group in _groups(texts):
            found = self._ids(group, most + 1)
            cut = [ids is None or len(ids) > most for ids in found]
            some = [self._head(text) for text, is_cut in zip(group, cut) if is_cut]
            encoded = iter(self._tokenizer.encode_batch(some, add_special_tokens=False))
            for ids in found:
                if ids is not None and len(ids) <= most:
                    yield ids, None
                    continue
                encoding = next(encoded)
                fits = len(encoding) <= most  # As a long text of few tokens does.
                yield np.array(encoding.ids, np.int32), None if fits else encoding.offsets

    def _ids(self, texts: Sequence[str], most: int) -> Sequence[Int32 | None]:
        """Of each text ``most`` or more, if it has as many; None if it is expected to be cut."""
        found = self._wordpiece.encode(texts, most) if self._wordpiece else None
        if found:
            return found
        some = [text for text in texts if len(text) <= self._long]
        encoded = iter(self._tokenizer.encode_batch_fast(some, add_special_tokens=False))
        short = (len(text) <= self._long for text in texts)
        return [np.array(next(encoded).ids, np.int32) if each else None for each in short]

    def _head(self, text: str) -> str:
        """As much of a text that is to be cut as is read of it, if that is known."""
        return self._wordpiece.head(text, self._most) if self._wordpiece else text


def _is_visible(character: str) -> bool:
    return category(character) not in INVISIBLE and character not in FILLERS


def _decode(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{name} is not valid UTF-8 (byte {error.start}): encode the text as UTF-8"
        ) from None


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in turn, as many together as are encoded at a time."""
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + len(text) > CHARACTERS_AT_A_TIME:
            yield texts[start:end]
            start, size = end, 0
        size += len(text)
    yield texts[start:]


def _pair_template(tokenizer: Tokenizer, prompt: Prompt) -> tuple[list[int], list[int], list[int]]:
    """Special tokens before the query, between it and the document, and after the document.

    Read off an encoded pair, since the post-processors of the model families differ in form.
    """
    if prompt.whole:
        return [], [], tokenizer.encode(prompt.after, add_special_tokens=False).ids
    pair = tokenizer.encode("a", "b")
    sequence = pair.sequence_ids
    query = [i for i, which in enumerate(sequence) if which == 0]
    document = [i for i, which in enumerate(sequence) if which == 1]
    ids = pair.ids
    return ids[: query[0]], ids[query[-1] + 1 : document[0]], ids[document[-1] + 1 :]
