"""The judge: transformers' own model and processor, unmodified, in float32 with eager attention.

Positions, placement of the visual embeddings and the cache are transformers' own. It is asked through its public
interface, so that any release from 4.57 on will do: `from_pretrained` and `from_config`, `generate`, the forward of a
model, `get_image_features`, and the keys and values of the cache that they return.

Which experts a token goes through is only seen in our own definition of the model, on the same weights. It gives router
statistics, and runs with other assignments; the numbers of a run without are transformers'.

Shapes: S prompt tokens, P patches, N steps, V vocab.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import weights_of
from qwen3vl_export.modeling import Qwen3VL
from qwen3vl_export.parity.metrics import difference
from qwen3vl_export.parity.own_reference import OwnReference
from qwen3vl_export.parity.quiet import quiet_libraries
from qwen3vl_export.parity.reference import ReferenceOutput, segments_by_kind
from qwen3vl_export.routing import Assignment, RouterStatistics
from runtime.contract import FloatArray
from runtime.errors import CheckpointError, Qwen3VLError, UsageError
from runtime.image_processor import ProcessedImage
from runtime.installation import how_to_install
from runtime.preparation import Prepared
from runtime.video.processor import ProcessedVideo

_COMPARE_WITH_OWN = "compare with this package's own PyTorch definition of the model: --reference own"
FOLLOWED_NOTE = (
    "where the engine chose other experts, it was compared with our own definition, which can take the same ones, "
    "and otherwise agrees with transformers"
)
_OUR_READING = (
    "transformers does not read this checkpoint's format without further packages, or not rightly: PyTorch got the "
    "weights as the exporter reads them, so a fault of that reading does not show here"
)


# A checkpoint may name code of its own (`auto_map` in its JSON files). Left out, transformers asks at the terminal
# whether to run it; False refuses, without a question.
_LOCAL_DATA = {"local_files_only": True, "trust_remote_code": False}

_KINDS = ("image", "video")

_KEEPS_MARKERS = (5, 10)
"""The first release that leaves the template's markers around a video."""

_OLDEST = (4, 57)
"""The first release with Qwen3-VL."""


