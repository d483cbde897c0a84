"""Every family, in both forms of its graph, against what its publisher runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import pipeline, start
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import Dense, LogitScore, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from test_export import (
    BERT_TOKENS,
    SIZE,
    Sample,
    byte_level,
    graph_of,
    on_a_cpu,
    unigram,
    wordpiece,
)
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from tritonrank import RerankClient
from tritonrank_server.errors import ExportRefused, UnsupportedCheckpoint
from tritonrank_server.export.command import export
from tritonrank_server.export.families import FAMILIES
from tritonrank_server.export.families.deberta import log_buckets
from tritonrank_server.export.frame import portable

from loadtest.bench import new_repository

VOCABULARY, MOST = 100, 200
#: On both sides of windows of 8 tokens to each side, of a block's ends, and all the positions.
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 40, 100, 199, 200)

MODERN = {"intermediate_size": 48, "local_attention": 16, "num_hidden_layers": 4}
V3 = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
QWEN = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
#: What a config of each family can name: the family's name in transformers, its settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ModernBERT": ("ModernBert", MODERN),
    "ModernBERT, mean": ("ModernBert", MODERN | {"classifier_pooling": "mean"}),
    "ModernBERT, biases": (
        "ModernBert",
        MODERN
        | dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
        | {"hidden_activation": "relu", "classifier_activation": "silu"},
    ),
    "ModernBERT, all windows": ("ModernBert", MODERN | {"layer_types": ["sliding_attention"] * 4}),
    "ModernBERT, no window": ("ModernBert", MODERN | {"layer_types": ["full_attention"] * 4}),
    "ModernBERT, odd window": ("ModernBert", MODERN | {"local_attention": 7}),
    "Qwen3": ("Qwen3", QWEN),
    "Qwen3, biases": ("Qwen3", QWEN | {"attention_bias": True, "num_key_value_heads": 4}),
    "Qwen3, one key": ("Qwen3", QWEN | {"num_key_value_heads": 1, "head_dim": 48}),
    "DeBERTa-v3": ("DebertaV2", V3),
    "DeBERTa-v2": (
        "DebertaV2",
        V3 | {"share_att_key": False, "type_vocab_size": 2, "position_biased_input": True},
    ),
    "DeBERTa, c2p": ("DebertaV2", V3 | {"pos_att_type": ["c2p"], "share_att_key": False}),
    "DeBERTa, p2c, no buckets": (
        "DebertaV2",
        V3 | {"pos_att_type": "p2c", "position_buckets": -1, "norm_rel_ebd": "none"},
    ),
    "DeBERTa, no positions": ("DebertaV2", V3 | {"pos_att_type": None}),
    "DeBERTa, absolute": ("DebertaV2", {"pos_att_type": "c2p|p2c"}),
    "DeBERTa, projected": (
        "DebertaV2",
        V3 | {"embedding_size": 16, "pooler_hidden_act": "tanh", "max_relative_positions": 50},
    ),
    "DistilBERT": ("DistilBert", {"hidden_dim": 48}),
    "DistilBERT, relu": ("DistilBert", {"activation": "relu", "sinusoidal_pos_embds": True}),
}


def small(name: str, settings: dict[str, Any], **changes: Any) -> transformers.PreTrainedModel:
    """A model of random weights."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": MOST, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE | sizes | settings | changes)
    return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()


def session_of(model: transformers.PreTrainedModel, form: str) -> onnxruntime.InferenceSession:
    graph = graph_of(model, form, "fp32", False, MOST)
    return onnxruntime.InferenceSession(portable(graph).SerializeToString())


def run(session: onnxruntime.InferenceSession, rows: list[np.ndarray]) -> np.ndarray:
    """Logits of documents in one execution."""
    lengths = np.array([[len(row)] for row in rows], np.int32)
    ids = np.full((len(rows), lengths.max()), -1, np.int32)
    for filled, row in zip(ids, rows):
        filled[: len(row)] = row
    feed = {"input_ids": ids.ravel(), "lengths": lengths, "query_lengths": np.ones_like(lengths)}
    return session.run(["logits"], feed)[0][:, 0]


def tokens(*lengths: int) -> list[np.ndarray]:
    source = np.random.default_rng(0)
    return [source.integers(5, VOCABULARY, length, np.int32) for length in lengths]


