"""`qwen3vl cache`: what is in the folder in which engines are kept; and the options of commands that build into it."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.options import AsJson
from qwen3vl_export.cli.output import print_json, print_text
from qwen3vl_export.cli.progress import progress
from runtime.errors import UsageError
from runtime.shown import columns

if TYPE_CHECKING:
    from qwen3vl_export.engine_store import Entry

Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Folder of the cache. [default: qwen3vl/engines in the user's cache]"),
]

app = typer.Typer(
    name="cache",
    help="List or remove the engines that commands built of checkpoints, and kept.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class Building:
    """How an engine is built where a checkpoint is given.

    Attributes:
        target: What to build for, where a checkpoint is given. [default: auto]
        cache: Folder in which engines of checkpoints are kept. [default: qwen3vl/engines in the user's cache]
    """

    target: str | None = None
    cache: Annotated[Path | None, typer.Option(metavar="DIR")] = None

    def engine(
        self, model: str | os.PathLike[str], *, max_context: int | None, max_batch: int | None, is_quiet: bool
    ) -> Path:
        """Return the folder of an engine; that of a checkpoint is built unless the cache has it.

        Args:
            model: An engine or a checkpoint.
            max_context: Tokens that it is to be opened with, where engines have fixed sizes.
            max_batch: Sequences that it is to be opened with, where engines have fixed sizes.
            is_quiet: Show no progress.

        Raises:
            Qwen3VLError: As `qwen3vl_export.engine_cache.find_or_build`.
        """
        from qwen3vl_export.engine_cache import find_or_build

        with progress(is_quiet=is_quiet) as shown:
            return find_or_build(
                model,
                target=self.target or "auto",
                cache=self.cache,
                progress=shown,
                max_context=max_context,
                max_batch=max_batch,
            )


@app.command("list")
def list_entries(cache: Cache = None, as_json: AsJson = False) -> None:
    """List the engines, their sizes and what they were built of.

    --json prints one object: cache (the folder), total_bytes, and engines (each: name, path, num_bytes, built in
    seconds since 1970, model, revision, target, problem; the last is null for an engine that is whole).

    \b
    Examples:
      qwen3vl cache list
      qwen3vl cache list --json
    """
    from qwen3vl_export.engine_store import cache_folder, entries

    place = cache_folder(cache)
    found = entries(place)
    total = sum(entry.num_bytes for entry in found)
    if as_json:
        print_json({"cache": str(place), "total_bytes": total, "engines": [_values(entry) for entry in found]})
        return
    rows = [("ENGINE", "SIZE", "BUILT", "MODEL")]
    for entry in found:
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.built))
        said = f"damaged: {entry.problem}" if entry.problem else str(_values(entry)["model"])
        rows.append((entry.path.name, _size(entry.num_bytes), built, said))
    print_text("\n".join([*(columns(rows) if found else []), f"{place}: {len(found)} engines, {_size(total)}"]))


@app.command()
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Engines, as `qwen3vl cache list` names them.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Remove engines; the next command that needs one builds it again.

    --json prints one object: cache (the folder), removed (names) and freed_bytes.

    \b
    Examples:
      qwen3vl cache remove Qwen3-VL-2B-Instruct-ort-cpu-int4-0123456789ab
      qwen3vl cache remove --all
    """
    from qwen3vl_export.engine_store import cache_folder, entries, remove_entry

    if bool(names) == every:
        raise UsageError("give names of engines, or --all", remedy="`qwen3vl cache list` shows the names")
    place = cache_folder(cache)
    sizes = {entry.path.name: entry.num_bytes for entry in entries(place)}
    removed = list(sizes) if every else list(dict.fromkeys(names or []))
    for name in removed:
        remove_entry(place, name)
    freed = sum(sizes[name] for name in removed)
    if as_json:
        print_json({"cache": str(place), "removed": removed, "freed_bytes": freed})
    else:
        print_text(f"{len(removed)} engines removed, {_size(freed)}")


def _values(entry: Entry) -> dict[str, Any]:
    source: Any = {} if entry.manifest is None else entry.manifest.source
    return {
        "name": entry.path.name,
        "path": str(entry.path),
        "num_bytes": entry.num_bytes,
        "built": round(entry.built),
        "model": source.get("name"),
        "revision": source.get("revision"),
        "target": None if entry.manifest is None else entry.manifest.target,
        "problem": entry.problem or None,
    }


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
