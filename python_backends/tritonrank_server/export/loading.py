"""A checkpoint's own model, as its publisher runs it, beside what a graph makes of it.

There are three kinds: models that transformers loads as classifiers of pairs; language models that
answer "yes" or "no"; and chains of sentence-transformers' modules.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UnsupportedCheckpoint
from .families import ENCODERS, FAMILIES, LabelDifference, Modules, Reranker
from .folder import Saved, one_line
from .progress import shown

#: Names of the label that is relevance, where there are two.
RELEVANT = {"relevant", "relevance", "yes", "true", "positive", "match", "entailment"}
#: Checkpoints whose labels have no such names, and which of the two their publisher reads.
READ_BY_PUBLISHER = {
    "amberoad/bert-multilingual-passage-reranking-msmarco": 1,
    "castorini/monobert-large-msmarco": 1,
    "castorini/monobert-large-msmarco-finetune-only": 1,
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model in memory, FP32.

    Attributes:
        model: the publisher's.
        reranker: the same as a graph will have it, without weights.
        weights: by the names of ``reranker``'s parameters.
        logits: a padded batch, as the tokenizer gives it → [N].
    """

    model: torch.nn.Module
    reranker: Reranker
    weights: dict[str, torch.Tensor]
    logits: Callable[[dict[str, torch.Tensor]], torch.Tensor]

    def weights_hash(self) -> str:
        """SHA-256 of the model's state by name, whatever file it came in."""
        digest = hashlib.sha256()
        for name, tensor in shown(sorted(self.model.state_dict().items()), "Hashing"):
            digest.update(name.encode())
            digest.update(tensor.float().numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Says in one line what a library found wrong while it loaded a part of a checkpoint.

    It may be anything, since these libraries check little. So nothing of ours belongs in here.
    """
    try:
        yield
    except UnpicklingError as error:
        raise UnsupportedCheckpoint(
            f"cannot load {what}: they are pickled, and broken or more than tensors, and no code "
            "of a checkpoint is run: get them as safetensors"
        ) from error
    except Exception as error:
        raise UnsupportedCheckpoint(
            f"cannot load {what}: {one_line(error)} ({type(error).__name__})"
        ) from error


def family_of(settings: dict[str, Any], saved: Saved) -> type[Reranker]:
    """The family of a checkpoint, by its ``config.json``.

    Raises:
        UnsupportedCheckpoint: it is of none that is known.
    """
    told = settings.get("model_type")
    if saved.is_chain:
        # Of the base model's architecture, such as ModernBertModel, there is no reranker.
        for needed, family in FAMILIES.values():
            if told == needed and told in ENCODERS:
                return family
        raise UnsupportedCheckpoint(
            f"modules on a model of type {told} are not supported: use one of {', '.join(ENCODERS)}"
        )
    names = settings.get("architectures") or ["an unnamed architecture"]
    architecture = " and ".join(map(str, names)) if isinstance(names, list) else str(names)
    if architecture not in FAMILIES:
        raise UnsupportedCheckpoint(
            f"{architecture} is not supported: use one of {', '.join(FAMILIES)}"
        )
    needed, family = FAMILIES[architecture]
    # By it, and by nothing else, transformers knows what to load.
    if told != needed:
        raise UnsupportedCheckpoint(
            f'{architecture} needs "model_type": "{needed}" in config.json, which has '
            f"{told or 'none'}"
        )
    return family


def load(
    folder: Path,
    name: str,
    config: PretrainedConfig,
    family: type[Reranker],
    saved: Saved,
    tokenizer: PreTrainedTokenizerBase,
) -> Loaded:
    """The model, all of which was in the folder.

    Raises:
        UnsupportedCheckpoint: weights are missing, or of another shape, or there is no place for
            them; or there are labels of which it is not known which is relevance.
    """
    if saved.is_chain:
        return _chain(folder, name, family, saved)
    if any(each.endswith("ForCausalLM") for each in config.architectures):
        return _language_model(folder, name, config, family, saved, tokenizer)
    return _classifier(folder, name, config, family)


def _classifier(
    folder: Path, name: str, config: PretrainedConfig, family: type[Reranker]
) -> Loaded:
    relevant = _relevant(config, name)
    if config.pad_token_id is None:
        raise UnsupportedCheckpoint("pad_token_id in config.json is null: put the tokenizer's")
    model = _pretrained(AutoModelForSequenceClassification, folder, name, family)
    reranker = family(config)

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels: torch.Tensor = model(**batch).logits
        return labels[:, 0] if relevant is None else labels[:, relevant] - labels[:, 1 - relevant]

    weights = dict(model.named_parameters())
    if relevant is not None:
        reranker = LabelDifference(reranker, relevant)
        weights = {f"model.{name}": weight for name, weight in weights.items()}
    return Loaded(model, reranker, weights, logits)


def _relevant(config: PretrainedConfig, name: str) -> int | None:
    """Which of two labels is relevance; None where there is one label."""
    if config.num_labels == 1:
        return None
    names = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
    known = READ_BY_PUBLISHER.get(name)
    found = [i for i, each in enumerate(names) if each in RELEVANT] if known is None else [known]
    if len(names) != 2 or len(found) != 1:
        raise UnsupportedCheckpoint(
            f"the checkpoint has {len(names)} labels, {', '.join(names)}, and a reranker has one, "
            "or two of which one is relevance: name it so in id2label of config.json, such as "
            '{"0": "irrelevant", "1": "relevant"}'
        )
    return found[0]


def _language_model(
    folder: Path,
    name: str,
    config: PretrainedConfig,
    family: type[Reranker],
    saved: Saved,
    tokenizer: PreTrainedTokenizerBase,
) -> Loaded:
    """The logit of "yes" less that of "no" at the last token: one row of a linear layer."""
    yes, no = saved.answers or tokenizer.convert_tokens_to_ids(["yes", "no"])
    if None in (yes, no) or tokenizer.unk_token_id in (yes, no):
        raise UnsupportedCheckpoint('the tokenizer has no token "yes" or none "no"')
    if yes == no or not {yes, no} <= set(range(config.vocab_size)):
        raise UnsupportedCheckpoint(
            f"the answers yes and no are tokens {yes} and {no}, and must be two of the model's "
            f"{config.vocab_size}: see true_token_id and false_token_id of LogitScore"
        )
    model = _pretrained(AutoModelForCausalLM, folder, name, family)
    config.num_labels = 1

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        answers: torch.Tensor = model(**batch, logits_to_keep=1).logits[:, -1]
        return answers[:, yes] - answers[:, no]

    row = model.get_output_embeddings().weight.detach()
    weights = {each: weight for each, weight in model.named_parameters() if "lm_head" not in each}
    return Loaded(model, family(config), weights | {"score.weight": row[[yes]] - row[[no]]}, logits)


def _chain(folder: Path, name: str, family: type[Reranker], saved: Saved) -> Loaded:
    from sentence_transformers import CrossEncoder  # Only here, since it takes seconds.

    # It takes what is there.
    _pretrained(AutoModel, folder, name, family, needless=family.unused)
    with telling(f"the modules of {name}"):
        model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    model.eval()
    if saved.instruction and not getattr(model[1], "include_prompt", True):
        raise UnsupportedCheckpoint(
            f"{name} pools without its prompt (include_prompt), which is not supported"
        )

    def logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scores: torch.Tensor = model(dict(batch))["scores"]
        return scores[:, 0]

    return Loaded(model, Modules(model), dict(model.named_parameters()), logits)


def _pretrained(
    kind: Any,
    folder: Path,
    name: str,
    family: type[Reranker],
    needless: re.Pattern[str] = Reranker.unused,
) -> PreTrainedModel:
    """``needless``: names of weights that may be missing."""
    with telling(f"the weights of {name}"):
        model, found = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are refused below, by name.
        )
    missing = {each for each in found["missing_keys"] if not needless.match(each)}
    unexpected = {each for each in found["unexpected_keys"] if not family.unused.match(each)}
    mismatched = {each for each, *_ in found["mismatched_keys"]}
    _check_weights(missing, unexpected, mismatched, folder)
    return model.eval()


def _check_weights(
    missing: set[str], unexpected: set[str], mismatched: set[str], folder: Path
) -> None:
    """Refuses weights that transformers made up (at random), or left out."""
    for names, what in (
        (mismatched, "of another shape than config.json says"),
        (missing, "missing"),
        (unexpected, "not of this architecture"),
    ):
        if names:
            first, *others = sorted(names)
            raise UnsupportedCheckpoint(
                f"of the weights in {folder}, {first}{f' and {len(others)} more' * bool(others)} "
                f"are {what}: use a checkpoint that was saved whole"
            )
