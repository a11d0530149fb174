"""Build the demo's configuration, and write a trained model as a Hugging Face folder.

The folder has the form of the Hub's Qwen3-VL folders, so that every release of transformers with Qwen3-VL loads it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_training.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer
from engines.exchange import exchange
from qwen3vl_export.checkpoint import HEAD_KEY
from runtime.model_config import EXPERTS_MODEL_TYPE, SUPPORTED_MODEL_TYPE, ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from qwen3vl_export.modeling import Qwen3VL

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
MIN_PIXELS = 4096
MAX_PIXELS = 512 * 512
_IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": MAX_PIXELS, "shortest_edge": MIN_PIXELS},
    "temporal_patch_size": 2,
}
_VIDEO_SAMPLING = {
    "do_sample_frames": True,
    "fps": 2,
    "max_frames": 768,
    "max_video_tokens": 768,
    "min_frames": 4,
    "return_metadata": False,
}
# transformers 4.57 takes no list as `extra_special_tokens`, 5's name for the additional ones.
_TOKENIZER = {
    "add_prefix_space": None,
    "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in (END_OF_TURN, END_OF_TEXT)],
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": END_OF_TURN,
    "model_max_length": 4096,
    "pad_token": END_OF_TEXT,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_PROCESSOR_CLASS = {"processor_class": "Qwen3VLProcessor"}


def build_config(tokenizer: Tokenizer) -> ModelConfig:
    """Return the dense demo's shape for a tokenizer's vocabulary and special ids."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=192,
            intermediate_size=512,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            head_dim=64,
            max_positions=4096,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_theta=5e6,
            mrope_section=(12, 10, 10),
        ),
        vision=VisionConfig(
            depth=4,
            hidden_size=96,
            intermediate_size=288,
            num_heads=4,
            in_channels=3,
            patch_size=16,
            temporal_patch_size=2,
            spatial_merge_size=2,
            num_position_embeddings=576,
            deepstack_layers=(1, 2),
            rope_theta=1e4,
        ),
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )


def hf_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of `config.json`, dense or with a mixture of experts; `ModelConfig.from_hf` reads it back.

    The decoder's rotary settings stand there twice: transformers 5 reads `rope_parameters`, 4.57 needs `rope_scaling`
    and `rope_theta`. So does the number of experts: `num_experts` in 4.57, `num_local_experts` in what 5 writes.
    """
    text, vision, experts = config.text, config.vision, config.text.experts
    model_type = SUPPORTED_MODEL_TYPE if experts is None else EXPERTS_MODEL_TYPE
    rope = {"mrope_interleaved": True, "mrope_section": list(text.mrope_section), "rope_type": "default"}
    text_config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_positions,
        "model_type": f"{model_type}_text",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": {**rope, "rope_theta": text.rope_theta},
        "rope_scaling": rope,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    if experts is not None:
        text_config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(experts.dense_layers),
            "moe_intermediate_size": experts.intermediate_size,
            "norm_topk_prob": True,
            "num_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "num_local_experts": experts.num_experts,
        }
    return {
        "architectures": [
            "Qwen3VLForConditionalGeneration" if experts is None else "Qwen3VLMoeForConditionalGeneration"
        ],
        "dtype": "bfloat16",
        "image_token_id": config.image_token_id,
        "model_type": model_type,
        "text_config": text_config,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": True,
        "video_token_id": config.video_token_id,
        "vision_config": {
            "deepstack_visual_indexes": list(vision.deepstack_layers),
            "depth": vision.depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision.hidden_size,
            "in_channels": vision.in_channels,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "model_type": f"{model_type}_vision",
            "num_heads": vision.num_heads,
            "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": text.hidden_size,
            "patch_size": vision.patch_size,
            "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "axial"},
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
        "vision_end_token_id": config.vision_end_token_id,
        "vision_start_token_id": config.vision_start_token_id,
    }


def save_checkpoint(model: Qwen3VL, folder: Path, card: str) -> None:
    """Write the folder: weights in bfloat16, configuration, tokenizer, processor and model card.

    The folder is written beside `folder` and exchanged with it, so that there is a usable one at any moment.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_weights(model), partial / "model.safetensors", metadata={"format": "pt"})
    tokenizer = build_tokenizer()
    tokenizer.save(str(partial / "tokenizer.json"))
    end_of_turn, end_of_text = (tokenizer.token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT))
    settings = {
        "config.json": hf_config(model.config, tokenizer),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [end_of_turn, end_of_text],
            "max_new_tokens": 64,
            "pad_token_id": end_of_text,
        },
        "tokenizer_config.json": _TOKENIZER | _PROCESSOR_CLASS,
        "preprocessor_config.json": {
            **_IMAGE_PROCESSOR,
            "image_processor_type": "Qwen2VLImageProcessor",
            **_PROCESSOR_CLASS,
        },
        "video_preprocessor_config.json": {
            **_IMAGE_PROCESSOR,
            **_VIDEO_SAMPLING,
            "video_processor_type": "Qwen3VLVideoProcessor",
            **_PROCESSOR_CLASS,
        },
    }
    for name, values in settings.items():
        (partial / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (partial / "README.md").write_text(card)
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
