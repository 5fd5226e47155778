"""``api_url``: where the API under test answers. Tests that use only this fixture run against any mesh."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.api.stack import FakeMesh, fake_mesh, in_thread


@pytest.fixture(scope="session")
def shared_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeMesh]:
    """One gateway over one fake attention instance for all tests that break nothing."""
    with in_thread(tmp_path_factory.mktemp("api"), max_body="64KiB") as mesh:
        yield mesh


@pytest.fixture
def api_url(shared_mesh: FakeMesh) -> str:
    return shared_mesh.url


@pytest.fixture
async def mesh_of_two(tmp_path) -> AsyncIterator[FakeMesh]:
    """A gateway of its own over two fakes, for tests that break something."""
    async with fake_mesh(tmp_path, attention=2) as mesh:
        yield mesh
