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

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Write down what ``call`` would do: (something that does it, what ``call`` returned). Nothing is computed."""
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

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Raises RuntimeError when ``call`` does what cannot be captured, such as waiting for the device.

        Not ``torch.cuda.graph``: that waits for the device and empties the allocator's cache, each time. Only this thread
        is held to the rules of a capture: others may be loading experts.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = call()
            finally:
                graph.capture_end()
        return graph.replay, result


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
        self._capturable: bool | None = None
        self._captured: tuple[Callable[[], None], T] | None = None

    def __call__(self) -> T:
        """Raises RuntimeError when the call cannot be captured although it looked at nothing."""
        if not self._capturable:
            before = self._host_reads()
            result = self._device.run(self._call) if self._capturable is None else self._call()
            self._capturable = self._capturable is None and self._host_reads() == before
            return result
        if self._captured is None:
            self._captured = self._device.capture(self._call)
        replay, result = self._captured
        replay()
        return result
