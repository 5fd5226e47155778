"""Cancellation, deadlines, lost experts, broken rows, full queues: what ends, what goes on; no block is lost."""

import threading

import pytest

from services.attention.batching import Limits
from services.attention.exchange import View
from services.attention.outbox import LINGER_S
from services.attention.stats import NO_EXPERTS_GRACE_S, EngineStats, facts
from shared.messages import Placement
from tests.unit.toy_engine import ToyEngine, alone

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def started(*names, turns=3, **limits):
    engine = ToyEngine(**limits)
    for name in names:
        assert engine.submit(name, PROMPT, max_tokens=20).ok
    for _ in range(turns):
        engine.engine.turn()
    return engine


# ---- cancel and leases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_cancelling_frees_the_blocks_before_the_next_step(turns):
    engine = started("a", turns=turns, max_batched_tokens=8)
    engine.engine.cancel("a")
    steps = engine.engine.stats.steps
    assert not engine.engine.turn()
    assert (engine.engine.stats.steps, engine.pool.leaked()) == (steps, [])
    assert engine.received["a"].finish == "cancelled"
    assert engine.engine.resend("a", 0).code == "unknown"


def test_cancelling_one_changes_nothing_for_another():
    engine = started("a", "b")
    engine.engine.cancel("a")
    engine.engine.cancel("nobody")
    engine.turns()
    assert engine.received["b"] == alone(PROMPT, max_tokens=20)


def test_cancelling_what_is_finished_forgets_it():
    engine = ToyEngine()
    engine.run("a", PROMPT)
    engine.engine.cancel("a")
    engine.turns()
    assert engine.engine.stats.unacknowledged == 0


def test_the_requests_of_a_gateway_that_is_gone_are_dropped_and_no_others():
    engine = ToyEngine()
    engine.submit("dead", PROMPT, gateway="g1", max_tokens=20)
    engine.submit("alive", PROMPT, gateway="g2", max_tokens=20)
    engine.run("finished", PROMPT[:2], gateway="g1")
    engine.engine.drop_gateway("g1")
    engine.turns()
    assert engine.engine.stats.unacknowledged == 1
    assert engine.received["alive"].finish == "length"
    assert engine.pool.leaked() == []


# ---- deadlines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 3])
def test_a_request_past_its_deadline_ends_with_that_error(turns):
    engine = started("a", turns=turns)
    engine.now += 100
    engine.turns()
    got = engine.received["a"]
    assert (got.finish, got.error.code, got.error.message) == ("error", "deadline", "not finished within 100 s")
    assert engine.pool.leaked() == []


def test_output_that_nobody_acknowledges_is_forgotten_some_time_after_the_deadline():
    engine = ToyEngine()
    engine.run("a", PROMPT)
    engine.now += 100 + LINGER_S - 1
    engine.turns()
    assert engine.engine.resend("a", 0).ok
    engine.now += 2
    engine.turns()
    assert engine.engine.resend("a", 0).code == "unknown"


# ---- experts that do not answer -----------------------------------------------------------------------------


def test_nothing_advances_while_experts_do_not_answer_and_everything_goes_on_when_they_do():
    engine = started("a", "b")
    tokens = len(engine.received["a"].tokens)
    engine.exchange.available = False
    for _ in range(5):
        assert not engine.engine.turn()
        engine.now += 1.5
    assert engine.engine.stats.stalled
    assert engine.exchange.abandoned > 0
    assert len(engine.received["a"].tokens) == tokens
    engine.exchange.available = True
    assert engine.engine.turn()
    assert not engine.engine.stats.stalled
    engine.turns()
    assert engine.received["a"] == engine.received["b"] == alone(PROMPT, max_tokens=20)


def test_cancels_and_deadlines_work_while_experts_do_not_answer():
    engine = started("a", "b")
    engine.submit("late", PROMPT, deadline_s=3)
    engine.exchange.available = False
    engine.engine.turn()
    engine.engine.cancel("a")
    engine.now += 4
    engine.turns()
    assert engine.received["a"].finish == "cancelled"
    assert engine.received["late"].error.code == "deadline"
    assert engine.received["b"].finish is None


def test_a_step_is_not_repeated_all_the_time_while_no_home_answers():
    engine = started("a")
    calls = []
    engine.exchange.available = False
    dispatch = engine.exchange.dispatch
    engine.exchange.dispatch = lambda layer, *rest: calls.append(layer) or dispatch(layer, *rest)
    for _ in range(50):
        engine.engine.turn()
    assert len(calls) == 2, "one attempt, which fails at the second MoE layer"


def test_requests_that_waited_too_long_for_experts_fail_and_newer_ones_go_on_waiting():
    engine = started("old", no_home_deadline=30.0)
    engine.exchange.available = False
    engine.turns()
    engine.now += NO_EXPERTS_GRACE_S - 1
    assert engine.submit("new", PROMPT).ok
    engine.turns()
    engine.now += 30 - NO_EXPERTS_GRACE_S + 1
    engine.turns()
    assert (engine.received["old"].finish, engine.received["old"].error.code) == ("error", "no_experts")
    assert engine.received["new"].finish is None
    engine.exchange.available = True
    engine.turns()
    assert engine.received["new"].tokens == alone(PROMPT).tokens
    assert engine.pool.leaked() == []