def by_transformers(model: transformers.PreTrainedModel, rows: list[np.ndarray]) -> np.ndarray:
    """One at a time, so that nothing of it is padding."""
    with torch.inference_mode():
        return np.array([model(torch.tensor(row[None]).long()).logits.item() for row in rows])


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_equal_transformers(variant: str) -> None:
    model = small(*VARIANTS[variant])
    rows = tokens(*LENGTHS)
    expected = by_transformers(model, rows)
    assert np.ptp(expected) > 0.1
    packed = run(session_of(model, "packed"), rows)
    np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-4)
    session = session_of(model, "even")
    even = [run(session, [row]).item() for row in rows]
    np.testing.assert_allclose(even, expected, rtol=0, atol=1e-4)
    pair = tokens(40, 40)  # Of one length, the even form takes several.
    np.testing.assert_allclose(run(session, pair), by_transformers(model, pair), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["ModernBERT, mean", "Qwen3", "DeBERTa-v3", "DistilBERT"])
def test_a_nan_stays_in_its_document(variant: str) -> None:
    graph = graph_of(small(*VARIANTS[variant]), "packed", "fp32", False, MOST)
    [words] = [
        each
        for each in graph.graph.initializer
        if each.name.endswith(("word_embeddings.weight", "tok_embeddings.weight", "tokens.weight"))
    ]
    table = onnx.numpy_helper.to_array(words).copy()
    table[7] = np.nan
    words.CopyFrom(onnx.numpy_helper.from_array(table, words.name))
    rows = [np.where(row == 7, 8, row) for row in tokens(9, 25, 40, 16)]
    rows[1][-1] = 7
    logits = run(onnxruntime.InferenceSession(portable(graph).SerializeToString()), rows)
    assert np.isnan(logits).tolist() == [False, True, False, False]


def test_the_work_of_windows_grows_with_their_number() -> None:
    """As what is added to the weights of tokens shows, which is as large as the weights are."""
    sizes = [_largest_tensor(length) for length in (400, 800, 1600)]
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.1)
    assert sizes[2] / sizes[1] == pytest.approx(2, rel=0.1)


def _largest_tensor(length: int) -> int:
    """Of a layer of windows: the most numbers that any value of its graph has."""
    settings = MODERN | {"layer_types": ["sliding_attention"], "num_hidden_layers": 1}
    model = small("ModernBert", settings, max_position_embeddings=2000)
    graph = onnx.shape_inference.infer_shapes(graph_of(model, "even", "fp32", False, 2000))
    kinds = {each.name: each for each in graph.graph.value_info}
    del graph.graph.output[:]
    graph.graph.output.extend(kinds.values())
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feed = {
        "input_ids": np.full(length, 9, np.int32),
        "lengths": np.array([[length]], np.int32),
        "query_lengths": np.array([[1]], np.int32),
    }
    return max(value.size for value in session.run(None, feed))


