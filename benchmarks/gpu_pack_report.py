"""Tables of a result of `gpu_pack.py run` (`benchmarks/gpu/measure.py` says what the file holds)."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.result_files import markdown

Result = Mapping[str, Any]
_MISSING = "not measured"
_NUM_KERNELS = 8
_GOALS = Path(__file__).with_name("gpu_pack_goals.toml")


def table(result: Result) -> str:
    """Return all tables: goals, engines, parity, own kernels, all kernels, options; and what did not pass."""
    gpu = values(result, "machine").get("gpu", {})
    copies = values(result, "machine").get("copy_bytes_per_s")
    head = f"{gpu.get('name', 'GPU unknown')}, SM {gpu.get('sm', '?')}, CUDA {gpu.get('driver', '?')}"
    head += f", copies on the device {copies / 1e12:.2f} TB/s" if copies else ""
    parts = [head + f", {result['date']}.", goals_table(result), engines_table(result), parity_table(result)]
    parts += [steps_table(result), plan_kernels_table(result), kernels_table(result), options_table(result)]
    parts.append(troubles(result))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def values(result: Result, section: str) -> Mapping[str, Any]:
    """Return what a section found, even if it failed later; empty if it did not run."""
    found: Mapping[str, Any] = result["sections"].get(section, {}).get("values", {})
    return found


def decode_ms(result: Result, engine: str, batch: int, section: str = "speed") -> float | None:
    """Return the median of a decode step after 512 tokens, of a section such as speed or torch."""
    step = values(result, f"{section} {engine}").get("decode", {}).get(str(batch))
    return None if step is None else float(step["median_ms"])


def share_of_copies(result: Result, engine: str, batch: int, section: str = "speed") -> float | None:
    """Return the bytes that a step reads in its time, in percent of what copies on the device read and write."""
    step = decode_ms(result, engine, batch, section)
    num_bytes = values(result, f"speed {engine}").get("step_bytes", {}).get(str(batch))
    copies = values(result, "machine").get("copy_bytes_per_s")
    if step is None or num_bytes is None or not copies:
        return None
    return 100 * float(num_bytes) / (1e-3 * step) / float(copies)


def first_token_ms(result: Result, engine: str, batch: int, section: str = "speed") -> float | None:
    """Return the median from resized pixels of 1024² to the first token."""
    taken = values(result, f"{section} {engine}").get("first_token")
    return None if taken is None else float(taken["median_ms"])


def weights_on_device(result: Result, engine: str, batch: int, section: str = "speed") -> float | None:
    """Return the device memory after the first step, without the cache, over the bytes of the weights."""
    memory = values(result, f"{section} {engine}").get("memory")
    if memory is None:
        return None
    return float(memory["taken_at_step_bytes"] - memory["cache_bytes"]) / float(memory["weight_bytes"])


FIGURES = {
    "decode_ms": (decode_ms, "decode, batch {}", " ms"),
    "share_of_copies": (share_of_copies, "decode, batch {}: bytes read over copies on the device", " %"),
    "first_token_ms": (first_token_ms, "image of 1024² to first token", " ms"),
    "weights_on_device": (weights_on_device, "device memory over bytes of weights", " ×"),
}


def goals_table(result: Result) -> str:
    """Return what was asked beside what was reached, and beside ONNX Runtime's own step and PyTorch's."""
    rows = [("engine", "figure", "asked", "reached", "met", "without decode plan", "plain PyTorch")]
    for goal in tomllib.loads(_GOALS.read_text(encoding="utf-8"))["goals"]:
        figure, what, unit = FIGURES[goal["figure"]]
        engine, batch = f"{goal['model']}-{goal['target']}", goal.get("batch", 1)
        reached = figure(result, engine, batch, goal.get("section", "speed"))
        limit, sign = (goal["at_most"], "≤") if "at_most" in goal else (goal["at_least"], "≥")
        is_met = reached is not None and (reached <= limit if sign == "≤" else reached >= limit)
        others = [_figure(figure(result, engine, batch, section), unit) for section in ("speed-without-plan", "torch")]
        verdict = "" if reached is None else "yes" if is_met else "**no**"
        rows.append(
            (
                engine,
                what.format(batch),
                f"{sign} {limit:g}{unit}",
                _figure(reached, unit) or _MISSING,
                verdict,
                *others,
            )
        )
    return markdown(rows)


def engines_table(result: Result) -> str:
    """Return the milliseconds of every large engine: steps, prompts, images."""
    names = [name for name in result["sections"] if name.startswith(("speed ", "speed-weights-twice "))]
    if not any(values(result, name) for name in names):
        return ""
    found = [values(result, name) for name in names]
    rows: list[list[str]] = [["ms", *(_engine(name) for name in names)]]
    rows.append(["decode kernels", *(str(each.get("decode_kernels", "")) for each in found)])
    labels = {"decode": "decode after 512, batch {}", "prefill": "prefill of {}", "vision": "vision, {} patches"}
    for kind, label in labels.items():
        keys = sorted({key for each in found for key in each.get(kind, {})}, key=int)
        rows += [[label.format(key), *(_median(each.get(kind, {}).get(key)) for each in found)] for key in keys]
    rows.append(["decode after 3500, batch 1", *(_median(each.get("decode_long")) for each in found)])
    rows.append(["image of 1024² to first token", *(_median(each.get("first_token")) for each in found)])
    parts = [values(result, f"first-token {name.partition(' ')[2]}") for name in names]
    if any(parts):
        asked = {"vision": "… its vision tower", "prefill": "… its prompt", "model": "… as a request to the model"}
        rows += [[label, *(_median(each.get(key)) for each in parts)] for key, label in asked.items()]
    return markdown(rows)


def parity_table(result: Result) -> str:
    """Return how shipped engines answer on the GPU, against the CPU's float32."""
    head = ("engine", "answers as on the CPU", "least cosine of logits: prompts", "steps alone", "steps together")
    rows = [(*head, "decode kernels")]
    for name, section in result["sections"].items():
        found = section.get("values", {})
        if not name.startswith("parity ") or "num_questions" not in found:
            continue
        ways = {way: found[way] for way in ("with_plan", "without_plan") if way in found}
        # An older result has one way, and prompts alone.
        for each in ways.values() or [found | {"prompt": found}]:
            cosines = [_cosine(each[kind]) if kind in each else "" for kind in ("prompt", "alone", "together")]
            same = f"{each['num_same']} of {each['num_questions']}"
            rows.append((name.removeprefix("parity "), same, *cosines, str(each.get("decode_kernels", ""))))
    return markdown(rows) if len(rows) > 1 else ""


