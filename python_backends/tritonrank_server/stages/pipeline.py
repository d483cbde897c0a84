"""The three stages composed without Triton: the oracle of the tests, and the export's check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cross_encoder import CrossEncoder, Work
from .sorter import Ranking, rank
from .tokenizer import ONE_PASSAGE, Extent, PairTokenizer


@dataclass(frozen=True)
class Pipeline:
    """Ranks documents as the ensemble does, in this process."""

    tokenizer: PairTokenizer
    cross_encoder: CrossEncoder

    @classmethod
    def of(cls, folder: Path, max_passages: int) -> Pipeline:
        """That of an export's folder."""
        tokenizer = PairTokenizer.of(folder, max_passages)
        return cls(tokenizer, CrossEncoder(folder / "model.onnx"))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        extent: Extent = ONE_PASSAGE,
    ) -> Ranking:
        """One request of the ensemble; see ``tokenizer``, ``sorter`` for the errors it raises."""
        pairs = self.tokenizer.read(query.encode(), [text.encode() for text in documents], extent)
        [tokens] = self.tokenizer.encode([pairs])
        [relevance] = self.cross_encoder.score([Work(tokens)])
        assert relevance  # Only a cancelled request has none.
        return rank(relevance, top_k, tokens.passages)
