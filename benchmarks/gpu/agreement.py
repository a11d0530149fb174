"""How far the logits of own kernels are from those of ONNX Runtime: `agreement ENGINE [--weights-twice]`.

The engine is opened with its decode plan, closed, and opened without. Both run the same prompts of random tokens and
the same step of 1 to 32 sequences. Values, by batch: `own`, the logits of own kernels against those of ONNX Runtime in
the same batch; `onnxruntime`, those of ONNX Runtime in a batch against those of each sequence in a step of its own,
which says how much rounding alone does. Each has `rms` and `max`, the root mean square and the largest of the
differences over the standard deviation of the logits, and `num_same_first` of so many sequences with the same largest
logit.

Own kernels that differ more than `_MOST_RMS`, or that do not run, are a problem.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.speed import Engine
from benchmarks.gpu.values import Values, parser
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds

BATCHES = (1, 2, 4, 8, 16, 32)
PAST = 512
# On an H200, 0.14 % in int4 and 0.52 % in float16; a weight, a scale or a row that is wrong gives tens of per cent.
_MOST_RMS = 0.05
_NUM_COMPARED = 3


def logits_of(engine: Any, batches: Sequence[int], past: int) -> dict[str, FloatArray]:
    """Return the logits of the same step by batch, [B, V], and in `alone` those of each sequence by itself."""
    most = max(batches)
    cache = engine.session.new_cache(past + 1, most)
    engine.fill(cache, past)
    inputs = step_inputs(engine, most, past)
    found = {}
    for batch in batches:
        rows = DecoderInputs.concatenate([inputs.row(b) for b in range(batch)])
        # While a batch is compared, ONNX Runtime's steps may be given; after three that differ, own kernels are off.
        for _ in range(_NUM_COMPARED):
            engine.session.decode(engine.text(batch, 1, past), cache)
        found[str(batch)] = np.asarray(engine.session.decode(rows, cache)[:, 0], np.float32)
    alone = [engine.session.decode(inputs.row(b), cache, b)[0, 0] for b in range(most)]
    return found | {"alone": np.asarray(alone, np.float32)}


def step_inputs(engine: Any, batch: int, past: int) -> DecoderInputs:
    """Return a step of so many sequences, each with a token of its own."""
    ids = 1 + np.arange(batch)[:, None] * 7 % (engine.config.text.vocab_size - 1)
    return DecoderInputs.text(ids, np.full(batch, past), no_visual_embeds(engine.config))


def difference(found: FloatArray, expected: FloatArray) -> dict[str, Any]:
    """Return how far logits are from others, [B, V]; None where one of them is not a number."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    apart = np.abs(a - b) / b.std()
    is_number = bool(np.isfinite(apart).all())
    return {
        "rms": float(np.sqrt((apart**2).mean())) if is_number else None,
        "max": float(apart.max()) if is_number else None,
        "num_same_first": int((a.argmax(1) == b.argmax(1)).sum()),
    }


def compare(
    open_engine: Callable[[bool], Any], values: Any, batches: Sequence[int] = BATCHES, past: int = PAST
) -> None:
    """Run both ways, one after the other, and put what is found into `values`.

    Args:
        open_engine: Opens the engine, told whether with its plan.
        values: Gets what is found.
        batches: Of steps.
        past: Cached tokens.
    """
    logits: list[dict[str, FloatArray]] = []
    values["problems"] = []
    for with_plan in (True, False):
        engine = open_engine(with_plan)
        logits.append(logits_of(engine, batches, past))
        kernels, problem = engine.decode_kernels, engine.plan_problem
        engine.close()
        del engine
        gc.collect()
        if with_plan:
            values["decode_kernels"] = kernels
            values["problems"] = [problem] if problem else []
    own, theirs = logits
    alone = theirs.pop("alone")
    own.pop("alone")
    values["own"] = {batch: difference(own[batch], theirs[batch]) for batch in own}
    values["onnxruntime"] = {batch: difference(each, alone[: len(each)]) for batch, each in theirs.items()}
    values["problems"] = [*values["problems"], *problems(values["own"])]


def problems(own: dict[str, Any]) -> list[str]:
    """Return the batches whose logits are too far from those of ONNX Runtime."""
    found = []
    for batch, apart in own.items():
        if apart["rms"] is None:
            found.append(f"a step of {batch} sequences has logits that are not numbers")
        elif apart["rms"] > _MOST_RMS:
            found.append(f"logits of a step of {batch} sequences are {apart['rms']:.1%} from those of ONNX Runtime")
    return found


def main() -> int:
    """Run the section."""
    options = parser()
    options.add_argument("--weights-twice", action="store_true")
    args = options.parse_args()

    def open_engine(with_plan: bool) -> Engine:
        return Engine(Path(args.folder), with_plan=with_plan, weights_twice=args.weights_twice and with_plan)

    compare(open_engine, Values(args.values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
