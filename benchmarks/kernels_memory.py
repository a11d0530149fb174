"""Memory of an engine after an image and some tokens, in a process of its own: ENGINE PATCHES OUTPUT.json."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def main() -> None:
    """Answer one question about a picture of so many patches; write what the process then holds, less its KV cache."""
    import numpy as np
    from PIL import Image

    from runtime.memory import cache_bytes
    from runtime.model import Qwen3VLModel

    engine, patches, output = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    model = Qwen3VLModel.from_engine(engine, max_context=2048, tuned=False)
    side = model.manifest.model.vision.patch_size * 2 * round(math.sqrt(patches) / 2)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    answer = model.generate([{"role": "user", "content": content}], max_new_tokens=8, do_sample=False)
    kinds = {"Rss": 0, "Anonymous": 0}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in kinds:
            kinds[name] = int(rest.split()[0]) * 1024
    num_rows = answer.stats.prompt_tokens + len(answer.token_ids)
    cache = cache_bytes(model.config, model.manifest.capabilities, num_rows)
    found = {
        "cache_bytes": cache,
        "anonymous_bytes": kinds["Anonymous"] - cache,
        "resident_bytes": kinds["Rss"] - cache,
    }
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
