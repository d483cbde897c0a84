"""DeBERTa-v2 and -v3 (He et al. 2021): attention weighs content and relative position apart."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame, Pool
from ..layers import ACTIVATIONS, Embedding, LayerNorm, Linear, microsoft
from .bert import Intermediate, Output
from .family import Reranker, refuse_activation

Int64 = npt.NDArray[np.int64]


class Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = getattr(config, "embedding_size", config.hidden_size)
        self.word_embeddings = Embedding(config.vocab_size, width)
        others = []
        if config.position_biased_input:
            self.position_embeddings = Embedding(config.max_position_embeddings, width)
            others.append((self.position_embeddings, "positions"))
        if config.type_vocab_size:
            self.token_type_embeddings = Embedding(config.type_vocab_size, width)
            others.append((self.token_type_embeddings, "types"))
        self._others = others
        if width != config.hidden_size:
            self.embed_proj = Linear(width, config.hidden_size, bias=False)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        states = self.word_embeddings(op, frame.ids)
        for table, what in self._others:
            states = op.Add(states, table(op, getattr(frame, what)))
        if hasattr(self, "embed_proj"):
            states = self.embed_proj(op, states)
        return self.LayerNorm(op, states)


class Distances:
    """How far a key stands before its query, as a row of a table: near ones exactly, others by log.

    The tokens i and j of a document, L tokens long, take the row of i − j. So rows are gathered by
    distance, [2 L, H], and shifted into place, and not for each pair of tokens.
    """

    def __init__(self, config: Any) -> None:
        most = config.max_relative_positions
        self._most = most if most > 0 else config.max_position_embeddings
        self._buckets = getattr(config, "position_buckets", -1)
        self.rows = 2 * (self._buckets if self._buckets > 0 else self._most)

    def gather(self, op: OpBuilder, table: ir.Value, frame: Frame, falling: bool) -> ir.Value:
        """[rows, H] → [2 L, H], from the distance L − 1 down, or from 1 − L up."""
        most = frame.max_length
        distances = np.arange(1 - most, most + 1)
        ids = self._ids(-distances if falling else distances)
        start, end = (op.Unsqueeze(way(most, frame.longest), [0]) for way in (op.Sub, op.Add))
        return op.Gather(table, op.Slice(op.Constant(value=ir.tensor(ids)), start, end))

    def _ids(self, distances: Int64) -> Int64:
        rows = distances
        if self._buckets > 0:
            rows = log_buckets(distances, self._buckets, self._most)
        return np.clip(rows + self.rows // 2, 0, self.rows - 1)


def log_buckets(distances: Int64, buckets: int, most: int) -> Int64:
    """Distances in tokens → in rows, which grow wider from a quarter of them on; in FP32."""
    middle = buckets // 2
    far = np.maximum(np.abs(distances), middle).astype(np.float32)
    widths = np.log(far / np.float32(middle)) / np.log(np.float32((most - 1) / middle))
    rows = np.ceil(widths * np.float32(middle - 1)) + middle
    near = np.abs(distances) <= middle
    return np.where(near, distances, rows * np.sign(distances)).astype(np.int64)


class SelfAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self._heads = config.hidden_size, config.num_attention_heads
        self.query_proj, self.key_proj, self.value_proj = (Linear(width, width) for _ in range(3))
        self._kinds = config.pos_att_type or []
        self._scale = 1 / math.sqrt(width // self._heads * (1 + len(self._kinds)))
        if not config.relative_attention:
            self._kinds = []
        self._shared = getattr(config, "share_att_key", False)
        if not self._shared:
            if "c2p" in self._kinds:
                self.pos_key_proj = Linear(width, width)
            if "p2c" in self._kinds:
                self.pos_query_proj = Linear(width, width)
        self._distances = Distances(config)

    def forward(
        self, op: OpBuilder, states: ir.Value, frame: Frame, relative: ir.Value | None
    ) -> ir.Value:
        """``relative``: [rows, H], what stands for distances."""
        query, key, value = (
            frame.apart(project(op, states))
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        biases = []
        if "c2p" in self._kinds:
            project = self.key_proj if self._shared else self.pos_key_proj
            table = self._distances.gather(op, project(op, relative), frame, falling=True)
            biases.append(self._by_distance(op, query, table, frame))
        if "p2c" in self._kinds:
            project = self.query_proj if self._shared else self.pos_query_proj
            table = self._distances.gather(op, project(op, relative), frame, falling=False)
            back = self._by_distance(op, key, table, frame)
            biases.append(op.Transpose(back, perm=[0, 1, 3, 2]))
        bias = op.Sum(*biases) if biases else None
        attended = microsoft(
            op,
            "MultiHeadAttention",
            query,
            *(query, key, value, None, frame.padding, bias),
            num_heads=self._heads,
            scale=self._scale,
        )
        return frame.together(attended)

    def _by_distance(
        self, op: OpBuilder, states: ir.Value, table: ir.Value, frame: Frame
    ) -> ir.Value:
        """[N, L, H] and [2 L, H] → [N, heads, L, L], each token's products with its distances.

        In row i of all the products, [L, 2 L], those wanted begin at L − 1 − i. With one number
        fewer a row, they begin in the same place (Dai et al. 2019).
        """
        longest = op.Unsqueeze(frame.longest, [0])
        # Scaled before the product, which FP16 might not hold else.
        scaled = op.Mul(states, op.CastLike(self._scale, states))
        rows = op.Transpose(op.Reshape(scaled, [0, 0, self._heads, -1]), perm=[0, 2, 1, 3])
        columns = op.Transpose(op.Reshape(table, [0, self._heads, -1]), perm=[1, 2, 0])
        products = op.Reshape(op.MatMul(rows, columns), [0, 0, -1])
        fewer = op.Sub(op.Mul(longest, 2), 1)
        begin = op.Sub(longest, 1)
        end = op.Add(begin, op.Mul(longest, fewer))
        shifted = op.Slice(products, begin, end, [2])
        shape = op.Concat(op.Shape(frame.size, end=1), [self._heads], longest, fewer, axis=0)
        return op.Slice(op.Reshape(shifted, shape), [0], longest, [3])


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.hidden_size)

    def forward(
        self, op: OpBuilder, states: ir.Value, frame: Frame, relative: ir.Value | None
    ) -> ir.Value:
        return self.output(op, self.self(op, states, frame, relative), states)


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(
        self, op: OpBuilder, states: ir.Value, frame: Frame, relative: ir.Value | None
    ) -> ir.Value:
        between = self.attention(op, states, frame, relative)
        return self.output(op, self.intermediate(op, between), between)


class Encoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        if config.relative_attention:
            self.rel_embeddings = Embedding(Distances(config).rows, config.hidden_size)
        if "layer_norm" in getattr(config, "norm_rel_ebd", "none").lower():
            self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame) -> ir.Value:
        relative = self._relative(op)
        for layer in self.layer:
            states = layer(op, states, frame, relative)
        return states

    def _relative(self, op: OpBuilder) -> ir.Value | None:
        """[rows, H]; constant, as is what layers make of it: ONNX Runtime computes both once."""
        if not hasattr(self, "rel_embeddings"):
            return None
        every = np.arange(self.rel_embeddings.weight.shape[0])
        table = self.rel_embeddings(op, op.Constant(value=ir.tensor(every)))
        return self.LayerNorm(op, table) if hasattr(self, "LayerNorm") else table


class DebertaV2Model(nn.Module):
    """ids → hidden states [rows, H], or of the rows that ``pool`` picks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        states = self.encoder(op, self.embeddings(op, frame), frame)
        return pool(states) if pool else states


class ContextPooler(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = Linear(config.pooler_hidden_size, config.pooler_hidden_size)
        self._activation = ACTIVATIONS[config.pooler_hidden_act]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self._activation(op, self.dense(op, states))


class DebertaV2ForSequenceClassification(Reranker):
    unused = re.compile(r"(lm|mask)_predictions\.|cls\.|(.+\.)?position_ids")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.deberta = DebertaV2Model(config)
        self.pooler = ContextPooler(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        first = self.deberta(op, frame, frame.first)
        return self.classifier(op, self.pooler(op, first))

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        refuse_activation("pooler_hidden_act", config.pooler_hidden_act)
        if unknown := set(config.pos_att_type or []) - {"c2p", "p2c"}:
            raise UnsupportedCheckpoint(f"pos_att_type {', '.join(unknown)} is not supported")
        if getattr(config, "conv_kernel_size", 0):
            raise UnsupportedCheckpoint(
                "DeBERTa with a convolution (conv_kernel_size in its config)"
            )
