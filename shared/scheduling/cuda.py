"""Replica choice on CUDA, without a copy to the host: the policy "activated", with the results of kernels.py.

Three Triton kernels: the union of the activated experts, the choice in one program of one warp, and the rewriting of
the choices. Needs Triton, which CUDA builds of torch bring along; import this module only where it is used.
"""
# ruff: noqa: ANN001, ANN202 - Triton infers the types
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.scheduling.kernels import INSTANCES

BLOCK = 1024
"""Choices per program of the parallel kernels."""


class DeviceSchedule(NamedTuple):
    """Tensors on the device of the ids; valid when ``status`` is DONE."""

    replicas: Tensor
    """int32 [T, k]: the instance of every choice."""
    activated: Tensor
    """int32 [64]: distinct experts that each instance activates."""
    status: Tensor
    """int32 [1]: DONE, BAD_ID, or the lowest activated expert without a live home, as in kernels.py."""


def schedule_on_device(ids: Tensor, homes: Tensor, live: int) -> DeviceSchedule:
    """Choose a replica for every choice. Launches only: nothing waits for the device.

    Args:
        ids: int32 [T, k] contiguous, chosen experts.
        homes: int64 [E] on the same device, the bits of the uint64 masks.
        live: mask of the instances that take part.
    """
    experts = homes.numel()
    marks = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)  # the last one: an id is out of range
    chosen = torch.empty(experts, dtype=torch.int32, device=ids.device)
    result = DeviceSchedule(torch.empty_like(ids), chosen.new_empty(INSTANCES), chosen.new_empty(1))
    blocks = (triton.cdiv(max(1, ids.numel()), BLOCK),)
    signed = live - (1 << 64) if live >> 63 else live
    _mark[blocks](ids, marks, ids.numel(), experts, BLOCK)
    size = max(32, triton.next_power_of_2(experts))
    _balance[(1,)](marks, homes, signed, chosen, result.activated, result.status, experts, size, INSTANCES, num_warps=1)
    _rewrite[blocks](ids, chosen, result.replicas, ids.numel(), experts, BLOCK)
    return result


@triton.jit
def _mark(ids, marks, count, experts, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    e = tl.load(ids + at, mask=at < count, other=0)
    good = (e >= 0) & (e < experts)
    tl.store(marks + tl.where(good, e, experts), 1, mask=at < count)


@triton.jit
def _rewrite(ids, chosen, replicas, count, experts, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    e = tl.load(ids + at, mask=at < count, other=0)
    good = (at < count) & (e >= 0) & (e < experts)
    tl.store(replicas + at, tl.load(chosen + e, mask=good, other=-1), mask=at < count)


@triton.jit
def _union(a, b):
    return a | b


@triton.jit
def _at(values, indices, index):
    """One element of a vector, as a scalar."""
    return tl.sum(tl.where(indices == index, values, 0))


@triton.jit
def _first(condition, indices, nothing: tl.constexpr):
    """The lowest index whose condition holds, else ``nothing``."""
    return tl.min(tl.where(condition, indices, nothing))


@triton.jit
def _count_bits(mask):
    """Of each int64, in parallel halves (Hacker's Delight 5-1)."""
    x = mask.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return (x & 0x7F).to(tl.int32)


@triton.jit
def _balance(marks, homes, live, chosen_out, activated, status, experts, size: tl.constexpr, instances: tl.constexpr):
    """The greedy and the chains of kernels.py; hosts and chosen [size] and load [instances] stay in registers."""
    e_all, i_all = tl.arange(0, size), tl.arange(0, instances)
    active = (tl.load(marks + e_all, mask=e_all < experts, other=0) != 0) & (e_all < experts)
    hosts = tl.where(active, tl.load(homes + e_all, mask=e_all < experts, other=0) & live, 0)
    orphan = _first(active & (hosts == 0), e_all, size)
    code = tl.where(tl.load(marks + experts) != 0, -2, tl.where(orphan < size, orphan, -1))
    tl.store(status + tl.arange(0, 1), code.to(tl.int32))

    chosen = tl.full((size,), -1, tl.int32)
    load = tl.zeros((instances,), tl.int32)
    keys = tl.where(hosts != 0, _count_bits(hosts) * size + e_all, 65 * size)
    key = tl.min(keys)
    while key < 65 * size:
        e = key % size
        mine = (_at(hosts, e_all, e) >> i_all) & 1
        i = tl.min(tl.where(mine != 0, load * instances + i_all, size * instances)) % instances
        chosen = tl.where(e_all == e, i, chosen)
        load = tl.where(i_all == i, load + 1, load)
        keys = tl.where(e_all == e, 65 * size, keys)
        key = tl.min(keys)

    helped = 1
    while helped != 0:
        highest = tl.max(load)
        top = _first(load == highest, i_all, instances)
        end = instances * 1
        came_from = tl.zeros((instances,), tl.int32)
        place = tl.where(i_all == top, 0, instances)  # in the queue of the search
        waiting = 1
        n = 0
        while (n < waiting) & (end == instances):
            source = _first(place == n, i_all, instances)
            reach = tl.reduce(tl.where(chosen == source, hosts, 0), 0, _union)
            fresh = (((reach >> i_all) & 1) != 0) & (place == instances)
            came_from = tl.where(fresh, source, came_from)
            end = _first(fresh & (load <= highest - 2), i_all, instances)
            place = tl.where(fresh, waiting + tl.cumsum(fresh.to(tl.int32), 0) - 1, place)
            waiting += tl.sum(fresh.to(tl.int32))
            n += 1
        helped = (end < instances).to(tl.int32)
        load += tl.where(helped != 0, (i_all == end).to(tl.int32) - (i_all == top).to(tl.int32), 0)
        while (helped != 0) & (end != top):
            source = _at(came_from, i_all, end)
            e = _first((chosen == source) & (((hosts >> end) & 1) != 0), e_all, size)
            chosen = tl.where(e_all == e, end, chosen)
            end = source

    tl.store(chosen_out + e_all, chosen, mask=e_all < experts)
    tl.store(activated + i_all, load)
