"""What ONNX Runtime allows on a machine: a model's matrix products alone.

Other code may be faster: on a Zen 4, once, these had 0.72 of what its INT8 instructions gave.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper, parser
from tritonrank_server.export.default_model import CONFIG

from .contestant import session

GPU = "CUDAExecutionProvider" in ort.get_available_providers()
#: Of each precision: its type in ONNX and NumPy, and a product by a weight.
_KINDS: dict[str, tuple[str, type[np.generic], str]] = {
    "fp32": ("float", np.float32, "MatMul ({x}, {w})"),
    "fp16": ("float16", np.float16, "MatMul ({x}, {w})"),
    "int8": ("uint8", np.uint8, "QLinearMatMul ({x}, one, zero, {w}, one, zeros, one, zero)"),
}
#: Runs of which the mean is taken, and how often; the best of these counts.
_RUNS, _TIMES = 10, 3


def limit(
    tokens: int, precisions: Sequence[str], config: Mapping[str, Any] = CONFIG
) -> dict[str, float]:
    """The rates of a pair's matrix products, one after another and nothing between them.

    They are those of every layer's weights: query, key, value and output [h, h], and the two of the
    feed-forward network, [h, f] and [f, h]. On a CPU each core has one pair at a time, as in the
    scorer; a GPU has 100.

    Args:
        tokens: of a pair.
        precisions: ``fp32``, ``fp16`` (on a GPU), ``int8`` (on a CPU).
        config: of the checkpoint; default, the default model's.

    Returns:
        ``tokens``, ``gflop`` of a pair, and of each precision ``…_gflop_per_second`` and
        ``…_pairs_per_second``.
    """
    pairs, lanes = (100, 1) if GPU else (1, len(os.sched_getaffinity(0)))
    shapes, positions = _shapes(config), config["max_position_embeddings"]
    flop = sum(2 * tokens * k * n for k, n in shapes)
    result = {"tokens": tokens, "gflop": flop / 1e9}
    ids = np.arange(pairs * tokens) % positions
    for precision in precisions:
        products = _products(precision, shapes, positions)

        def lane(_: int, products: Any = products) -> None:
            for _ in range(_RUNS):
                products.run(None, {"ids": ids})

        with ThreadPoolExecutor(lanes) as pool:
            seconds = []
            for _ in range(1 + _TIMES):  # The first warms up.
                started = time.perf_counter()
                list(pool.map(lane, range(lanes)))
                seconds.append(time.perf_counter() - started)
        rate = pairs * lanes * _RUNS / min(seconds[1:])
        result[f"{precision}_gflop_per_second"] = rate * flop / 1e9
        result[f"{precision}_pairs_per_second"] = rate
    return result


def _shapes(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    layer = ((hidden, hidden),) * 4 + ((hidden, wide), (wide, hidden))
    return layer * int(config["num_hidden_layers"])


@cache
def _products(precision: str, shapes: tuple[tuple[int, int], ...], positions: int) -> Any:
    """``ids`` INT64 [m] → rows of a table → all products → one number, so that none is copied."""
    kind, dtype, product = _KINDS[precision]
    random = np.random.default_rng(0)

    def constant(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
        if np.issubdtype(dtype, np.integer):
            values = random.integers(0, 64, shape)
        else:  # Such that products stay as large as they are.
            values = random.standard_normal(shape) / np.sqrt(shape[0])
        return numpy_helper.from_array(values.astype(dtype), name)

    weight = np.int8 if precision == "int8" else dtype
    constants = [constant(f"w{i}", shape, weight) for i, shape in enumerate(shapes)]
    constants.append(constant("table", (positions, shapes[0][0]), dtype))
    if precision == "int8":
        for name, one in (("one", np.float32(1)), ("zero", np.uint8(0)), ("zeros", np.int8(0))):
            constants.append(numpy_helper.from_array(np.array(one), name))
    lines = ["x0 = Gather (table, ids)"]
    for i in range(len(shapes)):
        lines.append(f"x{i + 1} = {product.format(x=f'x{i}', w=f'w{i}')}")
    lines.append(f"y = ReduceMax <keepdims = 0> (x{len(shapes)})")
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]>'
        f"products (int64[m] ids) => ({kind} y) {{ {' '.join(lines)} }}"
    )
    model.graph.initializer.extend(constants)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return session(model.SerializeToString(), options)
