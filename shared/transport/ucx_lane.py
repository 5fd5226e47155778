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
        ready: posts what is missing for so many frames; False while some wait to be delivered, or sent.
        leave, settle: see ``Lane``.
    """

    def __init__(
        self, functions: NDArray[np.int64], worker: int, files: NDArray[np.int64], woken: NDArray[np.int64], *,
        receives: Receives, capacity: int, ready: Callable[[int], bool], leave: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:  # fmt: skip
        self.functions, self.worker, self.files, self.woken = functions, worker, files, woken
        self.receives, self.capacity = receives.table, capacity
        self._receives, self._ready, self.leave, self.settle = receives, ready, leave, settle

    def enter(self, together: int = 1) -> int:
        return self._receives.count if self._ready(together) else 0

    def line(self, peer: Peer, kept: object) -> tuple[int, int]:
        assert isinstance(peer, UcxPeer)
        if not peer.advance():
            peer.kept.clear()  # nothing is read any more
        peer.kept.append(kept)
        return peer.handle, peer.requests.ctypes.data
