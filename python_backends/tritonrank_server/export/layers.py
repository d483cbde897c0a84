"""What models of several families are made of: modules of onnxscript, named as in transformers.

A parameter's name in its module is its name in the checkpoint, so weights load by name. Linear
layers' weights are [out, in] there, and [in, out] in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

#: The operators that ONNX Runtime adds to ONNX.
MICROSOFT = "com.microsoft"
Activation = Callable[[OpBuilder, ir.Value], ir.Value]


def microsoft(
    op: OpBuilder, name: str, like: ir.Value, *inputs: ir.Value | None, **attributes: Any
) -> ir.Value:
    """One of them, whose first output is of another value's type and shape.

    ONNX does not know them, and without these would find no type or shape of anything after it; nor
    would ONNX Runtime, which then does not fuse sums of equal shapes with the normalisation.
    """
    output = getattr(op, name)(*inputs, **{"_domain": MICROSOFT, **attributes})
    first: ir.Value = output if isinstance(output, ir.Value) else output[0]
    first.type, first.shape = like.type, like.shape
    return first


def _gelu(op: OpBuilder, states: ir.Value) -> ir.Value:
    return op.Gelu(states)


def _gelu_by_tanh(op: OpBuilder, states: ir.Value) -> ir.Value:
    return op.Gelu(states, approximate="tanh")


def _silu(op: OpBuilder, states: ir.Value) -> ir.Value:
    return op.Mul(states, op.Sigmoid(states))


#: transformers' names of activations → operators.
ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    **dict.fromkeys(
        ("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"),
        _gelu_by_tanh,
    ),
    "relu": lambda op, states: op.Relu(states),
    **dict.fromkeys(("silu", "swish"), _silu),
    "sigmoid": lambda op, states: op.Sigmoid(states),
    "tanh": lambda op, states: op.Tanh(states),
}


class Linear(nn.Module):
    """states [.., in] → [.., out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter([inputs, outputs])
        self.bias = nn.Parameter([outputs]) if bias else None

    def forward(self, op: OpBuilder, states: ir.Value, biased: bool = True) -> ir.Value:
        """``biased``: whether to add the bias, which some operators of attention do themselves."""
        product = op.MatMul(states, self.weight)
        return op.Add(product, self.bias) if biased and self.bias is not None else product


class Embedding(nn.Module):
    """ids INT64 [..] → their rows of a table, [.., width]."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([rows, width])

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        return op.Gather(self.weight, ids)


class LayerNorm(nn.Module):
    """Over the last axis (Ba et al. 2016)."""

    def __init__(self, width: int, epsilon: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter([width])
        self.bias = nn.Parameter([width]) if bias else None
        self._epsilon = epsilon

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        bias = [] if self.bias is None else [self.bias]
        return op.LayerNormalization(states, self.weight, *bias, axis=-1, epsilon=self._epsilon)


class RMSNorm(nn.Module):
    """Over the last axis, without a mean (Zhang and Sennrich 2019); summed in FP32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter([width])
        self._epsilon = epsilon

    def forward(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        # ONNX Runtime's, but in ONNX's own domain.
        options = {"axis": -1, "epsilon": self._epsilon, "_domain": "", "stash_type": 1}
        name = "SimplifiedLayerNormalization"
        return microsoft(op, name, states, states, self.weight, **options)


def load(model: nn.Module, weights: dict[str, Any], dtype: ir.DataType) -> None:
    """Gives the parameters of a model their values, converted as they are written, one at a time.

    Args:
        model: its parameters are named as the weights are.
        weights: arrays of NumPy, or tensors of torch; those of linear layers are [out, in].
        dtype: what they become, FP32 or FP16.

    Raises:
        KeyError: there is no weight of a parameter's name; a weight that no parameter has is left.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            transposed = isinstance(module, Linear) and name == "weight"
            parameter.const_value = _lazily(weights[path], transposed, dtype)
            parameter.type = ir.TensorType(dtype)


def _lazily(weight: Any, transposed: bool, dtype: ir.DataType) -> ir.LazyTensor:
    def tensor() -> ir.Tensor:
        array = np.asarray(weight).astype(dtype.numpy(), copy=False)
        return ir.Tensor(np.ascontiguousarray(array.T if transposed else array))

    shape = weight.shape[::-1] if transposed else weight.shape
    return ir.LazyTensor(tensor, dtype, ir.Shape(shape))
