"""What ``/metrics`` counts: requests and answers here, the engine's own numbers when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glmlocal.completion import Completion
from glmlocal.server.model import ServerState

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for every counter, which nobody reads
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; each has its own registry, so that tests may have several."""

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "glmlocal_http_requests", "Answered requests", ("path", "status"), registry=self.registry
        )
        self._finished = Counter(
            "glmlocal_answers", "Answers by why they ended", ("finish_reason",), registry=self.registry
        )
        self._aborted = Counter("glmlocal_aborted_answers", "Answers whose client went away", registry=self.registry)
        self._prompt_tokens = Counter("glmlocal_prompt_tokens", "Prompt tokens of answers", registry=self.registry)
        self._cached_tokens = Counter(
            "glmlocal_cached_prompt_tokens", "Prompt tokens that were not computed again", registry=self.registry
        )
        self._generated_tokens = Counter("glmlocal_generated_tokens", "Generated tokens", registry=self.registry)
        self._first_token_s = Histogram(
            "glmlocal_time_to_first_token_seconds", "Queueing and prefill", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_EngineCollector(state))

    def answered(self, path: str, status: int) -> None:
        """``path`` is a route's, never a client's: labels live for ever."""
        self._requests.labels(path, str(status)).inc()

    def completed(self, completion: Completion) -> None:
        self._finished.labels(completion.finish_reason).inc()
        self._prompt_tokens.inc(completion.usage.prompt_tokens)
        self._cached_tokens.inc(completion.usage.cached_tokens)
        self._generated_tokens.inc(completion.usage.completion_tokens)
        self._first_token_s.observe(completion.timings.time_to_first_token_s)

    def aborted(self, *, by_client: bool) -> None:
        if by_client:
            self._aborted.inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """``EngineStats.as_dict()`` as gauges: ``queue.running`` → ``glmlocal_queue_running``; tiers are labels."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        model = self._state.model
        ready = GaugeMetricFamily("glmlocal_ready", "1 when the model answers")
        ready.add_metric((), float(model is not None))
        yield ready
        if model is None:
            return
        stats = model.client.stats().as_dict()
        for name in ("lookups", "hits", "hit_rate"):
            family = GaugeMetricFamily(f"glmlocal_tier_{name}", f"{name} of the tiers of /v1/stats", labels=("tier",))
            for tier in stats.get("tiers") or ():
                family.add_metric((tier["tier"],), float(tier[name]))
            yield family
        for name, value in _numbers(stats):
            yield GaugeMetricFamily(f"glmlocal_{name}", f"{name} of /v1/stats", value=value)

    def describe(self) -> Iterator[Metric]:
        return iter(())


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}_")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{name}", float(value)
