"""The integrations in the real frameworks, on a real server."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

import haystack
import pytest
import trustme
from haystack.components.joiners import DocumentJoiner
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from tritonrank import (
    TLS,
    AsyncRerankClient,
    InvalidRequestError,
    RerankClient,
    RerankError,
    ServerUnavailableError,
)
from tritonrank.integrations import haystack as for_haystack
from tritonrank.integrations import langchain as for_langchain
from tritonrank.integrations import llama_index as for_llama_index
from tritonrank_server.serving.serve import EmbeddedServer

ROOT = Path(__file__).parents[1]
QUERY = "something to drink"
TEXTS = ["a red car", "green tea", "", "물 한 잔", "green tea", "two chairs", "a cup of coffee"]
NOBODY = "127.0.0.1:9"
#: A pipeline that runs in an event loop; Haystack 2 has one of its own for that.
AsyncPipeline = getattr(haystack, "AsyncPipeline", haystack.Pipeline)
#: What a pipeline may import; Haystack 2 has no such list.
ALLOWED = {} if hasattr(haystack, "AsyncPipeline") else {"allowed_modules": ["tritonrank.*"]}

Ranking = list[tuple[str, float]]


class LangChain:
    """How a reranker is made, given texts, and read."""

    kind, top = for_langchain.TritonRerank, "top_n"

    @staticmethod
    def inputs(texts: list[str]) -> list[Document]:
        return [Document(text, id=str(i), metadata={"of": [i]}) for i, text in enumerate(texts)]

    @staticmethod
    def call(reranker: Any, query: str, inputs: list[Document]) -> list[Document]:
        return list(reranker.compress_documents(inputs, query))

    @staticmethod
    def call_async(reranker: Any, query: str, inputs: list[Document]) -> list[Document]:
        return list(asyncio.run(reranker.acompress_documents(inputs, query)))

    @staticmethod
    def read(outputs: list[Document]) -> Ranking:
        return [(each.page_content, each.metadata["relevance_score"]) for each in outputs]

    @staticmethod
    def metadata(output: Document) -> dict[str, Any]:
        return output.metadata


class LlamaIndex:
    kind, top = for_llama_index.TritonRerank, "top_n"

    @staticmethod
    def inputs(texts: list[str]) -> list[NodeWithScore]:
        return [NodeWithScore(node=TextNode(text=text), score=0.5) for text in texts]

    @staticmethod
    def call(reranker: Any, query: str, inputs: list[NodeWithScore]) -> list[NodeWithScore]:
        return reranker.postprocess_nodes(inputs, query_str=query)

    @staticmethod
    def call_async(reranker: Any, query: str, inputs: list[NodeWithScore]) -> list[NodeWithScore]:
        return asyncio.run(reranker.apostprocess_nodes(inputs, query_str=query))

    @staticmethod
    def read(outputs: list[NodeWithScore]) -> Ranking:
        return [(each.text, each.get_score()) for each in outputs]

    @staticmethod
    def metadata(output: NodeWithScore) -> dict[str, Any]:
        return output.node.metadata


class Haystack:
    kind, top = for_haystack.TritonRanker, "top_k"

    @staticmethod
    def inputs(texts: list[str]) -> list[haystack.Document]:
        return [haystack.Document(content=text, meta={"of": [1]}, score=0.5) for text in texts]

    @staticmethod
    def call(reranker: Any, query: str, inputs: list[haystack.Document]) -> list[haystack.Document]:
        return reranker.run(query=query, documents=inputs)["documents"]

    @staticmethod
    def call_async(
        reranker: Any, query: str, inputs: list[haystack.Document]
    ) -> list[haystack.Document]:
        return asyncio.run(reranker.run_async(query=query, documents=inputs))["documents"]

    @staticmethod
    def read(outputs: list[haystack.Document]) -> Ranking:
        return [(each.content, each.score) for each in outputs]

    @staticmethod
    def metadata(output: haystack.Document) -> dict[str, Any]:
        return output.meta


@pytest.fixture(params=[LangChain, LlamaIndex, Haystack])
def framework(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["call", "call_async"])
def call(request: pytest.FixtureRequest, framework: Any) -> Callable[..., Any]:
    return getattr(framework, request.param)


@pytest.fixture
def url(int8_server: EmbeddedServer) -> str:
    return int8_server.grpc_url


@pytest.fixture
def expected(url: str) -> Ranking:
    with RerankClient(url, timeout=60) as client:
        return [(each.document, each.score) for each in client.rank(QUERY, TEXTS)]


@pytest.mark.parametrize("top", [1, 3, len(TEXTS), 1000])
def test_the_clients_ranking(
    framework: Any, call: Callable[..., Any], url: str, expected: Ranking, top: int
) -> None:
    reranker = framework.kind(url, timeout=60, **{framework.top: top})
    inputs = framework.inputs(TEXTS)
    before, same = copy.deepcopy(inputs), list(inputs)
    outputs = call(reranker, QUERY, inputs)
    assert framework.read(outputs) == expected[:top]
    assert inputs == before
    assert all(one is other for one, other in zip(inputs, same))
    assert not {id(each) for each in outputs} & {id(each) for each in inputs}


FILLER = "The 🚂 leaves the station at noon, and the platform is empty again. "
LONG = FILLER * 60 + "Green tea is what people drink with a meal. " + FILLER * 20


def test_a_long_document_is_read_in_passages(
    framework: Any, call: Callable[..., Any], url: str
) -> None:
    texts = [LONG, "a red car", "green tea"]
    inputs = framework.inputs(texts)
    before = copy.deepcopy(inputs)
    for most in (None, 1, 8):
        reranker = framework.kind(url, timeout=60, max_passages=most, **{framework.top: 3})
        outputs = call(reranker, QUERY, inputs)
        with RerankClient(url, timeout=60) as client:
            expected = client.rank(QUERY, texts, max_passages=most)
        assert framework.read(outputs) == [(each.document, each.score) for each in expected]
        for output, each in zip(outputs, expected):
            told = framework.metadata(output).get("relevant_passage")
            assert each.passage
            passage = dict(zip(("start", "end"), each.passage))
            cut = {} if most == 8 else {"truncated": True}
            assert told == ({**passage, **cut} if each.document == LONG else None)
        assert inputs == before
        [read] = [each.passage for each in expected if each.document == LONG]
        assert ("Green tea" in LONG[slice(*read)]) == (most == 8)


@pytest.mark.parametrize("most", [0, -1])
def test_passages_that_cannot_be_meant(framework: Any, most: int) -> None:
    with pytest.raises(ValueError, match="max_passages"):
        framework.kind(max_passages=most)


def test_no_documents(framework: Any, call: Callable[..., Any]) -> None:
    assert call(framework.kind(NOBODY), QUERY, []) == []


def test_a_blank_query(framework: Any, call: Callable[..., Any], url: str) -> None:
    with pytest.raises(InvalidRequestError, match="QUERY"):
        call(framework.kind(url, timeout=60), " ", framework.inputs(TEXTS))


def test_nobody_there(framework: Any, call: Callable[..., Any]) -> None:
    with pytest.raises(ServerUnavailableError, match=NOBODY):
        call(framework.kind(NOBODY, timeout=60), QUERY, framework.inputs(TEXTS))


@pytest.mark.parametrize("kind", [RerankClient, AsyncRerankClient])
def test_a_client_that_is_passed(
    framework: Any, call: Callable[..., Any], url: str, expected: Ranking, kind: type
) -> None:
    reranker = framework.kind(client=kind([url], timeout=60), **{framework.top: 10})
    assert framework.read(call(reranker, QUERY, framework.inputs(TEXTS))) == expected


def test_a_client_is_shared_and_the_callers_to_close(framework: Any, url: str) -> None:
    with RerankClient(url, timeout=60) as client:
        reranker = framework.kind(client=client)
        framework.call(reranker, QUERY, framework.inputs(TEXTS))
    with pytest.raises(RerankError, match="the client is closed"):
        framework.call(reranker, QUERY, framework.inputs(TEXTS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@pytest.mark.parametrize("ready", [False, True])
def test_a_copy_has_clients_of_its_own(
    framework: Any,
    call: Callable[..., Any],
    url: str,
    expected: Ranking,
    copied: Callable[[Any], Any],
    ready: bool,
) -> None:
    with RerankClient(url, timeout=60) as client:
        settings = {"client": client} if ready else {"url": url, "timeout": 60}
        reranker = framework.kind(**settings, **{framework.top: 4})
        framework.call(reranker, QUERY, framework.inputs(TEXTS))
        other = copied(reranker)
    assert framework.read(call(other, QUERY, framework.inputs(TEXTS))) == expected[:4]


@pytest.mark.parametrize("top", [0, -1])
def test_a_top_that_cannot_be_meant(framework: Any, top: int) -> None:
    with pytest.raises(ValueError, match=framework.top):
        framework.kind(**{framework.top: top})


def test_clients_that_cannot_be_meant(framework: Any) -> None:
    with pytest.raises(ValueError, match="client has url, timeout and tls of its own"):
        framework.kind(timeout=7, client=AsyncRerankClient())
    with pytest.raises(TypeError, match="client is of type str: pass a RerankClient"):
        framework.kind(client=NOBODY)


@pytest.mark.parametrize("framework", [LangChain, LlamaIndex], indirect=True)
def test_a_url_that_cannot_be_meant(framework: Any) -> None:
    with pytest.raises(ValueError, match="has a scheme: pass HOST:PORT"):
        framework.kind("http://127.0.0.1:8001")


@pytest.fixture
def tls(tmp_path: Path) -> TLS:
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    return TLS(tmp_path / "ca.pem", server_name="reranker")


def test_langchain_retriever(url: str, expected: Ranking) -> None:
    found = LangChain.inputs(TEXTS)
    retriever = ContextualCompressionRetriever(
        base_compressor=for_langchain.TritonRerank(url, timeout=60, top_n=None),
        base_retriever=RunnableLambda(lambda query: found),
    )
    outputs = retriever.invoke(QUERY)
    assert LangChain.read(outputs) == expected
    assert LangChain.read(asyncio.run(retriever.ainvoke(QUERY))) == expected
    for each in outputs:  # Everything else is kept, and nothing is shared.
        assert found[int(each.id)].page_content == each.page_content
        each.metadata["of"].append("changed")
    assert found == LangChain.inputs(TEXTS)


def test_langchain_fields(tls: TLS) -> None:
    reranker = for_langchain.TritonRerank(
        ["127.0.0.1:1", "127.0.0.1:2"], tls=tls, top_n=5, max_passages=4
    )
    data = reranker.model_dump(mode="json")
    assert for_langchain.TritonRerank(**data).model_dump() == data
    with pytest.raises(ValueError, match="frozen"):
        reranker.url = NOBODY


class Retriever(BaseRetriever):
    """Finds the same for every query; of equal texts one, as some retrievers do by themselves."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return LlamaIndex.inputs(list(dict.fromkeys(TEXTS)))


