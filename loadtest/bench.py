"""``make bench``: the ladder of optimisations and the peers, on the same weights and pairs.

Every contestant is a process (``contestant.py``) that stays loaded; they take turns at each
request, so that a machine whose speed drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from tritonrank_server.export import default_model
from tritonrank_server.export.command import export
from tritonrank_server.serving.serve import DYING_WITH_PARENT, EmbeddedServer, Settings
from tritonrank_server.stages.tokenizer import PairTokenizer

from .anatomy import anatomy, encode
from .data import DL19, Request, ndcg_at_10, requests
from .growth import growth, queue_delay
from .limit import GPU, limit

HERE = Path(__file__).parent
#: The contestant whose logits are the others' measure.
REFERENCE = "packed:fp32"
#: The label of what padding costs.
PADDED = "FP32, padded to the model's 512"
#: The label of the server, as most clients meet it.
SERVED = "through Triton, one client"
#: The label of what a GPU serves.
FP16 = "FP16, attention packed too"
MODELS = HERE / "models"
PEERS = HERE / "environments"


@dataclass
class Contestant:
    """One row of a table.

    Attributes:
        name: for ``contestant.py``.
        table: ``ladder`` or ``peers``.
        environment: folder of the virtual environment it runs in; default, this one's.
        clients: how many requests it is given at a time.
        share: of how many requests, and how many documents of each, where all would take too long.
        models: what it loads from; default, what ``prepare`` writes.
        seconds: what it took for each group of so many requests.
        latencies, logits: what it took for each request, and found.
    """

    name: str
    table: str
    label: str
    environment: str | None = None
    clients: int = 1
    share: tuple[int | None, int | None] = (None, None)
    models: Path | None = None
    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def forget(self) -> None:
        """What it took and found so far."""
        for found in (self.seconds, self.latencies, self.logits):
            found.clear()

    def work(self, every: Sequence[Request]) -> list[list[tuple[str, list[str]]]]:
        """Its requests, in groups of as many as it has clients; a smaller rest is left out."""
        most, documents = self.share
        pairs = [(each.query, each.documents[:documents]) for each in every[:most]]
        groups = len(pairs) // self.clients
        return [pairs[i * self.clients :][: self.clients] for i in range(groups)]


def contestants(url: str | None) -> list[Contestant]:
    """The rows. ``url`` is the gRPC address of a server; without one it has no rows."""
    ladder = [
        Contestant("padded:4096", "ladder", "FP32, padded to 4096", share=(2, 2)),
        Contestant("padded:512", "ladder", PADDED, share=(2, 100)),
        Contestant("padded:longest", "ladder", "padded to the longest of the request"),
        Contestant(REFERENCE, "ladder", "packed: no padding but in attention"),
    ]
    own = "sentence-transformers"
    peers = [
        Contestant("transformers:", "peers", "transformers, a loop, FP32"),
        Contestant("peer:torch", "peers", f"{own}, torch FP32", own),
        Contestant("infinity:", "peers", "infinity, its server", "infinity"),
        Contestant("infinity:", "peers", "infinity, 4 clients at a time", "infinity", clients=4),
    ]
    if GPU:
        ladder.append(Contestant("packed:fp16", "ladder", FP16))
        peers.append(Contestant("peer:torch-fp16", "peers", f"{own}, torch FP16", own))
    else:
        ladder += [
            Contestant("pipeline:fp32", "ladder", "one document an execution, one a core"),
            Contestant("pipeline:int8", "ladder", "INT8"),
        ]
        peers += [
            Contestant("peer:torch-bf16", "peers", f"{own}, torch bf16", own, share=(2, 100)),
            Contestant("peer:onnx", "peers", f"{own}, ONNX", own),
            Contestant("peer:onnx-int8", "peers", f"{own}, ONNX INT8", own),
            Contestant("peer:openvino", "peers", f"{own}, OpenVINO", own),
            Contestant("peer:openvino-int8", "peers", f"{own}, OpenVINO INT8", own),
            Contestant("flashrank:", "peers", "plain ONNX Runtime, INT8 as published"),
            Contestant("openvino:", "peers", "our FP32 graph, OpenVINO for engine", own),
            Contestant("openvino:int8", "peers", "our graph, OpenVINO INT8 (NNCF)", own),
            Contestant("ctranslate2:", "peers", "our tokens, CTranslate2 INT8", "ctranslate2"),
        ]
    if url:
        name = f"triton:{url}"
        ladder += [
            Contestant(name, "ladder", SERVED),
            Contestant(name, "ladder", "through Triton, 4 clients at a time", clients=4),
        ]
        if GPU:
            label = "through Triton, 16 clients at a time"
            ladder.append(Contestant(name, "ladder", label, clients=16))
    return ladder + peers


def prepare() -> None:
    """Writes what the contestants load into ``MODELS``."""
    MODELS.mkdir(exist_ok=True)
    checkpoint = MODELS / "checkpoint"
    if not checkpoint.exists():
        checkpoint.mkdir()
        default_model.write_checkpoint(checkpoint)
    calibration = MODELS / "calibration" / "train.jsonl"  # Of the last queries.
    calibration.parent.mkdir(exist_ok=True)
    texts = [text for each in requests(43)[-3:] for text in each.documents]
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    onnx.save(default_model.int8_graph(), MODELS / "wheel.onnx")
    graph = default_model.fp32_graph()
    onnx.save(graph, MODELS / "padded.onnx")
    _lengthen(graph, 8)
    onnx.save(graph, MODELS / "padded-4096.onnx")
    for precision in ("fp32", "fp16" if GPU else "int8"):
        repository = MODELS / f"repository-{precision}"
        shutil.rmtree(repository, ignore_errors=True)
        new_repository(repository)
        link = MODELS / precision
        link.unlink(missing_ok=True)
        link.symlink_to(export("default", precision, repository))


def new_repository(folder: Path) -> Path:
    """A copy of the hand-written model repository, with nothing published in it."""
    source = HERE.parent / "model_repository"
    unpublished = shutil.ignore_patterns("current", "export-*", ".staging-*", "__pycache__")
    return Path(shutil.copytree(source, folder, symlinks=True, ignore=unpublished))


def _lengthen(model: onnx.ModelProto, times: int) -> None:
    """Repeats the position embeddings: a longer model with the same logits for short pairs."""
    positions = np.arange(default_model.MAX_LENGTH)[None]
    for tensor in model.graph.initializer:
        if tensor.name.endswith("position_embeddings.weight_quantized"):
            rows = np.tile(numpy_helper.to_array(tensor), (times, 1))
            tensor.CopyFrom(numpy_helper.from_array(rows, tensor.name))
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = node.attribute[0].t
            if np.array_equal(numpy_helper.to_array(value), positions):
                longer = np.arange(times * default_model.MAX_LENGTH)[None]
                value.CopyFrom(numpy_helper.from_array(longer))


@contextmanager
def running(contestant: Contestant) -> Iterator[subprocess.Popen[str]]:
    """The contestant's process, ready.

    Raises:
        RuntimeError: it could not be started; its last line on standard error says why.
    """
    folder = contestant.environment
    python = str(PEERS / folder / "bin" / "python") if folder else sys.executable
    log = MODELS / f"{contestant.label.replace('/', ' ')}.log"
    arguments = [contestant.name, str(contestant.models or MODELS), str(contestant.clients)]
    command = [*DYING_WITH_PARENT, python, str(HERE / "contestant.py"), *arguments]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ
            | {
                # Its threads are not to spin while others have their turn.
                "OMP_WAIT_POLICY": "PASSIVE",
                "TOKENIZERS_PARALLELISM": "true",
                # Nor is it to report to its makers.
                "INFINITY_ANONYMOUS_USAGE_STATS": "0",
            },
        ) as process,
    ):
        assert process.stdin
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not line:
                reason = log.read_text().strip().splitlines()[-1:] or ["no reason given"]
                raise RuntimeError(f"{contestant.label}: {reason[0]}")
            contestant.versions = json.loads(line)
            yield process
        finally:
            with suppress(OSError):  # It may be dead already.
                process.stdin.close()  # At which it ends, unless a library of its hangs then.
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def measure(
    all_contestants: Sequence[Contestant], every: Sequence[Request], warm: bool = GPU
) -> list[str]:
    """Gives every contestant its requests, in turns; gives the failures, a line each.

    When it is to be warm, all of them run once before any counts: a GPU's libraries load kernels,
    or plan, for shapes that they have not met.
    """
    failures = []
    with ExitStack() as stack:
        started = []
        for contestant in all_contestants:
            _say(f"Loading {contestant.label} …")
            try:
                started.append((contestant, stack.enter_context(running(contestant))))
            except (OSError, RuntimeError) as error:
                failures.append(str(error))
                _say(f"Left out: {error}")
        for turn in [*range(len(every))] * (1 + warm):
            _say(f"Request {turn + 1} of {len(every)} …")
            if turn == 0:
                for contestant, _ in started:
                    contestant.forget()
            for contestant, process in list(started):
                groups = contestant.work(every)
                if turn < len(groups):
                    try:
                        _answer(contestant, process, groups[turn])
                    except (OSError, ValueError) as error:
                        failures.append(f"{contestant.label}: stopped at request {turn + 1}")
                        _say(f"Left out: {failures[-1]} ({error})")
                        started.remove((contestant, process))
                        contestant.forget()
    return failures


def _answer(
    contestant: Contestant, process: subprocess.Popen[str], group: list[tuple[str, list[str]]]
) -> None:
    """One turn.

    Raises:
        OSError, ValueError: the process has died, or its answer is not one.
    """
    assert process.stdin
    assert process.stdout
    print(json.dumps(group), file=process.stdin, flush=True)
    answer = json.loads(process.stdout.readline())
    for (_, documents), logits in zip(group, answer["logits"], strict=True):
        if len(logits) != len(documents) or not np.isfinite(logits).all():
            raise ValueError("not a finite logit for each document")
    contestant.seconds.append(answer["seconds"])
    contestant.latencies += answer["latencies"]
    contestant.logits += answer["logits"]


def row(contestant: Contestant, every: Sequence[Request], reference: Contestant) -> dict[str, Any]:
    """The contestant's figures; ``reference`` has the FP32 logits of the same requests."""
    groups = contestant.work(every)
    rates = [
        sum(len(documents) for _, documents in group) / seconds
        for group, seconds in zip(groups, contestant.seconds, strict=True)
    ]
    found = list(zip(every, contestant.logits, reference.logits))
    errors = [
        abs(logit - exact)
        for _, logits, reference_logits in found
        for logit, exact in zip(logits, reference_logits)
    ]
    result: dict[str, Any] = {
        "label": contestant.label,
        "table": contestant.table,
        "clients": contestant.clients,
        "pairs_per_second": spread(rates),
        "latency_ms": spread([1000 * seconds for seconds in contestant.latencies]),
        "requests": len(contestant.logits),
        "pairs": len(errors),
        "largest_logit_error": max(errors),
        "versions": contestant.versions,
    }
    # Of all requests or none, so that rows can be compared.
    whole = all(len(logits) == len(each.documents) for each, logits, _ in found)
    if whole and len(found) == len(every) and all(any(each.ideal) for each in every):
        for key, index in (("ndcg_at_10", 1), ("ndcg_at_10_of_fp32", 2)):
            values = [ndcg_at_10(each[0], np.argsort(-np.array(each[index]))) for each in found]
            result[key] = float(np.mean(values))
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Their median and range."""
    return {
        "median": float(np.median(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }


def hardware() -> dict[str, Any]:
    """Names the machine, as far as its kernel does."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": f"{facts['model name']}, family {facts['cpu family']}, model {facts['model']}",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in wanted if name in facts["flags"].split()],
        "gpu": _gpu() if GPU else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def serving(url: str | None, repository: Path) -> Iterator[str | None]:
    """The given server, or else an embedded one, which has no GPU."""
    if url or GPU:
        yield url
        return
    settings = Settings(repository, grpc_port=0, http_port=0, metrics_port=0)
    with EmbeddedServer(settings) as server:
        yield server.grpc_url


