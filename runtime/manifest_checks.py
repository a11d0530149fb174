"""Check the entries of a manifest: their types and ranges, before anything is computed of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from runtime.cache_types import DTYPE_OF_BITS, MIXED
from runtime.errors import EngineError
from runtime.model_config import ExpertsConfig, ModelConfig, TextConfig, VisionConfig
from runtime.shown import shown_numbers

CACHE_DTYPES = ("float32", "float16", "bfloat16", "int8", "uint8", MIXED)

_MOST_OF_AN_INTEGER, _MOST_OF_A_SIZE, _MOST_LAYERS, _MOST_OF_A_PATCH = (1 << 31) - 1, 1 << 20, 1 << 10, 1 << 6
_MOST_FILE_BYTES = 1 << 50
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What is no size of a weight: any non-negative integer of 31 bits, or less.
_RANGES = {
    **dict.fromkeys(("vocab_size", "max_positions"), (1, _MOST_OF_AN_INTEGER)),
    **dict.fromkeys(("num_layers", "depth"), (1, _MOST_LAYERS)),
    **dict.fromkeys(("in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size"), (1, _MOST_OF_A_PATCH)),
    **{f"{name}_token_id": (0, _MOST_OF_AN_INTEGER) for name in ("image", "video", "vision_start", "vision_end")},
}


def check_file_name(name: object) -> str:
    """Return the name of a file in the engine's folder, if it is one.

    Raises:
        EngineError: It leads elsewhere, or no file can have it.
    """
    is_name = isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0\ud800-\udfff]", name)
    if not is_name or len(str(name)) > 255:
        raise EngineError(
            f"{shown_numbers(name)} is not the name of a file in the engine's folder", remedy="build the engine again"
        )
    return str(name)


def check_record(name: str, record: Mapping[str, Any]) -> None:
    """Check the record of one file.

    Raises:
        EngineError: A value is of another type or out of range.
    """
    check_file_name(name)
    where = f"files.{name}"
    _integer(f"{where}.num_bytes", record.get("num_bytes"), 0, _MOST_FILE_BYTES)
    if not isinstance(record.get("sha256"), str) or not _SHA256.fullmatch(record["sha256"]):
        _refuse(f"{where}.sha256", record.get("sha256"), "64 hexadecimal digits")
    _boolean(f"{where}.is_weights", record.get("is_weights", False))


def check_model(model: ModelConfig) -> None:
    """Check the shape of a model.

    Raises:
        EngineError: A value is of another type or out of range.
    """
    _check_fields("model", model)
    _check_fields("model.text", model.text)
    _check_fields("model.vision", model.vision)
    if model.text.experts is not None:
        _check_fields("model.text.experts", model.text.experts)
    if model.vision.hidden_size < model.vision.num_heads:
        _refuse("model.vision.num_heads", model.vision.num_heads, f"at most hidden_size, {model.vision.hidden_size}")
    if len(model.vision.deepstack_layers) > model.text.num_layers:
        _refuse("model.vision.deepstack_layers", model.vision.deepstack_layers, "no more levels than decoder layers")


def check_capabilities(capabilities: object) -> None:
    """Check those capabilities that this version knows; others are left to the session that asks for them.

    Raises:
        EngineError: A value is of another type or out of range.
    """
    if not isinstance(capabilities, Mapping):
        _refuse("capabilities", capabilities, "an object")
    if "cache_dtype" not in capabilities:
        _refuse("capabilities.cache_dtype", None, f"one of {', '.join(CACHE_DTYPES)}")
    for name, value in capabilities.items():
        check = _CAPABILITIES.get(name)
        if check is not None:
            check(f"capabilities.{name}", value)


def check_cache_layers(capabilities: Mapping[str, Any], num_layers: int) -> None:
    """Check that an engine whose layers keep keys and values differently says how each of them does.

    Raises:
        EngineError: It does not, or says it of other layers.
    """
    given = capabilities.get("cache_layer_bits")
    if (given is not None) != (capabilities["cache_dtype"] == MIXED) or len(given or ()) not in (0, num_layers):
        expected = f"the bits of {num_layers} layers where cache_dtype is {MIXED}, and no entry elsewhere"
        _refuse("capabilities.cache_layer_bits", given, expected)


def check_texts(name: str, values: object) -> None:
    """Check an object whose values are strings.

    Raises:
        EngineError: It is none.
    """
    if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
        _refuse(name, values, "an object of strings")


def _check_fields(where: str, record: ModelConfig | TextConfig | VisionConfig | ExpertsConfig) -> None:
    for field in fields(record):
        name, value = f"{where}.{field.name}", getattr(record, field.name)
        if field.type == "int":
            _integer(name, value, *_RANGES.get(field.name, (1, _MOST_OF_A_SIZE)))
        elif field.type == "float":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                _refuse(name, value, "a number above 0")
        elif field.type == "bool":
            _boolean(name, value)
        elif str(field.type).startswith("tuple[int"):
            for i, item in enumerate(value):
                _integer(f"{name}[{i}]", item, 0, _MOST_OF_A_SIZE)
            if field.type == "tuple[int, int, int]" and len(value) != 3:
                _refuse(name, value, "three integers")


def _integer(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _refuse(name, value, f"an integer of {least} to {most}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        _refuse(name, value, "a string")


def _texts(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        _refuse(name, value, "a list of strings")


def _positive(name: str, value: object) -> None:
    _integer(name, value, 1, _MOST_OF_AN_INTEGER)


def _layer_bits(name: str, value: object) -> None:
    if not isinstance(value, list) or not all(type(each) is int and each in DTYPE_OF_BITS for each in value):
        _refuse(name, value, f"a list of {', '.join(map(str, DTYPE_OF_BITS))}")


def _one_of(*choices: object) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if isinstance(value, bool) or value not in choices:
            _refuse(name, value, f"one of {', '.join(map(str, choices))}")

    return check


def _file_name(name: str, value: object) -> None:
    try:
        check_file_name(value)
    except EngineError as error:
        raise EngineError(f"{name}: {error.message}", remedy=error.remedy) from error


def _profiles(name: str, value: object) -> None:
    """Check optimisation profiles: of each graph a list of objects with a name, least and largest shapes."""
    expected = "a list of profiles for each graph: name, min and max"
    if not isinstance(value, Mapping):
        _refuse(name, value, expected)
    for graph, profiles in value.items():
        if not isinstance(profiles, list) or not profiles:
            _refuse(f"{name}.{graph}", profiles, expected)
        for i, profile in enumerate(profiles):
            where = f"{name}.{graph}[{i}]"
            if not isinstance(profile, Mapping) or not isinstance(profile.get("name"), str):
                _refuse(where, profile, expected)
            for end in ("min", "max"):
                shapes = profile.get(end)
                if not isinstance(shapes, Mapping) or not all(isinstance(dims, list) for dims in shapes.values()):
                    _refuse(f"{where}.{end}", shapes, "a list of sizes for each input")
                for tensor, dims in shapes.items():
                    for dim in dims:
                        _integer(f"{where}.{end}.{tensor}", dim, 0, _MOST_OF_AN_INTEGER)


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise EngineError(f"{name} is {shown_numbers(value)}, expected {expected}", remedy="build the engine again")


_CAPABILITIES: Mapping[str, Callable[[str, object], None]] = {
    "batched_chunks": _boolean,
    "cache_bits": _one_of(4, 8, 16, 32),
    "cache_dtype": _one_of(*CACHE_DTYPES),
    "cache_layer_bits": _layer_bits,
    "cache_scales": _file_name,
    "capacity": _positive,
    "custom_ops": _text,
    "decode_plan": _boolean,
    "device": _one_of("cpu", "gpu"),
    "hardware_compatible": _boolean,
    "kernels": _texts,
    "kv_scores": _positive,
    "library": _text,
    "library_version": _text,
    "logits_chunk": _positive,
    "max_batch": _positive,
    "precision": _text,
    "prefill_chunk": _positive,
    "prefill_min_tokens": _positive,
    "profiles": _profiles,
    "stripped": _boolean,
    "token_scores": _boolean,
    "top_k": _positive,
    "updates_cache_in_place": _boolean,
    "version_compatible": _boolean,
    "weight_streaming": _boolean,
}
