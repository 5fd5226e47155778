"""The UCX transport as compiled code uses it: a ``Lane``."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.transport.base import Peer
from shared.transport.ucx_frames import Receives, UcxPeer


class UcxLane:
    """See ``Lane``.

    Args:
        functions, worker, files, woken, capacity: see ``Lane``.
        receives: those of the transport.
        ready: posts what is missing; False while frames wait to be delivered, or sent.
        take: takes what has ended.
    """

    def __init__(
        self, functions: NDArray[np.int64], worker: int, files: NDArray[np.int64], woken: NDArray[np.int64], *,
        receives: Receives, capacity: int, ready: Callable[[], bool], take: Callable[[], None],
    ) -> None:  # fmt: skip
        self.functions, self.worker, self.files, self.woken = functions, worker, files, woken
        self.receives, self.capacity = receives.table, capacity
        self._receives, self._ready, self.leave = receives, ready, take

    def enter(self) -> int:
        return self._receives.count if self._ready() else 0

    def line(self, peer: Peer, kept: object) -> tuple[int, int]:
        assert isinstance(peer, UcxPeer)
        peer.kept[id(kept)] = kept
        return peer.handle, peer.requests.ctypes.data