@pytest.mark.parametrize(("buckets", "most"), [(256, 512), (256, 1024), (32, 128), (64, 777)])
def test_buckets_are_those_of_transformers(buckets: int, most: int) -> None:
    distances = np.arange(-most, most + 1)
    expected = make_log_bucket_position(torch.tensor(distances), buckets, most).long().numpy()
    np.testing.assert_array_equal(log_buckets(distances, buckets, most), expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ModernBert", MODERN | {"hidden_activation": "mish"}, "hidden_activation mish is not"),
        ("ModernBert", MODERN | {"classifier_activation": "mish"}, "classifier_activation mish"),
        ("ModernBert", MODERN | {"local_attention": 1}, "local_attention 1 is not supported"),
        ("ModernBert", MODERN | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("Qwen3", QWEN | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type linear"),
        ("Qwen3", QWEN | {"head_dim": 24}, "head_dim 24 is not supported"),
        ("Qwen3", QWEN | {"use_sliding_window": True, "max_window_layers": 1}, "sliding_attention"),
        ("DebertaV2", V3 | {"conv_kernel_size": 3}, "conv_kernel_size"),
        ("DebertaV2", V3 | {"pos_att_type": ["p2p"]}, "pos_att_type p2p"),
        ("DebertaV2", V3 | {"pooler_hidden_act": "mish"}, "pooler_hidden_act mish"),
        ("DistilBert", {"activation": "mish"}, "activation mish"),
    ],
)
def test_what_a_family_does_not_do_is_refused(
    name: str, settings: dict[str, Any], message: str
) -> None:
    model = small(name, settings)
    _, family = FAMILIES[type(model).__name__]
    with pytest.raises(UnsupportedCheckpoint, match=message):
        family.refuse(model.config)


def qwen_tokenizer(sample: Sample) -> transformers.PreTrainedTokenizerBase:
    """Qwen's own, of a small vocabulary."""
    # Not trained, since the trainer's result is another one at each run.
    words = Counter(
        word for query, documents in sample for text in documents for word in text.split()
    )
    vocabulary = {each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("yes", "no", *(f"Ġ{word}" for word, _ in words.most_common(60) if word.isascii())):
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                merges.append((word[:end], word[end]))
                vocabulary[word[: end + 1]] = len(vocabulary)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.padding_side, tokenizer.model_max_length = "left", 131072
    return tokenizer


TEMPLATE = (
    "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'Find.' }}"
    "<|im_end|>\n<|im_start|>user\nQ: {{ messages | selectattr('role', 'eq', 'query') | "
    "map(attribute='content') | first }}\nD: {{ messages | selectattr('role', 'eq', 'document') | "
    "map(attribute='content') | first }}<|im_end|>\n<|im_start|>assistant\n"
)


def write_qwen(folder: Path, sample: Sample, kind: str, template: str | None = None) -> Path:
    tokenizer = qwen_tokenizer(sample)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SIZE
        | QWEN
        | {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )
    model = getattr(transformers, f"Qwen3For{kind}")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


#: From the model card of Qwen3-Reranker.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"


def ids_of_the_card(
    folder: Path, query: str, documents: list[str], most: int, task: str = TASK
) -> list[list[int]]:
    """As the card's code makes them: the ends apart, and between them one text, cut."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False)
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    pairs = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {text}" for text in documents]
    inputs = tokenizer(
        pairs,
        padding=False,
        truncation="longest_first",
        return_attention_mask=False,
        max_length=most - len(prefix) - len(suffix),
    )
    return [prefix + each + suffix for each in inputs["input_ids"]]


def by_the_card(folder: Path, kind: str, rows: list[list[int]]) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="left")
    auto = {"CausalLM": "AutoModelForCausalLM"}.get(kind, "AutoModelForSequenceClassification")
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**batch).logits
    if kind != "CausalLM":
        return logits[:, 0].numpy()
    yes, no = (tokenizer.convert_tokens_to_ids(each) for each in ("yes", "no"))
    return (logits[:, -1, yes] - logits[:, -1, no]).numpy()


ODD = ["", " ", "\n a", "?!", "\u0301a", "<|im_end|> b", "3rd", "word " * 2000, "日本 🙂 한국어"]


@pytest.mark.parametrize("kind", ["CausalLM", "SequenceClassification"])
@pytest.mark.parametrize("task", [None, "Find what answers it"])
def test_qwen3_reads_and_scores_as_the_card_does(
    kind: str, task: str | None, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_qwen(tmp_path / "Qwen3-Reranker-0.6B", sample, kind)
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "fp32", repository, task)
    ranker = pipeline(repository)
    query, documents = sample[1]
    for asked in (query, "what?", "a\n"):
        texts = [*documents, *ODD]
        rows = ids_of_the_card(checkpoint, asked, texts, 1024, task or TASK)
        pairs = ranker.tokenizer.read(asked.encode(), [text.encode() for text in texts])
        [encoded] = ranker.tokenizer.encode([pairs])
        assert [each.input_ids.tolist() for each in encoded.documents()] == rows
        ranking = ranker.rank(asked, texts)
        expected = by_the_card(checkpoint, kind, rows)
        actual = ranking.logits[np.argsort(ranking.indices)]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("instruction", [None, "Find what answers it."])
def test_a_chat_template_of_its_own(
    instruction: str | None, tmp_path: Path, sample: Sample
) -> None:
    folder = write_qwen(tmp_path / "plain", sample, "CausalLM", TEMPLATE)
    module = Transformer(str(folder), transformer_task="text-generation")
    yes, no = module.tokenizer.convert_tokens_to_ids(["yes", "no"])
    prompts = {"prompts": {"q": instruction}, "default_prompt_name": "q"} if instruction else {}
    encoder = CrossEncoder(
        modules=[module, LogitScore(yes, no)],
        activation_fn=torch.nn.Identity(),
        device="cpu",
        **prompts,
    )
    encoder.save_pretrained(str(tmp_path / "kept"))
    repository = new_repository(tmp_path / "repository")
    export(str(tmp_path / "kept"), "fp32", repository)
    query, documents = sample[1]
    texts = [*documents, *ODD[:-2]]
    ranking = pipeline(repository).rank(query, texts)
    expected = encoder.predict([(query, text) for text in texts], batch_size=4)
    actual = ranking.logits[np.argsort(ranking.indices)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    assert ranking.scores.tolist() == ranking.logits.tolist()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ((10**6, 3), "tokens 1000000 and 3, and must be two of the model's"),
        ((-1, 3), "tokens -1 and 3"),
        ((3, 3), "tokens 3 and 3"),
        ((True, 3), "has not both true_token_id and false_token_id"),
        ((3, None), "has not both true_token_id and false_token_id"),
    ],
)
def test_answers_that_are_not_two_tokens_are_refused(
    answers: tuple[Any, Any], message: str, tmp_path: Path, sample: Sample
) -> None:
    folder = write_qwen(tmp_path / "plain", sample, "CausalLM", TEMPLATE)
    module = Transformer(str(folder), transformer_task="text-generation")
    kept = tmp_path / "kept"
    CrossEncoder(modules=[module, LogitScore(1, 2)], device="cpu").save_pretrained(str(kept))
    changed = dict(zip(("true_token_id", "false_token_id"), answers))
    (kept / "1_LogitScore" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        export(str(kept), "fp32", new_repository(tmp_path / "repository"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("upper", "reads other tokens than a server would"),
        ("trim", "reads other tokens than a server would"),
        ("truncate(300, true)", "reads other tokens than a server would"),
        ("replace('a', messages[0].content)", "reads other tokens|the query once"),
        ("nothing_known", "its chat template fails"),
        ("length", "the query once, and then the document once"),
    ],
)
def test_a_chat_template_that_changes_texts_is_refused(
    document: str, message: str, tmp_path: Path, sample: Sample
) -> None:
    template = TEMPLATE.replace(
        "'document') | map(attribute='content') | first",
        f"'document') | map(attribute='content') | first | {document}",
    )
    checkpoint = write_qwen(tmp_path / "Qwen3-Reranker-0.6B", sample, "CausalLM", template)
    with pytest.raises((UnsupportedCheckpoint, ExportRefused), match=message):
        export(str(checkpoint), "fp32", new_repository(tmp_path / "repository"))


def test_an_instruction_that_leaves_no_room_is_refused(tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_qwen(tmp_path / "mine", sample, "CausalLM")
    with pytest.raises(UnsupportedCheckpoint, match="shorten the instruction"):
        export(str(checkpoint), "fp32", new_repository(tmp_path / "repository"), "word " * 300)


def test_a_prompt_that_is_not_known_is_refused(tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_qwen(tmp_path / "mine", sample, "CausalLM")
    repository = new_repository(tmp_path / "repository")
    with pytest.raises(UnsupportedCheckpoint, match="name the task by --instruction"):
        export(str(checkpoint), "fp32", repository)
    with pytest.raises(UnsupportedCheckpoint, match="takes no --instruction"):
        export("default", "int8", repository, "Find.")


def cls_sep(tokenizer: Tokenizer) -> Tokenizer:
    """With ModernBERT's and DeBERTa's special tokens around a pair."""
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    ids = [(each, tokenizer.token_to_id(each)) for each in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def write_encoder(
    folder: Path, name: str, settings: dict[str, Any], sample: Sample, kind: str
) -> Path:
    """A checkpoint as they are published: ``kind`` is Model or ForSequenceClassification."""
    corpus = [text for query, documents in sample for text in (query, *documents)]
    train = {"ModernBert": byte_level, "DebertaV2": unigram, "DistilBert": wordpiece}[name]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train(corpus) if train is wordpiece else cls_sep(train(corpus)),
        model_max_length=10**9,
        model_input_names=["input_ids", "attention_mask"],
        **BERT_TOKENS,
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE | sizes | settings)
    getattr(transformers, f"{name}{kind}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ENCODERS = {
    "ModernBERT": ("ModernBert", MODERN),
    "DeBERTa": ("DebertaV2", V3),
    "DistilBERT": ("DistilBert", {}),
}


def published(kind: str, folder: Path, sample: Sample) -> Path:
    """A small checkpoint of a family, as its publisher keeps it."""
    if kind == "Qwen3":
        return write_qwen(folder / "Qwen3-Reranker-0.6B", sample, "CausalLM")
    if kind == "modules":
        return write_chain(folder / "chain", sample, "cls")
    name, settings = ENCODERS[kind]
    return write_encoder(folder / kind, name, settings, sample, "ForSequenceClassification")


def write_chain(folder: Path, sample: Sample, pooling: str, base: str = "ModernBERT") -> Path:
    """As the ettin rerankers are kept."""
    name, settings = ENCODERS[base]
    plain = write_encoder(folder.with_name("base"), name, settings, sample, "Model")
    torch.manual_seed(1)
    chain = [
        Transformer(str(plain)),
        Pooling(32, pooling),
        Dense(32, 24, activation_function=torch.nn.GELU()),
        LayerNorm(24),
        Dense(24, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    for layer in chain[2:]:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight)
    CrossEncoder(modules=chain, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("base", "pooling"), [*((each, "mean") for each in ENCODERS), ("ModernBERT", "cls")]
)
def test_modules_score_as_sentence_transformers_does(
    base: str, pooling: str, tmp_path: Path, sample: Sample
) -> None:
    folder = write_chain(tmp_path / "chain", sample, pooling, base)
    repository = new_repository(tmp_path / "repository")
    export(str(folder), "fp32", repository)
    query, documents = sample[1]
    texts = [*documents, "", "a", "word " * 300]
    encoder = CrossEncoder(str(folder), device="cpu")
    expected = encoder.predict([(query, text) for text in texts], activation_fn=torch.nn.Identity())
    ranking = pipeline(repository).rank(query, texts)
    actual = ranking.logits[np.argsort(ranking.indices)]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    scores = encoder.predict([(query, text) for text in texts])
    np.testing.assert_allclose(ranking.scores, scores[ranking.indices], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([Pooling(32, "max")], "use Pooling by cls or mean"),
        ([Pooling(32, "cls")], "the last module must be a Dense"),
        ([Pooling(32, "cls"), Dense(32, 1, activation_function=torch.nn.Mish())], "Mish"),
        ([Pooling(32, "cls"), Dense(32, 32, use_residual=True)], "is not supported"),
    ],
)
def test_modules_that_are_not_known_are_refused(
    chain: list[Any], message: str, tmp_path: Path, sample: Sample
) -> None:
    name, settings = ENCODERS["ModernBERT"]
    plain = write_encoder(tmp_path / "base", name, settings, sample, "Model")
    folder = tmp_path / "chain"
    CrossEncoder(modules=[Transformer(str(plain)), *chain], device="cpu").save_pretrained(
        str(folder)
    )
    with pytest.raises(UnsupportedCheckpoint, match=message):
        export(str(folder), "fp32", new_repository(tmp_path / "repository"))


@pytest.mark.parametrize("kind", [*ENCODERS, "Qwen3", "modules"])
@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("int8", 0.3)])
def test_lower_precisions(
    kind: str, precision: str, error: float, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = published(kind, tmp_path, sample)
    exact, lower = (new_repository(tmp_path / name) for name in ("exact", "lower"))
    export(str(checkpoint), "fp32", exact)
    export(str(checkpoint), precision, lower)
    on_a_cpu(lower)
    query, documents = sample[0]
    rankings = [pipeline(each).rank(query, documents) for each in (exact, lower)]
    expected, actual = (each.logits[np.argsort(each.indices)] for each in rankings)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=error * np.ptp(expected))


@pytest.mark.parametrize("kind", [*ENCODERS, "Qwen3", "modules"])
def test_served(kind: str, tmp_path: Path, sample: Sample) -> None:
    checkpoint = published(kind, tmp_path, sample)
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "int8", repository)
    query, documents = sample[1]
    expected = pipeline(repository).rank(query, documents)
    with start(repository) as server, RerankClient(server.grpc_url, timeout=60) as client:
        ranking = client.rank(query, documents)
    assert [each.index for each in ranking] == expected.indices.tolist()
    assert [each.logit for each in ranking] == expected.logits.tolist()


@pytest.mark.parametrize(
    ("names", "relevant"),
    [
        ({0: "irrelevant", 1: "relevant"}, 1),
        ({0: "Yes", 1: "No"}, 0),
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({0: "relevant", 1: "yes"}, None),
        ({0: "no", 1: "yes", 2: "maybe"}, None),
    ],
)
def test_labels(
    names: dict[int, str], relevant: int | None, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_encoder(
        tmp_path / "checkpoint",
        "DistilBert",
        {"num_labels": len(names), "id2label": names},
        sample,
        "ForSequenceClassification",
    )
    repository = new_repository(tmp_path / "repository")
    if relevant is None:
        with pytest.raises(UnsupportedCheckpoint, match="name it so in id2label"):
            export(str(checkpoint), "fp32", repository)
        return
    export(str(checkpoint), "fp32", repository)
    query, documents = sample[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    batch = tokenizer([query] * len(documents), documents, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**batch).logits.softmax(1)[:, relevant].numpy()
    ranking = pipeline(repository).rank(query, documents)
    np.testing.assert_allclose(ranking.scores, expected[ranking.indices], rtol=0, atol=1e-4)
