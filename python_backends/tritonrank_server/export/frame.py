"""The frame of every graph: tokens in, where each document stands, logits and scores out.

Every graph has the same inputs and outputs, whatever the checkpoint:

    input_ids INT32 [T'], lengths INT32 [N, 1], query_lengths INT32 [N, 1]
    → logits FP32 [N, 1], scores FP32 [N, 1]

``input_ids`` are the rows of all documents, flattened, with -1 where a row is short. The graph
drops the -1 and finds each document by ``lengths``. The layers between are a family's, in one of
two forms, of which families know nothing:

- ``Packed``, FP32 or FP16, for a GPU: hidden states are [T, 1, H] with T real tokens, so no linear
  layer, normalisation or activation runs on padding. Nor does full attention, which is ONNX
  Runtime's operator PackedMultiHeadAttention: it takes packed rows and where each document begins,
  and runs in fused kernels that hold nothing as large as L × L. It has kernels for GPUs only;
  ``portable`` puts its definition in its place, which any processor runs. Other kinds of attention
  take documents gathered apart, [N, L, H], and padded to the longest.
- ``Even``, FP32, to be quantised for a CPU, whose scorer gives one document at a time: hidden
  states are [N, L, H], of documents that all have L tokens, and any others are refused. So nothing
  is gathered, padded or masked, and ONNX Runtime's MultiHeadAttention, which without a mask holds
  nothing as large as L × L on a CPU either, is as fast as plain products.

Attention in windows is the same in both: blocks of rows, and each with the blocks beside it, so its
work grows with the window and not with the length.

Triton lets anybody call an ensemble's steps themselves. Where ``lengths`` do not add up to the
tokens, one request of a batch would have its neighbours read a wrong text, and documents longer
than the model would take gigabytes. Then all lengths are taken as 1, and the execution fails at the
embeddings, or every logit is NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, inliner, parser
from onnxscript import GraphBuilder, OpBuilder, nn

from .layers import MICROSOFT, microsoft

IR_VERSION, OPSET = 9, 20
INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
#: What is added to the weight of a token that is not to be seen; FP16 reaches 65,504.
FAR = -6e4
#: Of packed rows, for an operator that takes documents.
BLOCK = 256
#: What of the rows is wanted, such as ``Frame.first``.
Pool = Callable[[ir.Value], ir.Value]


def ragged(
    model: Callable[[OpBuilder, Frame], ir.Value],
    form: type[Frame],
    token_types: bool,
    score: str,
    max_length: int,
) -> ir.Model:
    """The graph of a model, in the precision of its weights.

    Args:
        model: a family's, with its weights. Gives the logits of N documents.
        form: ``Even`` or ``Packed``.
        token_types: whether the document is told from the query by token types.
        score: the ONNX operator that makes scores of logits, ``Sigmoid`` or ``Identity``.
        max_length: the most tokens of a pair.
    """
    graph = ir.Graph([], [], nodes=[], name="ragged", opset_imports={"": OPSET, MICROSOFT: 1})
    builder = GraphBuilder(graph)
    op = builder.op
    ids = builder.input("input_ids", INT32, ["rows"])
    lengths = builder.input("lengths", INT32, ["n", 1])
    query_lengths = builder.input("query_lengths", INT32, ["n", 1])
    frame = form(op, ids, lengths, query_lengths, max_length)
    if not token_types:
        frame.types = op.Mul(frame.types, 0)
    label = op.Reshape(model(op, frame), [-1, 1])
    exact = op.Cast(label, to=FLOAT)
    nothing = op.Sub(exact, exact)
    logits = op.Where(frame.sound, exact, op.Div(nothing, nothing))
    for value, name in ((logits, "logits"), (getattr(op, score)(logits), "scores")):
        value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(["n", 1])
        builder.add_output(value, name)
    for node in graph:
        node.metadata_props.clear()  # Where in the Python each comes from.
    return ir.Model(graph, ir_version=IR_VERSION)


class Frame(ABC):
    """Where the tokens of N documents stand.

    "Rows" are [T, 1, ..] or [N, L, ..] by the form, [rows] for short.

    Attributes:
        ids: INT64 [rows], of tokens.
        positions: INT64 [rows], of a token in its document, from 0.
        types: INT64 [rows], 0 for what belongs to the query, 1 for the document.
        sound: BOOL, whether the lengths are those of documents that fit.
    """

    ids: ir.Value
    positions: ir.Value
    types: ir.Value
    sound: ir.Value

    def __init__(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        lengths: ir.Value,
        query_lengths: ir.Value,
        max_length: int,
    ) -> None:
        self.op = op
        self.max_length = max_length
        wide = op.Cast(input_ids, to=INT64)
        ids = op.Compress(wide, op.GreaterOrEqual(wide, 0), axis=0)
        told = op.Cast(lengths, to=INT64)
        adds_up = op.Equal(op.ReduceSum(told, keepdims=0), op.Size(ids))
        none_is_empty = op.GreaterOrEqual(op.ReduceMin(told, keepdims=0), 1)
        none_is_long = op.LessOrEqual(op.ReduceMax(told, keepdims=0), max_length)
        self.sound = op.And(adds_up, op.And(none_is_empty, none_is_long))
        self.size = op.Where(self.sound, told, 1)
        self.longest = op.ReduceMax(self.size, keepdims=0)
        #: INT64 [L]
        self.place = op.Range(0, self.longest, 1)
        # Of this frame, and gone with it: it leads to the weights.
        self._angles, self._nearby = cache(self._angles_of), cache(self._nearby_of)
        self._stand(ids, op.Cast(query_lengths, to=INT64))

    @abstractmethod
    def _stand(self, ids: ir.Value, query_size: ir.Value) -> None:
        """Finds the rows of ids INT64 [T] and query_size INT64 [N, 1]."""

    @abstractmethod
    def count(self, flags: ir.Value) -> ir.Value:
        """BOOL [rows] → INT64 [rows]: how many there are in the document up to each row."""

    @abstractmethod
    def first(self, states: ir.Value) -> ir.Value:
        """[rows, H] → [.., H], the first of each of N documents."""

    @abstractmethod
    def last(self, states: ir.Value) -> ir.Value:
        """[rows, H] → [.., H], the last of each of N documents."""

    @abstractmethod
    def mean(self, states: ir.Value) -> ir.Value:
        """[rows, H] → [.., H], the mean of each of N documents; summed in FP32."""

    @abstractmethod
    def apart(self, states: ir.Value) -> ir.Value:
        """[rows, H] → [N, L, H], the documents padded to the longest."""

    @abstractmethod
    def together(self, states: ir.Value) -> ir.Value:
        """[N, L, H] → [rows, H], without the padding."""

    @abstractmethod
    def attend(self, query: ir.Value, key: ir.Value, value: ir.Value, heads: int) -> ir.Value:
        """[rows, H] of each → [rows, H]: attention of each token to all of its document."""

    @abstractmethod
    def self_attend(
        self,
        states: ir.Value,
        projections: tuple[nn.Module, nn.Module, nn.Module],
        heads: int,
        pool: Pool | None = None,
    ) -> ir.Value:
        """``attend`` by linear layers for query, key and value, of the rows that are wanted."""

    @property
    @abstractmethod
    def padding(self) -> ir.Value | None:
        """INT32 [N], the lengths of the documents ``apart``, or None where none is padded."""

    def rotate(self, rows: ir.Value, theta: float, width: int) -> ir.Value:
        """[rows, heads · width], each head's numbers rotated in pairs by the position.

        Args:
            rows: queries or keys.
            theta: the base of the frequencies (Su et al. 2021).
            width: of a head.
        """
        angles = self._angles(theta, width, rows.dtype)
        return microsoft(self.op, "RotaryEmbedding", rows, rows, self.positions, *angles)

    def _angles_of(self, theta: float, width: int, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine by position, [L or ``BLOCK``, width / 2]."""
        op = self.op
        exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequencies = op.Constant(value=ir.tensor(1 / np.float32(theta) ** exponents))
        places = op.Cast(op.Range(0, op.Max(self.longest, BLOCK), 1), to=FLOAT)
        angles = op.Mul(op.Unsqueeze(places, [1]), frequencies)
        return op.Cast(op.Cos(angles), to=dtype), op.Cast(op.Sin(angles), to=dtype)

    def attend_causally(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        heads: int,
        groups: int,
        theta: float,
    ) -> ir.Value:
        """Attention of each token to those up to it, where several heads share a key and a value.

        Args:
            query: [rows, heads · D], D a multiple of 16.
            key: [rows, groups · D].
            value: [rows, groups · D].
            heads: of queries.
            groups: of heads (Ainslie et al. 2023).
            theta: as of ``rotate``, which the operator does itself.
        """
        op = self.op
        angles = self._angles(theta, query.shape[-1] // heads, query.dtype)
        ends = op.Cast(op.Sub(op.Reshape(self.size, [-1]), 1), to=INT32)
        queries, keys, values = map(self.apart, (query, key, value))
        longest = op.Cast(self.longest, to=INT32)
        inputs = (queries, keys, values, None, None, ends, longest, *angles)
        options = {"num_heads": heads, "kv_num_heads": groups, "do_rotary": 1, "_outputs": 3}
        return self.together(microsoft(op, "GroupQueryAttention", queries, *inputs, **options))

    def attend_within(
        self, query: ir.Value, key: ir.Value, value: ir.Value, heads: int, window: int
    ) -> ir.Value:
        """Attention of each token to those of its document that are ``window`` away at most.

        Documents are cut into blocks of that many tokens, each of which attends to itself and to
        the blocks beside it (as in Longformer, Beltagy et al. 2020).
        """
        op = self.op
        width = query.shape[-1]
        keys, values = (self._around(self._blocks(rows, window)) for rows in (key, value))
        queries = op.Reshape(self._blocks(query, window), [-1, window, width])
        inputs = (queries, keys, values, None, None, self._nearby(window, query.dtype))
        attended = microsoft(op, "MultiHeadAttention", queries, *inputs, num_heads=heads)
        documents = op.Shape(self.size, start=0, end=1)
        places = op.Reshape(attended, op.Concat(documents, [-1, width], axis=0))
        whole = op.Slice(places, [0], op.Unsqueeze(self.longest, [0]), [1])
        whole.shape = ir.Shape([None, None, width])  # Which is not found where an end is computed.
        return self.together(whole)

    def _blocks(self, rows: ir.Value, window: int) -> ir.Value:
        """[rows, H] → [N, M, window, H], the last block padded."""
        op = self.op
        apart = self.apart(rows)
        missing = op.Mod(op.Neg(self.longest), window)
        ends = op.Concat([0, 0, 0, 0], op.Unsqueeze(missing, [0]), [0], axis=0)
        return op.Reshape(op.Pad(apart, ends), [0, -1, window, rows.shape[-1]])

    def _around(self, blocks: ir.Value) -> ir.Value:
        """[N, M, window, H] → [N · M, 3 · window, H], each block between those beside it."""
        op = self.op
        *_, window, width = blocks.shape
        padded = op.Pad(blocks, [0, 1, 0, 0, 0, 1, 0, 0])
        three = [op.Slice(padded, [i], [end], [1]) for i, end in ((0, -2), (1, -1), (2, 2**62))]
        return op.Reshape(op.Concat(*three, axis=2), [-1, 3 * window, width])

    def _nearby_of(self, window: int, dtype: ir.DataType) -> ir.Value:
        """[N · M, 1, window, 3 · window]: 0 where a token may attend, else far below it."""
        op = self.op
        blocks = op.Range(0, op.Div(op.Add(self.longest, window - 1), window), 1)
        place = np.arange(3 * window) - window
        key = op.Add(op.Mul(op.Unsqueeze(blocks, [1]), window), op.Constant(value=ir.tensor(place)))
        size = op.Unsqueeze(self.size, [2])
        real = op.And(op.GreaterOrEqual(key, 0), op.Less(key, size))
        near = np.abs(np.arange(window)[:, None] - place) <= window
        seen = op.And(op.Unsqueeze(real, [2]), op.Constant(value=ir.tensor(near)))
        added = op.Cast(op.Where(seen, 0.0, FAR), to=dtype)
        return op.Reshape(added, [-1, 1, window, 3 * window])


class Even(Frame):
    """Documents that all have L tokens, as rows [N, L]."""

    padding = None

    def _stand(self, ids: ir.Value, query_size: ir.Value) -> None:
        op = self.op
        self.types = op.Cast(op.GreaterOrEqual(self.place, query_size), to=INT64)
        shape = op.Shape(self.types)
        self.ids = op.Reshape(ids, shape)
        self.positions = op.Expand(self.place, shape)

    def count(self, flags: ir.Value) -> ir.Value:
        return self.op.CumSum(self.op.Cast(flags, to=INT64), 1)

    def first(self, states: ir.Value) -> ir.Value:
        return self.op.Gather(states, [0], axis=1)

    def last(self, states: ir.Value) -> ir.Value:
        return self.op.Gather(states, [-1], axis=1)

    def mean(self, states: ir.Value) -> ir.Value:
        return self.op.ReduceMean(states, [1])

    def apart(self, states: ir.Value) -> ir.Value:
        return states

    def together(self, states: ir.Value) -> ir.Value:
        return states

    def attend(self, query: ir.Value, key: ir.Value, value: ir.Value, heads: int) -> ir.Value:
        inputs = (query, key, value)
        return microsoft(self.op, "MultiHeadAttention", query, *inputs, num_heads=heads)

    def self_attend(
        self,
        states: ir.Value,
        projections: tuple[nn.Module, nn.Module, nn.Module],
        heads: int,
        pool: Pool | None = None,
    ) -> ir.Value:
        query, key, value = projections
        asking = pool(states) if pool else states
        return self.attend(
            query(self.op, asking), key(self.op, states), value(self.op, states), heads
        )


class Packed(Frame):
    """All real tokens, as rows [T, 1]."""

    def _stand(self, ids: ir.Value, query_size: ir.Value) -> None:
        op = self.op
        end = op.CumSum(self.size, 0)
        start = op.Sub(end, self.size)
        self.start = op.Reshape(start, [-1])
        self.end = op.Reshape(end, [-1])
        mask = op.Less(self.place, self.size)
        #: INT64 [N, L], the token at each place: in a gap, the document's own first, since what is
        #: there is weighed with 0, and 0 times another document's NaN or infinity would be NaN.
        self.slots = op.Where(mask, op.Add(start, self.place), start)
        every = op.Range(0, op.Size(mask), 1)
        flat = op.Reshape(mask, [-1])
        #: INT64 [T], the place of each token.
        self.real = op.Compress(every, flat, axis=0)
        gaps = op.Compress(every, op.Not(flat), axis=0)
        in_order = op.Reshape(op.Concat(self.real, gaps, axis=0), op.Shape(mask))
        self.offsets = op.Cast(in_order, to=INT32)
        self.ends = op.Cast(op.Concat([0], self.end, axis=0), to=INT32)
        self.ids = self._shaped(ids)
        shape = op.Shape(mask)
        self.positions = self._rows(op.Expand(self.place, shape))
        in_document = op.GreaterOrEqual(self.place, query_size)
        self.types = self._rows(op.Cast(in_document, to=INT64))

    def _rows(self, places: ir.Value) -> ir.Value:
        """[N, L] → [T, 1]."""
        op = self.op
        return self._shaped(op.Gather(op.Reshape(places, [-1]), self.real))

    def _shaped(self, rows: ir.Value) -> ir.Value:
        """[T, ..] → [T, 1, ..]: ONNX Runtime fuses sums of shapes that it knows to be equal."""
        shaped = self.op.Unsqueeze(rows, [1])
        shaped.shape = ir.Shape(["t", *shaped.shape[1:]])
        return shaped

    @property
    def padding(self) -> ir.Value | None:
        op = self.op
        return op.Cast(op.Reshape(self.size, [-1]), to=INT32)

    def count(self, flags: ir.Value) -> ir.Value:
        op = self.op
        running = op.CumSum(op.Gather(op.Cast(op.Squeeze(flags, [1]), to=INT64), self.slots), 1)
        return self._rows(running)

    def first(self, states: ir.Value) -> ir.Value:
        return self.op.Gather(states, self.start)

    def last(self, states: ir.Value) -> ir.Value:
        return self.op.Gather(states, self.op.Sub(self.end, 1))

    def mean(self, states: ir.Value) -> ir.Value:
        op = self.op
        apart = op.Cast(self.apart(states), to=FLOAT)
        mask = op.Unsqueeze(op.Less(self.place, self.size), [2])
        total = op.ReduceSum(op.Where(mask, apart, 0.0), [1])
        return op.CastLike(op.Div(total, op.Unsqueeze(op.Cast(self.size, to=FLOAT), [2])), states)

    def apart(self, states: ir.Value) -> ir.Value:
        return self.op.Gather(self.op.Squeeze(states, [1]), self.slots)

    def together(self, states: ir.Value) -> ir.Value:
        op = self.op
        return self._shaped(op.Gather(op.Reshape(states, [-1, states.shape[-1]]), self.real))

    def rotate(self, rows: ir.Value, theta: float, width: int) -> ir.Value:
        op = self.op
        # In blocks, since a GPU's kernel takes 65,535 documents of as many tokens at most.
        missing = op.Mod(op.Neg(op.Shape(rows, start=0, end=1)), BLOCK)
        ends = op.Concat([0, 0], missing, [0], axis=0)
        blocks = op.Reshape(op.Pad(op.Squeeze(rows, [1]), ends), [-1, BLOCK, rows.shape[-1]])
        places = op.Pad(op.Squeeze(self.positions, [1]), op.Concat([0], missing, axis=0))
        placed = (op.Reshape(places, [-1, BLOCK]), *self._angles(theta, width, rows.dtype))
        rotated = microsoft(op, "RotaryEmbedding", blocks, blocks, *placed)
        flat = op.Reshape(rotated, [-1, rows.shape[-1]])
        whole = op.Slice(flat, [0], op.Shape(rows, start=0, end=1), [0])
        whole.shape = ir.Shape(["t", rows.shape[-1]])
        return self._shaped(whole)

    def attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        heads: int,
        bias: ir.Value | None = None,
    ) -> ir.Value:
        op = self.op
        rows = [op.Squeeze(each, [1]) for each in (query, key, value)]
        inputs = (*rows, bias, self.offsets, self.ends)
        attended = microsoft(op, "PackedMultiHeadAttention", rows[0], *inputs, num_heads=heads)
        return self._shaped(attended)

    def self_attend(
        self,
        states: ir.Value,
        projections: tuple[nn.Module, nn.Module, nn.Module],
        heads: int,
        pool: Pool | None = None,
    ) -> ir.Value:
        query, key, value = (each(self.op, states, biased=False) for each in projections)
        # In one piece, which ONNX Runtime concatenates once, at start.
        bias = self.op.Concat(*(each.bias for each in projections), axis=0)
        attended = self.attend(query, key, value, heads, bias)
        # Packed attention has as many queries as keys; on a GPU, one query a document took longer.
        return pool(attended) if pool else attended


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
    # In FP32: of FP16 the CPU's kernel holds heads · L × L for each document.
    parser.parse_function("""
<domain: "tritonrank", opset_import: ["": 20, "com.microsoft": 1]>
GroupQueryAttention <num_heads, kv_num_heads, do_rotary>
(query, key, value, past_key, past_value, ends, longest, cosine, sine) => (output) {
    queries = Cast <to = 1> (query)
    keys = Cast <to = 1> (key)
    values = Cast <to = 1> (value)
    cosines = Cast <to = 1> (cosine)
    sines = Cast <to = 1> (sine)
    averages, all_keys, all_values = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads,
         do_rotary: int = @do_rotary>
        (queries, keys, values, past_key, past_value, ends, longest, cosines, sines)
    output = CastLike (averages, query)
}"""),
]


def portable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with packed and causal attention, if any, in what a CPU has kernels for.

    It takes their time and memory: documents are gathered apart, and padded to the longest.
    """
    places, attention, causal = _DEFINITIONS
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
        elif node.op_type == causal.name:
            attributes = {each.name: each.i for each in node.attribute}
            node = helper.make_node(
                causal.name, node.input, node.output[:1], domain=causal.domain, **attributes
            )
        nodes.append(node)
    if not any(each.domain == places.domain for each in nodes):
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