def steps_table(result: Result) -> str:
    """Return what own kernels do by batch: the recorded step alone, its bits, and how far its logits are."""
    head = ("engine, own kernels", "batch", "step alone, ms", "batch-invariant, ms", "repetitions with other bits")
    rows = [(*head, "sequences with other bits than alone", "logits from ONNX Runtime's", "its own from alone")]
    for name in result["sections"]:
        found = values(result, name)
        if not name.startswith("step ") or "step" not in found:
            continue
        engine = _engine(name)
        apart = values(result, f"agreement {engine}")
        for batch in found["step"]:
            others = found.get("other_bits", {}).get(batch)
            rows.append(
                (
                    engine,
                    batch,
                    _median(found["step"][batch]),
                    _median(found.get("invariant_step", {}).get(batch)),
                    "" if others is None else f"{others} of {found['num_repeats']}",
                    str(found.get("not_invariant", {}).get(batch, "")),
                    *(_apart(apart.get(side, {}).get(batch)) for side in ("own", "onnxruntime")),
                )
            )
    return markdown(rows) if len(rows) > 1 else ""


def plan_kernels_table(result: Result) -> str:
    """Return what each kernel of a decode plan takes, timed by itself over all layers."""
    rows = [("engine, own kernel", "weight of the first", "batch", "blocks", "launches", "µs each", "weights, TB/s")]
    for name in result["sections"]:
        for batch, kernels in values(result, name).get("kernels", {}).items() if name.startswith("step ") else ():
            for each in kernels[:_NUM_KERNELS]:
                rate = f"{each['weight_bytes'] / each['us'] / 1e6:.2f}" if each["weight_bytes"] and each["us"] else ""
                kernel = f"{_engine(name)} `{each['name']}`"
                blocks = " × ".join(str(size) for size in each["grid"] if size > 1) or "1"
                weight = each["weight"].removeprefix("model.language_model.")
                rows.append((kernel, weight, batch, blocks, str(each["num_launches"]), f"{each['us']:g}", rate))
    return markdown(rows) if len(rows) > 1 else ""


def options_table(result: Result) -> str:
    """Return what options of ONNX Runtime's CUDA provider take, over the runtime's own."""
    parts = []
    for name in result["sections"]:
        found = values(result, name)
        if not name.startswith("options ") or "ratios" not in found:
            continue
        figures = list(next(iter(found["ratios"].values())))
        rows: list[list[str]] = [[f"{_engine(name)}: time over the runtime's options", *figures]]
        rows += [[variant, *(f"{taken[each]:.3f}" for each in figures)] for variant, taken in found["ratios"].items()]
        rows += [[variant, why, *([""] * (len(figures) - 1))] for variant, why in found["refused"].items()]
        parts.append(markdown(rows))
    return "\n".join(parts)


def kernels_table(result: Result) -> str:
    """Return what takes longest in a decode step of each engine."""
    rows = [("engine, decode step", "µs", "launches")]
    for name, section in result["sections"].items():
        found = section.get("values", {}).get("decode")
        if name.startswith("kernels ") and found:
            rows.append(
                (f"**{name.removeprefix('kernels ')}**", f"{found['total_us']:g}", f"{found['num_launches']:g}")
            )
            for each in found["largest"][:_NUM_KERNELS]:
                rows.append((f"`{each['name']}`".replace("|", "\\|"), f"{each['us']:g}", f"{each['num_launches']:g}"))
    return markdown(rows) if len(rows) > 1 else ""


def troubles(result: Result) -> str:
    """Return which sections did not pass, and why."""
    lines = [
        f"- {name}: {section['state']}: {section['why']}"
        for name, section in result["sections"].items()
        if section["state"] != "passed"
    ]
    return "\n".join(["Sections that did not pass:", "", *lines]) if lines else "All sections passed."


def _engine(section: str) -> str:
    """Return the engine's name, with the way that it was opened if that was not as it comes."""
    kind, _, name = section.partition(" ")
    return name + (" `weights_twice`" if kind == "speed-weights-twice" else "")


def _cosine(found: Mapping[str, Any]) -> str:
    return "not a number" if found["min_cosine"] is None else f"{found['min_cosine']:.7f}"


def _apart(found: Mapping[str, Any] | None) -> str:
    """Return a root mean square in percent of a standard deviation of logits."""
    if found is None:
        return ""
    return "not a number" if found["rms"] is None else f"{100 * found['rms']:.2f} %"


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g}{unit}"


def _median(step: Mapping[str, float] | None) -> str:
    return "" if step is None else f"{step['median_ms']:.3g}"
