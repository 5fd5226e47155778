"""Tables of a_max: activated experts on the busiest instance, by layer, number of expert instances and rows.

By Monte Carlo (JANUS, arXiv 2512.13525, section 3.5): rows are drawn from recorded routing, placed and scheduled as a
mesh would do it, and counted. Placements are made from one half of the rows and judged by the other. The paper's bound
of appendix A stands in where nothing was recorded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.activation import schedule_activations
from shared.elastic.eplb import homes_of_replicas, rebalance_experts
from shared.errors import ConfigError
from shared.placement.homes import Masks, to_masks
from shared.placement.replacement import fresh
from shared.planning.routing import Ids, Routing
from shared.scheduling.policies import Policy

Floats = NDArray[np.float64]
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Rows of an exchange. Small ones lie close: that is where a_max grows."""
SAMPLES = 24
"""Exchanges for each cell."""
WINDOW, WINDOW_ROWS = 64, 64
"""What a placement is made from: so many exchanges of so many rows."""
FINE = 16
"""Up to so many instances, and for this many more than the fewest, every number is tried; beyond, steps grow."""
FORMAT = 2
BOUND = "bound"
"""In place of a policy."""

Show = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Amax:
    """Means of a_max; between the rows of the table it is a line."""

    about: str
    policy: str
    experts: int
    """Of a layer,"""
    top_k: int
    """and of a row."""
    slots: int
    """Replicas of a layer per instance."""
    layers: tuple[int, ...]
    """Checkpoint indices; empty: one layer stands for all."""
    first: int
    """Instances of the first entry; the others have one more each."""
    batches: Floats
    """[N], ascending."""
    values: Floats
    """[layers, instances, N]; grows with rows, but not faster than they do, and never with instances."""

    @property
    def most(self) -> int:
        """Instances of the last entry."""
        return self.first + self.values.shape[1] - 1

    def look(self, instances: Floats, rows: Floats) -> Floats:
        """a_max [layers, n] of so many instances [n] and rows [n]. Instances must be in the table."""
        at = np.asarray(instances, np.int64) - self.first
        high = np.clip(np.searchsorted(self.batches, rows), 1, len(self.batches) - 1)
        low_b, high_b = self.batches[high - 1], self.batches[high]
        share = np.clip((rows - low_b) / (high_b - low_b), 0.0, 1.0)
        return self.values[:, at, high - 1] * (1 - share) + self.values[:, at, high] * share

    def weights(self, moe_layers: int) -> Floats:
        """How many of the model's layers each layer of the table stands for, [layers]."""
        count = self.values.shape[0]
        return np.bincount(np.arange(moe_layers) * count // moe_layers, minlength=count).astype(np.float64)


def monte_carlo(
    routing: Routing,
    slots: int,
    most: int,
    policy: Policy = Policy.ACTIVATED,
    seed: int = 0,
    show: Show = lambda _: None,
) -> Amax:
    """Tables for every number of instances from the fewest that hold every expert up to ``most``.

    Args:
        slots: replicas of a layer per instance; see ``homes_for`` for where they are.
        policy: of replica choice.
        show: is told the share that is done.

    Raises:
        ValueError: ``most`` instances do not hold every expert.
    """
    first = -(-routing.experts // slots)
    if first > most:
        raise ValueError(f"{most} instances with {slots} slots cannot hold {routing.experts} experts")
    grid = instances_grid(first, most)
    values = np.empty((len(routing.rows), len(grid), len(BATCHES)))
    for layer, ids in enumerate(routing.rows):
        rng = np.random.default_rng([seed, layer])
        seen, judged = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        window = [sample(seen, WINDOW_ROWS, rng) for _ in range(WINDOW)]
        exchanges = [[sample(judged, rows, rng) for _ in range(SAMPLES)] for rows in BATCHES]
        for i, instances in enumerate(grid):
            homes = homes_for(policy, window, routing.experts, instances, slots)
            values[layer, i] = [mean_a_max(batch, homes, instances, policy) for batch in exchanges]
            show((layer * len(grid) + i + 1) / values[:, :, 0].size)
    every = np.arange(first, most + 1)
    dense = np.apply_along_axis(lambda known: np.interp(every, grid, known), 1, values)
    rows, top_k = np.array(BATCHES, np.float64), routing.rows[0].shape[1]
    values = tidy(dense, rows)
    return Amax(routing.about, policy.value, routing.experts, top_k, slots, routing.layers, first, rows, values)


def instances_grid(first: int, most: int) -> list[int]:
    """For which numbers of instances tables are computed; what lies between is interpolated."""
    grid = [first]
    while grid[-1] < most:
        step = 1 if grid[-1] < max(FINE, first + FINE // 2) else max(2, grid[-1] // 8)
        grid.append(min(most, grid[-1] + step))
    return grid


def homes_for(policy: Policy, window: Sequence[Ids], experts: int, instances: int, slots: int) -> Masks:
    """Homes uint64 [E] as whoever chooses replicas by this policy would place them, from a window of exchanges.

    Activation scheduling: by activation and co-activation. Others: by tokens, as EPLB does, and in order where there is
    just one home for each expert.
    """
    if policy is Policy.ACTIVATED:
        return to_masks(fresh(*observe(window, experts), instances, slots))
    if policy is Policy.FIRST:
        return np.uint64(1) << (np.arange(experts) * instances // experts).astype(np.uint64)
    weight = np.bincount(np.concatenate(window).ravel(), minlength=experts).astype(np.float64)
    return homes_of_replicas(rebalance_experts(weight[None], instances * slots, 1, 1, instances), instances, experts)[0]


def observe(window: Sequence[Ids], experts: int) -> tuple[Floats, Floats]:
    """What a window of exchanges tells: activity [E] and co-activation [E, E], as shares of the exchanges."""
    active = np.zeros((len(window), experts))
    for row, ids in zip(active, window, strict=True):
        row[ids.ravel()] = 1
    return active.mean(axis=0), active.T @ active / len(window)


def sample(rows: Ids, count: int, rng: np.random.Generator) -> Ids:
    """Rows of one exchange [count, k]: requests are independent of each other, so any rows may meet."""
    return rows[rng.integers(len(rows), size=count)]


def mean_a_max(exchanges: Sequence[Ids], homes: Masks, instances: int, policy: Policy = Policy.ACTIVATED) -> float:
    """Mean of the largest number of distinct experts that any instance activates."""
    live = (1 << instances) - 1
    return float(np.mean([schedule_activations(ids, homes, live, policy).activated.max() for ids in exchanges]))


def bound(experts: int, top_k: int, instances: Floats, rows: Floats) -> Floats:
    """The paper's bound (appendix A) for experts that are all alike, each with one home, before it is rounded up.

    Of C experts of an instance a = C (1 - (1 - K/E)^B) are activated on average, and
    a_max <= min(C, a + sqrt(2 a ln n) + 1). More homes only lower a_max.
    """
    held = np.ceil(experts / instances)
    mean = held * (1 - (1 - top_k / experts) ** rows)
    return np.minimum(held, mean + np.sqrt(2 * mean * np.log(instances)) + 1)


def bound_table(experts: int, top_k: int, slots: int, most: int) -> Amax:
    """Tables of the bound, for models of which no routing was recorded."""
    first = -(-experts // slots)
    every, rows = np.arange(first, most + 1, dtype=np.float64), np.array(BATCHES, np.float64)
    values = bound(experts, top_k, every[:, None], rows[None])
    about = "the bound for experts that are all alike"
    return Amax(about, BOUND, experts, top_k, slots, (), first, rows, tidy(values[None], rows))


def tidy(values: Floats, rows: Floats) -> Floats:
    """Take the noise out of means [..., instances, N]: more rows never activate fewer experts, nor more per row; more
    instances never have a larger a_max, for one of them could stay idle."""
    values = np.maximum.accumulate(np.minimum.accumulate(values, axis=-2), axis=-1)
    return np.minimum.accumulate(values / rows, axis=-1) * rows


def save(table: Amax, file: Path) -> None:
    """Write a table; ``load`` reads it."""
    names = ("about", "policy", "experts", "top_k", "slots", "first")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        np.savez_compressed(
            out,
            format=FORMAT,
            layers=np.array(table.layers, np.int64),
            batches=table.batches,
            values=table.values,
            **{name: getattr(table, name) for name in names},
        )  # pyright: ignore[reportArgumentType]


def load(file: Path) -> Amax:
    """Raises ConfigError for a file that is no table, OSError when it cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as found:
            if int(found["format"]) != FORMAT:
                raise ConfigError("--tables", f"{file}: format {found['format']}, this program reads {FORMAT}")
            return Amax(
                str(found["about"]), str(found["policy"]), int(found["experts"]), int(found["top_k"]),
                int(found["slots"]), tuple(map(int, found["layers"])), int(found["first"]), found["batches"],
                found["values"],
            )  # fmt: skip
    except (KeyError, ValueError, EOFError) as error:
        raise ConfigError("--tables", f"{file}: not a table of a_max ({error})") from error
