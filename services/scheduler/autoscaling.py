"""How large the pools should be for what is asked of them, and when to change them. Pure.

Sizes are planned for the rate that is expected (JANUS, arXiv 2512.13525, section 3.5), with the model's error corrected
by what was measured. A pool grows as soon as it should, and shrinks when less has been enough for a cool-down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from services.scheduler.traffic import Observed
from shared.messages import AttentionFacts, Pool
from shared.planning.deciding import HEADROOM, LEAST_RATE, Unservable, nearest
from shared.planning.here import Choice
from shared.planning.setting import Demand, Slo

A, E = Pool.ATTENTION, Pool.EXPERTS
Sizes = Mapping[Pool, int]
Offs = Mapping[tuple[int, int], float]
"""Measured over predicted times per token, by (attention, expert) instances: models err in different ways, and what two
sizes have in turns must not send the pools to and fro."""
AIM = 0.9
"""Share of the time per token that is planned with: plans are for means, and batches vary."""
LEAST_OFF, MOST_OFF = 0.5, 4.0
"""Between which a measured time over a predicted one is believed."""
GAIN, FADE = 0.1, 1 / 120
"""How much of a new measurement counts, each second, and how much of what other sizes had beyond it is forgiven."""
ENOUGH, ENOUGH_FIRST = 32, 8
"""Tokens, and first tokens, that a measurement takes."""


class Model(Protocol):
    """What is known of this mesh's speed."""

    @property
    def fewest(self) -> int:
        """Expert instances that hold every expert."""
        ...

    def choose(self, demand: Demand, slo: Slo, seats: int) -> Choice:
        """The fewest instances that keep the limits, with so many sequences on an attention instance at most."""
        ...

    def tpot(self, sizes: Sizes, batch: float, demand: Demand) -> float:
        """Seconds per token of so many sequences in decode, all together; only the lengths of a demand matter."""
        ...


@dataclass(frozen=True)
class Rules:
    """What a person has asked for."""

    least: Sizes
    most: Sizes
    slo: Slo
    window_s: float
    cooldown_s: float
    idle_s: float
    """After so long without a request the expert pool may go to none, if ``least`` allows that."""

    def within(self, sizes: Sizes) -> dict[Pool, int]:
        return {pool: min(max(size, self.least[pool]), self.most[pool]) for pool, size in sizes.items()}


@dataclass(frozen=True)
class Look:
    """What is so at a moment."""

    now: float
    """Clock time, in seconds."""
    sizes: Sizes
    rate: float
    """Requests per second that are expected."""
    lately: Observed
    """For lengths."""
    steady: Observed
    """As short a time ago as possible, and with these sizes: for times."""
    idle_s: float
    seats: int
    """Sequences that an attention instance holds."""

    @property
    def demand(self) -> Demand:
        """What is expected: no fewer tokens than are sent now."""
        lately = self.lately
        rate = max(LEAST_RATE, HEADROOM * self.rate, lately.tokens_per_s / lately.output)
        return Demand(rate, lately.prompt, lately.output)

    @property
    def quiet(self) -> bool:
        """Nobody asks, and nobody waits."""
        return not (self.rate or self.lately.open)


@dataclass(frozen=True)
class Need:
    """Sizes that would be right at a time."""

    at: float
    sizes: Sizes
    why: str
    tpot_s: float = 0.0
    """That is planned with; 0: nothing was planned."""


def needed(look: Look, rules: Rules, model: Model, offs: Offs) -> Need:
    """Sizes for what is expected; those that there are, with experts at least, where no size keeps the limits."""
    none = rules.least[E] == 0 and (look.idle_s >= rules.idle_s or look.sizes[E] == 0)
    if look.quiet and none:
        return Need(look.now, rules.within({A: 1, E: 0}), f"nobody has asked for {look.idle_s:.0f} s")
    if look.quiet:
        return Need(look.now, rules.within({A: 1, E: max(1, model.fewest)}), "nobody asks")
    off = offs.get(_key(look.sizes), 1.0)
    try:
        need = _planned(look, rules, model, off)
        known = offs.get(_key(need.sizes), off)
        return _planned(look, rules, model, known) if known > off else need
    except Unservable as error:
        return Need(look.now, rules.within({**look.sizes, E: max(look.sizes[E], 1, model.fewest)}), str(error))


