"""A sweep beside an earlier one: what is matched, what is told, and what is too slow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from helpers.bench_results import ENVIRONMENT, LONG, SAMPLES, SHORT, result
from qwen3vl_export.bench.compare import compare, compare_engines
from qwen3vl_export.bench.results import Earlier, Result
from qwen3vl_export.bench.shift import Verdict


def earlier(results: Sequence[Result], **changes: Any) -> list[Earlier]:
    """As a file gives them back."""
    plain = [{**each.to_dict(), **changes} for each in results]
    return [Earlier.parse(json.loads(json.dumps(each)), "earlier.json") for each in plain]


def times(factor: float) -> list[float]:
    return [factor * each for each in SAMPLES]


def test_each_point_beside_its_old_one() -> None:
    then = earlier([result(SHORT), result(LONG), result(SHORT, engine="other")])
    found = compare([result(LONG, times(2.0)), result(SHORT, engine="other")], then)
    assert [(row.engine, row.point, row.metric) for row in found.rows] == [
        *(("demo", LONG, "ttft_s"), ("demo", LONG, "tpot_s")),
        *(("other", SHORT, "ttft_s"), ("other", SHORT, "tpot_s")),
    ]
    assert [row.shift.ratio for row in found.rows] == pytest.approx([2.0, 2.0, 1.0, 1.0])
    assert [row.shift.verdict for row in found.rows] == [*[Verdict.SLOWER] * 2, *[Verdict.SAME] * 2]
    assert (found.rows[0].baseline_s, found.rows[0].median_s) == pytest.approx((0.012, 0.024))
    assert found.only_earlier == (("demo", SHORT),) and found.only_now == () and found.changes == ()
    plain = found.of("demo", LONG)
    assert plain is not None and plain["ttft_s"]["verdict"] == "slower"
    assert plain["ttft_s"]["baseline_median"] == pytest.approx(0.012)
    assert found.of("demo", SHORT) is None


def test_what_only_one_side_has() -> None:
    found = compare([result(LONG), result(SHORT)], earlier([result(SHORT), result(replace(SHORT, batch=8))]))
    assert found.only_now == (("demo", LONG),) and found.only_earlier == (("demo", replace(SHORT, batch=8)),)


def test_one_engine_is_compared_with_one_of_another_name() -> None:
    found = compare([result(engine="new")], earlier([result(engine="old")]))
    assert [row.engine for row in found.rows] == ["new", "new"]
    assert found.changes == ("another engine: 'old' then, 'new' now",)
    both = compare([result(engine="new"), result(engine="b")], earlier([result(engine="old"), result(engine="b")]))
    assert [row.engine for row in both.rows] == ["b", "b"] and both.only_now == (("new", SHORT),)


def test_what_is_not_as_it_was() -> None:
    environment = replace(
        ENVIRONMENT,
        cpu="Other",
        cpu_features=(),
        isa=None,
        cores=4,
        versions={"qwen3vl-export": "0.2.0", "numpy": "2.4"},
        load_average=3.25,
    )
    now = result(environment=environment, target="ort-cpu-int4", files_sha256="cd" * 32, threads=4)
    assert compare([now], earlier([result()])).changes == (
        "demo: target: ort-cpu-fp32 then, ort-cpu-int4 now",
        "demo: files of the engine (SHA-256): abababababab then, cdcdcdcdcdcd now",
        "demo: threads: 2 then, 4 now",
        "processor: Abacus then, Other now",
        "features of the processor: avx2 then, none now",
        "instruction set of the own kernels: avx2 then, none now",
        "cores: 2 then, 4 now",
        "version of qwen3vl-export: 0.1.0 then, 0.2.0 now",
        "version of onnxruntime: 1.32.0 then, none now",
        "version of numpy: none then, 2.4 now",
        "load in the minute before: 0.10 then, 3.25 now; others were at work",
    )
    assert len(compare([now, replace(now, point=LONG)], earlier([result(), result(LONG)])).changes) == 11, "once"


def test_an_environment_of_another_form_is_a_change_and_no_fault() -> None:
    (then,) = earlier([result()], environment={"cpu": ["x"], "versions": 3, "load_average": "high"})
    changes = compare([result()], [then]).changes
    assert "processor: x then, Abacus now" in changes and "version of onnxruntime: none then, 1.32.0 now" in changes


def test_what_is_slower_than_it_may_be() -> None:
    found = compare([result(SHORT, times(1.5)), result(LONG)], earlier([result(SHORT), result(LONG)]))
    low = found.rows[0].shift.low
    assert low is not None and 1 < low < 1.5
    assert found.slower_than(low - 0.01) == [*found.rows[:2]] and found.slower_than(low + 0.01) == []
    few = compare([result(SHORT, [9.0])], earlier([result(SHORT)]))
    assert few.slower_than(1.0) == [] and few.rows[0].shift.verdict is Verdict.TOO_FEW


def test_the_summary_counts_and_says_what_chance_does() -> None:
    then = earlier([result(SHORT), result(LONG)])
    assert (
        compare([result(SHORT), result(LONG)], then).summary
        == "Of 4 figures against the earlier file: 4 no difference seen."
    )
    said = compare([result(SHORT, times(2.0)), result(LONG)], then).summary
    assert said == (
        "Of 4 figures against the earlier file: 2 slower, 2 no difference seen; by chance up to about 0.2 "
        "would be called faster or slower."
    )
    assert (
        compare([result(SHORT, [1.0])], then).summary == "Of 2 figures against the earlier file: 2 too few repetitions."
    )


def test_engines_of_one_run_are_compared_round_by_round() -> None:
    """Rounds of which one is ten times slower for both: the ratios within the rounds are all 2."""
    rounds = [0.01, 0.011, 0.1, 0.012, 0.01, 0.013]
    both = [result(SHORT, rounds), result(SHORT, [2 * each for each in rounds], engine="b")]
    found = compare_engines([*both, result(LONG, rounds), result(LONG, rounds, engine="b")], "demo")
    assert [(row.engine, row.point, row.metric) for row in found.rows] == [
        *(("b", SHORT, "ttft_s"), ("b", SHORT, "tpot_s"), ("b", LONG, "ttft_s"), ("b", LONG, "tpot_s"))
    ]
    assert [row.shift.verdict for row in found.rows] == [*[Verdict.SLOWER] * 2, *[Verdict.SAME] * 2]
    shift = found.rows[0].shift
    assert (shift.ratio, shift.low, shift.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.rows[0].baseline_s, found.rows[0].median_s) == pytest.approx((0.0115, 0.023))
    assert found.summary.startswith("Of 4 figures against demo in the same rounds: 2 slower, 2 no difference seen;")
    assert found.changes == found.only_now == found.only_earlier == ()
    assert [row.engine for row in compare_engines(both, "b").rows] == ["demo", "demo"]
