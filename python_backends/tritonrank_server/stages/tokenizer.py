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

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

#: What fills the short rows of ``input_ids``. No token has this id, whereas the id of ``[PAD]``
#: stands in any document that contains that text.
FILL = -1

#: The share of the model's positions that a query may take; what is beyond is cut. It leaves the
#: document the other half.
QUERY_SHARE = 0.5

#: A text is read up to this many characters for each position of the model. It bounds the work
#: that one text can ask for and is far more than fits: a token of English is 4 characters, of
#: Korean or Japanese 1 or 2.
CHARACTERS_PER_POSITION = 64

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
    """One request's query–document pairs as the graph takes them.

    Attributes:
        input_ids: INT32 [N, L], row i holds pair i's tokens, then ``FILL``.
        lengths: INT32 [N], the tokens of each pair.
        query_lengths: INT32 [N], the tokens of ``[CLS] query [SEP]`` that each pair begins with.
        truncated: BOOL [N], whether any text of each pair was left unread; empty where only the
            graph has it.
    """

    input_ids: Int32
    lengths: Int32
    query_lengths: Int32
    truncated: Bool = field(default_factory=lambda: np.zeros(0, np.bool_))

    def inputs(self) -> dict[str, Int32]:
        """The graph's inputs: ``input_ids`` [N·L], ``lengths`` and ``query_lengths`` [N, 1]."""
        return {
            "input_ids": self.input_ids.ravel(),
            "lengths": self.lengths[:, None],
            "query_lengths": self.query_lengths[:, None],
        }

    def documents(self) -> Iterator[Tokens]:
        """The same pairs one by one: N results with N = 1 and no ``FILL``."""
        for i, length in enumerate(self.lengths):
            one = slice(i, i + 1)
            yield Tokens(self.input_ids[one, :length], self.lengths[one], self.query_lengths[one])


@dataclass(frozen=True)
class Pairs:
    """One valid request.

    Attributes:
        query_ids: INT32 [Q], the ids of ``[CLS] query [SEP]``.
        documents: as much of each text as is read.
        truncated: BOOL [N], whether that, or the query, is not all.
    """

    query_ids: Int32
    documents: list[str]
    truncated: Bool


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
        max_documents: the most documents that a request may have.
        prompt: what the model reads besides.

    Attributes:
        max_length: positions of the model.
    """

    def __init__(self, path: Path, max_documents: int, prompt: Prompt = NO_PROMPT) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        truncation = self._tokenizer.truncation
        if truncation is None:
            raise ValueError(f"{path} has no truncation, which is to say no max length")
        self.max_length: int = truncation["max_length"]
        self._max_documents = max_documents
        self._max_characters = CHARACTERS_PER_POSITION * self.max_length
        self._prompt = prompt
        self._prefix, self._middle, self._suffix = _pair_template(self._tokenizer, prompt)
        # One token more than fits, so that a query that is too long shows.
        self._tokenizer.enable_truncation(self.max_length + 1)

    @classmethod
    def of(cls, folder: Path, max_documents: int) -> PairTokenizer:
        """That of an export's folder."""
        prompt = Prompt(**card.read(folder).get("prompt", {}))
        return cls(folder / "tokenizer.json", max_documents, prompt)

    def read(self, query: bytes, documents: Sequence[bytes]) -> Pairs:
        """Checks one request, and encodes its query.

        Raises:
            InvalidInput: no document, or too many; a text that is not UTF-8; a query that is
                blank or longer than the model.
        """
        if not documents:
            raise InvalidInput("DOCUMENTS is empty: send at least one document")
        if len(documents) > self._max_documents:
            raise InvalidInput(
                f"DOCUMENTS has {len(documents)} documents, and a request may have "
                f"{self._max_documents}: split it, and merge the rankings by LOGITS"
            )
        texts = [_decode(document, f"DOCUMENTS[{i}]") for i, document in enumerate(documents)]
        query_ids, cut = self._encode_query(_decode(query, "QUERY"))
        truncated = np.array([cut or len(text) > self._max_characters for text in texts])
        return Pairs(query_ids, [text[: self._max_characters] for text in texts], truncated)

    def encode(self, batch: Sequence[Pairs]) -> list[Tokens]:
        """Encodes the documents of several requests in one call; one result a request."""
        leading = self._prompt.leading
        texts = [leading + text for pairs in batch for text in pairs.documents]
        encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [
            self._assemble(pairs, [next(encodings).ids for _ in pairs.documents]) for pairs in batch
        ]

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

    def _assemble(self, pairs: Pairs, documents: list[list[int]]) -> Tokens:
        query_ids = pairs.query_ids
        room = self.max_length - len(query_ids) - len(self._suffix)
        beyond = np.array([len(document) > room for document in documents])
        for document in documents:
            document[room:] = self._suffix  # Cut, and ended.
        tails = np.array([len(document) for document in documents], np.int32)
        input_ids = np.full((len(documents), len(query_ids) + tails.max()), FILL, np.int32)
        input_ids[:, : len(query_ids)] = query_ids
        # Row-major order of the mask is the order of the concatenated documents.
        real = np.arange(tails.max()) < tails[:, None]
        every = np.fromiter(chain.from_iterable(documents), np.int32, tails.sum())
        input_ids[:, len(query_ids) :][real] = every
        return Tokens(
            input_ids,
            lengths=len(query_ids) + tails,
            query_lengths=np.full_like(tails, len(query_ids)),
            truncated=pairs.truncated | beyond,
        )


def _is_visible(character: str) -> bool:
    return category(character) not in INVISIBLE and character not in FILLERS


def _decode(text: bytes, name: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{name} is not valid UTF-8 (byte {error.start}): encode the text as UTF-8"
        ) from None


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
