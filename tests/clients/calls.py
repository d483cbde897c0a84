"""Calls of real clients: ``python calls.py URL ENVIRONMENT`` prints what each gives, as JSON.

Each call ranks documents by a query and gives pairs of an index and a score, best first.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

Pairs = Iterable[tuple[int, float]]
QUERY = "capital of France?"
#: The last is read in part, which answers tell in a field that these clients do not know.
DOCUMENTS = [
    "Berlin is in Germany.",
    "Rome is in Italy.",
    "Paris is in France. " + "It has a river. " * 200,
]
#: A query that is refused, to see what a client makes of it.
BLANK = " "
KEYS = ("COHERE", "CO", "JINA", "JINAAI", "NVIDIA", "VOYAGE")
#: What the model is called: by these calls, and by clients that do not ask.
NAMES = ("m", "BAAI/bge-reranker-v2-m3")

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"


def by_text(texts: Iterable[tuple[str, float]]) -> Pairs:
    return [(DOCUMENTS.index(text), score) for text, score in texts]


def results(answer: Any) -> Pairs:
    """Of Cohere's SDK."""
    return [(each.index, each.relevance_score) for each in answer.results]


# Cohere's SDK, of any version.


def cohere_v2(query: str, base: str = URL) -> Pairs:
    import cohere

    client = cohere.ClientV2("k", base_url=base)
    return results(client.rerank(model="m", query=query, documents=DOCUMENTS, top_n=2))


def cohere_v2_base_with_version(query: str) -> Pairs:
    return cohere_v2(query, f"{URL}/v1")


def cohere_v2_spans(query: str) -> Pairs:
    """From SDK 7 on."""
    import cohere
    from cohere.types import RerankRelevantSpans

    answer = cohere.ClientV2("k", base_url=URL).rerank(
        model="m",
        query=query,
        documents=DOCUMENTS,
        max_tokens_per_doc=4096,
        relevant_spans=RerankRelevantSpans(mode="enabled", threshold=0.01, max_spans=1),
    )
    for each in answer.results:
        spans = [(span.start, span.score) for span in each.relevant_spans]
        assert spans == ([(0, each.relevance_score)] if each.relevance_score >= 0.01 else [])
    assert 1000 < answer.results[0].relevant_spans[0].end < len(DOCUMENTS[2])
    return results(answer)


def cohere_v1_objects(query: str) -> Pairs:
    import cohere

    documents = [{"text": text} for text in DOCUMENTS]
    answer = cohere.Client("k", base_url=URL).rerank(
        model="m",
        query=query,
        documents=documents,
        return_documents=True,
        max_chunks_per_doc=10,
    )
    assert [each.document.text for each in answer.results] == [
        DOCUMENTS[each.index] for each in answer.results
    ]
    return results(answer)


# What goes with cohere 7.


def voyageai(query: str) -> Pairs:
    from voyageai import Client

    answer = Client(api_key="k", base_url=f"{URL}/v1").rerank(query, DOCUMENTS, model="m", top_k=2)
    assert all(each.document == DOCUMENTS[each.index] for each in answer.results)
    return results(answer)


def litellm(provider: str, path: str = "") -> Callable[[str], Pairs]:
    def call(query: str) -> Pairs:
        import litellm

        litellm.suppress_debug_info = True
        answer = litellm.rerank(
            model=f"{provider}/m",
            query=query,
            documents=DOCUMENTS,
            top_n=2,
            api_base=URL + path,
            api_key="k",
        )
        ranked = [(each["index"], each["relevance_score"]) for each in answer.results]
        # DeepInfra's scores come in the documents' order, and LiteLLM leaves them there.
        return sorted(ranked, key=lambda each: -each[1]) if provider == "deepinfra" else ranked

    return call


