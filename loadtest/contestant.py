"""One way to score pairs, as a process of its own: ``python contestant.py NAME MODELS CLIENTS``.

Each way runs in the environment that its users would have, so every import is where it is needed.
A line of standard input is a list of requests as JSON, ``[[query, [document, …]], …]``, of which
CLIENTS run at a time; a line of standard output is what all took in seconds, and each, and the
logits of each. The first line has versions.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

#: With the names of the instructions it has.
CPU = Path("/proc/cpuinfo").read_text()
#: Whose versions are told.
PACKAGES = (
    *("ctranslate2", "infinity-emb", "nncf", "onnxruntime", "openvino"),
    *("sentence-transformers", "torch"),
)
#: Query and documents → an array or a list of their logits.
Score = Callable[[str, list[str]], Any]


def session(graph: Path | bytes, options: Any = None) -> Any:
    """ONNX Runtime's session, on a GPU where there is one, where FP32 is not to mean TF32."""
    import onnxruntime as ort

    providers: list[Any] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in ort.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    return ort.InferenceSession(graph, options, providers=providers)


def padded(graph: Path, models: Path, length: int | None) -> Score:
    """Plain ONNX Runtime, as FlashRank uses it: documents padded to a length, or to the longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "checkpoint" / "tokenizer.json"))
    tokenizer.enable_truncation(length or 512, strategy="only_second")
    tokenizer.enable_padding(length=length)
    graph_session = session(graph)
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
            return graph_session.run(["logits"], feed)[0]
        parts = [
            {name: values[i : i + batch] for name, values in feed.items()}
            for i in range(0, len(pairs), batch)
        ]
        return np.concatenate([graph_session.run(["logits"], part)[0] for part in parts])

    return score


def packed(folder: Path) -> Score:
    """The ragged graph, all documents of a request in one execution, as Triton's backend does."""
    from tritonrank_server.stages.tokenizer import PairTokenizer

    tokenizer = PairTokenizer.of(folder, max_passages=1024)
    graph = session(folder / "model.onnx")

    def score(query: str, documents: list[str]) -> Any:
        pairs = tokenizer.read(query.encode(), [document.encode() for document in documents])
        [tokens] = tokenizer.encode([pairs])
        return graph.run(["logits"], tokens.inputs())[0]

    return score


def pipeline(folder: Path) -> Score:
    """This project's stages without Triton."""
    from tritonrank_server.stages.pipeline import Pipeline

    ranker = Pipeline.of(folder, max_passages=1024)

    def score(query: str, documents: list[str]) -> Any:
        ranking = ranker.rank(query, documents)
        return ranking.logits[np.argsort(ranking.indices)]

    return score


def triton(url: str) -> Score:
    """The whole server, over gRPC."""
    from tritonrank import RerankClient

    client = RerankClient(url, timeout=600)

    def score(query: str, documents: list[str]) -> list[float]:
        ranking = client.rank(query, documents)
        return [one.logit for one in sorted(ranking, key=lambda one: one.index)]

    return score


