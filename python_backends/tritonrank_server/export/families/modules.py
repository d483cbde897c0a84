"""Chains of sentence-transformers' modules: a base model, pooling, and layers up to one score."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame
from ..layers import ACTIVATIONS, LayerNorm, Linear
from .bert import UNUSED, BertModel, ElectraModel, RobertaModel
from .deberta import DebertaV2Model
from .distilbert import DistilBertModel
from .family import Reranker
from .modernbert import ModernBertModel

#: Model type → the class of the base model.
ENCODERS: dict[str, type[nn.Module]] = {
    "bert": BertModel,
    "camembert": RobertaModel,
    "deberta-v2": DebertaV2Model,
    "distilbert": DistilBertModel,
    "electra": ElectraModel,
    "modernbert": ModernBertModel,
    "roberta": RobertaModel,
    "xlm-roberta": RobertaModel,
}
#: torch's names of activations → transformers'.
TORCH = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
POOLING = ("cls", "mean")
VECTOR, SCORE = "sentence_embedding", "scores"


class Modules(Reranker):
    """A chain, each module named by its number as sentence-transformers does.

    Args:
        chain: that of sentence-transformers, whose modules are read for their settings.

    Raises:
        UnsupportedCheckpoint: a module, or a setting of one, is not known.
    """

    unused = re.compile(rf"\d+\.model\.({UNUSED.pattern})")

    def __init__(self, chain: Any) -> None:
        super().__init__()
        transformer, pooling, *layers = chain
        config = transformer.model.config
        self._mean = _pooling(pooling) == "mean"
        self._chain = [_Base(ENCODERS[config.model_type](config)), *map(_layer, layers)]
        for i, module in zip((0, *range(2, 2 + len(layers))), self._chain):
            setattr(self, str(i), module)
        if not layers or getattr(layers[-1], "module_output_name", None) != SCORE:
            raise UnsupportedCheckpoint(f"the last module must be a Dense whose output is {SCORE}")

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        base, *layers = self._chain
        states = base(op, frame, None if self._mean else frame.first)
        if self._mean:
            states = frame.mean(states)
        for layer in layers:
            states = layer(op, states)
        return states


class _Base(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, op: OpBuilder, *arguments: Any) -> ir.Value:
        return self.model(op, *arguments)


def _pooling(module: Any) -> str:
    if type(module).__name__ != "Pooling" or module.pooling_mode not in POOLING:
        raise UnsupportedCheckpoint(
            f"{module} after Transformer is not supported: use Pooling by {' or '.join(POOLING)}"
        )
    mode: str = module.pooling_mode
    return mode


def _layer(module: Any) -> nn.Module:
    kind = type(module).__name__
    if kind == "Dense":
        return Dense(module)
    if kind == "LayerNorm":
        return Norm(module)
    raise UnsupportedCheckpoint(f"the module {kind} is not supported: use Dense and LayerNorm")


class Dense(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        activation = type(module.activation_function).__name__
        settings = (module.activation_function, module.use_residual, module.module_input_name)
        exact = getattr(module.activation_function, "approximate", "none") == "none"
        known = activation == "Identity" or (activation in TORCH and exact)
        if not known or module.use_residual or module.module_input_name != VECTOR:
            raise UnsupportedCheckpoint(f"a Dense with {settings} is not supported")
        self.linear = Linear(module.in_features, module.out_features, module.bias)
        self._activation = ACTIVATIONS.get(TORCH.get(activation, ""))

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        states = self.linear(op, states)
        return self._activation(op, states) if self._activation else states


class Norm(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.norm = LayerNorm(module.dimension, module.norm.eps)

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        return self.norm(op, states)
