"""Locust users of the ensemble: ``locust -f loadtest/locustfile.py --host HOST:PORT [USER …]``.

Closed loop: each ``RerankUser`` (the tritonrank client) or ``TritonUser`` (plain tritonclient)
sends its next request when it has the answer; so does each ``GatewayUser``, by HTTP through the
gateway (``--host http://HOST:PORT``). Open loop: each ``ArrivalUser`` sends ``--rate``
requests a second on average, answered or not, as the public does; what a request waits for the
server is part of its response time. ``-f loadtest/locustfile.py,loadtest/shapes.py`` lets their
number change.
"""

from __future__ import annotations

import grpc.experimental.gevent

# Before any channel is made: gRPC's own threads would block the hub, on which all users run.
grpc.experimental.gevent.init_gevent()

import json
import random
import sys
import time
from collections import Counter
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import gevent.pool
import numpy as np
import tritonclient.grpc as triton
from geventhttpclient import HTTPClient
from locust import User, events, task
from locust.env import Environment
from locust.runners import WorkerRunner
from tokenizers import Tokenizer
from tritonrank import RerankClient
from tritonrank.connection import Endpoint

# Locust puts this file's folder on the path, not the one it is a package in.
sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest.workloads import WORKLOADS, Request, stream

TOKENIZER = Path(__file__).parents[1] / "model_repository" / "tokenizer" / "1" / "tokenizer.json"

#: Tells the users of a process apart, so that each sends other requests.
_seeds = count()


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("tritonrank")
    names = ", ".join(WORKLOADS)
    group.add_argument("--workload", default="search", help=f"{names}, or a JSONL file")
    group.add_argument("--timeout", type=float, default=10.0, help="seconds of a request")
    group.add_argument("--rate", type=float, default=1.0, help="requests/s of an ArrivalUser")
    group.add_argument("--bulk", action="store_true", help="requests that let all others pass")


@cache
def _shared_client(host: str, timeout: float) -> RerankClient:
    """One for all users of a process, as in an application."""
    return RerankClient(host, timeout=timeout)


class _Reranking(User):  # type: ignore[misc]
    """What all users share: a stream of requests, and what is reported of each."""

    abstract = True
    host = "127.0.0.1:8001"

    def on_start(self) -> None:
        self.options = self.environment.parsed_options
        self.seed = next(_seeds)
        self.requests = stream(self.options.workload, self.seed)

    def rank(self, request: Request) -> None:
        raise NotImplementedError

    @task  # The only one: a subclass that had another would have both.
    def act(self) -> None:
        self.next_request()

    def next_request(self) -> None:
        self.send(next(self.requests), time.perf_counter())

    def send(self, request: Request, due: float) -> None:
        """Ranks and reports. Those that fail have a name of their own, and so percentiles."""
        name, error = self.options.workload, None
        try:
            self.rank(request)
        except Exception as raised:  # Any failure is one for the report.
            kind = type(raised).__name__
            # Not the exception itself, which Locust would keep, and with it its frames' client.
            name, error = f"{name}: {kind}", f"{kind}: {raised}"
        self.environment.events.request.fire(
            request_type=type(self).__name__,
            name=name,
            response_time=1000 * (time.perf_counter() - due),
            response_length=0,
            exception=error,
            context={"documents": request.documents},
        )


class RerankUser(_Reranking):
    """The tritonrank client, closed loop."""

    def rank(self, request: Request) -> None:
        client = _shared_client(self.host, self.options.timeout)
        query, documents, max_passages = request
        client.rank(query, documents, max_passages=max_passages, bulk=self.options.bulk)


class ArrivalUser(RerankUser):
    """The tritonrank client, open loop: a Poisson process."""

    def on_start(self) -> None:
        super().on_start()
        self.random = random.Random(self.seed)
        self.under_way = gevent.pool.Group()
        self.due = time.perf_counter()

    def next_request(self) -> None:
        self.under_way.spawn(self.send, next(self.requests), self.due)
        self.due += self.random.expovariate(self.options.rate)

    def wait_time(self) -> float:
        """Until the next one is due."""
        return max(0.0, self.due - time.perf_counter())

    def on_stop(self) -> None:
        self.under_way.join()


