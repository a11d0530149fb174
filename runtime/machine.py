"""What this process may use of the machine's processors."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.settings import omp_num_threads

# Quota and period of a container in microseconds: in one file of version 2, in two of version 1
# (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; https://docs.kernel.org/scheduler/sched-bwc.html).
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_QUOTAS = ((_CGROUP / "cpu.max",), (_CGROUP / "cpu/cpu.cfs_quota_us", _CGROUP / "cpu/cpu.cfs_period_us"))
CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo that kernels of the CPU targets are chosen by, x86 then Arm.
_X86_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_FEATURES = (*_X86_FEATURES, "asimd", "asimddp", "i8mm", "bf16", "sve")


def available_cores(cgroup_quotas: Sequence[Sequence[Path]] = _CGROUP_QUOTAS) -> int:
    """Return the cores that this process may run on: of its affinity, or of the container's quota if that is less.

    A quota is rounded down: threads that wait for each other would spend the rest of a period stopped.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for paths in cgroup_quotas:
        fields = " ".join(path.read_text() for path in paths if path.is_file()).split()
        if (
            len(fields) == 2 and all(field.isdecimal() for field in fields) and int(fields[1]) > 0
        ):  # "max", -1: no limit
            cores = min(cores, int(fields[0]) // int(fields[1]))
    return max(cores, 1)


def default_threads() -> int:
    """Return the threads to compute with where nobody says: what OMP_NUM_THREADS asks for, or the available cores."""
    return omp_num_threads() or available_cores()


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
