"""What a driver of one side offers, and the process that measures it.

A driver runs in the environment of its side, so this file, and every driver, imports only the standard library, numpy
and the libraries of that side. `python -m benchmarks.compare.driver REQUEST.json RESULT.json` measures one in a mode:

- speed: each point of the workload, then the logits of the text prompts.
- image: load, answer one image, and nothing else, so that the peak of resident memory is that of this task.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.compare.workloads import PREFILL, VISION, Point
from benchmarks.measure import seconds, summarise, version

if TYPE_CHECKING:
    import numpy as np

Call = Callable[[], object]

SPEED_MODE, IMAGE_MODE = "speed", "image"


@dataclass(frozen=True)
class FirstToken:
    """One answer to an image: the bytes of its KV cache.

    A side without a vision tower answers a text of as many tokens, which is good for its memory alone.
    """

    cache_bytes: int
    has_vision: bool = True


class Driver(ABC):
    """One opened model. What a side cannot do is None; its place in the tables stays empty.

    `vision`, `prefill` and `decode` prepare their inputs and return the call that is timed. A call of `decode` computes
    one token of each sequence after `past` cached positions and may be repeated.

    Attributes:
        libraries: Distributions at work; the versions of those that are installed are in the result.
    """

    libraries: ClassVar[tuple[str, ...]]

    @abstractmethod
    def __init__(self, folder: Path, threads: int, mode: str, **options: Any) -> None:
        """Open what the export wrote, for one of the modes; options are those of the side."""

    def vision(self, height: int, width: int) -> Call | None:
        """Prepare the vision tower on one image of height × width patches; a side may have none."""
        return None

    @abstractmethod
    def prefill(self, batch: int, length: int) -> Call:
        """Prepare prompts of `length` text tokens, with the logits of the last one."""

    @abstractmethod
    def decode(self, batch: int, past: int) -> Call:
        """Prepare one step; the cached keys and values are zeros, since speed does not depend on them."""

    @abstractmethod
    def first_token(self, image: str, prompt: str) -> FirstToken:
        """Answer an image file with one token, preprocessing included."""

    @abstractmethod
    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """Return the logits of every position of a text, float32 [tokens, vocab]."""

    @abstractmethod
    def decoder_bytes(self) -> int:
        """Return the bytes of weights that one decode step reads."""

    @abstractmethod
    def cache_token_bytes(self) -> float:
        """Return the bytes of keys and values of one token."""


def time_call(call: Call, *, budget_s: float, min_repeats: int, max_repeats: int) -> dict[str, Any]:
    """Time a call after one of warm-up: `min_repeats` times, and up to `max_repeats` within `budget_s`."""
    call()
    times = []
    while len(times) < min_repeats or (len(times) < max_repeats and sum(times) + times[-1] < budget_s):
        times.append(seconds(call))
    return summarise(times)


def time_points(
    driver: Driver, points: Sequence[Point], *, budget_s: float, min_repeats: int, max_repeats: int
) -> dict[str, Any]:
    """Time all points that the driver can do, by name; those that `is_timed_once` once."""
    from benchmarks.compare.workloads import GRIDS

    results: dict[str, Any] = {}
    for point in points:
        if point.phase == VISION:
            call = driver.vision(*GRIDS[point.size])
        elif point.phase == PREFILL:
            call = driver.prefill(point.batch, point.size)
        else:
            call = driver.decode(point.batch, point.size)
        if call is not None:
            least, most = (1, 1) if point.is_timed_once else (min_repeats, max_repeats)
            results[point.name] = time_call(call, budget_s=budget_s, min_repeats=least, max_repeats=most)
            print(f"{point.name}: {results[point.name]['median_s']:.4f} s", file=sys.stderr, flush=True)
        del call  # its buffers must be gone before those of the next point are made
    return results


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process, pages of mapped files included.

    `ru_maxrss` alone will not do: the kernel hands the parent's value on to a spawned child.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load the side that a request names and measure it in the request's mode."""
    module = importlib.import_module(f"benchmarks.compare.drivers.{request['driver']}")
    start = time.perf_counter()
    driver: Driver = module.DRIVER(Path(request["path"]), request["threads"], request["mode"], **request["options"])
    result: dict[str, Any] = {"load_s": time.perf_counter() - start}
    result["versions"] = {name: found for name in driver.libraries if (found := version(name)) is not None}
    repeats = {name: request[name] for name in ("budget_s", "min_repeats", "max_repeats")}
    if request["mode"] == IMAGE_MODE:
        answers: list[FirstToken] = []
        result["image"] = time_call(
            lambda: answers.append(driver.first_token(request["image"], request["prompt"])), **repeats
        )
        return result | {"peak_rss_bytes": peak_rss_bytes(), **asdict(answers[0])}
    points = [Point(**point) for point in request["points"]]
    result["points"] = time_points(driver, points, **repeats)
    logits = [found for found in map(driver.logits, request["texts"]) if found is not None]
    if logits:
        import numpy as np

        np.save(request["logits"], np.concatenate(logits))
    result |= {"decoder_bytes": driver.decoder_bytes(), "cache_token_bytes": driver.cache_token_bytes()}
    return result


def main() -> None:
    """Measure what the first file on the command line says and write the result into the second."""
    request, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(measure(json.loads(request.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