def test_llama_index_query_engine(url: str, expected: Ranking) -> None:
    engine = RetrieverQueryEngine(
        Retriever(),
        NoText(MockLLM()),
        [for_llama_index.TritonRerank(url, timeout=60, top_n=3)],
    )
    best = list(dict.fromkeys(expected))[:3]
    assert LlamaIndex.read(engine.query(QUERY).source_nodes) == best
    assert LlamaIndex.read(asyncio.run(engine.aquery(QUERY)).source_nodes) == best


def test_llama_index_metadata_for_embedding_is_read(url: str) -> None:
    nodes = [
        TextNode(text="a thing", metadata={"kind": "green tea"}),
        TextNode(text="a thing", metadata={"kind": "a cup of coffee", "number": 7}),
    ]
    nodes[1].excluded_embed_metadata_keys = ["number"]
    reranker = for_llama_index.TritonRerank(url, timeout=60)
    outputs = reranker.postprocess_nodes([NodeWithScore(node=each) for each in nodes], None, QUERY)
    with RerankClient(url, timeout=60) as client:
        texts = ["kind: green tea\n\na thing", "kind: a cup of coffee\n\na thing"]
        expected = client.rank(QUERY, texts)
    assert [each.score for each in outputs] == [each.score for each in expected]
    assert [each.node for each in outputs] == [nodes[each.index] for each in expected]


