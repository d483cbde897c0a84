"""Checkpoints that transformers loads: a hub id or a local folder → a ragged graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
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

from .errors import UnsupportedCheckpoint
from .graph import EVEN, PACKED, Architecture, Source, portable, ragged
from .quantise import quantised

#: Architectures that number positions RoBERTa's way: from behind the padding token's id.
ROBERTA = {
    "CamembertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
}
ELECTRA = "ElectraForSequenceClassification"
SUPPORTED = {"BertForSequenceClassification", ELECTRA, *ROBERTA}

#: A protobuf message, and so a graph with its weights, must be smaller.
MAX_GRAPH_BYTES = 2**31
#: transformers' names of activations → ONNX operators.
HIDDEN_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "Gelu"),
    **dict.fromkeys(
        ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"),
        'Gelu <approximate = "tanh">',
    ),
    "relu": "Relu",
}
#: sentence-transformers' names of activations → ONNX operators.
ACTIVATIONS = {"Sigmoid": "Sigmoid", "Identity": "Identity"}


def load(name: str, precision: str) -> Source:
    """Exports a checkpoint at a precision: ``fp32``, ``fp16`` or ``int8``.

    Nothing of the checkpoint is run but its weights: no remote code.

    Raises:
        UnsupportedCheckpoint: it cannot be had, or is of a kind that is not known here; the message
            says which.
    """
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        _check_config(config)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedCheckpoint(f"cannot load {name}: {reason}") from error
    model.eval()
    _check_size(model, precision)
    max_length = _max_length(tokenizer, model)
    backend = _backend_tokenizer(tokenizer, max_length)
    types_given = "token_type_ids" in tokenizer.model_input_names and config.type_vocab_size > 1
    token_types = types_given and _tells_by_token_types(backend)
    weights = _hash(model)  # Before they are halved.
    return Source(
        name=name,
        graph=_graph(model, token_types, precision, _activation(config), max_length),
        tokenizer=backend,
        max_length=max_length,
        reference=_reference(name, tokenizer, max_length),
        provenance={
            "architecture": type(model).__name__,
            "weights": f"sha256 {weights}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _check_config(config: PretrainedConfig) -> None:
    architecture = " and ".join(config.architectures or ["none"])
    if architecture not in SUPPORTED:
        raise UnsupportedCheckpoint(
            f"{architecture} is not supported: use one of {', '.join(sorted(SUPPORTED))}"
        )
    if config.num_labels != 1:
        raise UnsupportedCheckpoint(
            f"the checkpoint has {config.num_labels} labels, and a reranker has 1"
        )
    if config.is_decoder:
        raise UnsupportedCheckpoint("the checkpoint is a decoder (is_decoder in its config)")
    if config.hidden_act not in HIDDEN_ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"hidden_act {config.hidden_act} is not supported: "
            f"use one of {', '.join(HIDDEN_ACTIVATIONS)}"
        )
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions != "absolute":
        raise UnsupportedCheckpoint(f"position embeddings of type {positions} are not supported")


def _check_size(model: PreTrainedModel, precision: str) -> None:
    # An INT8 graph is made of an FP32 one.
    size = model.num_parameters() * (2 if precision == "fp16" else 4)
    if size >= MAX_GRAPH_BYTES:
        raise UnsupportedCheckpoint(
            f"the graph would have {size / 2**30:.1f} GiB, and ONNX allows 2: "
            + ("the model is too large" if precision == "fp16" else "use --precision fp16")
        )


def _max_length(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    positions: int = model.config.max_position_embeddings
    if type(model).__name__ in ROBERTA:
        positions -= model.config.pad_token_id + 1
    return min(positions, int(tokenizer.model_max_length))


def _backend_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenizer:
    """The tokenizer itself, cutting documents at the max length."""
    if not tokenizer.is_fast:
        raise UnsupportedCheckpoint(f"{type(tokenizer).__name__} has no tokenizer.json")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="only_second")
    return backend


def _tells_by_token_types(tokenizer: Tokenizer) -> bool:
    """Whether the document has token type 1; the graph tells it from the query by its place."""
    pair = tokenizer.encode("a", "b")
    if not any(pair.type_ids):
        return False
    document = pair.sequence_ids.index(1)
    if pair.type_ids != [0] * document + [1] * (len(pair) - document):
        raise UnsupportedCheckpoint(
            f"token types {pair.type_ids} are not supported: they must be 0 up to the document "
            "and 1 from there"
        )
    return True


def _activation(config: PretrainedConfig) -> str:
    """The ONNX operator for the activation that sentence-transformers keeps in the config."""
    kept: dict[str, Any] = getattr(config, "sentence_transformers", None) or {}
    older = getattr(config, "sbert_ce_default_activation_function", None)
    name = (kept.get("activation_fn") or older or "Sigmoid").rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"activation {name} is not supported: use one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _graph(
    model: PreTrainedModel, token_types: bool, precision: str, activation: str, max_length: int
) -> onnx.ModelProto:
    if precision == "fp16":
        model.half()
    weights, architecture = _weights(model), _architecture(model, token_types)
    if precision == "int8":
        return quantised(ragged(weights, architecture, EVEN, activation, max_length))
    packed = ragged(weights, architecture, PACKED, activation, max_length)
    return portable(packed) if precision == "fp32" else packed


def _architecture(model: PreTrainedModel, token_types: bool) -> Architecture:
    config, name = model.config, type(model).__name__
    return Architecture(
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        activation=HIDDEN_ACTIVATIONS[config.hidden_act],
        head_activation="Gelu" if name == ELECTRA else "Tanh",
        token_types=token_types,
        padding_id=config.pad_token_id if name in ROBERTA else -1,
    )


def _weights(model: PreTrainedModel) -> dict[str, npt.NDArray[Any]]:
    weights = {}
    for name, parameter in model.named_parameters():
        # Not left to the check on real pairs: they do not look up every row of the embeddings.
        if not parameter.isfinite().all():
            raise UnsupportedCheckpoint(f"{name} holds NaN or infinity in {parameter.dtype}")
        weights[name.removeprefix(f"{model.base_model_prefix}.")] = parameter.detach().numpy()
    return weights


def _reference(
    name: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[str, list[str]], npt.NDArray[np.float32]]:
    """The checkpoint as transformers runs it: padded, FP32, with its own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32).eval()

    def logits(query: str, documents: list[str]) -> npt.NDArray[np.float32]:
        encoded = tokenizer(
            [query] * len(documents),
            documents,
            padding=True,
            truncation="only_second",
            max_length=max_length,
            return_tensors="pt",
        )
        with torch.inference_mode():
            values: npt.NDArray[np.float32] = model(**encoded).logits[:, 0].numpy()
        return values

    return logits


def _hash(model: PreTrainedModel) -> str:
    """SHA-256 of the weights by name, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()
