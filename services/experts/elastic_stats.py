"""What an elastic instance counts, and how /metrics shows it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.messages import ExpertCost
from shared.metrics import Sample, sample


@dataclass
class ElasticStats:
    """Counters since the start, written by the compute thread and read by anyone."""

    calls: int = 0
    """Distinct experts of exchanges, summed over exchanges."""
    waits: int = 0
    """Those that were not resident when their exchange came."""
    starts: Counter[str] = field(default_factory=Counter)
    """By cause: demand, predicted; and by source: warm, cold."""
    stops: int = 0
    failed: int = 0
    start_bytes: int = 0
    start_s: float = 0.0
    wait_s: float = 0.0
    """Of exchanges for experts."""
    predict_s: float = 0.0

    def samples(self, slots: int, cost: ExpertCost) -> Iterator[Sample]:
        """For /metrics. slots: most residents; cost: as of the last look."""
        yield sample("expert_slots", slots)
        yield sample("expert_calls", self.calls)
        yield sample("expert_calls_waited", self.waits)
        yield sample("expert_wait_seconds", self.wait_s)
        for source in ("warm", "cold"):
            yield sample("expert_starts", self.starts[source], source=source)
        for cause in ("demand", "predicted"):
            yield sample("expert_starts_ordered", self.starts[cause], cause=cause)
        yield sample("expert_start_bytes", self.start_bytes)
        yield sample("expert_start_seconds", self.start_s)
        yield sample("expert_stops", self.stops)
        yield sample("expert_start_failures", self.failed)
        yield sample("prediction_seconds", self.predict_s)
        for form, byte_seconds in cost.model_dump().items():
            yield sample("expert_cost_byte_seconds", byte_seconds, form=form)
