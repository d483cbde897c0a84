"""What a language model reads around a query and a document, where it was made a reranker by it.

It is the checkpoint's own chat template, if that has the roles ``query`` and ``document``, as
sentence-transformers keeps it; else the one that its publisher's code has.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedCheckpoint
from ..stages.tokenizer import Prompt
from .folder import Saved, one_line

#: What publishers' code has for a task, where the user names none.
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
#: A part of a checkpoint's name → what its publisher's code puts around a query and a document.
KNOWN = {
    "qwen3-reranker": (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
}
#: What stands for a text until a template is taken apart; of no script.
QUERY, DOCUMENT = "\ue000query\ue001", "\ue000document\ue001"


def find(
    name: str, tokenizer: PreTrainedTokenizerBase, kept: Saved, instruction: str | None
) -> Prompt:
    """The prompt of a language model.

    Args:
        name: of the checkpoint.
        tokenizer: the checkpoint's own.
        kept: what else the checkpoint has of it.
        instruction: the user's, in place of the checkpoint's or the publisher's.

    Raises:
        UnsupportedCheckpoint: it has none, and none is known for its name.
    """
    return _taken_apart(
        _by_chat_template(tokenizer, kept, instruction or kept.instruction)
        or _by_name(name, instruction or kept.instruction)
    )


def _by_chat_template(
    tokenizer: PreTrainedTokenizerBase, kept: Saved, instruction: str | None
) -> str | None:
    """The text of a pair, or None where the template is for conversations only."""
    pair = [{"role": "query", "content": QUERY}, {"role": "document", "content": DOCUMENT}]
    system = [{"role": "system", "content": instruction}] if instruction else []
    if not tokenizer.chat_template:
        return None
    try:
        text: str = tokenizer.apply_chat_template(
            [*system, *pair], tokenize=False, **kept.template_options
        )
    except (TemplateError, TypeError, ValueError) as error:
        if "document" not in str(tokenizer.chat_template):
            return None
        raise UnsupportedCheckpoint(f"its chat template fails: {one_line(error)}") from error
    return text if QUERY in text and DOCUMENT in text else None


def _by_name(name: str, instruction: str | None) -> str:
    for part, template in KNOWN.items():
        # With an instruction, the user says that it is one of these.
        if part in name.lower() or instruction:
            values = {"query": QUERY, "document": DOCUMENT}
            return template.format(instruction=instruction or INSTRUCTION, **values)
    raise UnsupportedCheckpoint(
        f"the prompt of {name} is not known: keep it in the checkpoint, as a chat template with "
        f"the roles query and document, or name the task by --instruction, such as "
        f"{INSTRUCTION!r}, for a model that was trained as Qwen3-Reranker was"
    )


def _taken_apart(text: str) -> Prompt:
    before, _, rest = text.partition(QUERY)
    between, _, after = rest.partition(DOCUMENT)
    if text.count(QUERY) + text.count(DOCUMENT) > 2 or not before + between + after:
        raise UnsupportedCheckpoint(
            "its chat template must have the query once, and then the document once"
        )
    # A space begins a word of any tokenizer, and ends none.
    ended = between.rstrip(" ")
    return Prompt(before, ended, between[len(ended) :], after, whole=True)
