"""Two attention instances that run steps together, over real UCX: whichever way, the bits of one instance alone."""

from typing import Any

import pytest

from tests.mesh import outputs, running_mesh

FAR = {"experts-0": "far", "experts-1": "far"}
GROUPS = 'moemesh_groups_total{outcome="formed"}'
MOST_TRIES = 10
"""The gateway is ready with the first attention instance; the second one joins while requests run."""
PROMPT = "In the beginning God created the heaven and the earth. "
BODIES: list[dict[str, Any]] = [
    {"prompt": PROMPT * (1 + i % 3), "max_tokens": 40 + 5 * i, "temperature": i % 2, "seed": i, "logprobs": 2}
    for i in range(6)
]


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    """What one instance gives that holds every expert itself."""
    with running_mesh(attention=1, experts=0, mesh="groups-alone") as mesh:
        return outputs(mesh, BODIES)


@pytest.mark.parametrize(
    ("phase", "gate", "nodes"),
    [
        ("one", "experts", {}), ("direct", "attention", {}), ("relay", "experts", FAR), ("auto", "auto", FAR),
    ],
    ids=lambda value: value if isinstance(value, str) else "far" if value else "near",
)  # fmt: skip
def test_instances_in_a_group_give_the_bits_of_one_alone(alone, phase, gate, nodes):
    settings = {"phase": phase, "gate": gate, "group_wait": "0.5"}
    with running_mesh(nodes, attention=2, experts=2, mesh="groups", settings=settings) as mesh:
        for _ in range(MOST_TRIES):
            assert outputs(mesh, BODIES) == alone
            if all(mesh.metrics_of(f"attention-{i}")(GROUPS) > 0 for i in range(2)):
                return
        pytest.fail("no groups were formed")