def test_llama_index_shows_no_model_the_passage(url: str) -> None:
    node = TextNode(text=LONG, metadata={"kind": "tea"}, excluded_llm_metadata_keys=["kind"])
    reranker = for_llama_index.TritonRerank(url, timeout=60, max_passages=8)
    [output] = reranker.postprocess_nodes([NodeWithScore(node=node)], None, QUERY)
    passage = output.node.metadata["relevant_passage"]
    text = node.get_content(MetadataMode.EMBED)
    assert "Green tea" in text[passage["start"] : passage["end"]]
    for mode in (MetadataMode.EMBED, MetadataMode.LLM):
        assert output.node.get_content(mode) == node.get_content(mode)


@pytest.mark.parametrize("name", ["postprocess_nodes", "apostprocess_nodes"])
def test_llama_index_without_a_query(name: str) -> None:
    async def call() -> None:
        result = getattr(for_llama_index.TritonRerank(NOBODY), name)(LlamaIndex.inputs(TEXTS))
        await result

    with pytest.raises(ValueError, match="pass query_bundle or query_str"):
        asyncio.run(call())


class Recorder(BaseEventHandler):
    events: list[BaseEvent] = []  # noqa: RUF012  A field of pydantic's.

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    handlers = get_dispatcher().event_handlers
    handlers.append(Recorder())
    yield handlers[-1]
    handlers.pop()


