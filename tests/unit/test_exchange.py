"""The exchange over an in-process network: the same bytes as a local computation, or a clear error in bounded time."""

import contextlib
import time
from collections import Counter

import numpy as np
import pytest
import torch

from services.attention.exchange import ExpertInstance, View
from services.attention.pending import Pending
from services.experts.answers import KnownPlacement
from shared.errors import ExchangeUnavailable
from shared.messages import Placement
from shared.scheduling.policies import Policy
from shared.transport.base import DTYPES, FrameKind, Header, Refusal
from shared.transport.memory import MemoryNetwork, MemoryTransport
from tests.unit.toy_experts import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    LIMITS,
    MESH,
    TOP_K,
    everywhere,
    make_exchange,
    make_placement,
    random_rows,
    round_robin,
    toy_mesh,
)

PLACES = [
    everywhere(1), everywhere(2), everywhere(3), round_robin(2), round_robin(3),
    [[0], [1], [0, 1], [2, 1], [0, 1, 2], [2]],
]  # fmt: skip


@pytest.mark.parametrize("homes", PLACES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_the_mesh_gives_the_local_bytes(homes, rows):
    with toy_mesh(homes, deadline=5.0) as mesh:
        for layer in LAYERS:
            mesh.check(seed=rows, layer=layer, rows=rows)
        assert mesh.exchange.stats().exchanges == len(LAYERS)
        assert not mesh.exchange.stats().repeats


def test_each_part_is_computed_once():
    """Replicas share the work: no instance computes what another one was chosen for."""
    with toy_mesh(everywhere(3), deadline=5.0) as mesh:
        mesh.check(seed=4, rows=16)
        assert sum(i.server.stats.parts for i in mesh.instances) == 16 * TOP_K
        assert all(i.server.stats.parts > 0 for i in mesh.instances)


@pytest.mark.parametrize("policy", Policy)
def test_every_policy_gives_the_local_bytes(policy):
    with toy_mesh(everywhere(3), deadline=5.0) as mesh:
        placement = mesh.placement.model_copy(update={"version": 2, "policy": policy})
        mesh.adopt(placement)
        mesh.exchange.update(mesh.view(placement=placement))
        mesh.check(seed=4, rows=16)
        parts = [instance.server.stats.parts for instance in mesh.instances]
        assert sum(parts) == 16 * TOP_K
        assert (parts[0] == sum(parts)) == (policy is Policy.FIRST)


def test_several_exchanges_can_be_open_at_once():
    """Ping-pong: replies find their exchange in whatever order they are combined."""
    with toy_mesh(round_robin(2), deadline=5.0) as mesh:
        batches = [(random_rows(s, s + 1), random_rows(s + 50, s + 1)) for s in range(4)]
        handles = []
        for hidden, _ in batches:
            handles.append(mesh.exchange.dispatch(LAYERS[0], hidden))
        for (hidden, x), handle in reversed(list(zip(batches, handles, strict=True))):
            out = x.clone()
            mesh.exchange.combine(handle, out)
            assert out.equal(mesh.layers[LAYERS[0]].local(hidden, x))
        assert not mesh.exchange.stats().dropped


def test_a_step_that_failed_leaves_no_exchange_open():
    with toy_mesh(everywhere(1), deadline=5.0) as mesh:
        handles = [mesh.exchange.dispatch(LAYERS[0], random_rows(s, 1)) for s in range(2)]
        mesh.exchange.abandon()
        for handle in handles:
            with pytest.raises(ExchangeUnavailable, match="given up"):
                mesh.exchange.combine(handle, random_rows(0, 1))
        mesh.check(seed=1)
        assert mesh.exchange.stats().dropped["late"] == 2


def test_an_update_gives_up_what_is_open():
    with toy_mesh(everywhere(1), deadline=5.0) as mesh:
        handle = mesh.exchange.dispatch(LAYERS[0], random_rows(0, 1))
        mesh.exchange.update(mesh.view(seen=1.0))
        with pytest.raises(ExchangeUnavailable, match="given up"):
            mesh.exchange.combine(handle, random_rows(0, 1))
        mesh.check(seed=1)
        assert mesh.exchange.stats().dropped["late"] == 1


def test_what_one_open_exchange_learns_of_a_death_saves_the_others_the_wait():
    with toy_mesh(everywhere(2), deadline=600.0) as mesh:
        mesh.instances[1].server.stop()
        mesh.instances[1].transport.close()
        batches = [(random_rows(s, 3), random_rows(s + 50, 3)) for s in range(2)]
        handles = [mesh.exchange.dispatch(LAYERS[0], hidden) for hidden, _ in batches]
        for (hidden, x), handle in zip(batches, handles, strict=True):
            expected = mesh.layers[LAYERS[0]].local(hidden, x)
            mesh.exchange.combine(handle, x)
            assert x.equal(expected)
        assert mesh.exchange.stats().repeats == Counter(connection=2)


# ---- instances that die -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_instance_with_replicated_homes_changes_no_byte(dead):
    with toy_mesh(everywhere(2)) as mesh:
        mesh.check(seed=1)
        mesh.network.cut(mesh.instances[dead].transport.address)
        mesh.check(seed=2)
        assert mesh.exchange.stats().suspected == Counter({f"e{dead}": 1})
        mesh.check(seed=3)  # it is not asked again
        assert mesh.exchange.stats().repeats == Counter(deadline=1)
        assert mesh.exchange.ready()


def test_when_the_replacement_dies_too_the_first_suspect_is_tried_again():
    """No heartbeat says that e0 is back: only asking can tell."""
    with toy_mesh(everywhere(2), give_up=5.0) as mesh:
        addresses = [i.transport.address for i in mesh.instances]
        mesh.network.cut(addresses[0])
        mesh.check(seed=1)
        mesh.network.heal(addresses[0])
        mesh.network.cut(addresses[1])
        mesh.check(seed=2)


def test_a_broken_connection_is_noticed_before_the_deadline():
    with toy_mesh(everywhere(2), deadline=600.0) as mesh:
        mesh.instances[1].server.stop()
        mesh.instances[1].transport.close()
        mesh.check(seed=2)
        assert mesh.exchange.stats().repeats == Counter(connection=1)


def test_a_sole_home_whose_connection_broke_is_not_waited_for():
    with toy_mesh(round_robin(2), deadline=600.0) as mesh:
        mesh.instances[1].server.stop()
        mesh.instances[1].transport.close()
        for _ in range(2):
            with pytest.raises(ExchangeUnavailable) as caught:
                mesh.check(seed=2)
            assert caught.value.instances == ["e1"]
            assert not mesh.exchange.ready()
            mesh.exchange.update(mesh.view())  # with a heartbeat from before
        assert not mesh.exchange.stats().repeats


def test_an_instance_that_left_the_mesh_is_not_waited_for():
    """The control plane says so while the exchange is under way; a later heartbeat shows that it was wrong."""
    with toy_mesh(round_robin(2), deadline=600.0) as mesh:
        both, address = mesh.view(), mesh.instances[1].transport.address
        mesh.network.cut(address)
        handle = mesh.exchange.dispatch(LAYERS[0], random_rows(0, 1))
        mesh.exchange.foresee(View(mesh.placement, {"e0": both.instances["e0"]}))
        with pytest.raises(ExchangeUnavailable, match="gone or silent, and some experts have no other home") as caught:
            mesh.exchange.combine(handle, random_rows(0, 1))
        assert caught.value.instances == ["e1"]
        mesh.network.heal(address)
        again = mesh.view(seen=time.monotonic())
        mesh.exchange.foresee(again)
        mesh.exchange.update(again)
        assert mesh.exchange.ready()
        mesh.check(seed=3)


def test_when_one_of_two_homes_left_the_other_is_asked_at_once():
    with toy_mesh(everywhere(2), deadline=600.0) as mesh:
        mesh.network.cut(mesh.instances[1].transport.address)
        mesh.exchange.foresee(View(mesh.placement, {"e0": mesh.view().instances["e0"]}))
        mesh.check(seed=1)
        assert mesh.exchange.stats().repeats == Counter(connection=1)


def test_a_dead_instance_with_sole_homes_ends_in_a_clear_error():
    with toy_mesh(round_robin(3), deadline=0.02, give_up=0.2) as mesh:
        mesh.network.cut(mesh.instances[1].transport.address)
        hidden, x = random_rows(1, 4), random_rows(2, 4)
        before = x.clone()
        with pytest.raises(ExchangeUnavailable) as caught:
            mesh.run(LAYERS[1], hidden, x)
        assert (caught.value.layer, caught.value.instances) == (LAYERS[1], ["e1"])
        assert x.equal(before)
        assert not mesh.exchange.ready()
        assert mesh.exchange.stats().unavailable == 1


def test_a_fresh_heartbeat_ends_a_suspicion():
    with toy_mesh(round_robin(2), deadline=0.02, give_up=0.1) as mesh:
        address = mesh.instances[0].transport.address
        mesh.network.cut(address)
        with contextlib.suppress(ExchangeUnavailable):
            mesh.check(seed=1)
        mesh.exchange.update(mesh.view(seen=0.5))
        assert not mesh.exchange.ready(), "a heartbeat from before the suspicion proves nothing"
        mesh.network.heal(address)
        mesh.exchange.update(mesh.view(seen=time.monotonic()))
        assert mesh.exchange.ready()
        mesh.check(seed=2)


def test_an_answer_to_a_probe_ends_a_suspicion():
    """While NATS is away there are no heartbeats: an instance that answers serves again."""
    with toy_mesh(round_robin(2), deadline=0.02, give_up=0.1) as mesh:
        address = mesh.instances[0].transport.address
        mesh.network.cut(address)
        with contextlib.suppress(ExchangeUnavailable):
            mesh.check(seed=1)
        mesh.network.heal(address)
        end = time.monotonic() + 10
        while not mesh.exchange.ready() and time.monotonic() < end:
            mesh.exchange.idle_wait(0.02)
        assert mesh.exchange.ready()
        mesh.check(seed=2)


def test_a_restarted_instance_is_asked_under_its_new_incarnation():
    with toy_mesh(round_robin(2), deadline=0.02, give_up=0.1) as mesh, toy_mesh(everywhere(1), mesh.network) as other:
        mesh.network.cut(mesh.instances[0].transport.address)
        new = other.instances[0]
        instances = dict(mesh.view().instances)
        instances["e0"] = ExpertInstance("e0", 100, new.facts.address, 0.0)
        mesh.exchange.update(View(mesh.placement, {"e1": instances["e1"]}))
        assert not mesh.exchange.ready()
        with pytest.raises(ExchangeUnavailable, match="no home to ask") as caught:
            mesh.run(LAYERS[0], random_rows(1, 1), random_rows(1, 1))
        assert caught.value.instances == ["e0"]
        other.adopt(mesh.placement)
        mesh.exchange.update(View(mesh.placement, instances))
        mesh.check(seed=3)


def test_without_a_placement_nothing_is_ready():
    with toy_mesh(everywhere(1)) as mesh:
        mesh.exchange.update(View(None, mesh.view().instances))
        assert not mesh.exchange.ready()
        with pytest.raises(ExchangeUnavailable):
            mesh.run(LAYERS[0], random_rows(1, 1), random_rows(1, 1))


def test_an_unusable_address_counts_as_absent():
    with toy_mesh(everywhere(2), deadline=5.0) as mesh:
        broken = dict(mesh.view().instances) | {"e1": ExpertInstance("e1", 555, b"nowhere", 0.0)}
        mesh.exchange.update(View(mesh.placement, broken))
        mesh.check(seed=5)


def test_a_broken_placement_is_not_taken():
    with toy_mesh(everywhere(1), deadline=5.0) as mesh:
        short = mesh.placement.model_copy(update={"version": 9, "homes": b"12345678"})
        mesh.exchange.update(mesh.view(seen=1.0, placement=short))
        assert mesh.exchange.ready()
        mesh.check(seed=1)


# ---- placements -------------------------------------------------------------------------------------------


def next_version(placement: Placement, homes: list[list[int]]) -> Placement:
    return make_placement(homes, placement.instances, version=placement.version + 1)


def test_a_placement_that_is_not_loaded_yet_is_refused_then_served():
    with toy_mesh(round_robin(2), deadline=5.0) as mesh:
        second = next_version(mesh.placement, [[1 - e % 2] for e in range(EXPERTS)])
        mesh.exchange.update(mesh.view(placement=second))
        handle, out = mesh.exchange.dispatch(LAYERS[0], random_rows(1, 5)), random_rows(2, 5)
        expected = mesh.layers[LAYERS[0]].local(random_rows(1, 5), out)
        while not mesh.instances[0].server.stats.refused["unknown_placement"]:
            time.sleep(0)
        mesh.adopt(mesh.placement, second)
        mesh.exchange.combine(handle, out)
        assert out.equal(expected)
        stats = mesh.exchange.stats()
        assert stats.refusals["unknown_placement"] >= 1 and stats.repeats["refusal"] >= 1


def test_a_step_is_put_off_at_once_when_its_placement_is_refused_and_another_one_is_there():
    with toy_mesh(round_robin(2), deadline=60.0) as mesh:
        second = next_version(mesh.placement, [[1 - e % 2] for e in range(EXPERTS)])
        mesh.adopt(second)
        mesh.exchange.foresee(mesh.view(placement=second))
        handle = mesh.exchange.dispatch(LAYERS[0], random_rows(1, 5))
        with pytest.raises(ExchangeUnavailable, match="placement 2 has taken its place"):
            mesh.exchange.combine(handle, random_rows(2, 5))
        mesh.exchange.update(mesh.view(placement=second))
        mesh.check(seed=1)


def test_a_layer_that_gave_up_its_homes_is_refused_and_others_are_answered():
    with toy_mesh(round_robin(2), deadline=60.0) as mesh:
        partly = KnownPlacement.of(mesh.placement, "e0", {LAYERS[1]})
        mesh.instances[0].server.adopt([partly]).result(60)
        mesh.check(seed=1, layer=LAYERS[1])
        second = next_version(mesh.placement, round_robin(2))
        mesh.exchange.foresee(mesh.view(placement=second))
        handle = mesh.exchange.dispatch(LAYERS[0], random_rows(1, 5))
        with pytest.raises(ExchangeUnavailable, match="placement 2 has taken its place"):
            mesh.exchange.combine(handle, random_rows(2, 5))


def test_an_instance_that_lags_behind_is_left_out_where_possible():
    with toy_mesh(everywhere(2), deadline=5.0) as mesh:
        second = next_version(mesh.placement, everywhere(2))
        mesh.adopt(mesh.placement, second, only=[1])
        mesh.exchange.update(mesh.view(placement=second))
        mesh.check(seed=1)
        assert mesh.exchange.stats().suspected == Counter(e0=1)


def test_a_placement_that_nobody_loads_ends_in_a_clear_error():
    with toy_mesh(round_robin(2), deadline=0.05, give_up=0.1) as mesh:
        mesh.exchange.update(mesh.view(placement=next_version(mesh.placement, round_robin(2))))
        with pytest.raises(ExchangeUnavailable, match="placement 2 is not loaded") as caught:
            mesh.check(seed=1)
        assert caught.value.instances == ["e0", "e1"]


def test_the_old_placement_is_served_beside_the_new_one():
    with toy_mesh(round_robin(2), deadline=5.0) as mesh:
        second = next_version(mesh.placement, everywhere(2))
        mesh.adopt(mesh.placement, second)
        mesh.check(seed=1)
        mesh.exchange.update(mesh.view(placement=second))
        mesh.check(seed=2)


def test_rows_over_the_limit_are_refused_for_good():
    with toy_mesh(everywhere(1), deadline=600.0, give_up=600.0) as mesh:
        with pytest.raises(ExchangeUnavailable, match="limit here is 64"):
            mesh.check(seed=1, rows=LIMITS.max_rows + 1)
        mesh.check(seed=1)


# ---- replies that are wrong -------------------------------------------------------------------------------


class Scripted:
    """An expert instance driven by the test: it sends what it is told, right or wrong."""

    def __init__(self, network: MemoryNetwork, homes: list[list[int]], **options) -> None:
        self.transport: MemoryTransport = network.transport(max_frame_bytes=1 << 16)
        self.attention = network.transport(max_frame_bytes=1 << 16)
        self.exchange = make_exchange(self.attention, **options)
        placement = make_placement(homes, ["e0", "e1"])
        facts = {n: ExpertInstance(n, 100 + i, self.transport.address, 0.0) for i, n in enumerate(["e0", "e1"])}
        self.exchange.update(View(placement, facts))
        self._attention_peer = self.transport.connect(self.attention.address)

    def ask(self, rows: int = 1):
        return self.exchange.dispatch(LAYERS[0], random_rows(0, rows))

    def parts(self, *parts: tuple[int, int], sender: int = 100, attempt: int = 0, **header) -> None:
        """A COMBINE of (token, expert) parts of weight 1; every row is the expert's number."""
        frame = self.transport.outgoing(12 * len(parts), len(parts), HIDDEN, DTYPES[0])
        table = np.array([(t, e, 0x3F800000) for t, e in parts], "<u4")
        frame.meta[:] = table.view(np.uint8).ravel()
        for p, (_, e) in enumerate(parts):
            frame.rows[p] = e
        self.send(FrameKind.COMBINE, frame, sender, attempt, header)

    def refuse(self, meta: bytes, sender: int = 100, attempt: int = 0, **header) -> None:
        frame = self.transport.outgoing(len(meta), 0, 0, DTYPES[0])
        frame.meta[:] = memoryview(meta)
        self.send(FrameKind.REFUSAL, frame, sender, attempt, header)

    def send(self, kind: FrameKind, frame, sender: int, attempt: int, header: dict[str, int]) -> None:
        made = Header(kind, MESH, sender, sequence=1, attempt=attempt)
        for name, value in header.items():
            setattr(made, name, value)
        self.transport.send([self._attention_peer], made, frame)


E0_PARTS, E1_PARTS = [(0, 0), (0, 2)], [(0, 1)]
RIGHT = np.full((1, HIDDEN), 3.0, np.float32)


@pytest.fixture
def scripted():
    network = MemoryNetwork()
    made = Scripted(network, round_robin(2), deadline=30.0)
    yield made
    made.transport.close()
    made.attention.close()


def combine(scripted: Scripted, handle) -> np.ndarray:
    x = torch.zeros_like(handle.rows)
    scripted.exchange.combine(handle, x)
    return x.numpy()


@pytest.mark.parametrize(
    ("reason", "send"),
    [
        ("duplicate", lambda s: [s.parts(*E0_PARTS), s.parts(*E0_PARTS)]),
        ("late", lambda s: s.parts(*E0_PARTS, sequence=77)),
        ("late", lambda s: s.parts(*E0_PARTS, attempt=1)),
        ("late", lambda s: s.refuse(bytes([1]), attempt=1)),
        ("foreign", lambda s: s.parts(*E0_PARTS, sender=999)),
        ("foreign", lambda s: s.parts(*E0_PARTS, mesh=1)),
        ("malformed", lambda s: s.send(FrameKind.COMBINE, s.transport.outgoing(5, 1, HIDDEN, DTYPES[0]), 100, 0, {})),
        ("malformed", lambda s: s.send(FrameKind.COMBINE, s.transport.outgoing(12, 1, 3, DTYPES[0]), 100, 0, {})),
        ("malformed", lambda s: s.send(FrameKind.COMBINE, s.transport.outgoing(12, 1, HIDDEN, DTYPES[1]), 100, 0, {})),
        ("foreign", lambda s: s.send(FrameKind.HELLO, s.transport.outgoing(12, 1, HIDDEN, DTYPES[0]), 100, 0, {})),
        ("malformed", lambda s: s.refuse(b"")),
        ("malformed", lambda s: s.refuse(b"\xee?")),
    ],
)  # fmt: skip
def test_frames_that_nobody_awaits_are_dropped_and_counted(scripted, reason, send):
    handle = scripted.ask()
    send(scripted)
    scripted.parts(*E0_PARTS)
    scripted.parts(*E1_PARTS, sender=101)
    assert np.array_equal(combine(scripted, handle), RIGHT)
    expected = {reason: 1} if reason != "duplicate" else {reason: 2}
    assert scripted.exchange.stats().dropped == Counter(expected)


def test_a_reply_to_an_earlier_attempt_with_the_same_live_mask_counts():
    """A slow instance is not asked for ever: its first answer is as good as a repeated one."""
    with contextlib.closing(MemoryNetwork().transport()):
        scripted = Scripted(MemoryNetwork(), round_robin(2), deadline=0.01, give_up=30.0)
        handle = scripted.ask()
        assert isinstance(handle, Pending)
        scripted.parts(*E1_PARTS, sender=101)
        while not handle.attempt:
            scripted.exchange._attempts._wait(handle)
        scripted.parts(*E0_PARTS, attempt=0)
        assert np.array_equal(combine(scripted, handle), RIGHT)


def test_replies_that_wait_in_the_queue_are_not_late(scripted):
    """After a pause of this process the deadline has passed, but everybody has answered."""
    handle = scripted.ask()
    handle.deadline = handle.give_up = 0.0
    scripted.parts(*E0_PARTS)
    scripted.parts(*E1_PARTS, sender=101)
    assert np.array_equal(combine(scripted, handle), RIGHT)
    assert not scripted.exchange.stats().repeats


@pytest.mark.parametrize(
    ("message", "first", "second"),
    [
        ("lacks parts", E0_PARTS, []),
        ("more parts than chosen", [*E0_PARTS, (0, 4)], E1_PARTS),
        ("came twice", [(0, 0), (0, 0)], E1_PARTS),
        ("no home", [(0, 1), (0, 0)], E1_PARTS),
        ("does not exist", [(1, 0)], E1_PARTS),
        ("does not exist", [(0, 6)], E1_PARTS),
        ("does not exist", [(1 << 31, 0)], E1_PARTS),
    ],
)  # fmt: skip
def test_parts_that_do_not_add_up_are_repeated_then_reported(scripted, message, first, second):
    handle = scripted.ask()
    for attempt in range(3):
        scripted.parts(*first, attempt=attempt)
        scripted.parts(*second, sender=101, attempt=attempt)
        if attempt < 2:
            while handle.attempt == attempt:
                gather_once(scripted, handle)
    with pytest.raises(ExchangeUnavailable, match=message):
        combine(scripted, handle)
    assert scripted.exchange.stats().repeats == Counter(parts=2)


def gather_once(scripted: Scripted, handle) -> None:
    while handle.missing:
        scripted.exchange._attempts._wait(handle)
    attempts = scripted.exchange._attempts
    attempts._disagree(handle, attempts._add(handle, torch.zeros(1, HIDDEN)))


def test_digests_that_disagree_cause_a_repeat_to_all(scripted):
    handle = scripted.ask()
    scripted.parts(*E0_PARTS, digest=1)
    scripted.parts(*E1_PARTS, sender=101, digest=2)
    gather_once(scripted, handle)
    assert scripted.exchange.stats().repeats == Counter(digest=1)
    scripted.parts(*E0_PARTS, digest=2)  # to the attempt that was void
    scripted.parts(*E0_PARTS, digest=2, attempt=1)
    scripted.parts(*E1_PARTS, sender=101, digest=2, attempt=1)
    assert np.array_equal(combine(scripted, handle), RIGHT)
    assert scripted.exchange.stats().dropped == Counter(late=1)


def test_the_sum_follows_expert_ids_whatever_the_order_of_parts(scripted):
    """1e8 + 1 - 1e8 in fp32 depends on the order: experts 0, 1, 2 ascending give 0."""
    handle = scripted.ask()
    values = {0: 1e8, 1: 1.0, 2: -1e8}
    for parts, sender in (([(0, 2), (0, 0)], 100), ([(0, 1)], 101)):
        frame = scripted.transport.outgoing(12 * len(parts), len(parts), HIDDEN, DTYPES[0])
        frame.meta[:] = np.array([(t, e, 0x3F800000) for t, e in parts], "<u4").view(np.uint8).ravel()
        for p, (_, e) in enumerate(parts):
            frame.rows[p] = values[e]
        scripted.send(FrameKind.COMBINE, frame, sender, 0, {})
    assert np.array_equal(combine(scripted, handle), np.zeros((1, HIDDEN), np.float32))


def test_a_refusal_for_good_is_reported_with_its_words(scripted):
    handle = scripted.ask()
    scripted.refuse(bytes([Refusal.BAD_REQUEST]) + "fünf".encode())
    with pytest.raises(ExchangeUnavailable, match="bad_request: fünf") as caught:
        combine(scripted, handle)
    assert caught.value.instances == ["e0"]


def test_idle_wait_drops_what_arrives_and_wake_ends_it(scripted):
    scripted.parts(*E0_PARTS, sequence=5)
    scripted.exchange.idle_wait(0.3)
    assert scripted.exchange.stats().dropped == Counter(late=1)
    scripted.exchange.wake()
    start = time.monotonic()
    scripted.exchange.idle_wait(60)
    assert time.monotonic() - start < 30
