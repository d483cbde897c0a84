"""What is known of a request, and Prometheus' metrics of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ..cache import PairCache
from .dialects import Dialect

#: Seconds, from a cached pair to a large request on a CPU.
BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass
class Seen:
    """What is known of a request, for its log line and the metrics.

    Attributes:
        id: the client's own, or a new one.
        bytes: of its body that came.
        path: that was asked for.
        dialect: None of a request that ranks nothing.
        documents, tokens: 0 and None until they are known.
        status: of the answer.
        seconds: until it was sent.
        error: what was answered, if it is an error.
    """

    id: str
    path: str
    bytes: int = 0
    dialect: Dialect | None = None
    documents: int = 0
    tokens: int | None = None
    status: int = 500
    seconds: float = 0.0
    error: str | None = None


class Metrics:
    """Counts of what was answered.

    Args:
        under_way: how many documents are.
        cache: of pairs, or None.
    """

    def __init__(self, under_way: Callable[[], int], cache: PairCache | None) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "tritonrank_gateway_"
        self._requests = Counter(
            name + "requests", "Requests", ["dialect", "status"], registry=registry
        )
        self._seconds = Histogram(
            name + "request_seconds",
            "Until the answer was sent",
            buckets=BUCKETS,
            registry=registry,
        )
        self._documents = Counter(name + "documents", "Documents ranked", registry=registry)
        self._tokens = Counter(name + "tokens", "Tokens of their pairs", registry=registry)
        gauge = Gauge(name + "documents_under_way", "Documents under way", registry=registry)
        gauge.set_function(under_way)
        if cache:
            registry.register(_CacheCollector(cache))

    def add(self, seen: Seen) -> None:
        """Counts a request."""
        self._requests.labels(seen.dialect.name if seen.dialect else "none", seen.status).inc()
        self._seconds.observe(seen.seconds)
        if seen.status == 200:
            self._documents.inc(seen.documents)
            self._tokens.inc(seen.tokens or 0)


class _CacheCollector(Collector):
    """The cache's own counts."""

    def __init__(self, cache: PairCache) -> None:
        self._cache = cache

    def collect(self) -> list[CounterMetricFamily]:
        return [
            CounterMetricFamily(f"tritonrank_gateway_cache_{name}", text, value=value)
            for name, text, value in (
                ("hits", "Pairs whose scores were known", self._cache.hits),
                ("misses", "Pairs that were sent to a server", self._cache.misses),
            )
        ]
