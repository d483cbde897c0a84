"""Qwen3 (Yang et al. 2025) as a reranker: a causal language model, read at its last token."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame, Pool
from ..layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from .family import Reranker, through


class Attention(nn.Module):
    """Several heads share a key and a value; queries and keys are normalised head by head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._width = config.head_dim
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        all_queries, all_keys = self._heads * self._width, self._groups * self._width
        biased = config.attention_bias
        self.q_proj = Linear(config.hidden_size, all_queries, biased)
        self.k_proj = Linear(config.hidden_size, all_keys, biased)
        self.v_proj = Linear(config.hidden_size, all_keys, biased)
        self.o_proj = Linear(all_queries, config.hidden_size, biased)
        self.q_norm = RMSNorm(self._width, config.rms_norm_eps)
        self.k_norm = RMSNorm(self._width, config.rms_norm_eps)
        self._theta = config.rope_parameters["rope_theta"]

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame) -> ir.Value:
        query = self._normalised(op, self.q_norm, self.q_proj(op, states))
        key = self._normalised(op, self.k_norm, self.k_proj(op, states))
        value = self.v_proj(op, states)
        options = self._heads, self._groups, self._theta
        return self.o_proj(op, frame.attend_causally(query, key, value, *options))

    def _normalised(self, op: OpBuilder, norm: RMSNorm, rows: ir.Value) -> ir.Value:
        heads = norm(op, op.Reshape(rows, [0, 0, -1, self._width]))
        return op.Reshape(heads, [0, 0, rows.shape[-1]])


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        gate = self._activation(op, self.gate_proj(op, states))
        return self.down_proj(op, op.Mul(gate, self.up_proj(op, states)))


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None) -> ir.Value:
        attended = self.self_attn(op, self.input_layernorm(op, states), frame)
        if pool:
            states, attended = pool(states), pool(attended)
        states = op.Add(states, attended)
        return op.Add(states, self.mlp(op, self.post_attention_layernorm(op, states)))


class Qwen3Model(nn.Module):
    """ids → hidden states [rows, H], or of the rows that ``pool`` picks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, op: OpBuilder, frame: Frame, pool: Pool | None = None) -> ir.Value:
        states = self.embed_tokens(op, frame.ids)
        return self.norm(op, through(self.layers, op, states, frame, pool))


class Qwen3ForSequenceClassification(Reranker):
    """Also the originals, with the row of "yes" less that of "no" for ``score``."""

    is_language_model = True
    #: The publisher's, far below what the positions allow.
    longest = 8192

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Qwen3Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        return self.score(op, self.model(op, frame, frame.last))

    @classmethod
    def positions(cls, config: Any) -> int:
        return min(super().positions(config), cls.longest)

    @classmethod
    def refuse(cls, config: Any) -> None:
        super().refuse(config)
        if set(config.layer_types) != {"full_attention"}:
            raise UnsupportedCheckpoint("Qwen3 with layers of sliding_attention is not supported")
        if config.head_dim % 16:
            raise UnsupportedCheckpoint(
                f"head_dim {config.head_dim} is not supported: ONNX Runtime's attention takes "
                "multiples of 16"
            )
        scaling = config.rope_parameters["rope_type"]
        if scaling != "default":
            raise UnsupportedCheckpoint(f"rotary positions of type {scaling} are not supported")
