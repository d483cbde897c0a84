"""Checkpoints that transformers loads: a hub id or a local folder → a ragged graph."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..errors import UnsupportedCheckpoint
from ..stages.tokenizer import Prompt
from . import layers, prompts, reading
from .families import Reranker
from .folder import Saved, find, refuse_broken_parts, saved, settings
from .frame import Even, Packed, ragged
from .loading import Loaded, family_of, load, telling
from .quantise import quantise
from .source import Source

#: The fewest tokens with which the check can tell: the sample's queries take half of them at most.
MIN_LENGTH = 64
#: torch's names of activations → ONNX operators.
ACTIVATIONS = {"Sigmoid": "Sigmoid", "Identity": "Identity"}


def source(
    name: str, precision: str, instruction: str | None = None, max_length: int | None = None
) -> Source:
    """Exports a checkpoint at a precision: ``fp32``, ``fp16`` or ``int8``.

    Nothing of the checkpoint is run but its weights: no remote code.

    Args:
        name: a hub id or a folder.
        precision: of the graph.
        instruction: the task of a language model, in place of the checkpoint's own.
        max_length: the most tokens of a pair, in place of what the checkpoint takes.

    Raises:
        UnsupportedCheckpoint: it cannot be had, is broken, or is of a kind that is not known here;
            the message says which.
    """
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    # What is missing is told in one line here, not in a table there.
    transformers.logging.set_verbosity_error()
    folder = find(name)
    contents, saved_ = settings(folder), saved(folder)
    family = family_of(contents, saved_)
    activation = _activation(saved_.activation)
    refuse_broken_parts(folder)
    with telling(f"config.json of {name}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family.refuse(config)
    with telling(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_tokenizer(tokenizer, folder, family)
    _check_conversion(tokenizer, folder)
    loaded = load(folder, name, config, family, saved_, tokenizer)
    max_length = _max_length(tokenizer, family.positions(config), saved_.max_length, max_length)
    backend = _backend_tokenizer(tokenizer, max_length)
    _check_ids(backend, loaded.model)
    prompt, render = _prompt(name, tokenizer, family, saved_, instruction)
    prompts.refuse_long(prompt, tokenizer, max_length)
    read = partial(_read, tokenizer, max_length, prompt, render)
    token_types = not prompt.whole and _token_types(tokenizer, backend, config)
    _give_weights(loaded, precision)
    return Source(
        name=name,
        graph=ragged(
            loaded.reranker,
            Even if precision == "int8" else Packed,
            token_types,
            activation,
            max_length,
        ),
        tokenizer=backend,
        max_length=max_length,
        prompt=prompt,
        activation=activation,
        read=lambda query, documents: read(query, documents)["input_ids"],
        reference=_reference(tokenizer, loaded, read, "left" if prompt.whole else "right"),
        unknown_id=tokenizer.unk_token_id,
        provenance={
            "architecture": " and ".join([*config.architectures, *saved_.modules[1:]]),
            "weights": f"sha256 {loaded.weights_hash()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, family: type[Reranker]
) -> None:
    if not tokenizer.is_fast:
        raise UnsupportedCheckpoint(f"{type(tokenizer).__name__} has no tokenizer.json")
    if tokenizer.pad_token is None:
        raise UnsupportedCheckpoint(
            f"the tokenizer in {folder} has no padding token: name it as pad_token in "
            "tokenizer_config.json"
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise UnsupportedCheckpoint(
            f"the tokenizer in {folder} reads special tokens in a text as words "
            "(split_special_tokens), which is not supported"
        )
    # A language model's padding is at the left, and nothing is read of it.
    for side in ("truncation_side", "padding_side")[: 2 - family.is_language_model]:
        if getattr(tokenizer, side) != "right":
            raise UnsupportedCheckpoint(
                f"{side} of the tokenizer in {folder} is left, and only right is supported"
            )


def _check_conversion(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuses what transformers made of sentencepiece's model, and reads other pieces than that."""
    if (folder / "tokenizer.json").exists():
        return
    for path in folder.glob("*.model"):
        own = SentencePieceProcessor(model_file=str(path))
        for text in (*reading.SCRIPTS, reading.COMPATIBLE):
            pieces = own.encode(text, out_type=str)
            known = [tokenizer.unk_token if own.is_unknown(own[each]) else each for each in pieces]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.convert_ids_to_tokens(ids) != known:
                raise UnsupportedCheckpoint(
                    f"of {text[:40]!r}, {type(tokenizer).__name__} of transformers reads other "
                    f"pieces than {path} has by sentencepiece's own library: put a tokenizer.json "
                    "beside it"
                )


def _max_length(
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    saved_length: int | None,
    wanted: int | None,
) -> int:
    with telling("model_max_length of the tokenizer"):
        max_length = min(positions, int(saved_length or tokenizer.model_max_length))
    if wanted is not None:
        if not MIN_LENGTH <= wanted <= max_length:
            raise UnsupportedCheckpoint(
                f"--max-length is {wanted}: pass {MIN_LENGTH} to {max_length}, which it takes"
            )
        return wanted
    if max_length < MIN_LENGTH:
        raise UnsupportedCheckpoint(
            f"{max_length} tokens, by model_max_length in tokenizer_config.json or "
            f"max_position_embeddings in config.json, are too few for a pair: {MIN_LENGTH} at least"
        )
    return max_length


