"""Policies over a whole small replay: what holds for all of them, and what each one is for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.errors import ConfigError, MoemeshError
from shared.replay.base import Parts, Settings
from shared.replay.inputs import BudgetTooSmall
from shared.replay.moemesh import Moemesh, trimmed
from shared.replay.policies import make_policy
from shared.replay.run import Outcome, run_policy
from shared.replay.session import compare
from shared.replay.timing import Form
from tests.unit.replay_cases import EXPERTS, LAYERS, choices, inputs, work, write_trace

ALL = ("static", "eplb", "oracle", "paper", "moemesh")


def run(name: str, form: Form = Form.DEVICES, seed: int = 0, **settings: Any) -> Outcome:
    given = inputs()
    return run_policy(name, work(given, form, seed), given, Settings(form=form, period_s=1.0, **settings))


@pytest.mark.parametrize("form", [Form.DEVICES, Form.SUMS])
def test_no_policy_is_faster_than_perfect_balance_in_any_step(form: Form) -> None:
    least = run("oracle", form).times
    for name in ALL:
        assert (run(name, form).times >= least * (1 - 1e-9)).all(), name


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_replay_and_another_one_another(name: str) -> None:
    first, again, other = run(name), run(name), run(name, seed=1)
    assert first.as_dict() == again.as_dict()
    assert first.as_dict() != other.as_dict()


def test_static_costs_are_those_computed_by_hand() -> None:
    given, outcome = inputs(), run("static")
    steps, layers = len(outcome.times), LAYERS
    misc = steps * layers * given.misc_s * given.misc_bytes
    assert outcome.residents == pytest.approx(LAYERS * EXPERTS)
    assert outcome.resident * 1e9 == pytest.approx(outcome.ended * LAYERS * EXPERTS * given.expert_bytes + misc)
    assert outcome.proxy * 1e9 == pytest.approx(outcome.times.sum() * layers * EXPERTS * given.expert_bytes + misc)
    whole = given.instances * given.instance_bytes + given.misc_bytes
    assert outcome.provisioned * 1e9 == pytest.approx(outcome.ended * whole)


def test_a_pool_smaller_than_the_model_waits_for_starts_and_stays_within_its_budget() -> None:
    given = inputs()
    steps = work(given)
    policy = make_policy("moemesh", steps, given, Settings(budget=0.5, period_s=1.0))
    assert isinstance(policy, Moemesh)
    now = waited = 0.0
    for index in range(len(steps.rows)):
        spent = policy.step(index, now)
        held = np.isfinite(policy.pool.ready).sum(axis=(0, 2))
        assert (held == policy.pool.held).all()
        assert (held <= LAYERS * EXPERTS // 2 // 2).all()
        assert (np.isfinite(policy.pool.ready).sum(axis=1) == policy.pool.copies).all()
        assert spent.end == pytest.approx(now + spent.moe_s + LAYERS * given.misc_s)
        now, waited = spent.end, waited + spent.waited_s
    assert waited > 0
    assert sum(policy.starts) > 0
    assert run("moemesh", budget=0.5).times.mean() > run("moemesh", budget=2.0).times.mean()


def test_idle_experts_are_stopped_and_cost_nothing_until_they_come_back() -> None:
    given = inputs()
    steps = work(given)
    policy = make_policy("moemesh", steps, given, Settings(worth_s=1.0, keep_s=5.0))
    end = policy.step(0, 0.0).end
    all_of_it = policy.idle(end, end + 1000.0)
    assert all_of_it < 24 * 1000 * 0.1
    spent = policy.step(1, end + 1000.0)
    assert spent.late > 0
    assert spent.waited_s > 0


def test_steps_that_compute_prompts_are_told_apart_and_may_have_a_threshold_of_their_own() -> None:
    steps = work(inputs())
    assert 0 < steps.prefill.sum() < len(steps.rows)
    assert (steps.rows[steps.prefill] > 1).all()
    for name in ("paper", "moemesh"):
        same, loose = run(name, threshold=0.2, prefill_threshold=0.2), run(name, threshold=0.2, prefill_threshold=9.0)
        assert same.as_dict() == run(name, threshold=0.2).as_dict()
        assert loose.warm < same.warm, "no replica is added for them"


def test_every_part_can_be_left_out() -> None:
    for part in vars(Parts()):
        outcome = run("moemesh", parts=replace(Parts(), **{part: False}))
        assert outcome.times.mean() > 0
    nothing = run("moemesh", parts=Parts(False, False, False, False))
    assert nothing.times == pytest.approx(run("static").times), "without its parts it is static expert parallelism"
    assert nothing.warm + nothing.cold == 0


def test_the_paper_keeps_a_replica_of_every_expert_and_its_memory_within_the_instances() -> None:
    outcome, given = run("paper"), inputs()
    assert LAYERS * EXPERTS <= outcome.residents <= given.instances * given.slots
    assert outcome.late < 0.01, "only while the one replica that is left is still being started"


def test_all_requests_of_a_second_can_be_one_batch() -> None:
    given = inputs()
    steps = work(given, a_second=True)
    assert steps.rows.max() > given.max_batched_tokens


def test_what_cannot_work_is_refused() -> None:
    given = inputs()
    steps = work(given)
    with pytest.raises(ConfigError, match="'best' is none of static, eplb, oracle, paper, moemesh"):
        compare(steps, given, Settings(), ["best"], lambda _what, _share: None)
    with pytest.raises(
        BudgetTooSmall, match="the top-2 of one layer needs 12582912, the smallest that works"
    ) as refused:
        make_policy("moemesh", steps, given, Settings(budget=0.1))
    smallest = refused.value.smallest / (LAYERS * EXPERTS * given.expert_bytes)
    assert run("moemesh", budget=smallest).times.mean() > 0
    with pytest.raises(BudgetTooSmall, match="every expert at home once"):
        make_policy("static", steps, replace(given, instance_bytes=given.expert_bytes), Settings())


def test_the_command_prints_one_json_object_and_draws(tmp_path: Path) -> None:
    ids = choices(60, 0)
    routing = write_trace(tmp_path / "a.trace", ids, (0, 1, 2))
    predicted = write_trace(tmp_path / "p.trace", ids[:, 1:], (1, 2))
    csv = tmp_path / "a.csv"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,30,4\n2023-11-16 18:15:47.1,30,4\n")
    arguments = [
        "replay", "--routing", str(routing), "--predicted", str(predicted), "--arrivals", str(csv),
        "--policy", "moemesh", "--json", "--plot", str(tmp_path / "x.png"),
    ]  # fmt: skip
    done = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["policy"] for row in result["outcomes"]] == ["static", "oracle", "moemesh"]
    assert result["rows"] == 2 * 33
    assert result["form"] == "devices"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MoemeshError, match="No such file"):
        CliRunner().invoke(build_app(), [*arguments, "--arrivals", str(tmp_path / "none")], catch_exceptions=False)


def test_homes_that_no_memory_is_left_for_are_given_up_but_never_the_last_of_an_expert() -> None:
    homes = np.array([[[True, True, True], [True, False, True]]])
    usage = np.array([[0.9, 0.1, 0.5]])
    assert trimmed(homes, usage, np.array([3, 2])).tolist() == homes.tolist()
    assert trimmed(homes, usage, np.array([2, 2])).tolist() == [[[True, True, False], [True, False, True]]]
    assert trimmed(homes, usage, np.array([0, 0])).any(axis=1).all()
