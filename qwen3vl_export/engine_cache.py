"""From the name of a model to an engine: the one that is given, the one in the cache, or one that is built into it.

An engine in the cache is a folder `MODEL-TARGET-<12 hex digits>`. The digits are a digest of all that another engine
would come of: the model's revision, target, options, this package's version and the format of engine.json. They are not
stored anywhere else, so that nothing can contradict them: an engine is looked for under the name that it has to have.
Beside the engines, `.choices` notes which target `auto` took, on what machine; `.locks` lets one process build at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.disk import replace_text
from engines.progress import SILENT, Progress, Stage
from qwen3vl_export.engine_store import (
    NUM_DIGITS,
    Entry,
    cache_folder,
    entries,
    locked,
    make_folder,
    remove_folder,
)
from qwen3vl_export.names import shown_name
from qwen3vl_export.request import ExportRequest
from qwen3vl_export.revisions import Model, digest_of_folder, look_up, short_name
from runtime import __version__
from runtime.errors import CheckpointError, Qwen3VLError, UsageError
from runtime.files import is_folder, leads_somewhere, read_json_object
from runtime.installation import EXTRAS, how_to_install
from runtime.manifest import FORMAT_VERSION, MANIFEST_NAME

if TYPE_CHECKING:
    from engines.target import Target

_AUTO = "auto"
_CHOICES = ".choices"
_SIZES = ("max_context", "max_batch")
# Fields of a request that say where an export or a download goes, or that it is none; target, kernels and prompts count
# otherwise.
_NO_OPTIONS = ("model", "target", "output", "bundle", "compile", "weights", "calibration", "kernels", "cache_dir")
_EXPORTERS = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")


def find_or_build(
    model: str | os.PathLike[str],
    *,
    target: str = _AUTO,
    cache: Path | None = None,
    progress: Progress = SILENT,
    **options: Any,
) -> Path:
    """Return the folder of an engine; it is built if the cache has none.

    Args:
        model: The folder of an engine, which is returned as it is; or a checkpoint: a folder, `owner/name[@revision]`
            of the Hub, demo, demo-moe or demo-long.
        target: What to build for; auto chooses, once for each machine.
        cache: Folder of the cache; `cache_folder()` by default.
        progress: Told what was found, and of the stages of a build.
        **options: Further fields of `ExportRequest`. `max_context` and `max_batch` count where engines have fixed sizes
            and are of no effect elsewhere; they are what the engine is to be opened with.

    Raises:
        UsageError: An option is of no use, there is no place for a cache, or the exporter is not installed.
        CheckpointError: There is no such model, or it changed while it was exported.
        Qwen3VLError: As `qwen3vl_export.export.export`.
    """
    folder = Path(model)
    if is_folder(folder, error=CheckpointError) and leads_somewhere(folder / MANIFEST_NAME):
        return folder
    request = ExportRequest(os.fspath(model), target=target, **options)
    place = cache_folder(cache)
    try:
        found = look_up(request.model, request.cache_dir)
    except (CheckpointError, ModuleNotFoundError) as error:
        found_before = _built_before(request, place)
        if found_before is None:
            if isinstance(error, ModuleNotFoundError):
                raise _not_installed(request.model, str(error.name)) from error
            raise
        reason = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else error.message
        _say(progress, f"note: the newest engine of {request.model} is taken, since the Hub was not asked: {reason}")
        return _said(found_before, "found in the cache", progress)
    chosen = _recorded_target(request, found, place)
    if chosen is not None:
        entry = _whole(place / entry_name(request, found, chosen))
        if entry is not None:
            return _said(entry, "found in the cache", progress)
    return _build(request, found, place, progress)


def entry_name(request: ExportRequest, model: Model, target: Target) -> str:
    """Return the name of the folder that an engine has in the cache.

    Raises:
        UsageError, TargetError: It cannot have the kernels that are asked for.
    """
    from engines.decode_plan.compile import triton_version
    from engines.kernel_sets import with_kernels

    kernels = with_kernels(target, request.kernels).kernels
    values = {
        "revision": model.revision,
        "target": target.name,
        **({"kernels": kernels} if kernels else {}),  # asked for, or the best of this machine
        "options": _options_for(request, target),
        "calibration": None if request.calibration is None else digest_of_folder(request.calibration),
        **({"decode_plan": bool(triton_version())} if target.decode_plan else {}),
        "version": __version__,
        "format": FORMAT_VERSION,
        # A plan is for a version of its library, and most for one kind of GPU.
        "machine": _machine() if target.compile is not None else None,
    }
    return f"{model.short_name}-{target.name}-{_digits(values)}"


def _options_for(request: ExportRequest, target: Target) -> dict[str, Any]:
    """Return the options that were given, but sizes where a target has none."""
    given = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in _NO_OPTIONS and getattr(request, field.name) not in (field.default, ())
    }
    return {name: value for name, value in given.items() if target.compile is not None or name not in _SIZES}


def _recorded_target(request: ExportRequest, model: Model, place: Path) -> Target | None:
    """Return the target by its name, or the one that auto took before; None if nothing was chosen yet."""
    from engines.registry import get

    if request.target != _AUTO:
        return get(request.target)
    path = _choice_file(request, model, place)
    try:
        return get(str(read_json_object(path)["target"])) if path.exists() else None
    except (Qwen3VLError, KeyError):  # damaged: it is chosen again
        return None


def _choice_file(request: ExportRequest, model: Model, place: Path) -> Path:
    options = request.build_options
    values = {
        "revision": model.revision,
        "options": None if options is None else dataclasses.asdict(options),
        "version": __version__,
        "machine": _machine(),
    }
    return place / _CHOICES / f"{model.short_name}-{_digits(values)}.json"


def _machine() -> dict[str, Any]:
    """Return what of this machine decides which target is chosen, and where a plan runs."""
    from engines.hardware import probe

    values = probe().to_dict()
    values["gpus"] = [
        {name: gpu[name] for name in ("name", "compute_capability", "total_bytes")} for gpu in values["gpus"]
    ]
    return {name: values[name] for name in ("cpu_features", "memory_bytes", "gpus", "versions")}


def _digits(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:NUM_DIGITS]


def _built_before(request: ExportRequest, place: Path) -> Entry | None:
    """Return the newest engine of a model whose revision cannot be asked for just now."""
    name = short_name(request.model)
    for entry in sorted(entries(place), key=lambda each: each.built, reverse=True):
        source = {} if entry.manifest is None else entry.manifest.source
        if source.get("name") == request.model and source.get("revision"):
            model = Model(request.model, name, str(source["revision"]), None)
            chosen = _recorded_target(request, model, place)
            if chosen is not None and entry_name(request, model, chosen) == entry.path.name and not entry.problem:
                return entry
    return None


def _build(request: ExportRequest, model: Model, place: Path, progress: Progress) -> Path:
    """Choose the target and build, unless another process did meanwhile."""
    missing = [name for name in _EXPORTERS if importlib.util.find_spec(name) is None]
    if missing:
        raise _not_installed(request.model, missing[0])
    make_folder(place)
    chosen = _choose(request, model, place, progress)
    path = place / entry_name(request, model, chosen)
    with locked(place, path.name, lambda: _say(progress, f"another process builds {path}; waiting for it")):
        entry = _whole(path)
        if entry is not None:
            return _said(entry, "found in the cache", progress)
        if os.path.lexists(path):
            _say(progress, f"note: {Entry.of(path).problem}; it is built again")
            remove_folder(path)
        _export(request, model, chosen, path, progress)
    return _said(Entry.of(path), "built, and kept for the next time", progress)


def _export(request: ExportRequest, model: Model, target: Target, path: Path, progress: Progress) -> None:
    from qwen3vl_export.export import export

    dropped = dict.fromkeys(_SIZES) if target.compile is None else {}
    made = export(dataclasses.replace(request, target=target.name, output=path, **dropped), progress)
    assert made.manifest is not None, "an engine has one"
    commit = made.manifest.source.get("revision")
    if (commit or look_up(request.model, request.cache_dir).revision) != model.revision:
        remove_folder(path)
        raise CheckpointError(
            f"{request.model}: it changed while it was exported", remedy="run the command again when it is complete"
        )


def _choose(request: ExportRequest, model: Model, place: Path, progress: Progress) -> Target:
    """Return the target; what auto takes is noted, so that the next time nothing has to be computed for it."""
    from engines.choose import resolve_target
    from qwen3vl_export.checkpoint import Checkpoint
    from runtime.model_config import ModelConfig

    recorded = _recorded_target(request, model, place)
    if recorded is not None:
        return recorded

    def config() -> ModelConfig:
        if model.config is not None:
            return ModelConfig.from_hf(model.config)
        return Checkpoint.open(request.model, request.cache_dir).config

    target = resolve_target(request.target, config, lambda text: _say(progress, text), options=request.build_options)
    replace_text(_choice_file(request, model, place), json.dumps({"target": target.name}) + "\n")
    return target


def _not_installed(model: str, package: str) -> UsageError:
    return UsageError(
        f"{shown_name(model)} is no engine, and the cache has none of it: to export it, the Python package "
        f"{package} is needed, which is not installed",
        remedy=how_to_install(EXTRAS.get(package, "export")),
    )


def _whole(path: Path) -> Entry | None:
    """Return the entry if there is a complete engine."""
    entry = Entry.of(path) if path.is_dir() else None
    return None if entry is None or entry.problem else entry


def _said(entry: Entry, how: str, progress: Progress) -> Path:
    _say(progress, f"engine: {entry.path} ({entry.num_bytes / 1e6:,.1f} MB), {how}")
    return entry.path


def _say(progress: Progress, text: str) -> None:
    progress.report(Stage.CHOOSING, text)
