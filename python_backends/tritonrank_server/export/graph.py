"""The ragged graph of a cross-encoder of BERT's kind, as ONNX text and a checkpoint's weights.

Every graph has the same inputs and outputs, whatever the checkpoint:

    input_ids INT32 [T'], lengths INT32 [N, 1], query_lengths INT32 [N, 1]
    → logits FP32 [N, 1], scores FP32 [N, 1]

``input_ids`` are the rows of all documents, flattened, with -1 where a row is short. The graph
drops the -1 and finds each document by ``lengths``. The layers between are BERT's (Devlin et al.
2018), in one of two forms:

- Packed, FP32 or FP16, for a GPU: hidden states are [T, 1, H] with T real tokens, so no linear
  layer, normalisation or activation runs on padding. Nor does attention, which is ONNX Runtime's
  operator PackedMultiHeadAttention: it takes packed rows and where each document begins, and runs
  in fused kernels that hold nothing as large as L × L. It has kernels for GPUs only; ``portable``
  puts its definition in its place, which any processor runs.
- Even, FP32, to be quantised for a CPU, whose scorer gives one document at a time: hidden states
  are [N, L, H], of documents that all have L tokens, and any others are refused. So nothing is
  gathered, padded or masked, and ONNX Runtime's MultiHeadAttention, which without a mask holds
  nothing as large as L × L on a CPU either, is as fast as plain products.

The head reads the first row of each document, so nothing after the last layer's attention computes
any other row, and on a CPU no other row has a query there. (Packed attention has as many queries as
keys; on a GPU, one query a document took longer.)

Triton lets anybody call an ensemble's steps themselves. Where ``lengths`` do not add up to the
tokens, one request of a batch would have its neighbours read a wrong text, and documents longer
than the model would take gigabytes. Then all lengths are taken as 1, and the execution fails at the
embeddings, or every logit is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, inliner, numpy_helper, parser
from tokenizers import Tokenizer

from ..errors import UnsupportedCheckpoint

#: Parameters, FP32 or FP16, by their names in transformers without the base model's prefix.
Weights = Mapping[str, npt.NDArray[Any]]

_TYPES = "embeddings.token_type_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
#: What both add to a word's embedding, as one table; a token's kind is its row.
_KINDS = "embeddings.kinds"

#: T real tokens, N documents, L tokens of the longest.
_DOCUMENTS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    no_token = Constant <value = int32 {0}> ()
    is_real = GreaterOrEqual (input_ids, no_token)
    real_ids = Compress <axis = 0> (input_ids, is_real)
    ids = Cast <to = 7> (real_ids)
    told_size = Cast <to = 7> (lengths)
    tokens = Size (ids)
    told_tokens = ReduceSum <keepdims = 0> (told_size)
    add_up = Equal (told_tokens, tokens)
    shortest = ReduceMin <keepdims = 0> (told_size)
    none_is_empty = GreaterOrEqual (shortest, one)
    told_longest = ReduceMax <keepdims = 0> (told_size)
    most = Constant <value = int64 {MAX_LENGTH}> ()
    none_is_long = LessOrEqual (told_longest, most)
    none_is_odd = And (none_is_empty, none_is_long)
    sound = And (add_up, none_is_odd)
    size = Where (sound, told_size, one)
    longest = ReduceMax <keepdims = 0> (size)
    place = Range (zero, longest, one)
    query_size = Cast <to = 7> (query_lengths)
    in_document = GreaterOrEqual (place, query_size)
    type = Cast <to = 7> (in_document)
    by_place = Shape (type)
"""
#: ``place_ids`` [N, L] → ``kind``, a token type and a position in one number. Positions are
#: RoBERTa's, which do not count the padding token where a text has it. With -1 for its id, which is
#: no token's, they are BERT's.
_KIND = """
    padding_id = Constant <value = int64 {PADDING_ID}> ()
    is_padding = Equal (place_ids, padding_id)
    is_counted = Not (is_padding)
    counted = Cast <to = 7> (is_counted)
    running = CumSum (counted, one)
    numbered = Mul (running, counted)
    position = Add (numbered, padding_id)
    positions = Constant <value = int64 {POSITIONS}> ()
    first_of_type = Mul (type, positions)
    kind = Add (first_of_type, position)
"""

