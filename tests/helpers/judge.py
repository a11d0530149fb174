"""transformers as judge, through its public interface: what differs between its releases is told apart here alone.

Everything is looked up when it is asked for, so that test files can be collected where transformers is not installed.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

IMAGE, VIDEO = 1, 2
"""What a processor of transformers 5 writes into `mm_token_type_ids`."""


def release() -> tuple[int, int]:
    """Return the release of transformers, such as (4, 57)."""
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def load(folder: Path, dtype: str = "float32") -> Any:
    """Load a checkpoint folder in evaluation mode with eager attention; every weight must come from the folder."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        is_turned = _has_experts(folder) and not experts_are_read_from_the_hub()
        source = _experts_turned(folder, Path(scratch)) if is_turned else folder
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def config_of(values: Mapping[str, Any]) -> Any:
    """Return the config object of a config.json's values."""
    from transformers import AutoConfig

    rest = {key: value for key, value in values.items() if key != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


def new_model(values: Mapping[str, Any]) -> Any:
    """Build the whole model of a config.json's values, on the default device, with transformers' own random weights."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(config_of(values), attn_implementation="eager").eval()


def vision_rope_is_read() -> bool:
    """Say whether `rope_theta` of the vision tower is read from config.json; before 5.24 it is always 10000."""
    from transformers import AutoConfig

    return hasattr(AutoConfig.for_model("qwen3_vl").vision_config, "rope_parameters")


def experts_lie_as_on_the_hub() -> bool:
    """Say whether a model holds its experts as [experts, in, out]; from 5.0 on as [experts, out, in]."""
    return release() < (5, 0)


def experts_are_read_from_the_hub() -> bool:
    """Say whether stacked experts as [experts, in, out] are read and written.

    5.0.0 takes them for a mismatch, and its `save_pretrained` splits gate and up along the wrong axis; 5.10 does not.
    Releases between the two were not looked at.
    """
    return not (5, 0) <= release() < (5, 10)


def _has_experts(folder: Path) -> bool:
    return "moe" in json.loads((folder / "config.json").read_text())["model_type"]


def _experts_turned(folder: Path, scratch: Path) -> Path:
    """Copy a folder with its experts as the model holds them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    expected = {key: tuple(value.shape) for key, value in _meta_state(folder).items()}
    for key in tensors:
        if ".mlp.experts." in key and tuple(tensors[key].shape) != expected[key]:
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
    shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=_weights)
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    return scratch


def _meta_state(folder: Path) -> dict[str, Tensor]:
    import torch

    with torch.device("meta"):
        return dict(new_model(json.loads((folder / "config.json").read_text())).state_dict())


