"""Device profiles: the formulas say what they should, and a bad profile is refused with its file and key."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from shared.device_profile import (
    BUILT_IN,
    DeviceProfile,
    attention_seconds,
    experts_seconds,
    head_seconds,
    link_seconds,
    load_profile,
    shared_seconds,
)
from shared.errors import ConfigError

PROFILE = DeviceProfile(
    "test", attention_floor_s=1e-3, attention_row_s=1e-4, attention_position_s=1e-6, shared_s=2e-3, shared_row_s=1e-5,
    experts_s=3e-3, expert_s=5e-4, head_s=4e-3, head_row_s=2e-5, link_latency_s=5e-3, link_bytes_per_s=1e6,
)  # fmt: skip


def test_attention_takes_its_floor_until_rows_and_context_pass_it():
    assert attention_seconds(PROFILE, 1, 100) == 1e-3
    assert attention_seconds(PROFILE, 8, 100) == pytest.approx(8 * 1e-4 + 8 * 100 * 1e-6)
    assert attention_seconds(PROFILE, 1, 5000) == pytest.approx(1e-4 + 5e-3)


def test_experts_take_time_by_how_many_are_activated_and_never_less_than_the_constant():
    assert experts_seconds(PROFILE, 0) == 3e-3
    assert experts_seconds(PROFILE, 7) == pytest.approx(3e-3 + 7 * 5e-4)


def test_shared_experts_and_head_take_time_by_row():
    assert shared_seconds(PROFILE, 10) == pytest.approx(2e-3 + 1e-4)
    assert head_seconds(PROFILE, 10) == pytest.approx(4e-3 + 2e-4)
    assert shared_seconds(PROFILE.without_shared(), 10) == 0.0


def test_a_link_takes_latency_and_bytes_and_no_bandwidth_means_no_limit():
    assert link_seconds(PROFILE, 1000) == pytest.approx(5e-3 + 1e-3)
    assert link_seconds(DeviceProfile("latency", link_latency_s=5e-3), 10**9) == 5e-3


def test_built_in_profiles_say_that_they_are_synthetic_and_pass_their_own_checks(tmp_path: Path):
    for name, profile in BUILT_IN.items():
        assert load_profile("--pace", name) is profile
        assert "synthetic" in name
        assert "synthetic" in profile.about
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(asdict(profile)))
        assert load_profile("--pace", str(path)) == profile


def test_added_latency_alone_is_a_profile():
    built_in = BUILT_IN["synthetic-latency-5ms"]
    figures = {f.name: getattr(built_in, f.name) for f in fields(built_in) if f.name not in ("name", "about")}
    assert {name: value for name, value in figures.items() if value} == {"link_latency_s": 0.005}


def test_a_file_of_either_form_gives_a_profile_named_after_it(tmp_path: Path):
    for name, text in (("slow.json", '{"expert_s": 0.001}'), ("slow.toml", "expert_s = 0.001")):
        (tmp_path / name).write_text(text)
        assert load_profile("--pace", str(tmp_path / name)) == DeviceProfile("slow", expert_s=0.001)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.json", '{"expert_ms": 1}', "unknown key expert_ms; known are name, about, attention_floor_s"),
        ("p.json", '{"expert_s": -1}', "expert_s is -1, but has to be a number of at least 0"),
        ("p.json", '{"expert_s": true}', "expert_s is True, but"),
        ("p.json", '{"expert_s": "1"}', "expert_s is '1', but"),
        ("p.json", '{"link_bytes_per_s": NaN}', "link_bytes_per_s is nan, but"),
        ("p.json", '{"link_latency_s": 5}', "link_latency_s is 5, but times are in seconds and at most 1"),
        ("p.json", '{"name": 3}', "name is 3, but has to be a text"),
        ("p.json", '{"expert_s": -1, "x": 1}', "expert_s is -1, but has to be a number of at least 0; unknown key x"),
        ("p.json", "[1]", "not an object"),
        ("p.json", "{", "not valid JSON"),
        ("p.toml", "expert_s = ", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_what_is_wrong(tmp_path: Path, name: str, text: str, said: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_profile("--pace", str(path))
    assert str(refusal.value).startswith(f"--pace: {path}: ")
    assert said in str(refusal.value)


def test_what_is_neither_a_name_nor_a_file_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"--pace: 'h100' is neither .* synthetic-10ms"):
        load_profile("--pace", "h100")
    with pytest.raises(ConfigError, match=r"--pace: none\.json: No such file"):
        load_profile("--pace", "none.json")
