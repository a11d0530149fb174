"""The reference: transformers' own model, unmodified, in float32 with eager attention.

Positions, placement of the visual embeddings and the cache are transformers' own. Shapes: S prompt tokens, P patches,
N steps, V vocab.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.routing import Choice, RouterStatistics, watched_routers
from runtime.errors import CheckpointError, UsageError

Floats = NDArray[np.float32]

_OUR_READING = (
    "transformers does not read this checkpoint's form without further packages, or not rightly: PyTorch got the "
    "weights as the exporter reads them, so a fault of that reading does not show here"
)


@dataclass(frozen=True)
class ReferenceOutput:
    """What the reference computes for one prompt.

    Attributes:
        visual_embeds: [1+D, V, hidden], or None without images.
        logits: [S, vocab] of the prompt.
        layers: Keys and values of each layer behind the prompt and all greedy tokens but the last, [1, K, S+N-1, H].
        tokens: Greedy tokens; the end of the sequence does not stop them.
        step_logits: [N, vocab]: the logits that chose each of `tokens`.
        routers: What the routers of a mixture of experts did.
        gaps: Of each of their choices, how far the last chosen and the first rejected expert are apart.
    """

    visual_embeds: Floats | None
    logits: Floats
    layers: list[tuple[Floats, Floats]]
    tokens: list[int]
    step_logits: Floats
    routers: RouterStatistics
    gaps: dict[Choice, float]


def check_processor() -> None:
    """Raise if transformers' processor of Qwen3-VL does not work here: prompt and pixels could not be compared.

    Raises:
        UsageError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise UsageError(
            "the Hugging Face processor needs the Python package 'torchvision', which is not installed",
            remedy="install this project with its extra [export]",
        )


class Reference:
    """Transformers' model and processor of a checkpoint folder.

    Attributes:
        notes: What the comparison with it does not show.

    Raises:
        CheckpointError: Weights are missing or of another shape, which transformers would fill at random.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor

        checkpoint = Checkpoint.open(str(folder))
        is_read = _is_read_by_transformers(checkpoint)
        self._model: Any = (_as_it_is(folder) if is_read else _as_we_read_it(checkpoint)).eval()
        self.notes = [] if is_read else [_OUR_READING]
        self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
        """Return what the processor makes of messages."""
        output = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return {name: value.numpy() for name, value in output.items()}

    def run(
        self,
        input_ids: Sequence[int],
        pixel_values: Sequence[Floats],
        grids_thw: Sequence[tuple[int, int, int]],
        num_steps: int,
        *,
        swapped: frozenset[Choice] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt and `num_steps` greedy tokens.

        Args:
            input_ids: The prompt; every image token in it stands for an image.
            pixel_values: Patches of each image, [P, C·Tp·p·p].
            grids_thw: Patch grid of each image.
            num_steps: Tokens to generate.
            swapped: Choices where the other expert is taken, see `watched_routers`.
            likely_tokens: If these are the greedy tokens, one call computes all steps.
        """
        run = partial(self._run, input_ids, pixel_values, grids_thw, swapped)
        # An image token that was generated stands for no image, which a call with images does not know.
        if likely_tokens and self._model.config.image_token_id not in likely_tokens:
            output = run(1, list(likely_tokens[:-1]))
            if output.tokens == list(likely_tokens):
                return output
        return run(num_steps, [])

    def _run(
        self,
        input_ids: Sequence[int],
        pixel_values: Sequence[Floats],
        grids_thw: Sequence[tuple[int, int, int]],
        swapped: frozenset[Choice],
        num_steps: int,
        given: list[int],
    ) -> ReferenceOutput:
        """Run the prompt, and tokens given behind it, in one call; then steps of greedy tokens."""
        import torch

        ids = torch.tensor([[*input_ids, *given]])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        visual: Floats | None = None
        # The model keeps the position delta of its last multimodal prompt, which a text prompt must not inherit.
        self._model.model.rope_deltas = None
        watch = watched_routers(self._model, len(input_ids), swapped=swapped)
        with torch.no_grad(), watch as watched:
            if pixel_values:
                kinds = (ids == self._model.config.image_token_id).int()
                pixels = torch.from_numpy(np.concatenate(list(pixel_values)))
                grids = torch.tensor(list(grids_thw))
                inputs |= {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}
                features = self._model.model.get_image_features(pixels, grids)
                levels = [features.pooler_output, *features.deepstack_features]
                visual = np.stack([torch.cat(list(level)).numpy() for level in levels])
            output = self._model(**inputs, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0].numpy()
            steps = list(logits[len(input_ids) - 1 :])
            for _ in range(num_steps - 1):
                # Without a mask: given one, transformers 5.23 makes positions for all of it, not for the new token.
                next_id = torch.tensor([[int(steps[-1].argmax())]])
                step = self._model(input_ids=next_id, past_key_values=cache, use_cache=True)
                steps.append(step.logits[0, -1].numpy())
        layers = [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]
        tokens = [int(step.argmax()) for step in steps]
        prompt_logits = logits[: len(input_ids)]
        return ReferenceOutput(visual, prompt_logits, layers, tokens, np.stack(steps), watched.statistics, watched.gaps)


def _is_read_by_transformers(checkpoint: Checkpoint) -> bool:
    """Say whether transformers 5.23 loads it rightly: unquantised, experts stacked, in matrices that are not square.

    A square one it takes as it is, in whichever layout it is stored (qwen3vl_export/experts.py).
    """
    if "quantization_config" in checkpoint.hf_config:
        return False
    experts = [(key, entry.shape) for key, entry in checkpoint.entries.items() if ".mlp.experts." in key]
    return all(len(shape) == 3 and shape[1] != shape[2] for _, shape in experts)


def _as_it_is(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below
    )
    lost = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} weights are missing or of another shape than config.json implies: "
            + ", ".join(lost[:5]),
            remedy="give the checkpoint that the engine was built from, with all its files",
        )
    return model


def _as_we_read_it(checkpoint: Checkpoint) -> Any:
    """Load what this package reads: what the codes of a quantised checkpoint stand for, experts that lie one by one."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = copy.deepcopy({key: value for key, value in checkpoint.hf_config.items() if key != "quantization_config"})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    left = dict(checkpoint.entries)
    weights = {}
    text = checkpoint.config.text
    for layer in (i for i in range(text.num_layers) if text.experts_of(i) is not None):
        # Stacked as in the graph, which is as the model holds them.
        scope = f"model.language_model.layers.{layer}.mlp"
        experts, keys = checkpoint.experts(layer, scope)
        weights |= {f"{scope}.{name}": tensor.numpy() for name, tensor in experts.items()}
        left = {key: entry for key, entry in left.items() if key not in keys}
    weights |= {key: checkpoint.tensor(key, entry.shape).numpy() for key, entry in left.items()}
    missing, _ = model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()}, strict=False)
    lost = sorted(set(missing) - {"lm_head.weight"})
    if lost:
        raise CheckpointError(f"{checkpoint.folder}: {len(lost)} weights are missing: {', '.join(lost[:5])}")
    return model
