"""Time what is enqueued on a stream, on the GPU itself: CUDA's events before and after it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.values import summary


class StreamTimer:
    """Two events of one stream.

    Args:
        stream: As `runtime.cuda.CudaDevice.new_stream` returns it.
    """

    def __init__(self, stream: int) -> None:
        self._cuda = importlib.import_module("cuda.bindings.runtime")
        self._stream = stream
        self._begin, self._end = (self._call("cudaEventCreate") for _ in range(2))

    def ms(self, enqueue: Callable[[], object]) -> float:
        """Return the milliseconds that the GPU takes for what a call enqueues, once it is done."""
        self._call("cudaEventRecord", self._begin, self._stream)
        enqueue()
        self._call("cudaEventRecord", self._end, self._stream)
        self._call("cudaEventSynchronize", self._end)
        return float(self._call("cudaEventElapsedTime", self._begin, self._end))

    def _call(self, name: str, *args: Any) -> Any:
        code, *results = getattr(self._cuda, name)(*args)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name}: {code.name}")
        return results[0] if results else None


def timed(timer: Any, enqueue: Callable[[], object], *, rounds: int, calls: int) -> dict[str, float]:
    """Return a summary of the milliseconds of one call, from rounds of several that follow each other.

    Args:
        timer: A `StreamTimer`.
        enqueue: One call, such as the launch of a graph.
        rounds: How often the events are placed, after one round of warm-up.
        calls: Calls of a round; the gap between events and work is spread over them.
    """

    def several() -> None:
        for _ in range(calls):
            enqueue()

    timer.ms(several)
    return summary([timer.ms(several) / calls for _ in range(rounds)])
