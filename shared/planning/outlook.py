"""What candidates would do under a demand: their batch, their times, their memory, and which limits they break. Pure.

Source: JANUS (arXiv 2512.13525), section 3.5: the batch is the fixed point B = rate x TPOT(B) of Little's law, found by
bisection. All times are sums, maxima and minima of terms that grow with B, but not faster than B does (``amax.tidy``
keeps tables so): TPOT(B) / B falls, and there is one fixed point at most.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.perf_model import Load, Step, first_token_seconds
from shared.planning.memory import attention_bytes, expert_bytes
from shared.planning.setting import (
    Demand,
    Floats,
    Mesh,
    Monolith,
    Outcome,
    Setting,
    Slo,
    load_of,
    mesh_step,
    monolith_step,
)

Ints = NDArray[np.int64]
MOST_BATCH = 1 << 16
"""Sequences of a mesh: a demand that needs more is too much."""
ROUNDS = 64
NEAR = 1e-10
"""Relative error of the batch that is small enough."""
LIMITS = ("rate", "memory", "TPOT", "TTFT")
"""What a plan can break."""
PARTS = Step._fields[1:]


class Outlook(NamedTuple):
    """Candidates [n] under a demand."""

    batch: Floats
    """Sequences in decode, of all units together."""
    rows: Floats
    """Of a step: one for each sequence, and those of prompts."""
    tpot: Floats
    """Seconds; of one step."""
    ttft: Floats
    """Seconds, mean."""
    memory: Floats
    """Of what may be planned with on the fullest instance with a cache, the share that is needed."""
    price: Floats
    throughput: Floats
    """Tokens per second."""
    parts: Floats
    """[PARTS, n], seconds of a step; what others hide is counted in full."""
    a_max: Floats
    way: Ints
    """Which of the setting's ways exchanges go."""
    excess: Floats
    """[LIMITS, n]: by which factor each limit is exceeded; at most 1: it is kept. Infinite: there is no keeping it."""

    @property
    def feasible(self) -> NDArray[np.bool_]:
        return np.asarray((self.excess <= 1 + 1e-9).all(axis=0))

    @property
    def cost(self) -> Floats:
        """What is to be smallest: price per token and second."""
        return self.price / self.throughput


def settle(seconds: Callable[[Floats, Ints], Floats], rate: float, count: int) -> Floats:
    """The batch [count] where ``rate`` x seconds(batch) = batch; 1 where less is asked, MOST_BATCH where too much.

    Bisection, in turns with the secant of the bracket's ends: times are nearly piecewise linear, so few rounds do.

    Args:
        seconds: batches and the numbers of the candidates that they are of -> seconds of a step.
    """
    every = np.arange(count)
    low, high = np.ones(count), np.full(count, float(MOST_BATCH))
    below, above = low - rate * seconds(low, every), high - rate * seconds(high, every)
    for turn in range(ROUNDS):
        left = np.flatnonzero((above > NEAR * high) & (below < 0) & (high - low > NEAR * high))
        if not left.size:
            break
        secant = low[left] - (high - low)[left] * below[left] / (above - below)[left]
        middle = np.clip(secant, low[left], high[left]) if turn % 2 == 0 else np.sqrt(low[left] * high[left])
        found = middle - rate * seconds(middle, left)
        enough = found >= -NEAR * middle
        up, down = left[enough], left[~enough]
        high[up], above[up] = middle[enough], found[enough]
        low[down], below[down] = middle[~enough], found[~enough]
    return np.where(below >= 0, 1.0, high)


def look_ahead(
    setting: Setting, candidates: Mesh | Monolith, demand: Demand, slo: Slo, batch: float | None = None
) -> Outlook:
    """The outlook of every candidate. ``batch``: it is given, and requests come as fast as it is served."""
    run = _runner(setting, candidates)
    count = len(candidates.devices)

    def seconds(sequences: Floats, order: Ints) -> Floats:
        return _runner(setting, candidates.at(order))(load_of(setting, demand, sequences)).step.seconds

    sequences = settle(seconds, demand.tokens, count) if batch is None else np.full(count, float(batch))
    load = load_of(setting, demand, sequences)
    outcome = run(load)
    tpot = outcome.step.seconds
    ttft = _first_tokens(run, demand, load, _caches(candidates))
    memory, limit = _memory(setting, candidates, demand, sequences)
    excess = np.stack([
        demand.tokens * tpot / sequences if batch is None else np.zeros(count),
        memory / limit,
        tpot / slo.tpot_s,
        ttft / slo.ttft_s if np.isfinite(slo.ttft_s) else np.where(np.isinf(ttft), np.inf, 0.0),
    ])  # fmt: skip
    throughput = np.full(count, demand.tokens) if batch is None else sequences / tpot
    price, parts = _price(setting, candidates), np.stack(outcome.step[1:])
    return Outlook(
        sequences, load.rows, tpot, ttft, memory / limit, price, throughput, parts, outcome.a_max, outcome.way, excess
    )


def joined(outlooks: Sequence[Outlook]) -> Outlook:
    """The outlook of all candidates, one after the other."""
    return Outlook._make(np.concatenate(arrays, axis=-1) for arrays in zip(*outlooks, strict=True))


def taken(outlook: Outlook, order: Ints) -> Outlook:
    """The outlook of some candidates."""
    return Outlook._make(array[..., order] for array in outlook)


def _runner(setting: Setting, candidates: Mesh | Monolith) -> Callable[[Load], Outcome]:
    """The step of all candidates under a load."""
    if isinstance(candidates, Mesh):
        return lambda load: mesh_step(setting, load, candidates)
    return lambda load: monolith_step(setting, load, candidates)


def _caches(candidates: Mesh | Monolith) -> Floats:
    """Instances with attention."""
    return candidates.attention if isinstance(candidates, Mesh) else candidates.devices


def _first_tokens(run: Callable[[Load], Outcome], demand: Demand, load: Load, instances: Floats) -> Floats:
    """TTFT, [n], as if every instance carried a chunk as long as the prompt takes."""
    chunks = np.maximum(load.prefill, min(demand.prompt, demand.chunk) * instances)
    full = run(load._replace(prefill=chunks)).step.seconds
    return first_token_seconds(full, demand.prompt, demand.chunk, load.prefill / (demand.chunk * instances))


def _memory(setting: Setting, candidates: Mesh | Monolith, demand: Demand, sequences: Floats) -> tuple[Floats, Floats]:
    """(needed, there) on the fullest instance with a cache, [n]; in a monolith experts lie beside it."""
    made_of = setting if isinstance(candidates, Mesh) else setting.monolith or setting
    mine = np.maximum(1.0, sequences / _caches(candidates))
    needed = attention_bytes(made_of.sizes, mine, demand.context, mine + demand.chunk)
    if isinstance(candidates, Monolith):
        needed = needed + expert_bytes(made_of.sizes, np.ceil(made_of.sizes.experts / candidates.size))
    return needed, np.full_like(mine, made_of.room.attention_bytes)


def _price(setting: Setting, candidates: Mesh | Monolith) -> Floats:
    if isinstance(candidates, Mesh):
        return candidates.attention * setting.attention_price + candidates.experts * setting.expert_price
    return candidates.devices * (setting.monolith or setting).attention_price