@pytest.mark.parametrize("call", ["call", "call_async"])
def test_llama_index_events(url: str, recorder: Recorder, call: str) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    manager = CallbackManager([debug])
    reranker = for_llama_index.TritonRerank(url, timeout=60, callback_manager=manager)
    inputs = LlamaIndex.inputs(TEXTS)
    outputs = getattr(LlamaIndex, call)(reranker, QUERY, inputs)
    start, end = (each for each in recorder.events if "ReRank" in each.class_name())
    assert (start.query.query_str, start.nodes, start.top_n) == (QUERY, inputs, 2)
    assert (start.model_name, end.nodes) == ("reranker", outputs)
    [[before, after]] = debug.get_event_pairs(CBEventType.RERANKING)
    assert before.payload[EventPayload.NODES] == inputs
    assert after.payload[EventPayload.NODES] == outputs
    with pytest.raises(InvalidRequestError):
        getattr(LlamaIndex, call)(reranker, "", inputs)
    [_, [_, failed]] = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(failed.payload[EventPayload.EXCEPTION], InvalidRequestError)


def test_llama_index_serialisation(tls: TLS) -> None:
    urls = ["127.0.0.1:1", "127.0.0.1:2"]
    for reranker in (
        for_llama_index.TritonRerank(urls, timeout=7, tls=tls, top_n=5, max_passages=4),
        for_llama_index.TritonRerank(
            client=RerankClient(urls, timeout=7, tls=tls), top_n=5, max_passages=4
        ),
    ):
        data = reranker.to_json()
        other = for_llama_index.TritonRerank.from_json(data)
        assert other.to_json() == data
        assert (other.url, other.timeout, other.top_n, other.max_passages) == (urls, 7, 5, 4)
        assert TLS(**other.tls).server_name == "reranker"


def pipeline(kind: type, ranker: for_haystack.TritonRanker) -> Any:
    made = kind()
    made.add_component("joiner", DocumentJoiner())
    made.add_component("ranker", ranker)
    made.connect("joiner", "ranker")
    return made


@pytest.mark.parametrize("kind", [haystack.Pipeline, AsyncPipeline])
def test_haystack_pipeline(url: str, kind: type) -> None:
    made = pipeline(kind, for_haystack.TritonRanker(url, timeout=60, top_k=3))
    loaded = kind.loads(made.dumps(), **ALLOWED)
    texts = list(dict.fromkeys(TEXTS))  # The joiner joins equal ones.
    with RerankClient(url, timeout=60) as client:
        expected = [(each.document, each.score) for each in client.rank(QUERY, texts)]
    data = {"joiner": {"documents": Haystack.inputs(texts)}, "ranker": {"query": QUERY}}
    for each in (made, loaded):
        assert Haystack.read(each.run(data)["ranker"]["documents"]) == expected[:3]
    data["ranker"]["top_k"] = 5
    outputs = asyncio.run(made.run_async(data)) if kind is AsyncPipeline else made.run(data)
    assert Haystack.read(outputs["ranker"]["documents"]) == expected[:5]


