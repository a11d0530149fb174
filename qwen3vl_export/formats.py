"""Recognise what is given in the place of a checkpoint, and say what to do with it.

Folders and files that people have are named here before anything is read of them: other formats of weights, adapters,
engines, archives. All of it takes a listing of the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from qwen3vl_export.names import shown_name
from runtime.errors import CheckpointError, Qwen3VLError
from runtime.files import open_regular, read_json_object
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME
from runtime.shown import shown

CONFIG = "config.json"
COMPLETE = "give a complete Hugging Face folder"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_GGUF = "give the Hugging Face folder that the GGUF file was made from: its weights are rounded for llama.cpp"
_SAVE_AS_SAFETENSORS = (
    "load it with transformers (AutoModelForImageTextToText.from_pretrained) and write it again with save_pretrained, "
    "which saves safetensors; then export that folder"
)
_UNPACK = "unpack it and give the folder"
_OTHER_ENGINE = "give the Hugging Face checkpoint that it was made from"

# Weights in other formats, by a pattern of their files' names in lower case.
_OTHER_WEIGHTS = (
    (re.compile(r".*\.gguf"), "GGUF weights", _GGUF),
    (re.compile(r"pytorch_model.*\.bin(\.index\.json)?"), "PyTorch weights (pickle)", _SAVE_AS_SAFETENSORS),
    (
        re.compile(r"(?!(optimizer|scheduler|rng_state|scaler|training_args)).*\.(bin|pt|pth|ckpt)"),
        "PyTorch weights (pickle)",
        _SAVE_AS_SAFETENSORS,
    ),
    (re.compile(r".*\.msgpack(\.index\.json)?"), "Flax weights", _SAVE_AS_SAFETENSORS),
    (re.compile(r"(tf_model.*|.*\.keras|.*\.h5)(\.index\.json)?"), "TensorFlow weights", _SAVE_AS_SAFETENSORS),
    (re.compile(r".*\.onnx"), "an ONNX model", _OTHER_ENGINE),
    (re.compile(r".*\.(engine|plan|trt)"), "a TensorRT engine", _OTHER_ENGINE),
    (re.compile(r".*\.npz"), "MLX or NumPy weights", _SAVE_AS_SAFETENSORS),
    (re.compile(r"openvino_.*\.xml"), "an OpenVINO model", _OTHER_ENGINE),
    (re.compile(r".*\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|zst|7z|rar)"), "an archive", _UNPACK),
)
_MAGIC = (
    (b"GGUF", "GGUF weights", _GGUF),
    (b"PK\x03\x04", "an archive, or PyTorch weights (pickle)", f"{_UNPACK}; or {_SAVE_AS_SAFETENSORS}"),
)


def refuse_file(path: Path) -> NoReturn:
    """Raise the error of a file that was given instead of a folder.

    Raises:
        CheckpointError: Always; it says what the file is, where that can be told, and what to give.
    """
    name = shown_name(str(path))
    if not os.path.exists(path):
        raise CheckpointError(f"{name}: a broken link", remedy="repair the link, or give the folder itself")
    what, remedy = _kind_of_file(path)
    raise CheckpointError(f"{name}: a file ({what}), expected the folder of a checkpoint", remedy=remedy)


def _kind_of_file(path: Path) -> tuple[str, str]:
    if path.name.lower().endswith(".safetensors") or path.name in (CONFIG, INDEX):
        return "one of a checkpoint's files", f"give its folder, {shown_name(str(path.parent.absolute()))}"
    for pattern, what, remedy in _OTHER_WEIGHTS:
        if pattern.fullmatch(path.name.lower()):
            return what, remedy
    try:
        with open(open_regular(path), "rb") as file:
            start = file.read(4)
    except OSError:  # no regular file, which would let us wait for whoever writes into it, or not ours to read
        start = b""
    for magic, what, remedy in _MAGIC:
        if start == magic:
            return what, remedy
    return "of no kind that is known here", "give the folder that holds config.json and the safetensors files"


def check_folder(folder: Path) -> None:
    """Raise if a folder is something else than a checkpoint.

    Raises:
        CheckpointError: It is an adapter, an engine, a pipeline, or has no config.json.
    """
    name, files = shown_name(str(folder)), _names_in(folder)
    if files & {MANIFEST_NAME, LOWERED_NAME}:
        raise CheckpointError(
            f"{name}: an engine, or lowered graphs, that qwen3vl-export wrote, not a checkpoint",
            remedy=f"run it with `qwen3vl run`, or export the checkpoint that it was made from{_source_of(folder)}",
        )
    if files & {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}:
        beside = "beside a whole model" if files & {SINGLE, INDEX} else "and no whole model"
        raise CheckpointError(
            f"{name}: a LoRA or other PEFT adapter (adapter_config.json){_base_of(folder)}, {beside}",
            remedy="merge it first, in Python: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
            ".save_pretrained(folder); add the base's tokenizer and processor files, and export that folder",
        )
    if "model_index.json" in files and CONFIG not in files:
        raise CheckpointError(
            f"{name}: a diffusers pipeline (model_index.json), not a Qwen3-VL checkpoint",
            remedy="give the folder of a Qwen3-VL model; a pipeline may hold one, as text_encoder",
        )
    if CONFIG not in files:
        _refuse_without_config(folder, name, files)


def check_weights(folder: Path) -> None:
    """Raise if the folder of a checkpoint has no weights in safetensors, under the names that transformers looks for.

    Raises:
        CheckpointError: It says which others there are, and what to do with them.
    """
    name, files = shown_name(str(folder)), _names_in(folder)
    if not files & {SINGLE, INDEX}:
        _refuse_without_weights(name, files)


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{shown_name(str(folder))}: cannot be read ({error.strerror})", remedy="check its permissions"
        ) from error


def _refuse_without_config(folder: Path, name: str, files: Collection[str]) -> NoReturn:
    inside = sorted(each for each in files if os.path.isfile(folder / each / CONFIG))
    if len(inside) == 1:
        raise CheckpointError(
            f"{name}: {CONFIG} is missing; the checkpoint lies one folder deeper, in {shown_name(inside[0])}",
            remedy=f"give {shown_name(str(folder / inside[0]))}",
        )
    if inside:
        raise CheckpointError(
            f"{name}: {CONFIG} is missing; {len(inside)} folders in it have one: {_listed(inside)}",
            remedy="give one of them",
        )
    _refuse_other_weights(name, files)
    raise CheckpointError(
        f"{name}: {CONFIG}: missing",
        remedy=f"{COMPLETE}; if this came from the Hub, the repository holds no checkpoint of transformers",
    )


def _refuse_without_weights(name: str, files: Collection[str]) -> NoReturn:
    shards = sorted(each for each in files if each.endswith(".safetensors"))
    if shards:
        raise CheckpointError(
            f"{name}: {SINGLE} and {INDEX} are missing, there is {_listed(shards)}",
            remedy=f"download {INDEX}, which says what each file holds; a single file has to be called {SINGLE}",
        )
    _refuse_other_weights(name, files)
    raise CheckpointError(
        f"{name}: {SINGLE} and {INDEX} are missing",
        remedy=f"{COMPLETE}; without weights, too, their headers are read",
    )


def _refuse_other_weights(name: str, files: Collection[str]) -> None:
    for pattern, what, remedy in _OTHER_WEIGHTS:
        found = sorted(each for each in files if pattern.fullmatch(each.lower()))
        if found:
            raise CheckpointError(f"{name}: {what} ({_listed(found)}), expected safetensors", remedy=remedy)


def _listed(names: list[str]) -> str:
    return ", ".join(shown_name(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _base_of(folder: Path) -> str:
    try:
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
    except Qwen3VLError:  # what is said of it is said without
        return ""
    return f" of {shown(base)}" if isinstance(base, str) and base else ""


def _source_of(folder: Path) -> str:
    for name in (MANIFEST_NAME, LOWERED_NAME):
        try:
            source = read_json_object(folder / name).get("source")
        except Qwen3VLError:  # one of the two, or damaged
            continue
        if isinstance(source, dict) and isinstance(source.get("name"), str):
            return f", {shown(source['name'])}"
    return ""
