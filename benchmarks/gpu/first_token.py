"""Where the time to the first token goes: `first_token ENGINE`.

The prompt has one image of 1024² pixels, which lies resized in host memory. Values, in milliseconds: `session`, vision
tower and prompt straight on the session; `vision` and `prefill`, the parts of it; `model`, the whole of a request to
the model: chat template, tokens, the scheduler's chunks, and the first token chosen; and `prompt_tokens`. Nothing of an
earlier request is kept: neither rows of the cache nor embeddings.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.speed import Engine, Sizes
from benchmarks.gpu.values import Values, parser, repeated, summary
from qwen3_vl import Qwen3VLModel
from runtime.generation import chunk_limit, prefill

GRID = Sizes().grids[-1]


def measure(model: Any, engine: Engine, values: Any, grid: tuple[int, int] = GRID, *, repeats: int = 10) -> None:
    """Time the request and its parts, and put them into `values`.

    Args:
        model: An opened model that keeps nothing for later requests.
        engine: The calls of `benchmarks.gpu.speed` on its session.
        values: Gets the times.
        grid: Height and width of the image in patches.
        repeats: Timed calls of each.
    """
    prepared, session = engine.prepared(grid), engine.session
    values["prompt_tokens"] = len(prepared.prompt.input_ids)
    cache = session.new_cache(2 * len(prepared.prompt.input_ids))
    values["session"] = repeated(lambda: engine.first_token(prepared, cache), warmup=3, repeats=repeats)
    pixels = engine.preparation.vision_inputs(prepared.images[0])
    values["vision"] = repeated(lambda: session.vision(pixels), warmup=1, repeats=repeats)
    inputs, chunk = prepared.decoder_inputs(session.vision(pixels)), chunk_limit(engine.manifest.capabilities)
    values["prefill"] = repeated(lambda: prefill(session, cache, inputs, chunk=chunk), warmup=1, repeats=repeats)
    taken = []
    for _ in range(3 + repeats):
        answer = model.generate(prepared.messages, max_new_tokens=1, do_sample=False)
        taken.append(1e3 * answer.stats.ttft_s)
    values["model"] = summary(taken[3:])


def main() -> int:
    """Run the section."""
    args = parser().parse_args()
    model = Qwen3VLModel.from_engine(
        args.folder, kept_sequences=0, prefix_cache=False, vision_cache_bytes=0, tuned=False
    )
    measure(model, Engine(args.folder, opener=lambda *_: model.session), Values(args.values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
