"""What the GPU is and does at best: name, driver, memory, copies on the device and to it, products in half
precision.

Values: `gpu` {name, sm, driver, free_bytes, total_bytes}; `copy_bytes_per_s`, read and written together;
`pageable_bytes_per_s` and `pinned_bytes_per_s` from the host; `half_flops`. Copies and products are PyTorch's;
without it they are missing.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.values import Values, parser, summary
from runtime.cuda import CudaDevice

_COPY_BYTES = 1 << 31
_UPLOAD_BYTES = 1 << 28
_SIDE = 8192


def main() -> int:
    """Run the section."""
    values = Values(parser(with_folder=False).parse_args().values)
    device = CudaDevice("cuda")
    free, total = device.memory_info()
    values["gpu"] = {
        "name": device.name,
        "sm": device.compute_capability,
        "driver": device.driver_version,
        "free_bytes": free,
        "total_bytes": total,
    }
    try:
        import torch
    except ModuleNotFoundError:
        values["note"] = "no PyTorch here, so neither copies nor products were measured"
        return 0
    values["torch"] = torch.__version__
    values["copy_bytes_per_s"] = copy_rate(torch)
    for name, is_pinned in (("pageable_bytes_per_s", False), ("pinned_bytes_per_s", True)):
        source = torch.zeros(_UPLOAD_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        target = torch.empty(_UPLOAD_BYTES, dtype=torch.uint8, device="cuda")
        values[name] = _UPLOAD_BYTES / (1e-3 * on_device(torch, lambda s=source, t=target: t.copy_(s))["median_ms"])
    a = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.float16)
    values["half_flops"] = 2 * _SIDE**3 / (1e-3 * on_device(torch, lambda: a @ a)["median_ms"])
    return 0


def copy_rate(torch: Any) -> float:
    """Return the bytes that a copy on the device reads and writes in a second."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / (1e-3 * on_device(torch, lambda: target.copy_(source))["median_ms"])


def on_device(torch: Any, call: Any, *, warmup: int = 3, repeats: int = 10) -> dict[str, float]:
    """Return the milliseconds of calls between two events of PyTorch's stream."""
    for _ in range(warmup):
        call()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return summary(taken)


if __name__ == "__main__":
    sys.exit(main())
