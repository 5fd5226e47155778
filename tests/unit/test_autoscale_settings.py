"""Settings of the autoscaler: what cannot work is refused before anything starts, with the setting's name."""

from pathlib import Path

import pytest

from services.scheduler.autoscale_settings import autoscaling_by
from services.scheduler.autoscaling import A, E
from shared.config import SchedulerConfig
from shared.errors import ConfigError
from shared.models.source import open_source
from tests.unit.autoscale_cases import fitted, write_profile

Settings = dict[str, object]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "fitted.json"
    write_profile(path, fitted(), open_source("").digest)
    return str(path)


def config(file: str, **settings: object) -> SchedulerConfig:
    return SchedulerConfig(**{"autoscale": "on", "actuator": "local", "profile": file, "slo_tpot_ms": 50.0, **settings})  # pyright: ignore[reportArgumentType]


def test_bounds_default_to_what_the_profile_has_measured(profile: str) -> None:
    found = autoscaling_by(config(profile, autoscale_max_experts=2))
    assert found
    rules, measured = found
    assert (rules.least, rules.most) == ({A: 1, E: 1}, {A: 3, E: 2})
    assert (rules.slo.tpot_s, rules.slo.ttft_s) == (0.05, float("inf"))
    assert measured.digest == open_source("").digest


def test_off_asks_for_nothing() -> None:
    assert autoscaling_by(SchedulerConfig()) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"actuator": "none"}, "--autoscale: nobody starts and stops instances here"),
        ({"slo_tpot_ms": 0.0}, "--slo-tpot-ms"),
        ({"slo_ttft_ms": -1.0}, "--slo-ttft-ms"),
        ({"profile": ""}, "--profile: .*moemesh profile --out"),
        ({"profile": "/nowhere/fitted.json"}, "--profile: /nowhere/fitted.json"),
        ({"autoscale_min_attention": 0}, "--autoscale-min-attention: 0 is below 1"),
        ({"slo_tpot_ms": float("nan")}, "--slo-tpot-ms: nan"),
        ({"autoscale_window_s": float("inf")}, "--autoscale-window-s: inf"),
        ({"autoscale_min_experts": 0, "autoscale_idle_s": 0.0}, "--autoscale-idle-s: 0 s is less"),
        ({"autoscale_min_experts": -1}, "--autoscale-min-experts"),
        ({"autoscale_max_experts": 4}, "--autoscale-max-experts: 4 instances, but .* 3 at most"),
        (
            {"autoscale_min_experts": 3, "autoscale_max_experts": 2},
            "--autoscale-min-experts: 3 .* more than the most, 2",
        ),
        ({"autoscale_window_s": 1.0}, "--autoscale-window-s"),
        ({"autoscale_cooldown_s": -1.0}, "--autoscale-cooldown-s"),
        ({"autoscale_idle_s": -1.0}, "--autoscale-idle-s"),
    ],
)
def test_what_cannot_work_is_refused_by_name(profile: str, settings: Settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        autoscaling_by(config(profile, **settings))


def test_without_an_actuator_it_may_observe(profile: str) -> None:
    assert autoscaling_by(config(profile, autoscale="observe", actuator="none"))


def test_a_profile_of_another_model_or_without_its_trace_is_refused(tmp_path: Path) -> None:
    other, alone = tmp_path / "other.json", tmp_path / "alone.json"
    write_profile(other, fitted(), "0" * 64)
    with pytest.raises(ConfigError, match=r"--profile: .*fitted to demo, another model"):
        autoscaling_by(config(str(other)))
    write_profile(alone, fitted(), open_source("").digest)
    alone.with_suffix(".trace").unlink()
    with pytest.raises(ConfigError, match=r"--profile: .*alone.trace: No such file .*beside the profile"):
        autoscaling_by(config(str(alone)))
