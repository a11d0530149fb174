"""Memory of a process that fills an engine: ENGINE CONTEXT SEQUENCES IMAGES WIDTHxHEIGHT THREADS OUTPUT.json."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from pathlib import Path

_NEW_TOKENS = 4


class Peak(threading.Thread):
    """Watches the anonymous memory of this process, whose peak the system does not keep."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        """Read it every 2 ms, between calls of the library too, which lets other threads run."""
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._is_over.wait(0.002):
            _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
            self.num_bytes = max(self.num_bytes, (int(resident) - int(shared)) * page)

    def end(self) -> int:
        """Return the most that was seen."""
        self._is_over.set()
        self.join()
        return self.num_bytes


def main() -> None:
    """Ask as many questions at once as there are sequences, each of which fills its context; write the peaks."""
    from qwen3vl_export.bench.measure import messages
    from qwen3vl_export.bench.points import Point
    from runtime.model import Qwen3VLModel

    engine, context, sequences, images, size, threads, output = sys.argv[1:]
    width, height = map(int, size.split("x"))
    peak = Peak()
    peak.start()
    model = Qwen3VLModel.from_engine(
        engine,
        max_context=int(context),
        max_sequences=int(sequences),
        kept_sequences=0,
        vision_cache_bytes=0,
        threads=int(threads),
        tuned=False,
        max_pixels=max(1 << 16, width * height),  # pictures keep their size
    )

    def asked(text_tokens: int, seat: int) -> list[dict[str, object]]:
        pictures = int(images)
        return messages(Point(text_tokens, _NEW_TOKENS, 1, (width, height) if pictures else None, pictures), 0, seat)

    prepared = model.prepare(asked(1, 0))
    around, patches = len(prepared.prompt.input_ids) - 1, [math.prod(each.grid_thw) for each in prepared.images]
    del prepared
    prompts = [asked(int(context) - _NEW_TOKENS - around, seat) for seat in range(int(sequences))]
    answers = model.generate_batch(prompts, max_new_tokens=_NEW_TOKENS, do_sample=False)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    found = {
        "anonymous_bytes": peak.end(),
        "resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "patches": patches,
        "prompt_tokens": [each.stats.prompt_tokens for each in answers],  # type: ignore[union-attr]
    }
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
