"""Dynamic INT8: weights in 8 bits, activations quantised as they come.

The scheme is that of ONNX Runtime's ``quantize_dynamic``, which would hold the model three times
over; here a weight is quantised as it is loaded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from .layers import Embedding, Linear
from .progress import shown

Float32 = npt.NDArray[np.float32]
#: The largest magnitude of a weight: 7 of the 8 bits. Where a CPU has no VNNI, ONNX Runtime
#: multiplies by vpmaddubsw, which adds two products in 16 bits and saturates: with all 8 bits a
#: small model's logits moved by 60 % of their range. UINT8 weights have no such fault, and took a
#: sixth more time. With VNNI, all 8 bits were no faster and no nearer to FP32.
MOST_OF_WEIGHT = 64
MOST_OF_TABLE = 127
#: Tables from this many numbers on are kept in 8 bits, too. It is nothing to speed: they are looked
#: up. Smaller ones are a small part of a graph.
LARGE_TABLE = 2**24


def quantise(model: nn.Module) -> None:
    """Replaces the linear layers of a loaded model, and its large tables, by quantised ones."""
    for _, parent in shown(list(model.named_modules()), "Quantising"):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                _replace(parent, name, QuantisedLinear(child))
            elif isinstance(child, Embedding) and np.prod(child.weight.shape) >= LARGE_TABLE:
                _replace(parent, name, QuantisedEmbedding(child))


def _replace(parent: nn.Module, name: str, module: nn.Module) -> None:
    module._set_name(parent._modules[name]._name)
    setattr(parent, name, module)


class QuantisedLinear(nn.Module):
    """A linear layer with a scale for each output channel."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight, scale = quantised(linear.weight.const_value.numpy(), MOST_OF_WEIGHT, axis=0)
        self.weight = _parameter(weight)
        self.scale = _parameter(scale[0])
        self.bias = linear.bias

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        activations, scale, zero_point = op.DynamicQuantizeLinear(states, _outputs=3)
        product = op.MatMulInteger(activations, self.weight, zero_point)
        exact = op.Mul(op.Cast(product, to=ir.DataType.FLOAT), op.Mul(scale, self.scale))
        return exact if self.bias is None else op.Add(exact, self.bias)


class QuantisedEmbedding(nn.Module):
    """A table with a scale for each row."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        weight, scale = quantised(embedding.weight.const_value.numpy(), MOST_OF_TABLE, axis=1)
        self.weight = _parameter(weight)
        self.scale = _parameter(scale)

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        rows = op.Cast(op.Gather(self.weight, ids), to=ir.DataType.FLOAT)
        return op.Mul(rows, op.Gather(self.scale, ids))


def quantised(weight: Float32, most: int, axis: int) -> tuple[npt.NDArray[np.int8], Float32]:
    """INT8 of a matrix's shape, ±``most``, and FP32 scales, an axis of which has length 1.

    Their product is nearly the weight. Symmetric: 0 stays 0.
    """
    largest = np.maximum(weight.max(axis, keepdims=True), -weight.min(axis, keepdims=True))
    scale = (largest.astype(np.float64) / most).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1.0
    integers = weight / scale  # The one copy: a table may have a gigabyte.
    np.rint(integers, out=integers)
    return integers.clip(-most, most, out=integers).astype(np.int8), scale


def _parameter(array: npt.NDArray[np.generic]) -> nn.Parameter:
    return nn.Parameter(array.shape, data=ir.Tensor(array))
