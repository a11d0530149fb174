"""Export of each side, with its cost; a peer's export is kept for the next comparison, with the cost it had."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.compare.sides import Side


def build(side: Side, checkpoint: Path, work: Path, *, keep: bool) -> tuple[Path, dict[str, Any] | None]:
    """Export a side if that is needed, and return what its driver opens and what the export took.

    Args:
        side: The side.
        checkpoint: Folder of the checkpoint.
        work: Folder of the exports; each has a file with its cost beside it.
        keep: Use an export of an earlier comparison; otherwise it is made anew.

    Returns:
        The folder; and wall and CPU seconds, peak memory, size, and whether it is of this run. A side that runs the
        checkpoint itself has no cost.

    Raises:
        subprocess.CalledProcessError: The export failed; nothing is kept.
    """
    if not side.export:
        return checkpoint, None
    folder, record = work / side.name, work / f"{side.name}.json"
    if keep and folder.is_dir() and record.is_file():
        return folder, json.loads(record.read_text(encoding="utf-8")) | {"is_of_this_run": False}
    for path in (folder, work / f"{side.name}-cache"):
        shutil.rmtree(path, ignore_errors=True)
    record.unlink(missing_ok=True)
    cost: dict[str, Any] = asdict(measure.run_child(side.export_command(checkpoint, folder)))
    cost["size_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    record.write_text(json.dumps(cost), encoding="utf-8")
    return folder, cost | {"is_of_this_run": True}