def haystack(package: str, name: str, **options: Any) -> Callable[[str], Pairs]:
    def call(query: str) -> Pairs:
        from importlib import import_module

        from haystack import Document
        from haystack.utils import Secret

        key = {} if name == "VLLMRanker" else {"api_key": Secret.from_token("k")}
        if name == "HuggingFaceTEIRanker":
            key = {"token": key["api_key"]}
        kind = getattr(import_module(f"haystack_integrations.components.rankers.{package}"), name)
        ranker = kind(**options, **key)
        documents = [Document(content=text) for text in DOCUMENTS]
        ranked = ranker.run(query=query, documents=documents)["documents"]
        return by_text((each.content, each.score) for each in ranked)

    return call


def rerankers(provider: str, path: str) -> Callable[[str], Pairs]:
    def call(query: str) -> Pairs:
        from rerankers.models.api_rankers import APIRanker

        ranked = APIRanker("m", "k", provider, url=URL + path).rank(query, DOCUMENTS).results
        return [(each.doc_id, each.score) for each in ranked]

    return call


def xinference(query: str) -> Pairs:
    from xinference_client.client.restful.restful_client import RESTfulRerankModelHandle

    answer = RESTfulRerankModelHandle("m", URL, {}).rerank(DOCUMENTS, query, top_n=2)
    return [(each["index"], each["relevance_score"]) for each in answer["results"]]


# What goes with cohere 5.


def infinity(query: str) -> Pairs:
    from infinity_client.api.default import rerank
    from infinity_client.client import Client
    from infinity_client.models import RerankInput

    body = RerankInput.from_dict({"query": query, "documents": DOCUMENTS, "model": "m"})
    with Client(base_url=URL) as client:
        answer: Any = rerank.sync(client=client, body=body)
        return results(answer)


def langchain(make: Callable[[], Any]) -> Callable[[str], Pairs]:
    def call(query: str) -> Pairs:
        from langchain_core.documents import Document

        documents = [Document(page_content=text) for text in DOCUMENTS]
        ranked = make().compress_documents(documents, query)
        return by_text((each.page_content, each.metadata["relevance_score"]) for each in ranked)

    return call


def langchain_cohere() -> Any:
    from langchain_cohere import CohereRerank

    return CohereRerank(model="m", cohere_api_key="k", base_url=URL)


def langchain_jina() -> Any:
    from langchain_community.document_compressors import jina_rerank

    jina_rerank.JINA_API_URL = f"{URL}/v1/rerank"  # It has no option.
    return jina_rerank.JinaRerank(model="m", jina_api_key="k")


def langchain_infinity() -> Any:
    from infinity_client.client import Client
    from langchain_community.document_compressors import infinity_rerank

    return infinity_rerank.InfinityRerank(client=Client(base_url=URL), model="m")


