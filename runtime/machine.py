"""What this process may use of the machine's processors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runtime.settings import omp_num_threads

# Quota and period of a container in microseconds: in one file of version 2, in two of version 1
# (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max; https://docs.kernel.org/scheduler/sched-bwc.html).
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_QUOTAS = ((_CGROUP / "cpu.max",), (_CGROUP / "cpu/cpu.cfs_quota_us", _CGROUP / "cpu/cpu.cfs_period_us"))


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
