"""`qwen3vl bench --concurrency` and `--rate`: many requests at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.output import print_json, print_text
from qwen3vl_export.cli.progress import counting
from runtime.errors import UsageError
from runtime.shown import columns

if TYPE_CHECKING:
    from qwen3vl_export.load.client import Client
    from qwen3vl_export.load.prompts import Prompts
    from qwen3vl_export.load.report import LoadReport
    from runtime.model import Qwen3VLModel

_REQUESTS_PER_CLIENT = 4
_DEFAULT_DURATION_S = 30.0


@dataclass(frozen=True)
class LoadOptions:
    """Options of a load.

    Attributes:
        concurrency: Send requests from N clients at once, each of which asks again when it has its answer. With --rate,
            at most N are in flight, and arrivals beyond them wait.
        rate: Send R requests a second on average, at random times, whether or not earlier ones are answered.
        requests: Number of requests to send. [default: 4 for each client]
        duration: Seconds in which requests are sent; what was accepted is then answered. [default with --rate: 30]
        shared_prefix: Begin all prompts with the same system message of about N tokens, which the prefix cache keeps.
        seed: Another seed makes other prompts and other times of arrival.
        plot: Plot TTFT, latency and tokens a second over time into this .svg or .png file.
    """

    concurrency: Annotated[int | None, typer.Option(metavar="N", min=1)] = None
    rate: Annotated[float | None, typer.Option(metavar="R")] = None
    requests: Annotated[int | None, typer.Option(metavar="K", min=1)] = None
    duration: Annotated[float | None, typer.Option(metavar="S")] = None
    shared_prefix: Annotated[int, typer.Option(metavar="N", min=0)] = 0
    seed: Annotated[int, typer.Option(min=0)] = 0
    plot: Annotated[Path | None, typer.Option(metavar="FILE")] = None

    @property
    def is_given(self) -> bool:
        """Whether many requests are asked for."""
        return self.concurrency is not None or self.rate is not None

    def asked(self) -> dict[str, Any]:
        """Return how requests arrive, for the JSON."""
        return {"concurrency": self.concurrency, "rate": self.rate}

    def check(self) -> None:
        """Check what can be checked before the engine is opened.

        Raises:
            UsageError: An option is out of range or of no use alone, or a plot cannot be drawn.
        """
        for name, value in (("--rate", self.rate), ("--duration", self.duration)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} {value}: expected a number above 0", remedy=f"leave {name} out")
        alone = [name for name in ("requests", "duration", "shared_prefix", "seed", "plot") if getattr(self, name)]
        if alone and not self.is_given:
            raise UsageError(
                f"--{alone[0].replace('_', '-')} needs many requests", remedy="add --concurrency N or --rate R"
            )
        if self.plot is not None:
            from qwen3vl_export.parity.plots import check_plot

            check_plot(self.plot)


def bench_load(
    model: Qwen3VLModel,
    prompts: Prompts,
    new_tokens: int,
    options: LoadOptions,
    where: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Send many requests to an engine, and print and plot what became of them.

    Args:
        model: An opened engine.
        prompts: What is asked.
        new_tokens: Tokens of each answer.
        options: Those of the load.
        where: What the engine runs on, which comes first in the JSON.
        as_json: Print JSON.
    """
    from qwen3vl_export.load.client import InProcess
    from qwen3vl_export.load.report import report_rows

    report = offered(InProcess(model), prompts, new_tokens, options)
    if as_json:
        # Known after the first step.
        decode = {name: getattr(model.session, name, None) for name in ("decode_recorded", "decode_kernels")}
        print_json({**where, **decode, **options.asked(), **asdict(report)})
        return
    rows = [
        ("device", f"{where['device']}, threads: {where['threads']}"),
        ("engine", f"{where['target']}, loaded in {where['load_s']:.2f} s, {where['max_sequences']} sequences at once"),
        *report_rows(report),
    ]
    print_text("\n".join(columns(rows)))


def offered(client: Client, prompts: Prompts, new_tokens: int, options: LoadOptions) -> LoadReport:
    """Offer the load that options ask for, plot it if they do, and return its figures."""
    from qwen3vl_export.load.generator import MAX_IN_FLIGHT, Load, offer
    from qwen3vl_export.load.plot import plot_load
    from qwen3vl_export.load.report import summarise

    requests, duration = options.requests, options.duration
    if requests is None and duration is None:
        if options.rate is None:
            requests = _REQUESTS_PER_CLIENT * (options.concurrency or 1)
        else:
            duration = _DEFAULT_DURATION_S
    load = Load(options.concurrency or MAX_IN_FLIGHT, options.rate, requests, duration, new_tokens, options.seed)
    with counting("sending requests") as show:
        trace = offer(client, prompts, load, lambda now: show(now.num_ended, requests, f"{len(now.answered)} answered"))
    if options.plot is not None:
        plot_load(trace, options.plot)
    return summarise(trace)
