"""Placement as pure arithmetic: every expert has a home, newcomers and leavers make one new version each."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.placement import homes_per_expert, round_robin
from services.scheduler.proposals import membership
from shared.activation import layer_homes
from shared.errors import BadMessage
from shared.membership import Member
from shared.messages import ElasticFacts, ExpertFacts, Heartbeat, Kind, ModelFacts, Placement, State
from shared.placement_watch import homes_array
from shared.scheduling.policies import Policy

MODEL = ModelFacts(name="m", digest="aa", layers=4, moe_layers=(1, 2, 3), experts=8, top_k=2)
OTHER = MODEL.model_copy(update={"digest": "bb", "name": "n"})


def expert(id: str, model: ModelFacts = MODEL, device: str = "cpu", **more: Any) -> Member:
    fields: dict[str, Any] = {"state": State.READY, "experts": ExpertFacts(address=b"x")} | more
    beat = Heartbeat(kind=Kind.EXPERTS, id=id, incarnation=1, node="n", device=device, model=model, **fields)
    return Member(beat, 0.0)


def elastic_facts(*broken: tuple[int, int]) -> ExpertFacts:
    return ExpertFacts(address=b"x", elastic=ElasticFacts(slots=8, broken=broken))


def place(
    current: Placement | None, *there: Member, homes: int = 0, newest: int = 0, policy: Policy = Policy.ACTIVATED
) -> Placement | None:
    proposal = membership(current, there, homes, policy, activity)
    version = max(current.version if current else 0, newest) + 1
    return proposal.placement(version, epoch=3, author="scheduler-1") if proposal else None


def activity(layer: int) -> np.ndarray:
    return np.ones(MODEL.experts)


def placed(current: Placement | None, *ready: Member, homes: int = 0) -> Placement:
    placement = place(current, *ready, homes=homes)
    assert placement is not None
    return placement


@given(instances=st.integers(1, 64), layers=st.integers(0, 5), experts=st.integers(1, 70), homes=st.integers(1, 70))
def test_every_expert_has_the_homes_asked_for_and_the_load_is_even(
    instances: int, layers: int, experts: int, homes: int
) -> None:
    table = round_robin(instances, layers, experts, homes)
    assert table.shape == (layers, experts)
    assert table.dtype == np.uint64
    bits = (table[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert (bits.sum(-1) == min(homes, instances)).all()
    assert not bits[..., instances:].any()
    per_instance = bits[..., :instances].sum(1)
    assert layers == 0 or (per_instance.max(1) - per_instance.min(1)).max() <= min(homes, instances)


def test_round_robin_by_hand() -> None:
    assert round_robin(3, 2, 4, 1).tolist() == [[1, 2, 4, 1], [2, 4, 1, 2]]
    assert round_robin(3, 1, 3, 2).tolist() == [[0b011, 0b110, 0b101]]


@pytest.mark.parametrize(("instances", "homes"), [(0, 1), (65, 1), (3, 0)])
def test_a_placement_that_leaves_an_expert_without_a_home_is_refused(instances: int, homes: int) -> None:
    with pytest.raises(ValueError, match=r"homes|instances"):
        round_robin(instances, 1, 4, homes)


def test_homes_default_to_all_instances_on_cpu_and_one_elsewhere() -> None:
    cpu, cuda, elastic = expert("e1"), expert("e2", device="cuda:0"), expert("e3", experts=elastic_facts())
    assert homes_per_expert(0, [cpu, cpu]) == 2
    assert homes_per_expert(0, [cpu, cuda]) == 1
    assert homes_per_expert(0, [cpu, elastic]) == 1, "memory of its own"
    assert homes_per_expert(2, [cpu] * 3) == 2
    assert homes_per_expert(9, [cpu] * 3) == 3


def test_joining_and_leaving_make_the_next_version_with_its_reason() -> None:
    first = placed(None, expert("e1"))
    assert (first.version, first.epoch, first.instances, first.digest) == (1, 3, ("e1",), "aa")
    assert homes_array(first).tolist() == [[1] * 8] * 3
    assert place(first, expert("e1")) is None
    second = placed(first, expert("e1"), expert("e2"))
    assert (second.version, second.reason) == (2, "e2 joined")
    third = placed(second, expert("e2"))
    assert (third.version, third.reason, third.instances) == (3, "e1 left", ("e2",))


def test_the_last_placement_stays_when_nobody_is_ready() -> None:
    assert place(placed(None, expert("e1"))) is None


def test_instances_with_another_model_take_no_part_while_the_first_model_is_served() -> None:
    first = placed(None, expert("e2"))
    assert place(first, expert("e1", OTHER), expert("e2")) is None
    replaced = placed(first, expert("e1", OTHER))
    assert (replaced.digest, replaced.instances) == ("bb", ("e1",))


def test_the_sixty_fifth_instance_waits_and_does_not_push_anybody_out() -> None:
    full = placed(None, *(expert(f"m{i:02}") for i in range(64)))
    assert len(full.instances) == 64
    assert place(full, expert("a"), *(expert(f"m{i:02}") for i in range(64))) is None


def test_a_placement_of_the_wrong_size_is_refused() -> None:
    placement = placed(None, expert("e1"))
    for homes in (placement.homes[:-8], placement.homes + b"x"):
        with pytest.raises(BadMessage):
            homes_array(placement.model_copy(update={"homes": homes}))


def test_another_policy_is_a_new_version_that_says_so() -> None:
    first = placed(None, expert("e1"))
    assert first.policy is Policy.ACTIVATED
    second = place(first, expert("e1"), policy=Policy.TOKENS)
    assert second is not None
    assert (second.version, second.policy, second.homes) == (first.version + 1, Policy.TOKENS, first.homes)
    assert second.reason == "homes are chosen by policy tokens"
    assert Placement.decode(second.encode()) == second
    assert place(second, expert("e1"), policy=Policy.TOKENS) is None


def test_an_expert_that_cannot_be_started_loses_that_home_and_keeps_the_others() -> None:
    layer = MODEL.moe_layers[0]
    first = placed(None, expert("e1"), expert("e2"), homes=2)
    second = place(first, expert("e1"), expert("e2", experts=elastic_facts((layer, 3))), homes=2)
    assert second is not None
    masks = layer_homes(second)[layer]
    assert masks[3] == 0b01
    assert all(masks[e] == 0b11 for e in range(MODEL.experts) if e != 3)
    assert f"expert 3 of layer {layer} on e2" in second.reason


def test_the_sole_home_of_an_expert_that_cannot_be_started_moves() -> None:
    layer = MODEL.moe_layers[-1]
    first = placed(None, expert("e1"), expert("e2"), homes=1)
    home = int(layer_homes(first)[layer][0]).bit_length()
    there = [expert(f"e{i}", experts=elastic_facts(*[(layer, 0)] * (i == home))) for i in (1, 2)]
    second = place(first, *there, homes=1)
    assert second is not None
    assert layer_homes(second)[layer][0] == 0b11 ^ 1 << (home - 1)
    assert place(second, *there, homes=1) is None, "it is done"


def test_an_expert_that_nobody_can_start_stays_where_it_is() -> None:
    broken = elastic_facts((MODEL.moe_layers[0], 1))
    first = placed(None, expert("e1"), homes=1)
    assert place(first, expert("e1", experts=broken), homes=1) is None
