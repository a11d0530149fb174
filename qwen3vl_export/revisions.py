"""What a model is right now: the commit of a Hub id, or a digest of a folder that changes when one of its files does.

Nothing of the exporter is imported: an engine that is in the cache is found without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_export.formats import check_folder, refuse_file
from qwen3vl_export.hub import quiet_hub
from qwen3vl_export.names import shown_name
from qwen3vl_export.sources import HUB_ID, SHIPPED, local_path, shipped_folder
from runtime.errors import CheckpointError
from runtime.files import MAX_TOKENIZER_BYTES, is_folder, open_regular, read_json_object

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL_FILES = (".json", ".jinja", ".txt")
_WEIGHTS = ".safetensors"
_MOST_HEADER_BYTES = 64 << 20


@dataclass(frozen=True)
class Model:
    """A model as it is right now.

    Attributes:
        name: What the user called it.
        short_name: The last part of that, for names of folders.
        revision: The commit on the Hub, or a digest of the folder's files.
        config: Contents of config.json; None for a commit of the Hub that is not here.
    """

    name: str
    short_name: str
    revision: str
    config: dict[str, Any] | None


def look_up(source: str, cache_dir: Path | None = None) -> Model:
    """Find out what a folder, `owner/name[@revision]` of the Hub, or `demo` is right now.

    Args:
        source: Its name.
        cache_dir: Where downloads are kept; by default in the Hub's own cache.

    Raises:
        CheckpointError: It is nothing of that, or the Hub knows no such repository, or cannot be reached and its cache
            here has no such revision.
        ModuleNotFoundError: It is on the Hub, whose client is not installed.
    """
    folder = local_path(source)
    if folder is not None and is_folder(folder, error=CheckpointError):
        return _of_folder(source, folder)
    if source in SHIPPED:
        return _of_folder(source, shipped_folder(source))
    if folder is not None and os.path.lexists(folder):
        refuse_file(folder)
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(
            f"{shown_name(source)}: no such folder",
            remedy="give an engine, a Hugging Face folder, a Hub id such as Qwen/Qwen3-VL-2B-Instruct, or 'demo'",
        )
    return _on_hub(source, match["repo"], match["revision"], cache_dir)


def short_name(source: str) -> str:
    """Return a name for folders: the last part of a path, or of a Hub id without its revision."""
    match = HUB_ID.fullmatch(source)
    name = match["repo"].rpartition("/")[2] if match is not None else Path(os.path.abspath(source)).name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-")[:60] or "model"


def digest_of_folder(folder: Path) -> str:
    """Return a digest of names and contents of all files in a folder and below it, such as calibration prompts.

    Raises:
        CheckpointError: It cannot be read.
    """
    return _digest((path, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")))


def _of_folder(source: str, folder: Path) -> Model:
    check_folder(folder)
    paths = sorted(folder.iterdir())
    digest = _digest((path, path.name) for path in paths if path.suffix in (*_SMALL_FILES, _WEIGHTS))
    config = read_json_object(folder / "config.json", error=CheckpointError)
    return Model(source, short_name(source), digest, config)


def _on_hub(source: str, repo: str, revision: str | None, cache_dir: Path | None) -> Model:
    """Ask the Hub for the commit; where it cannot be reached, its cache on this machine."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return Model(source, short_name(source), revision, None)
    import huggingface_hub

    try:
        with quiet_hub():
            found = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision, cache_dir=cache_dir)
            path = Path(found)
    except Exception as error:  # the Hub client raises errors of several libraries
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source}: neither a folder here nor on the Hub ({type(error).__name__}: {reason})",
            remedy="check the spelling and the connection, or download the folder and give its path",
        ) from error
    return Model(source, short_name(source), path.parent.name, read_json_object(path, error=CheckpointError))


def _digest(files: Iterable[tuple[Path, str]]) -> str:
    total = hashlib.sha256()
    for path, name in files:
        try:
            record = _record(path)
        except OSError as error:
            raise CheckpointError(
                f"{shown_name(str(path))}: cannot be read ({error.strerror})", remedy="check its permissions"
            ) from error
        if record is not None:
            total.update(json.dumps([os.fsencode(name).hex(), *record]).encode() + b"\n")
    return total.hexdigest()


def _record(path: Path) -> list[Any] | None:
    """Return what changes with a file; None for what is no regular file, which nothing reads.

    Of a small one that is its SHA-256, of a large one size, time, and the SHA-256 of its beginning.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None
    is_small = path.suffix != _WEIGHTS and status.st_size <= MAX_TOKENIZER_BYTES
    with open(open_regular(path), "rb") as file:
        if is_small:
            return [hashlib.sha256(file.read(MAX_TOKENIZER_BYTES + 1)).hexdigest()]
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), _MOST_HEADER_BYTES))
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(start + header).hexdigest()]
