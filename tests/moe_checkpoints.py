"""Random checkpoints of the tiny shape with experts, in every layout in use."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import configs

Arrays = dict[str, np.ndarray[Any, Any]]
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
ASSETS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")


def write_by_transformers(folder: Path, **text: Any) -> Path:
    """Let transformers make and save a model; `text` alters its text_config."""
    import torch
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from qwen3vl_export.checkpoint import Checkpoint

    demo = Checkpoint.open("demo")
    values = copy.deepcopy(configs.load("models/tiny-moe")) | {key: demo.hf_config[key] for key in TOKEN_IDS}
    values["text_config"] |= {"eos_token_id": demo.hf_config["text_config"]["eos_token_id"], **text}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(values)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    for name in ASSETS:
        (folder / name).write_bytes((demo.folder / name).read_bytes())
    return folder


def rewritten(source: Path, folder: Path, change: Callable[[Arrays], Arrays]) -> Path:
    """Copy a checkpoint with other tensors."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    tensors = change(load_file(source / "model.safetensors"))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def as_on_the_hub(tensors: Arrays) -> Arrays:
    """Transpose every stacked tensor."""
    return {
        key: value.transpose(0, 2, 1) if re.search(r"experts\.(gate_up|down)_proj$", key) else value
        for key, value in tensors.items()
    }


def one_by_one(tensors: Arrays) -> Arrays:
    """Give every matrix of every expert a key of its own."""
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