@pytest.mark.parametrize("passed", [False, True])
def test_haystack_serialisation(tls: TLS, passed: bool) -> None:
    settings = {"url": ["127.0.0.1:1", "127.0.0.1:2"], "timeout": 7, "tls": tls}
    more = {
        "top_k": 5,
        "max_passages": 4,
        "meta_fields_to_embed": ["name"],
        "meta_data_separator": " ",
    }
    given = {"client": RerankClient(**settings)} if passed else settings
    made = pipeline(haystack.Pipeline, for_haystack.TritonRanker(**given, **more))
    text = made.dumps()
    loaded = haystack.Pipeline.loads(text, **ALLOWED)
    assert loaded.dumps() == text
    loaded.warm_up()
    data = loaded.get_component("ranker").to_dict()
    assert data["init_parameters"].pop("tls") == {
        "root_certificates": str(tls.root_certificates),
        "server_name": "reranker",
    }
    assert data["init_parameters"] == {"url": settings["url"], "timeout": 7} | more


def test_haystack_metadata_that_is_asked_for_is_read(url: str) -> None:
    documents = [
        haystack.Document(content="a thing", meta={"kind": "green tea", "number": 7}),
        haystack.Document(content="a thing", meta={"kind": None}),
        haystack.Document(meta={"kind": "coffee"}),
    ]
    ranker = for_haystack.TritonRanker(url, timeout=60, meta_fields_to_embed=["kind", "color"])
    outputs = ranker.run(QUERY, documents)["documents"]
    with RerankClient(url, timeout=60) as client:
        expected = client.rank(QUERY, ["green tea\na thing", "a thing", "coffee\n"])
    assert [each.score for each in outputs] == [each.score for each in expected]
    assert [each.id for each in outputs] == [documents[each.index].id for each in expected]


@pytest.mark.parametrize("name", ["call", "call_async"])
def test_haystack_closes_and_opens(url: str, expected: Ranking, name: str) -> None:
    ranker = for_haystack.TritonRanker(url, timeout=60)
    for _ in range(2):
        outputs = getattr(Haystack, name)(ranker, QUERY, Haystack.inputs(TEXTS))
        assert Haystack.read(outputs) == expected
        ranker.close()
        asyncio.run(ranker.close_async())
    with pytest.raises(ValueError, match="top_k must be > 0, but got 0"):
        ranker.run(QUERY, [], top_k=0)
    with pytest.raises(ValueError, match="has a scheme"):
        for_haystack.TritonRanker("http://127.0.0.1:8001").warm_up()


def test_haystack_leaves_a_client_that_was_passed_open(url: str) -> None:
    async def run() -> None:
        async with AsyncRerankClient(url, timeout=60) as client:
            ranker = for_haystack.TritonRanker(client=client)
            await ranker.close_async()
            assert len(await client.rank(QUERY, TEXTS)) == len(TEXTS)

    asyncio.run(run())


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_client_needs_no_framework() -> None:
    frameworks = {"langchain_core", "llama_index", "haystack", "pydantic"}
    done = python(f"import sys, tritonrank; print({frameworks} & {{*sys.modules}})")
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index.core", "llama-index"),
        ("haystack", "haystack", "haystack"),
    ],
)
def test_a_framework_that_is_missing(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; import tritonrank.integrations.{module}"
    last = python(code).stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith(f" is missing, or too old: in a checkout, pip install '.[{extra}]'")


@pytest.mark.parametrize("module", ["langchain", "llama_index", "haystack"])
def test_the_pages_example(module: str, url: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "client/README.md").read_text(), re.DOTALL)
    [example] = [each for each in blocks if f"tritonrank.integrations.{module} " in each]
    done = python(example.replace("127.0.0.1:8001", url))
    assert re.fullmatch(r"0\.\d+ green tea\n", done.stdout), done.stderr