def check_installed() -> None:
    """Raise if transformers, or what its processor of Qwen3-VL needs, is not here, or is too old.

    Raises:
        UsageError: transformers or torchvision is not installed, or transformers does not know Qwen3-VL.
    """
    for name in ("transformers", "torchvision"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"a comparison with transformers needs the Python package {name!r}, which is not installed",
                remedy=f"{how_to_install('verify')}; or {_COMPARE_WITH_OWN}",
            )
    installed = metadata.version("transformers")
    if _release(installed) < _OLDEST:
        raise UsageError(
            f"transformers {installed} is installed, which does not know Qwen3-VL; expected 4.57 or later",
            remedy=f"{how_to_install('verify')}; or {_COMPARE_WITH_OWN}",
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _metadata(part: Mapping[str, Any]) -> dict[str, Any]:
    total = len(part["video"])
    return {"total_num_frames": total, "fps": part["raw_fps"], "frames_indices": list(range(total))}


class TransformersReference:
    """Transformers' model and processor of a checkpoint; see `Reference`.

    Raises:
        CheckpointError: Weights are missing or of another shape, which transformers would fill at random.
        UsageError: transformers or torchvision is not installed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        check_installed()
        with quiet_libraries():
            import transformers

            self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
            self.keeps_markers = _release(transformers.__version__) >= _KEEPS_MARKERS
            with _refusing(checkpoint):
                self._processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint.folder, **_LOCAL_DATA)
                model = _as_transformers_reads_it(checkpoint)
            self.notes = [_OUR_READING] if model is None else []
            if model is None:
                with _refusing(checkpoint):
                    model = _as_we_read_it(checkpoint)
        model.eval()
        # The checkpoint's own file may ask for sampling, penalties and an end; the comparison wants none of them.
        model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self._model: Any = model
        has_experts = checkpoint.config.text.experts is not None
        self._own = OwnReference(_with_weights_of(model, checkpoint)) if has_experts else None

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
        """Return what the processor makes of messages; a video is an array of frames with `raw_fps`."""
        parts = [part for message in messages for part in message["content"] if isinstance(part, dict)]
        videos = [part for part in parts if part["type"] == "video"]
        with quiet_libraries():
            if not videos:
                output = self._processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
            else:
                output = self._processor(
                    text=[self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)],
                    images=[part["image"] for part in parts if part["type"] == "image"] or None,
                    videos=[part["video"] for part in videos],
                    video_metadata=[_metadata(part) for part in videos],
                    return_tensors="pt",
                )
        return {name: value.numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}

    def run(
        self,
        prepared: Prepared,
        num_steps: int,
        *,
        swapped: frozenset[Assignment] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt; see `Reference.run`. With swapped assignments, our own definition runs."""
        if swapped:
            assert self._own is not None, "a dense model has no routers"
            return self._own.run(prepared, num_steps, swapped=swapped, likely_tokens=likely_tokens)
        with quiet_libraries():
            output = self._run(prepared, num_steps, likely_tokens)
        if self._own is None:
            return output
        own = self._own.run(prepared, num_steps, likely_tokens=output.tokens)
        if own.tokens == output.tokens and difference(own.logits, output.logits).scaled <= _same_within():
            return replace(output, routers=own.routers, gaps=own.gaps)
        self.notes.append(
            "transformers and our own definition of the model differ on a prompt: there, experts that the engine chose "
            "differently were not followed"
        )
        return replace(output, routers=own.routers)

    def _run(self, prepared: Prepared, num_steps: int, likely_tokens: Sequence[int]) -> ReferenceOutput:
        input_ids = prepared.prompt.input_ids
        visual: FloatArray | None = None
        images: dict[str, Any] = {}
        with torch.no_grad():
            if prepared.images:
                images, visual = self._visual(prepared)
            # An image token that was generated stands for no image, which a call with images does not know.
            config = self._model.config
            if likely_tokens and not {config.image_token_id, config.video_token_id} & {*likely_tokens}:
                logits, layers = self._forward([*input_ids, *likely_tokens[:-1]], images)
                steps = logits[len(input_ids) - 1 :]
                if steps.argmax(-1).tolist() == list(likely_tokens):
                    return _output(visual, logits[: len(input_ids)], layers, steps)
            logits, _ = self._forward(input_ids, images)
            made = self._model.generate(
                **self._model_inputs(input_ids, images),
                max_new_tokens=num_steps,
                output_logits=True,
                return_dict_in_generate=True,
            )
        steps = torch.cat(made.logits).float().numpy()
        assert len(steps) == num_steps, f"generate ended after {len(steps)} of {num_steps} tokens"
        return _output(visual, logits, _layers(made.past_key_values), steps)

    def _visual(self, prepared: Prepared) -> tuple[dict[str, Any], FloatArray]:
        """Return what a call takes of images and videos, and the levels of their segments in the prompt's order."""
        pixels = {name: torch.from_numpy(values) for name, values in segments_by_kind(prepared).items()}
        images: dict[str, Any] = dict(pixels)
        levels: dict[type, list[FloatArray]] = {}
        for kind, name, grid_name in (
            (ProcessedImage, "pixel_values", "image_grid_thw"),
            (ProcessedVideo, "pixel_values_videos", "video_grid_thw"),
        ):
            inputs = [each for each in prepared.inputs if isinstance(each, kind)]
            if not inputs:
                continue
            images[grid_name] = torch.tensor([each.grid_thw for each in inputs])
            of_kind = self._model.get_image_features if kind is ProcessedImage else self._model.get_video_features
            ends = np.cumsum([each.num_visual_tokens for each in inputs])[:-1]
            levels[kind] = np.split(_levels(of_kind(pixels[name], images[grid_name])), ends, axis=1)
        ordered = [levels[type(each)].pop(0) for each in prepared.inputs]
        return images, np.concatenate(ordered, axis=1)

    def _forward(
        self, ids: Sequence[int], images: Mapping[str, Any]
    ) -> tuple[FloatArray, list[tuple[FloatArray, FloatArray]]]:
        """Run a whole text in one call; return its logits, and each layer's keys and values."""
        output = self._model(**self._model_inputs(ids, images), use_cache=True)
        return output.logits[0].numpy(), _layers(output.past_key_values)

    def _model_inputs(self, ids: Sequence[int], images: Mapping[str, Any]) -> dict[str, Any]:
        # 5.x keeps the position delta of its last multimodal prompt, which a text prompt must not inherit.
        self._model.model.rope_deltas = None
        tokens = torch.tensor([list(ids)])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **images}
        if images and "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:  # not in 4.57
            is_image, is_video = (tokens == getattr(self._model.config, f"{kind}_token_id") for kind in _KINDS)
            inputs["mm_token_type_ids"] = is_image.int() + 2 * is_video.int()
        return inputs


