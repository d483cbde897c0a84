"""``tritonrank export``: a checkpoint → a checked graph, published into the model repository."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import ExportRefused, UnsupportedCheckpoint
from ..stages.tokenizer import PairTokenizer
from ..wheels import WheelError
from . import default_model, reading
from .compare import LIMITS, Expected, refuse_beyond_limits
from .comparison import wordpiece
from .frame import portable
from .progress import bar
from .publish import publish, sha256, staging, staging_folder
from .source import Source

#: The graph and, in a file of its own since a protobuf message may have 2 GiB, its weights.
GRAPH, WEIGHTS, TOKENIZER = "model.onnx", "model.onnx.data", "tokenizer.json"
#: Weights begin where a page does, so that they can be mapped from the file.
PAGE = 4096
#: Of a request of the check.
MOST_DOCUMENTS = 100


def export(
    model: str,
    precision: str,
    repository: Path,
    instruction: str | None = None,
    max_length: int | None = None,
) -> Path:
    """Exports a checkpoint, checks it, and publishes it; what was published before stays till then.

    Args:
        model: a hub id, a local folder, or ``default``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        repository: the model repository.
        instruction: the task of a language model, in place of the checkpoint's own.
        max_length: the most tokens of a pair, in place of what the checkpoint takes.

    Returns:
        The published folder.

    Raises:
        UnsupportedCheckpoint: the checkpoint cannot be had or is of an unknown kind.
        ExportRefused: the graph is too far from its FP32 reference, its tokenizer reads something
            else, or the repository cannot be written.
        WheelError: the default model could not be downloaded.
    """
    with staging(repository / "cross_encoder") as folder:
        _say(f"Exporting {model} as {precision} …")
        card, pairs, expected = _written(model, precision, folder, instruction, max_length)
        gc.collect()  # The nodes of a graph refer to each other, and to the weights.
        _say("Comparing it with FP32 …")
        runnable = folder / "portable.onnx"  # There is no GPU here.
        onnx.save(portable(onnx.load(folder / GRAPH, load_external_data=False)), runnable)
        difference = expected.difference(runnable, pairs, precision)
        refuse_beyond_limits(difference, precision)
        if precision == "fp32":  # It is for any processor.
            runnable.replace(folder / GRAPH)
        runnable.unlink(missing_ok=True)
        card |= {
            "sha256": {name: sha256(folder / name) for name in (GRAPH, WEIGHTS, TOKENIZER)},
            "difference_from_fp32": asdict(difference),
        }
        (folder / "export.json").write_text(json.dumps(card, indent=2) + "\n")
        published = publish(folder)
    _say(
        f"Published {published}: Kendall's τ {difference.kendall_tau:.3f}, "
        f"largest logit error {difference.logit_error:.2g}"
    )
    return published


def _written(
    model: str, precision: str, folder: Path, instruction: str | None, max_length: int | None
) -> tuple[dict[str, Any], PairTokenizer, Expected]:
    """Writes what a server needs; gives its card, and what the check needs.

    After it the checkpoint's own model is gone: with the graph's session there would be two.
    """
    source = _source(model, precision, folder, instruction, max_length)
    source.tokenizer.save(str(folder / TOKENIZER))
    fast = wordpiece(folder / TOKENIZER)
    pairs = PairTokenizer(folder / TOKENIZER, MOST_DOCUMENTS, source.prompt, fast)
    reading.check(pairs, source)
    _say("Running the checkpoint's own model on the sample …")
    expected = Expected.of(source)
    _save(source.graph, folder)
    libraries = ["onnx", "onnxruntime", "tokenizers"] + ["nanotoken"] * bool(fast)
    card = {
        "checkpoint": source.name,
        "precision": precision,
        "max_length": source.max_length,
        "activation": source.activation,
        "prompt": asdict(source.prompt),
        **source.provenance,
        **{name: version(name) for name in libraries},
    }
    return card, pairs, expected


def _save(graph: ir.Model, folder: Path) -> None:
    """Writes the graph, converting one weight after the other."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    with bar("Writing", total=size, unit="B", unit_scale=True) as progress:
        ir.save(
            graph,
            folder / GRAPH,
            external_data=WEIGHTS,
            alignment=PAGE,
            align_threshold=PAGE,
            callback=lambda tensor, _: progress.update(tensor.nbytes),
        )


def _source(
    model: str, precision: str, staging: Path, instruction: str | None, max_length: int | None
) -> Source:
    if model == "default" and precision == "int8" and not instruction and max_length is None:
        return default_model.int8_source()
    # Only here, so that the default model needs neither torch nor transformers.
    from . import checkpoint

    if model != "default":
        return checkpoint.source(model, precision, instruction, max_length)
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        default_model.write_checkpoint(Path(folder))
        source = checkpoint.source(folder, precision, instruction, max_length)
    provenance = source.provenance | default_model.PROVENANCE
    return replace(source, name=default_model.NAME, provenance=provenance)


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
    parser.add_argument(
        "--instruction", help="the task of a language model, in place of the checkpoint's own"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="the most tokens of a pair, fewer than the checkpoint takes; longer documents can be "
        "read in passages of as many",
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
        shutil.rmtree(staging_folder(models), ignore_errors=True)
        os._exit(128 + number)

    handlers = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        export(
            arguments.model,
            arguments.precision,
            arguments.model_repository,
            arguments.instruction,
            arguments.max_length,
        )
    except (WheelError, ExportRefused, UnsupportedCheckpoint, OSError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)  # The last: no space, no permission.
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
