"""Documents that do not fit the model: what is read of them, where it stands, and what counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
import tritonclient.grpc as triton
from conftest import MAX_DOCUMENTS, pipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_export import BERT_TOKENS, ROBERTA_TOKENS, Sample, wordpiece, write_checkpoint
from test_families import PREFIX, SUFFIX, TASK, cls_sep, qwen_tokenizer, write_qwen
from test_stages import relevance
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonrank import RankedDocument, RerankClient, protocol
from tritonrank.cli import main
from tritonrank.protocol import Options
from tritonrank_server.errors import InvalidInput, InvalidOutput
from tritonrank_server.export.command import export
from tritonrank_server.serving.serve import EmbeddedServer
from tritonrank_server.stages import tokenizer as tokenizer_module
from tritonrank_server.stages.admission import Size
from tritonrank_server.stages.passages import (
    NEAR,
    OVERLAP,
    PASSAGE,
    SENTENCE,
    SHORTEST,
    SHORTEST_TOKENS,
    WORD,
    end_of,
    windows,
)
from tritonrank_server.stages.pipeline import Pipeline
from tritonrank_server.stages.sorter import rank
from tritonrank_server.stages.tokenizer import (
    BYTES_PER_PASSAGE,
    CHARACTERS_PER_POSITION,
    NO_PROMPT,
    Extent,
    PairTokenizer,
    Prompt,
    Tokens,
)

from loadtest.bench import new_repository

#: Positions of the models, here.
MOST = 64
QUERY = "what?"
FAMILY = "👨‍👩‍👧‍👦"

#: Each more than fits, for one tokenizer at least.
PATHOLOGICAL = {
    "one word": "x" * 5000,
    "one word of Korean": "한국어" * 100,
    "spaces": " " * 500,
    "newlines": "\n" * 500,
    "families": FAMILY * 60,
    "marks": "\u0301\u0327\u0338" * 100,
    "NUL": "a\0b" * 100,
    "only NUL": "\0" * 300,
    "replacements": "\ufffd" * 200,
    "eighteen for one": "\ufdfa" * 60,
    "jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8 " * 60,
    "half width": "ｶﾞｷﾞ｡ﾊﾟ､" * 60,
    "right to left": "שָׁלוֹם עולם. مَرْحَبًا بالعالم؟ " * 30,
    "dropped": "\u200b\u00ad\u200d" * 100,
    "dropped within": "a\u200b" * 200 + "\u200b" * 100,
    "marks out of order": "e\u0301\u0327 " * 100,
    "no spaces": "日本語の文章。句読点、" * 40,
    "quotes": '."”' * 100,
    "special": "[SEP] </s> <|im_end|> " * 40,
    "gap": "a " * 70 + "\n \t" * 500 + "b " * 70,
    "nothing": "",
}


@dataclass(frozen=True)
class Kind:
    """A tokenizer as we read it, and as transformers does."""

    pairs: PairTokenizer
    fast: transformers.PreTrainedTokenizerBase
    prompt: Prompt = NO_PROMPT

    def whole(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of all of a text, by transformers."""
        text = self.prompt.leading + text
        encoding = self.fast(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def read(self, text: str, passages: int, tokens: int | None = None) -> Tokens:
        extent = Extent(passages, tokens)
        [read] = self.pairs.encode([self.pairs.read(QUERY.encode(), [text.encode()], extent)])
        return read

    def bodies(self, read: Tokens) -> list[list[int]]:
        """What stands between the query and the end, in each row."""
        rows = [each.input_ids.tolist() for each in read.documents()]
        start, end = int(read.query_lengths[0]), len(self.ending)
        assert all(row[:start] == rows[0][:start] for row in rows)
        assert all(row[len(row) - end :] == self.ending for row in rows)
        return [row[start : len(row) - end] for row in rows]

    @property
    def ending(self) -> list[int]:
        """What stands behind a document."""
        if self.prompt.whole:
            ids: list[int] = self.fast(self.prompt.after)["input_ids"]
            return ids
        read = self.read("", 1)
        return read.input_ids[read.query_lengths[0] :].tolist()

    @property
    def room(self) -> int:
        return self.pairs.max_length - int(self.read("", 1).query_lengths[0]) - len(self.ending)


def cased(corpus: list[str]) -> Tokenizer:
    tokenizer = wordpiece(corpus)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    return tokenizer


def byte_level(corpus: list[str]) -> Tokenizer:
    """Of any byte, as RoBERTa's: offsets have the spaces out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def composed(corpus: list[str]) -> Tokenizer:
    """As ModernBERT's: offsets have the spaces in."""
    tokenizer = cls_sep(byte_level(corpus))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def metaspace(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


TRAINED: dict[str, tuple[Callable[[list[str]], Tokenizer], dict[str, str]]] = {
    "cased": (cased, BERT_TOKENS),
    "RoBERTa": (byte_level, ROBERTA_TOKENS),
    "ModernBERT": (composed, BERT_TOKENS),
    "Metaspace": (metaspace, ROBERTA_TOKENS),
}


def xlm_roberta(folder: Path, corpus: list[str]) -> transformers.PreTrainedTokenizerBase:
    """With the Precompiled normaliser of sentencepiece's own library."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def kinds(
    tmp_path_factory: pytest.TempPathFactory, int8_repository: Path, sample: Sample
) -> dict[str, Kind]:
    corpus = [text for query, documents in sample for text in (query, *documents)]
    folder = tmp_path_factory.mktemp("tokenizers")
    default = Tokenizer.from_file(str(int8_repository / "tokenizer" / "1" / "tokenizer.json"))
    default.no_truncation()
    fast = {
        "default": transformers.PreTrainedTokenizerFast(tokenizer_object=default, **BERT_TOKENS),
        "XLM-R": xlm_roberta(folder, corpus),
        "Qwen": qwen_tokenizer(sample),
    }
    for name, (train, special) in TRAINED.items():
        fast[name] = transformers.PreTrainedTokenizerFast(tokenizer_object=train(corpus), **special)
    prompts = {"Qwen": Prompt("Q: ", "\nD:", "  ", "<|im_end|>", whole=True)}
    found = {}
    for name, each in fast.items():
        # As an export writes it.
        kept = Tokenizer.from_str(each.backend_tokenizer.to_str())
        kept.enable_truncation(MOST)
        kept.save(str(folder / f"{name}.json"))
        prompt = prompts.get(name, Prompt())
        pairs = PairTokenizer(folder / f"{name}.json", MAX_DOCUMENTS, prompt)
        found[name] = Kind(pairs, each, prompt)
    return found


KINDS = pytest.mark.parametrize("name", ["default", "XLM-R", "Qwen", *TRAINED])


# What is read.


def check(kind: Kind, text: str, passages: int, tokens: int | None = None) -> Tokens:
    """All that is true of any text; gives what was read."""
    read = kind.read(text, passages, tokens)
    passages = min(passages, 1 + len(text.encode()) // (MOST // 2))
    part = text[: CHARACTERS_PER_POSITION * MOST * passages]
    ids, offsets = kind.whole(part)
    room, leading = kind.room, len(kind.prompt.leading)
    least = max(int(SHORTEST * room), SHORTEST_TOKENS, int(read.query_lengths[0]))
    places = windows(kind.prompt.leading + part, offsets[:tokens], room, passages, least)
    assert kind.bodies(read) == [ids[first:last] for first, last in places]
    check_places(places, offsets[:tokens], room, passages, least)
    table = read.passages
    assert table["document"].tolist() == [0] * len(places)
    assert table["tokens"].tolist() == read.lengths.tolist()
    left = places[-1][1] < len(ids)
    assert table["truncated"].tolist() == [left or part != text] * len(places)
    assert table["start"][0] == 0
    if not left:
        assert table["end"][-1] == len(part)
    for (first, last), (start, end) in zip(places, table[["start", "end"]].tolist()):
        assert 0 <= start <= end <= len(text)
        if first:
            assert start == max(0, offsets[first][0] - leading)
        if last < len(ids):
            least = max(0, offsets[last - 1][1] - leading)
            assert least <= end <= max(least, offsets[last][0] - leading)
    return read


def check_places(
    places: list[tuple[int, int]],
    offsets: Sequence[tuple[int, int]],
    room: int,
    most: int,
    least: int,
) -> None:
    assert places[0][0] == 0
    assert 1 <= len(places) <= most
    assert len(places) == most or places[-1][1] == len(offsets)
    assert all(last - first <= room for first, last in places)
    shared, slack = (int(share * min(least, room)) for share in (OVERLAP, NEAR))
    for (before, end), (first, last) in pairwise(places):
        assert before < first <= end - shared
        assert last > end or last == len(offsets)
        assert end - before >= min(least, room) - slack
        for place in (end, first):
            if not is_whole(offsets, place):
                assert not any(is_whole(offsets, each) for each in range(place - slack, place + 1))


def is_whole(offsets: Sequence[tuple[int, int]], token: int) -> bool:
    """Whether no character is both before a token and in it."""
    return offsets[token - 1][1] <= offsets[token][0]


@KINDS
@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_texts_that_nobody_meant(name: str, case: str, kinds: dict[str, Kind]) -> None:
    for passages in (1, 3, 1024):
        check(kinds[name], PATHOLOGICAL[case], passages)
    for tokens in (1, 2, 70, 2**31 - 1):
        check(kinds[name], PATHOLOGICAL[case], 3, tokens)


PIECES = [
    *(
        "tea ",
        "A cup. ",
        "naïve café",
        "한국어 ",
        "日本の山。",
        "ｶﾞ",
        "שלום ",
        "مرحبا ",
        "ไทย",
        "हिन्दी ",
    ),
    *(FAMILY, "🙂", "e\u0301", "\u1112\u1161\u11ab", "\ufdfa", "\0", "\u200b", "\n", "  "),
    *('…" ', "「あ」", "[SEP]", "</s>", "1,000.5 ", "x" * 30),
]
ANY_TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=20, max_size=150).map("".join),
    st.tuples(st.text(max_size=60), st.integers(1, 10)).map(lambda each: each[0] * each[1]),
)


@KINDS
@given(text=ANY_TEXT, passages=st.integers(1, 9), tokens=st.none() | st.integers(1, 200))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_text(
    name: str, text: str, passages: int, tokens: int | None, kinds: dict[str, Kind]
) -> None:
    check(kinds[name], text, passages, tokens)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=200),
    room=st.integers(1, 50),
    most=st.integers(1, 30),
    least=st.integers(1, 60),
    source=st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_windows_of_any_tokens(
    lengths: list[tuple[int, int]], room: int, most: int, least: int, source: Any
) -> None:
    """Also of many tokens a character, of characters without tokens, and with little room."""
    offsets, end = [], 0
    for gap, length in lengths:
        start = end + gap
        end = start + length
        offsets += [(start, end)] * source.choice([1, 1, 1, 3, 12])
    text = "".join(source.choices('ab .\n"、。', k=end + 2))
    check_places(windows(text, offsets, room, most, least), offsets, room, most, least)


def test_short_models_have_no_tiny_windows(
    int8_repository: Path, tmp_path: Path, sample: Sample
) -> None:
    published = int8_repository / "cross_encoder" / "current" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(published))
    tokenizer.enable_truncation(128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pairs = PairTokenizer(tmp_path / "tokenizer.json", 100)
    text = " ".join(sample[0][1] * 9).encode()
    [read] = pairs.encode([pairs.read(b"tea", [text], Extent(100))])
    windows = read.lengths - read.query_lengths - 1
    assert len(windows) > 10
    assert windows[:-1].min() >= 64 - 64 // 8
    assert windows[:-1].max() <= 64


@KINDS
def test_windows_are_cut_between_words(name: str, kinds: dict[str, Kind], sample: Sample) -> None:
    """So that the text of a passage alone is read as the passage is."""
    kind = kinds[name]
    compared = 0
    for _, documents in sample[:4]:  # English and Korean.
        text = " ".join(documents)
        read = kind.read(text, 1024)
        for body, (start, end) in zip(kind.bodies(read), read.passages[["start", "end"]].tolist()):
            if any(
                text[each - 1 : each + 1].strip() == text[each - 1 : each + 1]
                for each in (start, end)
            ):
                continue  # No end of a word is near, in Korean of many tokens a syllable.
            # A byte-level word begins with its space, which offsets may leave out.
            begin = " " if start and name == "RoBERTa" else "" if start else kind.prompt.leading
            ids = kind.fast(begin + text[start:end], add_special_tokens=False)["input_ids"]
            assert body == ids
            compared += 1
    assert compared > 9


@pytest.mark.parametrize(
    ("sentence", "ends"),
    [
        ("The quick brown fox, as they say, jumps. ", "."),
        ('He said: "It (the fox) jumps over it!" ', '"'),
        ("日本で最も高い山は、富士山です。", "。"),
        ("彼は「山に登る。」", "」"),
        ("a line of a table without an end\n", "d"),
        ("이 문장은, 쉼표가 있고 마침표로 끝난다. ", "."),
    ],
)
def test_windows_end_with_a_sentence(sentence: str, ends: str, kinds: dict[str, Kind]) -> None:
    # Of as many tokens as windows look for an end in, and few others.
    for name in ("default", "cased", "ModernBERT"):
        kind, text = kinds[name], sentence * 40
        room = 4 * len(kind.whole(sentence)[0]) + 2
        offsets = kind.whole(text)[1]
        for first, last in windows(text, offsets, room, 1024, room, near=0.25)[:-1]:
            start, end = offsets[first][0], end_of(text, offsets, last)
            assert text[end - 1] == ends, name
            assert start % len(sentence) in (0, len(sentence) - 1), name


def test_what_is_dropped_belongs_to_the_passage_before_it(kinds: dict[str, Kind]) -> None:
    """Accents, and what a normaliser composes, whose offsets are those of its first character."""
    accented = kinds["default"].read("cafe\u0301 " * 200, 9).passages
    jamo = kinds["ModernBERT"].read("\u1112\u1161\u11ab " * 200, 9).passages
    assert len(accented) > 2
    assert len(jamo) > 2
    assert all("cafe\u0301 "[(end - 1) % 6] == "\u0301" for end in accented["end"][:-1].tolist())
    assert all(end % 4 == 3 for end in jamo["end"][:-1].tolist())


def test_a_run_of_white_space_is_one_place() -> None:
    for space in ("\n", " ", " \n"):
        text = "a." + space * 10**6 + "b"
        assert [each.span() for each in SENTENCE.finditer(text)] == [(1, len(text) - 1)]
    assert len(WORD.findall(" " * 10**6 + "a" + " " * 10**6)) == 1
    assert not SENTENCE.findall("." + '"' * 10**6 + "x")


# What is left as it was.


# With a prompt, of which transformers cuts all or nothing: see ``test_families``.
@pytest.mark.parametrize("name", ["default", "XLM-R", *TRAINED])
def test_one_passage_is_what_transformers_reads(
    name: str, kinds: dict[str, Kind], sample: Sample
) -> None:
    kind = kinds[name]
    texts = [*sample[0][1], *sample[3][1], *sample[4][1], *PATHOLOGICAL.values()]
    pairs = kind.pairs.read(QUERY.encode(), [text.encode() for text in texts])
    [read] = kind.pairs.encode([pairs])
    queries = [QUERY] * len(texts)
    expected = kind.fast(queries, texts, truncation="only_second", max_length=MOST)["input_ids"]
    assert [each.input_ids.tolist() for each in read.documents()] == expected
    assert read.lengths.tolist() == list(map(len, expected))


@KINDS
def test_what_fits_and_batch_mates_change_nothing(
    name: str, kinds: dict[str, Kind], sample: Sample
) -> None:
    pairs = kinds[name].pairs
    texts = [text.encode() for text in ("", "tea", "a cup of tea", "한국어", FAMILY)]
    long = [text.encode() for text in (*sample[1][1], *PATHOLOGICAL.values())]
    requests = [
        pairs.read(QUERY.encode(), texts),
        pairs.read(QUERY.encode(), texts, Extent(9)),
        pairs.read(b"tea", long, Extent(3, 100)),
        pairs.read(b"tea", long),
        pairs.read(b"tea", long[:2], Extent(200)),
    ]
    together = pairs.encode(requests)
    for read, request in zip(together, requests):
        [alone] = pairs.encode([request])
        assert alone.input_ids.tolist() == read.input_ids.tolist()
        assert alone.passages.tolist() == read.passages.tolist()
    assert together[0].input_ids.tolist() == together[1].input_ids.tolist()
    assert together[0].passages.tolist() == together[1].passages.tolist()


@KINDS
def test_texts_are_encoded_by_turns(
    name: str, kinds: dict[str, Kind], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = kinds[name].pairs
    prose = " ".join(text for _, documents in sample for text in documents) * 3
    texts = [prose, " " * 9000 + prose, "日本語" * 900, "a", "\n" * 9000]
    request = pairs.read(b"tea", [each.encode() for each in texts], Extent(9))
    [expected] = pairs.encode([request])
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_AT_A_TIME", 10_000)
    [read] = pairs.encode([request])
    assert read.input_ids.tolist() == expected.input_ids.tolist()
    assert read.passages.tolist() == expected.passages.tolist()


def test_a_text_beyond_what_is_read(kinds: dict[str, Kind]) -> None:
    pairs = kinds["default"].pairs
    text = " " * (2 * 64 * MOST) + "tea"
    for passages, end in ((1, 64 * MOST), (2, 2 * 64 * MOST), (3, len(text))):
        request = pairs.read(b"tea", [text.encode()], Extent(passages))
        [read] = pairs.encode([request])
        assert read.passages[["start", "end"]].tolist() == [(0, end)]
        assert read.passages["truncated"].tolist() == [passages < 3]


def test_limits(kinds: dict[str, Kind]) -> None:
    pairs = kinds["default"].pairs
    half = b"a" * 511 * (MOST // 2)
    for documents, passages in (
        ([b"a"] * 1024, 2**31 - 1),
        ([half] * 4, 256),
        ([half, half], 2**31 - 1),
        ([half * 3], 2**31 - 1),
    ):
        pairs.read(b"tea", documents, Extent(passages))
    for documents, passages, told in (
        ([b"a"] * 1025, 1, "DOCUMENTS has 1025 documents, and a request may have 1024: split it"),
        ([half] * 5, 205, "has 5 documents of up to 1025 passages, and .* a smaller MAX_PASSAGES"),
        ([half, half, b""], 2**31 - 1, "has 3 documents of up to 1025 passages"),
    ):
        with pytest.raises(InvalidInput, match=told):
            pairs.read(b"tea", documents, Extent(passages))
    for value in (0, -1, -(2**31)):
        with pytest.raises(InvalidInput, match=f"MAX_PASSAGES is {value}: send 1 or more"):
            pairs.read(b"tea", [b"a"], Extent(value))
        with pytest.raises(InvalidInput, match=f"MAX_DOCUMENT_TOKENS is {value}: send 1 or more"):
            pairs.read(b"tea", [b"a"], Extent(1, value))


# What counts.


def bert_pair(tokenizer: Any, query: str, body: list[int]) -> dict[str, list[int]]:
    own = tokenizer(query, add_special_tokens=False)["input_ids"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = [cls, *own, sep, *body, sep]
    types = [0] * (len(own) + 2) + [1] * (len(body) + 1)
    return {"input_ids": ids, "token_type_ids": types}


def roberta_pair(tokenizer: Any, query: str, body: list[int]) -> dict[str, list[int]]:
    own = tokenizer(query, add_special_tokens=False)["input_ids"]
    return {"input_ids": [0, *own, 2, 2, *body, 2]}


def qwen_pair(tokenizer: Any, query: str, body: list[int]) -> dict[str, list[int]]:
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (f"{PREFIX}<Instruct>: {TASK}\n<Query>: {query}\n<Document>:", SUFFIX)
    )
    return {"input_ids": [*before, *body, *after]}


PAIRS = {"bert": bert_pair, "xlm-roberta": roberta_pair, "qwen": qwen_pair}


@pytest.mark.parametrize("family", PAIRS)
def test_the_best_passage_counts(family: str, tmp_path: Path, sample: Sample) -> None:
    """Its logit is what transformers gives for it, its tokens put by hand between the others."""
    if family == "qwen":
        checkpoint = write_qwen(tmp_path / "Qwen3-Reranker-0.6B", sample, "CausalLM")
        auto, leading, positions = transformers.AutoModelForCausalLM, " ", 1024
    else:
        checkpoint = write_checkpoint(tmp_path / "checkpoint", family, sample)
        auto, leading = transformers.AutoModelForSequenceClassification, ""
        positions = MOST
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "fp32", repository)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = auto.from_pretrained(checkpoint).eval()

    def logit(query: str, body: list[int]) -> float:
        pair = PAIRS[family](tokenizer, query, body)
        with torch.inference_mode():
            logits = model(**{name: torch.tensor([row]) for name, row in pair.items()}).logits[0]
        if family != "qwen":
            return float(logits[0])
        yes, no = (tokenizer.convert_tokens_to_ids(each) for each in ("yes", "no"))
        return float(logits[-1, yes] - logits[-1, no])

    query = "tea?"
    prose = [" ".join(texts[i : i + 4]) * 2 for _, texts in sample[:5] for i in (0, 6)]
    documents = [*prose, "tea", "", FAMILY * 100]
    ranking = pipeline(repository).rank(query, documents, extent=Extent(5))
    assert ranking.read
    room = positions - len(PAIRS[family](tokenizer, query, [])["input_ids"])
    after = tokenizer(SUFFIX, add_special_tokens=False)["input_ids"] if family == "qwen" else [2]
    best = []
    for row, index in enumerate(ranking.indices.tolist()):
        text = leading + documents[index]
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        size = min(BYTES_PER_PASSAGE, positions // 2)
        most = min(5, 1 + len(documents[index].encode()) // size)
        least = max(int(SHORTEST * room), SHORTEST_TOKENS, positions - room - len(after))
        places = windows(text, offsets, room, most, least)
        logits = [logit(query, ids[first:last]) for first, last in places]
        best.append(int(np.argmax(logits)))
        assert ranking.logits[row] == pytest.approx(max(logits), abs=1e-4)
        first, last = places[best[-1]]
        start, end = ranking.read.passages[row].tolist()
        assert start == (offsets[first][0] - len(leading) if first else 0)
        if last < len(ids):
            least, beyond = offsets[last - 1][1], offsets[last][0]
            assert least <= end + len(leading) <= max(least, beyond)
        else:
            assert end == len(documents[index])
        assert ranking.read.truncated[row] == (places[-1][1] < len(ids))
        sizes = [
            len(PAIRS[family](tokenizer, query, ids[slice(*each)])["input_ids"]) for each in places
        ]
        assert ranking.read.tokens[row] == sum(sizes)
    assert np.all(np.diff(ranking.logits) <= 0)
    assert max(best) > 0  # Else the test would not see which.


def table(*documents: int, **columns: Sequence[int]) -> np.ndarray:
    """Passages: of which documents, and what else is told of them."""
    rows = np.zeros(len(documents), PASSAGE)
    rows["document"] = documents
    for name, values in columns.items():
        rows[name] = values
    return rows


def test_rank_takes_the_best_passage() -> None:
    passages = table(
        0, 0, 0, 1, 2, 2, start=[0, 5, 9, 0, 0, 7], end=[6, 10, 15, 4, 8, 20],
        tokens=[3, 4, 5, 6, 7, 8], truncated=[1, 1, 1, 0, 0, 0],
    )  # fmt: skip
    ranking = rank(relevance(1, 3, 2, 4, -1, 0), None, passages)
    assert ranking.indices.tolist() == [1, 0, 2]
    assert ranking.logits.tolist() == [4, 3, 0]
    np.testing.assert_array_equal(ranking.scores, relevance(4, 3, 0).scores)
    assert ranking.read
    assert ranking.read.passages.tolist() == [[0, 4], [5, 10], [7, 20]]
    assert ranking.read.tokens.tolist() == [6, 12, 15]
    assert ranking.read.truncated.tolist() == [False, True, False]
    for top_k in (1, 2, 3, 9):
        few = rank(relevance(1, 3, 2, 4, -1, 0), top_k, passages)
        assert few.indices.tolist() == ranking.indices.tolist()[:top_k]
        assert few.read
        assert few.read.tokens.tolist() == ranking.read.tokens.tolist()[:top_k]
        assert few.read.passages.shape == (min(top_k, 3), 2)


def test_of_equal_passages_the_first_counts_and_of_equal_documents() -> None:
    passages = table(0, 0, 1, 2, 2, 2, start=range(6), end=range(6))
    ranking = rank(relevance(1, 5, 5, 5, 0, 5), None, passages)
    assert ranking.indices.tolist() == [0, 1, 2]
    assert ranking.read
    assert ranking.read.passages[:, 0].tolist() == [1, 2, 3]
    ranking = rank(relevance(-0.0, 0.0, 0.0, -0.0, 0.0, 0.0), 2, passages)
    assert ranking.indices.tolist() == [0, 1]
    assert ranking.read
    assert ranking.read.passages[:, 0].tolist() == [0, 2]


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    source=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rank_is_the_largest_by_document(counts: list[int], source: Any) -> None:
    rows = [(i, source.randint(-3, 3)) for i, count in enumerate(counts) for _ in range(count)]
    passages = table(*(i for i, _ in rows), start=range(len(rows)))
    ranking = rank(relevance(*(logit for _, logit in rows)), None, passages)
    best = [max(logit for i, logit in rows if i == each) for each in range(len(counts))]
    expected = sorted(range(len(counts)), key=lambda i: (-best[i], i))
    assert ranking.indices.tolist() == expected
    assert ranking.read
    assert ranking.read.passages[:, 0].tolist() == [rows.index((i, best[i])) for i in expected]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_passage_without_a_logit_names_its_document(value: float) -> None:
    with pytest.raises(InvalidOutput, match=r"DOCUMENTS\[1\]"):
        rank(relevance(9, 9, 1, value, 2), None, table(0, 0, 1, 1, 2))


@pytest.mark.parametrize(
    "documents",
    [
        (), (0,), (0, 1, 2, 3), (1, 1, 2), (0, 2, 3), (0, 1, 0), (-1, 0, 1),
        (0, 0, 2**31 - 1), (-(2**31), 0, 1),
    ],
)  # fmt: skip
def test_passages_of_other_logits_are_refused(documents: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="passages and scores are not those of the logits"):
        rank(relevance(1, 2, 3), None, table(*documents))


def test_no_passage_and_other_scores_are_refused() -> None:
    lone = relevance(1)
    for logits, scores in ((0, 0), (0, 1), (1, 0)):
        one = type(lone)(lone.logits[:logits], lone.scores[:scores])
        for passages in (None, table(*range(logits))):
            with pytest.raises(InvalidInput, match="send the request to reranker"):
                rank(one, None, passages)


def test_size_counts_passages() -> None:
    long = b"x" * 100_000
    one, sixteen = (Size.of(b"tea", [long, b"a"], 512, [most, 1]) for most in (1, 16))
    assert one.work == 4096 + 2048 + 4
    assert sixteen.work == 4096 + 16 * 2048 + 4
    assert (one.documents, sixteen.documents) == (2, 17)
    assert one.memory == sixteen.memory == 3 + 100_001


@pytest.mark.parametrize("query", ["tea", "how much tea is drunk " * 20])
@pytest.mark.parametrize("most", [1, 3, 12, 1024])
def test_size_is_about_what_is_read(query: str, most: int, ranker: Pipeline) -> None:
    """In the sorts of English, of which a token is about four bytes."""
    prose = "A cup of green tea has about thirty milligrams of caffeine, they say. "
    for length in (100, 2500, 9000, 60_000):
        text = (prose * 900)[:length].encode()
        pairs = ranker.tokenizer.read(query.encode(), [text], Extent(most))
        [tokens] = ranker.tokenizer.encode([pairs])
        size = Size.of(query.encode(), [text], 512, pairs.passages)
        assert size.documents == pytest.approx(len(tokens.lengths), rel=0.35)
        assert size.work - 4096 == pytest.approx(4 * tokens.lengths.sum(), rel=0.35)


@pytest.mark.parametrize(
    "text",
    [
        "A cup of green tea has about thirty milligrams of caffeine. ",
        "녹차 한 잔에는 카페인이 삼십 밀리그램쯤 들어 있다. ",
        "緑茶一杯には約三十ミリグラムのカフェインが含まれている。",
        '{"id": 1, "x": [0.5, 1.25], "name": "a"}, ',
    ],
)
def test_all_of_a_long_text_is_read(text: str, kinds: dict[str, Kind]) -> None:
    for name, kind in kinds.items():
        read = kind.read(text * 100, 1024)
        assert not read.passages["truncated"].any(), name
        few = kind.read(text * 100, 2)
        assert few.passages["truncated"].all(), name
        assert len(few.lengths) == 2
        assert few.lengths.tolist() == [MOST, MOST] or few.lengths[0] > 0.8 * MOST


def test_windows_of_a_plain_text() -> None:
    """Words of four characters, ten a sentence: by hand."""
    text = " ".join(["word"] * 9 + ["end."]) + " "
    offsets = [(5 * i, 5 * i + 4) for i in range(100)]
    cut = partial(windows, text * 10, offsets)
    assert cut(100, 9) == [(0, 100)]
    assert cut(40, 1) == [(0, 40)]
    # As long as fit: 40 tokens, of which a sentence ends at 40, and 5 to 10 in common.
    assert cut(40, 9, 40) == [(0, 40), (30, 70), (60, 100)]
    # In three that have all of it: 100 / (1 + 2 × 0.75) = 40; and in two, what fits.
    assert cut(60, 3) == [(0, 40), (30, 70), (60, 100)]
    assert cut(40, 2) == [(0, 40), (30, 70)]
    # No shorter than 20, of which an eighth is two; no sentence ends near 38, but a word.
    assert cut(60, 99, 20)[:2] == [(0, 20), (18, 38)]


# Through the server.


@pytest.fixture(scope="module")
def client(int8_server: EmbeddedServer) -> Iterator[RerankClient]:
    with RerankClient(int8_server.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def ranker(int8_repository: Path) -> Pipeline:
    return pipeline(int8_repository)


@pytest.fixture(scope="module")
def documents(sample: Sample) -> list[str]:
    """Two that do not fit, and others."""
    english = " ".join(text for _, texts in sample[:3] for text in texts)
    japanese = " ".join(sample[4][1]) * 5
    return ["tea", f"{english} A cup of tea.", "", japanese, *sample[0][1][:2]]


def infer(server: EmbeddedServer, *texts: str, **tensors: np.ndarray) -> Any:
    """A request of some documents by plain tritonclient."""
    documents = np.array(texts or ["a cup"], object)
    strings = {"QUERY": np.array(["tea"], object), "DOCUMENTS": documents}
    inputs = []
    for name, value in (strings | tensors).items():
        kind = {"O": "BYTES", "i": "INT32", "l": "INT64", "f": "FP32"}[value.dtype.char]
        inputs.append(triton.InferInput(name, list(value.shape), kind))
        inputs[-1].set_data_from_numpy(value)
    with triton.InferenceServerClient(server.grpc_url) as client:
        return client.infer("reranker", inputs, client_timeout=60)


def columns(ranking: list[RankedDocument]) -> list[Any]:
    return [(each.index, each.logit, each.passage, each.tokens, each.truncated) for each in ranking]


def by_the_pipeline(ranker: Pipeline, query: str, texts: list[str], extent: Extent) -> list[Any]:
    ranking = ranker.rank(query, texts, extent=extent)
    assert ranking.read
    return list(
        zip(
            ranking.indices.tolist(),
            ranking.logits.tolist(),
            map(tuple, ranking.read.passages.tolist()),
            ranking.read.tokens.tolist(),
            ranking.read.truncated.tolist(),
        )
    )


@pytest.mark.parametrize("name", ["MAX_PASSAGES", "MAX_DOCUMENT_TOKENS"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.int32([0]), "{name} is 0: send 1 or more, or leave it out"),
        (np.int32([-1]), "{name} is -1: send 1 or more, or leave it out"),
        (np.int32([-(2**31)]), "{name} is -2147483648: send 1 or more"),
        (np.int64([2]), "{name}' data-type is 'INT64'.*expects 'INT32'"),
        (np.float32([2]), "{name}' data-type is 'FP32'.*expects 'INT32'"),
        (np.int32([2, 2]), "shape for input '{name}'.* Expected \\[1\\], got"),
        (np.int32([]), "shape for input '{name}'.* Expected \\[1\\], got"),
        (np.int32([[2]]), "shape for input '{name}'.* Expected \\[1\\], got"),
    ],
)
def test_the_server_refuses(
    name: str, value: np.ndarray, message: str, int8_server: EmbeddedServer
) -> None:
    with pytest.raises(InferenceServerException, match=message.format(name=name)) as caught:
        infer(int8_server, **{name: value})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_server_has_a_limit_of_passages(int8_server: EmbeddedServer) -> None:
    half = "a" * 511 * BYTES_PER_PASSAGE
    for texts, passages in ((["a cup"] * 1024, 2**31 - 1), ([half] * 2, 512), ([half] * 4, 256)):
        result = infer(int8_server, *texts, MAX_PASSAGES=np.int32([passages]))
        assert len(result.as_numpy("PASSAGES")) == len(texts)
    for count, passages in ((5, 205), (3, 2**31 - 1)):
        with pytest.raises(
            InferenceServerException,
            match=rf"DOCUMENTS has {count} documents of up to \d+ passages, and a request may have "
            "1024: split it, .* or send a smaller MAX_PASSAGES",
        ):
            infer(int8_server, *[half] * count, MAX_PASSAGES=np.int32([passages]))
    result = infer(int8_server, MAX_DOCUMENT_TOKENS=np.int32([2**31 - 1]))
    assert result.as_numpy("TRUNCATED").tolist() == [False]
    result = infer(int8_server, MAX_DOCUMENT_TOKENS=np.int32([1]))
    assert result.as_numpy("PASSAGES").tolist() == [[0, 1]]
    assert result.as_numpy("TRUNCATED").tolist() == [True]


def test_the_sorter_refuses_what_no_request_has(int8_server: EmbeddedServer) -> None:
    for logits, documents in ((3, (0, 0)), (2, (0, 2)), (2, ()), (0, ())):
        inputs = []
        for name, value in (
            ("logits", np.zeros((logits, 1), np.float32)),
            ("scores", np.zeros((logits, 1), np.float32)),
            ("passages", table(*documents).view(np.int32).reshape(-1, 5)),
        ):
            kind = "INT32" if name == "passages" else "FP32"
            inputs.append(triton.InferInput(name, list(value.shape), kind))
            inputs[-1].set_data_from_numpy(value)
        with (
            triton.InferenceServerClient(int8_server.grpc_url) as client,
            pytest.raises(InferenceServerException, match="passages and scores are not") as caught,
        ):
            client.infer("sorter", inputs, client_timeout=60)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


EXTENTS = [(None, None), (1, None), (2, None), (9, None), (9, 700), (None, 3), (3, 1)]


def test_the_server_ranks_as_the_pipeline_whatever_runs_beside(
    client: RerankClient, int8_server: EmbeddedServer, ranker: Pipeline, documents: list[str]
) -> None:
    """Requests of any extent at once, bad ones and ones that are given up among them."""
    extents = [Extent(passages or 1, tokens) for passages, tokens in EXTENTS]
    expected = [by_the_pipeline(ranker, "tea", documents, extent) for extent in extents]
    assert len({str(each) for each in expected}) == 6  # All but the first two differ.

    def good(i: int) -> None:
        passages, tokens = EXTENTS[i % len(EXTENTS)]
        ranking = client.rank(
            "tea",
            documents,
            bulk=i % 2 == 1,
            max_passages=passages,
            max_document_tokens=tokens,
        )
        assert columns(ranking) == expected[i % len(EXTENTS)]

    def bad(_: int) -> None:
        with pytest.raises(InferenceServerException, match="MAX_PASSAGES is 0"):
            infer(int8_server, MAX_PASSAGES=np.int32([0]))

    def given_up(i: int) -> None:
        with grpc.insecure_channel(int8_server.grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = protocol.request("tea", documents, None, Options(max_passages=16), 0.05 * i)
            call = stub.ModelInfer.future(message)
            with pytest.raises((grpc.RpcError, grpc.FutureTimeoutError)):
                call.result(timeout=0.01 * i)
            call.cancel()

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(good, i) for i in range(len(EXTENTS))]
        calls += [pool.submit(each, i) for i in range(4) for each in (bad, given_up)]
        for call in calls:
            call.result()
    good(4)


def test_the_client_splits_by_passages(
    client: RerankClient, int8_repository: Path, documents: list[str]
) -> None:
    texts = [f"tea {i % 40}" for i in range(300)]  # With ties.
    texts[150], texts[299] = documents[1], documents[3]
    unsplit = Pipeline.of(int8_repository / "cross_encoder" / "current", 3000)
    expected = by_the_pipeline(unsplit, "a cup of tea", texts, Extent(10))
    assert columns(client.rank("a cup of tea", texts, max_passages=10)) == expected
    assert any(each[2][0] > 0 for each in expected)


def test_the_command_line_cuts_documents(
    int8_server: EmbeddedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "documents.txt"
    file.write_text("green tea in the morning\ntea\n")
    rank = ["rank", "tea", str(file), "--url", int8_server.grpc_url, "--json"]
    for options, truncated in ([], False), (["--max-document-tokens", "2"], True):
        assert main([*rank, *options]) == 0
        told = {each["index"]: each["truncated"] for each in json.loads(capsys.readouterr().out)}
        assert told == {0: truncated, 1: False}