_EMBEDDINGS = """
    words = Gather ("embeddings.word_embeddings.weight", row_ids)
    kinds = Gather ("KIND_TABLE", row_kinds)
    placed = Add (words, kinds)
    embedded = LayerNormalization <axis = -1, epsilon = EPSILON>
        (placed, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
"""
#: ELECTRA's, where its embeddings are smaller than its hidden states.
_PROJECTION = """
    product = MatMul (embedded, "embeddings_project.weight")
    projected = Add (product, "embeddings_project.bias")
"""

#: ``#`` stands for the layer's number.
_LAYER = """
    input# = Identity (PREVIOUS)
    key_product# = MatMul (input#, "encoder.layer.#.attention.self.key.weight")
    value_product# = MatMul (input#, "encoder.layer.#.attention.self.value.weight")
    ATTENTION
    mixed_product# = MatMul (attended#, "encoder.layer.#.attention.output.dense.weight")
    mixed# = Add (mixed_product#, "encoder.layer.#.attention.output.dense.bias")
    attention_sum# = Add (mixed#, asking#)
    between# = LayerNormalization <axis = -1, epsilon = EPSILON> (attention_sum#,
        "encoder.layer.#.attention.output.LayerNorm.weight",
        "encoder.layer.#.attention.output.LayerNorm.bias")
    wide_product# = MatMul (between#, "encoder.layer.#.intermediate.dense.weight")
    wide# = Add (wide_product#, "encoder.layer.#.intermediate.dense.bias")
    active# = FEED_FORWARD_ACTIVATION (wide#)
    narrow_product# = MatMul (active#, "encoder.layer.#.output.dense.weight")
    narrow# = Add (narrow_product#, "encoder.layer.#.output.dense.bias")
    sum# = Add (narrow#, between#)
    hidden# = LayerNormalization <axis = -1, epsilon = EPSILON> (sum#,
        "encoder.layer.#.output.LayerNorm.weight", "encoder.layer.#.output.LayerNorm.bias")
"""
_HEAD = """
    dense_product = MatMul (PREVIOUS, "DENSE.weight")
    dense = Add (dense_product, "DENSE.bias")
    active = HEAD_ACTIVATION (dense)
    label_product = MatMul (active, "LABEL.weight")
    label = Add (label_product, "LABEL.bias")
    column = Constant <value = int64[2] {-1, 1}> ()
    raw = Reshape (label, column)
    exact = Cast <to = 1> (raw)
    nothing = Constant <value = float {0}> ()
    not_a_number = Div (nothing, nothing)
    logits = Where (sound, exact, not_a_number)
    scores = SCORE (logits)
"""


@dataclass(frozen=True)
class Form:
    """What differs between the two forms of hidden states.

    Attributes:
        places: ``place_ids`` [N, L], the token at each place.
        start: ``row_ids`` and ``row_kinds`` of the hidden states, ``first``, the documents' first
            rows among them, and what attention needs.
        attention: ``input#``, ``key_product#`` and ``value_product#`` → ``asking#``, the rows of
            the input that anything after needs, and ``attended#``, of their shape.
        last_attention: the same where those are the first rows alone.
    """

    places: str
    start: str
    attention: str
    last_attention: str


_EVEN_ATTENTION = """
    query_product# = MatMul (asking#, "encoder.layer.#.attention.self.query.weight")
    query# = Add (query_product#, "encoder.layer.#.attention.self.query.bias")
    key# = Add (key_product#, "encoder.layer.#.attention.self.key.bias")
    value# = Add (value_product#, "encoder.layer.#.attention.self.value.bias")
    attended# = com.microsoft.MultiHeadAttention <num_heads = HEADS> (query#, key#, value#)
"""
EVEN = Form(
    """
    place_ids = Reshape (ids, by_place)
    """,
    """
    first = Constant <value = int64[1] {0}> ()
    row_ids = Identity (place_ids)
    row_kinds = Identity (kind)
    """,
    f"""
    asking# = Identity (input#)
    {_EVEN_ATTENTION}
    """,
    f"""
    asking# = Gather <axis = 1> (input#, first)
    {_EVEN_ATTENTION}
    """,
)

