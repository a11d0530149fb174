"""Small files of a checkpoint, before anything is traced."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from random import Random

from fuzz.families import small_files
from fuzz.family import Recipe


def setup(engine: Path, folder: Path) -> Path:
    """Link all files of the demo's checkpoint into the folder."""
    import qwen3vl_export.checkpoint  # noqa: F401  (not a part of the first input's time)

    for path in small_files.CHECKPOINT.iterdir():
        if path.suffix != ".md":
            (folder / path.name).symlink_to(path)
    return folder


def make(random: Random) -> Recipe:
    """Return edits of a file, seldom something else in its place."""
    recipe = small_files.make(random)
    if random.random() < 0.05:
        recipe["special"] = random.choice(small_files.SPECIAL)
    return recipe


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the file."""
    return len(small_files.contents(recipe)), 0


def run(recipe: Recipe, folder: Path) -> str:
    """Open the checkpoint and read all that an export reads before it traces."""
    from qwen3vl_export.checkpoint import Checkpoint

    path, extra = folder / recipe["file"], folder / "chat_template.json"
    path.unlink(missing_ok=True)
    try:
        _put(path, extra, small_files.contents(recipe), recipe.get("special"))
        checkpoint = Checkpoint.open(str(folder))
        _ = checkpoint.config, checkpoint.entries
        checkpoint.assets()
        _ = checkpoint.used_keys
    finally:
        extra.unlink(missing_ok=True)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.symlink_to(small_files.CHECKPOINT / recipe["file"])
    return "goes on to tracing"


def _put(path: Path, extra: Path, data: bytes, special: str | None) -> None:
    match special:
        case "missing":
            return
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "utf-16":
            path.write_bytes(data.decode("utf-8", "replace").encode("utf-16", "surrogatepass"))
        case "as json":
            extra.write_text(json.dumps({"chat_template": base64.b64encode(data[:10_000]).decode()}), encoding="utf-8")
            path.write_bytes(data)
        case _:
            path.write_bytes(data)
