"""One way to score pairs, as a process of its own: ``python contestant.py NAME MODELS``.

Each way runs in the environment that its users would have, so every import is where it is needed.
A line of standard input is a list of requests as JSON, ``[[query, [document, …]], …]``; a line of
standard output is what they took in seconds, and the logits of each. The first line has versions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Logits = list[float]
#: Query and documents → logits, for each of several requests.
Score = Callable[[list[tuple[str, list[str]]]], list[Logits]]


def each(score: Callable[[str, list[str]], Any]) -> Score:
    """One request after the other."""
    return lambda requests: [np.ravel(score(*request)).tolist() for request in requests]


def padded(graph: Path, models: Path, length: int | None) -> Score:
    """Plain ONNX Runtime, as FlashRank uses it: documents padded to a length, or to the longest."""
    import onnxruntime as ort
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "checkpoint" / "tokenizer.json"))
    tokenizer.enable_truncation(length or 512, strategy="only_second")
    tokenizer.enable_padding(length=length)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    batch = 1 if length == 4096 else 32  # As sentence-transformers has; 4096 fill the memory.

    def score(query: str, documents: list[str]) -> Any:
        pairs = tokenizer.encode_batch([(query, document) for document in documents])
        columns = {
            "input_ids": [pair.ids for pair in pairs],
            "attention_mask": [pair.attention_mask for pair in pairs],
            "token_type_ids": [pair.type_ids for pair in pairs],
        }
        feed = {name: np.array(values, np.int64) for name, values in columns.items()}
        if length is None:
            return session.run(["logits"], feed)[0]
        parts = [
            {name: values[i : i + batch] for name, values in feed.items()}
            for i in range(0, len(pairs), batch)
        ]
        return np.concatenate([session.run(["logits"], part)[0] for part in parts])

    return each(score)


def packed(models: Path) -> Score:
    """The ragged graph, all documents of a request in one execution, as Triton's backend does."""
    import onnxruntime as ort
    from tritonrank_server.tokenizer import PairTokenizer

    tokenizer = PairTokenizer(models / "fp32" / "tokenizer.json", max_documents=1024)
    session = ort.InferenceSession(
        models / "fp32" / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def score(query: str, documents: list[str]) -> Any:
        pairs = tokenizer.read(query.encode(), [document.encode() for document in documents])
        [tokens] = tokenizer.encode([pairs])
        return session.run(["logits"], tokens.inputs())[0]

    return each(score)


def pipeline(folder: Path) -> Score:
    """This project's stages without Triton."""
    from tritonrank_server.cross_encoder import CrossEncoder
    from tritonrank_server.pipeline import Pipeline
    from tritonrank_server.tokenizer import PairTokenizer

    tokenizer = PairTokenizer(folder / "tokenizer.json", max_documents=1024)
    ranker = Pipeline(tokenizer, CrossEncoder(folder / "model.onnx"))

    def score(query: str, documents: list[str]) -> Any:
        ranking = ranker.rank(query, documents)
        return ranking.logits[np.argsort(ranking.indices)]

    return each(score)


def triton(url: str, clients: int) -> Score:
    """The whole server, over gRPC, with so many requests at a time."""
    from tritonrank import RerankClient

    client = RerankClient(url, timeout=600)
    pool = ThreadPoolExecutor(clients)

    def score(request: tuple[str, list[str]]) -> Logits:
        ranking = client.rank(*request)
        return [one.logit for one in sorted(ranking, key=lambda one: one.index)]

    return lambda requests: list(pool.map(score, requests))


def sentence_transformers(models: Path, variant: str) -> Score:
    """sentence-transformers' CrossEncoder with one of its backends."""
    import torch
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    checkpoint = str(models / "checkpoint")
    backend, _, precision = variant.partition("-")
    options: dict[str, Any] = (
        {"model_kwargs": {"dtype": torch.bfloat16}} if precision == "bf16" else {}
    )
    model = CrossEncoder(checkpoint, device="cpu", backend=backend, **options)
    if precision == "int8":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            export_dynamic_quantized_onnx_model(model, "avx2", folder)
            options = {"file_name": "model_quint8_avx2.onnx"}
            model = CrossEncoder(folder, device="cpu", backend="onnx", model_kwargs=options)
    raw = torch.nn.Identity()
    return each(
        lambda query, documents: model.predict(
            [(query, document) for document in documents],
            activation_fn=raw,
            show_progress_bar=False,
        )
    )


def transformers_loop(models: Path) -> Score:
    """Transformers and a loop, a pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "checkpoint")
    model = AutoModelForSequenceClassification.from_pretrained(models / "checkpoint").eval()

    def score(query: str, documents: list[str]) -> list[float]:
        with torch.inference_mode():
            return [
                model(**tokenizer(query, each, truncation=True, return_tensors="pt")).logits.item()
                for each in documents
            ]

    return each(score)


def make(name: str, models: Path) -> Score:
    """The contestant of that name; ``bench`` has them with what they stand for."""
    kind, _, variant = name.partition(":")
    if kind == "padded":
        length = None if variant == "longest" else int(variant)
        graph = "padded-4096.onnx" if length == 4096 else "padded.onnx"
        return padded(models / graph, models, length)
    if kind == "flashrank":
        return padded(models / "wheel.onnx", models, None)
    if kind == "packed":
        return packed(models)
    if kind == "pipeline":
        return pipeline(models / variant)
    if kind == "triton":
        url, _, clients = variant.rpartition("/")
        return triton(url, int(clients))
    if kind == "transformers":
        return transformers_loop(models)
    return sentence_transformers(models, variant)


def main() -> None:
    """Answers until standard input ends. What libraries print goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    name, models = sys.argv[1], Path(sys.argv[2])
    score = make(name, models)
    score([("warm up", ["one document", "another " * 40])])
    names = ("onnxruntime", "openvino", "sentence-transformers", "torch", "transformers")
    print(
        json.dumps({name: v for name in names if (v := _version(name))}), file=answers, flush=True
    )
    for line in sys.stdin:
        requests = [(query, documents) for query, documents in json.loads(line)]
        started = time.perf_counter()
        logits = score(requests)
        answer = {"seconds": time.perf_counter() - started, "logits": logits}
        print(json.dumps(answer), file=answers, flush=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
