"""What this machine is: processor, memory, GPUs and the libraries that engines are built and run with.

GPUs are asked of `nvidia-smi` and not of the driver through a binding. It comes with every driver, so no Python package
is needed to find that there is no GPU; it makes no CUDA context, which would take some hundred megabytes of the memory
that is being measured; and a driver that hangs or crashes takes a child process with it and not this one. What it
cannot say: it ignores `CUDA_VISIBLE_DEVICES`, orders different GPUs by bus where CUDA puts the fastest first, and for
a GPU divided into MIG instances it gives the whole.
"""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.machine import CPUINFO, available_cores, processor
from runtime.memory import machine_bytes

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx-cu12", "cuda-bindings", "torch")
"""Distributions whose versions decide what can be built and run."""

_QUERY = ("name", "compute_cap", "memory.total", "memory.free", "driver_version")
_COMMAND = ("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
# A driver that has to load its module first takes seconds; one that hangs takes for ever.
_TIMEOUT_S = 30.0

Runner = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver calls it, such as `NVIDIA GeForce RTX 4090`.
        compute_capability: SM version, such as `8.9`.
        total_bytes: Memory; 0 if the driver does not say, as for a GPU that shares the machine's memory.
        free_bytes: What of it no process has taken; 0 if unknown.
        driver_version: Version of the kernel driver.
    """

    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int
    driver_version: str


@dataclass(frozen=True)
class Hardware:
    """A machine as far as targets depend on it.

    Attributes:
        cpu: Model of the processor.
        cpu_features: Those of its features that kernels are chosen by, in the words of /proc/cpuinfo.
        num_cores: Logical cores that this process may use.
        memory_bytes: Memory of the machine, or the limit of the container if that is less.
        gpus: In the driver's order, by bus; empty is a normal result.
        versions: Installed libraries, by distribution name.
        notes: What could not be found out, and why.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    num_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """The first GPU: engines are built for it and run on it."""
        return self.gpus[0] if self.gpus else None

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Return name and value of what people want to see."""
        features = f" ({', '.join(self.cpu_features)})" if self.cpu_features else ""
        rows = [
            ("processor", f"{self.cpu}, {self.num_cores} cores{features}"),
            ("memory", f"{self.memory_bytes / 1e9:.1f} GB"),
        ]
        for gpu in self.gpus:
            memory = f"{gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
            rows.append(("GPU", f"{gpu.name}, SM {gpu.compute_capability}, {memory}, driver {gpu.driver_version}"))
        if not self.gpus:
            rows.append(("GPU", "none"))
        rows.append(("libraries", ", ".join(f"{name} {version}" for name, version in self.versions.items()) or "none"))
        rows += [("note", note) for note in self.notes]
        return rows


def probe(run: Runner | None = None, cpuinfo: Path = CPUINFO) -> Hardware:
    """Find out what this machine is.

    Args:
        run: Runs a command and returns its stdout; raises what `subprocess.run(check=True)` raises.
        cpuinfo: The kernel's description of the processors.
    """
    cpu, features = processor(cpuinfo)
    gpus, notes = probe_gpus(run or _run)
    return Hardware(
        cpu=cpu or platform.processor() or platform.machine(),
        cpu_features=features,
        num_cores=available_cores(),
        memory_bytes=machine_bytes(),
        gpus=gpus,
        versions=installed_versions(LIBRARIES),
        notes=notes,
    )


def probe_gpus(run: Runner) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Ask the driver for its GPUs; return them, and notes on what is broken. No driver is no note."""
    try:
        text = run(_COMMAND)
    except FileNotFoundError:
        return (), ()
    except subprocess.TimeoutExpired:
        return (), (f"nvidia-smi did not answer within {_TIMEOUT_S:.0f} s: the GPU driver hangs",)
    except subprocess.CalledProcessError as error:
        said = " ".join(f"{error.stdout or ''} {error.stderr or ''}".split())
        if "no devices were found" in said.lower():
            return (), ()
        return (), (f"nvidia-smi ended with exit code {error.returncode}: {said or 'no message'}",)
    except OSError as error:
        return (), (f"nvidia-smi cannot be run: {error}",)
    gpus, notes = [], []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row:
            continue
        gpu = _parse_gpu(row)
        if gpu is None:
            notes.append(f"nvidia-smi said {', '.join(row)!r}, expected {', '.join(_QUERY)}")
        else:
            gpus.append(gpu)
    return tuple(gpus), tuple(notes)


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _parse_gpu(row: Sequence[str]) -> Gpu | None:
    cells = [cell.strip() for cell in row]
    if len(cells) != len(_QUERY) or not re.fullmatch(r"\d+\.\d+", cells[1]):
        return None
    name, capability, total, free, driver = cells
    return Gpu(name, capability, _mebibytes(total), _mebibytes(free), driver)


def _mebibytes(text: str) -> int:
    """Return bytes; 0 for `[N/A]`, which devices with the machine's memory answer."""
    return int(text) << 20 if text.isdigit() else 0


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout
