"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, in names of its own."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ..frame import Frame, Pool
from ..layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from .family import Reranker, refuse_activation, through

EPSILON = 1e-12


class Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.dim)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.dim)
        self.LayerNorm = LayerNorm(config.dim, EPSILON)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        words = self.word_embeddings(op, frame.ids)
        return self.LayerNorm(op, op.Add(words, self.position_embeddings(op, frame.positions)))


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.q_lin, self.k_lin, self.v_lin = (Linear(config.dim, config.dim) for _ in range(3))
        self.out_lin = Linear(config.dim, config.dim)
        self._heads = config.n_heads

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        projections = (self.q_lin, self.k_lin, self.v_lin)
        return self.out_lin(op, frame.self_attend(states, projections, self._heads, pool))


class FFN(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.lin1 = Linear(config.dim, config.hidden_dim)
        self.lin2 = Linear(config.hidden_dim, config.dim)
        self._activation = ACTIVATIONS[config.activation]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self.lin2(op, self._activation(op, self.lin1(op, states)))


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.sa_layer_norm = LayerNorm(config.dim, EPSILON)
        self.ffn = FFN(config)
        self.output_layer_norm = LayerNorm(config.dim, EPSILON)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        attended = self.attention(op, states, frame, pool)
        between = self.sa_layer_norm(op, op.Add(attended, pool(states) if pool else states))
        return self.output_layer_norm(op, op.Add(self.ffn(op, between), between))


class Transformer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(config) for _ in range(config.n_layers)])

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        return through(self.layer, op, states, frame, pool)


class DistilBertModel(nn.Module):
    """ids → hidden states [rows, H], or of the rows that ``pool`` picks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.transformer = Transformer(config)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        return self.transformer(op, self.embeddings(op, frame), frame, pool)


class DistilBertForSequenceClassification(Reranker):
    unused = re.compile(r"vocab_(transform|layer_norm|projector)\.")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.distilbert = DistilBertModel(config)
        self.pre_classifier = Linear(config.dim, config.dim)
        self.classifier = Linear(config.dim, config.num_labels)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        first = self.distilbert(op, frame, frame.first)
        return self.classifier(op, op.Relu(self.pre_classifier(op, first)))

    @classmethod
    def refuse(cls, config: Any) -> None:
        refuse_activation("activation", config.activation)
