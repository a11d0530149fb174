"""Cost of child processes, statistics over repeats, and what the machine is."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.machine import processor

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tokenizers")


@dataclass(frozen=True)
class ChildCost:
    """What one child process took, its own children included.

    Attributes:
        wall_s: From start to exit, imports included.
        cpu_s: User and system time of all its processes.
        peak_rss_bytes: The largest `ru_maxrss` of its processes (the child, and the children that it waited for), not
            their sum; resident pages of mapped files count.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


def run_child(command: Sequence[str], folder: Path | None = None) -> ChildCost:
    """Run a command to its end, in a folder if one is given, and measure it; its output goes to stderr.

    The kernel hands the parent's peak on to a spawned child, so the caller should be a small process.

    Raises:
        subprocess.CalledProcessError: It exits with a code other than 0; `output` is its last line.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last = ""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for a process that is gone
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output=last)
    return ChildCost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def child_result(command: Sequence[str], output: Path, folder: Path | None = None) -> tuple[dict[str, Any], ChildCost]:
    """Run a command that writes a JSON object into the file that is its last argument; return it, and what it took."""
    cost = run_child([*command, str(output)], folder)
    return json.loads(output.read_text(encoding="utf-8")), cost


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(call: Callable[[], object], *, warmup: int, repeats: int) -> dict[str, Any]:
    """Summarise the seconds of some calls after others of warm-up."""
    for _ in range(warmup):
        call()
    return summarise([seconds(call) for _ in range(repeats)])


def summarise(taken_s: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes and all values of some durations."""
    return {
        "median_s": statistics.median(taken_s),
        "min_s": min(taken_s),
        "max_s": max(taken_s),
        "all_s": list(taken_s),
    }


def environment() -> dict[str, Any]:
    """Describe processor, memory, system, libraries and the load before the measurement."""
    cpu, instruction_sets = processor()
    return {
        "cpu": cpu or "unknown",
        "instruction_sets": instruction_sets,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := version(name)) is not None},
        "load_average_1min": os.getloadavg()[0],
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, if there is one."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
