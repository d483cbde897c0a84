"""Large models of random weights, in published models' shapes: ``python -m loadtest.large NAME``.

No published weights can be had here. What an export and a server take of memory and time does not
depend on them; the vocabulary is made, of pieces that share beginnings as real ones do.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from .bench import new_repository
from .data import WORDS
from .memory import memory, show
from .workloads import sample

#: Name → the family in transformers, and its config.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bge-reranker-large": (
        "XLMRoberta",
        {
            "vocab_size": 250_002,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    # Small, but long as bge-reranker-v2-m3 is.
    "xlm-roberta-small-8192": (
        "XLMRoberta",
        {
            "vocab_size": 8_000,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "max_position_embeddings": 8194,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "gte-reranker-modernbert-base": ("ModernBert", {"vocab_size": 50_368}),
    "mxbai-rerank-base-v1": (
        "DebertaV2",
        {
            "vocab_size": 128_100,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "relative_attention": True,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
}
_LONGER = SHAPES["bge-reranker-large"][1] | {"max_position_embeddings": 8194}
SHAPES["bge-reranker-v2-m3"] = ("XLMRoberta", _LONGER)
#: Characters of the vocabulary: ASCII, Hangul, kana and Chinese characters.
CHARACTERS = [
    chr(each)
    for first, last in ((0x21, 0x7F), (0xAC00, 0xD7A4), (0x3041, 0x30FF), (0x4E00, 0x9FA0))
    for each in range(first, last)
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def write_checkpoint(name: str, folder: Path) -> int:
    """A checkpoint of a shape; gives the bytes of its weights, FP32."""
    kind, settings = SHAPES[name]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(settings["vocab_size"]),
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), SPECIAL)),
    )
    torch.manual_seed(0)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(num_labels=1, **settings, **ids)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    # So that documents differ by their words, and INT8's check finds a ranking to compare.
    model.get_input_embeddings().weight.data.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Its class, by the name that transformers 4 knows as well, which peers have.
    config_json = folder / "tokenizer_config.json"
    named = json.loads(config_json.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_json.write_text(json.dumps(named))
    return 4 * int(model.num_parameters())


def _tokenizer(size: int) -> Tokenizer:
    """A Unigram model: special tokens, words of the sample and of generated text, characters, and
    pieces made of them.
    """
    source = random.Random(0)
    texts = [text for request in sample() for text in request.documents] + [WORDS]
    words = [f"▁{word}" for text in texts for word in text.split()]
    scores = dict.fromkeys(SPECIAL, 0.0) | dict.fromkeys(words, -6.0)
    scores |= dict.fromkeys(["▁", *CHARACTERS], -12.0)
    pieces = list(scores)[len(SPECIAL) : size]
    scores = {piece: scores[piece] for piece in [*SPECIAL, *pieces]}
    while len(scores) < size:
        ending = source.choice(CHARACTERS[:94] if source.random() < 0.6 else CHARACTERS)
        piece = source.choice(pieces) + ending
        if len(piece) < 16 and piece not in scores:
            scores[piece] = source.uniform(-14, -8)
            pieces.append(piece)
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def main() -> None:
    """Makes one, exports it as INT8, serves it, and writes what both took."""
    parser = argparse.ArgumentParser(prog="loadtest.large", description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    name = parser.parse_args().name
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, repository = Path(scratch, name), new_repository(Path(scratch, "repository"))
        size = write_checkpoint(name, checkpoint)
        command = [sys.executable, "-m", "tritonrank", "export", str(checkpoint)]
        begun = time.monotonic()
        subprocess.run([*command, f"--model-repository={repository}"], check=True)
        seconds = time.monotonic() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        exported = {"fp32": size, "export_peak": peak, "export_seconds": seconds}
        show(memory(repository) | exported)


if __name__ == "__main__":
    main()