def limit_of_gpu(every: Sequence[Request], pairs_per_second: float) -> dict[str, float]:
    """The rates of matrix products alone, and how much of FP16's the ladder's FP16 reaches."""
    tokenizer = PairTokenizer(MODELS / "fp32" / "tokenizer.json", 1024)
    lengths = [encode(tokenizer, each.query, each.documents).lengths for each in every]
    best = limit(round(np.mean(np.concatenate(lengths))), ("fp32", "fp16"))
    return best | {"reached": pairs_per_second / best["fp16_pairs_per_second"]}


def main() -> int:
    """Measures, and writes one JSON file, from which ``report`` makes the tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    few = 43 if GPU else 8
    parser.add_argument("--queries", type=int, default=few, help="of 100 documents each")
    parser.add_argument("--url", help="gRPC address of a server to measure; default, an own one")
    arguments = parser.parse_args()
    if arguments.queries < 1:
        parser.error("--queries must be 1 or more")
    prepare()
    every = requests(arguments.queries)
    precision = "fp16" if GPU else "int8"
    with serving(arguments.url, MODELS / f"repository-{precision}") as url:
        rows = contestants(url)
        result: dict[str, Any] = {
            "left_out": measure(rows, every),
            "hardware": hardware(),
            "commit": commit(),
            "versions": {"onnxruntime": ort.__version__, "tokenizers": version("tokenizers")},
            "data": "TREC DL 2019, BM25 top 100" if DL19.exists() else "generated text",
            "queries": len(every),
        }
        [reference] = [each for each in rows if each.name == REFERENCE]
        if not reference.seconds:
            _say(f"The reference failed: {'; '.join(result['left_out'])}")
            return 1
        result["rows"] = [row(each, every, reference) for each in rows if each.seconds]
        if url:
            _say("More documents, longer ones, more clients …")
            result["growth"] = growth(url, MODELS / precision / "tokenizer.json", every)
            _say("Taking requests apart …")
            result["anatomy"] = anatomy(url, MODELS / precision, every)
        elif GPU:
            _say("What the GPU allows …")
            for half in [each for each in result["rows"] if each["label"] == FP16]:
                result["limit"] = limit_of_gpu(every, half["pairs_per_second"]["median"])
    if not (arguments.url or GPU):
        _say("Delays …")
        result["queue_delay"] = queue_delay(MODELS / f"repository-{precision}", every)
    output = HERE / "results" / ("gpu.json" if GPU else "cpu.json")
    output.write_text(json.dumps(result, indent=2) + "\n")
    _say(f"Wrote {output}")
    return 0


def commit() -> str:
    """The commit of this checkout, and whether files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
