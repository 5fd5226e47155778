"""How long a step of a mesh takes, from the coefficients of its devices. Pure; numbers or arrays of candidates [n].

Source: JANUS (arXiv 2512.13525), section 3.5: T_attn = max(c_a, alpha b + c_kv b S), T_moe = beta a_max + c_e, and the
time per output token is the sum of attention, exchange and experts over all layers. What the paper leaves out and is
here: shared experts beside the exchange, layers without experts, the head, rows of prompts, experts that are bound by
arithmetic, two micro-batches in turns, and what instances cost each other on a host that they share. DeviceProfile
holds the coefficients; what waits for them is in shared/pace.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.device_profile import DeviceProfile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """One model on one kind of device for each pool: two profiles, and what they have no figures for."""

    attention: DeviceProfile
    experts: DeviceProfile
    layers: int
    moe_layers: int
    prefill_position_s: float
    """Per row of a prompt and position: such rows read the cache together. Decode has ``attention_position_s``."""
    dense_s: float = 0.0
    """Feed-forward of a layer without experts: at least,"""
    dense_row_s: float = 0.0
    """and per row."""
    expert_row_s: float = 0.0
    """Arithmetic of one row in one expert; where that takes longer than reading weights, it counts instead."""
    part_s: float = 0.0
    """The same where it comes on top of reading, as on CPUs."""
    reading: tuple[tuple[float, float], ...] = ()
    """(instances, seconds per activated expert), ascending, where expert instances divide a host's memory and cores; a
    line between them. Empty: ``experts.expert_s``, however many there are."""
    member_s: float = 0.0
    """Per step and attention instance beside the first one: members of a group wait for each other."""
    token_s: float = 0.0
    """Per step and sequence of all instances: what the gateway and others do on the cores that they share."""


class Load(NamedTuple):
    """Rows of one step of all attention instances together, [n]."""

    decode: Floats
    """One for each sequence (B)."""
    prefill: Floats
    """Of prompts."""
    context: float
    """Positions that a row of decode attends to, mean (S)."""
    prefill_context: float

    @property
    def rows(self) -> Floats:
        return self.decode + self.prefill

    def part(self, share: float) -> "Load":
        """A micro-batch."""
        return self._replace(decode=self.decode * share, prefill=self.prefill * share)


class Times(NamedTuple):
    """Of a layer with experts and one micro-batch: seconds [n]; ``experts`` is [L, n], by layer."""

    attention: Floats
    shared: Floats
    experts: Floats
    exchange: Floats


class Step(NamedTuple):
    """One step: seconds [n], all of it and where they go. Parts that others hide are counted in full."""

    seconds: Floats
    attention: Floats
    """Layers without experts included."""
    shared: Floats
    experts: Floats
    exchange: Floats
    head: Floats


def own_rows(rows: Floats, instances: Floats) -> Floats:
    """Rows of one attention instance, divided evenly: the fullest has at least one."""
    return np.maximum(1.0, rows / instances)


def attention_seconds(costs: Costs, load: Load, instances: Floats) -> Floats:
    """T_attn of one layer, [n]."""
    profile, rows = costs.attention, own_rows(load.rows, instances)
    decode = rows * load.decode / load.rows
    positions = decode * load.context * profile.attention_position_s
    positions = positions + (rows - decode) * load.prefill_context * costs.prefill_position_s
    return np.maximum(profile.attention_floor_s, rows * profile.attention_row_s + positions)


def experts_seconds(costs: Costs, a_max: Floats, choices: Floats, instances: Floats) -> Floats:
    """T_moe [..., n] of the busiest instance.

    Args:
        a_max: [..., n], experts that it activates.
        choices: [n], rows that its experts compute, all of them together.
        instances: of experts, [n].
    """
    reading = beta(costs, instances) * a_max
    return costs.experts.experts_s + np.maximum(reading, costs.expert_row_s * choices) + costs.part_s * choices


def beta(costs: Costs, instances: Floats) -> Floats:
    """Seconds per activated expert, [n]."""
    if not costs.reading:
        return np.full_like(instances, costs.experts.expert_s)
    return np.interp(instances, *np.transpose(costs.reading))


def shared_seconds(costs: Costs, rows: Floats) -> Floats:
    """Shared experts of one layer on an instance with so many rows."""
    return costs.attention.shared_s + costs.attention.shared_row_s * rows


def head_seconds(costs: Costs, rows: Floats) -> Floats:
    """Logits of so many rows on one instance, once per step."""
    return costs.attention.head_s + costs.attention.head_row_s * rows


def shared_host_seconds(costs: Costs, sequences: Floats, instances: Floats) -> Floats:
    """What attention instances cost each other, once per step."""
    return costs.member_s * (instances - 1) + costs.token_s * sequences


def in_turn(times: Times) -> Floats:
    """Seconds of one layer [L, n]: shared experts run while the exchange is open."""
    return times.attention + np.maximum(times.shared, times.exchange + times.experts)


def ping_pong(half: Times) -> Floats:
    """Seconds of one layer [L, n] for two micro-batches that take turns, from the times of one.

    Whoever is busiest sets the pace: attention, experts, the links, or one micro-batch's own way round
    (MegaScale-Infer, arXiv 2504.02263, section 4.1, for two).
    """
    busy = np.maximum(2 * (half.attention + half.shared), 2 * half.experts)
    return np.maximum(np.maximum(busy, half.exchange), half.attention + half.exchange + half.experts)


def step(costs: Costs, load: Load, instances: Floats, parts: Times, stands_for: Floats, micro_batches: int = 1) -> Step:
    """One step of ``micro_batches`` (1 or 2) parts.

    Args:
        instances: of attention, [n].
        parts: times of one of the parts.
        stands_for: [L], how many of the model's layers each of those in ``parts`` stands for.
    """
    layers = in_turn(parts) if micro_batches == 1 else ping_pong(parts)
    dense = costs.layers - costs.moe_layers
    rows = own_rows(load.rows, instances)
    outer = attention_seconds(costs, load, instances) + np.maximum(costs.dense_s, costs.dense_row_s * rows)
    head = head_seconds(costs, own_rows(load.decode, instances)) + shared_host_seconds(costs, load.decode, instances)
    attention = micro_batches * costs.moe_layers * parts.attention + dense * outer
    return Step(
        stands_for @ layers + dense * outer + head,
        attention,
        micro_batches * costs.moe_layers * parts.shared,
        micro_batches * stands_for @ parts.experts,
        micro_batches * costs.moe_layers * parts.exchange,
        head,
    )


def first_token_seconds(step_s: Floats, prompt: float, chunk: float, load: Floats) -> Floats:
    """Mean time to the first token, [n]: half a step until the next one begins, a wait for prompts that came before,
    and the steps that the prompt takes. A queue with Poisson arrivals and even service (M/D/1); infinite when
    overloaded.

    Args:
        step_s: of a step that carries a whole chunk, [n].
        prompt: tokens.
        chunk: tokens of prompts that an instance computes in a step.
        load: share of all chunks' room that prompts need, [n].
    """
    steps = np.ceil(prompt / chunk)
    busy = np.minimum(load, 1 - 1e-9)
    wait = busy / (2 * (1 - busy)) * prompt / chunk
    return np.where(load < 1, step_s * (0.5 + wait + steps), np.inf)
