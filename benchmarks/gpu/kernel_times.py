"""What kernels a decode step, a prompt and an image take on the GPU, by PyTorch's profiler: `kernel_times ENGINE`.

Values, for `decode`, `prefill` (512 tokens) and `vision` (3072 patches): `total_us` of kernels and copies of one
call, `num_launches`, and `largest`: name, microseconds and launches of those that take longest. Decode steps run as
they do in use: a profiler sees the kernels inside of a replayed CUDA graph as well.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.speed import CHUNK, Engine
from benchmarks.gpu.values import Values, parser

_NUM_CALLS = 3
_NUM_LARGEST = 24
_NAME_LETTERS = 110
_PAST = 512


def kernels_of(call: Callable[[], object]) -> dict[str, Any]:
    """Return time and launches by kernel of one call, as the mean of some."""
    import torch

    for _ in range(_NUM_CALLS):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_NUM_CALLS):
            call()
        torch.cuda.synchronize()
    events = [
        (each.name, each.device_time_total)
        for each in profile.events()
        if each.device_type == torch.autograd.DeviceType.CUDA
    ]
    return by_kernel(events, _NUM_CALLS)


def by_kernel(events: list[tuple[str, float]], num_calls: int) -> dict[str, Any]:
    """Return what events (name, microseconds) of some calls are for one of them."""
    taken, launches = Counter[str](), Counter[str]()
    for name, microseconds in events:
        taken[name[:_NAME_LETTERS]] += microseconds
        launches[name[:_NAME_LETTERS]] += 1
    largest = [
        {"name": name, "us": round(us / num_calls, 2), "num_launches": round(launches[name] / num_calls, 1)}
        for name, us in taken.most_common(_NUM_LARGEST)
    ]
    total, count = sum(taken.values()) / num_calls, sum(launches.values()) / num_calls
    return {"total_us": round(total, 1), "num_launches": round(count, 1), "largest": largest}


def main() -> int:
    """Run the section."""
    args = parser().parse_args()
    values = Values(args.values)
    import torch  # noqa: F401 (before the session, so that its profiler and ONNX Runtime share CUDA's libraries)

    engine = Engine(args.folder)
    cache = engine.session.new_cache(_PAST + CHUNK)
    engine.fill(cache, _PAST)
    values["decode"] = kernels_of(lambda: engine.decode(cache, _PAST))
    values["decode_kernels"] = engine.decode_kernels
    values["prefill"] = kernels_of(lambda: engine.prefill(cache, CHUNK))
    inputs = engine.preparation.vision_inputs(engine.prepared((48, 64)).images[0])
    values["vision"] = kernels_of(lambda: engine.session.vision(inputs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
