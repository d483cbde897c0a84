"""A checkpoint's own layers on packed tokens, as the body of the ragged graph.

Hidden states are [1, T, hidden] with T real tokens, so every linear layer, normalisation and
activation runs on no padding. Attention alone needs the documents apart: queries, keys and values
are gathered into [N, L, hidden], and its output is gathered back. It is put in by transformers'
attention interface, so the layers are the checkpoint's own code, and is ONNX Runtime's operator
MultiHeadAttention, which takes the documents' lengths. In FP16 on a GPU such as an L4, and with the
usual sizes of a head, that runs in fused kernels that hold nothing as large as L × L. (Its other
form of lengths, [3 N + 2], would suit more kernels, but those that do not know it misread it.)
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from .errors import UnsupportedCheckpoint
from .graph import PACKED_INPUTS

#: How each architecture numbers positions: from 0, or RoBERTa's way, after the padding id.
ROBERTA = {
    "CamembertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
}
SUPPORTED = {"BertForSequenceClassification", "ElectraForSequenceClassification", *ROBERTA}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    slots: Tensor,
    row_lengths: Tensor,
    unslots: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each document: [1, heads, T, d] three times → [1, T, heads · d]."""
    heads = query.shape[1]

    def apart(states: Tensor) -> Tensor:
        """[1, heads, T, d] → [N, L, heads · d]."""
        rows = states.transpose(1, 2).flatten(2).squeeze(0)
        # Not rows[slots], which is exported as the slower GatherND.
        return rows.index_select(0, slots.flatten()).reshape(*slots.shape, -1)

    query, key, value = apart(query), apart(key), apart(value)
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value, None, row_lengths),
        {"num_heads": heads, "scale": scaling},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )
    return attended.flatten(0, 1).index_select(0, unslots)[None], None


AttentionInterface.register("tritonrank_packed", packed_attention)


class PackedCrossEncoder(nn.Module):
    """The checkpoint's embeddings, layers and head on the inputs ``graph.PACKED_INPUTS``.

    Args:
        model: one of ``SUPPORTED``, with one label.
        token_types: whether the model tells the document from the query by token types.
    """

    def __init__(self, model: PreTrainedModel, token_types: bool) -> None:
        super().__init__()
        model.set_attn_implementation("tritonrank_packed")
        self.model = model
        self.roberta = type(model).__name__ in ROBERTA
        self.token_types = token_types

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        mask: Tensor,
        row_lengths: Tensor,
        unslots: Tensor,
        first: Tensor,
    ) -> Tensor:
        """Logits [N, 1] of T tokens in N documents of at most L tokens."""
        base = self.model.base_model
        if self.roberta:
            positions = self._roberta_positions(input_ids, slots, mask, unslots)
        if not self.token_types:
            token_type_ids = torch.zeros_like(token_type_ids)
        hidden = base.embeddings(
            input_ids=input_ids[None],
            token_type_ids=token_type_ids[None],
            position_ids=positions[None],
        )
        if hasattr(base, "embeddings_project"):  # ELECTRA with small embeddings
            hidden = base.embeddings_project(hidden)
        hidden = base.encoder(
            hidden, attention_mask=None, slots=slots, row_lengths=row_lengths, unslots=unslots
        ).last_hidden_state
        first_rows = hidden.index_select(1, first).transpose(0, 1)  # [N, 1, hidden]
        pooler = getattr(base, "pooler", None)
        logits: Tensor = self.model.classifier(pooler(first_rows) if pooler else first_rows)
        return logits

    def _roberta_positions(
        self, input_ids: Tensor, slots: Tensor, mask: Tensor, unslots: Tensor
    ) -> Tensor:
        """RoBERTa's own numbering, in which a padding token in the text has no number."""
        padding = self.model.config.pad_token_id
        counted = input_ids != padding
        running = (counted[slots] & mask).cumsum(1).flatten()[unslots]
        positions: Tensor = running * counted + padding
        return positions


def export_packed(module: PackedCrossEncoder) -> onnx.ModelProto:
    """The packed body as ONNX, in the dtype of the model's weights.

    Raises:
        UnsupportedCheckpoint: a weight is NaN or infinite, as one beyond 65504 is in FP16.
    """
    # Not left to the check on real pairs: they do not look up every row of the embeddings.
    for name, weight in module.model.named_parameters():
        if not weight.isfinite().all():
            raise UnsupportedCheckpoint(f"{name} holds NaN or infinity in {weight.dtype}")
    lengths = torch.tensor([5, 3, 7])
    tokens, longest = int(lengths.sum()), int(lengths.max())
    place = torch.arange(longest)
    mask = place < lengths[:, None]
    first = lengths.cumsum(0) - lengths
    example = (
        torch.full((tokens,), 2),
        torch.zeros(tokens, dtype=torch.long),
        place.expand(len(lengths), -1)[mask],
        first[:, None] + place * mask,
        mask,
        lengths.int(),
        mask.flatten().nonzero()[:, 0],
        first,
    )
    packed, documents, padded = {0: "t"}, {0: "n"}, {0: "n", 1: "l"}
    axes = (packed, packed, packed, padded, padded, documents, packed, documents)
    shapes = tuple({axis: torch.export.Dim(name) for axis, name in each.items()} for each in axes)
    # The exporter warns of what it does itself, and of torchvision, which has no part in this.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=PACKED_INPUTS,
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=20,  # The first with Gelu.
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # Only without dynamo.
    body = program.model_proto
    for node in body.graph.node:
        del node.metadata_props[:]  # Stack traces, with the paths of this machine.
    return body
