"""A node postprocessor for LlamaIndex."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .. import TLS, AsyncRerankClient, RankedDocument, RerankClient
from .clients import Clients, about

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
    from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise ImportError(
        "LlamaIndex is missing, or too old: in a checkout, pip install '.[llama-index]'"
    ) from error

#: What events name: the server's model.
MODEL_NAME = "reranker"

dispatcher = get_dispatcher(__name__)


class TritonRerank(BaseNodePostprocessor):
    """Ranks nodes by their text and the metadata that is for embedding.

    Where a passage of that gave a node's score, the node is a copy, with ``relevant_passage`` in
    its metadata: ``start`` and ``end``, in characters of what was ranked, and ``truncated`` where
    not all of it was read. No model is shown it.

    Args:
        url: ``HOST:PORT``, or several; see ``RerankClient``, as for ``timeout`` and ``tls``.
        timeout: seconds that a call may take, retries included.
        tls: transport security.
        client: in place of these, a client of either kind, which the caller closes. For the other
            kind of call one is made like it.
        top_n: how many nodes to return, 1 or more.
        max_passages: in how many passages a long text is read, 1 or more, of which the best counts;
            default, 1.
        callback_manager: who is told of each ranking.

    Raises:
        TypeError, ValueError, OSError: an argument that cannot be meant; see ``RerankClient``.
    """

    url: str | list[str] | None = Field(default=None, frozen=True)
    timeout: float | None = Field(default=None, frozen=True)
    tls: dict[str, str] | None = Field(default=None, frozen=True)
    top_n: int = Field(default=2, ge=1)
    max_passages: int | None = Field(default=None, ge=1)
    _clients: Clients = PrivateAttr()

    def __init__(
        self,
        url: str | list[str] | None = None,
        *,
        timeout: float | None = None,
        tls: TLS | Mapping[str, str] | None = None,
        client: RerankClient | AsyncRerankClient | None = None,
        top_n: int = 2,
        max_passages: int | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        clients = Clients(url, timeout, tls, client)
        fields = {
            "top_n": top_n,
            "max_passages": max_passages,
            "callback_manager": callback_manager or CallbackManager(),
        }
        super().__init__(**clients.settings | fields)
        _ = clients.asynchronous  # Checks the arguments now.
        self._clients = clients

    @classmethod
    def class_name(cls) -> str:
        """The name in what LlamaIndex serialises."""
        return "TritonRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _present(query_bundle)
        if not nodes:
            return []
        with self._reranking(nodes, query) as reranked:
            ranking = self._clients.synchronous.rank(
                query.query_str, _texts(nodes), self.top_n, max_passages=self.max_passages
            )
            reranked += _scored(nodes, ranking)
        return reranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _present(query_bundle)
        if not nodes:
            return []
        with self._reranking(nodes, query) as reranked:
            ranking = await self._clients.asynchronous.rank(
                query.query_str, _texts(nodes), self.top_n, max_passages=self.max_passages
            )
            reranked += _scored(nodes, ranking)
        return reranked

    @contextmanager
    def _reranking(
        self, nodes: list[NodeWithScore], query: QueryBundle
    ) -> Iterator[list[NodeWithScore]]:
        """Tells LlamaIndex of a ranking, which the list that it gives is to be filled with."""
        reranked: list[NodeWithScore] = []
        dispatcher.event(
            ReRankStartEvent(query=query, nodes=nodes, top_n=self.top_n, model_name=MODEL_NAME)
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: MODEL_NAME,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield reranked
            event.on_end(payload={EventPayload.NODES: reranked})
        dispatcher.event(ReRankEndEvent(nodes=reranked))


def _present(query: QueryBundle | None) -> QueryBundle:
    if query is None:
        raise ValueError("there is no query: pass query_bundle or query_str")
    return query


def _texts(nodes: Iterable[NodeWithScore]) -> list[str]:
    return [each.node.get_content(metadata_mode=MetadataMode.EMBED) for each in nodes]


def _scored(
    nodes: Sequence[NodeWithScore], ranking: Iterable[RankedDocument]
) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=_told(nodes[each.index].node, about(each)), score=each.score)
        for each in ranking
    ]


def _told(node: BaseNode, metadata: dict[str, Any]) -> BaseNode:
    """The node, or a copy with metadata that neither a language model nor an embedding is given."""
    if not metadata:
        return node
    copy = node.model_copy(deep=True)
    copy.metadata |= metadata
    copy.excluded_llm_metadata_keys += metadata
    copy.excluded_embed_metadata_keys += metadata
    return copy
