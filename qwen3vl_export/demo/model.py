"""Build the demo's model and write it as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_export.assets import split_processor_config
from qwen3vl_export.demo.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

MIN_PIXELS = 4096
MAX_PIXELS = 512 * 512
_IMAGE_PROCESSOR = {
    "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def build_config(tokenizer: Tokenizer) -> Qwen3VLConfig:
    """Return the demo's configuration for a tokenizer's vocabulary and special ids."""
    from transformers import Qwen3VLConfig

    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "num_heads": 4,
        "intermediate_size": 288,
        "out_hidden_size": 192,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 576,
        "deepstack_visual_indexes": [1, 2],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _split_processor_config(folder: Path) -> None:
    """Write the processor's settings as the two files of the Hub's Qwen3-VL folders instead of transformers 5's one."""
    settings = json.loads((folder / "processor_config.json").read_text())
    for name, content in split_processor_config(settings).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "processor_config.json").unlink()


def save_checkpoint(model: Qwen3VLForConditionalGeneration, folder: Path, card: str) -> None:
    """Write the folder: weights in bfloat16, configuration, tokenizer, processor and model card.

    The folder is written beside `folder` and renamed, so that there is a usable one at any moment.
    """
    import copy

    import torch
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(partial)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=build_tokenizer(),
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_IMAGE_PROCESSOR),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**_IMAGE_PROCESSOR),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(partial)
    _split_processor_config(partial)
    eos = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    generation = {"do_sample": False, "eos_token_id": eos, "pad_token_id": eos[1], "max_new_tokens": 64}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (partial / "README.md").write_text(card)
    for file in partial.iterdir():
        file.chmod(0o644)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
