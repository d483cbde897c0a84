"""What a server takes of memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from conftest import start
from onnx import numpy_helper, parser
from tritonrank import RerankClient

from loadtest.memory import by_process, graph_bytes

#: Its weights are several times what a process takes besides: 16 MiB of INT8 a layer.
LAYERS, HIDDEN = 16, 4096


def large_graph() -> onnx.ModelProto:
    """A graph of the exports' inputs and outputs, and of INT8 layers as theirs."""
    layers = "".join(
        f"""
        rows{i}, scale{i}, zero{i} = DynamicQuantizeLinear (hidden{i})
        product{i} = MatMulInteger (rows{i}, weight{i}, zero{i})
        exact{i} = Cast <to = 1> (product{i})
        large{i} = Mul (exact{i}, scale{i})
        hidden{i + 1} = Mul (large{i}, small)
        """
        for i in range(LAYERS)
    )
    model = parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> large'
        "(int32[rows] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)"
        f""" => (float[n, 1] logits, float[n, 1] scores) {{
        one = Cast <to = 1> (lengths)
        width = Constant <value = int64[2] {{1, {HIDDEN}}}> ()
        hidden0 = Tile (one, width)
        small = Constant <value = float {{4e-4}}> ()
        {layers}
        logits = ReduceMax <keepdims = 1> (hidden{LAYERS}, axis)
        scores = Sigmoid (logits)
        }}"""
    )
    source = np.random.default_rng(0)
    weights = [source.integers(-64, 64, (HIDDEN, HIDDEN), np.int8) for _ in range(LAYERS)]
    tensors = {f"weight{i}": weight for i, weight in enumerate(weights)} | {"axis": np.int64([1])}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in tensors.items()
    )
    return model


def test_weights_are_in_memory_once(int8_repository: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(int8_repository, tmp_path / "repository", symlinks=True))
    current = repository / "cross_encoder" / "current"
    onnx.save(large_graph(), current / "model.onnx")
    (current / "model.onnx.data").unlink()
    with start(repository) as server, RerankClient(server.grpc_url, timeout=60) as client:
        # By both ways, a lone document and several at a time.
        [alone] = client.rank("tea", ["green tea"])
        together = client.rank("tea", ["green tea"] * 9)
        assert {each.logit for each in together} == {alone.logit}
        scorer = [size for name, size in by_process(server.pid) if name == "cross_encoder"]
    # A second copy would make it twice the graph and more.
    assert graph_bytes(current) < sum(scorer) < 1.5 * graph_bytes(current) + 100e6
