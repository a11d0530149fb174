"""Write a trained model as a Hugging Face folder: its weights, beside the small files that the shipped demos have.

Every release of transformers with Qwen3-VL loads those: `config.json` has the decoder's rotary settings and the number
of experts in the forms of 4.57 and of 5, and `tokenizer_config.json` has `additional_special_tokens`, since 4.57 takes
no list as `extra_special_tokens`, 5's name for them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from engines.exchange import exchange
from qwen3vl_export.checkpoint import HEAD_KEY, Checkpoint
from qwen3vl_export.demo import CHECKPOINT, CHECKPOINT_MOE

if TYPE_CHECKING:
    from torch import Tensor

    from qwen3vl_export.modeling import Qwen3VL

_CARD, _WEIGHTS = "README.md", "model.safetensors"


def save_checkpoint(model: Qwen3VL, folder: Path, card: str) -> None:
    """Write the folder: weights in bfloat16, model card, and all else as the shipped demo of the model's shape has it.

    The folder is written beside `folder` and exchanged with it, so that there is a usable one at any moment.
    """
    from safetensors.torch import save_file

    shipped = CHECKPOINT if model.config.text.experts is None else CHECKPOINT_MOE
    assert model.config == Checkpoint.open(str(shipped)).config, "the shape that its config.json says"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(shipped, partial, ignore=shutil.ignore_patterns(_WEIGHTS, _CARD))
    save_file(_weights(model), partial / _WEIGHTS, metadata={"format": "pt"})
    (partial / _CARD).write_text(card)
    for file in partial.iterdir():
        file.chmod(0o644)
    if folder.exists() and exchange(partial, folder):
        shutil.rmtree(partial)
    elif folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)


def _weights(model: Qwen3VL) -> dict[str, Tensor]:
    """Return the weights in bfloat16 as the Hub stores them: stacked experts [E, in, out], a tied head not at all."""
    import torch

    weights = {}
    for key, tensor in model.state_dict().items():
        if key == HEAD_KEY and model.config.text.tie_word_embeddings:
            continue
        stored = tensor.to(torch.bfloat16)
        weights[key] = (stored.transpose(1, 2) if ".mlp.experts." in key else stored).contiguous()
    return weights
