"""The ragged graph: what is put before and after a model's body so that it takes no padding.

Every exported graph has the same inputs and outputs, whatever the checkpoint:

    input_ids INT32 [T'], lengths INT32 [N, 1], query_lengths INT32 [N, 1]
    → logits FP32 [N, 1], scores FP32 [N, 1]

``input_ids`` are the rows of all documents, flattened, with -1 where a row is short. The prefix
drops the -1 and finds each document by ``lengths``; all that depends on the data is in it, so that
a body has plain inputs only. The suffix computes the scores, in FP32.

Triton lets anybody call an ensemble's steps themselves. Where ``lengths`` do not add up to the
tokens, one request of a batch would have its neighbours read a wrong text, and documents longer
than the model would take gigabytes. Then all lengths are taken as 1, and the execution fails or
every logit is NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import compose, helper, parser
from onnxruntime.quantization.onnx_model import ONNXModel
from tokenizers import Tokenizer

#: T real tokens, N documents, L tokens of the longest. ``slots`` [N, L] says which of the T tokens
#: stands at each place of the padded form. Where ``mask`` is false it is the document's own first:
#: attention weighs it with 0, and 0 times another document's NaN or infinity would be NaN.
_COMMON = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    no_token = Constant <value = int32 {0}> ()
    is_real = GreaterOrEqual (input_ids, no_token)
    real_ids = Compress <axis = 0> (input_ids, is_real)
    packed_ids = Cast <to = 7> (real_ids)
    told_size = Cast <to = 7> (lengths)
    tokens = Size (packed_ids)
    told_tokens = ReduceSum <keepdims = 0> (told_size)
    add_up = Equal (told_tokens, tokens)
    shortest = ReduceMin <keepdims = 0> (told_size)
    none_is_empty = GreaterOrEqual (shortest, one)
    told_longest = ReduceMax <keepdims = 0> (told_size)
    most = Constant <value = int64 {MAX_LENGTH}> ()
    none_is_long = LessOrEqual (told_longest, most)
    none_is_odd = And (none_is_empty, none_is_long)
    is_true = And (add_up, none_is_odd)
    size = Where (is_true, told_size, one)
    query_size = Cast <to = 7> (query_lengths)
    longest = ReduceMax <keepdims = 0> (size)
    place = Range (zero, longest, one)
    mask = Less (place, size)
    end = CumSum (size, zero)
    start = Sub (end, size)
    unbounded = Add (start, place)
    slots = Where (mask, unbounded, start)
    beyond_query = GreaterOrEqual (place, query_size)
    in_document = And (beyond_query, mask)
    padded_types = Cast <to = 7> (in_document)
"""

_PADDED = f"""
ragged (int32[rows] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)
    => (int64[n, l] padded_ids, int64[n, l] padded_mask, int64[n, l] padded_types, bool is_true)
{{{_COMMON}
    gathered = Gather <axis = 0> (packed_ids, slots)
    padded_ids = Where (mask, gathered, zero)
    padded_mask = Cast <to = 7> (mask)
}}
"""

_PACKED = f"""
ragged (int32[rows] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)
    => (int64[t] packed_ids, int64[t] packed_types, int64[t] packed_positions, int64[n, l] slots,
        bool[n, l] mask, int32[n] row_lengths, int64[t] unslots, int64[n] first, bool is_true)
{{{_COMMON}
    flat = Constant <value = int64[1] {{-1}}> ()
    flat_mask = Reshape (mask, flat)
    places = Size (mask)
    every_place = Range (zero, places, one)
    unslots = Compress <axis = 0> (every_place, flat_mask)
    flat_types = Reshape (padded_types, flat)
    packed_types = Gather (flat_types, unslots)
    packed_positions = Mod (unslots, longest)
    first = Reshape (start, flat)
    flat_size = Reshape (size, flat)
    row_lengths = Cast <to = 6> (flat_size)
}}
"""

_SUFFIX = """
activation (float[n, 1] raw, bool sound) => (float[n, 1] logits, float[n, 1] scores)
{
    nothing = Constant <value = float {0}> ()
    not_a_number = Div (nothing, nothing)
    exact = Cast <to = 1> (raw)
    logits = Where (sound, exact, not_a_number)
    scores = %s (logits)
}
"""

#: A body's inputs, in the order of the prefix's outputs.
PADDED_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PACKED_INPUTS = (
    "input_ids",
    "token_type_ids",
    "positions",
    "slots",
    "mask",
    "row_lengths",
    "unslots",
    "first",
)

#: Operators that compute each token's row from its own row and constants.
ROW_WISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Cast", "LayerNormalization"),
    *("Erf", "Gelu", "Relu", "Sigmoid", "Tanh"),
}


