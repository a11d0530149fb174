"""The page of a sweep: what it shows, how large it may become, and how a browser takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.bench_results import LONG, SAMPLES, SHORT, result
from helpers.browser import axe_script, opened_browser, opened_page
from qwen3vl_export.bench.compare import compare
from qwen3vl_export.bench.measure import Streamed
from qwen3vl_export.bench.memory import ProcessMemory
from qwen3vl_export.bench.page import gigabytes, milliseconds, page_of
from qwen3vl_export.bench.points import Point
from qwen3vl_export.bench.results import Earlier
from qwen3vl_export.reports.page import MAX_BYTES, Page, Tone
from runtime.answer import Stats

STATS = Stats.of(
    (0.0, 0.001, 0.0015, 0.004, 0.010, 0.041),
    prompt_tokens=136, visual_tokens=4, new_tokens=32, peak_cache_bytes=1,
)  # fmt: skip
STREAM = LONG, Streamed(STATS, (0.011, 0.02, 0.041))
MEMORY = ProcessMemory(100_000_000, 50_000_000, 160_000_000)
HOSTILE = "<script>alert(1)</script>"


def page(factor: float | None = None, engine: str = "other") -> Page:
    results = [result(SHORT), result(SHORT, [2 * each for each in SAMPLES], engine=engine), result(LONG)]
    comparison = None
    if factor is not None:
        then = [result(SHORT, [each / factor for each in SAMPLES]), result(LONG, SAMPLES[:2])]
        comparison = compare(results, [Earlier.parse(json.loads(json.dumps(each.to_dict())), "") for each in then])
    return page_of(results, comparison, {"demo": STREAM, engine: STREAM}, MEMORY)


def test_what_it_shows() -> None:
    found = page()
    assert [each.title for each in found.sections] == [
        *("Figures", "TTFT, each repetition", "TPOT, each repetition", "One answer", "Memory", "Environment")
    ]
    assert found.title == "Speed of demo, other" and found.tone is Tone.PLAIN
    assert found.lead == "5 repetitions of each point, after one of warm-up; the engines took turns."
    assert [(card.label, card.value) for card in found.cards] == [
        *(("Time to first token", "12 ms"), ("Tokens a second", "833.3")),
        *(("Time to first token", "24 ms"), ("Tokens a second", "416.7")),
    ]
    text = found.render()
    assert text.count("<circle") == 2 * 3 * 5, "a dot for each repetition of each point and time"
    for said in ("preprocess 1 ms", "queue 0.5 ms", "vision 2.5 ms", "prefill 6 ms", "later tokens 31 ms"):
        assert text.count(f">{said}<") == 2
    assert text.count('class="tick"') == 2 * 3 and "32 new ones in 3 pieces of text" in text
    for said in ("weights: 13 MB", "KV cache: 200 MB", "anonymous memory: 100 MB", "peak: 160 MB", "Abacus (avx2)"):
        assert said in text


@pytest.mark.parametrize(
    ("factor", "tone", "verdict"), [(3.0, Tone.BAD, "slower"), (1 / 3, Tone.GOOD, "faster"), (1.0, Tone.PLAIN, None)]
)
def test_what_it_was_compared_with(factor: float, tone: Tone, verdict: str | None) -> None:
    found = page(factor)
    assert found.tone is tone and found.sections[0].title == "Against the earlier file"
    text = found.render()
    assert (verdict is None) == ("2 slower" not in found.lead and "2 faster" not in found.lead)
    if verdict is not None:
        assert text.count(f'<td class="{tone}">{verdict}</td>') == 2 and f"demo: TTFT, {verdict}" in text
    assert text.count(">too few repetitions</td>") == 2 and "not in the earlier file: other: 128 tokens" in text
    if factor == 1.0:
        assert text.count('class="reference"') == 1, "points with an interval are drawn"


def test_without_proc_the_process_is_left_out() -> None:
    text = page_of([result()], None, {"demo": STREAM}, None).render()
    assert "weights: 13 MB" in text and "anonymous memory" not in text


def test_the_largest_sweep_stays_small() -> None:
    samples = [0.01 + 1e-6 * index for index in range(1000)]
    results = [result(Point(tokens, 32), samples, engine=name) for tokens in range(1, 501) for name in ("a", "b")]
    text = page_of(results, None, {"a": STREAM, "b": STREAM}, MEMORY).render()
    assert len(text.encode()) < MAX_BYTES and "880 rows more are in the table alone" in text


def test_units() -> None:
    assert (milliseconds(0.0123456), milliseconds(12.5)) == ("12.35 ms", "1.25e+04 ms")
    assert (gigabytes(1.5e9), gigabytes(13e6), gigabytes(0)) == ("1.5 GB", "13 MB", "0 MB")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_reads_it(tmp_path: Path, scheme: str, width: int) -> None:
    file = tmp_path / "bench.html"
    page(3.0, engine=f"{HOSTILE} {'long ' * 30}").write(file)
    with (
        opened_browser() as browser,
        opened_page(browser, file.as_uri(), color_scheme=scheme, bypass_csp=True) as opened,
    ):
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll"
        sizes = opened.evaluate(
            "[...document.querySelectorAll('svg text, svg .words')]"
            ".map((each) => parseFloat(getComputedStyle(each).fontSize))"
        )
        assert len(sizes) > 30 and min(sizes) >= 12, "words do not shrink with the screen"
        beyond = opened.evaluate(
            "[...document.querySelectorAll('svg rect, svg circle, svg .words')]"
            ".filter((e) => e.getBoundingClientRect().right > innerWidth).length"
        )
        assert beyond == 0
        opened.evaluate(axe_script())
        found = opened.evaluate("axe.run()")["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
