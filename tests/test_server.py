"""The ensemble on a real tritonserver with the real model, through the client."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from conftest import MAX_DOCUMENTS, new_repository, pipeline, start
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonrank import (
    AsyncRerankClient,
    InvalidRequestError,
    RankedDocument,
    RerankClient,
    RerankError,
    RerankTimeoutError,
    protocol,
)
from tritonrank.errors import from_rpc
from tritonrank.protocol import BULK_PASSAGES, Options
from tritonrank_server.export import default_model
from tritonrank_server.serving.serve import EmbeddedServer
from tritonrank_server.stages.shm import stages_prefix

Sample = list[tuple[str, list[str]]]


@pytest.fixture(scope="module")
def client(int8_server: EmbeddedServer) -> Iterator[RerankClient]:
    with RerankClient(int8_server.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def fp32_client(fp32_server: EmbeddedServer) -> Iterator[RerankClient]:
    with RerankClient(fp32_server.grpc_url, timeout=120) as client:
        yield client


def logits(ranking: list[RankedDocument]) -> list[float]:
    """Logits in the order of the request's documents."""
    return [each.logit for each in sorted(ranking, key=lambda each: each.index)]


def infer(url: str, **tensors: np.ndarray) -> dict[str, np.ndarray]:
    """A request by plain tritonclient, of any dtypes and shapes."""
    dtypes = {"O": "BYTES", "i4": "INT32", "i8": "INT64", "f4": "FP32"}
    inputs = []
    for name, value in tensors.items():
        dtype = dtypes["O" if value.dtype == object else value.dtype.str[1:]]
        inputs.append(triton.InferInput(name, list(value.shape), dtype))
        inputs[-1].set_data_from_numpy(value)
    with triton.InferenceServerClient(url) as client:
        result = client.infer("reranker", inputs, client_timeout=120)
    return {name: result.as_numpy(name) for name in ("INDICES", "SCORES", "LOGITS")}


def texts(*values: str | bytes) -> np.ndarray:
    return np.array(values, dtype=object)


def statistics(server: EmbeddedServer, model: str) -> service_pb2.ModelStatistics:
    with triton.InferenceServerClient(server.grpc_url) as client:
        return client.get_inference_statistics(model).model_stats[0]


# The answer is right.


def test_fp32_logits_equal_transformers(
    fp32_client: RerankClient, sample: Sample, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    default_model.write_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    long = " ".join(text for _, documents in sample[:3] for text in documents)
    for query, documents in [*sample, ("long documents", [long, long[100:], "short", ""])]:
        encoded = tokenizer(
            [query] * len(documents),
            documents,
            padding=True,
            truncation="only_second",
            max_length=512,
            return_tensors="pt",
        )
        with torch.inference_mode():
            expected = model(**encoded).logits[:, 0].numpy()
        ranking = fp32_client.rank(query, documents)
        np.testing.assert_allclose(logits(ranking), expected, rtol=0, atol=1e-4)
        scores = 1 / (1 + np.exp(-np.float64([each.logit for each in ranking])))
        np.testing.assert_allclose([each.score for each in ranking], scores, atol=1e-6)
        assert [each.index for each in ranking] == np.argsort(-expected, kind="stable").tolist()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_ensemble_equals_the_pipeline_exactly(
    precision: str, request: pytest.FixtureRequest, sample: Sample
) -> None:
    oracle = pipeline(request.getfixturevalue(f"{precision}_repository"))
    server = request.getfixturevalue(f"{precision}_server")
    with RerankClient(server.grpc_url, timeout=60) as client:
        for query, documents in sample:
            expected, ranking = oracle.rank(query, documents), client.rank(query, documents)
            assert [each.index for each in ranking] == expected.indices.tolist()
            assert [each.logit for each in ranking] == expected.logits.tolist()
            assert [each.score for each in ranking] == expected.scores.tolist()


def test_int8_keeps_the_ranking(
    client: RerankClient, fp32_client: RerankClient, sample: Sample
) -> None:
    for query, documents in sample[:3]:  # The model reads English.
        exact, fast = fp32_client.rank(query, documents), client.rank(query, documents)
        best = next(each for each in exact if each.index == fast[0].index)
        assert exact[0].logit - best.logit < 0.2  # Two of these are 0.14 apart.
        assert len({each.index for each in fast[:5]} & {each.index for each in exact[:5]}) >= 4


def test_unicode_goes_through_unchanged(client: RerankClient, sample: Sample) -> None:
    (query, korean), (_, japanese) = sample[3:]
    documents = [
        *korean,
        *japanese,
        "مرحبا بالعالم",
        "שלום",
        "🍣👩‍👩‍👧‍👦",
        "𠮷野家",
        "e\u0301 é",
        "nul\0",
        "",
    ]
    ranking = client.rank(query, documents)
    assert sorted(each.index for each in ranking) == list(range(len(documents)))
    assert all(each.document == documents[each.index] for each in ranking)
    # Had the bytes been changed on the way, the tokens of these two would not differ.
    assert len(set(logits(client.rank("富士山", ["富士山", "富士"])))) == 2


def test_korean_scores_survive_the_wire(
    client: RerankClient, int8_repository: Path, sample: Sample
) -> None:
    query, documents = sample[3]
    [alone] = client.rank(query, documents[:1])
    assert [alone.logit] == pipeline(int8_repository).rank(query, documents[:1]).logits.tolist()


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (5, 5), (12, 12), (99, 12), (None, 12)])
def test_top_k(client: RerankClient, sample: Sample, top_k: int | None, expected: int) -> None:
    query, documents = sample[0]
    ranking = client.rank(query, documents, top_k=top_k)
    assert ranking == client.rank(query, documents)[:expected]


