"""A checkpoint's folder: where it is, and what is refused before anything of it is loaded.

Loading is no check. Of what is missing, transformers makes something up (random weights, a
vocabulary of five words); what it does not know, it leaves out; and code that a checkpoint brings
along, it offers to run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import UnsupportedCheckpoint

#: What of a hub repository is read, from its top folder and from those of modules.
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
PICKLED = ["pytorch_model*.bin"]
#: What peft keeps beside a model. transformers adds it to the weights if peft is installed.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
#: The files of any tokenizer.
TOKENIZERS = (["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"], ["*.model"])
GIT_LFS = b"version https://git-lfs"
#: What sentence-transformers keeps beside a model.
SAVED = "config_sentence_transformers.json"
#: What it keeps of a module, and what of that changes what the model reads, or how it runs.
OPTIONS = "sentence_bert_config.json"
CHANGES = (
    *("do_lower_case", "processor_kwargs", "tokenizer_args"),
    *("config_kwargs", "config_args", "model_kwargs", "model_args"),
)
OWN_MODULE = re.compile(r"sentence_transformers\.([a-z_]+\.)*[A-Z]\w+")
#: Where the modules after the first are kept: 1_Pooling, 2_Dense.
FOLDERS = "[0-9]*_*"


def find(name: str) -> Path:
    """The folder of a checkpoint: a local one, or a hub id's, downloaded unless it is there.

    Raises:
        UnsupportedCheckpoint: there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UnsupportedCheckpoint(f"{name} is a file: name the folder with its config.json")
    try:
        folder = _snapshot(name, FILES)
        return folder if any(folder.glob("*.safetensors")) else _snapshot(name, PICKLED)
    except (PermissionError, RuntimeError) as error:  # The latter where there is no home.
        raise UnsupportedCheckpoint(
            f"cannot keep {name} ({one_line(error)}): set HF_HOME to a folder that can be written"
        ) from error
    except Exception as error:  # Of many kinds: of the name, of the connection, of its client.
        raise UnsupportedCheckpoint(
            f"cannot load {name}: there is no such folder here, and from the hub: {one_line(error)}"
        ) from error


def _snapshot(name: str, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns="[!0-9]*/*"))


