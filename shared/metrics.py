"""Metrics in plain numbers, shown as Prometheus text when somebody scrapes.

Hot loops count in `Buckets`, integers and numpy arrays; a `SnapshotCollector` reads them at scrape time and only then.
Not here: the registry and ``/metrics`` itself (shared/telemetry.py, shared/lifecycle.py).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

PREFIX = "moemesh_"
MetricKind = Literal["counter", "gauge", "histogram"]
CATALOGUE: Mapping[str, tuple[MetricKind, str]] = {
    "running": ("gauge", "Requests being computed (gateway: open streams)."),
    "waiting": ("gauge", "Requests queued (gateway: not yet accepted by an attention instance)."),
    "requests": ("counter", "Requests finished, by outcome."),
    "refused": ("counter", "Requests refused, by code."),
    "prompt_tokens": ("counter", "Prompt tokens computed or received."),
    "generated_tokens": ("counter", "Tokens generated."),
    "time_to_first_token_seconds": ("histogram", "From the request's arrival to its first token."),
    "inter_token_latency_seconds": ("histogram", "Between two tokens of one request."),
    "step_seconds": ("histogram", "One forward pass over the current batch."),
    "steps": ("counter", "Forward passes."),
    "split_steps": ("counter", "Forward passes in two micro-batches that took turns with the experts."),
    "prefix_cache_tokens": ("counter", "Prompt tokens whose keys and values the KV cache had already."),
    "preemptions": ("counter", "Sequences that gave up their KV blocks to be recomputed later."),
    "kv_blocks": ("gauge", "KV blocks of this instance."),
    "kv_blocks_used": ("gauge", "KV blocks that sequences hold."),
    "exchange_express": ("counter", "Exchanges that went without the interpreter."),
    "exchange_seconds": ("histogram", "From dispatch to the last combined part of one exchange."),
    "paced": ("gauge", "1 while this instance keeps a device profile's times instead of its own, by profile."),
    "paced_seconds": ("counter", "Time that work took by the device profile."),
    "paced_late_seconds": ("counter", "Time that work took longer than the device profile says."),
    "compute_seconds": (
        "counter",
        "Time that experts spent on exchanges, without waiting for frames and sending replies.",
    ),
    "answers_express": ("counter", "Exchanges that were answered without the interpreter."),
    "answers": ("counter", "Exchanges for which experts were computed, those of a group once."),
    "exchange_bytes": ("counter", "Bytes of frames on the data plane, by direction."),
    "exchange_repeats": ("counter", "Exchanges that were sent again."),
    "groups": ("counter", "Groups of attention instances: formed, and broken while their step ran."),
    "way_chosen": ("gauge", "1 for the way that exchanges of this size go."),
    "way_predicted_seconds": ("gauge", "What the links alone cost an exchange, estimated."),
    "way_measured_seconds": ("gauge", "Median of an exchange in the last trial."),
    "frames_dropped": ("counter", "Frames thrown away, by reason."),
    "trace_recorders": ("gauge", "Recorders of routing that this instance sends to."),
    "trace_dropped": ("counter", "Exchanges that recorders did not get, because they wanted more than could be sent."),
    "expert_tokens": ("counter", "Tokens computed, by layer and expert."),
    "expert_activations": ("counter", "Exchanges in which the expert computed anything here, by layer and expert."),
    "replicas": ("gauge", "Loaded expert replicas."),
    "expert_bytes": ("gauge", "Bytes of their weights, of which the CPU maps most and shares them between instances."),
    "expert_slots": ("gauge", "Most experts that may be resident, where they come and go."),
    "expert_calls": ("counter", "Distinct experts of exchanges, summed over exchanges, where experts come and go."),
    "expert_calls_waited": ("counter", "Those of them that were not resident when their exchange came."),
    "expert_wait_seconds": ("counter", "Time that exchanges waited for experts."),
    "expert_starts": ("counter", "Experts made resident, by source: warm (host memory) or cold (storage)."),
    "expert_starts_ordered": ("counter", "The same by cause: demand (an exchange waited) or predicted."),
    "expert_start_bytes": ("counter", "Bytes of weights that starts have copied."),
    "expert_start_seconds": ("counter", "Time that starts have taken."),
    "expert_stops": ("counter", "Experts that made room, or that nobody called any more."),
    "expert_start_failures": ("counter", "Starts that failed."),
    "expert_cost_byte_seconds": (
        "counter",
        "Memory of experts over time: proxy (while their layer runs), resident (while loaded), provisioned (budget).",
    ),
    "prediction_seconds": ("counter", "Time spent on foreseeing loads."),
    "placement_version": ("gauge", "Version of the placement in use."),
    "placements_written": ("counter", "Versions of the placement that this scheduler has written."),
    "placements_aborted": ("counter", "Versions that this scheduler has begun and given up."),
    "placement_phase": ("gauge", "1 for what is under way with the placement, by phase."),
    "leader": ("gauge", "1 while this scheduler leads."),
    "leader_epoch": ("gauge", "Epoch of this scheduler's leadership; 0 while it does not lead."),
    "reconciler_state": ("gauge", "1 for what the scheduler's last round came to, by state."),
    "instances": ("gauge", "Known instances, by kind and state."),
    "desired_instances": (
        "gauge",
        "Instances that there should be, by pool; only pools that somebody has asked for.",
    ),
    "pool_changes": ("counter", "Changes of a pool's size that the actuator was asked for, by pool and outcome."),
    "autoscale_rate": ("gauge", "Requests per second that gateways have reported, over a window."),
    "autoscale_expected_rate": ("gauge", "Requests per second that are expected in the next window."),
    "autoscale_tpot_seconds": ("gauge", "Mean time of a token after the first, over a window."),
    "autoscale_planned_tpot_seconds": ("gauge", "The same as it is planned; 0: nothing is planned."),
    "autoscale_measured_over_predicted": ("gauge", "Times per token, by which plans are corrected."),
    "autoscale_instances": ("gauge", "Instances that are right for what is expected, by pool and mode."),
    "autoscale_changes": ("counter", "Sizes that autoscaling has asked for, by pool."),
    "bus_messages": ("counter", "Control messages, by fate: published, or what went wrong with them."),
    "bus_reconnects": ("counter", "Times that the connection to NATS came back."),
    "bus_connected": ("gauge", "1 while NATS is there."),
}
"""Every metric's kind and help text; ``moemesh_`` is put before the name, ``_total`` after a counter's."""


class Buckets:
    """A histogram in plain numbers: one `observe` costs a bisection and three additions, without a lock.

    One thread observes, any thread may read: a scrape in between may miss the observation under way.
    """

    LATENCY: tuple[float, ...] = (
        25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,
        2.5, 5, 10, 30,
    )  # fmt: skip
    """Seconds: from an exchange on shared memory to a request that waited."""

    def __init__(self, edges: Sequence[float] = LATENCY) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper edge, observations at or below it), as Prometheus wants them."""
        edges = [str(edge) for edge in self.edges] + ["+Inf"]
        return list(zip(edges, accumulate(self.counts), strict=True))


