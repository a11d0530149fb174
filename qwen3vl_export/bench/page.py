"""A sweep as a page: all repetitions, one answer step by step, memory, what it was compared with, environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.etree.ElementTree import Element

from qwen3vl_export.bench import tables
from qwen3vl_export.bench.compare import Compared, Comparison
from qwen3vl_export.bench.measure import PHASES, Streamed
from qwen3vl_export.bench.memory import ProcessMemory
from qwen3vl_export.bench.points import Point
from qwen3vl_export.bench.results import METRICS, Result
from qwen3vl_export.bench.shift import Verdict
from qwen3vl_export.reports.drawing import Axis, Bar, Interval, Samples, Segment, drawing, legend
from qwen3vl_export.reports.elements import element
from qwen3vl_export.reports.page import Card, Cell, Page, Section, Tone, facts, figure, grid, paragraph, table

_TONES = {Verdict.FASTER: Tone.GOOD, Verdict.SLOWER: Tone.BAD}
_SERIES = {Verdict.FASTER: 2, Verdict.SLOWER: 1}
_MOST_ROWS = 120
"""Rows of a section with drawings; more would make a page of many megabytes. The tables have all."""
_MOST_DOTS = 8000
"""Dots of the whole page."""


def page_of(
    results: Sequence[Result],
    comparison: Comparison | None,
    streams: Mapping[str, tuple[Point, Streamed]],
    process: ProcessMemory | None,
) -> Page:
    """Return the page.

    Args:
        results: The figures.
        comparison: With an earlier file or with one of the engines, if there was one.
        streams: One answer of each engine, by its name, and what was asked.
        process: Resident memory of the process after the work.
    """
    sections = [
        *([] if comparison is None else [_compared(comparison)]),
        Section("Figures", [_figures(results)]),
        *(
            Section(f"{name}, each repetition", list(_distributions(results, metric)))
            for metric, name in METRICS.items()
        ),
        Section("One answer", list(_answers(streams))),
        Section("Memory", list(_memory(results, process))),
        Section("Environment", [facts(results[0].environment.rows())]),
    ]
    engines = list(dict.fromkeys(each.engine.engine for each in results))
    runs = len(results[0].ttft_s.samples)
    lead, tone = f"{runs} repetitions of each point, after one of warm-up.", Tone.PLAIN
    if len(engines) > 1:
        lead = f"{lead[:-1]}; the engines took turns."
    if comparison is not None:
        verdicts = {row.shift.verdict for row in comparison.rows}
        lead = f"{comparison.summary} {lead}"
        tone = _TONES[Verdict.SLOWER] if Verdict.SLOWER in verdicts else _tone_without_slower(verdicts)
    return Page(f"Speed of {', '.join(engines)}", lead, list(_cards(results)), sections, tone)


def _tone_without_slower(verdicts: set[Verdict]) -> Tone:
    return Tone.GOOD if Verdict.FASTER in verdicts else Tone.PLAIN


def _cards(results: Sequence[Result]) -> Iterator[Card]:
    """Yield the figures of the first point, which is the one that was named first."""
    for each in results:
        if each.point == results[0].point:
            detail = f"{each.engine.engine}: {each.point.name}"
            yield Card("Time to first token", milliseconds(each.ttft_s.median), detail)
            yield Card("Tokens a second", f"{each.tokens_per_s:.4g}", detail)


def _figures(results: Sequence[Result]) -> Element:
    caption = "Medians; in brackets first and third quartile."
    return table(tables.HEADERS, tables.rows(results), caption=caption, numbers=tables.NUMBERS)


def _compared(comparison: Comparison) -> Section:
    parts: list[Element] = []
    judged = [row for row in comparison.rows if row.shift.low is not None]
    if judged:
        ends = [end for row in judged for end in (row.shift.low, row.shift.high, 1.0) if end is not None]
        axis = Axis.of(ends, lambda value: f"{value:.3g} ×")
        points = list(dict.fromkeys(row.point for row in judged[:_MOST_ROWS]))
        parts.append(
            paragraph(f"Times over those of {comparison.baseline}, with the 95 % interval: right of 1 is slower.")
        )
        parts.append(grid(*(_intervals([row for row in judged if row.point == point], axis) for point in points)))
    cells: list[list[Cell | str]] = [
        [*row[:-1], Cell(row[-1], _TONES.get(each.shift.verdict, Tone.PLAIN))]
        for row, each in zip(tables.compared_rows(comparison), comparison.rows, strict=True)
    ]
    caption = f"Medians of {comparison.baseline} and of each engine."
    parts.append(table(tables.COMPARED_HEADERS, cells, caption=caption, numbers=tables.COMPARED_NUMBERS))
    if notes := tables.notes_of(comparison):
        parts += [paragraph("Not as it was:"), element("ul", *(element("li", each) for each in notes))]
    return Section(f"Against {comparison.baseline}", parts)


def _intervals(compared: Sequence[Compared], axis: Axis) -> Element:
    """Return the ratios of one point."""
    rows = [
        Interval(
            f"{row.engine}: {METRICS[row.metric]}, {row.shift.verdict}",
            row.shift.ratio,
            row.shift.low,
            row.shift.high,
            _SERIES.get(row.shift.verdict, 0),
        )
        for row in compared
    ]
    name = compared[0].point.name
    return figure(drawing(rows, axis, f"Ratios of times at {name}", mark=1.0), name)


def _distributions(results: Sequence[Result], metric: str) -> Iterator[Element]:
    """Yield a drawing for each point, in which the engines are the rows: points differ by orders of magnitude."""
    drawn = results[:_MOST_ROWS]
    points = list(dict.fromkeys(each.point for each in drawn))
    runs = len(results[0].ttft_s.samples)
    dots = max(10, _MOST_DOTS // (len(METRICS) * len(drawn)))
    some = "A dot is a repetition" if runs <= dots else f"Dots are {dots} or fewer of {runs} repetitions"
    yield paragraph(f"{some}, the box spans the quartiles, the thick line is the median.")
    yield grid(*(_samples([each for each in drawn if each.point == point], metric, dots) for point in points))
    if len(results) > len(drawn):
        yield paragraph(f"{len(results) - len(drawn)} rows more are in the table alone.")


def _samples(results: Sequence[Result], metric: str, most_dots: int) -> Element:
    """Return the repetitions of one point."""
    times = {each.engine.engine: getattr(each, metric) for each in results}
    rows = [
        Samples(f"{name}: median {milliseconds(each.median)}", each.samples, index, most_dots)
        for index, (name, each) in enumerate(times.items())
    ]
    axis = Axis.of([value for each in times.values() for value in each.samples], milliseconds)
    name = results[0].point.name
    return figure(drawing(rows, axis, f"{METRICS[metric]} at {name}"), name)


def _answers(streams: Mapping[str, tuple[Point, Streamed]]) -> Iterator[Element]:
    names = [*PHASES, "later tokens"]
    asked = next(point for point, _ in streams.values())
    yield paragraph(
        f"Asked alone, after the repetitions: {asked.name}. Thin lines are pieces of text as they arrived; a piece may "
        "hold several tokens. The first token is part of prefill."
    )
    axis = Axis.of([_parts(each)[-1].end for _, each in streams.values()], milliseconds, from_zero=True)
    for name, (_, streamed) in streams.items():
        rows = [
            Bar(
                f"{part.name} {milliseconds(part.end - part.start)}",
                [part],
                streamed.pieces_s if part.name == names[-1] else (),
            )
            for part in _parts(streamed)
        ]
        stats = streamed.stats
        caption = (
            f"{name}: {stats.prompt_tokens} tokens of the prompt, {stats.visual_tokens} of them visual, "
            f"{stats.new_tokens} new ones in {len(streamed.pieces_s)} pieces of text."
        )
        yield figure(drawing(rows, axis, f"One answer of {name}, step by step"), caption)


def _parts(streamed: Streamed) -> list[Segment]:
    """Return the parts of an answer, each where the last one ended."""
    stats, start, found = streamed.stats, 0.0, []
    lengths = [getattr(stats, f"{name}_s") for name in PHASES] + [stats.tpot_s * (stats.new_tokens - 1)]
    for index, (name, length) in enumerate(zip([*PHASES, "later tokens"], lengths, strict=True)):
        found.append(Segment(name, start, start + length, index))
        start += length
    return found


def _memory(results: Sequence[Result], process: ProcessMemory | None) -> Iterator[Element]:
    engines = {each.engine.engine: each.engine for each in results}
    names = list(dict.fromkeys(name for each in engines.values() for name in each.memory_bytes))
    bars = [
        Bar(f"{name}: {gigabytes(sum(each.memory_bytes.values()))}", _stacked(list(each.memory_bytes.items()), names))
        for name, each in engines.items()
    ]
    shown = ["anonymous memory", "mapped files"]
    resident = []
    if process is not None:
        values = [(shown[0], process.anonymous), (shown[1], process.mapped)]
        resident = [Bar(f"resident: {gigabytes(process.anonymous + process.mapped)}", _stacked(values, shown))]
        resident.append(Bar(f"peak: {gigabytes(process.peak)}", [Segment("peak", 0, process.peak, 2)]))
    axis = Axis.of([bar.segments[-1].end for bar in (*bars, *resident)], gigabytes, from_zero=True)
    yield legend(names)
    caption = "What each engine takes at most, by its own estimate; on a GPU, there."
    yield figure(drawing(bars, axis, "Estimated memory of the engines"), caption)
    if resident:
        yield legend([*shown, "peak"])
        caption = "What this process had after the repetitions, all engines and Python together; not memory of a GPU."
        yield figure(drawing(resident, axis, "Resident memory of the process"), caption)
    rows = [[name, *(gigabytes(each.memory_bytes.get(part, 0)) for part in names)] for name, each in engines.items()]
    yield table(["engine", *names], rows, caption="The estimate, part by part", numbers=names)


def _stacked(values: Sequence[tuple[str, int]], names: Sequence[str]) -> list[Segment]:
    found, start = [], 0
    for name, value in values:
        found.append(Segment(name, start, start + value, names.index(name)))
        start += value
    return found


def milliseconds(seconds: float) -> str:
    """Return a time with its unit."""
    return f"{1e3 * seconds:.4g} ms"


def gigabytes(num_bytes: float) -> str:
    """Return bytes in GB, or MB below one."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
