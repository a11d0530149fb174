"""Export of each side; it is kept, with what it cost, for the next comparison of the same checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.compare.sides import Side

_SAMPLE_BYTES = 1 << 16


def build(side: Side, checkpoint: Path, work: Path, *, keep: bool) -> tuple[Path, dict[str, Any] | None]:
    """Export a side if that is needed, and return what its driver opens and what the export took.

    Args:
        side: The side.
        checkpoint: Folder of the checkpoint.
        work: Folder of the exports; each has a file with its cost and its `source_of` beside it.
        keep: Use an earlier export of this checkpoint; otherwise it is made anew.

    Returns:
        The folder; and wall and CPU seconds, peak memory, size, and whether it is of this run. A side that runs the
        checkpoint itself has no cost.

    Raises:
        subprocess.CalledProcessError: The export failed; nothing is kept.
    """
    if not side.export:
        return checkpoint, None
    name = side.target or side.name
    folder, record, source = work / name, work / f"{name}.json", source_of(checkpoint)
    if keep and folder.is_dir() and record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept.get("source") == source:
            return folder, kept["cost"] | {"is_of_this_run": False}
    for path in (folder, work / f"{name}-cache"):
        shutil.rmtree(path, ignore_errors=True)
    record.unlink(missing_ok=True)
    cost: dict[str, Any] = asdict(measure.run_child(side.export_command(checkpoint, folder)))
    cost["size_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    record.write_text(json.dumps({"cost": cost, "source": source}), encoding="utf-8")
    return folder, cost | {"is_of_this_run": True}


def source_of(checkpoint: Path) -> dict[str, str]:
    """Return where a checkpoint is, and a SHA-256 of its config and of its weight files.

    Of a weight file count its size, its header and the first 64 KiB of its data, in which another seed shows: reading
    the whole of 2B takes seconds.
    """
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(file.read(int.from_bytes(length, "little") + _SAMPLE_BYTES))
    return {"checkpoint": str(checkpoint.resolve()), "sha256": digest.hexdigest()}
