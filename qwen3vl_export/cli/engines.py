"""The engines of commands that answer under several names: NAME=ENGINE, or checkpoints, which are built first."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_export.cli.cache import Building
from qwen3vl_export.cli.options import Opening, Serving
from runtime.errors import UsageError
from runtime.shown import shown

if TYPE_CHECKING:
    from runtime.manifest import Manifest
    from runtime.server.engines import Engines
    from runtime.server.settings import ServerSettings

_LOGGER = logging.getLogger("runtime.server")


def open_engines(
    arguments: Sequence[str],
    building: Building,
    opening: Opening,
    serving: Serving,
    settings: ServerSettings,
    *,
    check: bool,
    is_quiet: bool,
) -> Engines:
    """Open the engines that a command names; those of checkpoints are built first, unless the cache has them.

    Raises:
        Qwen3VLError: One cannot be found, built or opened, or two have one name. None is open then.
    """
    from runtime.server.engines import Engines, Served

    folders = [_found(each, building, opening, serving, is_quiet=is_quiet) for each in arguments]
    found: list[Served] = []
    try:
        for name, folder in folders:
            started = time.perf_counter()
            model = opening.open(folder, check=check, serving=serving)
            # Unless another name is given, an engine has that of its checkpoint.
            served = Served(name or name_of(model.manifest, folder), model, settings)
            found.append(served)
            _LOGGER.info(
                "opened %s: %s, %d sequences of %d tokens, %.1f s",
                served.name,
                model.manifest.target,
                model.limits.max_sequences,
                model.limits.max_context,
                time.perf_counter() - started,
            )
        return Engines(found)
    except BaseException:
        for served in found:
            served.model.close(drain=False)
        raise


def _found(
    argument: str, building: Building, opening: Opening, serving: Serving, *, is_quiet: bool
) -> tuple[str | None, Path]:
    """Return the name that an argument gives, if it does, and its engine, which is built of a checkpoint."""
    name, mark, model = argument.partition("=")
    if not mark or Path(argument).exists():
        name, model = "", argument
    elif not name or not model:
        raise UsageError(f"{shown(argument)} is not NAME=ENGINE", remedy="write small=engines/2b, or the folder alone")
    sizes = {"max_context": opening.max_context or opening.window, "max_batch": serving.max_sequences}
    folder = building.engine(model, **sizes, is_quiet=is_quiet)
    if not name and not Path(model).exists():
        name = model.partition("@")[0]  # of the Hub: clients ask for it by that name
    return name or None, folder


def name_of(manifest: Manifest, folder: Path) -> str:
    """Return the name of an engine's checkpoint: of one from the Hub its id, of a folder the last part of its path."""
    name = str(manifest.source.get("name") or folder.resolve().name)
    return name if manifest.source.get("revision") else Path(name).name or name
