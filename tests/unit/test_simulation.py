"""Simulated days: requests step by step, decisions from window to window, and scenarios that are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.errors import ConfigError
from shared.planning.deciding import Unservable
from shared.planning.hardware import load_hardware
from shared.planning.plan import Plan
from shared.planning.rivals import NAMES, OURS
from shared.planning.search import search, space_of
from shared.planning.setting import Demand, Slo
from shared.simulation.decisions import BATCHES, decide, forecast, room_of, times_of
from shared.simulation.decisions import CHUNKS as ROWS
from shared.simulation.kernel import serve
from shared.simulation.run import Day, prepare, simulate
from shared.simulation.scenario import load_scenario
from shared.simulation.traffic import day, recorded, sharpness
from tests.unit.planning_cases import DEEPSEEK_V2, setting

WHOLE = "[mesh]\nmodel = 'm'\nhardware = 'h100'\nlink = 'infiniband'\nzipf = 1\n"
PAPER = DEEPSEEK_V2.with_name("paper.toml")
GRID, CHUNKS = np.array([1.0, 100.0]), np.array([0.0, 100.0])


def run(
    times: list[float], prompts: list[int], outputs: list[int], starts: tuple[float, ...] = (0.0,),
    seconds: tuple[float, ...] = (1.0,), room: tuple[float, float] = (100.0, 10.0), ends: float = 1e6,
) -> tuple[list[float], list[float], int, float]:  # fmt: skip
    """Steps that take the same time whatever they hold; one plan after the other."""
    tables = np.stack([np.full((2, 2), s) for s in seconds])
    rooms = np.tile(np.array(room), (len(seconds), 1))
    first, last, steps, area = serve(
        np.array(times), np.array(prompts, np.int64), np.array(outputs, np.int64), np.array(starts),
        np.arange(len(starts)), GRID, CHUNKS, tables, rooms, ends,
    )  # fmt: skip
    return first.tolist(), last.tolist(), steps, area


def test_a_request_gets_a_token_in_every_step_after_its_prompt() -> None:
    first, last, steps, area = run([0.5], [25], [4])
    assert first == [3.5] and last == [6.5]  # a prompt of 25 takes three chunks of 10
    assert steps == 6 and area == pytest.approx(3.0)


def test_requests_share_steps_and_one_token_is_the_first_and_the_last() -> None:
    first, last, steps, _ = run([0.0, 0.0, 0.2], [1, 1, 1], [3, 1, 2])
    assert first == [1.0, 1.0, 2.0]
    assert last == [3.0, 1.0, 3.0]
    assert steps == 3


def test_prompts_wait_for_room_in_the_chunk_and_in_the_cache() -> None:
    first, _, _, _ = run([0.0, 0.0], [10, 1], [1, 1])
    assert first == [1.0, 2.0]
    first, _, _, _ = run([0.0, 0.0], [1, 1], [5, 1], room=(1.0, 10.0))
    assert first == [1.0, 6.0]


def test_a_step_takes_the_time_of_the_plan_in_use_when_it_begins() -> None:
    first, last, _, _ = run([0.0], [1], [4], starts=(0.0, 1.5), seconds=(1.0, 0.1))
    assert first == [1.0] and last == [pytest.approx(2.2)]


def test_what_does_not_end_in_time_has_no_end() -> None:
    first, last, _, _ = run([0.0, 50.0], [1, 1], [100, 1], ends=10.0)
    assert first[0] == 1.0 and np.isnan(last[0]) and np.isnan(first[1])


def test_times_between_entries_of_a_table_lie_on_a_line() -> None:
    table = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    rooms, starts = np.array([[100.0, 100.0]]), np.zeros(1)
    one, many = np.zeros(1), np.zeros(50)
    first, *_ = serve(
        one, np.full(1, 50), np.ones(1, np.int64), starts, np.zeros(1, np.int64), GRID, CHUNKS, table, rooms, 1e3
    )
    assert first[0] == pytest.approx(1.5)  # no sequence, 50 rows of prompts
    _, last, *_ = serve(
        many, np.ones(50, np.int64), np.full(50, 2), starts, np.zeros(1, np.int64), GRID, CHUNKS, table, rooms, 1e3
    )
    assert last[0] == pytest.approx(1.5 + 1 + 2 * 49 / 99)


def test_a_day_has_its_peak_at_noon_and_its_mean_where_it_was_asked() -> None:
    requests = day(peak=20, peak_to_mean=7.5, hours=24, prompt=16, output=256)
    rates = requests.rates(900, 96)
    assert rates.max() == pytest.approx(20, rel=0.1) and 44 <= rates.argmax() <= 52
    assert rates.max() / rates.mean() == pytest.approx(7.5, rel=0.15)
    assert requests.outputs.mean() == pytest.approx(256, rel=0.02) and requests.prompts.min() >= 1
    assert (np.diff(requests.times) >= 0).all()
    assert sharpness(2.0) == pytest.approx(1.0, rel=1e-3)


def test_a_forecast_follows_what_came_before_and_a_trend_upwards() -> None:
    rates = np.array([10.0, 20.0, 30.0, 20.0, 20.0])
    assert forecast(rates, 1.0).tolist() == [10, 10, 30, 40, 20]
    assert forecast(rates, 1.5).tolist() == [15, 15, 45, 60, 30]


def plan(devices: int) -> Plan:
    return Plan("mesh", 1, devices - 1, 1, 1, 1.0, devices, devices, 1, 1, 0, 0, 0, 0, "", {}, 0, {})


def test_both_plans_are_paid_for_while_devices_start_and_drain() -> None:
    schedule = decide(lambda rate: plan(2 if rate < 5 else 10), np.array([1.0, 9.0, 9.0, 1.0]), 100.0, 10.0)
    assert [schedule.plans[i].devices for i in schedule.used] == [2, 10, 10, 2]
    assert schedule.starts.tolist() == [0, 110, 200, 300]  # new devices serve later, fewer at once
    assert schedule.paid.tolist() == [200, 1000, 1000, 10 * 10 + 90 * 2]
    assert schedule.changes == 2


def test_what_cannot_be_served_gets_the_plan_for_the_most_that_can() -> None:
    schedule = decide(lambda rate: plan(7) if rate < 50 else None, np.array([10.0, 500.0]), 100.0, 10.0)
    assert schedule.used.tolist() == [0, 0]
    with pytest.raises(Unservable, match="no plan serves any rate"):
        decide(lambda _: None, np.array([1.0]), 100.0, 10.0)


def test_a_plan_s_table_has_the_times_that_the_search_foretells() -> None:
    given, demand = setting(), Demand(20, 16, 256)
    best = search(given, space_of(given, 16), demand, Slo(0.1)).best
    assert best is not None
    times = times_of(given, best, demand)
    assert times.shape == (len(BATCHES), len(ROWS))
    prompts = best.rows - best.batch
    low = np.searchsorted(BATCHES, best.batch) - 1
    assert times[low, 0] <= best.tpot_s <= times[low + 1, np.searchsorted(ROWS, prompts)]
    sequences, rows = room_of(given, best, demand)
    assert sequences > best.batch and rows == 512 * best.attention


@pytest.fixture(scope="module")
def short() -> Day:
    """Two hours of even traffic."""
    scenario = load_scenario(PAPER)
    mesh, traffic = replace(scenario.mesh, most=16), replace(scenario.traffic, peak=30.0, hours=2.0, peak_to_mean=1.0)
    given = prepare(replace(scenario, mesh=mesh, traffic=traffic), load_hardware())
    requests = day(peak=30.0, peak_to_mean=1.0, hours=2.0, prompt=16, output=256)
    return replace(given, requests=requests, windows=8)


@pytest.mark.parametrize("name", NAMES)
def test_every_system_serves_a_day_and_pays_for_what_it_uses(short: Day, name: str) -> None:
    done = simulate(short, name)
    assert done.attainment > 0.95
    assert done.requests == len(short.requests.times)
    assert done.least * 2 <= done.gpu_hours <= done.most * 2
    assert done.goodput_device == pytest.approx(done.goodput * 2 / done.gpu_hours)


def test_a_limit_of_the_first_token_counts_too(short: Day) -> None:
    soon = replace(short, slo=replace(short.slo, ttft_s=0.075))
    assert 0 < simulate(soon, OURS).attainment < simulate(short, OURS).attainment


def test_the_same_day_again_is_the_same(short: Day) -> None:
    assert simulate(short, OURS).as_dict() == simulate(short, OURS).as_dict()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[mesh", "Expected"),
        ("[mesh]\nmodel = 'm'\nhardware = 'h100'\nlink = 'infiniband'", r"\[mesh\]: zipf: field required"),
        ("[rates]\n", "unknown sections rates"),
        ("[traffic]\nspeed = 1", r"\[traffic\]: unknown fields speed"),
    ],
)
def test_a_scenario_that_is_none_is_refused_with_the_field(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(text if text.startswith("[mesh") else WHOLE + text)
    with pytest.raises(ConfigError, match=problem):
        load_scenario(file)


def test_arrivals_that_go_backwards_are_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "arrivals.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:47,3,4\n2023-11-16 18:15:46,3,4\n")
    with pytest.raises(Exception, match="line 3: its time is before"):
        recorded(file, 4096)
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,4\n2023-11-16 18:15:47.5,5,6\n")
    assert recorded(file, 4096).times.tolist() == [0, 1.5]


def test_unknown_policies_list_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="'magic' is none of janus, monolithic-tiers, balanced, coarse"):
        asked = ["simulate", "--scenario", str(PAPER), "--policy", "magic"]
        CliRunner().invoke(build_app(), asked, catch_exceptions=False)
