"""A load as a plot: distributions of its times, and tokens a second over time."""

from __future__ import annotations

from pathlib import Path

from qwen3vl_export.load.generator import Trace
from qwen3vl_export.load.report import tokens_over_time
from qwen3vl_export.parity.plots import drawn_figure


def plot_load(trace: Trace, file: Path) -> None:
    """Draw TTFT and latency as shares of the answers that had theirs by then, and tokens a second over time.

    Args:
        trace: A load.
        file: Where, in the form that its suffix says (.svg, .png).

    Raises:
        UsageError: matplotlib is not installed, the suffix is not one it draws, or the folder cannot be written.
    """
    with drawn_figure(file, 2, width=9, salt="load") as (times, speed):
        for label, values in (
            ("time to first token", [each.ttft_s for each in trace.answered]),
            ("whole answer", [each.latency_s for each in trace.answered]),
        ):
            times.plot(sorted(values), [(i + 1) / len(values) for i in range(len(values))], label=label)
        times.set_title("answers")
        times.set_xlabel("seconds since the request arrived")
        times.set_ylabel("share of the answers")
        times.set_xlim(left=0)
        times.set_ylim(0, 1)
        times.legend(loc="lower right")
        speed.plot(*tokens_over_time(trace))
        speed.set_title("speed")
        speed.set_xlabel("seconds since the load began")
        speed.set_ylabel("tokens of answers a second")
        speed.set_ylim(bottom=0)
        for panel in (times, speed):
            panel.grid(alpha=0.3)
