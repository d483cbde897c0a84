"""nanotoken in the place of tokenizers: what it may read, and that it reads the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import test_export
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import Sample
from tokenizers import Tokenizer, normalizers
from tritonrank_server.export import comparison
from tritonrank_server.stages import wordpiece as module
from tritonrank_server.stages.tokenizer import Extent, PairTokenizer
from tritonrank_server.stages.wordpiece import WordPiece

MOST = 1024
#: Settings of BERT's normalizer: as uncased, cased and multilingual checkpoints have them.
KINDS: dict[str, dict[str, Any]] = {
    "uncased": {},
    "cased": {"lowercase": False},
    "accents": {"strip_accents": False},
    "no ideographs": {"handle_chinese_chars": False},
    "as it is": {"clean_text": False, "lowercase": False, "strip_accents": False},
}
PIECES = [
    *("[SEP]", "[MASK]", "[sep]", "##ing", "don't", "ﬁ", "Å", "e\u0301", "\u0323\u0301", "İ", "ΑΣ"),
    *(
        " ",
        "  ",
        "\n",
        "\u3000",
        "\u200b",
        "\u00ad",
        "\0",
        "\ufffd",
        "한국어",
        "\u1112\u1161\u11ab",
    ),
    *(
        "日本",
        "ｶﾞ",
        "か\u3099",
        "👩\u200d🚀",
        "ไทย",
        "हिन्दी",
        "שָׁלוֹם",
        "x" * 101,
        "3,776",
        "tea",
        "_",
    ),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> dict[str, PairTokenizer]:
    """Tokenizers that were compared, for models of 64 tokens."""
    corpus = [text for query, documents in sample for text in (query, *documents)]
    found = {}
    for name, options in KINDS.items():
        tokenizer = test_export.wordpiece([*corpus, *PIECES * 9])
        tokenizer.normalizer = normalizers.BertNormalizer(**options)
        tokenizer.enable_truncation(64)
        path = tmp_path_factory.mktemp("kind") / "tokenizer.json"
        tokenizer.save(str(path))
        found[name] = PairTokenizer(path, MOST, wordpiece=comparison.wordpiece(path))
    return found


def plain(pairs: PairTokenizer) -> PairTokenizer:
    """The same without nanotoken."""
    same: PairTokenizer = object.__new__(PairTokenizer)
    same.__dict__ |= pairs.__dict__ | {"_wordpiece": None}
    return same


def read(pairs: PairTokenizer, documents: list[str], extent: Extent) -> Any:
    texts = [text.encode("utf-8", "ignore") for text in documents]
    [tokens] = pairs.encode([pairs.read(b"what?", texts, extent)])
    return tokens.input_ids.tolist(), tokens.passages.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_it_reads_what_tokenizers_reads(name: str, kinds: dict[str, PairTokenizer]) -> None:
    pairs = kinds[name]
    assert pairs._wordpiece

    @settings(max_examples=150, deadline=None)
    @given(
        documents=st.lists(TEXTS | TEXTS.map(lambda text: f"{text} " * 40), min_size=1, max_size=6),
        extent=st.builds(Extent, st.sampled_from([1, 3, 50]), st.sampled_from([None, 1, 20])),
    )
    def check(documents: list[str], extent: Extent) -> None:
        assert read(pairs, documents, extent) == read(plain(pairs), documents, extent)

    check()


def test_the_default_model_is_read_by_it(int8_repository: Path, sample: Sample) -> None:
    folder = int8_repository / "cross_encoder" / "current"
    pairs = PairTokenizer.of(folder, MOST)
    assert pairs._wordpiece
    assert json.loads((folder / "export.json").read_text())["nanotoken"] == version("nanotoken")
    for _, documents in sample:
        long = [" ".join(documents) * 9, *documents]
        for extent in (Extent(), Extent(9)):
            assert read(pairs, long, extent) == read(plain(pairs), long, extent)


def swap_two_words(tokenizer: dict[str, Any]) -> None:
    words = tokenizer["model"]["vocab"]
    words["tea"], words["japan"] = words["japan"], words["tea"]


def keep_accents(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"]["strip_accents"] = False


def keep_capitals(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"]["lowercase"] = False


def shorten_words(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["max_input_chars_per_word"] = 12


def forget_a_special_token(tokenizer: dict[str, Any]) -> None:
    del tokenizer["added_tokens"][-1]


@pytest.mark.parametrize(
    "differ",
    [swap_two_words, keep_accents, keep_capitals, shorten_words, forget_a_special_token],
)
def test_a_difference_is_found(
    differ: Callable[[dict[str, Any]], None],
    int8_repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = int8_repository / "cross_encoder" / "current" / "tokenizer.json"
    content = json.loads(path.read_text())
    differ(content)
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content))
    monkeypatch.setattr(comparison, "WordPiece", lambda _: WordPiece(other))
    assert comparison.wordpiece(path) is None


def test_other_kinds_have_none(tmp_path: Path, sample: Sample) -> None:
    corpus = [text for _, documents in sample for text in documents]
    for train in (test_export.byte_level, test_export.unigram):
        train(corpus).save(str(tmp_path / "tokenizer.json"))
        assert comparison.wordpiece(tmp_path / "tokenizer.json") is None
    spaced: Tokenizer = test_export.wordpiece(corpus)
    spaced.add_tokens(["green tea"])  # Where a text is cut, it may be in two.
    spaced.save(str(tmp_path / "tokenizer.json"))
    assert comparison.wordpiece(tmp_path / "tokenizer.json") is None


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize("installed", [lambda _: "0.1.99", absent])
def test_another_version_is_not_used(
    installed: Callable[[str], str], int8_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "version", installed)
    assert PairTokenizer.of(int8_repository / "cross_encoder" / "current", MOST)._wordpiece is None


class PanicException(BaseException):
    """By this name Rust's panics come."""


def test_a_panic_is_read_by_tokenizers(kinds: dict[str, PairTokenizer]) -> None:
    class Panics:
        def encode_batch(self, *_: Any, **__: Any) -> None:
            raise PanicException

    pairs = plain(kinds["uncased"])
    pairs._wordpiece = object.__new__(WordPiece)
    pairs._wordpiece._tokenizer = Panics()
    documents = ["green tea", "", "tea " * 900]
    assert read(pairs, documents, Extent(3)) == read(plain(pairs), documents, Extent(3))
