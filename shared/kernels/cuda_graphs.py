"""Calls of kernels captured as CUDA graphs and replayed: what recorder.py is on a CPU. Knows no kernels."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Capturing(Protocol):
    """What a recording asks of the device."""

    def run(self, call: Callable[[], T]) -> T:
        """``call`` now, where it will be captured later; what is queued after it waits for it."""
        ...

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Write down what ``call`` would do, computing nothing: what does it, and returns the same every time."""
        ...


class Graphs:
    """CUDA graphs of one device, whose intermediate results share memory: replay them in one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, call: Callable[[], T]) -> T:
        """In the stream of captures, so that what libraries set up once per stream is there before the first one."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def capture(self, call: Callable[[], T]) -> Callable[[], T]:
        """Raises RuntimeError when ``call`` does what cannot be captured, such as waiting for the device.

        Not ``torch.cuda.graph``: that waits for the device and empties the allocator's cache, each time. Only this
        thread is held to the rules of a capture: others may be loading experts.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = call()
            finally:
                graph.capture_end()

        def replay() -> T:
            graph.replay()
            return result

        return replay


class GraphRecording(Generic[T]):
    """A call that runs as it is the first time, is captured the second time, and is replayed from then on.

    The first time is real work and the warm-up at once: it sees to it that no buffer is made during the capture. A call
    whose kernels had to look at values on the host cannot be captured, and runs as it is every time.

    Args:
        host_reads: how often kernels have looked at values on the host so far.
    """

    def __init__(self, call: Callable[[], T], device: Capturing, host_reads: Callable[[], int]) -> None:
        self._call = call  # also keeps the tensors that it works on
        self._device = device
        self._host_reads = host_reads
        self._first = True
        self._again: Callable[[], T] | None = None
        """What to do from now on, once that is known."""

    def __call__(self) -> T:
        """Raises RuntimeError when the call cannot be captured although it looked at nothing."""
        if self._first:
            self._first, before = False, self._host_reads()
            result = self._device.run(self._call)
            self._again = None if self._host_reads() == before else self._call
            return result
        if self._again is None:
            self._again = self._device.capture(self._call)
        return self._again()
