"""What a report was made on: figures of another machine, of other releases or of a busy minute are other figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engines.hardware import LIBRARIES, Hardware, installed_versions, probe
from runtime import __version__, native
from runtime.installation import DISTRIBUTION

_LIBRARIES = (*LIBRARIES, "numpy", "onnx", "transformers")


@dataclass(frozen=True)
class Environment:
    """Machine, libraries and load.

    Attributes:
        cpu: Model of the processor.
        cpu_features: Those of its features that kernels are chosen by.
        isa: Instruction set that the own kernels use; None if they cannot be used here.
        cores: Logical ones that this process may use.
        threads: Of the engine; None if it has none, or several engines differ.
        memory_bytes: Of the machine, or of the container if that is less.
        gpus: Names, with the version of the driver.
        system: Its name and release.
        versions: Of this package, Python and libraries, by name.
        load_average: Mean number of processes that ran or wanted to in the minute before; None where the system does
            not say. That of an idle machine is near 0.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    isa: str | None
    cores: int
    threads: int | None
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    versions: Mapping[str, str]
    load_average: float | None

    @classmethod
    def of_this_machine(cls, threads: int | None = None, machine: Hardware | None = None) -> Environment:
        """Look; before the work, whose load is not to count.

        Args:
            threads: Those of the engine.
            machine: What was found already.
        """
        found = machine or probe()
        ours = {DISTRIBUTION: __version__, "python": platform.python_version()}
        return cls(
            cpu=found.cpu,
            cpu_features=found.cpu_features,
            isa=None if native.failure() is not None else native.isa(),
            cores=found.num_cores,
            threads=threads,
            memory_bytes=found.memory_bytes,
            gpus=tuple(f"{gpu.name}, driver {gpu.driver_version}" for gpu in found.gpus),
            system=f"{platform.system()} {platform.release()}",
            versions=ours | installed_versions(_LIBRARIES),
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return name and value of what people want to see."""
        features = f" ({', '.join(self.cpu_features)})" if self.cpu_features else ""
        rows = [
            ("processor", f"{self.cpu}{features}"),
            ("own kernels", self.isa or "cannot be used"),
            ("cores", str(self.cores)),
            ("memory", f"{self.memory_bytes / 1e9:.1f} GB"),
            ("GPU", "; ".join(self.gpus) or "none"),
            ("system", self.system),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        if self.threads is not None:
            rows.insert(3, ("threads", str(self.threads)))
        if self.load_average is not None:
            rows.append(("load before", f"{self.load_average:.2f} processes in the minute before"))
        return rows
