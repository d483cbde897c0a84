"""The ragged graph of a cross-encoder of BERT's kind, as ONNX text and a checkpoint's weights.

Every graph has the same inputs and outputs, whatever the checkpoint:

    input_ids INT32 [T'], lengths INT32 [N, 1], query_lengths INT32 [N, 1]
    → logits FP32 [N, 1], scores FP32 [N, 1]

``input_ids`` are the rows of all documents, flattened, with -1 where a row is short. The graph
drops the -1 and finds each document by ``lengths``. The layers between are BERT's (Devlin et al.
2018), in one of two forms:

- Packed, FP32 or FP16, for a GPU: hidden states are [T, 1, H] with T real tokens, so every linear
  layer, normalisation and activation runs on no padding. Attention alone needs the documents apart:
  queries, keys and values are gathered into [N, L, H], and its output is gathered back. It is ONNX
  Runtime's operator MultiHeadAttention, which takes the documents' lengths. In FP16 on a GPU such
  as an L4, and with the usual sizes of a head, that runs in fused kernels that hold nothing as
  large as L × L. (Its other form of lengths, [3 N + 2], would suit more kernels, but those that do
  not know it misread it.)
- Padded, FP32, to be quantised for a CPU, whose scorer gives one document at a time, so that
  nothing is padded and gathering would be in vain: hidden states are [L, N, H]. Attention is in
  plain products, which a CPU runs faster than it runs that operator. With the places first, heads
  are told apart by one Transpose, which ONNX Runtime makes a part of the product.

The head reads the first row of each document. So the last layer has no other queries, and nothing
after its attention computes any other row.

Triton lets anybody call an ensemble's steps themselves. Where ``lengths`` do not add up to the
tokens, one request of a batch would have its neighbours read a wrong text, and documents longer
than the model would take gigabytes. Then all lengths are taken as 1, and the execution fails or
every logit is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, parser
from tokenizers import Tokenizer

from .errors import UnsupportedCheckpoint

#: Parameters, FP32 or FP16, by their names in transformers without the base model's prefix.
Weights = Mapping[str, npt.NDArray[Any]]

#: T real tokens, N documents, L tokens of the longest. ``slots`` [N, L] says which of the T tokens
#: stands at each place of the padded form. Where ``mask`` is false it is the document's own first:
#: attention weighs it with 0, and 0 times another document's NaN or infinity would be NaN.
#: Positions are RoBERTa's, which do not count the padding token where a text has it. With -1 for
#: its id, which is no token's, they are BERT's.
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
    query_size = Cast <to = 7> (query_lengths)
    longest = ReduceMax <keepdims = 0> (size)
    place = Range (zero, longest, one)
    mask = Less (place, size)
    end = CumSum (size, zero)
    start = Sub (end, size)
    unbounded = Add (start, place)
    slots = Where (mask, unbounded, start)
    padded_ids = Gather (ids, slots)
    in_document = GreaterOrEqual (place, query_size)
    padded_types = Cast <to = 7> (in_document)
    padding_id = Constant <value = int64 {PADDING_ID}> ()
    is_padding = Equal (padded_ids, padding_id)
    is_counted = Not (is_padding)
    counted = Cast <to = 7> (is_counted)
    running = CumSum (counted, one)
    numbered = Mul (running, counted)
    padded_positions = Add (numbered, padding_id)
"""

_EMBEDDINGS = """
    words = Gather ("embeddings.word_embeddings.weight", row_ids)
    types = Gather ("embeddings.token_type_embeddings.weight", row_types)
    positions = Gather ("embeddings.position_embeddings.weight", row_positions)
    typed = Add (words, types)
    placed = Add (typed, positions)
    embedded = LayerNormalization <axis = -1, epsilon = EPSILON>
        (placed, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias")
"""
#: ELECTRA's, where its embeddings are smaller than its hidden states.
_PROJECTION = """
    product = MatMul (embedded, "embeddings_project.weight")
    projected = Add (product, "embeddings_project.bias")
"""

