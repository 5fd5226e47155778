"""Replies of one weighted sum per row, for links that are slower than adding: the combine that is called partial.

Which parts are in the sums is said all the same, so that the other side can check that none is missing or doubled.
Sums of several instances are added in fp32, in another order than single parts would be: results agree to rounding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.activation import PARTS
from shared.exchange_frames import SEGMENT, write_segments
from shared.transport.base import Outgoing, Transport


def frame_of_sums(
    transport: Transport, parts: NDArray[np.void], rows: Tensor, segments: Sequence[tuple[int, int]]
) -> Outgoing:
    """A COMBINE to be sent with the flag SUMS and the number of segments.

    Args:
        parts: PARTS [P], segment after segment.
        rows: fp32 [P, H], not weighted.
        segments: (bit of an instance, number of its parts).
    """
    tokens, where = np.unique(parts["token"], return_inverse=True)
    size, columns, device = parts.nbytes + len(segments) * SEGMENT.itemsize, rows.shape[1], rows.device
    frame = transport.outgoing(size, len(tokens), columns, torch.float32)
    frame.meta[: parts.nbytes] = np.ascontiguousarray(parts).view(np.uint8)
    write_segments(frame.meta, list(segments))
    weights = torch.from_numpy(parts["weight"].copy()).to(device)
    frame.rows.zero_().index_add_(0, torch.from_numpy(where).to(device), rows * weights[:, None])
    return frame


class Room:
    """For the parts of an exchange, where they are added before anything is sent."""

    def __init__(self, most: int, columns: int, device: torch.device) -> None:
        self.meta = np.empty(most * PARTS.itemsize, np.uint8)
        self.rows = torch.empty(most, columns, device=device)

    def parts(self, count: int) -> NDArray[np.void]:
        """PARTS of the first ``count``."""
        return self.meta.view(PARTS)[:count]