def langchain_nvidia(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from langchain_nvidia_ai_endpoints import NVIDIARerank

        return NVIDIARerank(base_url=f"{URL}/v1", api_key="k", **options)

    return make


def langchain_voyage() -> Any:
    from langchain_voyageai import VoyageAIRerank

    return VoyageAIRerank(model="m", api_key="k", base_url=f"{URL}/v1")


def llama_index(package: str, name: str, **options: Any) -> Callable[[str], Pairs]:
    def call(query: str) -> Pairs:
        from importlib import import_module

        from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

        nodes = [NodeWithScore(node=TextNode(text=text), score=0.3) for text in DOCUMENTS]
        module = import_module(f"llama_index.postprocessor.{package}_rerank")
        ranked = getattr(module, name)(**options).postprocess_nodes(nodes, QueryBundle(query))
        return by_text((each.node.text, each.score) for each in ranked)

    return call


OF_COHERE = {
    "cohere v2": cohere_v2,
    "cohere v2, a base with a version": cohere_v2_base_with_version,
    "cohere v1, objects": cohere_v1_objects,
}
#: By environment: those of the files beside this one.
CALLS: dict[str, dict[str, Callable[[str], Pairs]]] = {
    "few": {
        **OF_COHERE,
        "cohere v2, spans": cohere_v2_spans,
        "xinference-client": xinference,
        "infinity_client": infinity,
    },
    "cohere-7": {
        **OF_COHERE,
        "cohere v2, spans": cohere_v2_spans,
        "voyageai": voyageai,
        "litellm cohere": litellm("cohere"),
        "litellm jina_ai": litellm("jina_ai"),
        "litellm infinity": litellm("infinity", "/infinity"),
        "litellm hosted_vllm": litellm("hosted_vllm"),
        "litellm huggingface": litellm("huggingface"),
        "litellm voyage": litellm("voyage"),
        "litellm nvidia_nim": litellm("nvidia_nim"),
        "litellm nvidia_nim/ranking": litellm("nvidia_nim/ranking"),
        "litellm together_ai": litellm("together_ai", "/v1"),
        "litellm deepinfra": litellm("deepinfra"),
        "haystack CohereRanker": haystack("cohere", "CohereRanker", model="m", api_base_url=URL),
        "haystack JinaRanker": haystack(
            "jina", "JinaRanker", model="m", base_url=f"{URL}/v1/rerank"
        ),
        "haystack NvidiaRanker": haystack("nvidia", "NvidiaRanker", model="m", api_url=f"{URL}/v1"),
        "haystack HuggingFaceTEIRanker": haystack(
            "huggingface_api", "HuggingFaceTEIRanker", url=URL
        ),
        "haystack VLLMRanker": haystack("vllm", "VLLMRanker", model="m", api_base_url=f"{URL}/v1"),
        "rerankers cohere": rerankers("cohere", "/v1/rerank"),
        "rerankers jina": rerankers("jina", "/v1/rerank"),
        "rerankers voyage": rerankers("voyage", "/v1/rerank"),
        "rerankers text-embeddings-inference": rerankers("text-embeddings-inference", "/rerank"),
        "xinference-client": xinference,
    },
    "cohere-5": {
        **OF_COHERE,
        "infinity_client": infinity,
        "langchain CohereRerank": langchain(langchain_cohere),
        "langchain JinaRerank": langchain(langchain_jina),
        "langchain InfinityRerank": langchain(langchain_infinity),
        "langchain NVIDIARerank": langchain(langchain_nvidia(model="m")),
        "langchain NVIDIARerank, no model": langchain(langchain_nvidia()),
        "langchain VoyageAIRerank": langchain(langchain_voyage),
        "llama-index CohereRerank": llama_index(
            "cohere", "CohereRerank", api_key="k", base_url=URL, model="m"
        ),
        "llama-index JinaRerank": llama_index(
            "jinaai", "JinaRerank", api_key="k", base_url=f"{URL}/v1", model="m"
        ),
        "llama-index TextEmbeddingInference": llama_index(
            "tei", "TextEmbeddingInference", base_url=URL, auth_token="Bearer k"
        ),
        "llama-index NVIDIARerank": llama_index(
            "nvidia", "NVIDIARerank", model="m", base_url=f"{URL}/v1", api_key="k"
        ),
        "llama-index SiliconFlowRerank": llama_index(
            "siliconflow", "SiliconFlowRerank", base_url=f"{URL}/v1/rerank", api_key="k"
        ),
        "llama-index XinferenceRerank": llama_index(
            "xinference", "XinferenceRerank", model="m", base_url=URL
        ),
    },
}


def outcome(call: Callable[[str], Pairs], query: str) -> object:
    """Its pairs, or the words of what it raises."""
    try:
        return list(call(query))
    except (Exception, asyncio.CancelledError) as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    warnings.filterwarnings("ignore")
    os.environ.update({f"{name}_API_KEY": "k" for name in KEYS})
    os.environ.update(HAYSTACK_TELEMETRY_ENABLED="False", LITELLM_LOCAL_MODEL_COST_MAP="True")
    calls = CALLS[sys.argv[2]]
    print(
        json.dumps(
            {
                name: [outcome(call, query) for query in (QUERY, BLANK)]
                for name, call in calls.items()
            }
        )
    )


if __name__ == "__main__":
    main()
