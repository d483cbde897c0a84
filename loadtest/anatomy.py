"""Where a request's time goes, and how near it comes to what the machine can do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from onnx import numpy_helper, parser
from tokenizers import Tokenizer
from tritonrank import RerankClient
from tritonrank_server.cross_encoder import CrossEncoder, Work
from tritonrank_server.default_model import CONFIG
from tritonrank_server.tokenizer import PairTokenizer, Tokens

from .data import Request

STAGES = ("tokenizer", "cross_encoder", "sorter")
#: Documents that are ranked alone, of each request.
SINGLES = 5


def anatomy(url: str, folder: Path, every: Sequence[Request]) -> dict[str, Any]:
    """Times the parts of each request in turns; times are medians over requests, in milliseconds.

    Args:
        url: gRPC address of an embedded server with the export of ``folder``.
        folder: an export.
        every: requests, of the same number of documents.

    Returns:
        ``request_ms`` through Triton with one client, ``graph_ms`` of the scorer alone in this
        process, ``overhead`` as the share of a request outside the scorer's stage, ``stages`` from
        Triton's statistics (means), ``tokenizer`` against a bare batch call, ``single_document``
        against calling ONNX Runtime directly, ``limit`` by the rate of matrix products alone, and
        ``real_tokens`` as a share of the places of each request padded to its longest document.
    """
    tokenizer = PairTokenizer(folder / "tokenizer.json", 1024)
    scorer = CrossEncoder(folder / "model.onnx")
    direct = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.no_truncation()
    encoded = [_encode(tokenizer, each.query, each.documents) for each in every]
    parts: dict[str, list[float]] = {"bare": [], "tokenizer": [], "graph": [], "request": []}
    tokens_of_pairs = np.concatenate([tokens.lengths for tokens in encoded])
    limits: list[dict[str, float]] = []
    single: dict[str, list[float]] = {"direct": [], "triton": []}
    with RerankClient(url, timeout=600) as client:
        client.rank(every[0].query, every[0].documents)
        before = _statistics(url)
        for each, tokens in zip(every, encoded):
            parts["bare"].append(_ms(bare.encode_batch_fast, each.documents))
            parts["tokenizer"].append(_ms(_encode, tokenizer, each.query, each.documents))
            parts["graph"].append(_ms(scorer.score, [Work(tokens)]))
            parts["request"].append(_ms(client.rank, each.query, each.documents))
            limits.append(_limit(round(np.mean(tokens_of_pairs))))
        after = _statistics(url)
        for each in every:
            some = each.documents[:SINGLES]
            inputs = [_encode(tokenizer, each.query, [text]).inputs() for text in some]
            # Not by turns, since the threads of the former spin for a while after each.
            single["direct"] += [_ms(direct.run, None, feed) for feed in inputs]
            single["triton"] += [_ms(client.rank, each.query, [text]) for text in some]
    graph, request = np.array(parts["graph"]), np.array(parts["request"])
    # What the machine can do at its best moment: its speed drifts.
    limit = {name: max(each[name] for each in limits) for name in limits[0]}
    places = sum(tokens.input_ids.size for tokens in encoded)
    rate = len(every[0].documents) / (float(np.median(graph)) / 1000)
    stages = _stages(before, after, float(np.mean(request)))
    return {
        "documents": len(every[0].documents),
        "request_ms": float(np.median(request)),
        "graph_ms": float(np.median(graph)),
        "overhead": 1 - stages["cross_encoder"] / sum(stages.values()),
        "stages": stages,
        "tokenizer": {
            "ms": float(np.median(parts["tokenizer"])),
            "bare_ms": float(np.median(parts["bare"])),
            "share_of_bare_rate": float(np.median(np.divide(parts["bare"], parts["tokenizer"]))),
        },
        "single_document": {
            "triton_ms": float(np.median(single["triton"])),
            "direct_ms": float(np.median(single["direct"])),
            "more_ms": float(np.median(np.subtract(single["triton"], single["direct"]))),
        },
        "limit": limit | {"reached": rate / limit["int8_pairs_per_second"]},
        "real_tokens": float(tokens_of_pairs.sum() / places),
    }


def _encode(tokenizer: PairTokenizer, query: str, documents: Sequence[str]) -> Tokens:
    pairs = tokenizer.read(query.encode(), [text.encode() for text in documents])
    return tokenizer.encode([pairs])[0]


def _ms(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - started)


Statistics = dict[str, dict[str, float]]


def _statistics(url: str) -> Statistics:
    """Milliseconds and requests since the start, of each model, from Triton."""
    with triton.InferenceServerClient(url) as client:
        every = client.get_inference_statistics().model_stats
    return {
        each.name: {
            "success": each.inference_stats.success.ns / 1e6,
            "queue": each.inference_stats.queue.ns / 1e6,
            "count": each.inference_stats.success.count,
        }
        for each in every
    }


def _stages(before: Statistics, after: Statistics, request_ms: float) -> dict[str, float]:
    """Mean milliseconds of a request, by what it waits for; they sum to ``request_ms``."""
    requests = after["reranker"]["count"] - before["reranker"]["count"]

    def mean(model: str, part: str) -> float:
        return (after[model][part] - before[model][part]) / requests

    parts = {"queue": sum(mean(model, "queue") for model in STAGES)}
    for model in STAGES:
        parts[model] = mean(model, "success") - mean(model, "queue")
    parts["client and transport"] = request_ms - sum(parts.values())
    return parts


def _limit(length: int) -> dict[str, float]:
    """What the matrix products of a pair would take alone, on all cores, at each precision.

    They are those of every layer's weights: query, key, value and output [h, h], and the two of the
    feed-forward network, [h, f] and [f, h].
    """
    hidden, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    layers = CONFIG["num_hidden_layers"]
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide), (wide, hidden)]
    flop = layers * sum(2 * length * k * n for k, n in shapes)
    result = {"tokens": length, "gflop": flop / 1e9}
    for precision in ("fp32", "int8"):
        seconds = {shape: _product(length, *shape, precision) for shape in {*shapes}}
        pair = layers * sum(seconds[shape] for shape in shapes)
        result[f"{precision}_gflop_per_second"] = flop / pair / 1e9
        result[f"{precision}_pairs_per_second"] = 1 / pair
    return result


_PRODUCTS = {
    "fp32": ("MatMul (a, w)", "float", "float"),
    "int8": ("MatMulInteger (a, w, zero)", "uint8", "int32"),
}


def _product(m: int, k: int, n: int, precision: str) -> float:
    """Seconds of one product [m, k] · [k, n] in ONNX Runtime, as all cores together do them."""
    formula, kind, result = _PRODUCTS[precision]
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]>'
        f"product ({kind}[m, {k}] a) => ({result}[m, {n}] y) {{ y = {formula} }}"
    )
    source = np.random.default_rng(0)
    weight = source.integers(-64, 64, (k, n))
    kind_of_weight = np.float32 if precision == "fp32" else np.int8
    constants = {"w": weight.astype(kind_of_weight)}
    if precision == "int8":
        constants["zero"] = np.array(128, np.uint8)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    a = source.integers(0, 255, (m, k)).astype(np.float32 if precision == "fp32" else np.uint8)
    times, threads = 100, len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:

        def one_core(_: int) -> None:
            for _ in range(times):
                session.run(None, {"a": a})

        def all_cores() -> None:
            list(pool.map(one_core, range(threads)))

        all_cores()
        return min(_ms(all_cores) for _ in range(3)) / 1000 / (times * threads)
