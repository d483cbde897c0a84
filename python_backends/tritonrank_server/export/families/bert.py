"""BERT (Devlin et al. 2018) and those that differ in embeddings and head: RoBERTa, ELECTRA."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame, Pool
from ..layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from .family import Reranker, through

#: Heads of the pretraining; the pooler, in place of which some have a head of their own.
UNUSED = re.compile(
    r"cls\.|lm_head\.|(discriminator|generator)_(predictions|lm_head)\.|(\w+\.)?pooler\.|"
    r"(.+\.)?position_ids"
)


class Embeddings(nn.Module):
    """A token's word, its type and its position, added."""

    def __init__(self, config: Any, width: int, padding: int | None = None) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, width)
        self.position_embeddings = Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)
        self._padding = padding

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        kinds = op.Add(
            self.token_type_embeddings(op, frame.types),
            self.position_embeddings(op, self._positions(op, frame)),
        )
        return self.LayerNorm(op, op.Add(self.word_embeddings(op, frame.ids), kinds))

    def _positions(self, op: OpBuilder, frame: Frame) -> ir.Value:
        if self._padding is None:
            return frame.positions
        # RoBERTa's, which do not count the padding token where a text has it.
        counted = op.Not(op.Equal(frame.ids, self._padding))
        numbered = op.Mul(frame.count(counted), op.Cast(counted, to=ir.DataType.INT64))
        return op.Add(numbered, self._padding)


class SelfAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value = (Linear(width, width) for _ in range(3))
        self._heads = config.num_attention_heads

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        projections = (self.query, self.key, self.value)
        return frame.self_attend(states, projections, self._heads, pool)


class Output(nn.Module):
    """A linear layer's output, added to what went around it, and normalised."""

    def __init__(self, config: Any, inputs: int) -> None:
        super().__init__()
        self.dense = Linear(inputs, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, op: OpBuilder, states: ir.Value, around: ir.Value) -> ir.Value:
        return self.LayerNorm(op, op.Add(self.dense(op, states), around))


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.hidden_size)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        attended = self.self(op, states, frame, pool)
        return self.output(op, attended, pool(states) if pool else states)


class Intermediate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self._activation(op, self.dense(op, states))


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        between = self.attention(op, states, frame, pool)
        return self.output(op, self.intermediate(op, between), between)


class Encoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        return through(self.layer, op, states, frame, pool)


class Pooler(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return op.Tanh(self.dense(op, states))


class BertModel(nn.Module):
    """ids → hidden states [rows, H], or of the rows that ``pool`` picks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = self._embeddings(config)
        self.encoder = Encoder(config)

    @staticmethod
    def _embeddings(config: Any) -> nn.Module:
        return Embeddings(config, config.hidden_size)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        return self.encoder(op, self.embeddings(op, frame), frame, pool)


class RobertaModel(BertModel):
    @staticmethod
    def _embeddings(config: Any) -> nn.Module:
        return Embeddings(config, config.hidden_size, config.pad_token_id)


class ElectraModel(BertModel):
    """Its embeddings may be smaller than its hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = Linear(config.embedding_size, config.hidden_size)

    @staticmethod
    def _embeddings(config: Any) -> nn.Module:
        return Embeddings(config, config.embedding_size)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        states = self.embeddings(op, frame)
        if hasattr(self, "embeddings_project"):
            states = self.embeddings_project(op, states)
        return self.encoder(op, states, frame, pool)


class _Reranker(Reranker):
    unused = UNUSED

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        if config.is_decoder:
            raise UnsupportedCheckpoint("the checkpoint is a decoder (is_decoder in its config)")
        positions = getattr(config, "position_embedding_type", "absolute")
        if positions != "absolute":
            raise UnsupportedCheckpoint(
                f"position embeddings of type {positions} are not supported"
            )


class BertForSequenceClassification(_Reranker):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.bert.pooler = Pooler(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        first = self.bert(op, frame, frame.first)
        return self.classifier(op, self.bert.pooler(op, first))


class Head(nn.Module):
    def __init__(self, config: Any, activation: str) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.num_labels)
        self._activation = ACTIVATIONS[activation]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self.out_proj(op, self._activation(op, self.dense(op, states)))


class RobertaForSequenceClassification(_Reranker):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.roberta = RobertaModel(config)
        self.classifier = Head(config, "tanh")

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        return self.classifier(op, self.roberta(op, frame, frame.first))

    @classmethod
    def positions(cls, config: Any) -> int:
        """They are numbered from behind the padding token's id."""
        most: int = config.max_position_embeddings - config.pad_token_id - 1
        return most


class ElectraForSequenceClassification(_Reranker):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.electra = ElectraModel(config)
        self.classifier = Head(config, "gelu")

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        return self.classifier(op, self.electra(op, frame, frame.first))
