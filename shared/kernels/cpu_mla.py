"""Products with one matrix per head on CPU, as latent attention needs them: for its queries and its values."""
# ruff: noqa: ANN001, ANN201, ANN202 - numba infers the types

import numba
import numpy as np

from shared.kernels.cpu_linear import new_panel
from shared.kernels.jit import call, helper, parallel_kernel, take_next

COLUMNS = 64
"""Output columns of a work item."""


@helper
def _items(counter, project, x, w, kind, y, sizes, strides):
    rows, heads, depth, cols = sizes
    apart, row_stride, head_stride = strides
    numbers, panel, columns = np.empty(rows, np.int32), new_panel(depth), np.empty(COLUMNS, np.int32)
    blocks = (cols + COLUMNS - 1) // COLUMNS
    while True:
        item = take_next(counter)
        head, first = item // blocks, item % blocks * COLUMNS
        if head >= heads:
            return
        count = min(COLUMNS, cols - first)
        for t in range(rows):
            numbers[t] = t * heads + head
        for n in range(count):
            columns[n] = first + n
        target = y + (head * head_stride + first) * 4
        call(project, (x, numbers, rows, w + head * apart, kind, columns, count, depth, panel, target, row_stride))


@parallel_kernel
def head_linear(threads, project, x, w, kind, y, sizes, strides):
    """y[t, h] = w[h] @ x[t, h]; x fp32 [rows, heads, depth], w [heads, cols, depth], y fp32 [rows, heads, cols].

    sizes: rows, heads, depth, cols; strides: bytes from one head of w to the next, elements from one row and from one
    head of y to the next.
    """
    counter = np.zeros(1, np.int64)
    if threads == 1:
        _items(counter, project, x, w, kind, y, sizes, strides)
    else:
        for _ in numba.prange(threads):
            _items(counter, project, x, w, kind, y, sizes, strides)