#: With the biases in one piece, which ONNX Runtime concatenates once, at start.
_PACKED_ATTENTION = """
    query_product# = MatMul (input#, "encoder.layer.#.attention.self.query.weight")
    query_rows# = Reshape (query_product#, rows)
    key_rows# = Reshape (key_product#, rows)
    value_rows# = Reshape (value_product#, rows)
    biases# = Concat <axis = 0> (
        "encoder.layer.#.attention.self.query.bias",
        "encoder.layer.#.attention.self.key.bias",
        "encoder.layer.#.attention.self.value.bias")
    averages# = com.microsoft.PackedMultiHeadAttention <num_heads = HEADS>
        (query_rows#, key_rows#, value_rows#, biases#, offsets, ends)
"""
PACKED = Form(
    """
    mask = Less (place, size)
    end = CumSum (size, zero)
    start = Sub (end, size)
    unbounded = Add (start, place)
    slots = Where (mask, unbounded, start)
    place_ids = Gather (ids, slots)
    """,
    """
    flat = Constant <value = int64[1] {-1}> ()
    first = Reshape (start, flat)
    rows = Constant <value = int64[2] {-1, HIDDEN}> ()
    states = Constant <value = int64[3] {-1, 1, HIDDEN}> ()
    places = Size (mask)
    every_place = Range (zero, places, one)
    flat_mask = Reshape (mask, flat)
    flat_gaps = Not (flat_mask)
    real_places = Compress <axis = 0> (every_place, flat_mask)
    gaps = Compress <axis = 0> (every_place, flat_gaps)
    places_in_order = Concat <axis = 0> (real_places, gaps)
    order_by_place = Reshape (places_in_order, by_place)
    offsets = Cast <to = 6> (order_by_place)
    no_end = Constant <value = int64[1] {0}> ()
    flat_end = Reshape (end, flat)
    all_ends = Concat <axis = 0> (no_end, flat_end)
    ends = Cast <to = 6> (all_ends)
    flat_kind = Reshape (kind, flat)
    real_kinds = Gather (flat_kind, real_places)
    by_token = Shape (ids)
    token_kinds = Reshape (real_kinds, by_token)
    row_ids = Unsqueeze (ids, one)
    row_kinds = Unsqueeze (token_kinds, one)
    """,
    f"""
    asking# = Identity (input#)
    {_PACKED_ATTENTION}
    attended# = Reshape (averages#, states)
    """,
    f"""
    asking# = Gather (input#, first)
    {_PACKED_ATTENTION}
    all_attended# = Reshape (averages#, states)
    attended# = Gather (all_attended#, first)
    """,
)