def test_ties_are_ranked_by_index(client: RerankClient) -> None:
    ranking = client.rank("fruit", ["apple", "car", "apple", "car", "apple"])
    assert [each.index for each in ranking if each.document == "apple"] == [0, 2, 4]
    assert [each.index for each in ranking if each.document == "car"] == [1, 3]


def test_empty_document_is_legal(client: RerankClient) -> None:
    assert {each.index for each in client.rank("tea", ["", "green tea"])} == {0, 1}
    assert len(client.rank("tea", [""])) == 1


# A score depends on nothing but its pair. Exactly, at every precision on the embedded scorer.


def test_scores_do_not_depend_on_batch_mates_or_order(
    client: RerankClient, fp32_client: RerankClient, sample: Sample
) -> None:
    for each in (client, fp32_client):
        query, documents = sample[0]
        together = logits(each.rank(query, documents))
        alone = [each.rank(query, [document])[0].logit for document in documents]
        order = random.Random(1).sample(range(12), 12)
        shuffled = each.rank(query, [documents[i] for i in order])
        assert together == alone
        assert {order[one.index]: one.logit for one in shuffled} == dict(enumerate(together))


def test_special_tokens_in_documents_change_no_other_document(
    client: RerankClient, sample: Sample
) -> None:
    query, documents = sample[1]
    expected = logits(client.rank(query, documents))
    poison = ["[PAD]", "[SEP] [CLS] [PAD] [MASK]", "[PAD] " * 600, "[SEP]" * 300, "[UNK]\0[PAD]"]
    mixed = [text for pair in zip(documents, [*poison, *poison, *poison]) for text in pair]
    with ThreadPoolExecutor(4) as pool:
        neighbours = pool.map(lambda text: client.rank(text, [text] * 9), poison[:2] * 4)
        assert logits(client.rank(query, mixed))[::2] == expected
        assert all(len({each.logit for each in ranking}) == 1 for ranking in neighbours)


def test_client_splits_what_is_beyond_the_limit(client: RerankClient, sample: Sample) -> None:
    query, documents = sample[2]
    many = [f"{documents[i % 12]} {i}" for i in range(MAX_DOCUMENTS + 100)]
    ranking = client.rank(query, many)
    assert sorted(each.index for each in ranking) == list(range(len(many)))
    assert ranking == sorted(ranking, key=lambda each: (-each.logit, each.index))
    assert client.rank(query, many, top_k=7) == ranking[:7]
    some = [0, 1, MAX_DOCUMENTS, len(many) - 1]
    assert [client.rank(query, [many[i]])[0].logit for i in some] == [
        logits(ranking)[i] for i in some
    ]


def test_concurrent_clients_get_what_they_would_get_alone(
    client: RerankClient, int8_server: EmbeddedServer, sample: Sample
) -> None:
    shapes = random.Random(2)
    requests = []
    for i in range(96):
        query, documents = sample[i % 5]
        text = documents[i % 12]
        sizes = [shapes.randint(0, len(text)) for _ in range(shapes.randint(1, 12))]
        requests.append((query, [text[:size] for size in sizes]))
    alone = [client.rank(*request) for request in requests]
    before = statistics(int8_server, "cross_encoder")
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda request: client.rank(*request), requests))
    after = statistics(int8_server, "cross_encoder")
    assert together == alone
    documents = sum(len(texts) for _, texts in requests)
    assert after.inference_count - before.inference_count == documents
    assert after.execution_count - before.execution_count < len(requests)


