"""The whole comparison: ceilings, then each side: export, one process for the image, one for the speeds.

Processes run one after the other. A side that fails is reported with its message and leaves its columns empty.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measure
from benchmarks.compare import workloads
from benchmarks.compare.builds import build
from benchmarks.compare.driver import IMAGE_MODE, SPEED_MODE
from benchmarks.compare.sides import REFERENCE, ROOT, Side
from benchmarks.compare.workloads import Point
from qwen3vl_export.parity.metrics import kl_divergence

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Settings:
    """How long and how often.

    Attributes:
        threads: Threads of every side.
        budget_s: Seconds of timed calls at a point, after one call of warm-up.
        min_repeats: Least timed calls at a point, however long they take.
        max_repeats: Most timed calls at a point.
        keep_engines: Use our engines of an earlier comparison.
        max_minutes: No side is begun after that.
    """

    threads: int = 2
    budget_s: float = 3.0
    min_repeats: int = 3
    max_repeats: int = 9
    keep_engines: bool = False
    max_minutes: float = 600.0


def compare(
    checkpoint: Path, work: Path, sides: Sequence[Side], points: Sequence[Point], settings: Settings
) -> dict[str, Any]:
    """Measure all sides on one checkpoint and return the result."""
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * settings.max_minutes
    result: dict[str, Any] = {"environment": measure.environment(), "settings": asdict(settings), "missing": {}}
    result["failed"] = []
    result["config"] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    result["points"] = [asdict(point) for point in points]
    result["texts"] = encode_texts(checkpoint)
    with tempfile.TemporaryDirectory(dir=work) as name:
        scratch = Path(name)
        result["ceilings"] = measured_ceilings(settings.threads, scratch)
        result["sides"] = {}
        built: set[str] = set()
        for side in sides:
            reason = side.missing() or ("the time was over" if time.monotonic() > end else "")
            if reason:
                result["missing"][side.name] = reason
                continue
            print(f"== {side.name}", file=sys.stderr, flush=True)
            try:
                result["sides"][side.name] = _measure_side(side, checkpoint, work, scratch, result, settings, built)
            except subprocess.CalledProcessError as error:
                last = str(error.output).replace(f"{work}/", "").replace(f"{ROOT}/", "")
                result["missing"][side.name] = f"{error.cmd[2]} ended with exit code {error.returncode}: {last}"
                result["failed"].append(side.name)
            # Half an hour of measurements: an interruption leaves those of the sides before.
            _add_divergences(result["sides"], scratch)
            (work / "partial.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def encode_texts(checkpoint: Path) -> list[list[int]]:
    """Return the token ids of the text prompts, the same for all sides."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in workloads.texts()]


def _measure_side(
    side: Side,
    checkpoint: Path,
    work: Path,
    scratch: Path,
    result: dict[str, Any],
    settings: Settings,
    built: set[str],
) -> dict[str, Any]:
    keep = settings.keep_engines or not side.is_ours or side.target in built
    path, cost = build(side, checkpoint, work, keep=keep)
    if cost is not None and side.is_ours:
        cost["is_of_this_run"] |= side.target in built
        if cost["is_of_this_run"]:
            built.add(side.target)
    request = {
        "driver": side.driver,
        "path": str(path),
        "options": dict(side.options),
        "points": result["points"],
        "texts": result["texts"],
        "image": str(_image(scratch)),
        "prompt": prompt(checkpoint),
        "logits": str(scratch / f"{side.name}.npy"),
        **result["settings"],
    }
    measured = {mode: run_driver(side, request | {"mode": mode}, scratch) for mode in (IMAGE_MODE, SPEED_MODE)}
    # Both processes measure the load time; that of the second counts, since the files are then in the page cache.
    kind = {"target": side.target, "is_ours": side.is_ours, "options": dict(side.options)}
    return {**kind, "export": cost, **measured[IMAGE_MODE], **measured[SPEED_MODE]}


def prompt(checkpoint: Path) -> str:
    """Return a text of `workloads.PROMPT_TOKENS` tokens of the checkpoint's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    words = workloads.texts()[0].split()
    counts = [len(tokenizer.encode(" ".join(words[:end])).ids) for end in range(1, len(words) + 1)]
    fitting = [end for end, count in enumerate(counts, 1) if count <= workloads.PROMPT_TOKENS]
    return " ".join(words[: max(fitting)])


def _image(scratch: Path) -> Path:
    import numpy as np
    from PIL import Image

    path = scratch / "image.png"
    if not path.is_file():
        width, height = workloads.IMAGE_SIZE
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def run_driver(side: Side, request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Measure a side in a process of its environment, as a request says."""
    path = scratch / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    command = [str(side.python), "-m", "benchmarks.compare.driver", str(path)]
    # From the repository's root, where the environments of the peers find the package of the drivers.
    return measure.child_result(command, scratch / "result.json", ROOT)[0]


def measured_ceilings(threads: int, scratch: Path) -> dict[str, float]:
    """Measure what the machine can do at most, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compare.ceilings", str(threads)]
    return measure.child_result(command, scratch / "ceilings.json", ROOT)[0]


def divergence(reference_NV: np.ndarray[Any, Any], other_NV: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return mean and greatest KL(reference ‖ other) of the next-token distributions in nats, and top-1 agreement.

    Args:
        reference_NV: Logits of N positions over V tokens.
        other_NV: The same of another side.
    """
    assert reference_NV.shape == other_NV.shape
    # One position at a time: a child inherits the peak of memory of this process.
    rows = [(reference_NV[i : i + 1], other_NV[i : i + 1]) for i in range(len(reference_NV))]
    kl_N = [float(kl_divergence(other_1V, reference_1V)[0]) for reference_1V, other_1V in rows]
    is_same_N = [bool(reference_1V.argmax() == other_1V.argmax()) for reference_1V, other_1V in rows]
    top1 = sum(is_same_N) / len(rows)
    return {"mean_kl": sum(kl_N) / len(rows), "max_kl": max(kl_N), "top1": top1, "positions": len(rows)}


def _add_divergences(sides: dict[str, Any], scratch: Path) -> None:
    import numpy as np

    reference = scratch / f"{REFERENCE}.npy"
    if not reference.is_file():
        return
    reference_NV = np.load(reference, mmap_mode="r")
    for name, values in sides.items():
        path = scratch / f"{name}.npy"
        if name != REFERENCE and path.is_file() and "divergence" not in values:
            values["divergence"] = divergence(reference_NV, np.load(path, mmap_mode="r"))
