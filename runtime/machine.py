"""What this process may use of the machine's processors."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.cgroup import cpu_quotas
from runtime.settings import omp_num_threads

MAX_THREADS_PER_CORE = 8
"""More only slow the engine down, and a mistyped number of them takes minutes to start."""

CPUINFO = Path("/proc/cpuinfo")
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2")
# Flags of /proc/cpuinfo that kernels of the CPU targets are chosen by, x86 then Arm.
_X86_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_FEATURES = (*_X86_FEATURES, "asimd", "asimddp", "i8mm", "bf16", "sve")


def available_cores(quotas: Sequence[float] | None = None) -> int:
    """Return the cores that this process may run on: of its affinity, or of a container's quota if that is less.

    A quota is rounded down: threads that wait for each other would spend the rest of a period stopped.

    Args:
        quotas: In processors; those of the process's control groups by default.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, cpu_quotas() if quotas is None else quotas)]))


def l2_cache_bytes(cache: Path = CPU_CACHE) -> int:
    """Return the size of a core's second cache, by which ONNX Runtime cuts its tiles; 256 KiB, as there, if unknown."""
    try:
        size = (cache / "size").read_text(encoding="ascii").strip()
    except OSError:
        return 256 << 10
    return int(size.removesuffix("K")) << 10 if size.endswith("K") else 256 << 10


def default_threads() -> int:
    """Return the threads to compute with where nobody says: what OMP_NUM_THREADS asks for, or the available cores.

    Of OMP_NUM_THREADS no more than `MAX_THREADS_PER_CORE` for each core: it may be meant for another machine.
    """
    cores = available_cores()
    return min(omp_num_threads() or cores, MAX_THREADS_PER_CORE * cores)


def processor(cpuinfo: Path = CPUINFO) -> tuple[str, tuple[str, ...]]:
    """Return the first processor: its model, and its instruction sets that kernels are chosen by, in Linux' names.

    Empty where the system does not say.
    """
    values: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else ():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    flags = set(values.get("flags", values.get("Features", "")).split())
    return values.get("model name", ""), tuple(name for name in _FEATURES if name in flags)


def release_freed_memory() -> None:
    """Give the system back what was freed but the C library keeps, where it is the GNU C library (malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