def test_a_bulk_call_lets_others_pass(client: RerankClient, sample: Sample) -> None:
    query, documents = sample[0]
    many = [f"{documents[i % 12]} {i}" for i in range(400)]
    expected = client.rank(query, many)
    with ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(client.rank, query, many, bulk=True)
        time.sleep(1)
        for _ in range(3):
            assert len(client.rank(query, documents)) == 12
        assert not bulk.done()  # Of 13 parts, it would be, had it gone first.
        assert bulk.result() == expected


# Bad input.

GOOD = {"QUERY": texts("tea"), "DOCUMENTS": texts("green tea", "a car")}
BAD = {
    "no documents": ({"DOCUMENTS": texts()}, "DOCUMENTS is empty"),
    "too many": ({"DOCUMENTS": texts(*["x"] * 1025)}, "1025 documents.* 1024"),
    "blank query": ({"QUERY": texts(" \t\n")}, "QUERY is blank"),
    "invisible query": ({"QUERY": texts("\u200b\u00ad\ufeff\u3164 \ufe0f")}, "QUERY is blank"),
    "query not UTF-8": ({"QUERY": texts(b"tea\xff")}, "QUERY is not valid UTF-8 .byte 3."),
    "document not UTF-8": ({"DOCUMENTS": texts("a", b"\xed\xa0\x80")}, r"DOCUMENTS\[1\] is not"),
    "query too long": ({"QUERY": texts("tea " * 600)}, "more tokens .* 512"),
    "query of 5 MB": ({"QUERY": texts("tea " * 1_250_000)}, "5000000 characters.* 32768"),
    "top_k 0": ({"TOP_K": np.int32([0])}, "TOP_K is 0"),
    "top_k negative": ({"TOP_K": np.int32([-3])}, "TOP_K is -3"),
    "top_k INT64": ({"TOP_K": np.int64([3])}, "TOP_K.*INT64.*INT32"),
    "query INT32": ({"QUERY": np.int32([3])}, "QUERY.*INT32"),
    "two queries": ({"QUERY": texts("a", "b")}, r"QUERY.*\[1\].*\[2\]"),
    "documents 2-D": ({"DOCUMENTS": texts("a", "b").reshape(1, 2)}, r"DOCUMENTS.*\[1,2\]"),
    "no query": ({"QUERY": None}, "QUERY"),
}


@contextmanager
def good_clients(client: RerankClient, sample: Sample) -> Iterator[None]:
    """Eight clients that rank until the end of the block, and must never see a difference."""
    expected = [client.rank(*request) for request in sample]
    finished = threading.Event()

    def work(i: int) -> int:
        done = 0
        while not finished.is_set() or not done:
            assert client.rank(*sample[i % 5]) == expected[i % 5]
            done += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        rounds = [pool.submit(work, i) for i in range(8)]
        try:
            yield
        finally:
            finished.set()
        assert all(each.result() for each in rounds)


def test_bad_input_is_refused_and_harms_nobody(
    client: RerankClient, int8_server: EmbeddedServer, sample: Sample
) -> None:
    with good_clients(client, sample):
        for case, (change, message) in BAD.items():
            tensors = {name: value for name, value in (GOOD | change).items() if value is not None}
            with pytest.raises(InferenceServerException, match=message) as refused:
                infer(int8_server.grpc_url, **tensors)
            assert refused.value.status() == "StatusCode.INVALID_ARGUMENT", case
            assert "Traceback" not in refused.value.message(), case


