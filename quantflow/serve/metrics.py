"""What the server counts and shows at /metrics, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantflow.engine.engine import Occupancy

FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """occupancy: of the engine, asked for when somebody looks. block_size: tokens a cache block."""

    def __init__(self, occupancy: Callable[[], Occupancy], block_size: int) -> None:
        self.registry = CollectorRegistry()
        # An error of a request that was refused is counted by its status, one of a text by how it
        # ended.
        self.responses = Counter(
            "quantflow_http_responses",
            "Answers, by route and status",
            ["path", "status"],
            registry=self.registry,
        )
        self.finished = Counter(
            "quantflow_texts_finished",
            "Texts that ended, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "quantflow_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        self.cached_tokens = Counter(
            "quantflow_prefix_cache_hit_tokens",
            "Tokens of prompts that the cache held",
            registry=self.registry,
        )
        self.tokens = Counter(
            "quantflow_generated_tokens", "Tokens generated", registry=self.registry
        )
        self.first = Histogram(
            "quantflow_time_to_first_token_seconds",
            "From request to first token",
            buckets=FIRST,
            registry=self.registry,
        )
        self.between = Histogram(
            "quantflow_inter_token_seconds",
            "From one token of a text to its next",
            buckets=BETWEEN,
            registry=self.registry,
        )
        self.whole = Histogram(
            "quantflow_request_seconds",
            "From request to last token",
            buckets=WHOLE,
            registry=self.registry,
        )
        self.registry.register(_Engine(occupancy, block_size))
        ProcessCollector(registry=self.registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    def __init__(self, occupancy: Callable[[], Occupancy], block_size: int) -> None:
        self._occupancy, self._block_size = occupancy, block_size

    def collect(self) -> Iterator[Metric]:
        now = self._occupancy()
        for name, text, value in (
            ("quantflow_sequences_running", "Sequences that run", now.running),
            ("quantflow_sequences_waiting", "Sequences that wait for their turn", now.waiting),
            (
                "quantflow_kv_blocks_used",
                "Blocks of the KV cache that belong to somebody",
                now.used_blocks,
            ),
            ("quantflow_kv_blocks", "Blocks of the KV cache", now.blocks),
            ("quantflow_kv_block_tokens", "Tokens a block holds", self._block_size),
            ("quantflow_sessions", "Sessions that are kept", now.sessions),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield CounterMetricFamily(
            "quantflow_preemptions", "Sequences that gave their blocks to others", now.preemptions
        )