class TritonUser(_Reranking):
    """Plain tritonclient, closed loop."""

    def on_start(self) -> None:
        super().on_start()
        proxied = Endpoint.of(self.host, None).proxy is not None
        options = [("grpc.enable_http_proxy", proxied), ("grpc.max_receive_message_length", -1)]
        self.client = triton.InferenceServerClient(self.host, channel_args=options)

    def on_stop(self) -> None:
        # It closes itself when collected: at the interpreter's end, when gRPC's lock is held by a
        # thread that is gone, that would wait for ever. Not twice: gRPC counts the channels, and
        # at none it stops serving the others.
        del self.client

    def rank(self, request: Request) -> None:
        query, documents, max_passages = request
        inputs = [
            triton.InferInput("QUERY", [1], "BYTES"),
            triton.InferInput("DOCUMENTS", [len(documents)], "BYTES"),
        ]
        inputs[0].set_data_from_numpy(np.array([query], dtype=object))
        inputs[1].set_data_from_numpy(np.array(documents, dtype=object))
        if max_passages is not None:
            inputs.append(triton.InferInput("MAX_PASSAGES", [1], "INT32"))
            inputs[2].set_data_from_numpy(np.array([max_passages], np.int32))
        options = {"priority": 2, "parameters": {"bulk": True}} if self.options.bulk else {}
        self.client.infer("reranker", inputs, client_timeout=self.options.timeout, **options)


class GatewayUser(_Reranking):
    """HTTP through the gateway, closed loop."""

    host = "http://127.0.0.1:8080"

    def on_start(self) -> None:
        super().on_start()
        timeout = self.options.timeout
        self.http = HTTPClient.from_url(
            self.host, connection_timeout=timeout, network_timeout=timeout
        )

    def on_stop(self) -> None:
        self.http.close()

    def rank(self, request: Request) -> None:
        body = json.dumps(request._asdict())
        kind = {"content-type": "application/json"}
        response = self.http.post("/rerank", body.encode(), kind)
        answer = json.loads(response.read())
        if response.status_code != 200:
            raise ConnectionError(f"{response.status_code}: {answer['message']}")


class Throughput:
    """Documents and tokens ranked, of all processes, in Locust's web page and at its end."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.counts: Counter[str] = Counter()
        self.started = self.stopped = self.last = time.time()
        self.tokenizer = Tokenizer.from_file(str(TOKENIZER)) if TOKENIZER.exists() else None
        if self.tokenizer:
            self.tokenizer.no_truncation()  # Else a document that is too long is an error.
        for name in ("request", "test_start", "test_stopping", "quitting"):
            getattr(environment.events, name).add_listener(getattr(self, name))
        for name in ("report_to_master", "worker_report"):
            getattr(environment.events, name).add_listener(getattr(self, name))
        if environment.web_ui:
            self._extend(environment.web_ui)

    def request(self, exception: Exception | None, context: dict[str, Any], **_: Any) -> None:
        self.last = time.time()
        if exception is None:
            documents = context["documents"]
            self.counts["documents"] += len(documents)
            if self.tokenizer:
                encodings = self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)
                self.counts["tokens of documents"] += sum(len(each.ids) for each in encodings)

    def test_start(self, **_: Any) -> None:
        self.counts.clear()
        self.started = self.stopped = self.last = time.time()

    def test_stopping(self, **_: Any) -> None:
        self.stopped = time.time()

    def report_to_master(self, data: dict[str, Any], **_: Any) -> None:
        data["throughput"] = dict(self.counts)
        self.counts.clear()

    def worker_report(self, data: dict[str, Any], **_: Any) -> None:
        self.counts.update(data["throughput"])

    def rows(self) -> list[dict[str, object]]:
        """What was ranked so far, and a second."""
        elapsed = max(1e-9, time.time() - self.started)
        return [
            {"name": name, "total": total, "rate": round(total / elapsed, 1)}
            for name, total in self.counts.items()
        ]

    def quitting(self, **_: Any) -> None:
        if not isinstance(self.environment.runner, WorkerRunner):
            sent, answered = self.stopped - self.started, self.last - self.started
            print(f"sent for {sent:.3f} s, answered within {answered:.3f} s", file=sys.stderr)
            for row in self.rows():
                print(f"{row['name']}: {row['total']}, {row['rate']} a second", file=sys.stderr)

    def _extend(self, web_ui: Any) -> None:
        key, columns = "throughput", {"name": "", "total": "total", "rate": "a second"}
        web_ui.template_args["extended_tabs"] = [{"title": "Documents and tokens", "key": key}]
        structure = [{"key": name, "title": title} for name, title in columns.items()]
        web_ui.template_args["extended_tables"] = [{"key": key, "structure": structure}]

        @web_ui.app.after_request
        def add(response: Any) -> Any:
            from flask import request

            if request.path == "/stats/requests" and response.is_json:
                added = {"extended_stats": [{"key": key, "data": self.rows()}]}
                response.set_data(web_ui.app.json.dumps(response.json | added))
            return response


@events.init.add_listener
def _on_init(environment: Environment, **_: Any) -> None:
    Throughput(environment)
