"""What a policy of a replay is told, does and answers."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from shared.replay.timing import Form


@dataclass(frozen=True)
class Parts:
    """The parts of ``moemesh``, for the ablation."""

    predictor: bool = True
    """Off: loads are expected to be those of the layer's step before."""
    scaler: bool = True
    """Off: one home each, and no replicas for one exchange."""
    placer: bool = True
    """Off: homes are those of static expert parallelism, further ones on the instances after it."""
    keep_alive: bool = True
    """Off: every home is resident, always, and so is every replica until its memory is needed."""


@dataclass(frozen=True)
class Settings:
    """What policies can be told. Inputs are elsewhere: they are the same for all."""

    distance: int = 1
    """Layers between what is known and what is predicted (d)."""
    threshold: float = 0.2
    """Coefficient of variation that is even enough (V)."""
    prefill_threshold: float | None = None
    """The same for steps that compute prompts; None: no other one."""
    keep_s: float = 60.0
    """Fixed keep-alive of ``paper``."""
    worth_s: float = 20.0
    """Idle time for which ``moemesh`` keeps an expert in any case."""
    budget: float = 1.5
    """Memory of ``moemesh`` for experts: so many times that of all experts once each, at most what instances have."""
    form: Form = Form.DEVICES
    parts: Parts = field(default_factory=Parts)
    period_s: float = 30.0
    """Between two looks of ``moemesh`` at homes."""
    samples: int = 256
    """Steps that it looks at, spread over the latest eight times as many."""
    extra: float = 0.0
    """Homes beyond the first that it may have, as a share of the experts of a layer."""
    wait_s: float = 3e-6
    """An expert is not kept for less: the share of steps that call it times the wait for its start."""

    def threshold_of(self, prefill: bool) -> float:
        """That of a phase."""
        return self.threshold if self.prefill_threshold is None or not prefill else self.prefill_threshold


class Spent(NamedTuple):
    """What one step took."""

    moe_s: float
    """Of all layers, waits included."""
    waited_s: float
    proxy: float
    """Sum over layers of time x replicas of that layer, replica-seconds."""
    resident: float
    """Replica-seconds."""
    late: int
    """Experts for which an exchange waited."""
    end: float


class Policy(Protocol):
    """One run: steps in order, and the idle times between them."""

    def step(self, index: int, now: float) -> Spent:
        """Compute a step of the work, beginning now."""
        ...

    def idle(self, begin: float, end: float) -> float:
        """Nothing to do in between. Returns replica-seconds of residents."""
        ...

    @property
    def starts(self) -> tuple[int, int]:
        """Warm and cold ones so far."""
        ...
