"""Metrics of a running job for Prometheus. A scrape reads counts and the last `Sample`, never the scheduler itself."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from deserve.errors import UserError

# Named as in vLLM where the figure means the same there: name, help, and where it is in a `Sample`.
VLLM_GAUGES = {
    "vllm:num_requests_running": ("Sequences in a micro-batch.", "running"),
    "vllm:num_requests_waiting": ("Requests that were read from the input and not admitted yet.", "waiting"),
    "vllm:kv_cache_usage_perc": ("Fraction of the KV pages that sequences use; 1 is all.", "kv_use"),
}
VLLM_COUNTERS = {
    "vllm:prompt_tokens": ("Prompt tokens of admitted sequences.", "prompt_tokens"),
    "vllm:prefix_cache_queries": ("Prompt tokens that were looked up in prefix pages.", "prompt_tokens"),
    "vllm:prefix_cache_hits": ("Prompt tokens that were found in prefix pages.", "cached_tokens"),
    "vllm:spec_decode_num_draft_tokens": ("Draft tokens that visits verified.", "drafted"),
    "vllm:spec_decode_num_accepted_tokens": ("Draft tokens that were right.", "right"),
}
GAUGES = {
    "deserve:num_requests_suspended": ("Sequences that wait outside the micro-batches, for pages.", "suspended"),
    "deserve:host_pool_usage_perc": ("Fraction of the host pool's pages that are in use; 1 is all.", "host_pool_use"),
}
COUNTERS = {
    "deserve:suspensions": ("Moves of a sequence to the host pool.", "suspensions"),
    "deserve:visits": ("Visits of rank 0.", "visits"),
}


class Exporter(Collector):
    """Serves http://`host`:`port`/metrics from a thread of its own, for the job of `model`.

    `now` gives the counts of `Progress.now`. Raises UserError where the port cannot be had.
    """

    def __init__(self, host: str, port: int, model: str, now: Callable[[], dict[str, Any]]):
        self._model, self._now = model, now
        self.predicted: float | None = None  # output tokens/s, by the plan
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(
                f"report.metrics_port={port} of report.metrics_host={host} cannot be opened: {error.strerror}. "
                "Give another port, or 0 for none"
            ) from error

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        now = self._now()
        sample = now["sample"]
        for name, (text, of_sample) in (VLLM_GAUGES | GAUGES).items():
            yield self._gauge(name, text, getattr(sample, of_sample))
        for name, (text, of_sample) in (VLLM_COUNTERS | COUNTERS).items():
            yield self._counter(name, text, {(): getattr(sample, of_sample)})
        yield self._counter("vllm:generation_tokens", "Tokens of all answers so far.", {(): now["sampled"]})
        yield self._counter(
            "vllm:request_success",
            "Answers by why they ended; a request with n answers counts n times.",
            {(reason,): count for reason, count in now["finish_reasons"].items()},
            "finished_reason",
        )
        yield self._counter("deserve:requests", "Requests that were answered or got an error.", {(): now["requests"]})
        yield self._counter(
            "deserve:request_errors",
            "Requests that got an error.",
            {(code,): count for code, count in now["errors"].items()},
            "code",
        )
        yield self._counter("deserve:trips", "Trips round the ring that sampled, of all sequences.", {(): now["trips"]})
        yield self._counter(
            "deserve:rank_seconds",
            "Seconds of rank 0 by what it did; spans of different kinds overlap.",
            {("0", kind): seconds for kind, seconds in sample.seconds},
            "rank",
            "kind",
        )
        if now["total"] is not None:
            yield self._gauge("deserve:requests_to_answer", "Requests that this start is to answer.", now["total"])
        if self.predicted is not None:
            text = "Output tokens/s of the plan, if answers are as long as assumed."
            yield self._gauge("deserve:predicted_generation_tokens_per_second", text, self.predicted)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, values: dict[tuple[str, ...], float], *labels: str) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", *labels])
        for own, value in values.items():
            family.add_metric([self._model, *own], value)
        return family