def _backend_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenizer:
    """The tokenizer itself, cutting documents at the max length."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="only_second")
    return backend


def _check_ids(tokenizer: Tokenizer, model: Any) -> None:
    """Refuses tokens without an embedding, of which any would fail the request that has it."""
    base = getattr(model, "transformers_model", model)  # The first of a chain.
    rows = base.get_input_embeddings().num_embeddings
    pair = tokenizer.encode("a", "b")
    ids = tokenizer.get_vocab() | dict(zip(pair.tokens, pair.ids))  # In no vocabulary, some of it.
    beyond = sorted((each for each in ids if ids[each] >= rows), key=ids.__getitem__)
    if beyond:
        raise UnsupportedCheckpoint(
            f"the tokenizer has {len(beyond)} tokens beyond the model's {rows} embeddings, from "
            f"{beyond[0]!r} on: call model.resize_token_embeddings(len(tokenizer)), train, and save"
        )


def _token_types(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, config: PretrainedConfig
) -> bool:
    """Whether the document has token type 1; the graph tells it from the query by its place."""
    pair = backend.encode("a", "b")
    told = "token_type_ids" in tokenizer.model_input_names and any(pair.type_ids)
    if not told or not getattr(config, "type_vocab_size", 0):
        return False
    if max(pair.type_ids) >= config.type_vocab_size:
        raise UnsupportedCheckpoint(
            f"token types {pair.type_ids} are not supported: type_vocab_size in config.json is "
            f"{config.type_vocab_size}"
        )
    document = pair.sequence_ids.index(1)
    if pair.type_ids != [0] * document + [1] * (len(pair) - document):
        raise UnsupportedCheckpoint(
            f"token types {pair.type_ids} are not supported: they must be 0 up to the document "
            "and 1 from there"
        )
    return True


def _prompt(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    family: type[Reranker],
    saved: Saved,
    instruction: str | None,
) -> tuple[Prompt, prompts.Render | None]:
    if family.is_language_model:
        return prompts.find(name, tokenizer, saved, instruction)
    if instruction:
        raise UnsupportedCheckpoint(
            f"{name} takes no --instruction, which is for language models, such as Qwen3-Reranker"
        )
    return Prompt(before=saved.instruction or ""), None


def _activation(name: str) -> str:
    """The ONNX operator for the activation that sentence-transformers runs."""
    package, _, function = name.rpartition(".")
    # It runs no other package's either, and takes a sigmoid.
    if not package.startswith("torch.") or function not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"activation {function} ({name}) is not supported: use torch's "
            f"{' or '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[function]


def _give_weights(loaded: Loaded, precision: str) -> None:
    """Gives the graph's model the weights of the publisher's."""
    dtype = torch.float16 if precision == "fp16" else torch.float32
    weights, reranker = loaded.weights, loaded.reranker
    for name, parameter in weights.items():
        # Not left to the check on real pairs: they do not look up every row of the embeddings.
        if not parameter.detach().to(dtype).isfinite().all():
            raise UnsupportedCheckpoint(f"{name} holds NaN or infinity in {dtype}")
    places = dict(reranker.named_parameters()).keys()
    strange = {name for name in weights.keys() - places if not reranker.unused.match(name)}
    if strange:
        raise UnsupportedCheckpoint(f"no place is known for {', '.join(sorted(strange))}")
    if lacking := places - weights.keys():
        raise UnsupportedCheckpoint(f"there is no {', '.join(sorted(lacking))}")
    arrays = {name: parameter.detach().numpy() for name, parameter in weights.items()}
    layers.load(reranker, arrays, ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT)
    if precision == "int8":
        quantise(reranker)


def _read(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt: Prompt,
    render: prompts.Render | None,
    query: str,
    documents: list[str],
) -> Any:
    """Token ids and what goes with them, as the checkpoint's own tokenizer has them."""
    if not render:
        queries = [prompt.before + query] * len(documents)
        return tokenizer(queries, documents, truncation="only_second", max_length=max_length)
    # As publishers' code does: in one piece, cut, and only then ended.
    end = tokenizer(prompt.after, add_special_tokens=False)["input_ids"]
    texts = [render(query, document).removesuffix(prompt.after) for document in documents]
    options = {"truncation": True, "max_length": max_length - len(end)}
    ids = tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
    return {"input_ids": [each + end for each in ids]}


def _reference(
    tokenizer: PreTrainedTokenizerBase, loaded: Loaded, read: Callable[..., Any], side: str
) -> Callable[[str, list[str]], npt.NDArray[np.float32]]:
    """The checkpoint as its publisher runs it: padded at a side, FP32, with its own tokenizer."""

    def logits(query: str, documents: list[str]) -> npt.NDArray[np.float32]:
        encoded = read(query, documents)
        with telling("and run the model"), torch.inference_mode():
            batch = tokenizer.pad(encoded, return_tensors="pt", padding_side=side)
            values: npt.NDArray[np.float32] = loaded.logits(batch).numpy()
        return values

    return logits