def settings(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, where it says all of what is to be run.

    Raises:
        UnsupportedCheckpoint: it is not there, not what it looks like, or not all.
    """
    _refuse_adapter(folder)
    _refuse_pointers(folder)
    if not (folder / "config.json").is_file():
        raise UnsupportedCheckpoint(
            f"{folder} has no config.json: name a folder that save_pretrained of transformers wrote"
        )
    for name in ("tokenizer_config.json", "config.json"):
        content: dict[str, Any] = _read(folder / name)
        if "auto_map" in content:
            raise UnsupportedCheckpoint(
                f"{folder / name} names code of its own (auto_map), and none is run: use a "
                "checkpoint that transformers runs by itself"
            )
        if "BertJapanese" in str(content.get("tokenizer_class")):
            raise UnsupportedCheckpoint(
                f"{folder / name} names {content['tokenizer_class']}, which splits words by MeCab "
                "or another program, and a server has none: use a checkpoint with tokenizer.json"
            )
    return content  # Of the last.


def refuse_broken_parts(folder: Path) -> None:
    """Looks at the tokenizer and the weights.

    Raises:
        UnsupportedCheckpoint: there is no tokenizer, or one of the files is broken.
    """
    if not any(all(any(folder.glob(each)) for each in files) for files in TOKENIZERS):
        raise UnsupportedCheckpoint(
            f"{folder} has no tokenizer: it needs {', or '.join(map(' and '.join, TOKENIZERS))}"
        )
    _read(folder / "tokenizer.json")
    for path in [*folder.glob("*.safetensors"), *folder.glob(f"{FOLDERS}/*.safetensors")]:
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError as error:
            raise UnsupportedCheckpoint(f"{path} is broken ({error}): get it anew") from error


def _refuse_adapter(folder: Path) -> None:
    for name in ADAPTER:
        if (folder / name).exists():
            raise UnsupportedCheckpoint(
                f"{folder / name} is an adapter (LoRA), which is not read: merge it into the "
                "weights with peft's merge_and_unload, and save the result"
            )


def _refuse_pointers(folder: Path) -> None:
    for path in filter(Path.is_file, [*folder.iterdir(), *folder.glob(f"{FOLDERS}/*")]):
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise UnsupportedCheckpoint(
                    f"{path} is a Git LFS pointer in place of the file: run `git lfs pull` there"
                )


@dataclass(frozen=True)
class Saved:
    """What sentence-transformers keeps beside a model, and what changes a score by it.

    Attributes:
        activation: by its full name in Python; of one label, a sigmoid where none is named.
        modules: names of their classes; empty where none are kept.
        answers: ids of the tokens that a language model answers with, yes and no.
        instruction: the default prompt.
        template_options: of the tokenizer's chat template.
        max_length: the most tokens of a pair.
    """

    activation: str
    modules: list[str]
    answers: tuple[int, int] | None
    instruction: str | None
    template_options: dict[str, Any]
    max_length: int | None

    @property
    def is_chain(self) -> bool:
        """Whether there is more than one module, and the score is not of the first."""
        return len(self.modules) > 1 and not self.answers


def saved(folder: Path) -> Saved:
    """What sentence-transformers keeps in a folder.

    The activation is named in ``config_sentence_transformers.json`` since 5.4, else in
    ``config.json``, since 4.0 under ``sentence_transformers``.

    Raises:
        UnsupportedCheckpoint: sentence-transformers would run something that is not known here.
    """
    config, kept, options = (_read(folder / name) for name in ("config.json", SAVED, OPTIONS))
    modules = _read(folder / "modules.json", list)
    try:
        types = [str(each["type"]) for each in modules]
        paths = [str(each.get("path", "")) for each in modules]
        older = config.get("sbert_ce_default_activation_function")
        own = (config.get("sentence_transformers") or {}).get("activation_fn", older)
        prompts, default = kept.get("prompts") or {}, kept.get("default_prompt_name")
        instruction = prompts[default] if default else None
        processing = dict(options.get("processing_kwargs") or {})
        template_options = dict(processing.pop("chat_template", None) or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedCheckpoint(
            f"config.json, {SAVED}, {OPTIONS} or modules.json in {folder} is not as "
            "sentence-transformers writes it"
        ) from error
    if modules and (paths[0] or not all(map(OWN_MODULE.fullmatch, types))):
        raise UnsupportedCheckpoint(
            f"{folder / 'modules.json'} names {' and '.join(types)}: only modules of "
            "sentence-transformers are supported, the first one in the top folder"
        )
    names = [each.rpartition(".")[2] for each in types]
    changes = [name for name in CHANGES if options.get(name)] + ["processing_kwargs"] * bool(
        processing
    )
    if changes:
        raise UnsupportedCheckpoint(
            f"{folder / OPTIONS} has {', '.join(changes)}, which is not supported: keep it where "
            "transformers reads it, in config.json or tokenizer_config.json"
        )
    template_options.pop("restore_suffix", None)  # The end of a prompt is never cut.
    return Saved(
        activation=str(kept.get("activation_fn") or own or "torch.nn.Sigmoid"),
        modules=names,
        answers=_answers(folder / paths[1]) if names[1:] == ["LogitScore"] else None,
        instruction=instruction,
        template_options=template_options,
        max_length=options.get("max_seq_length"),
    )


def _answers(folder: Path) -> tuple[int, int]:
    config = _read(folder / "config.json")
    answers = config.get("true_token_id"), config.get("false_token_id")
    if not all(type(each) is int for each in answers):
        raise UnsupportedCheckpoint(
            f"{folder / 'config.json'} has not both true_token_id and false_token_id"
        )
    return answers


def _read(path: Path, kind: type = dict) -> Any:
    """The JSON object or list in a file; an empty one for a file that is not there."""
    try:
        content = json.loads(path.read_bytes()) if path.exists() else kind()
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{path} is not JSON ({error}): get it anew") from error
    if not isinstance(content, kind):
        raise UnsupportedCheckpoint(f"{path} holds no JSON of the type {kind.__name__}")
    return content


def one_line(error: Exception) -> str:
    """What a library says of its error."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__
