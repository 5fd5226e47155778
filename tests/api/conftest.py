"""``api_url``: where the API under test answers. Tests with only this fixture run on the fake and on the real mesh."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.api.stack import FakeMesh, fake_mesh, in_thread
from tests.mesh import running_mesh


@pytest.fixture(scope="package", params=["fake", "mesh"])
def api_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One mesh for all tests that break nothing: a gateway over a fake attention instance, and a real 1A2E mesh."""
    if request.param == "fake":
        with in_thread(tmp_path_factory.mktemp("api")) as fake:
            yield fake.url
    else:
        with running_mesh(attention=1, experts=2) as mesh:
            yield mesh.url


@pytest.fixture
async def mesh_of_two(tmp_path) -> AsyncIterator[FakeMesh]:
    """A gateway of its own over two fakes, for tests that break something."""
    async with fake_mesh(tmp_path, attention=2) as mesh:
        yield mesh