def test_malformed_bytes_are_refused_and_harm_nobody(
    client: RerankClient, int8_server: EmbeddedServer, sample: Sample
) -> None:
    request = service_pb2.ModelInferRequest(model_name="reranker")
    request.inputs.add(name="QUERY", datatype="BYTES", shape=[1])
    request.inputs.add(name="DOCUMENTS", datatype="BYTES", shape=[1])
    request.raw_input_contents.extend([b"\x03\0\0\0tea", b"\xff\xff\xff\x7fshort"])
    with good_clients(client, sample), grpc.insecure_channel(int8_server.grpc_url) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([(10**8, 1), (-3, 1), (0, 1)], "lengths are not those of input_ids"),
        ([(4, 10**8)], "its log says why"),
    ],
)
def test_nonsense_sent_to_the_scorer_itself_harms_nobody(
    client: RerankClient,
    int8_server: EmbeddedServer,
    sample: Sample,
    values: list[tuple[int, int]],
    message: str,
) -> None:
    with (
        good_clients(client, sample),
        triton.InferenceServerClient(int8_server.grpc_url) as direct,
    ):
        for length, token in values * 3:
            tensors = {"input_ids": [[token] * 4], "lengths": [[length]], "query_lengths": [[1]]}
            inputs = []
            for name, value in tensors.items():
                inputs.append(triton.InferInput(name, list(np.shape(value)), "INT32"))
                inputs[-1].set_data_from_numpy(np.array(value, np.int32))
            with pytest.raises(InferenceServerException, match=message):
                direct.infer("cross_encoder", inputs, client_timeout=60)


def test_a_document_of_5_mb_is_cut_to_the_limit(client: RerankClient) -> None:
    words = "green tea is grown in the hills and "
    huge = words * (5_000_000 // len(words))
    cut, whole = client.rank("tea", [huge, words * 200])
    assert cut.logit == whole.logit


def test_the_client_raises_the_servers_words(client: RerankClient) -> None:
    with pytest.raises(InvalidRequestError, match="DOCUMENTS is empty: send at least one"):
        client.rank("tea", [])
    with pytest.raises(InvalidRequestError, match="TOP_K is 0: send 1 or more"):
        client.rank("tea", ["a"], top_k=0)


NAN_BEYOND_40_TOKENS = """
<ir_version: 8, opset_import: ["": 17]>
nan (int32[t] input_ids, int32[n, 1] lengths, int32[n, 1] query_lengths)
    => (float[n, 1] logits, float[n, 1] scores)
{
    forty = Constant <value = int32 {40}> ()
    not_a_number = Constant <value = float {nan}> ()
    long = Greater (lengths, forty)
    value = Cast <to = 1> (lengths)
    logits = Where (long, not_a_number, value)
    scores = Sigmoid (logits)
}
"""


def test_nan_is_an_error_of_its_own_request_only(int8_repository: Path, tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    current = repository / "cross_encoder" / "current"
    current.mkdir()
    for name in ("tokenizer.json", "export.json"):
        source = int8_repository / "tokenizer" / "1" / name
        (current / name).write_bytes(source.read_bytes())
    graph = onnx.parser.parse_model(NAN_BEYOND_40_TOKENS.replace("{nan}", "{0}"))
    constant = next(node for node in graph.graph.node if "not_a_number" in node.output)
    constant.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.float32("nan")))
    onnx.save(graph, current / "model.onnx")
    with start(repository) as server, RerankClient(server.grpc_url, timeout=60) as client:
        with ThreadPoolExecutor(8) as pool:
            good = [pool.submit(client.rank, "tea", ["green tea", "a car"]) for _ in range(40)]
            bad = [pool.submit(client.rank, "tea", ["a", "a " * 60]) for _ in range(10)]
        assert all(len(each.result()) == 2 for each in good)
        for each in bad:
            with pytest.raises(RerankError, match=r"no finite logit for DOCUMENTS\[1\]"):
                each.result()


# Other clients.


def test_plain_tritonclient(int8_server: EmbeddedServer, client: RerankClient) -> None:
    outputs = infer(int8_server.grpc_url, **GOOD, TOP_K=np.int32([1]))
    [best] = client.rank("tea", ["green tea", "a car"], top_k=1)
    assert outputs["INDICES"].tolist() == [best.index]
    assert outputs["LOGITS"].tolist() == [best.logit]
    assert outputs["SCORES"].tolist() == [best.score]
    assert [outputs[name].dtype for name in outputs] == [np.int32, np.float32, np.float32]


