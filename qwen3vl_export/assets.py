"""The small files of a checkpoint that an engine holds: found, completed, and opened once as the runtime opens them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen3vl_export.formats import COMPLETE
from qwen3vl_export.names import shown_name
from qwen3vl_export.tokenizer_files import TAKE_ALL, read_tokenizer
from runtime.chat import template_source
from runtime.errors import CheckpointError, Qwen3VLError
from runtime.files import read_small_file
from runtime.generation_config import IN_FILE
from runtime.generation_file import unknown_keys
from runtime.input_kinds.image import IMAGE_TOKEN
from runtime.model_config import ModelConfig
from runtime.preparation import (
    GENERATION,
    PREPROCESSOR,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    VIDEO_PREPROCESSOR,
    Preparation,
)
from runtime.tokenizer import Tokenizer

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)
_MAX_LISTED = 5
_PROCESSOR = "processor_config.json"
# In the runtime's advice: an engine can be exported again, and whoever has it may not have made its files.
_OF_ENGINES = re.compile(r"\b(engine|export|do not trust)")
_GENERATION_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")

# Parts of transformers 5's processor_config.json, and the file of the Hub's Qwen3-VL folders that holds the same.
_PROCESSOR_PARTS = {"image_processor": PREPROCESSOR, "video_processor": VIDEO_PREPROCESSOR}


def read_assets(folder: Path, read_json: Callable[[str], dict[str, Any]]) -> dict[str, bytes]:
    """Read the files by the name they get in an engine; what is spread over several becomes one.

    Args:
        folder: The checkpoint.
        read_json: Reads a JSON object from a file of it.

    Raises:
        CheckpointError: A file is missing or not readable, or no token ends an answer.
    """
    with _naming(folder / TEMPLATE):
        assets = {TEMPLATE: template_source(folder).encode()}
    for name in ("config.json", TOKENIZER_SETTINGS):
        assets[name] = read_small_file(folder / name, error=CheckpointError, remedy=COMPLETE)
    read_json(TOKENIZER_SETTINGS)  # whose special tokens the template takes
    assets[TOKENIZER] = read_tokenizer(folder, read_json)
    parts = _split_processor_config(read_json(_PROCESSOR) if os.path.lexists(folder / _PROCESSOR) else {})
    # transformers reads both, and takes the newer file for what it holds.
    assets[PREPROCESSOR] = _as_json(parts.get(PREPROCESSOR) or read_json(PREPROCESSOR))
    if VIDEO_PREPROCESSOR in parts or os.path.lexists(folder / VIDEO_PREPROCESSOR):
        assets[VIDEO_PREPROCESSOR] = _as_json(parts.get(VIDEO_PREPROCESSOR) or read_json(VIDEO_PREPROCESSOR))
    generation = read_json(GENERATION) if os.path.lexists(folder / GENERATION) else {}
    if unknown := unknown_keys(generation, IN_FILE):
        listed = ", ".join(map(shown_name, unknown[:_MAX_LISTED])) + (", …" if len(unknown) > _MAX_LISTED else "")
        _LOGGER.warning("note: %s: transformers knows no %s, so nothing comes of it", folder / GENERATION, listed)
    assets[GENERATION] = _as_json(_with_token_ids(generation, read_json("config.json"), folder))
    return assets


def check_assets(assets: Mapping[str, bytes], config: ModelConfig, folder: Path) -> None:
    """Open the files as the runtime will, and compare them with the shape of the model.

    Args:
        assets: What `read_assets` returned.
        config: Shape of the model.
        folder: Where they came from, for messages.

    Raises:
        CheckpointError: The runtime does not read one of them, or they belong to another model.
    """
    preparation = Preparation.from_files(assets, config, folder, opening=_naming)
    with _naming(folder / TOKENIZER):
        _check_ids(preparation.tokenizer, config)
    with _naming(folder / GENERATION):
        options = preparation.defaults
        # One that the model never gives does no harm beside others, and transformers takes it.
        if not options.eos_token_ids:
            raise CheckpointError(
                "eos_token_id holds no id that a token can have, so no answer would end",
                remedy="write the ids of <|im_end|> and <|endoftext|> as eos_token_id",
            )
        _expect_below("eos_token_id", min(options.eos_token_ids), config.text.vocab_size)


def _split_processor_config(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Take transformers 5's `processor_config.json` apart into the files of the Hub's Qwen3-VL folders, by name."""
    kind = {"processor_class": settings["processor_class"]} if "processor_class" in settings else {}
    parts = {name: settings.get(part) for part, name in _PROCESSOR_PARTS.items()}
    return {name: {**part, **kind} for name, part in parts.items() if isinstance(part, Mapping)}


def _with_token_ids(generation: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fill ids that are not set from config.json, from its top or its text_config, in transformers' order."""
    text = config.get("text_config")
    filled = dict(generation)
    for name in _GENERATION_IDS:
        for source in (config, text if isinstance(text, Mapping) else {}):
            if filled.get(name) is None and source.get(name) is not None:
                filled[name] = source[name]
    if filled.get("eos_token_id") in (None, []):
        raise CheckpointError(
            f"{folder}: eos_token_id is neither in {GENERATION} nor in config.json, so no answer would end",
            remedy=f"add {GENERATION} with the ids of <|im_end|> and <|endoftext|> as eos_token_id",
        )
    return filled


def _check_ids(tokenizer: Tokenizer, config: ModelConfig) -> None:
    # If there are more tokens than rows, some have no row; also if there are fewer, with gaps between their ids.
    largest = max(tokenizer.num_tokens - 1, tokenizer.largest_id)
    if largest >= config.text.vocab_size:
        raise CheckpointError(
            f"with all added tokens it has {tokenizer.num_tokens} tokens with ids up to {largest}, config.json a "
            f"vocab_size of {config.text.vocab_size}, the rows of the embedding",
            remedy="take tokenizer and weights from one checkpoint; after tokens were added, the model needs "
            "resize_token_embeddings, and has to be saved as well",
        )
    for name, token in (
        ("image_token_id", IMAGE_TOKEN),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        found, expected = tokenizer.token_id(token), getattr(config, name)
        if found != expected:
            raise CheckpointError(f"{token} has the id {found}, config.json says {name} = {expected}", remedy=TAKE_ALL)


def _expect_below(name: str, value: int, limit: int) -> None:
    if value >= limit:
        raise CheckpointError(
            f"{name}: {value} is not below config.json's vocab_size, {limit}",
            remedy="write the ids of <|im_end|> and <|endoftext|> in this checkpoint's tokenizer",
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of an error which file it is about, and keep its advice unless it speaks of an engine."""
    try:
        yield
    except Qwen3VLError as error:
        message = error.message.removeprefix(f"{path.name} ").removeprefix(f"{path}: ")
        is_of_engine = error.remedy is None or _OF_ENGINES.search(error.remedy) is not None
        raise CheckpointError(f"{path}: {message}", remedy=TAKE_ALL if is_of_engine else error.remedy) from error


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
