"""Whether a server will read of a checkpoint's texts what the checkpoint's own tokenizer reads.

The comparison of logits cannot tell: its texts are short, and of a tokenizer that is wrong on both
sides it sees nothing. Token ids are cheap, so here are many scripts, documents longer than the
model, and the longest queries that are not cut, whatever the model's length; and any difference
counts, at any precision. (Of longer queries only the contract says what is read.)
"""

from __future__ import annotations

from bisect import bisect_left

from tokenizers import Tokenizer

from ..errors import ExportRefused
from ..stages.tokenizer import PairTokenizer
from .source import Source

#: One sentence a script.
SCRIPTS = (
    "The highest mountain in Japan is Mount Fuji, at 3,776 metres.",
    "일본에서 가장 높은 산은 해발 3,776미터의 후지산입니다.",
    "日本で最も高い山は富士山で、ひょうこうは3,776メートルです。",
    "日本最高的山是富士山，海拔3776米。",
    "Самая высокая гора Японии — Фудзияма, 3776 метров.",
    "Το ψηλότερο βουνό της Ιαπωνίας είναι το Φούτζι, 3.776 μέτρα.",
    "أعلى جبل في اليابان هو جبل فوجي، وارتفاعه 3776 متراً.",
    "ההר הגבוה ביותר ביפן הוא הר פוג'י, 3,776 מטרים.",
    "जापान का सबसे ऊँचा पर्वत फ़ूजी है, 3,776 मीटर।",
    "ภูเขาที่สูงที่สุดในญี่ปุ่นคือภูเขาฟูจิ สูง 3,776 เมตร",
    "El naïve café 🗻 costó 3,776 ¥ — ¿sí?",
)

#: What most of these models write in another way before they read it.
COMPATIBLE = "ｶﾀｶﾅ ＡＢＣ ① ㈜ ﬁ"
#: Where a document begins and ends, the words of what stands around it may go on.
EDGES = ("", " {}", "\n{}", "  {} ", "?! {}\n", "'s {}", "\u0301{}", "3{}")


def check(pairs: PairTokenizer, source: Source) -> None:
    """Compares the tokenizer of an export with what its source reads.

    Raises:
        ExportRefused: it knows hardly a word of any script, or reads other tokens.
    """
    _refuse_the_unknown(source.tokenizer, source.unknown_id)
    for i, script in enumerate(SCRIPTS):
        text = longer_than(source.max_length, [*SCRIPTS[i:], *SCRIPTS[:i]], source.tokenizer)
        documents = [script, text, *(edge.format(script) for edge in EDGES)]
        for most in (script[:9], f"{script[:9]}?", text):
            query = _longest_query(most, pairs)
            texts = [document.encode() for document in documents]
            [tokens] = pairs.encode([pairs.read(query.encode(), texts)])
            read = [each.input_ids.tolist() for each in tokens.documents()]
            if read != source.read(query, documents):
                raise ExportRefused(
                    f"of {script[:40]!r}, short or longer than the model's {source.max_length} "
                    "tokens, the checkpoint's own tokenizer reads other tokens than a server "
                    "would. Nothing was published"
                )


def _refuse_the_unknown(tokenizer: Tokenizer, unknown_id: int | None) -> None:
    """A tokenizer of one language knows that one: here the script that it knows best counts.

    Those of bytes, or with a token for each character, know everything.
    """
    known = []
    for script in SCRIPTS:
        ids = tokenizer.encode("", script, add_special_tokens=False).ids
        known.append(sum(each != unknown_id for each in ids) / max(len(ids), 1))
    if max(known) < 0.5:
        raise ExportRefused(
            f"the tokenizer knows {max(known):.0%} of the words or less in each of {len(SCRIPTS)} "
            "scripts: put the checkpoint's own in its place. Nothing was published"
        )


def longer_than(length: int, texts: list[str], tokenizer: Tokenizer) -> str:
    """The texts, over and over, until they have more tokens than a pair may have."""
    once = " ".join(texts)
    # As a document, since of a lone text an export's tokenizer cannot cut the second.
    tokens = len(tokenizer.encode("", once, add_special_tokens=False))
    return " ".join([once] * (length // max(tokens, 1) + 1))


def _longest_query(text: str, pairs: PairTokenizer) -> str:
    """The most of a text, less than all, that has no more tokens than a query may have."""
    ends = range(len(text))
    return text[: bisect_left(ends, True, key=lambda end: pairs.is_cut(text[:end])) - 1]
