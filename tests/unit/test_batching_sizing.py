"""Limits from settings: what does not fit is refused with a value that works. Also the parts of long prompts."""

from dataclasses import replace
from typing import Any

import pytest

from services.attention.parts import ASSEMBLY_S, MAX_ASSEMBLIES, PartBuffer
from services.attention.sizing import plan_limits
from shared.activation import PARTS
from shared.config import AttentionConfig
from shared.errors import ConfigError
from shared.exchange_frames import MASK_BYTES, SEGMENT, Routes, longest_frame
from shared.models.spec import ModelSpec, RouterSpec
from shared.request_messages import Decision, SamplingParams, Submit
from shared.transport.base import Header

SPEC = ModelSpec(
    family="toy", vocab_size=100, hidden=8, expert_hidden=4, dense_hidden=4, activation="silu", norm_eps=1e-6,
    tied_head=True, max_positions=1000, eos_ids=(0,), router=RouterSpec(experts=4, top_k=2), layers=(), names={},
)  # fmt: skip
CONFIG = AttentionConfig(kv_memory="1MiB", max_num_seqs=4)
BLOCK_BYTES = 2**10


def test_the_cache_gets_the_memory_it_may_have_but_no_more_than_the_longest_batch_needs():
    assert plan_limits(replace(CONFIG, max_num_seqs=64), SPEC, BLOCK_BYTES).kv_blocks == 1024
    assert plan_limits(CONFIG, SPEC, BLOCK_BYTES).kv_blocks == 4 * 63


def test_the_longest_sequence_is_what_the_model_allows_unless_less_is_asked_for():
    assert plan_limits(CONFIG, SPEC, BLOCK_BYTES).max_model_len == 1000
    assert plan_limits(replace(CONFIG, max_model_len=200), SPEC, BLOCK_BYTES).max_model_len == 200


@pytest.mark.parametrize(
    ("changes", "setting", "words"),
    [
        ({"max_model_len": 1001}, "--max-model-len", "allows 1 to 1000"),
        ({"max_model_len": -1}, "--max-model-len", "allows 1 to 1000"),
        ({"kv_memory": "60KiB"}, "--kv-memory", "holds 960 tokens, one sequence may have 1000; give 1MiB or more"),
        ({"max_num_seqs": 600}, "--max-num-seqs", "do not fit --max-batched-tokens 512"),
        ({"micro_batches": 3}, "--micro-batches", "1 or 2"),
        ({"block_size": 0}, "--block-size", "less than 1"),
        ({"kv_memory": "much"}, "--kv-memory", "not a size"),
        ({"kv_memory": "1e400"}, "--kv-memory", "not a size"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, setting, words):
    with pytest.raises(ConfigError, match=words) as caught:
        plan_limits(replace(CONFIG, **changes), SPEC, BLOCK_BYTES)
    assert caught.value.setting == setting


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_longest_frame_has_room_for_a_merged_reply_and_for_routed_rows(top_k):
    meta = 512 * top_k * PARTS.itemsize + 64 * SEGMENT.itemsize
    reply = Header(4, 0, 0, 0, rows=512 * top_k, columns=8, meta_bytes=meta)
    routed = Header(5, 0, 0, 0, rows=512, columns=8, meta_bytes=MASK_BYTES + Routes.nbytes(512, top_k))
    assert longest_frame(512, top_k, 8) == max(reply.frame_bytes, routed.frame_bytes)


# ---- long prompts in parts ----------------------------------------------------------------------------------


def buffered(max_bytes) -> Any:
    return PartBuffer(max_bytes)


def part(index, parts=3, data=b"\1\0\0\0", name="r"):
    return Submit(
        request_id=name, gateway="g", prompt=data, sampling=SamplingParams(max_tokens=1), deadline_s=9,
        part=index, parts=parts, output=b"\7\0\0\0" if index == parts - 1 else b"",
    )  # fmt: skip


def test_parts_become_one_request_with_the_last_one():
    buffer = buffered(100)
    assert buffer.add(part(1, data=b"bbbb"), 0.0) == Decision(ok=True)
    assert buffer.add(part(0, data=b"aaaa"), 0.0) == Decision(ok=True)
    whole = buffer.add(part(2, data=b"cccc"), 0.0)
    assert (whole.prompt, whole.output, whole.parts) == (b"aaaabbbbcccc", b"\7\0\0\0", 1)
    assert len(buffer) == 0


def test_a_request_in_one_part_passes():
    assert buffered(0).add(part(0, parts=1), 0.0).prompt == b"\1\0\0\0"


def test_a_missing_part_is_named():
    buffer = buffered(100)
    buffer.add(part(0), 0.0)
    decision = buffer.add(part(2), 0.0)
    assert (decision.ok, "[1]" in decision.message, len(buffer)) == (False, True, 0)


def test_parts_beyond_the_bound_are_refused_at_once():
    buffer = buffered(8)
    buffer.add(part(0), 0.0)
    assert buffer.add(part(1, data=b"12345678"), 0.0).code == "too_long"
    assert len(buffer) == 0


def test_an_absurd_number_of_parts_is_refused_at_once():
    buffer = buffered(8)
    assert buffer.add(part(2**40, parts=2**40 + 1), 0.0).code == "too_long"
    assert len(buffer) == 0


def test_an_incomplete_prompt_is_forgotten_after_a_while():
    buffer = buffered(100)
    buffer.add(part(0), 0.0)
    buffer.add(part(1), 1.0)
    assert not buffer.add(part(2), ASSEMBLY_S + 1).ok


def test_only_so_many_prompts_may_be_incomplete():
    buffer = buffered(100)
    decisions = [buffer.add(part(0, name=str(i)), 0.0) for i in range(MAX_ASSEMBLIES + 1)]
    assert [d.ok for d in decisions] == [True] * MAX_ASSEMBLIES + [False]
    assert decisions[-1].code == "full"


def test_a_part_number_out_of_range_is_invalid():
    assert buffered(100).add(part(3), 0.0).code == "invalid"
