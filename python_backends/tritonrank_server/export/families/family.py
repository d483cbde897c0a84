"""What every family has beside its layers: what the exporter must know of it."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame, Pool
from ..layers import ACTIVATIONS


class Reranker(nn.Module):
    """A model of one architecture of transformers, its parameters named as there.

    Args:
        config: that of transformers, or what has the same attributes.

    Attributes:
        unused: names of weights that the checkpoint may have and no logit depends on.
        is_language_model: whether it is made a reranker by what it reads besides.
    """

    unused: re.Pattern[str] = re.compile("(?!)")
    is_language_model = False

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        """The labels of N documents, [.., labels]."""
        raise NotImplementedError

    @classmethod
    def positions(cls, config: Any) -> int:
        """The most tokens of a pair that the model is made for."""
        most: int = config.max_position_embeddings
        return most

    @classmethod
    def refuse(cls, config: Any) -> None:
        """Refuses what a config of this family can ask for and these layers do not do.

        Raises:
            UnsupportedCheckpoint: it names what.
        """
        refuse_activation("hidden_act", config.hidden_act)


class LabelDifference(Reranker):
    """Of a model with two labels, that of relevance less the other: the logit of their softmax."""

    def __init__(self, model: Reranker, relevant: int) -> None:
        super().__init__()
        self.model = model
        self.unused = re.compile(rf"model\.({model.unused.pattern})")
        self._relevant = relevant

    def forward(self, op: OpBuilder, frame: Frame) -> ir.Value:
        labels = op.Cast(op.Reshape(self.model(op, frame), [-1, 2]), to=ir.DataType.FLOAT)
        this, other = (op.Gather(labels, [i], axis=1) for i in (self._relevant, 1 - self._relevant))
        return op.Sub(this, other)


def through(
    layers: nn.ModuleList, op: OpBuilder, states: ir.Value, frame: Frame, pool: Pool | None
) -> ir.Value:
    """The states after all layers; after the last one's attention only the rows that are wanted."""
    *before, last = layers
    for layer in before:
        states = layer(op, states, frame, None)
    result: ir.Value = last(op, states, frame, pool)
    return result


def refuse_activation(name: str, activation: str) -> None:
    """Refuses an activation that is not known.

    Raises:
        UnsupportedCheckpoint: it names those that are.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{name} {activation} is not supported: use one of {', '.join(ACTIVATIONS)}"
        )
