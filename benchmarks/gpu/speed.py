"""Time one engine through the runtime's own session: `speed ENGINE [--no-plan]`.

Values: `decode_kernels` (own or onnxruntime), `memory` {weight_bytes, taken_at_open_bytes, taken_at_step_bytes,
cache_bytes}, `decode` by batch after 512 cached tokens, `decode_long` after 3500, `prefill` by tokens, `vision` by
patches, `first_token`: an image of 1024² pixels, from resized pixels in host memory to the id of the first token.
Times are milliseconds of whole calls on the host, inputs and answers included (`benchmarks.gpu.values.summary`).

`--no-plan` opens the engine without its decode plan and times decode steps alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.measure import LAYOUT
from benchmarks.gpu.values import Values, parser, repeated
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.decode_plan import has_plan
from runtime.input_limits import InputLimits
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig
from runtime.preparation import Preparation, Prepared
from runtime.session import SessionOptions, open_session

CHUNK = 512
# Beyond the weights: what the libraries take for themselves, such as workspaces of cuBLAS.
_SLACK_BYTES = 1 << 29
_SLACK = 1.25
_CACHE_ITEM_BYTES = 2


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batches: Of decode steps after `past` tokens.
        past, long_past: Cached tokens; the second for one sequence, 0 to leave it out.
        prefills: Tokens of prompts.
        grids: Height and width of images in patches; the last is that of `first_token`.
        repeats: Timed steps; a third of it for the longer calls.
    """

    batches: tuple[int, ...] = (1, 4, 8, 16, 32)
    past: int = 512
    long_past: int = 3500
    prefills: tuple[int, ...] = (512, 2048)
    grids: tuple[tuple[int, int], ...] = ((28, 28), (48, 64), (64, 64))
    repeats: int = 40

    @property
    def few(self) -> int:
        """Timed calls of those that take long."""
        return max(1, self.repeats // 5)


class Engine:
    """An opened engine and the calls that are timed."""

    def __init__(self, folder: Path, *, with_plan: bool = True, opener: Callable[..., Any] = open_session) -> None:
        self.manifest = Manifest.read(folder)
        self.config = self.manifest.model
        self.preparation = Preparation.from_folder(folder, self.config).for_engine(self.manifest.capabilities)
        self.session = opener(folder, self.manifest, SessionOptions(decode_plan=with_plan))
        self._embeds = no_visual_embeds(self.config)
        self._random = np.random.default_rng(0)

    @property
    def decode_kernels(self) -> str:
        """Whose kernels decode."""
        return str(self.session.decode_kernels)

    @property
    def plan_problem(self) -> str:
        """Why the engine has a decode plan that does not run; empty if it runs, or if there is none."""
        problem = self.session.decode_plan_problem
        return f"the decode plan does not run: {problem}" if problem and has_plan(self.manifest) else ""

    def text(self, batch: int, num_new: int, past: int) -> DecoderInputs:
        """Return random tokens after so many, of which the last of each sequence gets logits."""
        ids = self._random.integers(0, self.config.text.vocab_size, (batch, num_new))
        asked = np.full((batch, 1), num_new - 1)
        return DecoderInputs.text(ids, np.full(batch, past), self._embeds, logits_positions=asked)

    def fill(self, cache: Any, length: int) -> None:
        """Run prompts of random tokens, one in each slot."""
        for slot in range(cache.batch):
            for start in range(0, length, CHUNK):
                self.session.prefill(self.text(1, min(CHUNK, length - start), start), cache, slot)

    def decode(self, cache: Any, past: int) -> bool:
        """Run one step of all slots; tell whether its logits are numbers."""
        rows = self.session.decode_top(self.text(cache.batch, 1, past), cache)
        return all(np.isfinite(each.values).all() for row in rows for each in row)

    def prefill(self, cache: Any, length: int) -> None:
        """Run one prompt in chunks, as the scheduler does."""
        for start in range(0, length, CHUNK):
            self.session.prefill(self.text(1, min(CHUNK, length - start), start), cache)

    def prepared(self, grid: tuple[int, int]) -> Prepared:
        """Return a prompt with a random image of that many patches."""
        side = self.config.vision.patch_size
        height, width = (side * each for each in grid)
        pixels = self._random.integers(0, 256, (height, width, 3), np.uint8)
        messages = [
            {"role": "user", "content": [{"type": "image", "image": pixels}, {"type": "text", "text": "Read."}]}
        ]
        limits = InputLimits(max_pixels=max(height * width, side * side * 4))
        return self.preparation.prepare(messages, limits=limits)

    def first_token(self, prepared: Prepared, cache: Any) -> int:
        """Run vision tower and prompt; return the id of the first token."""
        embeds = self.session.vision(self.preparation.vision_inputs(prepared.images[0]))
        inputs = prepared.decoder_inputs(embeds)
        length = inputs.input_ids.shape[1]
        for start in range(0, length, CHUNK):
            logits = self.session.prefill(inputs.chunk(start, min(start + CHUNK, length)), cache)
        return int(logits[0, -1].argmax())


def measure(
    engine: Engine, values: Any, memory: Callable[[str, Any], None], sizes: Sizes, *, decode_only: bool
) -> None:
    """Time everything and put it into `values`, the most important first.

    Args:
        engine: What is timed.
        values: Gets the times.
        memory: Told when the first step is done, with its cache.
        sizes: What is measured.
        decode_only: Leave out vision and prompts.
    """
    cache = engine.session.new_cache(sizes.past + CHUNK)
    engine.fill(cache, sizes.past)
    values["finite"] = engine.decode(cache, sizes.past)
    memory("step", cache)
    values["decode_kernels"] = engine.decode_kernels
    decode: dict[str, Any] = {}
    for batch in sizes.batches:
        if batch > 1:
            del cache
            cache = engine.session.new_cache(sizes.past + CHUNK, batch)
            engine.fill(cache, sizes.past)
        step = repeated(lambda cache=cache: engine.decode(cache, sizes.past), warmup=8, repeats=sizes.repeats)
        decode[str(batch)] = step
        values["decode"] = decode
    del cache
    if not decode_only:
        _prompts(engine, values, sizes)
    if sizes.long_past:
        cache = engine.session.new_cache(sizes.long_past + CHUNK)
        engine.fill(cache, sizes.long_past)
        values["decode_long"] = repeated(lambda: engine.decode(cache, sizes.long_past), warmup=8, repeats=sizes.repeats)


def _prompts(engine: Engine, values: Any, sizes: Sizes) -> None:
    prepared = {grid: engine.prepared(grid) for grid in sizes.grids}
    last = prepared[sizes.grids[-1]]
    cache = engine.session.new_cache(max(*sizes.prefills, len(last.prompt.input_ids)) + CHUNK)
    values["first_token"] = repeated(lambda: engine.first_token(last, cache), warmup=3, repeats=sizes.few)
    values["first_token_prompt_tokens"] = len(last.prompt.input_ids)
    prefill: dict[str, Any] = {}
    for length in sizes.prefills:
        prefill[str(length)] = repeated(lambda n=length: engine.prefill(cache, n), warmup=2, repeats=sizes.few)
        values["prefill"] = prefill
    vision: dict[str, Any] = {}
    for grid, each in prepared.items():
        inputs = engine.preparation.vision_inputs(each.images[0])
        timed = repeated(lambda inputs=inputs: engine.session.vision(inputs), warmup=2, repeats=sizes.few)
        vision[str(grid[0] * grid[1])] = timed
        values["vision"] = vision


def weights_problem(memory: dict[str, int]) -> str:
    """Return what is wrong if the device holds more than the weights once, empty if it does not."""
    taken = memory["taken_at_step_bytes"] - memory["cache_bytes"]
    limit = int(_SLACK * memory["weight_bytes"]) + _SLACK_BYTES
    if taken <= limit:
        return ""
    return (
        f"{taken / 1e9:.2f} GB of device memory beside the cache for {memory['weight_bytes'] / 1e9:.2f} GB of weights: "
        f"expected them once, at most {limit / 1e9:.2f} GB"
    )


def step_bytes(folder: Path, config: ModelConfig, batch: int, past: int) -> int | None:
    """Return the bytes that a decode step has to read: weights of the decoder, and the cache; None with experts.

    The table of an untied head is not read but for a row of each sequence.
    """
    if config.text.experts is not None:
        return None  # which experts are read depends on the tokens
    tensors = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))["decoder.onnx.data"]["tensors"]
    is_read = [config.text.tie_word_embeddings or ".embed_tokens." not in each["name"] for each in tensors]
    weights = sum(each["num_bytes"] for each, read in zip(tensors, is_read, strict=True) if read)
    text = config.text
    return weights + batch * past * 2 * text.num_layers * text.num_kv_heads * text.head_dim * _CACHE_ITEM_BYTES


