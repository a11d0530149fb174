"""Write tunings into the user's cache, list and remove them; `runtime.tuning_store` reads them at opening."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.disk import disk_error, replace_text
from runtime.errors import EngineError, UsageError
from runtime.shown import shown
from runtime.tuning import Tuning
from runtime.tuning_store import FORMAT_VERSION, Key, library_versions, read_values, this_machine, tuning_folder


@dataclass(frozen=True)
class Entry:
    """A stored tuning.

    Attributes:
        file: Name of its file.
        values: What the file says; empty if it cannot be read.
        problem: Why no opening here takes it; empty if one does.
    """

    file: str
    values: Mapping[str, Any]
    problem: str

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Read a file."""
        try:
            values = read_values(path)
            Tuning.of(values["settings"])
        except (EngineError, UsageError) as error:
            return cls(path.name, {}, error.message)
        on_gpu = "gpus" in values["machine"]
        if values["machine"] != this_machine(on_gpu=on_gpu):
            return cls(path.name, values, "it is of another machine")
        is_current = values["versions"] == library_versions(on_gpu=on_gpu)
        return cls(path.name, values, "" if is_current else "it was measured with other versions of the libraries")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; what is not known is null."""
        names = ("name", "target", "tuned", "settings", "noise")
        return {"file": self.file, **{name: self.values.get(name) for name in names}, "problem": self.problem or None}


def folder_of_user() -> Path:
    """Return the folder of all tunings.

    Raises:
        UsageError: This user has no home.
    """
    folder = tuning_folder()
    if folder is None:
        raise UsageError("this user has no home folder, in which tunings are kept", remedy="set XDG_CACHE_HOME")
    return folder


def store(key: Key, name: str, target: str, tuning: Tuning, facts: Mapping[str, Any]) -> Path:
    """Write a tuning, whole or not at all, in place of an earlier one of the same engine on this machine.

    Args:
        key: What it is of.
        name: That of the engine's folder, for lists.
        target: The engine's.
        tuning: The settings.
        facts: What was measured, as plain data.

    Raises:
        UsageError: The folder cannot be written, or this user has no home.
        CapacityError: The disk is full.
    """
    path = folder_of_user() / key.file_name
    values = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "target": target,
        "tuned": int(time.time()),
        **key.to_dict(),
        "settings": tuning.values(),
        **facts,
    }
    replace_text(path, json.dumps(values, indent=1) + "\n")
    return path


def entries(folder: Path) -> list[Entry]:
    """Return what is stored, by name of the files.

    Raises:
        UsageError: The folder cannot be read.
    """
    try:
        return [Entry.of(path) for path in sorted(folder.glob("*.json"))]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror})", remedy="change its permissions") from error


def remove(folder: Path, name: str) -> None:
    """Remove a tuning by the name of its file, with or without the suffix.

    Raises:
        UsageError: There is none of that name, or it cannot be removed.
    """
    known = {entry.file: folder / entry.file for entry in entries(folder)}
    path = known.get(name) or known.get(f"{name}.json")
    if path is None:
        listed = ", ".join(known) or "none"
        raise UsageError(f"{shown(name)}: no stored tuning", remedy=f"`qwen3vl tune --list` shows them: {listed}")
    try:
        path.unlink()
    except OSError as error:
        raise disk_error(error, path) from error
