"""CUDA rows between processes, by pointer (cuda_ipc, cuda_copy): checksums hold although streams race."""

from collections.abc import Iterator

import pytest
import torch

from shared.transport.ucx import UcxTransport
from tests.ucx_echo import MAX_FRAME
from tests.ucx_process import Echo, receive

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["", "tcp,cuda_copy"])
def echo(request) -> Iterator[Echo]:
    transport = UcxTransport(MAX_FRAME, torch.device("cuda"), tls=request.param)
    echo = Echo(transport, "--device", "cuda", "--tls", request.param)
    echo.connect()
    yield echo
    echo.kill()
    transport.close()


def checksum(rows: torch.Tensor) -> tuple[int, int]:
    """Two sums over the raw bits: of values, and of values by position."""
    bits = rows.view(torch.int32).flatten().long()
    return int(bits.sum()), int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum())


@pytest.mark.parametrize("rows", [1, 64, 4000])
def test_rows_written_late_arrive_whole_and_may_be_read_late(echo: Echo, rows: int):
    """Slow kernels run before the rows are written and before they are read: neither side may overtake them."""
    device = torch.device("cuda")
    slow = torch.randn(2048, 2048, device=device)
    readers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for sequence in range(20):
        fresh = torch.randn(rows, 1024, device=device)
        for _ in range(10):
            slow = torch.nn.functional.normalize(slow @ slow)
        echo.send(sequence, fresh)
        frame = receive(echo.transport)
        assert frame is not None
        assert frame.rows.is_cuda
        assert frame.header.sequence == sequence
        for _ in range(10):
            slow = torch.nn.functional.normalize(slow @ slow)
        # Queued behind the slow kernels; release() comes first on the host.
        readers.append((fresh, frame.rows.clone()))
        frame.release()
    for fresh, back in readers:
        assert checksum(back) == checksum(fresh)
