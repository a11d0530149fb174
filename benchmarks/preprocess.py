"""`python -m benchmarks preprocess`: from a JPEG file to patches on one core, beside transformers' fast processor."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import measure, options
from benchmarks.measure import seconds, summarise
from benchmarks.result_files import RESULTS, markdown, write
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image

# As published with Qwen3-VL.
SETTINGS: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Width, height and the most pixels that are kept.
CASES = ((640, 480, None), (1024, 768, None), (1920, 1080, None), (4032, 3024, None), (4032, 3024, 1_003_520))


def preprocess(
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each after one of warm-up.")] = 9,
    judge: Annotated[bool, typer.Option(help="Also measure transformers' fast processor, and compare.")] = True,
    results: options.Results = RESULTS,
) -> None:
    """Measure images from a file to patches: open, decode, turn, resize, normalise, cut and hash.

    Run it under `taskset -c 0` for one core.
    """
    environment = measure.environment()
    with tempfile.TemporaryDirectory() as folder:
        cases = [measured(*case, Path(folder), repeats, judge) for case in CASES]
    result = {"cases": cases, "environment": environment}
    write("preprocess", result, table(result), results)


def photograph(width: int, height: int) -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], with slopes, edges and grain."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    slopes = np.stack([np.sin(x / 50 + y / 90), np.cos(x / 33), np.sin(y / 41 + x / 200)], axis=-1)
    blocks = random.normal(0, 25, (height // 4 + 1, width // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)[:height, :width]
    grain = random.normal(0, 4, (height, width, 3))
    return np.clip(127 + 80 * slopes + blocks + grain, 0, 255).astype(np.uint8)


def measured(
    width: int, height: int, max_pixels: int | None, folder: Path, repeats: int, judge: bool
) -> dict[str, Any]:
    """Return the times of one size; calls of both take turns, so that both meet the same load."""
    from PIL import Image

    path = folder / f"{width}.jpg"
    Image.fromarray(photograph(width, height)).save(path, quality=90)
    settings = dict(SETTINGS)
    if max_pixels is not None:
        settings["size"] = {**SETTINGS["size"], "longest_edge": max_pixels}
    config = ImageProcessorConfig.from_dict(settings)
    calls = {"ours": lambda: process_image(path, config).pixel_values}
    if judge:
        calls["transformers"] = _judge(path, settings)
    values = {name: call() for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    times = {name: summarise(each) for name, each in taken.items()}
    case = {"width": width, "height": height, "max_pixels": max_pixels, "num_patches": len(values["ours"]), **times}
    if judge:
        case["is_equal"] = bool(np.array_equal(values["ours"], values["transformers"]))
    return case


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each size."""
    rows = [("JPEG file", "most pixels kept", "patches", "ours, ms", "transformers, ms", "ratio", "equal to the bit")]
    for case in result["cases"]:
        ours, theirs = case["ours"]["median_s"], case.get("transformers", {}).get("median_s")
        rows.append(
            (
                f"{case['width']} x {case['height']}",
                str(case["max_pixels"] or "checkpoint's"),
                str(case["num_patches"]),
                f"{ours * 1e3:.1f}",
                "" if theirs is None else f"{theirs * 1e3:.1f}",
                "" if theirs is None else f"{ours / theirs:.2f}",
                {True: "yes", False: "no"}.get(case.get("is_equal"), ""),
            )
        )
    return (
        "From a JPEG file to patches: open, decode, turn, resize, normalise, cut and hash. Medians of "
        f"{len(result['cases'][0]['ours']['all_s'])} calls; transformers' processor with torchvision, one thread of "
        f"torch, in turns with ours.\n\n{markdown(rows)}"
    )


def _judge(path: Path, settings: Mapping[str, Any]) -> Any:
    import torch
    from transformers import Qwen2VLImageProcessorFast

    torch.set_num_threads(1)
    processor = Qwen2VLImageProcessorFast(**settings)
    return lambda: processor(images=str(path), return_tensors="pt")["pixel_values"].numpy()