#: ``#`` stands for the layer's number, and ASKING for the rows of its input whose queries it needs.
_LAYER = """
    input# = Identity (PREVIOUS)
    asking# = ASKING
    query_product# = MatMul (asking#, "encoder.layer.#.attention.self.query.weight")
    query# = Add (query_product#, "encoder.layer.#.attention.self.query.bias")
    key_product# = MatMul (input#, "encoder.layer.#.attention.self.key.weight")
    key# = Add (key_product#, "encoder.layer.#.attention.self.key.bias")
    value_product# = MatMul (input#, "encoder.layer.#.attention.self.value.weight")
    value# = Add (value_product#, "encoder.layer.#.attention.self.value.bias")
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
        start: ``row_ids``, ``row_types`` and ``row_positions`` of the hidden states, ``first``, the
            documents' first rows among them, and what attention needs.
        attention: queries, keys and values → ``attended#``, of the queries' shape.
        last_attention: the same with the queries of the first rows alone.
    """

    start: str
    attention: str
    last_attention: str


_PLAIN_ATTENTION = """
    query_heads# = Reshape (query#, apart)
    queries# = Transpose <perm = [1, 0, 2]> (query_heads#)
    key_heads# = Reshape (key#, apart)
    keys# = Transpose <perm = [1, 2, 0]> (key_heads#)
    value_heads# = Reshape (value#, apart)
    values# = Transpose <perm = [1, 0, 2]> (value_heads#)
    product# = MatMul (queries#, keys#)
    scaled# = Mul (product#, scale)
    masked# = Add (scaled#, bias)
    shares# = Softmax <axis = -1> (masked#)
    averages# = MatMul (shares#, values#)
    average_heads# = Transpose <perm = [1, 0, 2]> (averages#)
    attended# = Reshape (average_heads#, together)
"""
PADDED = Form(
    """
    first = Constant <value = int64[1] {0}> ()
    scale = Constant <value = float {SCALE}> ()
    row_ids = Transpose (padded_ids)
    row_types = Transpose (padded_types)
    row_positions = Transpose (padded_positions)
    apart = Constant <value = int64[3] {0, -1, HEAD_SIZE}> ()
    together = Constant <value = int64[3] {0, -1, HIDDEN}> ()
    seen = Constant <value = float {0}> ()
    unseen = Constant <value = float {-3e38}> ()
    document_bias = Where (mask, seen, unseen)
    document_rows = Unsqueeze (document_bias, one)
    every_head = Constant <value = int64[3] {1, HEADS, 1}> ()
    head_bias = Expand (document_rows, every_head)
    head_rows = Constant <value = int64[3] {-1, 1, 0}> ()
    bias = Reshape (head_bias, head_rows)
    """,
    _PLAIN_ATTENTION,
    _PLAIN_ATTENTION,
)