def test_http(int8_server: EmbeddedServer) -> None:
    inputs = [
        {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": ["차 한 잔"]},
        {"name": "DOCUMENTS", "datatype": "BYTES", "shape": [2], "data": ["a car", "차"]},
        {"name": "TOP_K", "datatype": "INT32", "shape": [1], "data": [2]},
    ]
    request = urllib.request.Request(
        f"http://{int8_server.http_url}/v2/models/reranker/infer",
        data=json.dumps({"inputs": inputs}).encode(),
    )
    with urllib.request.urlopen(request) as response:
        outputs = {each["name"]: each["data"] for each in json.load(response)["outputs"]}
    assert outputs["INDICES"] == [1, 0]
    assert outputs["LOGITS"] == sorted(outputs["LOGITS"], reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DOCUMENTS": ["a", 3]}, "JSON non-string as string"),
        ({"DOCUMENTS": [None]}, "JSON non-string as string"),
        ({"DOCUMENTS": [{"text": "a"}]}, "JSON non-string as string"),
        ({"QUERY": [True]}, "JSON non-string as string"),
        ({"DOCUMENTS": "a car"}, "JSON non-array as array"),
        ({"DOCUMENTS": ["a \ud800 car"]}, "surrogate pair in string is invalid"),
        ({"DOCUMENTS": ["a \udc00 car"]}, r"DOCUMENTS\[0\] is not valid UTF-8"),
        ({"QUERY": ["\u200b\u00ad"]}, "QUERY is blank"),
        ({"TOP_K": ["1"]}, "JSON non-signed-integer"),
        ({"TOP_K": [0]}, "TOP_K is 0"),
    ],
)
def test_http_tells_its_client_what_is_wrong(
    int8_server: EmbeddedServer, change: dict[str, object], message: str
) -> None:
    data = {"QUERY": ["tea"], "DOCUMENTS": ["a car"], "TOP_K": [1]} | change
    inputs = [
        {
            "name": name,
            "datatype": "INT32" if name == "TOP_K" else "BYTES",
            "shape": [len(values) if isinstance(values, list) else 1],
            "data": values,
        }
        for name, values in data.items()
    ]
    request = urllib.request.Request(
        f"http://{int8_server.http_url}/v2/models/reranker/infer",
        data=json.dumps({"inputs": inputs}).encode(),
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    assert re.search(message, json.load(refused.value)["error"])


def test_async_client_and_its_cancellation(
    int8_server: EmbeddedServer, client: RerankClient, sample: Sample
) -> None:
    async def scenario() -> list[list[RankedDocument]]:
        async with AsyncRerankClient(int8_server.grpc_url, timeout=120) as asynchronous:
            many = asyncio.gather(*(asynchronous.rank(*request) for request in sample))
            rankings: list[list[RankedDocument]] = await many
            before = ledger.read_bytes()
            # Of documents that are cut, which takes the tokenizer a second, from when it is taken.
            slow = asyncio.create_task(
                asynchronous.rank("tea", ["green tea in the morning " * 1000] * 1000)
            )
            while ledger.read_bytes() == before:
                await asyncio.sleep(0.01)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return rankings

    ledger = Path("/dev/shm", f"{stages_prefix(int8_server.pid)}ledger")
    before = failures(int8_server, "CANCELED")
    assert asyncio.run(scenario()) == [client.rank(*request) for request in sample]
    deadline = time.monotonic() + 60
    while failures(int8_server, "CANCELED") == before:
        assert time.monotonic() < deadline, "the server never learned of the cancellation"
        time.sleep(0.1)


def test_what_is_given_up_is_scored_no_further(
    client: RerankClient, int8_server: EmbeddedServer
) -> None:
    before = failures(int8_server, "OTHER")
    with pytest.raises(RerankTimeoutError):
        client.rank("tea", ["green tea in the morning " * 100] * 1000, timeout=3)
    deadline = time.monotonic() + 60
    # Scored to its end, in minutes, it would count as CANCELED.
    while failures(int8_server, "OTHER") == before:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)


