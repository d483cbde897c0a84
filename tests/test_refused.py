"""Checkpoints that are broken, incomplete or more than is run: one line, and nothing published."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import new_repository, pipeline
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from test_export import FAMILIES, Sample, reference, write_checkpoint
from tritonrank_server.errors import ExportRefused
from tritonrank_server.export import checkpoint as checkpoint_module
from tritonrank_server.export import command as module
from tritonrank_server.export import reading
from tritonrank_server.export.command import export
from tritonrank_server.export.compare import Expected
from tritonrank_server.export.frame import portable
from tritonrank_server.stages.tokenizer import PairTokenizer

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> Path:
    """A checkpoint of each family with nothing wrong, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    for family in FAMILIES:
        write_checkpoint(folder / family, family, sample, max_position_embeddings=514)
    return folder


def edit(file: str, **changes: object) -> Change:
    """Sets what a JSON file of a checkpoint says."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changes))

    return change


def write(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def remove(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [each for each in tensors if each.startswith("classifier.")]:
        del tensors[name]


def pickled(content: object) -> Change:
    return both(
        remove("model.safetensors"),
        lambda folder: torch.save(content, folder / "pytorch_model.bin"),
    )


def add_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zork"])
    tokenizer.save_pretrained(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
#: Words that no text has, and nothing of which a word could be made.
WORDS = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"q{i}q" for i in range(495))])
OF_WORDS = both(remove("tokenizer.json"), remove("tokenizer_config.json"))
TWO_MODULES = json.dumps(
    [{"type": f"sentence_transformers.models.{n}"} for n in ("Transformer", "Dense")]
)
MODULE_ELSEWHERE = '[{"type": "sentence_transformers.models.Transformer", "path": "0_T"}]'
CODE = {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"}

#: What is wrong → family, how it came so, words of the message.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "pointer to weights": (
        "bert",
        write("model.safetensors", POINTER),
        "model.safetensors is a Git",
    ),
    "pointer to a tokenizer": ("bert", write("tokenizer.json", POINTER), "git lfs pull"),
    "no config": ("bert", remove("config.json"), "has no config.json"),
    "no JSON": ("bert", write("config.json", "{"), "config.json is not JSON"),
    "no object": ("bert", write("config.json", "[]"), "config.json holds no JSON"),
    "no architecture": ("bert", edit("config.json", architectures=None), "unnamed architecture"),
    "no model type": ("bert", edit("config.json", model_type=None), 'needs "model_type": "bert"'),
    "unknown model type": ("bert", edit("config.json", model_type="x"), 'needs "model_type": "ber'),
    "another model type": (
        "bert",
        edit("config.json", model_type="roberta"),
        'needs "model_type": "bert" in config.json, which has roberta',
    ),
    "no padding id": ("roberta", edit("config.json", pad_token_id=None), "pad_token_id"),
    "no padding token": ("bert", edit("tokenizer_config.json", pad_token=None), "no padding token"),
    "impossible padding id": (
        "bert",
        edit("config.json", pad_token_id=10**6),
        "cannot load the weights of .*Padding_idx",
    ),
    "text for a number": ("bert", edit("config.json", num_attention_heads="4"), "expected int"),
    "few positions": (
        "bert",
        edit("tokenizer_config.json", model_max_length=2),
        "2 tokens, by mod",
    ),
    "cut weights": ("bert", cut, "model.safetensors is broken"),
    "no weights": ("bert", remove("model.safetensors"), "no file named model.safetensors"),
    "code for weights": ("bert", pickled({"weight": os.path.join}), "get them as safetensors"),
    "no pickle": (
        "bert",
        both(remove("model.safetensors"), write("pytorch_model.bin", "garbage")),
        "get them as safetensors",
    ),
    "unexpected weight": (
        "bert",
        weights(lambda each: each.update({"bert.adapter.weight": torch.ones(2)})),
        r"bert\.adapter\.weight are not of this architecture",
    ),
    "weight of another shape": (
        "bert",
        weights(lambda each: each.update({"classifier.weight": torch.ones(2, 32)})),
        r"classifier\.weight are of another shape",
    ),
    "adapter": ("bert", write("adapter_config.json", "{}"), "merge it"),
    "adapter's weights": ("bert", write("adapter_model.safetensors", ""), "merge it"),
    "code": ("bert", edit("config.json", auto_map=CODE), "config.json names code of its own"),
    "code for a tokenizer": (
        "bert",
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "tokenizer_config.json names code of its own",
    ),
    "no tokenizer": ("bert", OF_WORDS, "has no tokenizer: it needs tokenizer.json, or vocab.txt"),
    "no tokenizer of bytes": ("roberta", OF_WORDS, "has no tokenizer"),
    "half a tokenizer": ("roberta", both(OF_WORDS, write("vocab.json", "{}")), "has no tokenizer"),
    "no such tokenizer": ("bert", write("tokenizer.json", "{}"), "cannot load the tokenizer of"),
    "another's tokenizer": (
        "bert",
        both(OF_WORDS, write("vocab.txt", WORDS)),
        "knows 0% of the words",
    ),
    "more tokens than embeddings": (
        "bert",
        add_tokens,
        "1 tokens beyond the model's 500 embeddings, from 'zork' on: call model.resize_token_embed",
    ),
    "cut at the left": (
        "bert",
        edit("tokenizer_config.json", truncation_side="left"),
        "truncation_side of the tokenizer in .* is left",
    ),
    "padded at the left": (
        "bert",
        edit("tokenizer_config.json", padding_side="left"),
        "padding_side of the tokenizer in .* is left",
    ),
    "token types without embeddings": (
        "bert",
        both(
            edit("config.json", type_vocab_size=1),
            weights(
                lambda each: each.update(
                    {"bert.embeddings.token_type_embeddings.weight": torch.ones(1, 32)}
                )
            ),
        ),
        "type_vocab_size in config.json is 1",
    ),
    "special tokens as words": (
        "bert",
        edit("tokenizer_config.json", split_special_tokens=True),
        "split_special_tokens",
    ),
    "a length that is none": (
        "bert",
        edit("tokenizer_config.json", model_max_length="abc"),
        "cannot load model_max_length of the tokenizer",
    ),
    "architectures that are no list": ("bert", edit("config.json", architectures={"a": 1}), "'a'"),
    "a nest": ("bert", write("config.json", "[" * 100_000), "is not JSON"),
    "a model that does not run": (
        "bert",
        edit("config.json", chunk_size_feed_forward=7),
        "cannot load and run the model",
    ),
    "options of the module": (
        "bert",
        write("sentence_bert_config.json", '{"do_lower_case": true}'),
        "has do_lower_case, which is not supported",
    ),
    "a module elsewhere": (
        "bert",
        write("modules.json", MODULE_ELSEWHERE),
        "only modules of sentence-transformers .* in the top folder",
    ),
    "more modules": ("bert", write("modules.json", TWO_MODULES), "not of this architecture"),
    "no modules": ("bert", write("modules.json", '["a"]'), "not as sentence-transformers writes"),
    "prompt": (
        "bert",
        write("config_sentence_transformers.json", '{"default_prompt_name": "q"}'),
        "not as sentence-transformers writes",
    ),
    "another's activation": (
        "bert",
        edit("config.json", sentence_transformers={"activation_fn": "mine.Identity"}),
        "activation Identity \\(mine.Identity\\) is not supported",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(
    what: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, change, words = REFUSED[what]
    checkpoint = Path(shutil.copytree(whole / family, tmp_path / "checkpoint"))
    change(checkpoint)
    assert_refused(str(checkpoint), "int8", words, tmp_path, capsys)


@pytest.mark.parametrize("precision", module.LIMITS)
def test_missing_weights_are_named(
    precision: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(whole / "bert", tmp_path / "checkpoint"))
    weights(without_head)(checkpoint)
    words = r"classifier\.bias and 1 more are missing"
    assert_refused(str(checkpoint), precision, words, tmp_path, capsys)


def test_no_folder(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(str(tmp_path / "empty"), "int8", "has no config.json", tmp_path, capsys)
    file = str(whole / "bert" / "config.json")
    assert_refused(file, "int8", "config.json is a file", tmp_path, capsys)


def assert_refused(
    checkpoint: str,
    precision: str,
    words: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = folder / "repository"
    if not repository.exists():
        new_repository(repository)
    capsys.readouterr()
    arguments = [checkpoint, f"--precision={precision}", f"--model-repository={repository}"]
    assert module.main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    # What is said before is of the steps, such as "Exporting … as int8 …".
    assert all(line.endswith("…") for line in lines[:-1]), lines
    assert lines[-1].startswith("tritonrank: ")
    assert re.search(words, lines[-1]), lines[-1]
    assert not list((repository / "cross_encoder").glob("export-*"))


def test_code_is_neither_run_nor_asked_for(whole: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(whole / "bert", tmp_path / "checkpoint"))
    ran = tmp_path / "ran"
    write("evil.py", f"open({str(ran)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")(
        checkpoint
    )
    edit("config.json", auto_map=CODE, model_type="evil", architectures=["Model"])(checkpoint)
    repository = new_repository(tmp_path / "repository")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tritonrank",
            "export",
            checkpoint,
            "--model-repository",
            repository,
        ],
        input="y\n" * 9,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "names code of its own" in done.stderr.splitlines()[-1]
    assert not done.stdout
    assert not ran.exists()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", ["bert.embeddings.position_ids", "cls.predictions.bias"]),
        ("roberta", ["roberta.pooler.dense.weight", "lm_head.bias"]),
        ("electra", ["discriminator_predictions.dense.bias"]),
    ],
)
def test_weights_of_the_pretraining_are_left_out(
    family: str, names: list[str], whole: Path, tmp_path: Path, sample: Sample
) -> None:
    checkpoint = Path(shutil.copytree(whole / family, tmp_path / "checkpoint"))
    weights(lambda each: each.update({name: torch.ones(3) for name in names}))(checkpoint)
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "fp32", repository)
    ranking = pipeline(repository).rank(*sample[0])
    expected = reference(whole / family, *sample[0], 512)[ranking.indices]
    np.testing.assert_allclose(ranking.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_sees_what_is_cut_elsewhere(family: str, whole: Path, tmp_path: Path) -> None:
    source = checkpoint_module.source(str(whole / family), "fp32")
    path = tmp_path / "tokenizer.json"
    source.tokenizer.save(str(path))
    pairs = PairTokenizer(path, 100, source.prompt)
    reading.check(pairs, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / family, truncation_side="left")
    at_the_left = partial(tokenizer, truncation="only_second", max_length=source.max_length)

    def read(query: str, documents: list[str]) -> Any:
        return at_the_left([query] * len(documents), documents)["input_ids"]

    with pytest.raises(ExportRefused, match="reads other tokens"):
        reading.check(pairs, replace(source, read=read))


def test_the_check_sees_the_last_positions(whole: Path, tmp_path: Path) -> None:
    source = checkpoint_module.source(str(whole / "bert"), "fp32")
    source.tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = Expected.of(source)

    def error() -> float:
        module._save(source.graph, tmp_path)
        graph = tmp_path / "model.onnx"
        onnx.save(portable(onnx.load(graph, load_external_data=False)), graph)
        pairs = PairTokenizer(tmp_path / "tokenizer.json", 100)
        return expected.difference(graph, pairs, "fp32").logit_error

    assert error() < 1e-4
    positions = source.graph.graph.initializers["bert.embeddings.position_embeddings.weight"]
    table = positions.const_value.numpy().copy()
    table[-1, 0] += 100
    positions.const_value = ir.Tensor(table)
    assert error() > 1e-4


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


def saved_by_today(activation: str) -> Change:
    def save(folder: Path) -> None:
        function = getattr(torch.nn, activation.rpartition(".")[2])()
        CrossEncoder(str(folder), activation_fn=function, device="cpu").save_pretrained(str(folder))

    return save


def kept(**settings: object) -> Change:
    return edit("config.json", **settings)


ACTIVATIONS: dict[str, tuple[Change, bool]] = {
    "none": (kept(), True),
    "today": (saved_by_today(IDENTITY), False),
    "4.0": (kept(sentence_transformers={"activation_fn": IDENTITY}), False),
    "3": (kept(sbert_ce_default_activation_function=IDENTITY), False),
    "today before 4.0": (
        both(saved_by_today(IDENTITY), kept(sentence_transformers={"activation_fn": SIGMOID})),
        False,
    ),
    "4.0 before 3": (
        kept(
            sentence_transformers={"activation_fn": SIGMOID},
            sbert_ce_default_activation_function=IDENTITY,
        ),
        True,
    ),
    "null in 4.0": (
        kept(
            sentence_transformers={"activation_fn": None},
            sbert_ce_default_activation_function=IDENTITY,
        ),
        True,
    ),
}


@pytest.mark.parametrize("where", ACTIVATIONS)
def test_scores_equal_sentence_transformers(
    where: str, whole: Path, tmp_path: Path, sample: Sample
) -> None:
    change, sigmoid = ACTIVATIONS[where]
    checkpoint = Path(shutil.copytree(whole / "bert", tmp_path / "checkpoint"))
    change(checkpoint)
    repository = new_repository(tmp_path / "repository")
    export(str(checkpoint), "fp32", repository)
    (query, documents), ranker = sample[0], pipeline(repository)
    long = " ".join(documents) * 9
    model = CrossEncoder(str(checkpoint), device="cpu")
    # Where both are too long, it cuts the query at half of the positions, too.
    for asked, texts in ((query, [*documents, long]), (f"{query} " * 25, [long])):
        ranking = ranker.rank(asked, texts)
        expected = model.predict([(asked, text) for text in texts])[ranking.indices]
        np.testing.assert_allclose(ranking.scores, expected, rtol=0, atol=1e-4)
        assert (ranking.scores.tolist() != ranking.logits.tolist()) == sigmoid
