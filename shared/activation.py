"""What both sides of an exchange must agree on: replica choice, its digest, and the parts a reply carries.

Pure functions of arrays, the same on every process and for any number of threads; an instance is its bit in the
placement. How replicas are chosen is in shared/scheduling; sending and waiting are elsewhere
(services/attention/exchange.py, services/experts/server.py).
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.errors import MoemeshError
from shared.messages import Placement
from shared.scheduling.kernels import ACTIVATED, BAD_ID, DONE, INSTANCES, choose
from shared.scheduling.policies import Policy

PARTS = np.dtype([("token", "<u4"), ("expert", "<u4"), ("weight", "<f4")])
"""One part: row of the exchange, logical expert, gate weight. The meta of a COMBINE frame is an array of them."""

PROBLEMS = ("", "a part names a row or expert that does not exist", "an expert was computed where it has no home",
            "a row has more parts than chosen experts", "a part came twice", "a row lacks parts")  # fmt: skip
"""What can be wrong with the replies to an exchange."""
INCOMPLETE = 5

_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_SHIFT = np.uint64(32)


class Parts(NamedTuple):
    """P parts, in ascending order of (expert, token)."""

    tokens: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    """The gate's."""


class Choice(NamedTuple):
    """What replica choice depends on beside the top-k ids, and whose parts are wanted."""

    homes: NDArray[np.uint64]
    """[experts], bit i set: instance i is a home."""
    live: int
    """Mask of the instances that take part."""
    instance: int
    policy: Policy = Policy.ACTIVATED


class NoLiveHome(MoemeshError):
    """The live mask leaves a chosen expert without a home."""

    def __init__(self, expert: int) -> None:
        super().__init__(f"expert {expert} has no live home")
        self.expert = expert


def mesh_hash(mesh: str, digest: str) -> int:
    """64-bit name of a mesh and its model, for frame headers; ``digest`` is the model digest."""
    return int.from_bytes(hashlib.blake2b(f"{mesh}\0{digest}".encode(), digest_size=8).digest(), "little")


def layer_homes(placement: Placement) -> dict[int, NDArray[np.uint64]]:
    """Layer index -> homes uint64 [experts]. Raises ValueError when the table has not the promised size."""
    table = np.frombuffer(placement.homes, dtype="<u8")
    shape = (len(placement.moe_layers), placement.experts)
    if table.size != shape[0] * shape[1]:
        raise ValueError(f"placement {placement.version} holds {table.size} masks, expected {shape[0]} x {shape[1]}")
    return dict(zip(placement.moe_layers, table.reshape(shape).astype(np.uint64), strict=True))


class Schedule(NamedTuple):
    """Who computes what in an exchange."""

    replicas: NDArray[np.int32]
    """[T, k]: the instance of every choice."""
    activated: NDArray[np.int32]
    """[instances, up to the highest live one]: how many distinct experts each one activates; the maximum is a_max."""


def schedule_activations(
    ids: NDArray[np.int32], homes: NDArray[np.uint64], live: int, policy: Policy = Policy.ACTIVATED
) -> Schedule:
    """Which instance computes each choice. The default policy is JANUS's activation scheduling, made optimal.

    Every activated expert goes as a whole to one live home: experts with the fewest live homes first, then the
    lowest id, each to the host with the fewest activated experts so far, ties to the lowest instance. Then chains of
    moves out of the most loaded instance, until none lowers the number of instances with that load.

    Args:
        ids: int32 [T, k], chosen experts.
        homes: uint64 [E], bit i set: instance i is a home.
        live: mask of the instances that take part.
        policy: another one, for comparison.

    Raises:
        NoLiveHome: an activated expert has no live home.
        ValueError: an id is not in 0..E-1.
    """
    replicas, load = np.empty(ids.shape, np.int32), np.empty(INSTANCES, np.int32)
    refuse(choose(policy.code, ids, homes, np.uint64(live), replicas, load), len(homes))
    return Schedule(replicas, load[: live.bit_length()])


def compile_choice() -> None:
    """Compile what ``schedule_activations`` runs, or load it from the cache on disk."""
    schedule_activations(np.zeros((1, 1), np.int32), np.ones(1, np.uint64), live=1)


def choose_replicas(
    ids: NDArray[np.int32], homes: NDArray[np.uint64], live: int, policy: Policy = Policy.ACTIVATED
) -> NDArray[np.int32]:
    """The replicas of ``schedule_activations``: int32 [T, k], instance index per choice."""
    return schedule_activations(ids, homes, live, policy).replicas


def refuse(code: int, experts: int) -> None:
    """Raise what ``choose`` has found wrong."""
    if code == BAD_ID:
        raise ValueError(f"expert ids must be in 0..{experts - 1}")
    if code >= 0:
        raise NoLiveHome(code)


def exchange_digest(ids: NDArray[np.int32], replicas: NDArray[np.int32]) -> int:
    """64-bit digest of the top-k ids and the replica choice of a whole exchange (both int32 [T, k])."""
    return int(_digest(ids, replicas))


