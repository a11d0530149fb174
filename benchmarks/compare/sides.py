"""Who is compared: the Python environment, the driver and the export command of each side."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "build" / "peers"
REFERENCE = "pytorch-fp32"


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: Column of the tables.
        driver: Module in `benchmarks.compare.drivers`.
        environment: Folder of a virtual environment in build/peers, or none for the environment of this process.
        export: Command after the interpreter, with `{checkpoint}` and `{output}`; none if the checkpoint itself is run.
        options: Keyword arguments of the driver.
        target: Ours: the target, which names the export, since several sides may open one. Exported anew for each
            comparison; a peer's export is kept.
        exporter: A peer's: modules that its export takes.
    """

    name: str
    driver: str
    environment: str = ""
    export: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""
    exporter: str = ""

    @property
    def python(self) -> Path:
        """Interpreter of the side."""
        return PEERS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def is_ours(self) -> bool:
        """One of our engines."""
        return bool(self.target)

    def import_command(self) -> list[str]:
        """Return a command line that imports the exporter and the driver; run it in the repository's root."""
        return [str(self.python), "-c", f"import {self.exporter}, benchmarks.compare.drivers.{self.driver}"]

    def export_command(self, checkpoint: Path, output: Path) -> list[str]:
        """Return the whole command line of the export."""
        places = {"checkpoint": str(checkpoint), "output": str(output)}
        return [str(self.python), *(part.format(**places) for part in self.export)]

    def missing(self) -> str:
        """Return why the side cannot run here, or nothing."""
        if self.python.is_file():
            return ""
        return f"build/peers/{self.environment} is not there; make compare-setup installs it"


def all_sides() -> tuple[Side, ...]:
    """Return our targets that run on this machine, PyTorch, and the peers."""
    from engines.registry import all_targets

    ours = [target.name for target in all_targets() if target.availability().can_run]
    huge = [name for name in ours if name in _ALSO_ON_HUGE_PAGES]
    return (
        *(_engine(name) for name in ours),
        *(_engine(name, huge_pages=True) for name in huge),
        *_PYTORCH,
        *_PEERS,
    )


def _engine(target: str, *, huge_pages: bool = False) -> Side:
    export = ("-m", "qwen3vl_export.cli.export", "{checkpoint}", "--target", target, "--output", "{output}", "--json")
    name = f"{target}-huge-pages" if huge_pages else target
    return Side(name, "engine", export=export, options={"huge_pages": huge_pages}, target=target)


def _genai(name: str, *options: str, is_pruned: bool = False) -> Side:
    builder = ("-m", "onnxruntime_genai.models.builder", "-m", "{checkpoint}", "-o", "{output}")
    options += ("prune_lm_head=true",) * is_pruned
    extra = ("--extra_options", *options) if options else ()
    command = (*builder, "-p", "int4", "-e", "cpu", "-c", "{output}-cache", *extra)
    return Side(name, "genai", "genai", command, {"is_pruned": is_pruned}, exporter="onnxruntime_genai.models.builder")


# The peers run on the pages that the system gives them, so ours do too; these once more with `huge_pages`.
_ALSO_ON_HUGE_PAGES = ("ort-cpu-int4", "ort-cpu-int4p8")
_PYTORCH = (
    Side(REFERENCE, "torch_eager", options={"dtype": "float32"}),
    Side("pytorch-bf16", "torch_eager", options={"dtype": "bfloat16"}),
)
_OPENVINO_EXPORT = ("-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", "{checkpoint}")
_PEERS = (
    _genai("genai-int4-b32"),
    _genai("genai-int4-b128", "block_size=128"),
    # Logits of the last position alone, as our engines compute them.
    _genai("genai-int4-b128-pruned", "block_size=128", is_pruned=True),
    Side(
        "openvino-int4",
        "openvino",
        "openvino",
        (*_OPENVINO_EXPORT, "--task", "image-text-to-text", "--weight-format", "int4", "{output}"),
        exporter="optimum.exporters.openvino.__main__, optimum.intel.openvino",
    ),
)