def main() -> int:
    """Run the section."""
    from runtime.cuda import CudaDevice

    options = parser()
    options.add_argument("--no-plan", action="store_true")
    args = options.parse_args()
    values, device = Values(args.values), CudaDevice("cuda")
    before = device.memory_info()[0]
    start = time.perf_counter()
    engine = Engine(args.folder, with_plan=not args.no_plan)
    values["open_s"] = round(time.perf_counter() - start, 2)
    memory = {
        "weight_bytes": engine.manifest.weight_bytes,
        "taken_at_open_bytes": before - device.memory_info()[0],
    }

    def note(_: str, cache: Any) -> None:
        memory["taken_at_step_bytes"] = before - device.memory_info()[0]
        memory["cache_bytes"] = cache.num_bytes
        values["memory"] = memory
        problem = weights_problem(memory)
        values["problems"] = [each for each in (problem, "" if args.no_plan else engine.plan_problem) if each]

    sizes = Sizes()
    if (args.folder / LAYOUT).is_file():  # of a pack's graphs, not of an engine with weights of its own
        each = {str(batch): step_bytes(args.folder, engine.config, batch, sizes.past) for batch in sizes.batches}
        values["step_bytes"] = each
    measure(engine, values, note, sizes, decode_only=args.no_plan)
    if not values["finite"]:
        values["problems"] = [*values["problems"], "logits that are not numbers"]
    print(json.dumps(values))
    for problem in values["problems"]:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if values["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
