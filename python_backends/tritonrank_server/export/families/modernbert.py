"""ModernBERT (Warner et al. 2024): rotary positions, attention in windows, gated layers."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame, Pool
from ..layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from .family import Reranker, refuse_activation, through

WINDOWED = "sliding_attention"


def _norm(config: Any) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


class Embeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        return self.norm(op, self.tok_embeddings(op, frame.ids))


class Attention(nn.Module):
    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        width, self._heads = config.hidden_size, config.num_attention_heads
        self.Wqkv = Linear(width, 3 * width, config.attention_bias)
        self.Wo = Linear(width, width, config.attention_bias)
        self._rotation = config.rope_parameters[kind]["rope_theta"], width // self._heads
        #: How many tokens away the farthest is that a token attends to.
        self._window = config.local_attention // 2 if kind == WINDOWED else None

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame) -> ir.Value:
        query, key, value = op.Split(self.Wqkv(op, states), num_outputs=3, axis=-1, _outputs=3)
        query, key = (frame.rotate(rows, *self._rotation) for rows in (query, key))
        if self._window is None:
            attended = frame.attend(query, key, value, self._heads)
        else:
            attended = frame.attend_within(query, key, value, self._heads, self._window)
        return self.Wo(op, attended)


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self._activation = ACTIVATIONS[config.hidden_activation]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        inputs, gate = op.Split(self.Wi(op, states), num_outputs=2, axis=-1, _outputs=2)
        return self.Wo(op, op.Mul(self._activation(op, inputs), gate))


class Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        if index:  # The first one's is the embeddings'.
            self.attn_norm = _norm(config)
        self.attn = Attention(config, config.layer_types[index])
        self.mlp_norm = _norm(config)
        self.mlp = MLP(config)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        normed = self.attn_norm(op, states) if hasattr(self, "attn_norm") else states
        attended = self.attn(op, normed, frame)
        if pool:
            states, attended = pool(states), pool(attended)
        states = op.Add(states, attended)
        return op.Add(states, self.mlp(op, self.mlp_norm(op, states)))


class ModernBertModel(nn.Module):
    """ids → hidden states [rows, H], or of the rows that ``pool`` picks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = _norm(config)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        states = self.embeddings(op, frame)
        return self.final_norm(op, through(self.layers, op, states, frame, pool))

    @classmethod
    def refuse(cls, config: Any) -> None:
        """What a config can ask for and these layers do not do."""
        refuse_activation("hidden_activation", config.hidden_activation)
        if config.local_attention < 2:
            raise UnsupportedCheckpoint(
                f"local_attention {config.local_attention} is not supported: 2 tokens at least"
            )
        for kind in set(config.layer_types):
            scaling = config.rope_parameters[kind]["rope_type"]
            if scaling != "default":
                raise UnsupportedCheckpoint(f"rotary positions of type {scaling} are not supported")


class PredictionHead(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.classifier_bias)
        self.norm = _norm(config)
        self._activation = ACTIVATIONS[config.classifier_activation]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self.norm(op, self._activation(op, self.dense(op, states)))


class ModernBertForSequenceClassification(Reranker):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = ModernBertModel(config)
        self.head = PredictionHead(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self._mean = config.classifier_pooling == "mean"

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        if self._mean:
            states = frame.mean(self.model(op, frame))
        else:
            states = self.model(op, frame, frame.first)
        return self.classifier(op, self.head(op, states))

    @classmethod
    def refuse(cls, config: Any) -> None:
        ModernBertModel.refuse(config)
        refuse_activation("classifier_activation", config.classifier_activation)
