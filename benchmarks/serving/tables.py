"""Tables of a result of `python -m benchmarks serving`, each goal beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.result_files import markdown

Result = Mapping[str, Any]
_MIN_RATIO = 2.0
_MAX_STEP_MS, _MAX_TTFT_MS = 0.1, 1.0
_MAX_SCHEDULER_MS = 0.3
_MAX_LATENCY_RATIO = 2.0
_MAX_TTFT_SHARE = 0.15


def table(result: Result) -> str:
    """Return a section for each part that was measured."""
    intro = (
        f"{result['model']}, {result['target']}, {result['workload']['threads']} threads; the demo engine is "
        f"{result['demo_target']}.\n"
    )
    return "\n".join([intro, *(render(result[name]) for name, render in _SECTIONS.items() if name in result)])


def _verdict(is_met: bool) -> str:
    return "yes" if is_met else "**no**"


def _scaling(part: Result) -> str:
    alone = {each["past"]: each["median_s"] for each in part["steps"] if each["batch"] == 1}
    rows = [("rows in the cache", "sequences", "ms a step", "tokens/s", "tokens/s over those of one")]
    for each in sorted(part["steps"], key=lambda each: (each["past"], each["batch"])):
        median, batch = each["median_s"], each["batch"]
        ratio = f"{batch * alone[each['past']] / median:.2f}" if each["past"] in alone else "-"
        rows.append((str(each["past"]), str(batch), f"{1e3 * median:.1f}", f"{batch / median:.1f}", ratio))
    text = f"## Decode steps straight on the session\n\n{markdown(rows)}"
    if not part["profiles"]:
        return text
    kinds = ("attention", "products", "other")
    rows = [("rows in the cache", "sequences", *(f"{kind}, ms" for kind in kinds), "attention, share")]
    for each in part["profiles"]:
        values = [each["seconds"][kind] for kind in kinds]
        cells = (f"{1e3 * value:.1f}" for value in values)
        rows.append((str(each["past"]), str(each["batch"]), *cells, f"{100 * values[0] / sum(values):.0f} %"))
    return f"{text}\nTime of the nodes by ONNX Runtime's profile:\n\n{markdown(rows)}"


def _company(part: Result) -> str:
    names = {"tokens_per_s": "all, tokens/s", "decode_tokens_per_s": "decode steps, tokens/s"}
    rows = [("", "one at a time", f"{part['clients']} at once", "ratio", f"≥ {_MIN_RATIO:g}")]
    for name, label in names.items():
        ratio = part["ratios"][name]
        speeds = (f"{part['speeds'][side][name]:.1f}" for side in ("alone", "together"))
        rows.append((label, *speeds, f"{ratio:.2f}", _verdict(ratio >= _MIN_RATIO)))
    return f"## Requests at once\n\nMedian of {len(part['rounds']['alone'])} rounds, in turns.\n\n{markdown(rows)}"


def _alone(part: Result) -> str:
    figures: Mapping[str, tuple[str, float | None]] = {
        "step_ms": ("step, median", _MAX_STEP_MS),
        "step_outside_ms": ("of it outside of the session's call", _MAX_STEP_MS),
        "tpot_ms": ("time per later token, mean of an answer", None),
        "first_step_outside_ms": ("from the prompt's last call to the first step's", None),
        "ttft_ms": ("time to first token", _MAX_TTFT_MS),
        "ttft_outside_ms": ("of it outside of the session's calls", _MAX_TTFT_MS),
    }
    rows = [("engine", "ms", "direct calls", "through the model", "added", "asked", "met")]
    for engine in ("engine", "demo"):
        each = part[engine]
        for name, (label, limit) in figures.items():
            added = each["added"][name]
            goal = ("", "") if limit is None else (f"≤ {limit:g}", _verdict(added <= limit))
            cells = (f"{value:.3f}" for value in (each["direct"][name], each["model"][name], added))
            rows.append((engine, label, *cells, *goal))
    count = part["engine"]["answers"]
    return f"## One request alone\n\nMedians of {count} answers each way, in turns.\n\n{markdown(rows)}"


def _scheduler(part: Result) -> str:
    rows = [("figure", "asked", "reached", "met")]
    decisions = part["scheduler_ms"]
    rows.append(
        ("decisions", f"≤ {_MAX_SCHEDULER_MS:g} ms", f"{decisions:.3f} ms", _verdict(decisions <= _MAX_SCHEDULER_MS))
    )
    for name, label in (("outside_ms", "all between two calls of the session"), ("decode_ms", "the call itself")):
        rows.append((label, "", "-" if part[name] is None else f"{part[name]:.3f} ms", ""))
    return (
        f"## A step of {part['sequences']} sequences\n\nDemo engine; {part['full_steps']} steps with all of them. "
        "Between two calls lie the decisions, the choice of the tokens, their text, and the hand-over to the "
        f"clients' threads.\n\n{markdown(rows)}"
    )


def _fairness(part: Result) -> str:
    alone, beside = part["alone"], part["beside"]
    longest_chunk = max((each["ms"] for each in part["chunks"]), default=0.0)
    rows = [
        ("figure", "reached"),
        ("median gap between tokens of the others before", f"{part['gap_before_ms']:.0f} ms"),
        ("median gap while the prompt runs", f"{part['gap_during_ms']:.0f} ms"),
        ("longest gap", f"{part['longest_gap_ms']:.0f} ms"),
        ("max_delay_ms, which a chunk of 16 tokens or more is to take", f"{part['max_delay_ms']:.0f} ms"),
        ("longest chunk", f"{longest_chunk:.0f} ms, {max(each['tokens'] for each in part['chunks'])} tokens at most"),
        ("longest decode step", f"{part['longest_step_ms']:.0f} ms"),
        ("time to first token of the prompt, alone", f"{alone['ttft_s']:.2f} s, of it image {alone['vision_s']:.2f} s"),
        ("beside the others", f"{beside['ttft_s']:.2f} s, of it image {beside['vision_s']:.2f} s"),
        ("ratio", f"{beside['ttft_s'] / alone['ttft_s']:.2f}"),
    ]
    return (
        f"## A long prompt beside {part['streams']} streams\n\n{part['prompt_tokens']} tokens, "
        f"{part['visual_tokens']} of them visual, in {len(part['chunks'])} chunks.\n\n{markdown(rows)}"
    )


def _conversation(part: Result) -> str:
    rows = [("", "tokens of the prompt", "of them found in the cache", "images found", "vision, ms", "TTFT, ms")]
    for name, label in (("first", "turn 1"), ("second", "turn 2"), ("again", "the image in another prompt")):
        counts, times = (
            [statistics.median(each[name][field] for each in part["rounds"]) for field in fields]
            for fields in (("prompt_tokens", "cached_tokens", "cached_images"), ("vision_s", "ttft_s"))
        )
        rows.append((label, *(f"{value:.0f}" for value in counts), *(f"{1e3 * value:.1f}" for value in times)))
    share, found = part["ttft_share"], part["images_found"]
    met = _verdict(share <= _MAX_TTFT_SHARE)
    goals = [
        ("figure", "asked", "reached", "met"),
        ("TTFT of turn 2 over that of turn 1", f"≤ {_MAX_TTFT_SHARE:.0%}", f"{share:.1%}", met),
        ("embeddings of the image found", "1", f"{found}", _verdict(found == 1)),
    ]
    count = len(part["rounds"])
    return f"## A conversation\n\nMedians of {count} rounds.\n\n{markdown(rows)}\n{markdown(goals)}"


def _overload(part: Result) -> str:
    report, rss = part["report"], part["rss"]
    ratio, lost = part["latency_ratio"], part["lost"] + part["left_running"] + report["failed"]
    memory = " / ".join(f"{rss[name] / 1e6:.1f}" for name in ("start_bytes", "middle_bytes", "end_bytes"))
    times = ", ".join(f"{q} {1e3 * value:.0f} ms" for q, value in report["latency_s"].items())
    rows = [
        ("figure", "reached", "met"),
        ("the engine can answer", f"{part['capacity_per_s']:.1f} requests/s", ""),
        ("offered", f"{part['offered_per_s']:.1f} requests/s for {part['seconds']:.0f} s", ""),
        ("answered", f"{report['done']}, {report['requests_per_s']:.1f} requests/s", ""),
        ("refused", f"{report['refused']}", ""),
        ("failed, lost or left", f"{lost}", _verdict(lost == 0)),
        ("latency of the accepted", times, ""),
        ("p95 over p50", f"{ratio:.2f}, asked ≤ {_MAX_LATENCY_RATIO:g}", _verdict(ratio <= _MAX_LATENCY_RATIO)),
        ("resident MB: warm, middle, end", memory, ""),
    ]
    return f"## Overload\n\n{markdown(rows)}"


_SECTIONS: Mapping[str, Callable[[Result], str]] = {
    "scaling": _scaling,
    "company": _company,
    "alone": _alone,
    "scheduler": _scheduler,
    "fairness": _fairness,
    "conversation": _conversation,
    "overload": _overload,
}
