"""A ranker for Haystack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import TLS, AsyncRerankClient, RankedDocument, RerankClient
from .clients import Clients, about

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise ImportError(
        "Haystack is missing, or too old: in a checkout, pip install '.[haystack]'"
    ) from error


@component
class TritonRanker:
    """Ranks documents by their content, with ``score`` set in copies.

    Where a passage of a document gave its score, that is ``relevant_passage`` in the copy's meta:
    ``start`` and ``end``, in characters of what was ranked.

    Args:
        url: ``HOST:PORT``, or several; see ``RerankClient``, as for ``timeout`` and ``tls``.
        timeout: seconds that a call may take, retries included.
        tls: transport security, or its attributes by their names.
        client: in place of these, a client of either kind, which the caller closes. For the other
            kind of call, and of a pipeline that was loaded, one is made like it.
        top_k: how many documents to return, 1 or more.
        max_passages: in how many passages a long document is read, 1 or more, of which the best
            counts; default, 1.
        meta_fields_to_embed: whose values are put before the content.
        meta_data_separator: what is put between them.

    Raises:
        TypeError: another type of client.
        ValueError: a ``top_k`` or ``max_passages`` below 1, or a client and others of these.
    """

    def __init__(
        self,
        url: str | list[str] | None = None,
        *,
        timeout: float | None = None,
        tls: TLS | Mapping[str, str] | None = None,
        client: RerankClient | AsyncRerankClient | None = None,
        top_k: int = 10,
        max_passages: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        meta_data_separator: str = "\n",
    ) -> None:
        self.top_k = _positive("top_k", top_k)
        self.max_passages = (
            None if max_passages is None else _positive("max_passages", max_passages)
        )
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.meta_data_separator = meta_data_separator
        self._clients = Clients(url, timeout, tls, client)

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline's file has it."""
        return default_to_dict(
            self,
            **self._clients.settings,
            top_k=self.top_k,
            max_passages=self.max_passages,
            meta_fields_to_embed=self.meta_fields_to_embed,
            meta_data_separator=self.meta_data_separator,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TritonRanker:
        """The component of ``to_dict``."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Makes the client.

        Raises:
            TypeError, ValueError, OSError: see ``RerankClient``.
        """
        _ = self._clients.synchronous

    async def warm_up_async(self) -> None:
        """The same for asyncio."""
        _ = self._clients.asynchronous

    def close(self) -> None:
        """Closes the client, unless it is the caller's."""
        self._clients.close()

    async def close_async(self) -> None:
        """The same for asyncio."""
        await self._clients.aclose()

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Ranks the documents, best first. They are copied; of none, nothing is asked.

        Args:
            query: not blank.
            documents: in any number.
            top_k: in place of the component's own.

        Raises:
            ValueError: a ``top_k`` below 1.
            RerankError: see ``RerankClient.rank``, as for other errors.
        """
        top_k = self.top_k if top_k is None else _positive("top_k", top_k)
        if not documents:
            return {"documents": []}
        ranking = self._clients.synchronous.rank(
            query, self._texts(documents), top_k, max_passages=self.max_passages
        )
        return {"documents": _scored(documents, ranking)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """The same for asyncio."""
        top_k = self.top_k if top_k is None else _positive("top_k", top_k)
        if not documents:
            return {"documents": []}
        ranking = await self._clients.asynchronous.rank(
            query, self._texts(documents), top_k, max_passages=self.max_passages
        )
        return {"documents": _scored(documents, ranking)}

    def _texts(self, documents: Iterable[Document]) -> list[str]:
        texts = []
        for each in documents:
            values = [each.meta.get(field) for field in self.meta_fields_to_embed]
            present = [str(value) for value in values if value]
            texts.append(self.meta_data_separator.join([*present, each.content or ""]))
        return texts


def _positive(name: str, value: int) -> int:
    if value <= 0:
        raise ValueError(f"{name} must be > 0, but got {value}")
    return value


def _scored(documents: Sequence[Document], ranking: Iterable[RankedDocument]) -> list[Document]:
    return [
        replace(
            documents[each.index], score=each.score, meta=documents[each.index].meta | about(each)
        )
        for each in ranking
    ]
