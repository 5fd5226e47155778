"""What gateways have served, added up: nobody is counted twice, nobody for ever."""

import pytest

from services.gateway.choices import Piece
from services.gateway.metrics import GatewayMetrics, Timing
from services.gateway.requests import Job
from services.gateway.tally import Tally
from services.scheduler.traffic import SILENT_S, Traffic
from shared.errors import BadMessage
from shared.load_messages import Served
from shared.request_messages import SamplingParams
from tests.unit.autoscale_cases import served, waits


def traffic(*reports: tuple[float, Served], keep_s: float = 30.0) -> Traffic:
    made = Traffic(keep_s, 0.0)
    for at, report in reports:
        made.add(report, at)
    return made


def test_gateways_are_added_up() -> None:
    seen = traffic((1.0, served("a", arrived=2, open=1)), (1.2, served("b", arrived=4, open=2))).seen(2.0, 2.0)
    assert (seen.rate, seen.open) == (3.0, 3)


def test_a_gateway_that_was_started_again_replaces_what_was_open_before() -> None:
    made = traffic((1.0, served("a", 1, open=7)), (2.0, served("a", 2, open=1)))
    assert made.seen(5.0, 2.0).open == 1
    made.add(served("a", 1, arrived=5, open=7), 2.1)
    late = made.seen(5.0, 2.2)
    assert (late.open, late.arrived) == (1, 0)


def test_a_silent_gateway_has_no_open_requests_but_what_it_served_was_served() -> None:
    made = traffic((1.0, served("a", arrived=3, open=3)), (2.0, served("b", open=1)))
    seen = made.seen(30.0, 1.0 + SILENT_S)
    assert (seen.open, seen.arrived) == (1, 3)


def test_windows_come_oldest_first_and_only_those_that_are_known() -> None:
    made = traffic(*((float(second), served(arrived=second)) for second in range(1, 8)))
    assert made.rates(2.0, 3, 7.5).tolist() == [(2 + 3) / 2, (4 + 5) / 2, (6 + 7) / 2]
    assert made.rates(4.0, 3, 7.5).tolist() == [(4 + 5 + 6 + 7) / 4]
    assert made.rates(10.0, 3, 7.5).tolist() == []


def test_reports_are_forgotten() -> None:
    made = traffic((1.0, served(arrived=9)), (20.0, served(arrived=1)), keep_s=10.0)
    assert made.seen(100.0, 20.0).arrived == 1


def test_outputs_are_as_long_as_those_that_ended_else_as_what_was_sent() -> None:
    sent = served(arrived=2, output_tokens=60)
    assert traffic((1.0, sent)).seen(10.0, 2.0).output == 30
    ended = served(ended=4, ended_tokens=400)
    assert traffic((1.0, sent), (2.0, ended)).seen(10.0, 2.0).output == 100


def test_refused_requests_are_demand_and_say_nothing_of_outputs() -> None:
    seen = traffic((1.0, served(arrived=10, prompt_tokens=50, refused=8, output_tokens=60))).seen(10.0, 2.0)
    assert (seen.rate, seen.prompt, seen.output) == (5.0, 5.0, 30.0)
    refused = traffic((5.0, served(arrived=1, refused=1)))
    assert refused.idle_s(12.0) == 7.0
    assert refused.rates(6.0, 2, 12.0).tolist() == [1 / 6, 0.0]


def test_idle_is_since_anything_was_open_or_came() -> None:
    made = traffic((5.0, served(open=1)), (9.0, served()))
    assert made.idle_s(12.0) == 7.0


@pytest.mark.parametrize(("share", "value"), [(0.5, 0.1), (0.99, 1.0)])
def test_quantiles_are_exact_to_a_bucket(share: float, value: float) -> None:
    reports = served(inter=waits(90, 0.1)), served(inter=waits(10, 1.0))
    times = traffic(*((float(i), report) for i, report in enumerate(reports, 1))).seen(10.0, 3.0).inter
    assert value <= times.quantile(share) <= 1.25 * value
    assert times.mean == pytest.approx(0.19)


def jobs(count: int, prompt: int) -> list[Job]:
    return [Job(index, [1] * prompt, SamplingParams(max_tokens=8)) for index in range(count)]


def test_a_gateway_tells_what_came_what_was_sent_and_what_is_open() -> None:
    tally = Tally()
    timing = Timing(GatewayMetrics(lambda: (0, 0)), tally, jobs(2, prompt=5))
    timing.piece(Piece(0, tokens=[1]))
    timing.piece(Piece(0, tokens=[2, 3], finish="stop"))
    first = tally.take("g", 1)
    assert (first.arrived, first.prompt_tokens, first.output_tokens) == (2, 10, 3)
    assert (first.ended, first.ended_tokens, first.open) == (1, 3, 1)
    assert (sum(first.first.counts), sum(first.inter.counts)) == (1, 2)
    timing.end()  # the other choice had no token yet
    second = tally.take("g", 1)
    assert (second.arrived, second.output_tokens, second.ended, second.ended_tokens, second.open) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("wrong", [{"counts": (1, 2)}, {"seconds": float("inf")}, {"seconds": -1.0}])
def test_a_report_whose_times_are_no_histogram_is_refused(wrong: dict[str, object]) -> None:
    damaged = served().model_copy(update={"inter": waits().model_copy(update=wrong)})
    with pytest.raises(BadMessage):
        Served.decode(damaged.encode())


@pytest.mark.parametrize("facts", [{"open": 1 << 40}, {"arrived": -1}, {"seconds": 1e300}, {"seconds": float("nan")}])
def test_a_report_beyond_all_bounds_is_no_report(facts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(facts))):
        Served.model_validate(served().model_dump() | facts)
