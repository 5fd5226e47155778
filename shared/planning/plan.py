"""One candidate and its outlook, as plain numbers for people and programs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Seconds, tokens per second; shares of one."""

    kind: str
    """mesh or monolith"""
    attention: int
    """Instances; of monoliths: units."""
    experts: int
    """Instances; of monoliths: devices of a unit."""
    micro_batches: int
    slots: int
    """Replicas of each layer on an expert instance."""
    homes: float
    """Of an expert, in the mean."""
    devices: int
    price: float
    batch: float
    """Sequences in decode."""
    rows: float
    """Of a step: one for each sequence, and those of prompts."""
    tpot_s: float
    ttft_s: float
    tokens_per_s: float
    a_max: float
    """Mean over layers, of one micro-batch."""
    way: str
    """Of exchanges: phase/side of the gate."""
    parts: dict[str, float]
    """Seconds of a step: attention, shared, experts, exchange, head. What others hide is counted in full."""
    memory: float
    """Of what may be planned with on the fullest instance with a cache, the share that is needed."""
    excess: dict[str, float]
    """Limit -> what the plan needs of it; at most 1: kept."""

    @property
    def name(self) -> str:
        if self.kind == "mesh":
            return f"{self.attention}A{self.experts}E" + (", 2 micro-batches" if self.micro_batches > 1 else "")
        return f"monolith of {self.experts}" + (f", {self.attention} times" if self.attention > 1 else "")

    @property
    def tokens_per_s_device(self) -> float:
        return self.tokens_per_s / self.devices

    @property
    def broken(self) -> list[str]:
        """The limits that it breaks, the worst first."""
        return sorted((name for name, share in self.excess.items() if share > 1 + 1e-9), key=lambda n: -self.excess[n])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, **vars(self), "tokens_per_s_device": self.tokens_per_s_device, "broken": self.broken}
