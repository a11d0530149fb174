"""Random checkpoints of the tiny shape with experts, in every layout in use."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helpers.random_checkpoints import random_model, tensors_of, tiny_values, write_files

Arrays = dict[str, np.ndarray[Any, Any]]


def as_in_the_graph(tensors: Arrays) -> Arrays:
    """Leave the experts as our definition and transformers 5 hold them."""
    return dict(tensors)


def as_on_the_hub(tensors: Arrays) -> Arrays:
    """Transpose every stacked tensor; the one layout that transformers 4.57 reads too."""
    return {
        key: value.transpose(0, 2, 1) if re.search(r"experts\.(gate_up|down)_proj$", key) else value
        for key, value in tensors.items()
    }


def write_experts(
    folder: Path,
    *,
    layout: Callable[[Arrays], Arrays] = as_on_the_hub,
    vision: Any = None,
    tie_word_embeddings: bool = True,
    seed: int = 0,
    **text: Any,
) -> Path:
    """Write a random mixture of experts; `text` and `vision` alter the sections of config.json."""
    top = {"tie_word_embeddings": tie_word_embeddings}
    values = tiny_values("tiny-moe", text_config=text, vision_config=vision or {}, **top)
    return write_files(folder, values, layout(tensors_of(random_model(values, seed=seed))))


def rewritten(source: Path, folder: Path, change: Callable[[Arrays], Arrays]) -> Path:
    """Copy a checkpoint with other tensors, as `change` makes them from those that it has."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = change(load_file(source / "model.safetensors"))
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_by_one(tensors: Arrays) -> Arrays:
    """Give every matrix of every expert, stacked as in the graph, a key of its own."""
    split: Arrays = {}
    for key, value in tensors.items():
        scope, found, part = key.partition(".experts.")
        if not found:
            split[key] = value
            continue
        for e, matrix in enumerate(value):
            if part == "down_proj":
                split[f"{scope}.experts.{e}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                split[f"{scope}.experts.{e}.gate_proj.weight"] = gate
                split[f"{scope}.experts.{e}.up_proj.weight"] = up
    return split
