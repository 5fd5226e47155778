"""The real mesh (1A2E, processes, UCX) against transformers on the same checkpoint, fp32."""

import threading
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.mesh import RunningMesh

TOKENS = 128
LENGTHS = (1, 3, 17, 40, 64, 100, 150, 230)
TOLERANCE = 1e-4


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """TOKENS greedy tokens of transformers and the logits [TOKENS, vocab] that chose them."""
    ids, steps, cache = torch.tensor([prompt]), [], None
    out: list[int] = []
    with torch.inference_mode():
        for _ in range(TOKENS):
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits[0, -1].float())
            out.append(int(steps[-1].argmax()))
            ids = torch.tensor([[out[-1]]])
    return out, torch.stack(steps)


def together(mesh: RunningMesh, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests that are all open at once."""
    answers: list[dict[str, Any]] = [{} for _ in bodies]

    def ask(i: int) -> None:
        answers[i] = mesh.complete(**bodies[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return answers


def test_eight_prompts_together_give_the_greedy_tokens_of_transformers(served: tuple[RunningMesh, Any]) -> None:
    mesh, model = served
    asked = prompts(model.config.vocab_size)
    body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answers = together(mesh, [{"prompt": p, **body} for p in asked])
    for prompt, answer in zip(asked, answers, strict=True):
        expected, logits = greedy(model, prompt)
        got = answer["choices"][0]["token_ids"]
        assert len(got) == TOKENS
        at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
        if at is not None:
            top = logits[at].topk(2).values
            gap = float(top[0] - top[1])
            print(f"prompt of {len(prompt)}: differs at {at}, transformers' own top-2 gap {gap:.2e}")
            assert gap < TOLERANCE, f"prompt of {len(prompt)} tokens differs at output token {at}, gap {gap:.2e}"


def test_logprobs_through_the_mesh_match_transformers(served: tuple[RunningMesh, Any]) -> None:
    """log p = logit - logsumexp on both sides, so equal log-probabilities of many tokens mean equal logits."""
    mesh, model = served
    for prompt in prompts(model.config.vocab_size)[2:5]:
        answer = mesh.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=5, temperature=0, return_token_ids=True)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        got = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert got[0] is None
        for position in range(1, len(prompt)):
            assert abs(got[position] - float(expected[position - 1, prompt[position]])) <= TOLERANCE


@pytest.mark.parametrize("served", ["demo"], indirect=True, scope="package")  # the one that has a language
def test_text_completion_is_what_transformers_writes(served: tuple[RunningMesh, Any]) -> None:
    mesh, model = served
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    text = "And God said, Let there be"
    ids = tokenizer(text)["input_ids"]
    expected, _ = greedy(model, ids)
    answer = mesh.complete(prompt=text, max_tokens=40, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected[:40])
