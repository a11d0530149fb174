"""The environment variables that this project reads or sets: no other file touches them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"
CPU_ISA_VARIABLE = "QWEN3VL_CPU_ISA"
GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"


def disable_telemetry() -> bool:
    """Turn ONNX Runtime's telemetry off for this process, unless the variable is set to something already.

    Version 1.32 keeps a device id and queued events under the user's cache folder, and sends them. Only this variable
    stops it, and only before the library is imported; its own `disable_telemetry_events()` does not.

    Returns:
        False if it may be too late: the library was imported before. Where the system tells what variables a process
        began with, those count, since nobody knows when a later one was set; elsewhere the present ones do.
    """
    was_set = TELEMETRY_VARIABLE in os.environ
    os.environ.setdefault(TELEMETRY_VARIABLE, "1")
    if "onnxruntime" not in sys.modules:
        return True
    try:
        initial = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return was_set
    return any(each.startswith(f"{TELEMETRY_VARIABLE}=".encode()) for each in initial)


def omp_num_threads() -> int | None:
    """Return what OMP_NUM_THREADS asks for, of a list for nested regions the first, or None if it asks for nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def cpu_isa() -> str | None:
    """Return the instruction set that QWEN3VL_CPU_ISA names for the own kernels, or None if it names none."""
    return os.environ.get(CPU_ISA_VARIABLE, "").strip() or None


def show_one_gpu(index: int) -> None:
    """Let this process see one GPU alone: of those that CUDA_VISIBLE_DEVICES names, or of all, the one at `index`.

    CUDA reads the variable when a process first uses it, so this comes before.
    """
    named = [each.strip() for each in os.environ.get(GPUS_VARIABLE, "").split(",") if each.strip()]
    os.environ[GPUS_VARIABLE] = ",".join(named[index : index + 1]) if named else str(index)


def user_cache_folder() -> Path | None:
    """Return the folder in which programs keep what they can make again; None for a user without a home.

    It is XDG_CACHE_HOME, or ~/.cache where that is not set or no absolute path, which the XDG Base Directory
    Specification says to ignore.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return None


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of this process with some variables changed, for a child."""
    return {**os.environ, **changes}