@contextmanager
def _refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of an error inside transformers that the installed release does not read this checkpoint.

    Raises:
        UsageError: It fails, except for want of memory; each release fails in its own way on the files of others.
    """
    try:
        yield
    except (Qwen3VLError, MemoryError):  # these say what they are
        raise
    except Exception as error:
        raise UsageError(
            f"transformers {metadata.version('transformers')} does not read {checkpoint.name} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            remedy="repair what it names, try another release, such as that which config.json names as its writer, or "
            f"{_COMPARE_WITH_OWN}",
        ) from error


def _same_within() -> float:
    import configs

    return float(configs.load("tolerances")["fp32"]["logits_scaled"])


def _output(
    visual: FloatArray | None, logits: FloatArray, layers: list[tuple[FloatArray, FloatArray]], steps: FloatArray
) -> ReferenceOutput:
    return ReferenceOutput(visual, logits, layers, steps.argmax(-1).tolist(), steps, RouterStatistics(), {})


def _layers(cache: Any) -> list[tuple[FloatArray, FloatArray]]:
    return [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]


def _levels(features: Any) -> FloatArray:
    """Stack the levels of what `get_image_features` returns: a pair in 4.57, an object later."""
    merged, deepstack = features if type(features) is tuple else (features.pooler_output, features.deepstack_features)
    levels = [merged, *deepstack]
    return np.stack(
        [(level if isinstance(level, torch.Tensor) else torch.cat(list(level))).numpy() for level in levels]
    )


def _as_transformers_reads_it(checkpoint: Checkpoint) -> Any | None:
    """Load the folder with transformers, or return None where it does not read this format of weights, or not rightly.

    It reads no quantised weights without further packages, and no experts that lie one by one. Stacked experts it takes
    in one layout or both, by release (5.0 not in the Hub's), and a square matrix in whichever layout it is stored
    (qwen3vl_export/experts.py).

    Raises:
        CheckpointError: Weights are missing or of another shape, which it would fill at random.
    """
    from transformers import AutoModelForImageTextToText

    shapes = [entry.shape for key, entry in checkpoint.entries.items() if _is_of_experts(key)]
    is_stacked = all(len(shape) == 3 and shape[1] != shape[2] for shape in shapes)
    if "quantization_config" in checkpoint.hf_config or not is_stacked:
        return None
    model, info = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        **_LOCAL_DATA,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are looked at below
    )
    lost = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lost and all(map(_is_of_experts, lost)):
        return None
    if lost:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(lost)} weights are missing or of another shape than config.json implies: "
            + ", ".join(lost[:5]),
            remedy="give the checkpoint that the engine was built from, with all its files",
        )
    return model


def _is_of_experts(key: str) -> bool:
    return ".mlp.experts." in key


def _holds_experts_as_in_graph() -> bool:
    """Whether models of the installed release hold stacked experts as our graphs do; before 5.0 as the Hub does."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) >= 5


def _as_we_read_it(checkpoint: Checkpoint) -> Any:
    """Load what this package reads: what the codes of a quantised checkpoint stand for, experts that lie one by one."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    left_out = ("quantization_config", "auto_map")
    values = copy.deepcopy({key: value for key, value in checkpoint.hf_config.items() if key not in left_out})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(_exchanged(weights_of(checkpoint)))
    return model


def _with_weights_of(model: Any, checkpoint: Checkpoint) -> Qwen3VL:
    """Return our own definition on the very tensors of a model of transformers, which take no further memory."""
    with torch.device("meta"):
        own = Qwen3VL(checkpoint.config)
    own.load_state_dict(_exchanged(model.state_dict()), assign=True)
    own.tie()
    return own.eval()


def _exchanged(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the weights of our definition to those of the installed release's models, or back: both turn the experts."""
    if _holds_experts_as_in_graph():
        return dict(weights)
    return {key: value.transpose(1, 2) if _is_of_experts(key) else value for key, value in weights.items()}
