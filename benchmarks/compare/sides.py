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
        is_ours: Exported anew for each comparison; a peer's export is kept.
    """

    name: str
    driver: str
    environment: str = ""
    export: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    is_ours: bool = False

    @property
    def python(self) -> Path:
        """Interpreter of the side."""
        return PEERS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

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
    return (*(_engine(name) for name in ours), *_PYTORCH, *_PEERS)


def _engine(target: str) -> Side:
    export = ("-m", "qwen3vl_export.cli.export", "{checkpoint}", "--target", target, "--output", "{output}", "--json")
    return Side(target, "engine", export=export, is_ours=True)


def _genai(name: str, *options: str, is_pruned: bool = False) -> Side:
    builder = ("-m", "onnxruntime_genai.models.builder", "-m", "{checkpoint}", "-o", "{output}")
    options += ("prune_lm_head=true",) * is_pruned
    extra = ("--extra_options", *options) if options else ()
    command = (*builder, "-p", "int4", "-e", "cpu", "-c", "{output}-cache", *extra)
    return Side(name, "genai", "genai", command, {"is_pruned": is_pruned})


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
    ),
)
