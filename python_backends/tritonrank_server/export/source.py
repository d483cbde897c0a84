"""A checkpoint made ready for publishing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer

from ..stages.tokenizer import Prompt


@dataclass(frozen=True)
class Source:
    """A checkpoint made ready for publishing; it holds the checkpoint's weights in memory.

    Attributes:
        name: the checkpoint, as the user named it.
        graph: the ragged graph, at the wanted precision. Its weights are converted as they are
            written.
        tokenizer: with truncation at the model's max length, and without padding.
        max_length: the most tokens of a pair.
        prompt: what the model reads besides.
        activation: of the logits, by ONNX's name.
        read: query and documents → N lists of ids, as the checkpoint's own tokenizer has them.
        reference: query and documents → FP32 [N], the logits of the checkpoint's own FP32 model.
        unknown_id: what stands for a word that the tokenizer does not know, where it has such.
        provenance: what else is worth knowing of where this comes from.
    """

    name: str
    graph: ir.Model
    tokenizer: Tokenizer
    max_length: int
    prompt: Prompt
    activation: str
    read: Callable[[str, list[str]], list[list[int]]]
    reference: Callable[[str, list[str]], npt.NDArray[np.float32]]
    unknown_id: int | None
    provenance: dict[str, str]
