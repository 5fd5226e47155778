"""`moemesh plan`: text and JSON, pictures, tables on disk; what is wrong with a question is said in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.errors import ConfigError
from shared.models.presets import PRESETS
from shared.planning.routing import draw, zipf
from shared.planning.session import Infeasible
from shared.replay.arrivals import BadArrivals
from shared.traces.native import Header, TraceWriter
from tests.unit.planning_cases import DEEPSEEK_V2

ASK = ["plan", "--model", str(DEEPSEEK_V2), "--slo-tpot-ms", "50", "--rate", "20", "--context", "144", "--prompt", "16"]
H100 = ["--hardware", "h100", "--bound"]


def run(*more: str) -> str:
    done = CliRunner().invoke(build_app(), [*ASK, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_plan_is_printed_with_why_and_what_comes_next() -> None:
    text = run(*H100)
    assert "a_max by the bound" in text and "all times are computed" in text
    assert "why not less: " in text and "0.0% from the optimum" in text
    assert "monolith" in text


def test_json_holds_the_plan_its_parts_and_the_question() -> None:
    facts = json.loads(run(*H100, "--json"))
    best = facts["best"]
    assert best["devices"] == best["attention"] + best["experts"] >= 7
    assert best["tpot_s"] <= 0.05 and best["broken"] == []
    assert set(best["parts"]) == {"attention", "shared", "experts", "exchange", "head"}
    assert facts["demand"]["rate"] == 20 and facts["slo_ttft_s"] is None
    assert facts["distance_from_exact"] == pytest.approx(0, abs=1e-9)
    assert len(facts["ranking"]) == 5


def test_pools_may_have_devices_and_prices_of_their_own() -> None:
    pools = ("--attention-hardware", "l40s", "--expert-hardware", "h200", "--attention-price", "0.4")
    facts = json.loads(run(*H100, *pools, "--slo-tpot-ms", "80", "--json"))
    mesh = facts["mesh"]
    assert mesh["price"] == pytest.approx(0.4 * mesh["attention"] + mesh["experts"])
    assert facts["hardware"]["experts"] == "h200"


def test_activated_experts_are_counted_in_a_recorded_trace(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(PRESETS["tiny-mixtral"])))
    trace, rng = tmp_path / "routing.trace", np.random.default_rng(0)
    with TraceWriter(trace, Header("tiny", "", 8, (0, 1, 2))) as writer:
        for layer in (0, 1, 2):
            writer.append(layer, 0, draw(zipf(8, 1.0, rng), 2, 300, rng))
    ask = ["plan", "--model", str(tmp_path), "--hardware", "l40s", "--slo-tpot-ms", "20", "--rate", "50", "--json"]
    done = CliRunner().invoke(build_app(), [*ask, "--most", "4", "--trace", str(trace)], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert facts["tables"]["about"] == "routing.trace: 300 rows of 3 layers"
    assert 2 <= facts["monolith"]["a_max"] <= 8


def test_tables_are_written_once_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "tables.npz"
    first = json.loads(run("--hardware", "h200", "--most", "5", "--tables", str(file), "--json"))
    assert file.exists()
    again = json.loads(run("--hardware", "h200", "--most", "5", "--tables", str(file), "--bound", "--json"))
    assert again["tables"] == first["tables"] and "Zipf" in again["tables"]["about"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(*H100, "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "error", "problem"),
    [
        ([*H100, "--zipf", "1"], ConfigError, "^--bound: .*: leave out --zipf$"),
        ([*H100, "--trace", "a.trace"], ConfigError, "^--trace: .*: leave out --bound$"),
        (["--expert-hardware", "h100"], ConfigError, "^--hardware: name a device"),
        (["--hardware", "h1000"], ConfigError, "known are h100, h200, a100, l40s"),
        ([*H100, "--link", "string"], ConfigError, "--link: 'string' is unknown"),
        ([*H100, "--most", "3"], ConfigError, "3 instances are too few"),
        ([*H100, "--slo-tpot-ms", "5"], Infeasible, "TPOT binds: the nearest is .* --slo-tpot-ms"),
    ],
)
def test_questions_without_an_answer_say_why(more: list[str], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        CliRunner().invoke(build_app(), [*ASK, *more], catch_exceptions=False)


def requests_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def ask_with(trace: Path, *more: str) -> list[str]:
    return ["plan", "--model", str(DEEPSEEK_V2), "--slo-tpot-ms", "50", *H100, "--trace", str(trace), "--json", *more]


def test_a_csv_of_requests_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    busy = [f"2023-11-16 12:{minute:02}:{second:02}.5,100,50" for minute in range(15) for second in range(60)]
    calm = [f"2023-11-16 {hour}:00:00,300,150" for hour in range(13, 23)]
    trace = requests_csv(tmp_path / "requests.csv", *busy, *calm)

    def demand(*more: str) -> dict[str, float]:
        done = CliRunner().invoke(build_app(), ask_with(trace, *more), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.output)["demand"]

    found = demand()
    assert found["rate"] == pytest.approx(1.0, rel=0.01)
    assert found["prompt"] == pytest.approx((900 * 100 + 10 * 300) / 910)
    assert found["output"] == pytest.approx((900 * 50 + 10 * 150) / 910)
    assert demand("--rate", "20", "--context", "144", "--output", "256") | {"chunk": 0} == {
        "rate": 20, "prompt": 16, "output": 256, "chunk": 0,
    }  # fmt: skip


def test_requests_that_go_back_in_time_are_refused_with_the_line(tmp_path: Path) -> None:
    trace = requests_csv(tmp_path / "r.csv", *(f"2023-11-16 12:00:0{second},10,5" for second in (0, 5, 1)))
    with pytest.raises(BadArrivals, match="line 4: its time is before that of the line above"):
        CliRunner().invoke(build_app(), ask_with(trace), catch_exceptions=False)


def test_without_a_rate_and_without_requests_there_is_nothing_to_plan_for() -> None:
    with pytest.raises(ConfigError, match="--rate"):
        CliRunner().invoke(
            build_app(), ["plan", "--model", str(DEEPSEEK_V2), "--slo-tpot-ms", "50", *H100], catch_exceptions=False
        )