def our_tokens(models: Path) -> Callable[[str, list[str]], Any]:
    """Our tokenizer, in an environment that has not installed it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "python_backends"))
    from tritonrank_server.stages.tokenizer import PairTokenizer

    tokenizer = PairTokenizer(models / "int8" / "tokenizer.json", max_passages=1024)

    def encode(query: str, documents: list[str]) -> Any:
        pairs = tokenizer.read(query.encode(), [document.encode() for document in documents])
        return tokenizer.encode([pairs])[0]

    return encode


def batches(tokens: Any, few: int) -> list[npt.NDArray[np.int64]]:
    """The places of its pairs, so many of similar lengths together, the longest first."""
    order = np.argsort(-tokens.lengths, kind="stable")
    return np.split(order, range(few, len(order), few))


def openvino(models: Path, precision: str) -> Score:
    """The FP32 ragged graph in OpenVINO, in bf16 where the CPU has it, 8 documents a core.

    Or quantised by NNCF, and one document a core: OpenVINO compiles its INT8 kernels anew for each
    number of tokens, of which documents alone soon have had all, and several together never.
    """
    encode = our_tokens(models)
    import openvino
    from tritonrank_server.stages.tokenizer import Tokens

    int8 = precision == "int8"
    cores, few = len(os.sched_getaffinity(0)), 1 if int8 else 8
    options = {"NUM_STREAMS": str(cores), "INFERENCE_NUM_THREADS": str(cores)}
    if "avx512_bf16" in CPU:
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    graph = by_nncf(models, encode) if int8 else models / "fp32" / "model.onnx"
    compiled = openvino.Core().compile_model(str(graph), "CPU", options)

    def score(query: str, documents: list[str]) -> Any:
        tokens = encode(query, documents)
        logits = np.zeros(len(documents))
        queue = openvino.AsyncInferQueue(compiled, cores)

        def keep(request: Any, batch: npt.NDArray[np.int64]) -> None:
            logits[batch] = request.get_tensor("logits").data[:, 0]

        queue.set_callback(keep)
        every = list(tokens.documents())
        for batch in batches(tokens, few):
            queue.start_async(Tokens.joined([every[i] for i in batch]).inputs(), batch)
        queue.wait_all()
        return logits

    if int8:  # Every number of tokens that passages have, on each core.
        score("water", ["water " * count for count in range(1, 256) for _ in range(cores)])
    return score


def by_nncf(models: Path, encode: Callable[[str, list[str]], Any]) -> Path:
    """The FP32 ragged graph, weights and activations in INT8; made once for each export."""
    import nncf
    import openvino

    path = models / f"{(models / 'fp32').resolve().name}-nncf.xml"
    if not path.exists():
        lines = (models / "calibration" / "train.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        # The beginning of another passage for a query.
        queries = [" ".join(text.split()[:6]) for text in texts]
        pairs = zip(queries[1:], texts)
        calibration = [encode(query, [text]).inputs() for query, text in pairs]
        graph = nncf.quantize(
            openvino.Core().read_model(str(models / "fp32" / "model.onnx")),
            nncf.Dataset(calibration),
            model_type=nncf.ModelType.TRANSFORMER,
        )
        openvino.save_model(graph, str(path), compress_to_fp16=False)
    return path


def ctranslate2(models: Path) -> Score:
    """The checkpoint in CTranslate2, INT8, 4 documents of similar lengths a core."""
    encode = our_tokens(models)
    import ctranslate2
    from safetensors.numpy import load_file

    folder = models / "ctranslate2"
    if not folder.exists():
        converter = ctranslate2.converters.TransformersConverter(str(models / "checkpoint"))
        converter.convert(str(folder), quantization="int8")
    weights = load_file(models / "checkpoint" / "model.safetensors")
    weight, bias = weights["classifier.weight"][0], weights["classifier.bias"][0]
    cores, few = len(os.sched_getaffinity(0)), 4
    encoder = ctranslate2.Encoder(
        str(folder), compute_type="int8", inter_threads=cores, intra_threads=1
    )
    pool = ThreadPoolExecutor(cores)

    def score(query: str, documents: list[str]) -> Any:
        tokens = encode(query, documents)
        every = list(tokens.documents())
        logits = np.zeros(len(documents))

        def run(batch: npt.NDArray[np.int64]) -> None:
            ids = [every[i].input_ids.tolist() for i in batch]
            first = int(tokens.query_lengths[0])
            types = [[0] * first + [1] * (len(each) - first) for each in ids]
            output = encoder.forward_batch(ids, token_type_ids=types)
            logits[batch] = np.array(output.pooler_output) @ weight + bias

        list(pool.map(run, batches(tokens, few)))
        return logits

    return score


def infinity(models: Path) -> Score:
    """Infinity's own server, over HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    checkpoint = str(models / "checkpoint")
    command = [str(Path(sys.executable).with_name("infinity_emb")), "v2", "--model-id", checkpoint]
    command += ["--engine", "torch", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=sys.stderr)
    atexit.register(server.terminate)
    url = f"http://127.0.0.1:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"{url}/health").close()
            break
        except urllib.error.URLError:
            if server.poll() is not None:
                raise RuntimeError("infinity's server stopped at start") from None
            time.sleep(0.2)

    def score(query: str, documents: list[str]) -> list[float]:
        body = {"query": query, "documents": documents, "raw_scores": True, "model": checkpoint}
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/rerank", json.dumps(body).encode(), header)
        with opener.open(request) as response:
            results = json.load(response)["results"]
        return [one["relevance_score"] for one in sorted(results, key=lambda one: one["index"])]

    return score


