"""What a language model reads around a query and a document, where it was made a reranker by it.

It is the checkpoint's own chat template, if that has the roles ``query`` and ``document``, as
sentence-transformers keeps it; else the one that its publisher's code has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
#: What stands for a text until a template is taken apart: of no script, and without a case.
QUERY, DOCUMENT = "\ue000\ue001", "\ue000\ue002"
#: The share of a model's tokens that a prompt may take.
SHARE = 0.25
#: A query and a document → the text that a model reads of both, by its publisher's own means.
Render = Callable[[str, str], str]


def find(
    name: str, tokenizer: PreTrainedTokenizerBase, kept: Saved, instruction: str | None
) -> tuple[Prompt, Render]:
    """The prompt of a language model, and the publisher's way to the same text.

    Args:
        name: of the checkpoint.
        tokenizer: the checkpoint's own.
        kept: what else the checkpoint has of it.
        instruction: the user's, in place of the checkpoint's or the publisher's.

    Raises:
        UnsupportedCheckpoint: it has none, and none is known for its name.
    """
    task = instruction or kept.instruction
    render = _by_chat_template(tokenizer, kept, task) or _by_name(name, task)
    return _taken_apart(render(QUERY, DOCUMENT)), render


def refuse_long(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuses a prompt that would leave too little of the model for texts.

    Raises:
        UnsupportedCheckpoint: it says how many tokens it may have.
    """
    text = prompt.before + prompt.between + prompt.leading + prompt.after
    tokens, most = len(tokenizer(text)["input_ids"]), int(SHARE * max_length)
    if tokens > most:
        raise UnsupportedCheckpoint(
            f"the prompt has {tokens} tokens, and may have {most} of the model's {max_length}: "
            "shorten the instruction"
        )


def _by_chat_template(
    tokenizer: PreTrainedTokenizerBase, kept: Saved, instruction: str | None
) -> Render | None:
    """None where the template is for conversations only."""

    def render(query: str, document: str) -> str:
        texts = {"system": instruction, "query": query, "document": document}
        messages = [
            {"role": role, "content": text} for role, text in texts.items() if text is not None
        ]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **kept.template_options)
        return text

    if not tokenizer.chat_template:
        return None
    told = "document" in str(tokenizer.chat_template)
    try:
        text = render(QUERY, DOCUMENT)
    except (TemplateError, TypeError, ValueError) as error:
        if not told:
            return None
        raise UnsupportedCheckpoint(f"its chat template fails: {one_line(error)}") from error
    return render if told or (QUERY in text and DOCUMENT in text) else None


def _by_name(name: str, instruction: str | None) -> Render:
    for part, template in KNOWN.items():
        # With an instruction, the user says that it is one of these.
        if part in name.lower() or instruction:
            return partial(_filled, template, instruction or INSTRUCTION)
    raise UnsupportedCheckpoint(
        f"the prompt of {name} is not known: keep it in the checkpoint, as a chat template with "
        f"the roles query and document, or name the task by --instruction, such as "
        f"{INSTRUCTION!r}, for a model that was trained as Qwen3-Reranker was"
    )


def _filled(template: str, instruction: str, query: str, document: str) -> str:
    return template.format(instruction=instruction, query=query, document=document)


def _taken_apart(text: str) -> Prompt:
    before, _, rest = text.partition(QUERY)
    between, _, after = rest.partition(DOCUMENT)
    once = text.count(QUERY) == text.count(DOCUMENT) == 1
    if not once or text.index(QUERY) > text.index(DOCUMENT) or not before + between + after:
        raise UnsupportedCheckpoint(
            "its chat template must have the query once, and then the document once"
        )
    # A space begins a word of any tokenizer, and ends none.
    ended = between.rstrip(" ")
    return Prompt(before, ended, between[len(ended) :], after, whole=True)