def in_graph_layout(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a tensor of a transformers model has in our definition."""
    is_turned = ".mlp.experts." in key and experts_lie_as_on_the_hub()
    return (shape[0], shape[2], shape[1]) if is_turned else shape


def kinds_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return `mm_token_type_ids` where the release asks for them."""
    if "mm_token_type_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    kinds = IMAGE * (ids == model.config.image_token_id) + VIDEO * (ids == model.config.video_token_id)
    return {"mm_token_type_ids": kinds.int()}


def run(model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Run a whole model on what a processor returned."""
    import torch

    # The model keeps the position delta of its last multimodal prompt, which a text prompt must not inherit.
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**_inputs(model, inputs))


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the normalised hidden states that the head gets, [B, S, D]."""
    import torch

    model.model.rope_deltas = None
    with torch.no_grad():
        return model.model(**_inputs(model, inputs)).last_hidden_state


def greedy(model: Any, inputs: Mapping[str, Tensor], num_tokens: int) -> tuple[list[int], Tensor]:
    """Generate so many tokens from one prompt, beyond end tokens too; return them and the logits that chose each."""
    import torch

    ids = inputs["input_ids"]
    assert len(ids) == 1
    model.model.rope_deltas = None
    limits = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**_inputs(model, inputs), do_sample=False, **limits, **asked)
    return found.sequences[0, ids.shape[1] :].tolist(), torch.cat(found.logits)


def _inputs(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    ids = inputs["input_ids"]
    kept = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    return {"attention_mask": torch.ones_like(ids), **kept, **kinds_of(model, ids)}


def prompt_inputs(prepared: Any) -> dict[str, Tensor]:
    """Return what the runtime prepared (`Qwen3VLModel.prepare`) as inputs of transformers' model."""
    import numpy as np
    import torch

    inputs = {"input_ids": torch.tensor([prepared.prompt.input_ids])}
    if prepared.images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([i.pixel_values for i in prepared.images]))
        inputs["image_grid_thw"] = torch.tensor([i.grid_thw for i in prepared.images])
    return inputs


def logits_of(model: Any, prepared: Any) -> Any:
    """Return the logits of a prompt that the runtime prepared, float32 [tokens, vocab]."""
    return run(model, prompt_inputs(prepared)).logits[0].float().numpy()


def visual_levels(model: Any, pixel_values: Tensor, grid_thw: Tensor, *, is_video: bool = False) -> Tensor:
    """Return what the vision tower gives: the merged patches and every DeepStack level, [1+levels, V, D]."""
    import torch

    features = model.get_video_features if is_video else model.get_image_features
    with torch.no_grad():
        found = features(pixel_values, grid_thw)
    merged, levels = found if isinstance(found, tuple) else (found.pooler_output, found.deepstack_features)
    # By image or joined: a list, a tuple or a tensor, by release.
    return torch.stack([each if torch.is_tensor(each) else torch.cat(list(each)) for each in (merged, *levels)])


def images_need_a_start_token() -> bool:
    """Say whether positions find an image by the vision start token before it; from 5.10 on by `mm_token_type_ids`."""
    from transformers import Qwen3VLModel

    return "mm_token_type_ids" not in inspect.signature(Qwen3VLModel.get_rope_index).parameters


def rope_index(model: Any, kinds: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return positions and delta of a `Qwen3VLModel`, for images where `kinds` [1, S] is 1."""
    import torch

    config = model.config
    ids = torch.where(kinds == IMAGE, config.image_token_id, 0)
    if not images_need_a_start_token():
        return model.get_rope_index(ids, mm_token_type_ids=kinds.int(), image_grid_thw=grid_thw)
    starts = (kinds[:, 1:] == IMAGE) & (kinds[:, :-1] != IMAGE)
    ids[:, :-1][starts] = config.vision_start_token_id
    return model.get_rope_index(ids, image_grid_thw=grid_thw)


def processor(folder: Path) -> Any:
    """Open the processor of a checkpoint folder; it pads on the right."""
    from transformers import AutoProcessor

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        if release() < (5, 0) and isinstance(settings.get("extra_special_tokens"), list):
            # A name of 5; the list has another in 4.57.
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
            folder = Path(shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=_weights))
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        opened = AutoProcessor.from_pretrained(folder)
    opened.tokenizer.padding_side = "right"
    return opened


def processed(processor: Any, texts: list[str], images: list[Any] | None = None, videos: Any = None) -> Any:
    """Return the inputs of a batch, padded on the right; videos are arrays [frames, H, W, 3], taken whole."""
    if videos is None:
        return processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs = processor(
        text=texts, images=images, videos=videos, do_sample_frames=False, padding=True, return_tensors="pt"
    )
    rendered = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=False)
    placeholder = "<|placeholder|>"  # 5.10.0 leaves it in the place of the video tokens
    if any(placeholder in text for text in rendered):
        assert release() == (5, 10) and len(texts) == 1
        inputs.update(processor.tokenizer(rendered[0].replace(placeholder, "<|video_pad|>"), return_tensors="pt"))
    return inputs


def _weights(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def image_processor(settings: Mapping[str, Any]) -> Any:
    """Return the image processor that works with torchvision; before 5.10 the plain name is Pillow's."""
    import transformers

    chosen = getattr(transformers, "Qwen2VLImageProcessorFast", None) if release() < (5, 10) else None
    kept = {key: value for key, value in settings.items() if not key.endswith("_type")}
    return (chosen or transformers.Qwen2VLImageProcessor)(**kept)


def skip_unless(condition: bool, reason: str) -> None:
    """Skip a test, and say why, where the installed release cannot judge it."""
    if not condition:
        import transformers

        pytest.skip(f"transformers {transformers.__version__}: {reason}")