#: Packed attention by its documentation: ``offsets`` [N, L] are the places of the T tokens and then
#: those of the gaps, and ``ends`` [N + 1] where each document begins and the last one ends.
#: ``slots`` [N, L] says which token stands at a place: in a gap, the document's own first, since
#: keys there are weighed with 0, and 0 times another document's NaN or infinity would be NaN.
_DEFINITIONS = [
    parser.parse_function("""
<domain: "tritonrank", opset_import: ["": 20]>
PackedPlaces (query, offsets, ends) => (slots, real_places, lengths) {
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    flat = Constant <value = int64[1] {-1}> ()
    zeroth = Constant <value = int64[1] {0}> ()
    first = Constant <value = int64[1] {1}> ()
    tokens = Shape <end = 1> (query)
    count = Squeeze (tokens)
    every_token = Range (zero, count, one)
    padded_shape = Shape (offsets)
    flat_offsets = Reshape (offsets, flat)
    wide_offsets = Cast <to = 7> (flat_offsets)
    real_places = Slice (wide_offsets, zeroth, tokens)
    documents = Shape <end = 1> (offsets)
    past = Add (documents, first)
    wide_ends = Cast <to = 7> (ends)
    start = Slice (wide_ends, zeroth, documents)
    end = Slice (wide_ends, first, past)
    size = Sub (end, start)
    lengths = Cast <to = 6> (size)
    own_first = Unsqueeze (start, one)
    own_firsts = Expand (own_first, padded_shape)
    flat_own_firsts = Reshape (own_firsts, flat)
    flat_slots = ScatterElements (flat_own_firsts, real_places, every_token)
    slots = Reshape (flat_slots, padded_shape)
}"""),
    parser.parse_function("""
<domain: "tritonrank", opset_import: ["": 20, "com.microsoft": 1]>
PackedMultiHeadAttention <num_heads>
(query, key, value, bias, slots, real_places, lengths) => (output) {
    queries = Gather (query, slots)
    keys = Gather (key, slots)
    values = Gather (value, slots)
    averages = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads>
        (queries, keys, values, bias, lengths)
    flat = Constant <value = int64[1] {-1}> ()
    hidden = Shape <start = 1> (query)
    rows = Concat <axis = 0> (flat, hidden)
    average_rows = Reshape (averages, rows)
    output = Gather (average_rows, real_places)
}"""),
]


@dataclass(frozen=True)
class Architecture:
    """How a checkpoint computes, beside its weights.

    Attributes:
        heads: of attention.
        epsilon: of layer normalisation.
        activation: of the feed-forward networks, as an ONNX operator with its attributes.
        head_activation: between the head's two layers.
        token_types: whether the document is told from the query by token types.
        padding_id: of the token that has no position of its own; -1 where positions start from 0.
    """

    heads: int
    epsilon: float
    activation: str
    head_activation: str
    token_types: bool
    padding_id: int


@dataclass(frozen=True)
class Source:
    """A checkpoint made ready for publishing.

    Attributes:
        name: the checkpoint, as the user named it.
        graph: the ragged graph, at the wanted precision.
        tokenizer: with truncation at the model's max length, and without padding.
        max_length: the most tokens of a pair.
        read: query and documents → N lists of ids, as the checkpoint's own tokenizer has them.
        reference: query and documents → FP32 [N], the logits of the checkpoint's own FP32 model.
        unknown_id: what stands for a word that the tokenizer does not know, where it has such.
        provenance: what else is worth knowing of where this comes from.
    """

    name: str
    graph: onnx.ModelProto
    tokenizer: Tokenizer
    max_length: int
    read: Callable[[str, list[str]], list[list[int]]]
    reference: Callable[[str, list[str]], npt.NDArray[np.float32]]
    unknown_id: int | None
    provenance: dict[str, str]


