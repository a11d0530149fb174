"""The environment variables that this project reads or sets: no other file touches them."""

from __future__ import annotations

import os
import sys

TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


def disable_telemetry() -> bool:
    """Turn ONNX Runtime's telemetry off for this process, unless the variable is set to something already.

    Version 1.32 keeps a device id and queued events under the user's cache folder, and sends them. Only this variable
    stops it, and only before the library is imported; its own `disable_telemetry_events()` does not.

    Returns:
        False if it is too late: the library was imported before, without the variable.
    """
    if TELEMETRY_VARIABLE in os.environ:
        return True
    os.environ[TELEMETRY_VARIABLE] = "1"
    return "onnxruntime" not in sys.modules


def omp_num_threads() -> int | None:
    """Return what OMP_NUM_THREADS asks for, of a list for nested regions the first, or None if it asks for nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None
