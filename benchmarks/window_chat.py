"""A long chat about one picture after the other, in a process of its own.

Arguments: ENGINE TOKENS WINDOW SINKS FORM SIDE OUTPUT.json. WINDOW 0 is an exact cache of 4096 rows, which ends the
chat. FORM says what the sinks do: `moved` is the runtime's, `stay` leaves them at their first positions. SIDE is the
least side of a picture in pixels.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

SEED = 20261127
_NEVER = 1 << 30


def main() -> None:
    """Chat until the prompt has so many tokens; write what each turn took and gave, and what the process holds."""
    import numpy as np

    import runtime.scheduling.sliding
    from qwen3vl_export.demo.data import draw_side, example_of, load_half, make_canvas
    from qwen3vl_export.demo.tasks import MAX_NEW_TOKENS, TASKS
    from runtime.engine_options import EngineOptions
    from runtime.errors import CapacityError
    from runtime.manifest import Manifest
    from runtime.model import Qwen3VLModel

    engine, output = Path(sys.argv[1]), Path(sys.argv[-1])
    tokens, window, sinks = (int(each) for each in sys.argv[2:5])
    form, least_side = sys.argv[5], int(sys.argv[6])
    options: dict[str, Any] = {"window": window, "sink_tokens": sinks} if window else {"max_context": 4096}
    manifest = Manifest.read(engine)
    opening = EngineOptions.checked(manifest, max_sequences=1, kept_sequences=0, vision_cache_bytes=0, **options)
    if form == "stay":  # then no keys are moved back either
        text = dataclasses.replace(manifest.model.text, max_positions=_NEVER)
        manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, text=text))
    model = Qwen3VLModel.from_manifest(engine, manifest, opening)
    turns: list[dict[str, Any]] = []
    digits = load_half("held_out")
    moved_keys = runtime.scheduling.sliding.moved_keys if form == "moved" else lambda keys, *_: keys
    with mock.patch.object(runtime.scheduling.sliding, "moved_keys", moved_keys):
        chat = model.chat()
        while not turns or turns[-1]["prompt_tokens"] < tokens:
            index = len(turns)
            rng = np.random.default_rng([SEED, index])
            width, height = (max(least_side, draw_side(rng)) for _ in range(2))
            canvas = example_of(index, make_canvas(rng, digits, width, height))
            task = TASKS[index % len(TASKS)]
            question, expected = canvas.tasks[task]
            start = time.process_time()
            try:
                answer = chat.ask(question, images=[canvas.image], max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            except CapacityError:
                break  # of an exact cache
            stats, held = answer.stats, model.statistics()
            turns.append(
                {
                    "task": task,
                    "right": answer.text == expected,
                    "prompt_tokens": stats.prompt_tokens,
                    "new_tokens": stats.prompt_tokens - stats.cached_tokens,
                    "cache_rows": held["cache_rows"],
                    "cpu_s": time.process_time() - start,
                    "preprocess_s": stats.preprocess_s,
                    "anonymous_bytes": _anonymous_bytes(),
                }
            )
    result = {"cache_bytes": model.session.new_cache(1).num_bytes * model.limits.max_context, "turns": turns}
    output.write_text(json.dumps(result), encoding="utf-8")


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the kernel does not say how much anonymous memory a process has")


if __name__ == "__main__":
    main()
