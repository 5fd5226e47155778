"""The search: it finds what trying everything finds, says what binds, and knows when a monolith is better."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.planning.assemble import Names, assemble
from shared.planning.hardware import load_hardware
from shared.planning.outlook import settle
from shared.planning.report import binding, chosen, infeasible
from shared.planning.routing import synthetic
from shared.planning.search import Found, Space, highest_rate, look_at, look_at_all, search, space_of
from shared.planning.setting import Demand, Mesh, Monolith, Setting, Slo, load_of, mesh_step, monolith_step
from tests.unit.planning_cases import deepseek, setting, small, squeezed

CHAT = Demand(rate=4, prompt=200, output=256)
MOST = 6


def find(given: Setting, demand: Demand, slo: Slo, most: int = 64, batch: float | None = None) -> Found:
    return search(given, space_of(given, most), demand, slo, batch)


def seconds_of(given: Setting, demand: Demand, kind: tuple[int, int, int], batch: float) -> float:
    """One candidate, one batch."""
    load = load_of(given, demand, np.array([batch]))
    first, second, micro = np.array([float(kind[0])]), np.array([float(kind[1])]), kind[2]
    if micro:
        return float(mesh_step(given, load, Mesh(first, second, micro)).step.seconds[0])
    return float(monolith_step(given, load, Monolith(first, second)).step.seconds[0])


def brute_force(given: Setting, space: Space, demand: Demand, slo: Slo) -> float:
    """The least price of all candidates, one after the other; a TPOT is kept where serving at it takes no longer."""
    prices = [np.inf]
    most = max(1.0, demand.tokens * slo.tpot_s)
    for kind in zip(*(array.tolist() for array in space), strict=True):
        if seconds_of(given, demand, kind, most) <= slo.tpot_s * (1 + 1e-9):
            alone = Space(*(np.array([value]) for value in kind))
            outlook = look_at(given, alone, demand, Slo(np.inf, slo.ttft_s))
            if outlook.feasible[0]:
                prices.append(float(outlook.price[0]))
    return min(prices)


@st.composite
def questions(draw):
    """(setting, demand, slo): models, devices, links, prices and loads of all sorts."""
    sizes = draw(st.sampled_from([deepseek(), small()]))
    device = draw(st.sampled_from(["h100", "l40s"])) if sizes == small() else "h200"
    link = draw(st.sampled_from(["infiniband", "ethernet-10"]))
    prices = draw(st.sampled_from([(1.0, 1.0), (1.0, 2.5), (3.0, 1.0)]))
    names = {"link": link, "attention_price": prices[0], "expert_price": prices[1], "apart": draw(st.booleans())}
    demand = Demand(draw(st.floats(0.01, 200)), draw(st.floats(1, 4000)), draw(st.floats(1, 1000)))
    slo = Slo(draw(st.floats(0.005, 0.3)), draw(st.sampled_from([np.inf, 5.0, 0.5])))
    return setting(sizes, device, most=MOST, **names), demand, slo


@settings(deadline=None, max_examples=8)
@given(questions())
def test_the_search_finds_what_trying_every_candidate_finds(question):
    given, demand, slo = question
    space = space_of(given, MOST)
    found = search(given, space, demand, slo)
    expected = brute_force(given, space, demand, slo)
    assert (found.best.price if found.best else np.inf) == expected
    assert look_at_all(given, space, demand, slo) * demand.tokens == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(questions(), st.floats(1, 3000))
def test_with_a_given_batch_nothing_serves_more_per_device(question, batch):
    given, demand, slo = question
    space = space_of(given, MOST)
    best = search(given, space, demand, slo, batch).best
    least = look_at_all(given, space, demand, slo, batch)
    assert (best.price / best.tokens_per_s if best else np.inf) == pytest.approx(least)


@settings(deadline=None, max_examples=25)
@given(questions())
def test_time_per_sequence_falls_with_the_batch_so_that_one_fixed_point_remains(question):
    given, demand, _ = question
    batches = np.geomspace(1, 60_000, 60)
    for candidates in (Mesh(np.full(60, 3.0), np.full(60, 5.0), 2), Monolith(np.full(60, 2.0), np.full(60, 4.0))):
        run = mesh_step if isinstance(candidates, Mesh) else monolith_step
        seconds = run(given, load_of(given, demand, batches), candidates).step.seconds  # pyright: ignore
        assert (np.diff(seconds) >= -1e-12).all()
        assert (np.diff(seconds / batches) <= 1e-12).all()


def test_the_batch_obeys_little_s_law() -> None:
    best = find(setting(), CHAT, Slo(0.05)).best
    assert best is not None and best.batch == pytest.approx(CHAT.tokens * best.tpot_s, rel=1e-6)
    idle = find(setting(), replace(CHAT, rate=1e-4), Slo(0.05)).best
    assert idle is not None and idle.batch == 1
    assert settle(lambda b, _: 1e-3 * b, 2000, 1)[0] == pytest.approx(1 << 16)


def test_more_requests_and_a_tighter_limit_never_cost_less() -> None:
    given = setting()
    prices = [
        [
            best.price if (best := find(given, replace(CHAT, rate=rate), Slo(slo)).best) else np.inf
            for rate in (2, 20, 60)
        ]
        for slo in (0.1, 0.06, 0.045)
    ]
    assert (np.diff(prices, axis=0) >= 0).all() and (np.diff(prices, axis=1) >= 0).all()


def test_prices_move_work_to_the_cheaper_pool() -> None:
    busy, slo = replace(CHAT, rate=40), Slo(0.06)
    cheap, dear = (find(setting(attention_price=p, expert_price=1.0), busy, slo).mesh for p in (0.1, 10.0))
    assert cheap and dear and cheap.attention >= dear.attention and cheap.experts <= dear.experts


def test_a_model_that_one_device_holds_is_best_served_by_monoliths() -> None:
    best = find(setting(small()), replace(CHAT, rate=1), Slo(0.05)).best
    assert best is not None and (best.kind, best.devices) == ("monolith", 1)


def test_slow_links_make_a_monolith_of_one_node_the_better_choice() -> None:
    tight = Slo(0.06)
    fast, slow = (
        find(setting(device="h200", link=link, apart=True), replace(CHAT, rate=20), tight)
        for link in ("infiniband", "ethernet-10")
    )
    assert fast.best and fast.best.kind == "mesh"
    assert slow.best and slow.best.kind == "monolith"


def test_what_costs_less_is_named_with_the_limit_that_it_breaks() -> None:
    found = find(setting(), replace(CHAT, rate=60), Slo(0.05))
    assert found.best and found.binding and found.binding.price < found.best.price
    assert found.binding.broken
    assert found.binding.name in binding(found)


def test_an_slo_that_nothing_keeps_names_the_limit_and_the_nearest_that_is_kept() -> None:
    given, slo = setting(most=12), Slo(0.010)
    found = find(given, CHAT, slo, 12)
    assert found.best is None and found.binding is not None
    assert found.binding.broken == ["TPOT"]
    words = infeasible(found, slo, highest_rate(given, space_of(given, 12), CHAT, slo))
    assert words.startswith("no plan keeps 10 ms per token; TPOT binds: the nearest is ")
    near = float(words.split("--slo-tpot-ms ")[1].split(")")[0].split(",")[0])
    assert find(given, CHAT, Slo(near / 1e3), 12).best is not None
    assert find(given, CHAT, Slo(near / 1e3 - 2e-4), 12).best is None


def test_a_rate_that_is_too_high_says_what_could_be_served() -> None:
    given, much = setting(most=8), replace(CHAT, rate=1e5)
    slo, space = Slo(10.0), space_of(given, 8)
    found = search(given, space, much, slo)
    assert found.best is None and found.binding is not None
    rate = highest_rate(given, space, much, slo)
    assert 0 < rate < 1e5
    assert search(given, space, replace(much, rate=rate), slo).best is not None
    assert f"up to {rate:.3g} requests/s would do" in infeasible(found, slo, rate)


def test_long_contexts_need_attention_instances_for_their_cache() -> None:
    slo = Slo(1.0)
    short, long = (find(setting(), Demand(0.2, prompt, 4000), slo).best for prompt in (300, 30_000))
    assert short and long and long.attention > short.attention
    assert long.memory <= 1


def test_a_time_to_the_first_token_needs_room_for_prompts() -> None:
    demand = Demand(4, 4000, 256)
    any_time, soon = (find(setting(), demand, Slo(0.2, ttft)).best for ttft in (np.inf, 1.0))
    assert any_time and soon and soon.ttft_s <= 1.0 < any_time.ttft_s


def test_experts_that_do_not_fit_are_refused_with_what_fits() -> None:
    hardware = squeezed(load_hardware(), "h100", 0.05)
    with pytest.raises(ConfigError, match="holds 1 of 160 experts per layer, and 64 instances are too few"):
        assemble(hardware, deepseek(), Names("h100", "h100"), None)


def test_tables_of_another_setting_are_refused() -> None:
    tables = setting(device="h200").tables
    with pytest.raises(ConfigError, match="--tables: they are of 48 slots, here instances have 27"):
        assemble(load_hardware(), deepseek(), Names("h100", "h100"), None, tables=tables)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"experts": 64}, "of another model, with 6 of 64 experts for each row: here it is 6 of 160"),
        ({"top_k": 8}, "of another model, with 8 of 160 experts for each row: here it is 6 of 160"),
        ({"layers": (0, 1)}, "of another model: layer 0 of this one has no experts"),
        ({"policy": "tokens"}, "replicas are chosen by tokens there, here by activated"),
    ],
)
def test_tables_of_another_model_or_placement_are_refused(change: dict[str, Any], problem: str) -> None:
    tables = replace(setting().tables, **change)
    with pytest.raises(ConfigError, match=f"--tables: .*{problem}"):
        assemble(load_hardware(), deepseek(), Names("h100", "h100"), None, tables=tables)


def test_pools_of_different_devices_have_monoliths_of_the_attention_pool_s() -> None:
    mixed = assemble(load_hardware(), small(), Names("l40s", "h100"), None)
    alone = assemble(load_hardware(), small(), Names("l40s", "l40s"), None)
    one = Space(np.array([1]), np.array([1]), np.array([0]))
    tpots = [look_at(given, one, CHAT, Slo(1.0)).tpot[0] for given in (mixed, alone)]
    assert tpots[0] == tpots[1]


def test_a_plan_is_told_in_words_with_its_figures() -> None:
    given = setting(small(), routing=synthetic(32, 4, 0.5), most=4)
    best = find(given, CHAT, Slo(0.1), most=4).best
    assert best is not None
    words = "\n".join(chosen(best, given))
    assert best.name in words and f"{best.tpot_s * 1e3:.1f} ms per token" in words