def test_a_second_loss_of_experts_has_its_own_deadline():
    engine = started("a", no_home_deadline=5.0)
    for _ in range(3):
        engine.exchange.failures = 1
        assert not engine.engine.turn()
        engine.now += 4
        assert engine.engine.turn()
        engine.now += 4
    engine.turns()
    assert engine.received["a"].finish == "length"


def test_nobody_is_let_in_once_experts_have_been_away_for_a_while():
    engine = ToyEngine()
    engine.exchange.available = False
    engine.turns()
    assert engine.submit("a", PROMPT).ok
    engine.now += NO_EXPERTS_GRACE_S + 1
    assert engine.submit("b", PROMPT).code == "no_experts"
    engine.exchange.available = True
    engine.turns()
    assert engine.submit("c", PROMPT).ok


# ---- rows that are no numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 1}, {"logprobs": 1}])
def test_a_row_of_nan_ends_that_request_only(sampling):
    engine = ToyEngine(poison=[40])
    engine.submit("bad", [1, 2, 40], **sampling)
    good = engine.run("good", [1, 2, 3], **sampling)
    assert (engine.received["bad"].finish, engine.received["bad"].error.code) == ("error", "internal")
    assert engine.received["bad"].tokens == []
    assert good.finish == "length"
    assert engine.pool.leaked() == []


def test_nobody_begins_with_the_cache_of_a_request_that_ended_in_nan():
    engine = ToyEngine(poison=[40])
    engine.run("bad", [1, 2, 3, 4, 40])
    engine.run("good", [1, 2, 3, 4, 5])
    assert engine.received["bad"].error.code == "internal"
    assert engine.engine.stats.reused_tokens == 0


def test_nan_among_the_prompt_logprobs_ends_that_request_only():
    engine = ToyEngine(poison=[40], max_batched_tokens=2)
    engine.submit("bad", [1, 40, 2, 3], prompt_logprobs=0)
    engine.run("fine", [1, 40, 2, 3])
    assert engine.received["bad"].error.code == "internal"
    assert engine.received["fine"].finish == "length"
    assert engine.pool.leaked() == []


# ---- admission ----------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_opens_again():
    engine = ToyEngine(max_waiting=2, max_num_seqs=1)
    assert [engine.submit(name, PROMPT).code for name in "abc"] == [None, None, "full"]
    engine.engine.turn()
    assert [engine.submit(name, PROMPT).code for name in "de"] == [None, "full"], "a runs now"
    engine.turns()
    assert engine.submit("f", PROMPT).ok
    assert engine.engine.desk.refused == {"full": 2}


def test_a_refused_request_is_unknown_and_may_be_tried_again():
    engine = ToyEngine(max_waiting=0)
    assert engine.submit("a", PROMPT).code == "full"
    assert engine.engine.resend("a", 0).code == "unknown"
    assert engine.submit("a", PROMPT).code == "full"


def test_a_stopping_instance_takes_nothing_new_and_can_hand_its_requests_back():
    engine = started("a")
    engine.engine.desk.draining = True
    assert engine.submit("b", PROMPT).code == "draining"
    assert engine.engine.open == 1
    engine.engine.fail_all("draining", "this instance is stopping")
    engine.turns()
    assert engine.received["a"].error.code == "draining"
    assert (engine.engine.open, engine.pool.leaked()) == (0, [])


# ---- the thread ---------------------------------------------------------------------------------------------


def test_the_view_reaches_the_exchange_and_its_version_the_stats():
    engine = ToyEngine()
    placement = Placement(
        version=7, epoch=1, author="s", reason="r", digest="d", instances=(), moe_layers=(), experts=0, homes=b""
    )
    engine.engine.update(View(placement))
    engine.turns()
    assert (engine.exchange.views[-1].placement, engine.engine.stats.placement) == (placement, 7)


def test_what_breaks_in_the_compute_thread_comes_out_of_run():
    engine = started("a")

    def broken(layer, rows, trace):
        raise RuntimeError("a defect")

    engine.exchange.dispatch = broken
    with pytest.raises(RuntimeError, match="a defect"):
        engine.engine.run()


def test_run_serves_other_threads_and_ends_when_told():
    engine = ToyEngine()
    arrived = threading.Event()
    engine.exchange.idle_wait = lambda timeout: arrived.wait(0.01)
    thread = threading.Thread(target=engine.engine.run)
    thread.start()
    engine.submit("a", PROMPT)
    while engine.engine.open:
        assert thread.is_alive()
    engine.engine.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert engine.received["a"].tokens == alone(PROMPT).tokens


def test_heartbeats_say_stalled_before_any_expert_was_seen_and_after_the_grace() -> None:
    limits = Limits(64, 1, 8, 1, 16, 4, 16)
    nowhere = ToyEngine().exchange
    assert facts(EngineStats(), limits, 0.0, nowhere).stalled
    assert not facts(EngineStats(unready_since=None), limits, 100.0, nowhere).stalled
    assert not facts(EngineStats(unready_since=10.0), limits, 10.0 + NO_EXPERTS_GRACE_S, nowhere).stalled
    assert facts(EngineStats(unready_since=10.0), limits, 10.1 + NO_EXPERTS_GRACE_S, nowhere).stalled
