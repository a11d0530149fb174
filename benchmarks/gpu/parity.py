"""A shipped engine on the GPU against the CPU's float32 engine: `parity ENGINE REFERENCES`.

An engine with a decode plan is opened with it, and when that is closed, once more without. A mixture of experts is
opened with `weights_twice`, since its own kernels run in no other way. Values, in `with_plan` and `without_plan`:
`num_same` of `num_questions` greedy answers with the CPU's token ids, `different` (names of the others),
`decode_kernels`, `decode_plan_problem`, `decode_recorded`, and of three kinds of logits, `prompt` (last positions),
`alone` and `together` (decode steps of one and of all questions, `benchmarks.gpu.answers`): `num_rows`, `min_cosine`,
`max_difference`. Those of the first stand beside them too, with the least cosine of all kinds.

An engine with a cosine below the limit of its precision (configs/tolerances.toml, [gpu_pack]), or with a logit that is
not a number, has a problem; other answers alone are no problem where the engine's precision rounds weights.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import configs
from benchmarks.gpu.answers import References, answer_ids, prompt_logits, step_logits
from benchmarks.gpu.values import Values, parser
from qwen3_vl import Qwen3VLModel
from runtime.contract import FloatArray
from runtime.decode_plan import has_plan
from runtime.errors import UsageError
from runtime.manifest import Manifest

WITH_PLAN, WITHOUT_PLAN = "with_plan", "without_plan"
KINDS = ("prompt", "alone", "together")


def compare(model: Any, expected: References) -> dict[str, Any]:
    """Ask an opened model all questions and return what was found."""
    answers = answer_ids(model)
    different = [name for name, ids in expected.ids.items() if answers[name] != ids]
    found: dict[str, Any] = {
        "num_questions": len(expected.ids),
        "num_same": len(expected.ids) - len(different),
        "different": different,
        "prompt": distance(prompt_logits(model), expected.prompts),
        "alone": distance(step_logits(model, expected.ids, together=False), expected.steps),
        "together": distance(step_logits(model, expected.ids, together=True), expected.steps),
    }
    for name in ("decode_kernels", "decode_plan_problem", "decode_recorded"):
        found[name] = getattr(model.session, name, None)
    return found


def distance(found: Mapping[str, FloatArray], expected: Mapping[str, FloatArray]) -> dict[str, Any]:
    """Return the least cosine of the logits of each question, and their largest difference; None if not numbers."""
    cosines, differences = [], []
    for name, wanted in expected.items():
        a, b = found[name].astype(np.float64), wanted.astype(np.float64)
        cosines.append(float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)))
        differences.append(float(np.abs(a - b).max()))
    is_number = bool(np.isfinite(cosines).all() and np.isfinite(differences).all())
    return {
        "num_rows": sum(len(each) for each in expected.values()),
        "min_cosine": min(cosines) if is_number else None,
        "max_difference": max(differences) if is_number else None,
    }


def least_cosine(precision: str) -> float:
    """Return the limit of a precision.

    Raises:
        UsageError: It has none.
    """
    limits = configs.load("tolerances")["gpu_pack"]
    if precision not in limits:
        raise UsageError(
            f"configs/tolerances.toml has no cosine of {precision} in [gpu_pack]", remedy="add it, with its reason"
        )
    return float(limits[precision])


def problems(found: Mapping[str, Any], precision: str, *, needs_plan: bool) -> list[str]:
    """Return what is wrong with an engine, empty if nothing is.

    Args:
        found: What `compare` returns.
        precision: The engine's.
        needs_plan: Its own kernels were to decode.
    """
    wrong, least = [], least_cosine(precision)
    for kind in KINDS:
        cosine = found[kind]["min_cosine"]
        if cosine is None:
            wrong.append(f"a logit of {kind} is not a number")
        elif cosine < least:
            wrong.append(f"cosine of logits ({kind}) {cosine:.7f}, expected at least {least}")
    if precision == "fp16" and found["different"]:
        wrong.append(f"other answers than the CPU's: {', '.join(found['different'])}")
    if needs_plan and found["decode_plan_problem"]:
        wrong.append(f"the decode plan does not run: {found['decode_plan_problem']}")
    return wrong


def check(
    folder: Path, expected: References, values: Any, *, opener: Callable[..., Any] = Qwen3VLModel.from_engine
) -> None:
    """Compare an engine with its decode plan, if it has one, and without; no two are open at once."""
    manifest = Manifest.read(folder)
    wrong: list[str] = []
    for way, options in ways_of(manifest).items():
        start = time.perf_counter()
        model = opener(folder, **options)
        open_s = round(time.perf_counter() - start, 2)
        found = compare(model, expected)
        model.close(drain=False)
        del model
        gc.collect()  # the memory of the GPU has to be free before the next is opened
        values[way] = found | {"open_s": open_s}
        if "num_same" not in values:
            _show(found, values)
        new = problems(found, str(manifest.capabilities["precision"]), needs_plan=way == WITH_PLAN)
        wrong += [f"{each}, {way.replace('_', ' ')}" for each in new]
    values["problems"] = wrong


def ways_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return how an engine is opened: options by the name of the way."""
    if not has_plan(manifest):
        return {WITHOUT_PLAN: {}}
    twice = {"weights_twice": True} if manifest.model.text.experts is not None else {}
    return {WITH_PLAN: twice, WITHOUT_PLAN: {"decode_plan": False}}


def _show(found: Mapping[str, Any], values: Any) -> None:
    cosines = [found[kind]["min_cosine"] for kind in KINDS]
    for name in ("num_questions", "num_same", "different", "decode_kernels"):
        values[name] = found[name]
    values["min_cosine"] = None if None in cosines else min(cosines)


def main() -> int:
    """Run the section."""
    options = parser()
    options.add_argument("references", type=Path)
    args = options.parse_args()
    values = Values(args.values)
    check(args.folder, References.read(args.references, args.folder.name.partition("-ort-")[0]), values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
