"""`qwen3vl bench ENGINE...`: answers of engines that take turns, at the points of a sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.bench.points import Sweep, parse_numbers, parse_sizes
from qwen3vl_export.cli.options import Opening, Serving, given
from qwen3vl_export.cli.output import note, print_json, print_text
from qwen3vl_export.cli.progress import counting
from runtime.errors import CapacityError, RegressionError, UsageError
from runtime.shown import shown

if TYPE_CHECKING:
    from qwen3vl_export.bench.compare import Comparison
    from qwen3vl_export.bench.points import Point
    from qwen3vl_export.bench.results import Earlier, EngineFacts, Result
    from qwen3vl_export.reports.environment import Environment
    from runtime.model import Qwen3VLModel

_FORMATS = ("md", "csv", "json", "jsonl")
_DEFAULT_REPEATS, _MOST_REPEATS = 5, 1000
# How many sequences an engine runs unless it is told otherwise.
_DEFAULT_SEQUENCES = 8


@dataclass(frozen=True)
class SweepOptions:
    """What is asked; each a number, or a list for a sweep of all combinations.

    Attributes:
        image_size: Sizes of the images, which hold random pixels; none leaves them out: 448x448,1024x768,none.
        images: Numbers of images of a prompt.
        prompt_tokens: Numbers of tokens of the text: 128,512 or 128-512+128 or 128-2048*2. With many requests, about.
        new_tokens: Numbers of tokens of each answer.
        batch: Numbers of requests that are sent at once: 1,4.
        repeats: Repetitions of each point, after one that warms up. [default: 5]
    """

    image_size: Annotated[str, typer.Option(metavar="WxH,...")] = "448x448"
    images: Annotated[str, typer.Option(metavar="N,...")] = "1"
    prompt_tokens: Annotated[str, typer.Option(metavar="N,...")] = "20"
    new_tokens: Annotated[str, typer.Option(metavar="N,...")] = "32"
    batch: Annotated[str, typer.Option(metavar="N,...")] = "1"
    repeats: Annotated[
        int | None, typer.Option("--repeats", "--runs", metavar="N", min=1, max=_MOST_REPEATS, show_default=False)
    ] = None

    def sweep(self) -> Sweep:
        """Return the points.

        Raises:
            UsageError: An option is not a list of what it is for, or of no use.
        """
        found = Sweep(
            text_tokens=parse_numbers("--prompt-tokens", self.prompt_tokens),
            new_tokens=parse_numbers("--new-tokens", self.new_tokens, least=2),
            batches=parse_numbers("--batch", self.batch),
            image_sizes=parse_sizes(self.image_size),
            images=parse_numbers("--images", self.images),
        )
        if "images" in given(self) and not any(found.image_sizes):
            raise UsageError("--images has no use without an image size", remedy="leave it out, or add --image-size")
        return found

    def of_many_requests(self) -> tuple[tuple[int, int] | None, int, int]:
        """Return image size, tokens of the text and tokens of the answer of a load, which has one of each.

        Raises:
            UsageError: An option is a list, or is of a sweep alone.
        """
        remedy = "pass --requests and --concurrency or --rate"
        for name in ("repeats", "batch", "images"):
            if name in given(self):
                raise UsageError(f"--{name} is of one request at a time", remedy=f"leave it out, and {remedy}")
        points = self.sweep().points
        if len(points) > 1:
            raise UsageError(
                f"many requests are of one kind, and the lists make {len(points)}",
                remedy="give one number of each, or leave --concurrency and --rate out",
            )
        return points[0].image_size, points[0].text_tokens, points[0].new_tokens


@dataclass(frozen=True)
class ReportOptions:
    """What becomes of the figures.

    Attributes:
        output: Print a table as md or csv, or all repetitions as json or jsonl. [default: md for a sweep, lines for one
            point]
        compare: Compare with an earlier file of --output json or jsonl: ratio, 95 % interval, verdict.
        against: Compare the other engines with this one of the same run, round by round.
        fail_slower: Fail if a time that is compared is longer by more than P percent, its whole interval above that.
        html: Write a page with distributions, one answer step by step, memory and environment into this file.
    """

    output: Annotated[str | None, typer.Option(metavar="|".join(_FORMATS))] = None
    compare: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    against: Annotated[str | None, typer.Option(metavar="NAME")] = None
    fail_slower: Annotated[str | None, typer.Option(metavar="P%")] = None
    html: Annotated[Path | None, typer.Option(metavar="FILE.html")] = None

    @property
    def limit(self) -> float | None:
        """By what factor a time may become longer; None if it may by any."""
        if self.fail_slower is None:
            return None
        try:
            percent = float(self.fail_slower.removesuffix("%"))
        except ValueError:
            percent = math.nan
        if not (math.isfinite(percent) and percent >= 0):
            raise UsageError(
                f"--fail-slower {shown(self.fail_slower)}: expected a percentage", remedy="write --fail-slower 5%"
            )
        return 1 + percent / 100

    def check(self, *, as_json: bool) -> None:
        """Check what can be checked before the work.

        Raises:
            UsageError: Options contradict each other, or a page cannot be written.
        """
        if self.output is not None and self.output not in _FORMATS:
            raise UsageError(f"--output {shown(self.output)}: unknown", remedy=f"choose of {', '.join(_FORMATS)}")
        if beside := [name for name in ("output", "compare", "against") if getattr(self, name) is not None and as_json]:
            name = f"--{beside[0]}"
            raise UsageError(f"--json and {name} are given together", remedy="leave --json out: --output json has more")
        if self.compare is not None and self.against is not None:
            raise UsageError("--compare and --against are given together", remedy="leave one of them out")
        if self.limit is not None and self.compare is None and self.against is None:
            raise UsageError(
                "--fail-slower needs figures to compare with", remedy="add --compare FILE, or --against NAME"
            )
        if self.html is not None:
            from qwen3vl_export.reports.page import check_page

            check_page(self.html)


def bench_sweep(
    arguments: Sequence[str],
    asked: SweepOptions,
    report: ReportOptions,
    opening: Opening,
    serving: Serving,
    *,
    as_json: bool,
) -> None:
    """Measure engines at all points, and print, compare and draw the figures.

    Args:
        arguments: The engines: folders, or NAME=FOLDER.
        asked: The sweep.
        report: What becomes of the figures.
        opening: How engines are opened.
        serving: The same.
        as_json: Print one flat object; needs one engine and one point.

    Raises:
        UsageError: Options are wrong, or do not fit together or to an engine.
        RegressionError: A time became longer than it may.
    """
    folders, points = named(arguments), asked.sweep().points
    repeats = asked.repeats or _DEFAULT_REPEATS
    is_single = len(folders) == len(points) == 1
    if as_json and not is_single:
        raise UsageError(f"--json is of one point, not of {len(folders) * len(points)}", remedy="pass --output json")
    earlier = None if report.compare is None else _earlier(report, list(folders), points, repeats)
    if report.against is not None:
        _check_against(report, list(folders), repeats)
    from qwen3vl_export.reports.environment import Environment
    from runtime.machine import default_threads

    threads = opening.threads or default_threads()
    environment = Environment.of_this_machine(threads)  # before the work, whose load is not to count
    load = environment.load_average
    if load is not None and load > environment.cores / 2 and not as_json:
        note(f"note: {load:.1f} processes ran in the minute before: these figures are those of a busy machine")
    with ExitStack() as opened:
        models, load_s = _open(folders, points, opening, serving, opened)
        results, drawn = _measured(models, load_s, points, repeats, environment, with_page=report.html is not None)
    comparison = _compared(results, earlier, report.against)
    is_line = is_single and comparison is None
    _print(results, comparison, report.output or ("lines" if is_line else "md"), as_json=as_json)
    if report.html is not None:
        from qwen3vl_export.bench.page import page_of

        page_of(results, comparison, *drawn).write(report.html)
    if comparison is not None and report.limit is not None:
        _check_slower(comparison, report.limit)


def named(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the engines by name, which is that of the folder unless `NAME=FOLDER` gives another.

    Raises:
        UsageError: Two have one name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, mark, folder = argument.partition("=")
        if not mark or Path(argument).exists():
            name, folder = Path(argument).resolve().name, argument
        elif not name or not folder:
            raise UsageError(f"{shown(argument)} is not NAME=ENGINE", remedy="write new=out/new, or the folder alone")
        if name in found:
            raise UsageError(f"two engines are called {shown(name)}", remedy="name them: before=DIR after=DIR")
        found[name] = Path(folder)
    return found


def _earlier(report: ReportOptions, names: Sequence[str], points: Sequence[Point], repeats: int) -> list[Earlier]:
    """Read the file to compare with, and check that there will be something to compare."""
    from qwen3vl_export.bench.compare import by_name_of_now
    from qwen3vl_export.bench.results import read_earlier
    from qwen3vl_export.bench.shift import has_interval

    assert report.compare is not None
    earlier = read_earlier(report.compare)
    then = by_name_of_now(earlier, names)
    common = [each for (name, point), each in then.items() if name in names and point in points]
    if not common:
        raise UsageError(
            f"{report.compare} has nothing to compare with, but {len(earlier)} other points, the first of them "
            f"{shown(earlier[0].engine)} at {earlier[0].point.name}",
            remedy="give --image-size, --images, --prompt-tokens, --new-tokens and --batch as it was made with, and "
            "where there are several engines their names (NAME=ENGINE)",
        )
    fewest = min(len(samples) for each in common for samples in each.samples.values())
    if report.limit is not None and not has_interval(fewest, repeats):
        raise UsageError(
            f"--fail-slower cannot be judged by {fewest} repetitions then and {repeats} now",
            remedy="make at least 4 on each side: --repeats",
        )
    return earlier


def _check_against(report: ReportOptions, names: Sequence[str], repeats: int) -> None:
    from qwen3vl_export.bench.shift import has_paired_interval

    if report.against not in names:
        raise UsageError(f"--against {shown(report.against)}: no such engine", remedy=f"name one of {', '.join(names)}")
    if len(names) == 1:
        raise UsageError("--against needs a second engine", remedy="name it beside the first: before=DIR after=DIR")
    if report.limit is not None and not has_paired_interval(repeats):
        raise UsageError(f"--fail-slower cannot be judged by {repeats} rounds", remedy="pass --repeats 6 or more")


def _compared(results: Sequence[Result], earlier: Sequence[Earlier] | None, against: str | None) -> Comparison | None:
    from qwen3vl_export.bench.compare import compare, compare_engines

    if earlier is not None:
        return compare(results, earlier)
    return None if against is None else compare_engines(results, against)


def _open(
    folders: Mapping[str, Path], points: Sequence[Point], opening: Opening, serving: Serving, opened: ExitStack
) -> tuple[dict[str, Qwen3VLModel], dict[str, float]]:
    """Open the engines; return them and the seconds that each took."""
    import time

    from runtime.manifest import Manifest
    from runtime.memory import machine_bytes
    from runtime.session import is_on_gpu

    manifests = [Manifest.read(folder) for folder in folders.values()]
    weights = sum(each.weight_bytes for each in manifests if not is_on_gpu(each))
    if len(folders) > 1 and weights > machine_bytes():
        raise CapacityError(
            f"the weights of {len(folders)} engines take {weights / 1e9:.1f} GB, the memory is of "
            f"{machine_bytes() / 1e9:.1f} GB",
            remedy="measure one by one: --output json > first.json, then --compare first.json",
        )
    batch, most = max(each.batch for each in points), max(each.text_tokens + each.new_tokens for each in points)
    if serving.max_sequences is None and batch > _DEFAULT_SEQUENCES:
        serving = dataclasses.replace(serving, max_sequences=batch)
    models, load_s = {}, {}
    for name, folder in folders.items():
        start = time.perf_counter()
        models[name] = opened.enter_context(opening.open(folder, serving=serving))
        load_s[name] = time.perf_counter() - start
        runs = models[name].limits.max_sequences
        if runs < batch:
            raise UsageError(
                f"--batch {batch}: {name} runs {runs} sequences at once",
                remedy=f"pass --max-sequences {batch}, a smaller --max-context, or a smaller --batch",
            )
        if most > models[name].max_context:  # images and the chat template come to them; those only a prompt tells
            raise CapacityError(
                f"a point has {most} tokens of text and answer, the context of {name} {models[name].max_context}",
                remedy="raise --max-context, or lower --prompt-tokens and --new-tokens",
            )
    return models, load_s


def _measured(
    models: Mapping[str, Qwen3VLModel],
    load_s: Mapping[str, float],
    points: Sequence[Point],
    repeats: int,
    environment: Environment,
    *,
    with_page: bool,
) -> tuple[list[Result], tuple[Any, Any]]:
    """Return the results, and for a page what it draws beside them: answers as streams, memory of the process."""
    from qwen3vl_export.bench.measure import measure, stream_once
    from qwen3vl_export.bench.memory import ProcessMemory
    from qwen3vl_export.bench.results import Result

    with counting("measuring") as show:
        found = measure(models, points, repeats, show)
    memory = ProcessMemory.now()
    peak = None if memory is None else memory.peak
    facts = {
        name: _facts(name, model, load_s[name], environment.threads or 0, points) for name, model in models.items()
    }
    results = [Result.of(facts[name], point, each, environment, peak) for (name, point), each in found.items()]
    results.sort(key=lambda each: points.index(each.point))
    longest = max(points, key=lambda point: (point.images, point.text_tokens, point.new_tokens))
    streams = (
        {name: (longest, stream_once(model, longest, repeats + 1)) for name, model in models.items()}
        if with_page
        else {}
    )
    return results, (streams, memory)


def _facts(name: str, model: Qwen3VLModel, load_s: float, threads: int, points: Sequence[Point]) -> EngineFacts:
    from qwen3vl_export.bench.memory import estimate
    from qwen3vl_export.bench.results import EngineFacts, files_sha256

    return EngineFacts(
        engine=name,
        target=model.manifest.target,
        model=str(model.manifest.source.get("name")),
        files_sha256=files_sha256(model.manifest),
        device=device(model),
        threads=model.threads or threads,
        load_s=load_s,
        # Known after the first step; None if this kind of engine records nothing.
        decode_recorded=getattr(model.session, "decode_recorded", None),
        decode_kernels=getattr(model.session, "decode_kernels", None),
        memory_bytes=estimate(model, points),
        tuning=model.tuning.values(),
    )


def device(model: Qwen3VLModel) -> str:
    """Return the name of the GPU that the engine runs on, or of the processor."""
    from engines.hardware import probe
    from runtime.session import is_on_gpu

    machine = probe()
    if not is_on_gpu(model.manifest):
        return machine.cpu
    return machine.gpu.name if machine.gpu else "a GPU that nvidia-smi does not list"


def _print(results: Sequence[Result], comparison: Comparison | None, form: str, *, as_json: bool) -> None:
    from qwen3vl_export.bench.tables import FORMATS, as_lines, flat_values, notes_of

    if as_json:
        print_json(flat_values(results[0]))
        return
    if form == "lines":
        print_text(as_lines(results[0]))
        return
    print_text(FORMATS[form](results, comparison))
    if comparison is not None and form in ("csv", "jsonl"):  # lines of points have no place for these
        for line in (*notes_of(comparison), comparison.summary):
            note(line)


def _check_slower(comparison: Comparison, limit: float) -> None:
    slower = comparison.slower_than(limit)
    if slower:
        worst = max(slower, key=lambda each: each.shift.low or 0)
        raise RegressionError(
            f"{len(slower)} of {len(comparison.rows)} times are longer by more than {100 * (limit - 1):.3g} %; most "
            f"{worst.metric} of {worst.engine} at {worst.point.name}: {worst.shift.ratio:.3f} ×, 95 % interval "
            f"{worst.shift.low:.3f} to {worst.shift.high:.3f}",
            remedy="look for what changed; see whether a second run, on an idle machine, says the same",
        )