_ATTENTION_BY_LENGTHS = """
    key_rows# = Reshape (key#, rows)
    keys# = Gather (key_rows#, slots)
    value_rows# = Reshape (value#, rows)
    values# = Gather (value_rows#, slots)
    averages# = com.microsoft.MultiHeadAttention <num_heads = HEADS>
        (queries#, keys#, values#, , key_lengths)
"""
PACKED = Form(
    """
    flat = Constant <value = int64[1] {-1}> ()
    first = Reshape (start, flat)
    flat_mask = Reshape (mask, flat)
    places = Size (mask)
    every_place = Range (zero, places, one)
    flat_unslots = Compress <axis = 0> (every_place, flat_mask)
    unslots = Unsqueeze (flat_unslots, one)
    row_ids = Unsqueeze (ids, one)
    flat_types = Reshape (padded_types, flat)
    row_types = Gather (flat_types, unslots)
    flat_positions = Reshape (padded_positions, flat)
    row_positions = Gather (flat_positions, unslots)
    flat_size = Reshape (size, flat)
    key_lengths = Cast <to = 6> (flat_size)
    rows = Constant <value = int64[2] {-1, HIDDEN}> ()
    """,
    f"""
    query_rows# = Reshape (query#, rows)
    queries# = Gather (query_rows#, slots)
    {_ATTENTION_BY_LENGTHS}
    average_rows# = Reshape (averages#, rows)
    attended# = Gather (average_rows#, unslots)
    """,
    f"""
    queries# = Identity (query#)
    {_ATTENTION_BY_LENGTHS}
    attended# = Identity (averages#)
    """,
)


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
        reference: query and documents → FP32 [N], the logits of the checkpoint's own FP32 model.
        provenance: what else is worth knowing of where this comes from.
    """

    name: str
    graph: onnx.ModelProto
    tokenizer: Tokenizer
    max_length: int
    reference: Callable[[str, list[str]], npt.NDArray[np.float32]]
    provenance: dict[str, str]


def ragged(
    weights: Weights, architecture: Architecture, form: Form, score: str, max_length: int
) -> onnx.ModelProto:
    """The graph of a checkpoint, in the precision of its weights.

    Args:
        weights: those of linear layers are [out, in].
        architecture: what else there is to know of the checkpoint.
        form: ``PADDED`` or ``PACKED``.
        score: the ONNX operator that makes scores of logits, ``Sigmoid`` or ``Identity``.
        max_length: the most tokens of a pair.

    Raises:
        UnsupportedCheckpoint: the architecture has no place for some of the weights.
    """
    hidden = len(weights["encoder.layer.0.attention.self.query.weight"])
    head_size = hidden // architecture.heads
    layers = len({number for name in weights for number in re.findall(r"layer\.(\d+)\.", name)})
    start = "projected" if "embeddings_project.weight" in weights else "embedded"
    pooled = "pooler.dense.weight" in weights
    settings = {
        "MAX_LENGTH": max_length,
        "PADDING_ID": architecture.padding_id,
        "EPSILON": architecture.epsilon,
        "HIDDEN": hidden,
        "HEADS": architecture.heads,
        "HEAD_SIZE": head_size,
        "SCALE": head_size**-0.5,
        "FEED_FORWARD_ACTIVATION": architecture.activation,
        "HEAD_ACTIVATION": architecture.head_activation,
        "DENSE": "pooler.dense" if pooled else "classifier.dense",
        "LABEL": "classifier" if pooled else "classifier.out_proj",
        "SCORE": score,
    }
    parts = [_DOCUMENTS, form.start, _EMBEDDINGS, _PROJECTION if start == "projected" else ""]
    parts += _layers(form, layers, start)
    parts.append(_HEAD.replace("PREVIOUS", f"hidden{layers - 1}"))
    text = re.sub(r"\b[A-Z][A-Z_]{3,}\b", lambda word: str(settings[word[0]]), "".join(parts))
    if strange := weights.keys() - set(re.findall('"([^"]+)"', text)):
        raise UnsupportedCheckpoint(f"no place is known for {', '.join(sorted(strange))}")
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20, "com.microsoft": 1]> ragged'
        "(int32[rows] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)"
        f" => (float[n, 1] logits, float[n, 1] scores) {{{text}}}"
    )
    model.graph.initializer.extend(_initializers(weights, architecture.token_types))
    if form is PACKED:
        # Else ONNX Runtime, which does not find the shapes behind MultiHeadAttention, would not
        # see that sums are of equal shapes, and not fuse them with the normalisation.
        kind = model.graph.initializer[0].data_type
        for name in (start, *(f"attended{i}" for i in range(layers - 1))):
            shape = helper.make_tensor_value_info(name, kind, ["t", 1, hidden])
            model.graph.value_info.append(shape)
    onnx.checker.check_model(model)
    return model


def _layers(form: Form, count: int, start: str) -> Iterator[str]:
    previous = start
    for i in range(count):
        last = i == count - 1
        asking = "Gather (input#, first)" if last else "Identity (input#)"
        attention = form.last_attention if last else form.attention
        layer = _LAYER.replace("ASKING", asking).replace("ATTENTION", attention)
        yield layer.replace("PREVIOUS", previous).replace("#", str(i))
        previous = f"hidden{i}"


def _initializers(weights: Weights, token_types: bool) -> Iterator[onnx.TensorProto]:
    for name, array in weights.items():
        # The graph gives the document type 1, which here is the query's where a model has one type.
        if name == "embeddings.token_type_embeddings.weight":
            array = array[[0, 1 if token_types else 0]]
        elif array.ndim == 2 and not name.startswith("embeddings."):
            array = np.ascontiguousarray(array.T)
        yield numpy_helper.from_array(array, name)
