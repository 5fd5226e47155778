"""Experts that come and go, in real processes: the bits of one instance that holds them all, whatever the budget."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from shared.bus import Bus
from shared.changes import Rebalance
from shared.cli.children import ChildDied
from shared.cli.rebalance import NotRebalanced, ask
from shared.cli.status import look
from shared.load_messages import Foreseen
from shared.messages import Placement, Pool, Subjects
from shared.placement_watch import homes_array
from tests.mesh import RunningMesh, outputs, running_mesh

FAR = {"experts-0": "far", "experts-1": "far"}
MOST_LOOKS = 20
"""Each takes longer than a second."""
PROMPT = "And the LORD spake unto Moses, saying, "
BODIES: list[dict[str, Any]] = [
    {"prompt": PROMPT * (1 + 2 * i), "max_tokens": 20 + 5 * i, "temperature": i % 2, "seed": i, "logprobs": 2}
    for i in range(4)
]


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """What one instance gives that holds every expert itself."""
    with running_mesh(attention=1, experts=0, mesh="elastic-alone") as mesh:
        return outputs(mesh, BODIES)


@pytest.mark.parametrize(
    ("attention", "nodes", "settings"),
    [(1, {}, {"eviction": "lru"}), (2, FAR, {"phase": "relay", "group_wait": "0.5"})],
    ids=["one", "relay"],
)
def test_a_model_larger_than_the_memory_for_experts_gives_the_same_bits(alone, attention, nodes, settings):
    settings = settings | {"expert_memory": "1500kB"}
    with running_mesh(nodes, attention=attention, experts=2, mesh="elastic", settings=settings) as mesh:
        for _ in range(2):
            assert outputs(mesh, BODIES) == alone
        for i in range(2):
            seen = mesh.metrics_of(f"experts-{i}")
            assert seen("moemesh_replicas") <= seen("moemesh_expert_slots") == 15
            assert 0 < seen("moemesh_expert_calls_waited_total") < seen("moemesh_expert_calls_total")


def test_a_budget_below_one_row_is_refused_with_the_least_that_works():
    with (
        pytest.raises(ChildDied, match=r"--expert-memory.*a row needs 4: at least 393216"),
        running_mesh({}, attention=1, experts=1, mesh="elastic-small", settings={"expert_memory": "300kB"}),
    ):
        pass


def placement_of(mesh: RunningMesh) -> Placement:
    _, stored = mesh.call(look(mesh.mesh.nats_url, mesh.mesh.options.mesh))
    assert stored is not None
    assert stored.committed is not None
    return stored.committed


def rebalance(mesh: RunningMesh, request: Rebalance) -> None:
    """By hand, once no other change is under way."""
    for _ in range(MOST_LOOKS):
        try:
            mesh.call(ask(mesh.mesh.nats_url, mesh.mesh.options.mesh, request, Console(file=io.StringIO())))
            return
        except NotRebalanced as refused:
            assert "a change of the placement is under way" in str(refused)
            placement_of(mesh)  # takes a second
    pytest.fail("a change of the placement was under way all the time")


def homes_on(placement: Placement, bit: int) -> int:
    """Of all layers together."""
    return int(np.count_nonzero(homes_array(placement) & np.uint64(1 << bit)))


@contextmanager
def foreseen(mesh: RunningMesh) -> Iterator[list[Foreseen]]:
    """What expert instances tell meanwhile."""
    heard: list[Foreseen] = []

    async def listen() -> Bus:
        bus = await Bus.connect(mesh.mesh.nats_url, "test")
        await bus.subscribe(Subjects(mesh.mesh.options.mesh).foreseen, Foreseen, heard.append, ordered=True)
        return bus

    bus = mesh.call(listen())
    try:
        yield heard
    finally:
        mesh.call(bus.close())


def test_homes_follow_the_load_that_is_foreseen_and_no_bit_changes(alone) -> None:
    """Decode and prefill being looked at apart."""
    settings = {"expert_memory": "12MB", "target_prefill_layer_ms": "1000"}
    with (
        running_mesh({}, attention=1, experts=2, mesh="follow", settings=settings) as mesh,
        foreseen(mesh) as heard,
    ):
        one_sided = {layer: {"experts-0": tuple(range(31)), "experts-1": (31,)} for layer in range(6)}
        rebalance(mesh, Rebalance(given=one_sided))
        assert homes_on(placement_of(mesh), 1) == 6
        now = placement_of(mesh)
        for _ in range(MOST_LOOKS):
            assert outputs(mesh, BODIES) == alone
            now = placement_of(mesh)
            if homes_on(now, 1) > 60:
                break
        assert now.reason.startswith("experts follow their load: ")
        assert homes_on(now, 1) > 60, "a third of all homes at least has moved"
        assert any(0 < message.prefill_exchanges < message.exchanges for message in heard)


@pytest.fixture(scope="module")
def idle() -> Iterator[RunningMesh]:
    """One whose experts are stopped soon when nobody calls them."""
    settings = {"expert_memory": "12MB", "keep_alive": "1", "no_home_deadline": "120"}
    with running_mesh({}, attention=1, experts=1, mesh="elastic-idle", settings=settings) as mesh:
        yield mesh


def test_experts_that_nobody_calls_are_stopped_and_come_back(alone: list[Any], idle: RunningMesh) -> None:
    assert outputs(idle, BODIES) == alone
    seen = (idle.metrics_of("experts-0")("moemesh_replicas") for _ in range(MOST_LOOKS))
    assert 0 in seen, "nobody was stopped"
    assert outputs(idle, BODIES) == alone


def test_the_pool_goes_to_no_instance_and_back_and_requests_wait_for_it(alone: list[Any], idle: RunningMesh) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert "experts: 0 ready" in idle.scale(Pool.EXPERTS, 0)
        waiting = pool.submit(outputs, idle, BODIES)
        idle.scale(Pool.EXPERTS, 1)
        assert waiting.result(120) == alone