def plan_exchange(ids: NDArray[np.int32], weights: NDArray[np.float32], choice: Choice) -> tuple[Parts, int]:
    """``schedule_activations``, then ``own_parts`` of an instance and ``exchange_digest``, in one compiled call."""
    homes, live, instance, policy = choice
    code, digest, tokens, experts, own = plan(ids, weights, homes, np.uint64(live), instance, policy.code)
    refuse(code, len(homes))
    return Parts(tokens, experts, own), int(digest)


def own_parts(
    ids: NDArray[np.int32], replicas: NDArray[np.int32], weights: NDArray[np.float32], instance: int
) -> Parts:
    """The parts that ``instance`` computes. ids, replicas int32 [T, k], weights fp32 [T, k]."""
    return Parts(*_own(ids, replicas, weights, instance))


def sum_order(parts: Parts, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """int32 of ``shape`` [T, k]: where the parts of each row lie, in ascending order of experts: that of their sum.

    ``parts`` are all of an exchange: exactly k of every row.
    """
    index = np.empty(shape, np.int32)
    _by_row(parts.tokens, index)
    return index


def write_parts(
    meta: NDArray[np.uint8],
    tokens: NDArray[np.int32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> None:
    """Store P parts as PARTS in ``meta``, uint8 [12 * P]."""
    parts = meta.view(PARTS)
    parts["token"] = tokens
    parts["expert"] = experts
    parts["weight"] = weights


@njit(cache=True, nogil=True)
def _digest(ids, replicas):  # noqa: ANN001, ANN202
    """FNV-1a over 64-bit words, then the finaliser of MurmurHash3 to spread the last ones."""
    h = (_FNV_OFFSET ^ np.uint64(ids.shape[1])) * _FNV_PRIME
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            word = (np.uint64(ids[t, j]) << _SHIFT) | np.uint64(np.uint32(replicas[t, j]))
            h = (h ^ word) * _FNV_PRIME
            h ^= h >> _SHIFT
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return h ^ (h >> np.uint64(33))


@njit(cache=True, nogil=True)
def _own(ids, replicas, weights, instance):  # noqa: ANN001, ANN202
    """A stable counting sort of this instance's choices by expert."""
    starts = np.zeros(ids.max() + 2 if ids.size else 1, np.int64)
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if replicas[t, j] == instance:
                starts[ids[t, j] + 1] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    parts = starts[-1]
    tokens, experts, own = np.empty(parts, np.int32), np.empty(parts, np.int32), np.empty(parts, np.float32)
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if replicas[t, j] == instance:
                p = starts[ids[t, j]]
                starts[ids[t, j]] += 1
                tokens[p], experts[p], own[p] = t, ids[t, j], weights[t, j]
    return tokens, experts, own


@njit(cache=True, nogil=True)
def plan(ids, weights, homes, live, instance, policy=ACTIVATED):  # noqa: ANN001, ANN201
    """(what ``choose`` returns, digest, tokens, experts, weights)"""
    replicas, load = np.empty(ids.shape, np.int32), np.empty(INSTANCES, np.int32)
    code = choose(policy, ids, homes, live, replicas, load)
    if code != DONE:
        ids, replicas = ids[:0], replicas[:0]
    tokens, experts, own = _own(ids, replicas, weights, instance)
    return code, _digest(ids, replicas), tokens, experts, own


@njit(cache=True, nogil=True)
def _by_row(tokens, index):  # noqa: ANN001, ANN202
    """Every row takes its parts in the order in which they come: they ascend by expert."""
    counts = np.zeros(len(index), np.int32)
    for p in range(len(tokens)):
        t = tokens[p]
        index[t, counts[t]] = p
        counts[t] += 1


@njit(cache=True, nogil=True)
def place_parts(parts, part_weights, reply, instance, homes, counts, experts, source, index, weights):  # noqa: ANN001, ANN201
    """Insert one reply's parts in ascending order of experts; returns a number of PROBLEMS.

    Args:
        parts, part_weights: the reply's PARTS, as uint32 and as fp32 [P, 3].
        reply, instance: its number, and the bit of who sent it.
        homes: uint64 [E].
        counts: int32 [T], how many parts each row has so far.
        experts, source, index, weights: [T, k], get each part's expert, reply, number there and weight.
    """
    for p in range(len(parts)):
        t, e = parts[p, 0], parts[p, 1]
        if t >= len(counts) or e >= len(homes):
            return 1
        if not (homes[e] >> np.uint64(instance)) & np.uint64(1):
            return 2
        j = counts[t]
        if j == experts.shape[1]:
            return 3
        while j > 0 and experts[t, j - 1] > e:
            experts[t, j], source[t, j] = experts[t, j - 1], source[t, j - 1]
            index[t, j], weights[t, j] = index[t, j - 1], weights[t, j - 1]
            j -= 1
        if j > 0 and experts[t, j - 1] == e:
            return 4
        experts[t, j], source[t, j], index[t, j], weights[t, j] = e, reply, p, part_weights[p, 2]
        counts[t] += 1
    return 0
