"""A shipped engine on the GPU against the CPU's float32 engine: `parity ENGINE REFERENCES`.

Values: `num_same` of `num_questions` greedy answers with the CPU's token ids, `different` (names of the others),
`min_cosine` and `max_difference` of the logits of the last positions, `decode_kernels`. An engine with a cosine
below the limit, or with a logit that is not a number, has a problem; other answers alone are no problem where the
engine's precision rounds weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.questions import NUM_POSITIONS, NUM_TOKENS, questions
from benchmarks.gpu.values import Values, parser
from qwen3_vl import Qwen3VLModel
from runtime.decode_plan import has_plan

# Cosines of logits with the CPU's float32, by precision: what the H200 gave, with room for other kernels
# (fp16 0.9999999, int4 of a mixture 0.9988).
LEAST_COSINE = {"fp16": 0.9999, "bf16": 0.999, "int4": 0.995, "fp8": 0.995}


def compare(model: Any, references: Path, checkpoint: str, values: Any) -> None:
    """Ask all questions of a checkpoint and put what is found into `values`."""
    expected_ids = json.loads((references / f"{checkpoint}.json").read_text(encoding="utf-8"))
    cosines, differences, different = [], [], []
    with np.load(references / f"{checkpoint}.npz") as expected:
        for name, messages in questions().items():
            logits = np.asarray(model.logits(messages)[-NUM_POSITIONS:], np.float64)
            wanted = expected[name].astype(np.float64)
            cosines.append(float((logits * wanted).sum() / np.linalg.norm(logits) / np.linalg.norm(wanted)))
            differences.append(float(np.abs(logits - wanted).max()))
            answer = model.generate(messages, max_new_tokens=NUM_TOKENS, do_sample=False)
            if [int(each) for each in answer.token_ids] != expected_ids[name]:
                different.append(name)
    values["num_questions"] = len(cosines)
    values["num_same"] = len(cosines) - len(different)
    values["different"] = different
    values["min_cosine"] = min(cosines) if np.isfinite(cosines).all() else None
    values["max_difference"] = max(differences) if np.isfinite(differences).all() else None


def problems(values: Any, precision: str) -> list[str]:
    """Return what is wrong with an engine, empty if nothing is."""
    least, cosine = LEAST_COSINE.get(precision, 0.999), values["min_cosine"]
    if cosine is None:
        return ["a logit is not a number"]
    found = [f"cosine of logits {cosine:.7f}, expected at least {least}"] if cosine < least else []
    if precision == "fp16" and values["different"]:
        found.append(f"other answers than the CPU's: {', '.join(values['different'])}")
    return found


def main() -> int:
    """Run the section."""
    options = parser()
    options.add_argument("references", type=Path)
    args = options.parse_args()
    values = Values(args.values)
    start = time.perf_counter()
    model = Qwen3VLModel.from_engine(args.folder)
    values["open_s"] = round(time.perf_counter() - start, 2)
    checkpoint = args.folder.name.partition("-ort-")[0]
    compare(model, args.references, checkpoint, values)
    values["decode_kernels"], plan_problem = model.session.decode_kernels, model.session.decode_plan_problem
    values["decode_recorded"] = model.session.decode_recorded
    found = problems(values, str(model.manifest.capabilities["precision"]))
    if plan_problem and has_plan(model.manifest):
        found.append(f"the decode plan does not run: {plan_problem}")
    values["problems"] = found
    return 0


if __name__ == "__main__":
    sys.exit(main())
