"""`moemesh profile` on a paced mesh: the pace's own times are found, and `moemesh plan` plans with them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.device_profile import load_profile
from shared.models.source import DEMO, open_source
from shared.planning.fitted_file import load_fitted

FIGURES = {"name": "profile-test", "attention_floor_s": 0.002, "experts_s": 0.002, "expert_s": 0.0005, "head_s": 0.001}


def run(*words: str) -> str:
    done = CliRunner().invoke(build_app(), list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_profile_finds_the_times_that_a_paced_mesh_keeps_and_plans_with_them(tmp_path: Path) -> None:
    pace, file = tmp_path / "pace.json", tmp_path / "here.json"
    pace.write_text(json.dumps(FIGURES))
    sizes = ("--attention", "1", "--experts", "1", "--batch", "1,8", "--context", "32,64")
    text = run("profile", "--model", str(DEMO), "--out", str(file), "--pace", str(pace), *sizes)
    assert text.count("1A1E") == 4 and "errors: median" in text
    fitted, points = load_fitted(file, open_source("").digest)
    assert (fitted.paced, fitted.most_attention, fitted.most_experts) == ("profile-test", 1, 1)
    kept, layers = load_profile("--pace", str(pace)), fitted.sizes.layers
    for point in points:
        assert point.expert_s >= kept.experts_s + kept.expert_s * point.activated
        assert point.exchange_s >= point.expert_s
        assert point.step_s >= kept.head_s + layers * (kept.attention_floor_s + point.expert_s)
    assert points[0].batch == 1 and points[0].activated == pytest.approx(fitted.sizes.top_k, rel=0.05)
    ask = ("--slo-tpot-ms", "1000", "--rate", "0.5", "--context", "48", "--output", "32")
    facts = json.loads(run("plan", "--model", str(DEMO), "--profile", str(file), *ask, "--json"))
    assert facts["best"]["name"] == "1A1E"
