"""A document compressor for LangChain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .. import TLS, AsyncRerankClient, RankedDocument, RerankClient
from .clients import Clients, about

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise ImportError(
        "LangChain is missing, or too old: in a checkout, pip install '.[langchain]'"
    ) from error


class TritonRerank(BaseDocumentCompressor):
    """Ranks documents by their ``page_content``, with ``relevance_score`` in their metadata.

    Where a passage of a document gave its score, that is there as ``relevant_passage``: ``start``
    and ``end``, in characters.

    Args:
        url: ``HOST:PORT``, or several; see ``RerankClient``, as for ``timeout`` and ``tls``.
        timeout: seconds that a call may take, retries included.
        tls: transport security.
        client: in place of these, a client of either kind, which the caller closes. For the other
            kind of call one is made like it.
        top_n: how many documents to return, 1 or more; None, all.
        max_passages: in how many passages a long document is read, 1 or more, of which the best
            counts; default, 1.

    Raises:
        TypeError, ValueError, OSError: an argument that cannot be meant; see ``RerankClient``.
    """

    url: str | list[str] | None = Field(default=None, frozen=True)
    timeout: float | None = Field(default=None, frozen=True)
    tls: dict[str, str] | None = Field(default=None, frozen=True)
    top_n: int | None = Field(default=3, ge=1)
    max_passages: int | None = Field(default=None, ge=1)
    _clients: Clients = PrivateAttr()

    def __init__(
        self,
        url: str | list[str] | None = None,
        *,
        timeout: float | None = None,
        tls: TLS | Mapping[str, str] | None = None,
        client: RerankClient | AsyncRerankClient | None = None,
        top_n: int | None = 3,
        max_passages: int | None = None,
    ) -> None:
        clients = Clients(url, timeout, tls, client)
        super().__init__(**clients.settings | {"top_n": top_n, "max_passages": max_passages})
        _ = clients.asynchronous  # Checks the arguments now.
        self._clients = clients

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Ranks the documents, best first. They are copied; of none, nothing is asked.

        Raises:
            RerankError: see ``RerankClient.rank``, as for other errors.
        """
        if not documents:
            return []
        texts = [document.page_content for document in documents]
        ranking = self._clients.synchronous.rank(
            query, texts, self.top_n, max_passages=self.max_passages
        )
        return _scored(documents, ranking)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The same for asyncio."""
        if not documents:
            return []
        texts = [document.page_content for document in documents]
        ranking = await self._clients.asynchronous.rank(
            query, texts, self.top_n, max_passages=self.max_passages
        )
        return _scored(documents, ranking)


def _scored(documents: Sequence[Document], ranking: Iterable[RankedDocument]) -> list[Document]:
    copies = []
    for each in ranking:
        copy = documents[each.index].model_copy(deep=True)
        copy.metadata |= {"relevance_score": each.score, **about(each)}
        copies.append(copy)
    return copies
