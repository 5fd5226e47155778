"""What models cost to hold and to compute, from their config.json alone; devices and links by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.errors import ConfigError, ModelError
from shared.models.families import parse_config
from shared.models.presets import PRESETS
from shared.planning.coefficients import costs_of
from shared.planning.hardware import load_hardware
from shared.planning.memory import attention_bytes, least_experts, room_of
from shared.planning.sizes import read_sizes, sizes_of
from tests.unit.planning_cases import DEEPSEEK_V2, deepseek, small, squeezed


def test_deepseek_v2_has_the_size_that_its_paper_states() -> None:
    sizes = deepseek()
    moe = len(sizes.moe_layers)
    experts = moe * sizes.experts * sizes.expert_params
    others = sizes.attention_weights / sizes.value_bytes + moe * sizes.router_params
    assert experts + others == pytest.approx(236e9, rel=0.005)
    active = others + moe * sizes.top_k * sizes.expert_params
    assert active == pytest.approx(21e9, rel=0.05)


def test_latent_attention_caches_one_latent_and_one_rotated_key() -> None:
    assert deepseek().cache_values == 512 + 64
    assert deepseek().cache_bytes == 60 * 576 * 2
    assert deepseek().position_flops == 2 * 128 * (576 + 512)


def test_grouped_attention_caches_keys_and_values_of_its_own_heads() -> None:
    assert small().cache_values == 2 * 4 * 64
    assert small().position_flops == 4 * 16 * 64


def test_rows_attend_to_no_more_than_a_layer_s_window() -> None:
    config = {**PRESETS["tiny-mixtral"], "sliding_window": 100, "num_hidden_layers": 2}
    sizes = sizes_of(parse_config(config, {}, "windowed"), "windowed")
    assert sizes.attended(50) == 50
    assert sizes.attended(1000) == 100


def test_fp8_checkpoints_have_one_byte_per_parameter_of_a_layer() -> None:
    packed = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    config = json.loads(DEEPSEEK_V2.read_text()) | packed
    sizes = sizes_of(parse_config(config, {}, "fp8"), "fp8")
    assert sizes.expert_bytes == deepseek().expert_bytes / 2
    assert sizes.cache_bytes == deepseek().cache_bytes


def test_a_directory_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    file = tmp_path / "tiny" / "config.json"
    file.write_text(json.dumps(dict(PRESETS["tiny-mixtral"])))
    assert read_sizes(file) == read_sizes(file.parent)
    assert read_sizes(file).name == "tiny"
    assert read_sizes(file).value_bytes == 4


def test_a_model_that_is_none_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model: .*neither a directory with a config.json nor such a file"):
        read_sizes(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        read_sizes(tmp_path)


def test_an_h100_holds_the_27_experts_of_deepseek_v2_that_the_paper_gives_it() -> None:
    hardware = load_hardware()
    h100, h200 = hardware.devices["h100"], hardware.devices["h200"]
    room = room_of(hardware.shares, deepseek(), h100, h100)
    assert (room.slots, least_experts(room, deepseek())) == (27, 6)
    assert room_of(hardware.shares, deepseek(), h100, h200).slots == 48
    tight = squeezed(hardware, "h100", 0.01).devices["h100"]
    assert least_experts(room_of(hardware.shares, deepseek(), h100, tight), deepseek()) == 0


def test_memory_of_attention_grows_with_sequences_and_their_context() -> None:
    sizes = deepseek()
    few, many = attention_bytes(sizes, np.array([1.0, 101.0]), 1000, np.array([1.0, 101.0]))
    assert few == pytest.approx(sizes.attention_weights, rel=0.01)
    assert many - few >= 100 * 1000 * sizes.cache_bytes


def test_coefficients_are_what_has_to_be_read_or_computed_at_the_shares_of_the_peaks() -> None:
    hardware = load_hardware()
    h100, l40s = hardware.devices["h100"], hardware.devices["l40s"]
    costs = costs_of(hardware, deepseek(), h100, l40s)
    assert costs.experts.expert_s == pytest.approx(3 * 5120 * 1536 * 2 / (864e9 * 0.8))
    assert costs.attention.attention_position_s == pytest.approx(
        max(576 * 2 / (3.35e12 * 0.57), 2 * 128 * 1088 / (989e12 * 0.6))
    )
    assert (costs.layers, costs.moe_layers) == (60, 59)


def test_unknown_hardware_lists_what_is_known() -> None:
    hardware = load_hardware()
    with pytest.raises(ConfigError, match="--hardware: 'h1000' is unknown; known are h100, h200, a100, l40s"):
        hardware.device("--hardware", "h1000")
    with pytest.raises(ConfigError, match=r"--link: 'token-ring' is unknown; known are .*infiniband.*ethernet-10"):
        hardware.link("--link", "token-ring")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[shares\n", "Expected"),
        ("[shares]\nweights = 'much'", "shares: weights: input should be a valid number"),
        ("[shares]\nspeed = 1", "shares: unknown fields speed"),
    ],
)
def test_a_catalogue_that_is_none_is_refused_with_the_entry(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "hardware.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_hardware(file)
