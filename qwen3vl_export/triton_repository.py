"""Write an engine as a model of Triton Inference Server: a folder of a model repository.

| file | |
|---|---|
| REPOSITORY/NAME/config.pbtxt | see `runtime.integrations.triton.config` |
| REPOSITORY/NAME/1/model.py | imports `runtime.integrations.triton.model` |
| REPOSITORY/NAME/1/engine/ | the engine's files |
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.disk import check_disk_space, check_file_size, disk_error, sync_files, sync_folder
from engines.exchange import exchange
from engines.work_folder import OLD, work_folder
from runtime.errors import EngineError, UsageError
from runtime.files import read_json_object
from runtime.integrations.triton.config import ENGINE_FOLDER, config_text
from runtime.manifest import MANIFEST_NAME, Manifest
from runtime.session import is_on_gpu

CONFIG, VERSION, MODEL = "config.pbtxt", "1", "model.py"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SMALL_FILES_BYTES = 1 << 20
_MODEL_TEXT = '''\
"""The model that Triton's Python backend loads; `qwen3vl package` wrote this file."""

try:
    from qwen3_vl.integrations.triton import TritonPythonModel
except ImportError as error:
    raise ImportError(
        f"{error}. Remedy: install qwen3vl-export with the extras `serve` and `cpu`, or that of the GPU, for the "
        "Python of the backend (3.12 since Triton 24.11), in the release that packaged this model, or a later one"
    ) from error

__all__ = ["TritonPythonModel"]
'''


def model_name(text: str) -> str:
    """Return a name for a model, made of that of a checkpoint: `Qwen/Qwen3-VL-2B` becomes `Qwen3-VL-2B`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text.rpartition("/")[2]).lstrip(".-")[:100] or "model"


def check_model_name(name: str) -> None:
    """Raise if a name is none that a model can have.

    Raises:
        UsageError: It is the name of no folder, or has letters that URLs and folders have other uses for.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of a model",
            remedy="pass a --name of letters, digits and _ . - that begins with a letter, a digit or _",
        )


def write_model(
    repository: Path,
    name: str,
    engine: Path,
    *,
    parameters: Mapping[str, Any],
    link: bool = False,
    check: bool = False,
) -> Path:
    """Write a model into a repository, and return its folder; one of that name that was written so is replaced.

    Args:
        repository: The repository; made if it is not there. Other models in it stay as they are.
        name: The model's name.
        engine: The engine folder.
        parameters: As in `config_text`.
        link: Give the engine's files a second name (hard link) instead of copying them.
        check: Hash the weight files too, before they are copied.

    Raises:
        EngineError: The engine is missing or altered.
        UsageError: The model's folder is there and holds something else, or cannot be written, or links are not
            possible there.
        CapacityError: The disk has too little room.
    """
    check_model_name(name)
    manifest = Manifest.read(engine)
    manifest.check(engine, full=check)
    place = Path(os.path.realpath(repository)) / name
    _check_is_ours(place)
    with work_folder(place.parent, name) as (folder, interrupts):
        if not link:
            check_disk_space(folder, manifest.weight_bytes + _SMALL_FILES_BYTES, place)
            check_file_size(place, max(record.num_bytes for record in manifest.files.values()))
        fresh = folder / "new"
        try:
            _fill(fresh, name, engine, manifest, parameters, link=link)
            with interrupts.held():
                _check_is_ours(place)
                _put(fresh, place, folder)
        except OSError as error:
            raise disk_error(error, place) from error
    return place


def _fill(
    fresh: Path, name: str, engine: Path, manifest: Manifest, parameters: Mapping[str, Any], *, link: bool
) -> None:
    version = fresh / VERSION
    (version / ENGINE_FOLDER).mkdir(parents=True)
    for file in [*manifest.files, MANIFEST_NAME]:
        if link:
            _link(engine / file, version / ENGINE_FOLDER / file)
        else:
            shutil.copyfile(engine / file, version / ENGINE_FOLDER / file)
    on_gpu = is_on_gpu(manifest)
    (version / MODEL).write_text(_MODEL_TEXT, encoding="utf-8")
    (fresh / CONFIG).write_text(config_text(name, on_gpu=on_gpu, parameters=parameters), encoding="utf-8")
    sync_files(version / ENGINE_FOLDER)
    for each in (version, fresh):
        sync_files(each)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        raise UsageError(
            f"{source}: cannot be linked into the repository ({error.strerror})",
            remedy="put the repository on the file system of the engine, or leave --link out",
        ) from error


def _put(fresh: Path, place: Path, folder: Path) -> None:
    """Let `place` be the fresh folder; what was there before goes into the work folder, which is removed."""
    if not os.path.lexists(place):
        os.rename(fresh, place)
    elif not exchange(fresh, place):
        os.rename(place, folder / f"{OLD}000")
        os.rename(fresh, place)
    sync_folder(place.parent)


def _check_is_ours(place: Path) -> None:
    """Raise if a folder that is to be replaced holds anything that `write_model` does not write."""
    try:
        is_ours = not os.path.lexists(place) or _is_ours(place)
    except (OSError, ValueError) as error:
        raise disk_error(error, place) from error
    if not is_ours:
        raise UsageError(
            f"{place}: exists and is not a model that this command wrote, so it is not overwritten",
            remedy="choose another --name or --output, or remove it yourself",
        )


def _is_ours(place: Path) -> bool:
    """Whether everything in it is ours to delete: empty, or an engine, what belongs to it, and Python's cache."""
    if not stat.S_ISDIR(os.lstat(place).st_mode):
        return False
    if not any(place.iterdir()):
        return True
    manifest = place / VERSION / ENGINE_FOLDER / MANIFEST_NAME
    try:
        files = read_json_object(manifest, remedy="remove it yourself").get("files")
    except EngineError:  # none, or none of ours
        return False
    own = {manifest, place / CONFIG, place / VERSION / MODEL}
    own |= {manifest.parent / name for name in (files if isinstance(files, dict) else ())}
    found = {path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()}
    return all(_is_cache(path, place) for path in found - own)


def _is_cache(path: Path, place: Path) -> bool:
    return path.parent == place / VERSION / "__pycache__" and path.suffix == ".pyc"