@dataclass(frozen=True)
class Source:
    """A checkpoint made ready for publishing.

    Attributes:
        name: the checkpoint, as the user named it.
        graph: the ragged graph, at the wanted precision.
        tokenizer: with truncation at the model's max length, and without padding.
        max_length: the most tokens of a pair.
        reference: query and documents → FP32 [N], the logits of the checkpoint's own FP32 model.
        provenance: what else is worth knowing of where this comes from.
    """

    name: str
    graph: onnx.ModelProto
    tokenizer: Tokenizer
    max_length: int
    reference: Callable[[str, list[str]], npt.NDArray[np.float32]]
    provenance: dict[str, str]


def ragged(body: onnx.ModelProto, activation: str, max_length: int) -> onnx.ModelProto:
    """The body between prefix and suffix.

    Args:
        body: a graph with the inputs ``PADDED_INPUTS`` or ``PACKED_INPUTS`` and one output, FP32 or
            FP16 [N, 1].
        max_length: the most tokens of a pair.
        activation: the ONNX operator that makes scores of logits, ``Sigmoid`` or ``Identity``.
    """
    body = _without_unread_rows(body)
    names = {value.name for value in body.graph.input}
    text, inputs = (
        (_PADDED, PADDED_INPUTS) if names == {*PADDED_INPUTS} else (_PACKED, PACKED_INPUTS)
    )
    text = text.replace("MAX_LENGTH", str(max_length))
    prefix, suffix = _parse(text, body), _parse(_SUFFIX % activation, body)
    *fed, is_true = [value.name for value in prefix.graph.output]
    model = compose.merge_models(
        prefix, body, io_map=list(zip(fed, inputs, strict=True)), prefix2="body/"
    )
    logits = f"body/{body.graph.output[0].name}"
    model = compose.merge_models(model, suffix, io_map=[(logits, "raw"), (is_true, "sound")])
    # Merging names the operator set once for each part.
    del model.opset_import[:]
    model.opset_import.extend(body.opset_import)
    onnx.checker.check_model(model)
    return model


def _without_unread_rows(body: onnx.ModelProto) -> onnx.ModelProto:
    """The body with Gathers of tokens' rows before the row-wise operators that they came after.

    The head reads one row a document, so what follows the last attention need compute no other.
    """
    model = ONNXModel(copy.deepcopy(body))
    of_tokens = helper.make_attribute("axis", 1)
    gathers = [node for node in model.nodes() if node.op_type == "Gather"]
    for gather in [node for node in gathers if of_tokens in node.attribute]:
        _move_up(gather, model)
    model.topological_sort()
    return model.model


def _move_up(gather: onnx.NodeProto, model: ONNXModel) -> None:
    constants = model.get_initializer_name_set()
    constants |= {node.output[0] for node in model.nodes() if node.op_type == "Constant"}
    users = model.input_name_to_nodes()
    fewer = {gather.output[0]}  # Values that need those rows only.
    for node in reversed(model.nodes()):
        read_by = [user.output[0] for user in users.get(node.output[0], [])]
        if _is_row_wise(node, constants) and read_by and fewer.issuperset(read_by):
            fewer.add(node.output[0])
    if gather.input[0] not in fewer:
        return
    model.replace_input_of_all_nodes(gather.output[0], gather.input[0])
    model.remove_node(gather)
    row_wise = [node for node in model.nodes() if node.output[0] in fewer]
    whole = [name for node in row_wise for name in node.input if name not in fewer | constants]
    for name in dict.fromkeys(whole):
        early = f"{name}/{gather.input[1]}"
        for node in row_wise:
            model.replace_node_input(node, name, early)
        model.add_node(helper.make_node("Gather", [name, gather.input[1]], [early], axis=1))
    # Their shapes are no longer so. The others' stay, since ONNX Runtime does not find them behind
    # MultiHeadAttention, and fuses only what it knows the shapes of.
    shapes = model.graph().value_info
    kept = [shape for shape in shapes if shape.name not in fewer]
    del shapes[:]
    shapes.extend(kept)


def _is_row_wise(node: onnx.NodeProto, constants: set[str]) -> bool:
    if node.op_type == "MatMul":
        return node.input[1] in constants
    if node.op_type == "ReduceMean":
        return helper.make_attribute("axes", [-1]) in node.attribute
    return node.op_type in ROW_WISE


def _parse(text: str, body: onnx.ModelProto) -> onnx.ModelProto:
    """A part in the versions of the body, as merging asks for."""
    [opset] = [each.version for each in body.opset_import if not each.domain]
    return parser.parse_model(f'<ir_version: {body.ir_version}, opset_import: ["": {opset}]>{text}')
