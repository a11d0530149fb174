"""Results as plain data, and what is read of an earlier file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.bench_results import ENGINE, ENVIRONMENT, LONG, SHORT, result
from qwen3vl_export.bench.measure import PHASES, Measured, Repetition
from qwen3vl_export.bench.results import Result, Times, files_sha256, read_earlier
from qwen3vl_export.bench.tables import FORMATS
from runtime.errors import UsageError
from runtime.manifest import Manifest


def repetition(seconds: float, prompt_tokens: int = 30) -> Repetition:
    phases = {name: seconds * (index + 1) / 10 for index, name in enumerate(PHASES)}
    return Repetition(seconds, seconds / 10, 5 * seconds, phases, prompt_tokens, 9, 3)


def test_times() -> None:
    times = Times((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (times.median, times.quartiles, times.p90) == (3.0, (2.0, 4.0), pytest.approx(4.6))
    values = times.to_dict()
    assert values.pop("p90") == pytest.approx(4.6)
    assert values == {"median": 3.0, "q1": 2.0, "q3": 4.0, "samples": [5.0, 1.0, 2.0, 4.0, 3.0]}


def test_medians_of_the_repetitions_without_the_warm_up() -> None:
    measured = Measured(repetition(99.0), [repetition(each, 30 + int(each)) for each in (1.0, 3.0, 2.0)])
    found = Result.of(ENGINE, LONG, measured, ENVIRONMENT)
    assert found.ttft_s.samples == (1.0, 3.0, 2.0) and found.tpot_s.median == pytest.approx(0.2)
    assert found.warmup_s == 5 * 99.0 and found.latency_s.median == 10.0 and found.prompt_tokens == 32
    assert found.phases_s == pytest.approx({"preprocess": 0.2, "queue": 0.4, "vision": 0.6, "prefill": 0.8})
    assert found.tokens_per_s == pytest.approx(4 / 0.2), "of four sequences together"
    assert found.visual_tokens == 9 and found.cached_tokens == 3


def test_another_build_has_another_hash(tiny_engine: Path) -> None:
    from dataclasses import replace

    manifest = Manifest.read(tiny_engine)
    name, record = next(iter(manifest.files.items()))
    other = replace(manifest, files={**manifest.files, name: replace(record, sha256="0" * 64)})
    assert files_sha256(manifest) == files_sha256(replace(manifest, files=dict(reversed(manifest.files.items()))))
    assert files_sha256(manifest) != files_sha256(other)


@pytest.mark.parametrize("form", ["json", "jsonl", "indented"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, form: str) -> None:
    results = [result(), result(LONG, [1.0, 2.0]), result(SHORT, engine="other")]
    text = FORMATS["json" if form == "indented" else form](results, None)
    file = tmp_path / "earlier"
    file.write_text(json.dumps(json.loads(text), indent=1) if form == "indented" else f"{text}\n\n", encoding="utf-8")
    found = read_earlier(file)
    assert [(each.engine, each.point) for each in found] == [("demo", SHORT), ("demo", LONG), ("other", SHORT)]
    assert found[1].samples == {"ttft_s": (1.0, 2.0), "tpot_s": (0.1, 0.2)}
    assert found[0].values == json.loads(json.dumps(results[0].to_dict()))


def values(**changes: Any) -> dict[str, Any]:
    return {**result().to_dict(), **changes}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it holds no point"),
        ("no JSON", "not readable as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"points": 1}', "`points` is no list"),
        ('{"points": []}', "it holds no point"),
        ('{"points": [1]}', "points[0]: no object"),
        ('{"ttft_p50_s": 1.0}', "`engine` or `environment` is missing"),
        (values(engine=1), "`engine` or `environment` is missing"),
        (values(environment=None), "`engine` or `environment` is missing"),
        (values(batch="1"), "images, text_tokens, new_tokens, batch are not all whole numbers"),
        (values(batch=True), "not all whole numbers"),
        (values(images=-1), "not all whole numbers"),
        (values(image_size=3), "image_size is 3"),
        (values(image_size="big"), ":1: image_size is 'big', expected WIDTHxHEIGHT"),
        (values(image_size="none"), "image_size is 'none', expected WIDTHxHEIGHT or null"),
        (values(image_size=None, images=3), "images is 3, and image_size is None"),
        (values(image_size="64x32", images=0), "images is 0, and image_size is '64x32'"),
        (values(ttft_s=1.0), "ttft_s: it holds no samples"),
        (values(tpot_s={"samples": []}), "tpot_s: it holds no samples"),
        (values(tpot_s={"samples": [1.0, 0.0]}), "tpot_s: samples are not all numbers of seconds"),
        (values(tpot_s={"samples": [1.0, "2"]}), "samples are not all numbers"),
        (values(tpot_s={"samples": [float("inf")]}), "samples are not all numbers"),
        (values(tpot_s={"samples": [float("nan")]}), "samples are not all numbers"),
        (values(tpot_s={"samples": [1e-320]}), "samples are not all numbers"),
        (values(tpot_s={"samples": [10**400]}), "samples are not all numbers"),
        ({"points": [values(), values()]}, "'demo' at 128 tokens, 32 new twice"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    file = tmp_path / "earlier.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_earlier(file)
    assert said in caught.value.message and caught.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing") as caught:
        read_earlier(tmp_path / "none.json")
    assert "--output json" in str(caught.value.remedy)