def sentence_transformers(models: Path, variant: str) -> Score:
    """sentence-transformers' CrossEncoder with one of its backends."""
    import torch
    from sentence_transformers import CrossEncoder

    checkpoint = str(models / "checkpoint")
    backend, _, precision = variant.removesuffix("-compiled").partition("-")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    options: dict[str, Any] = (
        {"model_kwargs": {"dtype": dtypes[precision]}} if precision in dtypes else {}
    )
    model = CrossEncoder(checkpoint, backend=backend, **options)
    if precision == "int8":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if backend == "onnx":
                from sentence_transformers import export_dynamic_quantized_onnx_model

                kind = "avx512_vnni" if "avx512_vnni" in CPU else "avx2"
                export_dynamic_quantized_onnx_model(model, kind, folder, file_suffix="int8")
            else:
                from sentence_transformers import export_static_quantized_openvino_model

                texts = (str(models / "calibration"), "default", "train", "text")
                export_static_quantized_openvino_model(
                    model, None, folder, *texts, file_suffix="int8"
                )
            name = {"onnx": "model_int8.onnx", "openvino": "openvino_model_int8.xml"}[backend]
            model = CrossEncoder(folder, backend=backend, model_kwargs={"file_name": name})
    if variant.endswith("-compiled"):
        model.compile(dynamic=True)  # Not that of model.model, which it does not call.
    raw = torch.nn.Identity()

    def score(query: str, documents: list[str]) -> Any:
        pairs = [(query, document) for document in documents]
        return model.predict(pairs, activation_fn=raw, show_progress_bar=False)

    return score


def transformers_loop(models: Path) -> Score:
    """Transformers and a loop, a pair at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(models / "checkpoint")
    model.eval().to(device)

    def score(query: str, documents: list[str]) -> list[float]:
        with torch.inference_mode():
            encoded = (
                tokenizer(query, each, truncation=True, return_tensors="pt").to(device)
                for each in documents
            )
            return [model(**each).logits.item() for each in encoded]

    return score


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
        return packed(models / variant)
    if kind == "pipeline":
        return pipeline(models / variant)
    if kind == "triton":
        return triton(variant)
    if kind == "openvino":
        return openvino(models, variant)
    if kind == "ctranslate2":
        return ctranslate2(models)
    if kind == "infinity":
        return infinity(models)
    if kind == "transformers":
        return transformers_loop(models)
    return sentence_transformers(models, variant)


def main() -> None:
    """Answers until standard input ends. What libraries print goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    name, models, clients = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    score = make(name, models)

    def timed(request: tuple[str, list[str]]) -> tuple[float, list[float]]:
        started = time.perf_counter()
        logits = np.ravel(score(*request)).tolist()
        return time.perf_counter() - started, logits

    timed(("warm up", ["one document", "another " * 40]))
    versions = {name: v for name in PACKAGES if (v := _version(name))}
    print(json.dumps(versions), file=answers, flush=True)
    with ThreadPoolExecutor(clients) as pool:
        for line in sys.stdin:
            requests = [(query, documents) for query, documents in json.loads(line)]
            started = time.perf_counter()
            # Alone it stays on this thread, as some libraries would have it.
            results = list((pool.map if clients > 1 else map)(timed, requests))
            seconds = time.perf_counter() - started
            latencies, logits = zip(*results)
            answer = {"seconds": seconds, "latencies": latencies, "logits": logits}
            print(json.dumps(answer), file=answers, flush=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
