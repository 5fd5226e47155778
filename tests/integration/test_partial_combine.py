"""Sums instead of parts over a real data plane: the same text, log-probabilities to rounding, fewer bytes.

Where rows are rounded to bf16 before they are multiplied, the last bits of a sum make a difference of a thousandth.
"""

import numpy as np

from tests.mesh import outputs, running_mesh

BODIES = [
    {"prompt": "And God said, " * (1 + 9 * i), "max_tokens": 32, "temperature": 0, "seed": 0, "logprobs": 2}
    for i in range(3)
]


def test_a_mesh_that_combines_partially_gives_the_same_text_with_fewer_bytes() -> None:
    received, answers = [], []
    for combine in ("exact", "partial"):
        with running_mesh(attention=1, experts=2, mesh=combine, settings={"combine": combine}) as mesh:
            answers.append(outputs(mesh, BODIES))
            received.append(mesh.metrics_of("attention-0")('moemesh_exchange_bytes_total{direction="received"}'))
    for exact, partial in zip(*answers, strict=True):
        assert exact[0]["text"] == partial[0]["text"]
        logprobs = [choice[0]["logprobs"]["token_logprobs"] for choice in (exact, partial)]
        np.testing.assert_allclose(*logprobs, atol=2e-2)
    assert 0 < received[1] < 0.8 * received[0]
