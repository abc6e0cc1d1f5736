"""Metrics for Prometheus, under vLLM's names where vLLM has the same metric."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, final

import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorac.serving.active_request import ActiveRequest
from lorac.serving.served_model import AdapterSource, ServedModel, TextScheduler

T = TypeVar("T")
MEDIA_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLOW = (*_FAST, 25, 50, 100, 250)
_REASONS = {"cancelled": "abort", "deadline": "abort", "tool_calls": "stop"}
"""Finish reason of an answer -> vLLM's word for it, where the two differ."""


@final
class ServerMetrics(Collector):
    """A server's running requests and its metrics. Only the event loop's thread may change the requests.

    Args:
        compiled: the model.
        base_name: the model's name, as the label ``model_name``.
        source: its adapters for all tenants are the only adapters whose names metrics show.

    Attributes:
        running: the running requests, by id.
        scheduler: the scheduler whose rows are reported; None: the model generates no text.
        registry: the registry of all metrics.
    """

    def __init__(self, compiled: ServedModel, base_name: str, source: AdapterSource) -> None:
        self._compiled, self._name, self._source = compiled, base_name, source
        self.running: dict[str, ActiveRequest] = {}
        self.scheduler: TextScheduler | None = None
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)  # first, since ``collect`` adds load times to a metric below
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts that were read.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens of answers.")
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Time until an answer's first token.", _SLOW)
        self._gaps = self._histogram("vllm:inter_token_latency_seconds", "Time between tokens of an answer.", _FAST)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Time of whole requests.", _SLOW)
        self._ended = self._new(
            prometheus_client.Counter, "vllm:request_success", "Answers that ended, by reason.", "finished_reason"
        )
        self._responses = prometheus_client.Counter(
            "lorac_http_responses", "Answers to requests, by HTTP status.", ["status"], registry=self.registry
        )
        loads = "Time of loading adapters, by way: from a path, an upload, or the disk when a request needs them."
        self._loads = self._new(prometheus_client.Histogram, "lorac_adapter_load_seconds", loads, "way", buckets=_SLOW)

    def count_response(self, status: int) -> None:
        """Count an HTTP response by its status."""
        self._responses.labels(str(status)).inc()

    @contextlib.contextmanager
    def time_load(self, way: str) -> Iterator[None]:
        """Record the time of the block, which loads an adapter; a load that fails is not recorded."""
        begun = time.monotonic()
        yield
        self._loads.labels(self._name, way).observe(time.monotonic() - begun)

    @contextlib.contextmanager
    def track(self, request: ActiveRequest) -> Iterator[None]:
        """List a request as running during the block, and count it at the block's end."""
        self.running[request.id] = request
        try:
            yield
        finally:
            del self.running[request.id]
            request.reasons += ["cancelled"] * (request.answers - len(request.reasons))
            self._whole.observe(request.seconds)
            for reason in request.reasons:
                self._ended.labels(self._name, _REASONS.get(reason, reason)).inc()

    def count_token(self, request: ActiveRequest, gap: float | None) -> None:
        """Count a token of an answer.

        Args:
            gap: seconds since the answer's previous token; None for its first.
        """
        request.completion_tokens += 1
        self._generated.inc()
        if gap is not None:
            self._gaps.observe(gap)
        if request.first_token is None:
            request.first_token = request.seconds
            self._prompt.inc(request.prompt_tokens)
            self._first.observe(request.first_token)

    def expose(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges, with their values at the time of the scrape."""
        reads = self._compiled.pool.read_seconds
        while reads:
            self._loads.labels(self._name, "use").observe(reads.popleft())
        for name, text, value in self._read_state(self.scheduler):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        # Inference gateways read the running and waiting adapters from these labels, and route requests by them.
        shared, names = {*self._source.names("")}, {True: set[str](), False: set[str]()}  # no tenant has this name
        for request in [*self.running.values()]:
            names[request.first_token is not None].update(name for name in request.adapters if name in shared)
        labels = {
            "max_lora": "0" if self.scheduler is None else str(self.scheduler.rows),
            "running_lora_adapters": ",".join(sorted(names[True])),
            "waiting_lora_adapters": ",".join(sorted(names[False])),
        }
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests that run and wait.", labels=[*labels])
        info.add_metric([*labels.values()], time.time())
        yield info

    def _read_state(self, scheduler: TextScheduler | None) -> Iterator[tuple[str, str, float]]:
        """Yield the name, the help text and the value of each gauge."""
        running, waiting = (0, 0) if scheduler is None else scheduler.load
        rows, memory, pool = 1 if scheduler is None else scheduler.rows, self._compiled.memory, self._compiled.pool
        # Without a limit on memory, it is the places for rows that run out.
        share = running / rows if memory.limit is None else memory.used / max(memory.limit, 1)
        yield "vllm:num_requests_running", "Requests at work.", running
        yield "vllm:num_requests_waiting", "Requests that wait.", waiting
        yield "vllm:kv_cache_usage_perc", "Share of the room for caches in use, from 0 to 1.", share
        yield "lorac_adapters_registered", "Adapters that requests may name.", len(pool)
        yield "lorac_adapters_resident", "Adapters that are ready in memory.", len(pool.resident)
        yield "lorac_memory_bytes", "Memory of adapters and caches.", memory.used
        if memory.limit is not None:
            yield "lorac_memory_limit_bytes", "The most memory of adapters and caches.", memory.limit
        if scheduler is not None and scheduler.chunk is not None:
            yield "lorac_prefill_chunk_tokens", "The most tokens of each prompt per step.", scheduler.chunk
        for name, nbytes in ({} if scheduler is None else scheduler.nbytes).items():
            yield f"lorac_{name}_bytes", f"Memory of the {name} of rows at work.", nbytes

    def _counter(self, name: str, text: str) -> prometheus_client.Counter:
        return self._new(prometheus_client.Counter, name, text).labels(self._name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
        return self._new(prometheus_client.Histogram, name, text, buckets=buckets).labels(self._name)

    def _new(self, kind: Callable[..., T], name: str, text: str, *labels: str, **settings: object) -> T:
        return kind(name, text, ["model_name", *labels], registry=self.registry, **settings)