def ragged(
    weights: Weights, architecture: Architecture, form: Form, score: str, max_length: int
) -> onnx.ModelProto:
    """The graph of a checkpoint, in the precision of its weights.

    Args:
        weights: those of linear layers are [out, in].
        architecture: what else there is to know of the checkpoint.
        form: ``EVEN`` or ``PACKED``.
        score: the ONNX operator that makes scores of logits, ``Sigmoid`` or ``Identity``.
        max_length: the most tokens of a pair.

    Raises:
        UnsupportedCheckpoint: the architecture has no place for some of the weights.
    """
    hidden = len(weights["encoder.layer.0.attention.self.query.weight"])
    layers = len({number for name in weights for number in re.findall(r"layer\.(\d+)\.", name)})
    start = "projected" if "embeddings_project.weight" in weights else "embedded"
    pooled = "pooler.dense.weight" in weights
    settings = {
        "MAX_LENGTH": max_length,
        "POSITIONS": len(weights[_POSITIONS]),
        "KIND_TABLE": _KINDS,
        "PADDING_ID": architecture.padding_id,
        "EPSILON": architecture.epsilon,
        "HIDDEN": hidden,
        "HEADS": architecture.heads,
        "FEED_FORWARD_ACTIVATION": architecture.activation,
        "HEAD_ACTIVATION": architecture.head_activation,
        "DENSE": "pooler.dense" if pooled else "classifier.dense",
        "LABEL": "classifier" if pooled else "classifier.out_proj",
        "SCORE": score,
    }
    parts = [_DOCUMENTS, form.places, _KIND, form.start, _EMBEDDINGS]
    parts.append(_PROJECTION if start == "projected" else "")
    parts += _layers(form, layers, start)
    parts.append(_HEAD.replace("PREVIOUS", f"hidden{layers - 1}"))
    text = re.sub(r"\b[A-Z][A-Z_]{3,}\b", lambda word: str(settings[word[0]]), "".join(parts))
    tensors = _tensors(weights, architecture.token_types)
    if strange := tensors.keys() - set(re.findall('"([^"]+)"', text)):
        raise UnsupportedCheckpoint(f"no place is known for {', '.join(sorted(strange))}")
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> ragged'
        "(int32[rows] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)"
        f" => (float[n, 1] logits, float[n, 1] scores) {{{text}}}"
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    # Behind attention ONNX Runtime finds neither the type, which quantisation needs, nor the shape,
    # without which it does not fuse sums of equal shapes with the normalisation. On a CPU it should
    # not: there that took three times as long.
    kind = model.graph.initializer[0].data_type
    last = f"attended{layers - 1}"
    for name in (start, *(f"attended{i}" for i in range(layers))):
        shape = ["t", 1, hidden] if form is PACKED and name != last else None
        model.graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))
    onnx.checker.check_model(model)
    return model


def portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with packed attention, if it has any, in operators that a CPU has kernels for.

    It takes their time and memory: documents are gathered apart, and padded to the longest.
    """
    places, attention = _DEFINITIONS
    found = ["packed_slots", "packed_places", "packed_lengths"]
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == attention.name:
            query, key, value, bias, *where = node.input
            if places.name not in (each.op_type for each in nodes):
                inputs = [query, *where]
                nodes.append(helper.make_node(places.name, inputs, found, domain=places.domain))
            node = helper.make_node(
                attention.name,
                [query, key, value, bias, *found],
                node.output,
                domain=attention.domain,
                num_heads=helper.get_node_attr_value(node, "num_heads"),
            )
        nodes.append(node)
    if len(nodes) == len(model.graph.node):
        return model
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        value_info=model.graph.value_info,
    )
    opsets = [*model.opset_import, helper.make_opsetid(places.domain, 1)]
    whole = helper.make_model(
        graph, ir_version=model.ir_version, opset_imports=opsets, functions=_DEFINITIONS
    )
    inlined = inliner.inline_local_functions(whole)
    inlined.opset_import.pop()
    # Only now, since the inliner would copy them.
    inlined.graph.initializer.extend(model.graph.initializer)
    return inlined


def _layers(form: Form, count: int, start: str) -> Iterator[str]:
    previous = start
    for i in range(count):
        last = i == count - 1
        attention = form.last_attention if last else form.attention
        layer = _LAYER.replace("ATTENTION", attention).replace("PREVIOUS", previous)
        yield layer.replace("#", str(i))
        previous = f"hidden{i}"


def _tensors(weights: Weights, token_types: bool) -> dict[str, npt.NDArray[Any]]:
    """The graph's constants: linear layers' weights as [in, out], and the table of kinds."""
    tensors = {
        name: np.ascontiguousarray(array.T)
        if array.ndim == 2 and not name.startswith("embeddings.")
        else array
        for name, array in weights.items()
    }
    types, positions = tensors.pop(_TYPES), tensors.pop(_POSITIONS)
    # The document has type 1, which is the query's where a model has one type.
    both = types[[0, 1 if token_types else 0]].astype(np.float32)
    tensors[_KINDS] = (both[:, None] + positions).reshape(-1, types.shape[1]).astype(types.dtype)
    return tensors
