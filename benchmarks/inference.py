"""Time vision, prefill and decode of an engine or of PyTorch; each runs as a process of its own.

Both see the same image and prompt, compute logits of the last prompt token only, and decode the same fixed token, so
nothing depends on what random weights would answer. `python -m benchmarks run` starts both, one after the other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import repeat

if TYPE_CHECKING:
    from PIL.Image import Image

_DECODED_TOKEN = 65
_SENTENCE = "Read the digits. "


@dataclass(frozen=True)
class Workload:
    """What both sides compute.

    Attributes:
        image_side: Side of the square image in pixels.
        sentences: How often the prompt's sentence is repeated, to make the prompt longer.
        decode_steps: Decode steps that are timed.
        warmup: Untimed calls before the timed ones.
        repeats: Timed calls of vision and of prefill.
        threads: Threads of the computation.
    """

    image_side: int = 448
    sentences: int = 8
    decode_steps: int = 16
    warmup: int = 1
    repeats: int = 3
    threads: int = 2

    @property
    def prompt(self) -> str:
        """Text of the user's turn."""
        return (_SENTENCE * self.sentences).strip()

    def image(self) -> Image:
        """Draw uniform noise, the same on every call."""
        import numpy as np
        from PIL import Image as images

        return images.fromarray(np.random.default_rng(0).integers(0, 256, (self.image_side,) * 2 + (3,), np.uint8))


def time_engine(engine: Path, work: Workload) -> dict[str, Any]:
    """Time an engine folder."""
    import numpy as np

    from runtime.contract import DecoderInputs
    from runtime.model import Qwen3VLModel

    start = time.perf_counter()
    model = Qwen3VLModel.from_engine(engine, threads=work.threads, tuned=False)
    loaded = time.perf_counter() - start
    content = [{"type": "image", "image": work.image()}, {"type": "text", "text": work.prompt}]
    prepared = model.prepare([{"role": "user", "content": content}])
    prompt = prepared.decoder_inputs(model.encode_images(prepared.images))
    length = prompt.num_cache_rows
    cache = model.session.new_cache(length + work.warmup + work.decode_steps)
    step_count = 0

    def decode() -> None:
        nonlocal step_count
        past, token = np.array([length + step_count]), np.array([[_DECODED_TOKEN]])
        step_count += 1
        step = DecoderInputs.text(token, past, prompt.visual_embeds[:, :1], delta=prepared.positions.delta)
        model.session.decode(step, cache)

    counts = {"load_s": loaded, "prompt_tokens": length, "visual_tokens": prepared.num_visual_tokens}
    return counts | _time_phases(
        work, lambda: model.encode_images(prepared.images), lambda: model.session.prefill(prompt, cache), decode
    )


def time_torch(checkpoint: Path, work: Workload) -> dict[str, Any]:
    """Time transformers' own model in float32, eager mode, attention by `scaled_dot_product_attention`."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(work.threads)
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    loaded = time.perf_counter() - start
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image", "image": work.image()}, {"type": "text", "text": work.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    text_inputs = {key: value for key, value in inputs.items() if key != "pixel_values"}
    cache: Any = None
    token = torch.full((1, 1), _DECODED_TOKEN)

    def prefill() -> None:
        nonlocal cache
        cache = model(
            **text_inputs, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1
        ).past_key_values

    def decode() -> None:
        nonlocal cache
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values

    counts = {
        "load_s": loaded,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "visual_tokens": int((inputs["input_ids"] == model.config.image_token_id).sum()),
    }
    images = inputs["pixel_values"], inputs["image_grid_thw"]
    return counts | _time_phases(work, lambda: model.model.get_image_features(*images), prefill, decode)


def _time_phases(
    work: Workload, vision: Callable[[], object], prefill: Callable[[], object], decode: Callable[[], object]
) -> dict[str, Any]:
    return {
        "vision": repeat(vision, warmup=work.warmup, repeats=work.repeats),
        "prefill": repeat(prefill, warmup=work.warmup, repeats=work.repeats),
        "decode": repeat(decode, warmup=work.warmup, repeats=work.decode_steps),
    }


def command(side: str, source: Path, work: Workload) -> list[str]:
    """Return the command line of one side's process, to which the file for the result is added."""
    return [sys.executable, "-m", "benchmarks.inference", side, str(source), json.dumps(asdict(work))]


def main() -> None:
    """Time the side that the command line names and write the result as JSON."""
    side, source, work, result = sys.argv[1:]
    workload = Workload(**json.loads(work))
    if side == "engine":
        values = time_engine(Path(source), workload)
    else:
        import torch

        with torch.inference_mode():
            values = time_torch(Path(source), workload)
    Path(result).write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
