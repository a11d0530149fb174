"""Time one engine through the runtime's own session: `speed ENGINE [--no-plan | --weights-twice]`.

Values: `decode_kernels` (own or onnxruntime), `memory` {weight_bytes, taken_at_open_bytes, taken_at_step_bytes,
cache_bytes, kept_at_close_bytes}, `decode` by batch after 512 cached tokens, `decode_long` after 3500, `prefill` by
tokens, `vision` by patches, `first_token`: an image of 1024² pixels, from resized pixels in host memory to the id of
the first token. Times are milliseconds of whole calls on the host, inputs and answers included
(`benchmarks.gpu.values.summary`).

`--no-plan` opens the engine without its decode plan and times decode steps alone; `--weights-twice` lets own kernels
run where ONNX Runtime keeps a copy of the weights, as it does of experts.

Weights are asserted to be on the device once where own kernels share them with ONNX Runtime; without a plan it packs a
copy of some, which is its own doing and only reported. Device memory is that of the whole GPU: what is not given back
when the engine is closed was not the engine's, so sections that measure it run alone.
"""

from __future__ import annotations

import gc
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
from runtime.generation import chunk_limit, prefill
from runtime.input_limits import InputLimits
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig
from runtime.preparation import Preparation, Prepared
from runtime.session import SessionOptions, open_session

CHUNK = 512
OWN = "own"
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
        repeats: Timed steps; a fifth of it for the longer calls.
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

    def __init__(
        self,
        folder: Path,
        *,
        with_plan: bool = True,
        weights_twice: bool = False,
        opener: Callable[..., Any] = open_session,
    ) -> None:
        self.manifest = Manifest.read(folder)
        self.config = self.manifest.model
        self.preparation = Preparation.from_folder(folder, self.config).for_engine(self.manifest.capabilities)
        options = SessionOptions(decode_plan=with_plan, weights_twice=weights_twice)
        self.session = opener(folder, self.manifest, options)
        self._chunk = chunk_limit(self.manifest.capabilities)
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
        """Run one prompt in chunks of the engine's size."""
        prefill(self.session, cache, self.text(1, length, 0), chunk=self._chunk)

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
        logits = prefill(self.session, cache, prepared.decoder_inputs(embeds), chunk=self._chunk)
        return int(logits[-1].argmax())

    def close(self) -> None:
        """Give back the memory of the device, but for that of caches."""
        self.session.close()


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
        values["decode_kernels"] = engine.decode_kernels  # a plan may be given up at any batch size
    del cache
    if not decode_only:
        _prompts(engine, values, sizes)
    if sizes.long_past:
        cache = engine.session.new_cache(sizes.long_past + CHUNK)
        engine.fill(cache, sizes.long_past)
        values["decode_long"] = repeated(lambda: engine.decode(cache, sizes.long_past), warmup=8, repeats=sizes.repeats)


def problems(engine: Engine, values: Any, *, needs_plan: bool) -> list[str]:
    """Return those that are known already, and what the calls since have shown."""
    found = [*values["problems"], engine.plan_problem if needs_plan else ""]
    if not values["finite"]:
        found.append("logits that are not numbers")
    return [each for each in dict.fromkeys(found) if each]


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
    """Return what is wrong if the device holds more than the weights once, empty if it does not.

    Args:
        memory: What `main` has measured; without `kept_at_close_bytes`, all that was taken counts as the engine's.
    """
    kept = memory.get("kept_at_close_bytes", 0)
    taken = memory["taken_at_step_bytes"] - memory["cache_bytes"]
    limit = int(_SLACK * memory["weight_bytes"]) + _SLACK_BYTES
    if taken <= limit:
        return ""
    if taken - kept <= limit:
        return (
            f"{kept / 1e9:.2f} GB of device memory were still taken when the engine was closed, so not by it: end "
            "other programs on the GPU and measure again"
        )
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
    ways = options.add_mutually_exclusive_group()
    ways.add_argument("--no-plan", action="store_true")
    ways.add_argument("--weights-twice", action="store_true")
    args = options.parse_args()
    values, device = Values(args.values), CudaDevice("cuda")
    found = run(
        args.folder,
        values,
        lambda: device.memory_info()[0],
        lambda: Engine(args.folder, with_plan=not args.no_plan, weights_twice=args.weights_twice),
        with_plan=not args.no_plan,
        weights_twice=args.weights_twice,
    )
    print(json.dumps(values))
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


def run(
    folder: Path,
    values: Any,
    free_bytes: Callable[[], int],
    open_engine: Callable[[], Engine],
    *,
    with_plan: bool = True,
    weights_twice: bool = False,
    sizes: Sizes | None = None,
) -> list[str]:
    """Open an engine, time it, close it, and put everything into `values`; return the problems.

    Args:
        folder: The engine.
        values: Gets what is measured.
        free_bytes: Returns the free memory of the device.
        open_engine: Opens the engine.
        with_plan: The decode plan is to run.
        weights_twice: A second copy of the weights is allowed.
        sizes: What is measured.
    """
    sizes = sizes or Sizes()
    before, start = free_bytes(), time.perf_counter()
    engine = open_engine()
    values["open_s"] = round(time.perf_counter() - start, 2)
    # Without weights_twice a mixture of experts decodes in ONNX Runtime, which packs them.
    needs_plan = with_plan and (weights_twice or engine.config.text.experts is None)
    memory = {"weight_bytes": engine.manifest.weight_bytes, "taken_at_open_bytes": before - free_bytes()}

    def note(_: str, cache: Any) -> None:
        memory["taken_at_step_bytes"] = before - free_bytes()
        memory["cache_bytes"] = cache.num_bytes
        values["memory"] = memory
        values["problems"] = [engine.plan_problem] if needs_plan and engine.plan_problem else []

    if (folder / LAYOUT).is_file():  # of a pack's graphs, not of an engine with weights of its own
        each = {str(batch): step_bytes(folder, engine.config, batch, sizes.past) for batch in sizes.batches}
        values["step_bytes"] = each
    measure(engine, values, note, sizes, decode_only=not with_plan)
    found = problems(engine, values, needs_plan=needs_plan)
    is_shared = engine.decode_kernels == OWN and not weights_twice
    engine.close()
    gc.collect()
    memory["kept_at_close_bytes"] = before - free_bytes()
    values["memory"] = memory
    if is_shared and (problem := weights_problem(memory)):
        found.append(problem)
    values["problems"] = found
    return found


if __name__ == "__main__":
    sys.exit(main())
