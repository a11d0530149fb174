"""Random checkpoints of the tiny shapes, written by our own definition: transformers is not needed, and reads them.

config.json has the rotary embedding in both forms: releases before 5 read `rope_theta` and `rope_scaling`, later ones
`rope_parameters`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import configs

TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
ASSETS = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)


def tiny_values(shape: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Return the contents of a config.json with the demo's token ids.

    Args:
        shape: Name of the shape, `tiny` or `tiny-moe`.
        changes: Values of the top; those of `text_config` and `vision_config` are laid over the shape's own.
    """
    from qwen3vl_export.checkpoint import Checkpoint

    demo = Checkpoint.open("demo").hf_config
    values = {"model_type": "qwen3_vl"} | copy.deepcopy(configs.load(f"models/{shape}"))
    text, vision = values["text_config"], values["vision_config"]
    text |= {key: demo["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= changes.pop("text_config", {})
    vision |= changes.pop("vision_config", {})
    family = "Qwen3VLMoe" if values["model_type"] == "qwen3_vl_moe" else "Qwen3VL"
    text["model_type"], vision["model_type"] = f"{values['model_type']}_text", values["model_type"]
    ids = {key: demo[key] for key in TOKEN_IDS}
    values |= ids | {"architectures": [f"{family}ForConditionalGeneration"], "dtype": "float32"} | changes
    return in_both_forms(values)


def in_both_forms(values: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json that releases before 5 read as later ones do: they look in other places."""
    text = {"tie_word_embeddings": values["tie_word_embeddings"], **values["text_config"]}
    rope = text["rope_parameters"]
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    # 5.0 does not build a mixture of experts without pad_token_id.
    return {**values, "text_config": {"pad_token_id": None, **text, **older}}


def random_model(values: Mapping[str, Any], *, seed: int = 0) -> Any:
    """Return our own model with random weights, larger than a training starts with, so that each of them matters."""
    import torch

    from qwen3vl_export.modeling import Qwen3VL
    from runtime.model_config import ModelConfig

    torch.manual_seed(seed)
    return randomise(Qwen3VL(ModelConfig.from_hf(values))).eval()


def randomise(model: Any) -> Any:
    """Draw the parameters of a torch module from PyTorch's generator."""
    import torch

    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tensors_of(model: Any) -> dict[str, Any]:
    """Return the state of our model as a checkpoint holds it: no head where it is the embedding."""
    tied = {"lm_head.weight"} if model.config.text.tie_word_embeddings else set()
    return {key: value.detach().numpy() for key, value in model.state_dict().items() if key not in tied}


def write_files(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    """Write a checkpoint with the demo's small files."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return add_assets(folder)


def add_assets(folder: Path) -> Path:
    """Copy the demo's tokenizer, template and processor settings."""
    from qwen3vl_export.checkpoint import Checkpoint

    demo = Checkpoint.open("demo").folder
    for name in ASSETS:
        (folder / name).write_bytes((demo / name).read_bytes())
    return folder


def write_random(folder: Path, shape: str = "tiny", **changes: Any) -> Path:
    """Write a random dense checkpoint; `changes` as of `tiny_values`. Experts: `moe_checkpoints.write_experts`."""
    values = tiny_values(shape, **changes)
    return write_files(folder, values, tensors_of(random_model(values)))
