"""Where a request's time goes, and how near it comes to what the machine allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tokenizers import Tokenizer
from tritonrank import RerankClient
from tritonrank_server.stages.cross_encoder import CrossEncoder, Work
from tritonrank_server.stages.tokenizer import PairTokenizer, Tokens

from .contestant import session
from .data import Request
from .limit import GPU, limit

STAGES = ("tokenizer", "cross_encoder", "sorter")
#: Documents that are ranked alone, of each request.
SINGLES = 5
#: How often a request is tokenized.
TURNS = 5


def anatomy(url: str, folder: Path, every: Sequence[Request]) -> dict[str, Any]:
    """Times the parts of each request in turns; times are medians over requests, in milliseconds.

    Args:
        url: gRPC address of a server with the export of ``folder``.
        folder: an export.
        every: requests, of the same number of documents.

    Returns:
        ``request_ms`` through Triton with one client, ``graph_ms`` of the scorer alone in this
        process (on a GPU, ONNX Runtime called directly), ``overhead`` as the share of a request
        outside the scorer's stage, ``stages`` from Triton's statistics (means), ``tokenizer``
        against a bare batch call, ``single_document`` against calling ONNX Runtime directly,
        ``limit`` by the rate of matrix products alone, and ``real_tokens`` as a share of the places
        of each request padded to its longest document.
    """
    tokenizer = PairTokenizer.of(folder, 1024)
    direct = session(folder / "model.onnx")
    precision, score = graph_alone(folder, direct)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.no_truncation()
    encoded = [encode(tokenizer, each.query, each.documents) for each in every]
    parts: dict[str, list[float]] = {"bare": [], "tokenizer": [], "graph": [], "request": []}
    tokens_of_pairs = np.concatenate([tokens.lengths for tokens in encoded])
    limits: list[dict[str, float]] = []
    single: dict[str, list[float]] = {"direct": [], "triton": []}
    with RerankClient(url, timeout=600) as client:
        counted = statistics(url)["reranker"]["count"]
        client.rank(every[0].query, every[0].documents)
        before = _settled_statistics(url, counted + 1)
        for each, tokens in zip(every, encoded):
            for _ in range(TURNS):
                parts["bare"].append(_ms(bare.encode_batch_fast, each.documents))
                parts["tokenizer"].append(_ms(encode, tokenizer, each.query, each.documents))
            parts["graph"].append(_ms(score, tokens))
            parts["request"].append(_ms(client.rank, each.query, each.documents))
            limits.append(limit(round(np.mean(tokens_of_pairs)), ("fp32", precision)))
        after = _settled_statistics(url, before["reranker"]["count"] + len(every))
        for each in every:
            some = each.documents[:SINGLES]
            inputs = [encode(tokenizer, each.query, [text]).inputs() for text in some]
            # Not by turns, since the threads of the former spin for a while after each. The first
            # of each warms up.
            direct.run(None, inputs[0])
            single["direct"] += [_ms(direct.run, None, feed) for feed in inputs]
            time.sleep(0.5)
            client.rank(each.query, some[:1])
            single["triton"] += [_ms(client.rank, each.query, [text]) for text in some]
    graph, request = np.array(parts["graph"]), np.array(parts["request"])
    # What the machine can do at its best moment: its speed drifts.
    best = {name: max(each[name] for each in limits) for name in limits[0]}
    places = sum(tokens.lengths.size * tokens.lengths.max() for tokens in encoded)
    rate = len(every[0].documents) / (float(np.median(graph)) / 1000)
    stages = stages_of(before, after, float(np.mean(request)))
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
        "limit": best | {"reached": rate / best[f"{precision}_pairs_per_second"]},
        "real_tokens": float(tokens_of_pairs.sum() / places),
    }


def graph_alone(folder: Path, direct: Any) -> tuple[str, Callable[[Tokens], object]]:
    """What this machine serves: the precision, and what scores, without a server."""
    if GPU:
        return "fp16", lambda tokens: direct.run(None, tokens.inputs())
    scorer = CrossEncoder(folder / "model.onnx")
    return "int8", lambda tokens: scorer.score([Work(tokens)])


def encode(tokenizer: PairTokenizer, query: str, documents: Sequence[str]) -> Tokens:
    """One request, as the first stage has it."""
    pairs = tokenizer.read(query.encode(), [text.encode() for text in documents])
    return tokenizer.encode([pairs])[0]


def _ms(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - started)


Statistics = dict[str, dict[str, float]]


def _settled_statistics(url: str, requests: float) -> Statistics:
    """Those with so many requests, which Triton counts a moment after it has answered."""
    previous, found = None, statistics(url)
    for _ in range(50):  # Not for ever, since the server may have other clients.
        if found["reranker"]["count"] >= requests and found == previous:
            break
        time.sleep(0.1)
        previous, found = found, statistics(url)
    return found


def statistics(url: str) -> Statistics:
    """Milliseconds and requests since the start, of each model, from Triton."""
    with triton.InferenceServerClient(url) as client:
        every = {
            each.name: each.inference_stats
            for each in client.get_inference_statistics().model_stats
        }
    return {
        name: {
            # Not "success", which lasts until the request is freed, after its answer.
            "compute": (each.compute_input.ns + each.compute_infer.ns + each.compute_output.ns)
            / 1e6,
            "queue": each.queue.ns / 1e6,
            "count": each.success.count,
        }
        for name, each in every.items()
    }


def stages_of(before: Statistics, after: Statistics, request_ms: float) -> dict[str, float]:
    """Mean milliseconds of a request, by what it waits for; they sum to ``request_ms``."""
    requests = after["reranker"]["count"] - before["reranker"]["count"]

    def mean(model: str, part: str) -> float:
        return (after[model][part] - before[model][part]) / requests

    parts = {"queue": sum(mean(model, "queue") for model in STAGES)}
    for model in STAGES:
        parts[model] = mean(model, "compute")
    parts["client and transport"] = request_ms - sum(parts.values())
    return parts