def failures(server: EmbeddedServer, reason: str) -> float:
    """Failed requests of the ensemble by reason, from Triton's metrics."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("nv_inference_request_failure{") and f'reason="{reason}"' in line
    )


def test_who_has_no_deadline_waits_and_who_has_one_is_not_kept_waiting(
    int8_repository: Path,
) -> None:
    documents = texts(*["green tea in the morning " * 20] * 16)

    def status(_: int) -> str:  # Plain tritonclient does not try again.
        try:
            outputs = infer(server.grpc_url, QUERY=texts("tea"), DOCUMENTS=documents)
        except InferenceServerException as error:
            return str(error.status())
        return f"{len(outputs['LOGITS'])} ranked"

    with start(int8_repository) as server, ThreadPoolExecutor(64) as pool:
        warm = counters(server)["computed_tokens"]
        assert status(0) == "16 ranked"
        one = counters(server)["computed_tokens"] - warm
        patient = [pool.submit(status, i) for i in range(64)]
        # Until then the tokenizer has a queue, where a deadline may pass unread.
        while counters(server)["documents"] < 65 * 16:
            time.sleep(0.05)
        for _ in range(5):
            with pytest.raises(RerankError, match="work before this request takes") as refused:
                plain_rank(server, documents.tolist(), timeout=2)
            assert refused.value.code == grpc.StatusCode.UNAVAILABLE
        assert {each.result() for each in patient} == {"16 ranked"}
        computed = counters(server)["computed_tokens"] - warm
        plain_rank(server, documents.tolist(), timeout=2)  # Nothing waits any more.
    assert computed == 65 * one  # None of those refused.


def plain_rank(server: EmbeddedServer, documents: list[str], timeout: float) -> None:
    """One request with a deadline that Triton sees, once.

    Raises:
        RerankError: what was answered in place of a ranking.
    """
    message = protocol.request("tea", documents, None, Options(), timeout)
    with grpc.insecure_channel(server.grpc_url) as channel:
        try:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60)
        except grpc.RpcError as error:
            raise from_rpc(error, None) from error


def test_metrics_of_known_requests(
    client: RerankClient, int8_server: EmbeddedServer, int8_repository: Path
) -> None:
    query, documents = "tea", ["green tea", "", "water " * 600]
    tokenizer = pipeline(int8_repository).tokenizer
    [tokens] = tokenizer.encode([tokenizer.read(query.encode(), [d.encode() for d in documents])])
    before = counters(int8_server)
    for _ in range(2):
        client.rank(query, documents)
    after = counters(int8_server)
    assert {name: after[name] - before[name] for name in after} == {
        "documents": 6,
        "passages": 6,
        "truncated_documents": 2,
        "tokens": 2 * tokens.lengths.sum(),
        "computed_tokens": 2 * tokens.lengths.sum(),
    }


def test_failures_are_counted_by_stage_and_reason(
    client: RerankClient, int8_server: EmbeddedServer
) -> None:
    def counts() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{int8_server.metrics_url}/metrics") as response:
            text = response.read().decode()
        found = re.findall(r"^tritonrank_failures_total{(.*)} (\S+)$", text, re.M)
        return {labels: float(value) for labels, value in found}

    before = counts()
    assert len(before) == 12
    for top_k, documents in ((None, []), (0, ["a"])):
        with pytest.raises(InvalidRequestError):
            client.rank("tea", documents, top_k)
    more = {labels: value - before[labels] for labels, value in counts().items()}
    assert {labels for labels, value in more.items() if value == 1} == {
        'reason="invalid",stage="tokenizer"',
        'reason="invalid",stage="sorter"',
    }
    assert sum(more.values()) == 2


def counters(server: EmbeddedServer) -> dict[str, float]:
    """The project's own metrics."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics") as response:
        text = response.read().decode()
    found = re.findall(r"^tritonrank_(\w+)_total(?:{})? (\S+)$", text, re.M)
    return {name: float(value) for name, value in found}


# The configurations.


def config(path: str) -> model_config_pb2.ModelConfig:
    text = (Path(__file__).parents[1] / "model_repository" / path).read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_both_scorers_keep_one_contract() -> None:
    production, cpu = (
        config("cross_encoder/config.pbtxt"),
        config("cross_encoder/configs/cpu.pbtxt"),
    )
    assert (production.backend, cpu.backend) == ("onnxruntime", "python")
    for part in ("backend", "default_model_filename", "instance_group", "model_warmup"):
        production.ClearField(part)
        cpu.ClearField(part)
    for each in (production, cpu):  # Of documents; a GPU takes more at a time.
        del each.dynamic_batching.preferred_batch_size[:]
    assert production == cpu


@pytest.mark.parametrize("model", ["tokenizer", "sorter"])
def test_on_a_cpu_a_stage_differs_by_its_instances_alone(model: str) -> None:
    production, cpu = config(f"{model}/config.pbtxt"), config(f"{model}/configs/cpu.pbtxt")
    assert production.instance_group[0].count > cpu.instance_group[0].count == 1
    for each in (production, cpu):
        each.ClearField("instance_group")
    assert production == cpu


def test_the_limits_agree() -> None:
    max_passages = config("tokenizer/config.pbtxt").parameters["max_passages"].string_value
    assert config("cross_encoder/config.pbtxt").max_batch_size == int(max_passages)
    assert int(max_passages) == MAX_DOCUMENTS
    cpu = config("cross_encoder/configs/cpu.pbtxt").dynamic_batching
    assert list(cpu.preferred_batch_size) == [BULK_PASSAGES]
