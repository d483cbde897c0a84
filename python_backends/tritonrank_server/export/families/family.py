"""What every family has beside its layers: what the exporter must know of it."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from ...errors import UnsupportedCheckpoint
from ..frame import Frame
from ..layers import ACTIVATIONS


class Reranker(nn.Module):
    """A model of one architecture of transformers, its parameters named as there.

    Args:
        config: that of transformers, or what has the same attributes.

    Attributes:
        unused: names of weights that the checkpoint may have and no logit depends on.
    """

    unused: ClassVar[re.Pattern[str]] = re.compile("(?!)")

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


def refuse_activation(name: str, activation: str) -> None:
    """Refuses an activation that is not known.

    Raises:
        UnsupportedCheckpoint: it names those that are.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{name} {activation} is not supported: use one of {', '.join(ACTIVATIONS)}"
        )
