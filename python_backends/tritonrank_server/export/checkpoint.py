"""Checkpoints that transformers loads: a hub id or a local folder → a ragged graph."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UnsupportedCheckpoint
from .families import FAMILIES, Reranker
from .folder import activation, find, one_line, refuse_broken_parts, settings
from .frame import Even, Packed, ragged
from .layers import load
from .progress import shown
from .quantise import quantise
from .source import Source

#: The fewest tokens with which the check can tell: the sample's queries take half of them at most.
MIN_LENGTH = 64
#: torch's names of activations → ONNX operators.
ACTIVATIONS = {"Sigmoid": "Sigmoid", "Identity": "Identity"}


def source(name: str, precision: str) -> Source:
    """Exports a checkpoint at a precision: ``fp32``, ``fp16`` or ``int8``.

    Nothing of the checkpoint is run but its weights: no remote code.

    Raises:
        UnsupportedCheckpoint: it cannot be had, is broken, or is of a kind that is not known here;
            the message says which.
    """
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    folder = find(name)
    family = _family(settings(folder))
    activation = _activation(folder)
    refuse_broken_parts(folder)
    tokenizer, model = _loaded(folder, name, family)
    max_length = _max_length(tokenizer, family.positions(model.config))
    backend = _backend_tokenizer(tokenizer, max_length)
    _check_ids(backend, model)
    read = partial(_read, tokenizer, max_length)
    token_types = _token_types(tokenizer, backend, model.config)
    return Source(
        name=name,
        graph=ragged(
            _with_weights(family(model.config), model, precision),
            Even if precision == "int8" else Packed,
            token_types,
            activation,
            max_length,
        ),
        tokenizer=backend,
        max_length=max_length,
        read=lambda query, documents: read(query, documents)["input_ids"],
        reference=_reference(model, read),
        unknown_id=tokenizer.unk_token_id,
        provenance={
            "architecture": type(model).__name__,
            "weights": f"sha256 {_hash(model)}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _loaded(
    folder: Path, name: str, family: type[Reranker]
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the FP32 model, all of which was in the folder."""
    # What is missing is told in one line here, not in a table there.
    transformers.logging.set_verbosity_error()
    with _telling(f"config.json of {name}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _check_config(config)
    family.refuse(config)
    with _telling(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_tokenizer(tokenizer, folder)
    with _telling(f"the weights of {name}"):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are refused below, by name.
        )
    _check_weights(found, folder, family)
    return tokenizer, model.eval()


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """Says in one line what a library found wrong while it loaded a part of a checkpoint.

    It may be anything, since these libraries check little. So nothing of ours belongs in here.
    """
    try:
        yield
    except UnpicklingError as error:
        raise UnsupportedCheckpoint(
            f"cannot load {what}: they are pickled, and broken or more than tensors, and no code "
            "of a checkpoint is run: get them as safetensors"
        ) from error
    except Exception as error:
        raise UnsupportedCheckpoint(
            f"cannot load {what}: {one_line(error)} ({type(error).__name__})"
        ) from error


def _family(settings: dict[str, Any]) -> type[Reranker]:
    names = settings.get("architectures") or ["an unnamed architecture"]
    architecture = " and ".join(map(str, names)) if isinstance(names, list) else str(names)
    if architecture not in FAMILIES:
        raise UnsupportedCheckpoint(
            f"{architecture} is not supported: use one of {', '.join(FAMILIES)}"
        )
    needed, family = FAMILIES[architecture]
    # By it, and by nothing else, transformers knows what to load.
    told = settings.get("model_type")
    if told != needed:
        raise UnsupportedCheckpoint(
            f'{architecture} needs "model_type": "{needed}" in config.json, which has '
            f"{told or 'none'}"
        )
    return family


def _check_config(config: PretrainedConfig) -> None:
    if config.num_labels != 1:
        raise UnsupportedCheckpoint(
            f"the checkpoint has {config.num_labels} labels, and a reranker has 1"
        )
    if config.pad_token_id is None:
        raise UnsupportedCheckpoint("pad_token_id in config.json is null: put the tokenizer's")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
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
    for side in ("truncation_side", "padding_side"):
        if getattr(tokenizer, side) != "right":
            raise UnsupportedCheckpoint(
                f"{side} of the tokenizer in {folder} is left, and only right is supported"
            )


def _check_weights(found: dict[str, Any], folder: Path, family: type[Reranker]) -> None:
    """Refuses weights that transformers made up (at random), or left out."""
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    unexpected = {name for name in found["unexpected_keys"] if not family.unused.match(name)}
    for names, what in (
        (mismatched, "of another shape than config.json says"),
        (found["missing_keys"], "missing"),
        (unexpected, "not of this architecture"),
    ):
        if names:
            first, *others = sorted(names)
            raise UnsupportedCheckpoint(
                f"of the weights in {folder}, {first}{f' and {len(others)} more' * bool(others)} "
                f"are {what}: use a checkpoint that was saved whole"
            )


def _max_length(tokenizer: PreTrainedTokenizerBase, positions: int) -> int:
    with _telling("model_max_length of the tokenizer"):
        max_length = min(positions, int(tokenizer.model_max_length))
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


def _check_ids(tokenizer: Tokenizer, model: PreTrainedModel) -> None:
    """Refuses tokens without an embedding, of which any would fail the request that has it."""
    rows = model.get_input_embeddings().num_embeddings
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
    if "token_type_ids" not in tokenizer.model_input_names or not any(pair.type_ids):
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


def _activation(folder: Path) -> str:
    """The ONNX operator for the activation that sentence-transformers runs."""
    name = activation(folder)
    package, _, function = name.rpartition(".")
    # It runs no other package's either, and takes a sigmoid.
    if not package.startswith("torch.") or function not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"activation {function} ({name}) is not supported: use torch's "
            f"{' or '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[function]


def _with_weights(family: Reranker, model: PreTrainedModel, precision: str) -> Reranker:
    """The model as a graph will have it, with the weights of the one that is loaded."""
    dtype = torch.float16 if precision == "fp16" else torch.float32
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        # Not left to the check on real pairs: they do not look up every row of the embeddings.
        if not parameter.detach().to(dtype).isfinite().all():
            raise UnsupportedCheckpoint(f"{name} holds NaN or infinity in {dtype}")
    strange = weights.keys() - dict(family.named_parameters()).keys()
    strange = {name for name in strange if not family.unused.match(name)}
    if strange:
        raise UnsupportedCheckpoint(f"no place is known for {', '.join(sorted(strange))}")
    arrays = {name: parameter.detach().numpy() for name, parameter in weights.items()}
    load(family, arrays, ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT)
    if precision == "int8":
        quantise(family)
    return family


def _read(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    query: str,
    documents: list[str],
    **options: object,
) -> Any:
    """Token ids and what goes with them, as the checkpoint's own tokenizer has them."""
    queries = [query] * len(documents)
    return tokenizer(queries, documents, truncation="only_second", max_length=max_length, **options)


def _reference(
    model: PreTrainedModel, read: Callable[..., Any]
) -> Callable[[str, list[str]], npt.NDArray[np.float32]]:
    """The checkpoint as transformers runs it: padded, FP32, with its own tokenizer."""

    def logits(query: str, documents: list[str]) -> npt.NDArray[np.float32]:
        encoded = read(query, documents, padding=True, return_tensors="pt")
        with _telling("and run the model"), torch.inference_mode():
            values: npt.NDArray[np.float32] = model(**encoded).logits[:, 0].numpy()
        return values

    return logits


def _hash(model: PreTrainedModel) -> str:
    """SHA-256 of the weights by name, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in shown(sorted(model.state_dict().items()), "Hashing"):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()
