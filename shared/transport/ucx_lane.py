"""The UCX transport as compiled code uses it: a ``Lane``."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.transport.base import Peer, Waiting
from shared.transport.ucx_frames import Receives, UcxPeer


class UcxLane:
    """See ``Lane``.

    Args:
        functions, worker, files, woken, capacity: see ``Waiting``.
        receives: those of the transport.
        ready: posts what is missing for so many frames; False while some wait to be delivered, or sent.
        leave, settle: see ``Lane``.
    """

    def __init__(
        self, functions: NDArray[np.int64], worker: int, files: NDArray[np.int64], woken: NDArray[np.int64], *,
        receives: Receives, capacity: int, ready: Callable[[int], bool], leave: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:  # fmt: skip
        self.functions, self._worker, self._files, self._woken = functions, worker, files, woken
        self._receives, self._capacity = receives, capacity
        self._ready, self.leave, self.settle = ready, leave, settle

    @property
    def woken(self) -> bool:
        return bool(self._woken[0])

    def enter(self, together: int = 1) -> Waiting | None:
        receives = self._receives
        if not self._ready(together) or receives.count < together:
            return None
        return self.functions, self._worker, self._files, receives.table, receives.count, self._capacity, self._woken

    def line(self, peer: Peer, kept: object) -> tuple[int, int]:
        assert isinstance(peer, UcxPeer)
        if not peer.advance():
            peer.kept.clear()  # nothing is read any more
        peer.kept.append(kept)
        return peer.handle, peer.requests.ctypes.data
