"""`moemesh plan --profile`: this machine instead of named hardware, for the model and the sizes that were measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from shared.cli.main import build_app
from shared.errors import ConfigError, MoemeshError
from shared.models.presets import make_checkpoint
from shared.models.source import open_source
from shared.planning.fitted_file import BadProfile, save_fitted
from shared.planning.routing import draw, zipf
from shared.planning.session import Infeasible
from shared.planning.sizes import sizes_of
from shared.traces.native import Header, TraceWriter
from tests.unit.fitted_cases import TRUE, points

ASK = ["plan", "--slo-tpot-ms", "60", "--rate", "10", "--context", "64", "--output", "64"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the profile of a mesh with known coefficients; its trace lies beside it."""
    directory = tmp_path_factory.mktemp("profiled")
    make_checkpoint("tiny-mixtral", directory / "model")
    source = open_source(str(directory / "model"))
    sizes, rng = sizes_of(source.spec, source.name), np.random.default_rng(0)
    file = directory / "here.json"
    save_fitted(file, replace(TRUE, sizes=sizes), points(TRUE), source.digest)
    with TraceWriter(file.with_suffix(".trace"), Header("tiny", "", sizes.experts, sizes.moe_layers)) as writer:
        for layer in sizes.moe_layers:
            for step in range(20):
                writer.append(layer, step, draw(zipf(sizes.experts, 0.5, rng), sizes.top_k, 16, rng))
            writer.append(layer, 20, np.tile(np.arange(sizes.top_k), (500, 1)))  # a chunk of a prompt
    return directory / "model", file


def run(model: Path, *more: str) -> str:
    done = CliRunner().invoke(build_app(), [*ASK, "--model", str(model), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_plan_for_this_machine_stays_within_what_was_measured(profiled: tuple[Path, Path]) -> None:
    model, file = profiled
    facts = json.loads(run(model, "--profile", str(file), "--json"))
    best = facts["best"]
    assert best["kind"] == "mesh" and best["attention"] <= 4 and best["experts"] <= 8
    assert best["tpot_s"] <= 0.06 and facts["hardware"] == str(file) and facts["monolith"] is None
    assert "320 rows" in facts["tables"]["about"]


def test_it_is_printed_with_where_its_times_come_from(profiled: tuple[Path, Path]) -> None:
    model, file = profiled
    text = run(model, "--profile", str(file))
    assert f"times by {file}" in text and "why not less" in text
    assert "monolith" not in text and "memory of attention" not in text


def test_both_or_neither_of_profile_and_hardware_are_refused(profiled: tuple[Path, Path]) -> None:
    model, file = profiled
    with pytest.raises(ConfigError, match=r"--profile: .*leave out --hardware$"):
        run(model, "--profile", str(file), "--hardware", "h100")
    with pytest.raises(ConfigError, match=r"--hardware: name a device.* or give a --profile"):
        run(model)


@pytest.mark.parametrize(
    "ignored",
    [
        ("--link", "infiniband"),
        ("--per-node", "8"),
        ("--hardware-file", "mine.toml"),
        ("--attention-hardware", "h100"),
        ("--zipf", "0.6"),
        ("--bound",),
    ],
)
def test_what_a_profile_would_ignore_is_refused_even_with_its_default(
    profiled: tuple[Path, Path], ignored: tuple[str, ...]
) -> None:
    model, file = profiled
    with pytest.raises(ConfigError, match=f"^--profile: .*: leave out {ignored[0]}$"):
        run(model, "--profile", str(file), *ignored)


def test_a_trace_of_ones_own_takes_the_place_of_the_profiles(profiled: tuple[Path, Path]) -> None:
    model, file = profiled
    facts = json.loads(run(model, "--profile", str(file), "--trace", str(file.with_suffix(".trace")), "--json"))
    assert "320 rows" in facts["tables"]["about"]


def test_a_profile_of_another_model_is_refused(profiled: tuple[Path, Path], tmp_path: Path) -> None:
    make_checkpoint("tiny-qwen3", tmp_path / "other")
    with pytest.raises(BadProfile, match=r"fitted to .*, another model"):
        run(tmp_path / "other", "--profile", str(profiled[1]))


def test_a_profile_whose_trace_is_gone_says_so(profiled: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.json"
    alone.write_text(profiled[1].read_text())
    with pytest.raises(MoemeshError, match=r"alone\.trace"):
        run(profiled[0], "--profile", str(alone))


def test_what_no_measured_size_can_serve_is_refused_with_the_nearest(profiled: tuple[Path, Path]) -> None:
    model, file = profiled
    with pytest.raises(Infeasible, match="TPOT binds: the nearest is"):
        run(model, "--profile", str(file), "--slo-tpot-ms", "2")
