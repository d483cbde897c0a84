"""Small random checkpoints of each family, exported and compared with transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import new_repository, pipeline
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tritonrank_server import wheels
from tritonrank_server.errors import ExportRefused, UnsupportedCheckpoint, UnsupportedGraph
from tritonrank_server.export import checkpoint as checkpoint_module
from tritonrank_server.export import command as module
from tritonrank_server.export import default_model
from tritonrank_server.export.command import export
from tritonrank_server.export.compare import Difference
from tritonrank_server.export.families import FAMILIES as ARCHITECTURES
from tritonrank_server.export.frame import Even, Packed, portable, ragged
from tritonrank_server.export.layers import ACTIVATIONS
from tritonrank_server.export.loading import Loaded

Sample = list[tuple[str, list[str]]]

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_labels": 1,
    "initializer_range": 0.3,  # So that logits spread as a trained model's do.
}


def wordpiece(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_level(corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram(corpus: list[str]) -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = Counter(f"▁{word}" for text in corpus for word in text.split()).most_common(300)
    characters = sorted({character for text in corpus for character in text} | {"▁"})
    # Not trained, since the trainer's result is another one at each run.
    vocabulary = [*((token, 0.0) for token in special), *((word, -5.0) for word, _ in words)]
    vocabulary += [(character, -10.0) for character in characters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


BERT_TOKENS = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
ROBERTA_TOKENS = dict(pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>")
FAMILIES: dict[str, tuple[str, Callable[[list[str]], Tokenizer], dict[str, str]]] = {
    "bert": ("Bert", wordpiece, BERT_TOKENS),
    "electra": ("Electra", wordpiece, BERT_TOKENS),
    "roberta": ("Roberta", byte_level, ROBERTA_TOKENS),
    "xlm-roberta": ("XLMRoberta", unigram, ROBERTA_TOKENS),
}


def write_checkpoint(folder: Path, family: str, sample: Sample, **changes: object) -> Path:
    """A checkpoint of random weights with 64 positions to use."""
    name, train, special = FAMILIES[family]
    roberta = train is not wordpiece
    corpus = [text for query, documents in sample for text in (query, *documents)]
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (not roberta)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train(corpus),
        model_max_length=10**9,
        model_input_names=inputs,
        **special,
    )
    settings = SIZE | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": 64 + 2 * roberta,
        "type_vocab_size": 1 if roberta else 2,
    }
    if family == "electra":
        settings["embedding_size"] = 16
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def set_weight(checkpoint: Path, name: str, row: int, value: float) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    weights[name][row] = value
    save_file(weights, path, {"format": "pt"})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return new_repository(tmp_path / "repository")


@pytest.fixture
def published(tmp_path: Path, int8_repository: Path) -> Path:
    """A repository with the default model in it."""
    return Path(shutil.copytree(int8_repository, tmp_path / "published", symlinks=True))


def snapshot(repository: Path) -> dict[str, bytes | str]:
    """Every file's content and every link's target."""
    return {
        str(path.relative_to(repository)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in repository.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def reference(folder: Path, query: str, documents: list[str], max_length: int = 64) -> np.ndarray:
    """Logits of transformers' own model, padded, with its own tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = tokenizer(
        [query] * len(documents),
        documents,
        padding=True,
        truncation="only_second",
        max_length=max_length,
        return_tensors="pt",
    )
    with torch.inference_mode():
        return model(**encoded).logits[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    family: str, repository: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", family, sample)
    export(str(checkpoint), "fp32", repository)
    oracle = pipeline(repository)
    query, documents = sample[1]
    pad = FAMILIES[family][2]["pad_token"]
    odd = ["", "a", f"{pad} in the {pad} middle", pad * 5, "udp " * 500, "ünïcödé 日本 🙂"]
    texts = [*documents, *odd]
    ranking = oracle.rank(query, texts)
    expected = reference(checkpoint, query, texts)
    assert np.ptp(expected) > 0.1
    if family == "bert":  # Else the test would not see wrong token types.
        assert "token_type_ids" in transformers.AutoTokenizer.from_pretrained(checkpoint)("a", "b")
    actual = ranking.logits[np.argsort(ranking.indices)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    # The graph takes any number of documents at once, as Triton's own backend gives it.
    np.testing.assert_allclose(in_one_run(repository, query, texts), expected, rtol=0, atol=1e-4)


def test_a_model_of_4096_positions(repository: Path, tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", "bert", sample, max_position_embeddings=4096
    )
    folder = export(str(checkpoint), "fp32", repository)
    assert json.loads((folder / "export.json").read_text())["max_length"] == 4096
    query, documents = sample[0]
    texts = [documents[0], " ".join(documents) * 3, "udp " * 5000]
    expected = reference(checkpoint, query, texts, 4096)
    np.testing.assert_allclose(in_one_run(repository, query, texts), expected, rtol=0, atol=1e-4)


def test_fewer_tokens_than_the_checkpoint_takes(
    repository: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", "bert", sample, max_position_embeddings=512
    )
    export(str(checkpoint), "fp32", repository, max_length=100)
    query, documents = sample[0]
    texts = [documents[0], " ".join(documents)]
    expected = reference(checkpoint, query, texts, 100)
    ranking = pipeline(repository).rank(query, texts)
    actual = ranking.logits[np.argsort(ranking.indices)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    for wrong in (63, 513):
        with pytest.raises(UnsupportedCheckpoint, match="pass 64 to 512"):
            export(str(checkpoint), "fp32", repository, max_length=wrong)


def in_one_run(repository: Path, query: str, texts: list[str]) -> np.ndarray:
    tokenizer = pipeline(repository).tokenizer
    [tokens] = tokenizer.encode([tokenizer.read(query.encode(), [t.encode() for t in texts])])
    graph = onnxruntime.InferenceSession(repository / "cross_encoder" / "1" / "model.onnx")
    return graph.run(["logits"], tokens.inputs())[0][:, 0]


FORMS = {"even": Even, "packed": Packed}


def in_form(checkpoint: Path, form: str, token_types: bool = True) -> onnx.ModelProto:
    """The FP32 graph of a checkpoint, which export makes portable or quantises."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    return graph_of(model, form, "fp32", token_types, 64)


def graph_of(
    model: transformers.PreTrainedModel,
    form: str,
    precision: str,
    token_types: bool,
    max_length: int,
) -> onnx.ModelProto:
    _, family = ARCHITECTURES[type(model).__name__]
    loaded = Loaded(model, family(model.config), dict(model.named_parameters()), model)
    checkpoint_module._give_weights(loaded, precision)
    return ir.to_proto(ragged(loaded.reranker, FORMS[form], token_types, "Sigmoid", max_length))


def on_a_cpu(repository: Path) -> None:
    """Makes what is published for a GPU run here."""
    graph = graph_file(repository)
    onnx.save(portable(onnx.load(graph, load_external_data=False)), graph)


def graph_file(repository: Path) -> Path:
    """Where it lies beside its weights: the onnx package refuses links to those."""
    return (repository / "cross_encoder" / "current" / "model.onnx").resolve()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_compute_the_same(family: str, tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", family, sample, num_hidden_layers=3)
    lengths = np.array([[5], [1], [64], [40], [64]], np.int32)
    # With padding tokens, which RoBERTa's positions leave out.
    rows = np.random.default_rng(0).integers(0, 50, (5, 64)).astype(np.int32)
    rows[np.arange(64) >= lengths] = -1

    def run(form: str, documents: list[int]) -> np.ndarray:
        graph = portable(in_form(checkpoint, form, family == "bert"))
        own = {"lengths": lengths[documents], "query_lengths": lengths[documents] // 2}
        session = onnxruntime.InferenceSession(graph.SerializeToString())
        return session.run(["logits"], {"input_ids": rows[documents].ravel(), **own})[0]

    packed = run("packed", [0, 1, 2, 3, 4])
    assert np.ptp(packed) > 0.1
    for documents in ([0], [1], [2, 4], [3]):
        even = run("even", documents)
        np.testing.assert_allclose(even, packed[documents], rtol=0, atol=1e-4)


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no GPU"
)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("fp16", 0.02)])
@pytest.mark.parametrize("longest", [7, 64, 512])  # Other kernels for other lengths.
def test_packed_attention_on_a_gpu(precision: str, error: float, longest: int) -> None:
    graph = default_graph(precision)
    lengths = np.array([[longest // 2], [1], [longest], [longest - 3]], np.int32)
    rows = np.random.default_rng(0).integers(1000, 30000, (4, longest)).astype(np.int32)
    rows[np.arange(longest) >= lengths] = -1
    feed = {"input_ids": rows.ravel(), "lengths": lengths, "query_lengths": (lengths + 1) // 2}
    logits, expected = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=providers).run(
            ["logits"], feed
        )[0]
        for model, providers in (
            (graph, [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]),
            (portable(default_graph("fp32")), ["CPUExecutionProvider"]),
        )
    )
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=error)


def default_graph(precision: str) -> onnx.ModelProto:
    """The default model's, for a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        default_model.write_checkpoint(Path(folder))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        return graph_of(model, "packed", precision, True, 512)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample, hidden_act=activation)
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "fp32", repository)
    expected = reference(checkpoint, *sample[0])
    np.testing.assert_allclose(in_one_run(repository, *sample[0]), expected, rtol=0, atol=1e-4)


def test_a_weight_without_a_place_is_refused_by_name(tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    model.adapter = torch.nn.Linear(2, 2, bias=False)
    _, family = ARCHITECTURES[type(model).__name__]
    loaded = Loaded(model, family(model.config), dict(model.named_parameters()), model)
    with pytest.raises(UnsupportedCheckpoint, match=r"no place is known for adapter\.weight"):
        checkpoint_module._give_weights(loaded, "fp32")


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_document(form: str, tmp_path: Path, sample: Sample) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    exported = in_form(checkpoint, form)
    [words] = [
        each for each in exported.graph.initializer if each.name.endswith("word_embeddings.weight")
    ]
    weights = onnx.numpy_helper.to_array(words).copy()
    weights[7] = np.nan
    words.CopyFrom(onnx.numpy_helper.from_array(weights, words.name))
    session = onnxruntime.InferenceSession(portable(exported).SerializeToString())
    # Of three documents the first has the NaN, and in one form the second has padding.
    rows = np.array([[7, 9, 3, 7, 3, 4, 5], [2, 9, 3, 10, 3, 4, 5], [2, 9, 3, 10, 11, 12, 3]])
    lengths = np.array([[5], [5], [7]] if form == "packed" else [[7], [7], [7]], np.int32)
    rows[np.arange(7) >= lengths] = -1
    feed = {
        "input_ids": rows.astype(np.int32).ravel(),
        "lengths": lengths,
        "query_lengths": np.array([[3], [3], [3]], np.int32),
    }
    logits, scores = session.run(["logits", "scores"], feed)
    assert np.isnan(logits).ravel().tolist() == [True, False, False]
    assert np.isnan(scores).ravel().tolist() == [True, False, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lengths", [[6, 5, 7], [5, 5, 6], [18, -1, 0], [0, 10, 7], [10**9, 5, 7], [1, 1, 1]]
)
def test_lengths_that_do_not_add_up_shift_no_neighbour(
    form: str, lengths: list[int], request: pytest.FixtureRequest
) -> None:
    repository = request.getfixturevalue({"even": "int8", "packed": "fp32"}[form] + "_repository")
    session = onnxruntime.InferenceSession(repository / "cross_encoder" / "1" / "model.onnx")
    rows = [[7, 9, 3, 7, 3, -1, -1], [2, 9, 3, 10, 3, -1, -1], [2, 9, 3, 10, 11, 12, 3]]
    feed = {
        "input_ids": np.array(rows, np.int32).ravel(),
        "query_lengths": np.array([[3], [3], [3]], np.int32),
    }
    true, untrue = (np.array([each], np.int32).T for each in ([5, 5, 7], lengths))
    if form == "packed":
        assert np.isfinite(session.run(["logits"], feed | {"lengths": true})[0]).all()
    else:  # Which takes documents of one length only.
        assert_refused(session, feed | {"lengths": true})
    assert_refused(session, feed | {"lengths": untrue})


@pytest.mark.parametrize("form", FORMS)
def test_the_last_layer_ends_with_one_row_a_document(
    form: str, request: pytest.FixtureRequest
) -> None:
    repository = request.getfixturevalue({"even": "int8", "packed": "fp32"}[form] + "_repository")
    model = onnx.load(graph_file(repository))
    wide = {each.name for each in model.graph.initializer if [*each.dims] == [384, 1536]}
    products = [node.output[0] for node in model.graph.node if wide & {*node.input[1:2]}]
    assert len(products) == 12
    kind = {"even": onnx.TensorProto.INT32, "packed": onnx.TensorProto.FLOAT}[form]
    for name in products:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    tokens, documents = 2 * 7, 2  # As many, so that both forms have the same number of rows.
    feed = {
        "input_ids": np.full(tokens, 1000, np.int32),
        "lengths": np.array([[7], [7]], np.int32),
        "query_lengths": np.array([[3], [3]], np.int32),
    }
    rows = [each.size // 1536 for each in session.run(products, feed)]
    assert sorted(rows) == [documents] + [tokens] * 11


def test_onnx_runtime_knows_enough_shapes_to_fuse(fp32_repository: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # It warns that such a file suits no other machine.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    graph = fp32_repository / "cross_encoder" / "1" / "model.onnx"
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    operators = Counter(node.op_type for node in optimised.node)
    # Two a layer, but in the last.
    assert operators["SkipLayerNormalization"] >= 22


def assert_refused(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> None:
    try:
        [logits] = session.run(["logits"], feed)
    except (Fail, InvalidArgument, RuntimeException):
        return
    assert np.isnan(logits).all()


@pytest.mark.parametrize("form", FORMS)
def test_documents_longer_than_the_model(form: str, request: pytest.FixtureRequest) -> None:
    repository = request.getfixturevalue({"even": "int8", "packed": "fp32"}[form] + "_repository")
    session = onnxruntime.InferenceSession(repository / "cross_encoder" / "1" / "model.onnx")
    for longest, fits in ((512, True), (513, False), (100_000, False)):
        lengths = [[longest], [2]] if form == "packed" else [[longest]]
        feed = {
            "input_ids": np.full(np.sum(lengths), 1000, np.int32),
            "lengths": np.array(lengths, np.int32),
            "query_lengths": np.ones_like(lengths, np.int32),
        }
        if fits:
            assert np.isfinite(session.run(["logits"], feed)[0]).all()
        else:
            assert_refused(session, feed)


@pytest.mark.parametrize(
    ("precision", "largest", "typical"), [("fp16", 0.005, 0.001), ("int8", 0.06, 0.025)]
)
def test_lower_precisions(
    precision: str, largest: float, typical: float, repository: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "xlm-roberta", sample)
    folder = export(str(checkpoint), precision, repository)
    card = json.loads((folder / "export.json").read_text())
    assert card["precision"] == precision
    assert card["max_length"] == 64
    assert card["difference_from_fp32"]["logit_error"] > 0
    on_a_cpu(repository)
    ranker = pipeline(repository)
    rankings = [ranker.rank(*request) for request in sample]
    assert rankings[0].scores.dtype == np.float32
    exact = [reference(checkpoint, *request) for request in sample]
    expected = np.concatenate([e[ranking.indices] for e, ranking in zip(exact, rankings)])
    errors = np.concatenate([ranking.logits for ranking in rankings]) - expected
    assert np.abs(errors).max() < largest * np.ptp(expected)
    assert np.sqrt(np.mean(errors**2)) < typical * np.ptp(expected)


def largest_weight(repository: Path) -> int:
    """The largest INT8 weight by magnitude."""
    graph = onnx.load(graph_file(repository)).graph
    weights = [each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8]
    return max(abs(onnx.numpy_helper.to_array(each).astype(int)).max() for each in weights)


def test_int8_weights_leave_room_for_the_sum_of_two_products(int8_repository: Path) -> None:
    assert 2 * 255 * largest_weight(int8_repository) < 2**15


def test_the_default_at_fp16(repository: Path, fp32_repository: Path, sample: Sample) -> None:
    card = json.loads((export("default", "fp16", repository) / "export.json").read_text())
    other = json.loads((fp32_repository / "cross_encoder/current/export.json").read_text())
    for name in ("checkpoint", "weights", "max_length"):
        assert card[name] == other[name]
    assert card["checkpoint"] == "cross-encoder/ms-marco-MiniLM-L-12-v2"
    with pytest.raises(UnsupportedGraph, match="is for a GPU: export with --precision int8"):
        pipeline(repository)
    on_a_cpu(repository)
    half, exact = pipeline(repository), pipeline(fp32_repository)
    for query, documents in sample[:3]:
        ranking, expected = half.rank(query, documents, 10), exact.rank(query, documents, 10)
        assert ranking.indices.tolist() == expected.indices.tolist()
        np.testing.assert_allclose(ranking.logits, expected.logits, rtol=0, atol=0.02)


def test_activation_comes_from_the_config(repository: Path, tmp_path: Path, sample: Sample) -> None:
    identity = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5"}
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", "bert", sample, sentence_transformers=identity
    )
    export(str(checkpoint), "fp32", repository)
    ranking = pipeline(repository).rank(*sample[0])
    assert ranking.scores.tolist() == ranking.logits.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_labels": 2}, "2 labels"),
        ({"is_decoder": True}, "decoder"),
        ({"hidden_act": "mish"}, "hidden_act mish"),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
            "activation Tanh",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    changes: dict[str, object], message: str, repository: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample, **changes)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        export(str(checkpoint), "fp32", repository)


@pytest.mark.parametrize("others", [[], ["BertForSequenceClassification"]])
def test_another_architecture_is_refused_by_name(
    others: list[str], repository: Path, tmp_path: Path
) -> None:
    names = [*others, "GPT2ForSequenceClassification"]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": names})
    )
    with pytest.raises(UnsupportedCheckpoint, match="GPT2ForSequenceClassification is not supp"):
        export(str(tmp_path), "fp32", repository)


@pytest.mark.parametrize(("precision", "value"), [("fp32", float("nan")), ("fp16", 1e5)])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    precision: str, value: float, repository: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    # [MASK], which no pair of the sample has.
    set_weight(checkpoint, "bert.embeddings.word_embeddings.weight", 4, value)
    with pytest.raises(UnsupportedCheckpoint, match=r"word_embeddings\.weight holds NaN or inf"):
        export(str(checkpoint), precision, repository)


def test_a_graph_that_overflows_is_refused(
    repository: Path, tmp_path: Path, sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    set_weight(checkpoint, "bert.encoder.layer.0.output.dense.weight", 0, 3e38)
    before = snapshot(repository)
    arguments = [str(checkpoint), "--precision=fp32", f"--model-repository={repository}"]
    assert module.main(arguments) == 1
    assert "no finite logit" in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(repository) == before


def test_no_repository_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["default", f"--model-repository={tmp_path}"])
    assert "no model repository at" in capsys.readouterr().err


def test_no_such_checkpoint_is_one_line(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "nowhere"), f"--model-repository={repository}"]
    assert module.main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("tritonrank: cannot load")


def test_a_refused_export_leaves_what_was_there(
    published: Path, tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "bert", sample)
    before = snapshot(published)
    monkeypatch.setitem(module.LIMITS, "int8", [("logit_error", 1e-6, True)])
    with pytest.raises(ExportRefused, match=r"logit_error is .*, and the limit is 1e-06"):
        export(str(checkpoint), "int8", published)
    assert snapshot(published) == before


def test_a_folder_that_was_deleted_is_published_again(published: Path) -> None:
    shutil.rmtree((published / "cross_encoder" / "current").resolve())
    assert (export("default", "int8", published) / "model.onnx").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_what_was_there(published: Path, how: signal.Signals) -> None:
    repository = published
    before = snapshot(repository)
    command = [sys.executable, "-m", "tritonrank", "export", "default", "--precision=fp32"]
    with subprocess.Popen(
        [*command, f"--model-repository={repository}"], stderr=subprocess.DEVNULL
    ) as process:
        while not list(repository.glob("cross_encoder/.staging-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
    assert process.returncode != 0
    published = {
        name: data for name, data in snapshot(repository).items() if ".staging" not in name
    }
    assert published == before
    if how == signal.SIGKILL:
        assert list(repository.glob("cross_encoder/.staging-*"))
        export("default", "int8", repository)
    assert not list(repository.glob("cross_encoder/.staging-*"))


def test_the_one_before_is_kept_and_older_ones_go(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = default_model.int8_source()
    same = Difference(0.0, 0.0, 1.0, 1.0, 0.0)
    monkeypatch.setattr(module, "_source", lambda name, *_: replace(source, name=name))
    monkeypatch.setattr(module.Expected, "difference", lambda *_: same)
    monkeypatch.chdir(published.parent)  # As the command runs: the repository's path is relative.
    relative = Path(published.name)
    folders = [(relative / "cross_encoder" / "current").resolve()]
    folders += [export(name, "int8", relative) for name in ("one", "two")]
    assert folders[-1] == export("two", "int8", relative)
    assert [folder.exists() for folder in folders] == [False, True, True]
    current = relative / "cross_encoder" / "current"
    current.unlink()
    current.symlink_to("export-mistyped")
    folders.append(export("three", "int8", relative))
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    assert (relative / "cross_encoder" / "current").resolve() == folders[-1].resolve()


def test_one_export_waits_for_another_and_the_default_needs_no_torch(repository: Path) -> None:
    script = (
        "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None);"
        "from tritonrank_server.export.command import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "default", f"--model-repository={repository}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert (repository / "tokenizer" / "1" / "tokenizer.json").exists()


def test_the_dequantised_checkpoint_is_the_wheels_model(tmp_path: Path, sample: Sample) -> None:
    default_model.write_checkpoint(tmp_path)
    query, documents = sample[0]
    expected = default_model.int8_source().reference(query, documents)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    encoded = tokenizer([query] * 12, documents, padding=True, return_tensors="pt")
    with torch.inference_mode():
        actual = model(**encoded).logits[:, 0].numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_a_wheel_with_another_hash_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = wheels.Wheel("six", "1.16.0", "0" * 64, ("six.py",))
    with pytest.raises(wheels.WheelError, match=r"six==1\.16\.0"):
        wheels.fetch(wheel)
    assert not list((tmp_path / "tritonrank").iterdir())
