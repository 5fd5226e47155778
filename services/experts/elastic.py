"""Experts that come and go while exchanges are answered: what is missing is started, what will be wanted even before.

Everything here runs in the compute thread, which alone changes tables: what an exchange computes with cannot go
meanwhile. Which expert makes room for which is decided in shared/elastic/residency.py, bytes are moved in starts.py.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.experts.compute import Plan
from services.experts.elastic_stats import ElasticStats
from services.experts.foresight import LoadSums
from services.experts.starts import Started, Starts, When
from shared.activation import Parts
from shared.elastic.cost import CostMeter
from shared.elastic.keep_alive import KeepAlive
from shared.elastic.residency import Residence, Residency, Start
from shared.errors import MoemeshError
from shared.kernels.weights import Weight
from shared.messages import ElasticFacts, ExpertCost
from shared.metrics import Sample
from shared.models.moe import ExpertLayer, compute_parts
from shared.models.slots import Slots
from shared.predictors.base import Predictor

MOST_BROKEN = 256
"""In a heartbeat."""
RETRY_S = 10.0
"""An expert that could not be started is not tried again before."""
BROKEN_S = 300.0
"""For so long a failure counts against this instance as a home."""
LOOK_S = 1.0
"""How often idle residents are looked for."""

log = logging.getLogger(__name__)


class ElasticLayer(ExpertLayer, Protocol):
    """What is asked of ``MoeLayer``."""

    def hold(self, weights: Mapping[int, Sequence[Weight]]) -> None: ...

    def unload(self, experts: Iterable[int]) -> None: ...


class BrokenExpert(MoemeshError):
    """An expert cannot be started here; says which and why."""


@dataclass
class Progress:
    """An exchange whose experts were not all resident when it came."""

    plan: Plan
    out: Tensor
    """fp32 [P, H]: the parts that are done."""
    since: float
    todo: NDArray[np.bool_]
    """[P]"""

    def experts(self) -> NDArray[np.int32]:
        """Those that are still to be called, ascending."""
        return np.unique(self.plan.parts.experts[self.todo])


class Elastic:
    """The residents of one instance.

    Args:
        layers: by checkpoint index.
        slots: as many as the residency's.
        predictor: of the loads of layers to come; None: nothing is foreseen.
        distances: at which it is asked.
        keep_alive: says when idle experts are stopped, and started again; None: they stay.
        slot_bytes: of an expert's weights.
    """

    def __init__(
        self,
        layers: Mapping[int, ElasticLayer],
        residency: Residency,
        starts: Starts,
        slots: Slots,
        predictor: Predictor | None = None,
        distances: Sequence[int] = (1,),
        keep_alive: KeepAlive | None = None,
        slot_bytes: int = 0,
    ) -> None:
        self._layers, self._residency, self._starts, self._slots = layers, residency, starts, slots
        self._indices = sorted(layers)
        self._index = {layer: index for index, layer in enumerate(self._indices)}
        self._free = list(range(slots.count))
        self._slot: dict[tuple[int, int], int] = {}
        """Of residents and of those that are loading, by (index of the layer, expert)."""
        self._predictor, self._distances = predictor, tuple(distances)
        self.foreseen = LoadSums(*residency.homes.shape)
        self._keep_alive, self._look_at = keep_alive, 0.0
        self._failures: dict[tuple[int, int], tuple[float, str]] = {}
        """(Checkpoint layer, expert) -> when its last start failed, and why."""
        self._slot_bytes = slot_bytes
        self._costs = CostMeter()
        self._costs.provide(slots.count * slot_bytes, time.monotonic())
        self._costs.hold(0, time.monotonic())
        self._cost = ExpertCost()
        """As of the last look; for other threads."""
        self.stats = ElasticStats()

    @property
    def residents(self) -> int:
        return len(self._slot)

    def facts(self) -> ElasticFacts:
        """For the heartbeat; may be called from any thread."""
        stats = self.stats
        return ElasticFacts(
            slots=self._slots.count,
            calls=stats.calls,
            waits=stats.waits,
            cold=stats.starts["cold"],
            warm=stats.starts["warm"],
            stops=stats.stops,
            cost=self._cost,
            broken=tuple(sorted(self._broken()))[:MOST_BROKEN],
        )

    def _broken(self) -> list[tuple[int, int]]:
        now = time.monotonic()
        return [name for name, (when, _) in self._failures.copy().items() if now - when < BROKEN_S]

    def samples(self) -> Iterator[Sample]:
        """For /metrics; read in another thread."""
        return self.stats.samples(self._slots.count, self._cost)

    # ---- exchanges --------------------------------------------------------------------------------------

    def begin(self, layer: int, plan: Plan) -> Progress | None:
        """An exchange has come. None: all of its experts are resident. Else it waits; see ``go_on``."""
        experts = np.unique(plan.parts.experts)
        index, now = self._index[layer], time.monotonic()
        missing = self._residency.missing(index, experts)
        self._residency.call(index, experts, now)
        if self._keep_alive:
            self._keep_alive.observe(index, experts, now)
        self.stats.calls += len(experts)
        self.stats.waits += len(missing)
        if not len(missing):
            return None
        parts = len(plan.parts.experts)
        return Progress(plan, torch.empty(parts, 0), now, np.ones(parts, np.bool_))

    def go_on(self, layer: int, rows: Tensor, progress: Progress) -> bool:
        """Compute with who is resident, have the others started. True: all parts are done.

        Raises BrokenExpert.
        """
        experts = progress.experts()
        missing = self._residency.missing(self._index[layer], experts)
        for expert in missing.tolist():
            if (layer, expert) in self._failures and self._barred(layer, expert):
                problem = self._failures[layer, expert][1]
                raise BrokenExpert(f"expert {expert} of layer {layer} cannot be started: {problem}")
        ready = progress.todo & ~np.isin(progress.plan.parts.experts, missing)
        if ready.any():
            self._compute(layer, rows, progress, np.flatnonzero(ready))
        if progress.todo.any():
            return False
        self.stats.wait_s += time.monotonic() - progress.since
        return True

    def demand(self, layer: int, progress: Progress) -> None:
        """Have started what an exchange waits for."""
        index, experts = self._index[layer], progress.experts()
        for expert in experts.tolist():
            self._starts.urge(layer, expert)
        self._order(self._residency.demand(index, experts), When.NOW)
        if (self._residency.state[index, experts] == Residence.ABSENT).any():
            self._starts.urge_any()

    def _compute(self, layer: int, rows: Tensor, progress: Progress, some: NDArray[np.intp]) -> None:
        tokens, experts, weights = progress.plan.parts
        parts = Parts(tokens[some], experts[some], weights[some])
        if not progress.out.numel():
            progress.out = torch.empty(len(progress.todo), rows.shape[1], device=rows.device)
        out = torch.empty(len(some), rows.shape[1], device=rows.device)
        compute_parts(self._layers[layer], rows, parts, out)
        progress.out[torch.from_numpy(some)] = out
        progress.todo[some] = False

    def answered(self, layer: int, seconds: float) -> None:
        """An exchange is over; it took so long, waiting included."""
        held = np.count_nonzero(self._residency.state[self._index[layer]])
        self._costs.layer(seconds, int(held) * self._slot_bytes)

    def _hold(self) -> None:
        self._costs.hold(len(self._slot) * self._slot_bytes, time.monotonic())

    # ---- beside exchanges -------------------------------------------------------------------------------

    def adopt(self, homes: Mapping[int, Iterable[int]]) -> None:
        """Layer -> experts that have a home here from now on; others are stopped."""
        table = np.zeros(self._residency.homes.shape, np.bool_)
        for layer, experts in homes.items():
            table[self._index[layer], list(experts)] = True
        self._stop(self._residency.adopt(table))

    def foresee(self, layer: int, rows: Tensor, ids: NDArray[np.int32], prefill: bool = False) -> None:
        """Start what layers to come will want for rows [T, H] that chose ids [T, k] at ``layer``.

        ``prefill``: the rows are of a step that computes prompts.
        """
        predictor = self._predictor
        if predictor is None or not len(rows):
            return
        begun, known = time.monotonic(), rows.float().contiguous().numpy(force=True)
        predictor.observe(layer, ids)
        for distance in self._distances:
            if (layer, distance) in predictor.pairs:
                loads = predictor.loads(layer, distance, known, ids)
                if distance == 1:
                    self.foreseen.add(self._index[layer] + 1, loads, prefill)
                for expert in self._barred_of(self._index[layer] + distance):
                    loads[expert] = 0.0
                when = When.NEXT if distance == 1 else When.LATER
                self._order(self._residency.predict(self._index[layer] + distance, loads), when)
        self.stats.predict_s += time.monotonic() - begun

    def collect(self) -> bool:
        """Take over what has been started, stop what nobody calls. True: exchanges that wait may go on."""
        self._look_around(time.monotonic())
        ended = self._starts.ended()
        by_layer: dict[int, dict[int, tuple[Weight, ...]]] = {}
        for started in ended:
            if started.problem:
                self._failed(started)
            else:
                by_layer.setdefault(started.layer, {})[started.expert] = started.weights
                self._count(started)
        for layer, weights in by_layer.items():
            self._layers[layer].hold(weights)
        return bool(ended)

    def close(self) -> None:
        self._starts.close()

    def _barred(self, layer: int, expert: int) -> bool:
        """Whether an expert that could not be started is not to be tried yet."""
        return time.monotonic() - self._failures[layer, expert][0] < RETRY_S

    def _barred_of(self, index: int) -> list[int]:
        return [e for layer, e in self._failures if self._index[layer] == index and self._barred(layer, e)]

    def _look_around(self, now: float) -> None:
        """Stop and start what has not been called as the keep-alive policy says; add up costs."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        self._cost = ExpertCost(**asdict(self._costs.read(now)))
        self._stop(self._residency.homeless())
        if self._keep_alive is None:
            return
        wanted = np.stack([self._keep_alive.windows(i).wanted(now) for i in range(len(self._indices))])
        for index in range(len(wanted)):
            wanted[index, self._barred_of(index)] = False
        self._stop(self._residency.idle(wanted, now - LOOK_S))
        self._order(self._residency.revive(wanted), When.LATER)

    def _order(self, starts: Sequence[Start], when: When) -> None:
        self._evict([start.victim for start in starts if start.victim])
        for start in starts:
            slot = self._slot[start.layer, start.expert] = self._free.pop()
            self._slots.take(slot)
            self._starts.ask(self._indices[start.layer], start.expert, slot, when)
        self._hold()
        self.stats.starts["demand" if when is When.NOW else "predicted"] += len(starts)

    def _stop(self, residents: Sequence[tuple[int, int]]) -> None:
        for layer, expert in residents:
            self._residency.gone(layer, expert)
        for slot in self._evict(residents):
            self._slots.free(slot)
        self._hold()

    def _evict(self, residents: Sequence[tuple[int, int]]) -> list[int]:
        """Take experts out of their tables; returns their slots, which may be filled again."""
        by_layer: dict[int, list[int]] = {}
        for layer, expert in residents:
            by_layer.setdefault(layer, []).append(expert)
        for layer, experts in by_layer.items():
            self._layers[self._indices[layer]].unload(experts)
        slots = [self._slot.pop(resident) for resident in residents]
        self._free += slots
        self.stats.stops += len(slots)
        return slots

    def _failed(self, started: Started) -> None:
        self.stats.failed += 1
        self._failures[started.layer, started.expert] = time.monotonic(), started.problem
        log.error("expert %d of layer %d cannot be started: %s", started.expert, started.layer, started.problem)
        resident = self._index[started.layer], started.expert
        self._residency.gone(*resident)
        self._free.append(self._slot.pop(resident))
        self._slots.free(self._free[-1])
        self._hold()

    def _count(self, started: Started) -> None:
        self._failures.pop((started.layer, started.expert), None)
        self._residency.loaded(self._index[started.layer], started.expert, time.monotonic())
        self.stats.starts["warm" if started.warm else "cold"] += 1
        self.stats.start_bytes += started.nbytes
        self.stats.start_s += started.seconds
