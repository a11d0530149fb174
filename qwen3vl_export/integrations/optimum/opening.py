"""`from_pretrained`: find or build the engine that is meant, and open it."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3vl_export.cli.progress import progress
from qwen3vl_export.engine_cache import find_or_build
from qwen3vl_export.integrations.optimum.target import target_for
from qwen3vl_export.request import ExportRequest
from qwen3vl_export.sources import HUB_ID
from runtime.arguments import reading
from runtime.engine_options import OpeningKeywords
from runtime.errors import UsageError
from runtime.manifest import MANIFEST_NAME
from runtime.model import Qwen3VLModel
from runtime.shown import shown

_NOT_ASKED = ("model", "target", "output", "bundle", "compile", "weights", "cache_dir")
EXPORT_OPTIONS = tuple(field.name for field in dataclasses.fields(ExportRequest) if field.name not in _NOT_ASKED)
"""Options of an export that `from_pretrained` takes."""

OPENING_OPTIONS = (
    *(name for name in inspect.signature(Qwen3VLModel.from_engine).parameters if name not in ("path", "keywords")),
    *OpeningKeywords.__annotations__,
)
"""Options of `Qwen3VLModel.from_engine` that it takes as well."""

_TARGET = "target, weight_format or device, which say what is built"
NEAREST: Mapping[str, str] = {
    "attn_implementation": "kernels",
    "config": "the config.json of the checkpoint",
    "device_map": _TARGET,
    "dtype": _TARGET,
    "force_download": "another cache_dir",
    "library_name": "leaving it out",
    "load_in_4bit": _TARGET,
    "load_in_8bit": _TARGET,
    "local_files_only": "the path of a folder that was downloaded",
    "provider": _TARGET,
    "quantization_config": _TARGET,
    "session_options": "threads, huge_pages and cuda_graphs",
    "subfolder": "the path of a folder that was downloaded",
    "token": "the login of the Hub's client",
    "torch_dtype": _TARGET,
    "trust_remote_code": "leaving it out: no code of a checkpoint is ever run",
    "use_cache": "leaving it out: there is always a KV cache",
}
"""What transformers and optimum take beside, and what to use in its place; false values are of no effect."""


def open_engine(
    model_id: str | os.PathLike[str],
    *,
    export: bool | None,
    target: str | None,
    weight_format: str | None,
    device: str | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    engine_cache: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> tuple[Qwen3VLModel, Path]:
    """Open what `QwenVLForImageTextToText.from_pretrained` is asked for; return the folder too.

    Raises:
        UsageError: Arguments contradict each other, or one is unknown.
        Qwen3VLError: As `find_or_build` and `Qwen3VLModel.from_engine`.
    """
    _check_names(options)
    with reading("model_id", "pass the path of a folder or an id of the Hub"):
        model = os.fsdecode(model_id)
    is_engine = (Path(model) / MANIFEST_NAME).is_file()
    of_export = {name: options[name] for name in EXPORT_OPTIONS if options.get(name) is not None}
    if is_engine:
        named = {"export": export or None, "target": target, "weight_format": weight_format, "device": device}
        named |= {name: value for name, value in of_export.items() if name not in OPENING_OPTIONS}
        if given := [name for name, value in {**named, "revision": revision}.items() if value is not None]:
            raise UsageError(f"{model} is an engine already, so {given[0]} is of no use", remedy="leave it out")
        folder = Path(model)
    elif export is False:
        raise UsageError(
            f"{shown(model)} is no engine, and export=False builds none",
            remedy="pass export=True, or the folder that qwen3vl-export or optimum-cli export qwen3vl wrote",
        )
    else:
        model = _with_revision(model, revision)
        if options.get("max_sequences") is not None:
            of_export.setdefault("max_batch", options["max_sequences"])
        downloads = None if cache_dir is None else Path(cache_dir)
        with progress() as shown_progress:
            folder = find_or_build(
                model,
                target=_target(model, target, weight_format, device, downloads),
                cache=None if engine_cache is None else Path(engine_cache),
                progress=shown_progress,
                cache_dir=downloads,
                **of_export,
            )
    opening = {name: options[name] for name in OPENING_OPTIONS if options.get(name) is not None}
    return Qwen3VLModel.from_engine(folder, **opening), folder


def _check_names(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in EXPORT_OPTIONS or name in OPENING_OPTIONS or (name in NEAREST and not value):
            continue
        if name in NEAREST:
            raise UsageError(
                f"from_pretrained takes no {name}={shown(value)}", remedy=f"the nearest that exists is {NEAREST[name]}"
            )
        raise UsageError(
            f"from_pretrained knows no {shown(name)}",
            remedy=f"it takes {', '.join(dict.fromkeys((*EXPORT_OPTIONS, *OPENING_OPTIONS)))}",
        )


def _with_revision(model: str, revision: str | None) -> str:
    if revision is None:
        return model
    if Path(model).exists() or HUB_ID.fullmatch(model) is None or "@" in model:
        raise UsageError(
            f"{shown(model)} is no id of the Hub without a revision, so revision={shown(revision)} is of no use",
            remedy="leave revision out",
        )
    return f"{model}@{revision}"


def _target(
    model: str, target: str | None, weight_format: str | None, device: str | None, cache_dir: Path | None
) -> str:
    if target is not None:
        if weight_format is not None or device is not None:
            raise UsageError("target and weight_format or device both say the target", remedy="give one of them")
        return target

    def config() -> Any:
        from qwen3vl_export.checkpoint import Checkpoint

        return Checkpoint.open(model, cache_dir).config

    return target_for(weight_format, device, config)
