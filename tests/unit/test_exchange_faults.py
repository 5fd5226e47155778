"""Whatever happens to messages, an exchange gives the same bytes: delay, duplicate, reorder and drop, any kind."""

import time
from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.attention.pending import Pending
from shared.transport.base import FrameKind
from shared.transport.faults import Fault, Faults, Rates
from shared.transport.memory import MemoryNetwork
from tests.unit.toy_experts import HIDDEN, LAYERS, everywhere, make_placement, round_robin, toy_mesh

PLACES = [everywhere(1), everywhere(2), round_robin(2), round_robin(3), [[0], [1], [0, 1], [2, 1], [0, 1, 2], [2]]]
rates = st.builds(
    Rates,
    drop=st.sampled_from([0.0, 0.1, 0.3]),
    duplicate=st.sampled_from([0.0, 0.3, 0.9]),
    delay=st.sampled_from([0.0, 0.3]),
    reorder=st.sampled_from([0.0, 0.3, 0.9]),
)
patient = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def stormy(seed: int, chosen: Mapping[FrameKind, Rates]) -> MemoryNetwork:
    return MemoryNetwork(Faults(seed, chosen, longest=0.01))


@patient
@given(st.integers(0, 2**32), st.dictionaries(st.sampled_from(FrameKind), rates), st.sampled_from(PLACES))
def test_faults_change_no_byte(seed, chosen, homes):
    """Heartbeats arrive between steps, as in a mesh whose instances all live."""
    with toy_mesh(homes, stormy(seed, chosen), deadline=0.02, give_up=30.0) as mesh:
        for step in range(4):
            mesh.check(seed=seed + step, layer=LAYERS[step % 2], rows=1 + step)
            mesh.exchange.update(mesh.view(seen=time.monotonic()))


@patient
@given(st.integers(0, 2**32), rates, st.integers(0, 3))
def test_faults_during_a_placement_switch_change_no_byte(seed, chosen: Rates, loaded_after):
    """Refusals are struck too; instances learn the new version late."""
    network = stormy(seed, dict.fromkeys(FrameKind, chosen))
    with toy_mesh(round_robin(2), network, deadline=0.02, give_up=30.0) as mesh:
        second = make_placement([[1], [0], [1], [0, 1], [0], [1]], mesh.placement.instances, version=2)
        mesh.check(seed=seed)
        mesh.exchange.update(mesh.view(seen=time.monotonic(), placement=second))
        handle = mesh.exchange.dispatch(LAYERS[0], torch.zeros(2, HIDDEN))
        assert isinstance(handle, Pending)
        for _ in range(loaded_after):
            mesh.exchange._attempts._wait(handle)
        mesh.adopt(mesh.placement, second)
        mesh.exchange.update(mesh.view(seen=time.monotonic(), placement=second))
        mesh.check(seed=seed + 1)


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("kind", [FrameKind.HELLO, FrameKind.DISPATCH, FrameKind.COMBINE])
@pytest.mark.parametrize("homes", [everywhere(2), round_robin(2)], ids=["replicated", "sole"])
def test_each_fault_strikes_and_changes_no_byte(kind, fault, homes):
    """The first frame of a kind on every link meets the fault; nothing is random."""
    faults = Faults(schedule={(kind, 0): fault, (kind, 2): fault}, longest=0.05)
    with toy_mesh(homes, MemoryNetwork(faults), deadline=0.02, give_up=30.0) as mesh:
        for step in range(3):
            mesh.check(seed=step)
            mesh.exchange.update(mesh.view(seen=time.monotonic()))
        assert faults.counts[kind, fault] >= 1


def test_a_lost_refusal_is_asked_for_again():
    faults = Faults(schedule={(FrameKind.REFUSAL, 0): Fault.DROP})
    with toy_mesh(round_robin(2), MemoryNetwork(faults), deadline=0.02, give_up=30.0) as mesh:
        second = make_placement(round_robin(2), mesh.placement.instances, version=2)
        mesh.exchange.update(mesh.view(placement=second))
        handle = mesh.exchange.dispatch(LAYERS[0], torch.zeros(1, HIDDEN))
        assert isinstance(handle, Pending)
        while not mesh.exchange.stats().refusals["unknown_placement"]:
            mesh.exchange._attempts._wait(handle)
        assert mesh.exchange.stats().repeats["deadline"] >= 1
        mesh.adopt(second)
        mesh.exchange.update(mesh.view(seen=time.monotonic(), placement=second))
        mesh.check(seed=1)
