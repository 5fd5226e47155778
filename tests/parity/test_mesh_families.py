"""Every family once through the real mesh (1A2E, processes, UCX) against transformers on the same tiny checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.mesh import running_mesh
from tests.parity.families import FAMILIES, config, load_yardstick, save_random
from tests.parity.test_mesh_parity import TOLERANCE, together

NEW_TOKENS = 24
LENGTHS = (2, 13, 40)
"""With the new tokens across every window and chunk of the tiny models."""


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    save_random(config(family), tmp_path)
    model = load_yardstick(tmp_path)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1, model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    body = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body |= {"echo": True, "logprobs": 1}
    with running_mesh(model=str(tmp_path), mesh=f"family-{family.replace('_', '-')}") as mesh:
        answers = together(mesh, [{"prompt": prompt, **body} for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        choice = answer["choices"][0]
        tokens = prompt + choice["token_ids"][-NEW_TOKENS:]
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens[len(prompt) :]
        got = choice["logprobs"]["token_logprobs"]
        assert len(got) == len(tokens)
        wanted = expected[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
        assert float((torch.tensor(got[1:]) - wanted).abs().max()) <= TOLERANCE
