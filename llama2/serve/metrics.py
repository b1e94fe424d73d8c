"""What Prometheus reads at /metrics. Names and counts only: nothing of what anybody wrote."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama2.infer.engine import Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

_GAUGES = {
    "n_waiting": ("llama2_waiting_answers", "Answers that wait for their turn."),
    "n_running": ("llama2_running_answers", "Answers in the batch."),
    "n_blocks_held": ("llama2_cache_blocks_used", "Blocks of keys and values in use."),
    "n_blocks": ("llama2_cache_blocks", "Blocks of keys and values there are."),
}
_COUNTERS = {
    "n_prompt_tokens": ("llama2_engine_prompt_tokens", "Tokens of prompts, those found in the cache included."),
    "n_cached_tokens": ("llama2_prefix_hit_tokens", "Tokens of prompts that were found in the prefix cache."),
    "n_new_tokens": ("llama2_engine_new_tokens", "Tokens written by the engine."),
    "n_preempted": ("llama2_preemptions", "Answers that gave up their blocks for others, and began anew."),
    "n_aborted": ("llama2_aborts", "Answers dropped before their end."),
    "n_steps": ("llama2_engine_steps", "Steps of the engine."),
    "n_drafted": ("llama2_drafted_tokens", "Tokens guessed ahead."),
    "n_accepted": ("llama2_accepted_tokens", "Tokens guessed ahead and right."),
}


class Metrics:
    """One registry per server, so that several can live in one process."""

    def __init__(self, stats: Callable[[], Mapping[str, Stats]]):
        """stats: returns the counters of every model's engine, by its name."""
        self.registry = CollectorRegistry()
        self.requests = Counter("llama2_requests", "Answered requests.", ["path", "status"], registry=self.registry)
        self.tokens = Counter("llama2_tokens", "Tokens read and written.", ["model", "kind"], registry=self.registry)
        self.cancelled = Counter(
            "llama2_cancelled_requests", "Requests given up before their end.", ["model"], registry=self.registry
        )
        self.first_token_s = self._seconds("llama2_time_to_first_token_seconds", "From arrival to the first token.")
        self.next_token_s = self._seconds("llama2_time_per_token_seconds", "From one token to the next.")
        self.registry.register(_EngineCollector(stats))

    def _seconds(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, ["model"], buckets=_SECONDS, registry=self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engines' own counters when asked."""

    def __init__(self, stats: Callable[[], Mapping[str, Stats]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, (name, help) in table.items():
                family = kind(name, help, labels=["model"])
                for model, stats in found.items():
                    family.add_metric([model], getattr(stats, field))
                yield family

    def describe(self) -> Iterable[Metric]:
        return ()
