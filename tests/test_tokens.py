"""What a server reads, whatever kind of tokenizer a checkpoint has."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from test_export import Sample, byte_level, unigram, wordpiece, write_checkpoint
from tokenizers import Tokenizer, processors
from tritonrank_server.errors import UnsupportedCheckpoint
from tritonrank_server.export.command import export
from tritonrank_server.stages.tokenizer import PairTokenizer

from loadtest.bench import new_repository

MOST = 64
TEXTS = [
    "",
    " a  b ",
    "한국어와 日本語、ｶﾀｶﾅ ＡＢＣ ①",
    "naïve café 🗻\n\ttab",
    "long " * 100,
]


def marked(tokenizer: Tokenizer, pair: str) -> Tokenizer:
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    ids = [(each, tokenizer.token_to_id(each)) for each in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=pair, special_tokens=[each for each in ids if each[0] in pair]
    )
    return tokenizer


@pytest.mark.parametrize("train", [wordpiece, byte_level, unigram])
@pytest.mark.parametrize(
    "pair",
    [
        "$A $B",
        "$A [SEP] $B",
        "[CLS] $A $B [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        "[CLS] $A [SEP] [SEP] $B [SEP]",
        "$A [SEP] [CLS] [SEP] $B",
    ],
)
def test_any_template_of_special_tokens(
    train: Any, pair: str, tmp_path: Path, sample: Sample
) -> None:
    corpus = [text for query, documents in sample for text in (query, *documents)]
    tokenizer = marked(train(corpus), pair)
    tokenizer.enable_truncation(MOST, strategy="only_second")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pairs = PairTokenizer(tmp_path / "tokenizer.json", 100)
    for query in ("what?", "한국어 日本"):
        read = pairs.read(query.encode(), [text.encode() for text in TEXTS])
        [tokens] = pairs.encode([read])
        rows = [each.input_ids.tolist() for each in tokens.documents()]
        assert rows == [tokenizer.encode(query, text).ids for text in TEXTS]


#: The tokenizer's class, the model's type, and the file.
KEPT_BY_SENTENCEPIECE = {
    "XLMRobertaTokenizer": ("xlm-roberta", "sentencepiece.bpe.model"),
    "CamembertTokenizer": ("camembert", "sentencepiece.bpe.model"),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> Path:
    """A model of sentencepiece's own library."""
    path = tmp_path_factory.mktemp("sentencepiece") / "any.model"
    corpus = [text for query, documents in sample for text in (query, *documents, *TEXTS)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for text in corpus if text.strip()),
        model_prefix=str(path.with_suffix("")),
        vocab_size=600,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return path


@pytest.mark.parametrize("name", KEPT_BY_SENTENCEPIECE)
def test_a_tokenizer_of_sentencepiece_is_converted(
    name: str, model_file: Path, tmp_path: Path, sample: Sample
) -> None:
    kind, file = KEPT_BY_SENTENCEPIECE[name]
    shutil.copy(model_file, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    converted = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in (*TEXTS, *sample[3][1], *sample[4][1]):
        ids = converted(text, add_special_tokens=False)["input_ids"]
        expected = own.encode(text, out_type=str)
        actual = converted.convert_ids_to_tokens(ids)
        known = [each if own.piece_to_id(each) != own.unk_id() else "<unk>" for each in expected]
        assert actual == known


def test_a_checkpoint_without_tokenizer_json_is_exported(
    model_file: Path, tmp_path: Path, sample: Sample
) -> None:
    size = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).vocab_size()
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", "xlm-roberta", sample, vocab_size=size + 2
    )
    for file in checkpoint.glob("*token*"):
        file.unlink()
    shutil.copy(model_file, checkpoint / "sentencepiece.bpe.model")
    folder = export(str(checkpoint), "fp32", new_repository(tmp_path / "repository"))
    pairs = PairTokenizer.of(folder, 10)
    own = partial(sentencepiece.SentencePieceProcessor(model_file=str(model_file)).encode)
    read = pairs.read("일본의 산".encode(), ["日本で最も高い山".encode()])
    [tokens] = pairs.encode([read])
    query, document = own("일본의 산"), own("日本で最も高い山")
    shifted = [[each + 1 if each else 3 for each in ids] for ids in (query, document)]
    assert tokens.input_ids.tolist() == [0, *shifted[0], 2, 2, *shifted[1], 2]


def test_a_conversion_that_reads_other_pieces_is_refused(
    model_file: Path, tmp_path: Path, sample: Sample
) -> None:
    """As transformers' of DeBERTa's, which leaves out how the model writes ｶﾀｶﾅ."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    for file in checkpoint.glob("*token*"):
        file.unlink()
    shutil.copy(model_file, checkpoint / "spm.model")
    settings = {"tokenizer_class": "DebertaV2Tokenizer"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedCheckpoint, match=r"put a tokenizer\.json beside it"):
        export(str(checkpoint), "fp32", new_repository(tmp_path / "repository"))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_mecab_is_refused(file: str, tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    settings = json.loads((checkpoint / file).read_text())
    settings |= {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (checkpoint / file).write_text(json.dumps(settings))
    with pytest.raises(UnsupportedCheckpoint, match="splits words by MeCab"):
        export(str(checkpoint), "fp32", new_repository(tmp_path / "repository"))
