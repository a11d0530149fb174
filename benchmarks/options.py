"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Shape in configs/models, such as qwen3-vl-2b.")]
Layers = Annotated[int | None, typer.Option(help="How many decoder layers to keep; all by default.")]
Target = Annotated[str, typer.Option(help="Target to build.")]
Results = Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")]
WorkDir = Annotated[Path | None, typer.Option(help="Folder for checkpoints and engines, which are removed afterwards.")]
Checkpoint = Annotated[Path | None, typer.Option(help="An existing checkpoint instead of a synthetic one.")]
ExpertStride = Annotated[
    int, typer.Option(min=1, help="Of the experts' weights, write every Nth piece of 64 KiB; the rest are holes.")
]