def _planned(look: Look, rules: Rules, model: Model, off: float) -> Need:
    """Raises Unservable."""
    demand = caught_up(look, rules)
    slo = replace(rules.slo, tpot_s=rules.slo.tpot_s * AIM / off)

    def choice(rate: float) -> Choice:
        return model.choose(replace(demand, rate=rate), slo, look.seats)

    first = choice(demand.rate)
    plan = first.plan or nearest(lambda rate: choice(rate).plan, demand.rate)
    sizes = {A: plan.attention, E: max(1, plan.experts)}
    what = f"{look.rate:.3g} requests/s of {demand.prompt:.0f} + {demand.output:.0f} tokens are expected"
    why = f"{plan.name}; {first.why}" if first.plan else f"more than can be served in time: {first.why}"
    return Need(look.now, rules.within(sizes), f"{what}: {why}", plan.tpot_s * off)


def caught_up(look: Look, rules: Rules) -> Demand:
    """What is expected, and those who are more than may be open, served within a window: else they stay for long."""
    demand = look.demand
    late = max(0.0, look.lately.open - demand.rate * demand.output * rules.slo.tpot_s)
    return replace(demand, rate=demand.rate + late / rules.window_s)


def pressed(look: Look, rules: Rules, model: Model) -> Need | None:
    """One instance more than there are, when times are beyond their limits whatever the model says."""
    measured = look.steady.inter
    if look.steady.seconds < rules.window_s:
        return None
    if measured.count >= ENOUGH and measured.mean > rules.slo.tpot_s:
        why = f"{measured.mean * 1e3:.0f} ms per token were measured, {rules.slo.tpot_s * 1e3:.0f} are allowed"
        return Need(look.now, _one_more(look, rules, model), why, measured.mean)
    first = look.steady.first
    if first.count >= ENOUGH_FIRST and first.mean > rules.slo.ttft_s:
        more = rules.within({**look.sizes, A: look.sizes[A] + 1})
        why = f"first tokens took {first.mean * 1e3:.0f} ms, {rules.slo.ttft_s * 1e3:.0f} are allowed"
        return Need(look.now, more, why, measured.mean)
    return None


def _one_more(look: Look, rules: Rules, model: Model) -> dict[Pool, int]:
    """In the pool where it helps most, as far as that may grow."""
    batch = decoding(look.steady)
    options = [rules.within({**look.sizes, pool: look.sizes[pool] + 1}) for pool in Pool]
    return min(options, key=lambda sizes: (sizes == look.sizes, model.tpot(sizes, batch, look.demand)))


def decoding(observed: Observed) -> float:
    """Sequences in decode, mean (Little's law): those that wait for their first token are not among them."""
    return max(1.0, observed.tokens_per_s * observed.inter.mean)


def corrected(offs: Offs, look: Look, model: Model) -> Offs:
    """After one more look. Sizes that are new begin with what the others had."""
    mine = _key(look.sizes)
    before = offs.get(mine, max(offs.values(), default=1.0))
    measured = look.steady.inter
    if not (look.sizes[A] and look.sizes[E]):
        return offs
    if measured.count < ENOUGH:
        return {**offs, mine: before}
    now = measured.mean / model.tpot(look.sizes, decoding(look.steady), look.demand)
    after = before + GAIN * (min(max(now, LEAST_OFF), MOST_OFF) - before)
    return {key: off - FADE * max(0.0, off - after) for key, off in offs.items()} | {mine: after}


def _key(sizes: Sizes) -> tuple[int, int]:
    return sizes[A], sizes[E]


def remembered(needs: Sequence[Need], need: Need, cooldown_s: float) -> list[Need]:
    """Needs of the cool-down, oldest first, with one that is older if there is any."""
    kept = [*needs, need]
    first = next((i for i in range(len(kept) - 1, -1, -1) if need.at - kept[i].at >= cooldown_s), 0)
    return kept[first:]


def target(needs: Sequence[Need], sizes: Sizes, cooldown_s: float) -> dict[Pool, int]:
    """Pools to change, with their new sizes: at once to what is needed now, down to the most of a whole cool-down."""
    latest = needs[-1].sizes
    wanted = {pool: latest[pool] for pool in sizes if latest[pool] > sizes[pool]}
    if needs[-1].at - needs[0].at < cooldown_s:
        return wanted
    most = {pool: max(need.sizes[pool] for need in needs) for pool in sizes}
    return wanted | {pool: size for pool, size in most.items() if size < sizes[pool]}


def seats(instances: Sequence[AttentionFacts], tokens: float) -> int:
    """Sequences of so many tokens that the smallest attention instance holds; at least 1."""
    held = [min(f.max_num_seqs, int(f.kv_blocks * f.block_size // max(1.0, tokens))) for f in instances]
    return max(1, min(held, default=64))