class Sample(NamedTuple):
    """One value at the time of a scrape."""

    name: str
    kind: MetricKind
    help: str
    labels: Mapping[str, str]
    value: float | Buckets


def sample(name: str, value: float | Buckets, **labels: str) -> Sample:
    """A sample of a metric in `CATALOGUE`. Raises KeyError for another name."""
    kind, text = CATALOGUE[name]
    return Sample(name, kind, text, labels, value)


def expert_samples(name: str, counts: np.ndarray, moe_layers: Sequence[int]) -> list[Sample]:
    """Of int64 ``counts`` [len(moe_layers), experts]; those that are 0 are left out."""
    found = zip(*np.nonzero(counts), strict=True)
    return [
        sample(name, float(counts[row, expert]), layer=str(moe_layers[row]), expert=str(expert))
        for row, expert in found
    ]


class SnapshotCollector(Collector):
    """Turns what ``read`` returns at each scrape into Prometheus families."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        by_name: dict[str, list[Sample]] = {}
        for one in self._read():
            by_name.setdefault(one.name, []).append(one)
        return (_family(samples) for samples in by_name.values())


def _family(samples: Sequence[Sample]) -> Metric:
    """One metric family; samples of one name have the same kind and label names."""
    first = samples[0]
    name, labels = PREFIX + first.name, tuple(first.labels)
    makers = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family = makers[first.kind](name, first.help, labels=labels)
    for one in samples:
        values = [one.labels[label] for label in labels]
        if isinstance(one.value, Buckets):
            family.add_metric(values, one.value.cumulative(), one.value.sum)
        else:
            family.add_metric(values, one.value)
    return family
