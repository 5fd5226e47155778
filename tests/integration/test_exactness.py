"""The exactness contract: a request's tokens and logprob bits are the same alone and under everything that varies."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.models.presets import make_checkpoint
from shared.request_messages import SamplingParams, Submit
from shared.transport.base import FrameKind
from shared.transport.faults import Faults, Rates
from tests.exact_mesh import Output, Parts, Shape, exact_mesh, request

LENGTHS = (1, 2, 5, 16, 17, 33, 64, 90)
OUTPUT = 24


@pytest.fixture(
    scope="module", params=["tiny-qwen3 float32", "tiny-mixtral float32", "tiny-qwen3 bfloat16"], ids=lambda p: p
)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    preset, dtype = request.param.split()
    path = tmp_path_factory.mktemp("exact") / preset
    make_checkpoint(preset, path, dtype=dtype)
    with torch.inference_mode():
        yield Parts(path)


def candidates(vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Eight requests that differ in length and in how they sample; all begin alike, for the prefix cache."""
    rng = np.random.default_rng(11)
    ways = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 2},
        {"temperature": 1.3, "top_k": 20, "seed": 3},
        {"temperature": 0.7, "min_p": 0.05, "seed": 4, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 1 << 63, "presence_penalty": 0.4},
        {"temperature": 0.0, "logit_bias": {5: 3.0}},
    ]
    longest = rng.integers(3, vocab, max(LENGTHS)).tolist()
    prompts = [longest[:n] for n in LENGTHS]
    samplings = [SamplingParams.model_validate({"max_tokens": OUTPUT, "logprobs": 3, **way}) for way in ways]
    return list(zip(prompts, samplings, strict=True))


@cache
def alone(parts: Parts, number: int) -> Output:
    """The output of one request on an otherwise idle 1A1E mesh with large chunks and blocks to spare."""
    prompt, sampling = candidates(parts.spec.vocab_size)[number]
    with exact_mesh(parts, Shape()) as mesh:
        return mesh.run({"x": request("x", prompt, sampling)}, {"x": 0})["x"]


rates = st.builds(Rates, *(st.sampled_from([0.0, 0.0, 0.02, 0.1]) for _ in range(4)))
faults = st.builds(
    lambda seed, kinds: Faults(seed, kinds, longest=0.005),
    st.integers(0, 2**32),
    st.fixed_dictionaries(dict.fromkeys(FrameKind, rates)),
)
shapes = st.builds(
    lambda pool, homes, tokens, blocks, micro_batches: Shape(
        pool[0], pool[1], min(homes, pool[1]), tokens, blocks[0], blocks[1], micro_batches
    ),
    st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (1, 0), (2, 0)]),
    st.integers(1, 3),
    st.sampled_from([3, 8, 31, 64, 512]),
    st.sampled_from([(256, 16), (9, 16), (40, 4), (130, 1)]),  # the later ones leave room for little more than one
    st.sampled_from([0, 1, 2]),
)
batches = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches, shape=shapes, faults=st.none() | faults)
def test_output_bits_do_not_depend_on_batch_chunks_reuse_preemption_instances_or_faults(
    parts: Parts, batch: list[tuple[int, int]], shape: Shape, faults: Faults | None
) -> None:
    known = candidates(parts.spec.vocab_size)
    requests: dict[str, Submit] = {f"r{i}": request(f"r{i}", *known[n]) for i, (n, _) in enumerate(batch)}
    arrivals = {f"r{i}": turn for i, (_, turn) in enumerate(batch)}
    with exact_mesh(parts, shape, faults) as mesh:
        outputs = mesh.run(requests, arrivals)
    for i, (number, _) in enumerate(batch):
        expected = alone(parts, number)
        assert outputs[f"r{i}"].tokens == expected.tokens
        assert outputs[f"r{i}"].logprobs == expected.logprobs
        assert outputs[f"r{i}"].finish == expected.finish


def test_a_monolith_gives_the_output_bits_of_a_mesh(parts: Parts) -> None:
    known = candidates(parts.spec.vocab_size)
    requests = {f"r{i}": request(f"r{i}", *one) for i, one in enumerate(known)}
    with exact_mesh(parts, Shape(experts=0, homes=0, batched_tokens=64)) as monolith:
        outputs = monolith.run(requests, dict.fromkeys(requests, 0))
    assert outputs == {f"r{i}": alone(parts, i) for i in range(len(known))}


def test_resuming_with_the_tokens_so_far_continues_the_same_output(parts: Parts) -> None:
    for number, (prompt, sampling) in enumerate(candidates(parts.spec.vocab_size)):
        expected = alone(parts, number)
        cut = OUTPUT // 2
        resumed = request("x", prompt, sampling).model_copy(
            update={"output": np.array(expected.tokens[:cut], "<i4").tobytes()}
        )
        with exact_mesh(parts, Shape(experts=2)) as mesh:
            mesh.outputs["x"] = Output(expected.tokens[:cut], expected.logprobs[:cut])
            outputs = mesh.run({"x": resumed}, {"x": 0})
        assert outputs["x"].tokens == expected.tokens
        assert outputs["x"].logprobs == expected.logprobs
