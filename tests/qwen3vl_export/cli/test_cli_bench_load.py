"""`qwen3vl bench` with many requests: counts, percentiles, the plot, and options that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer

from helpers.command_line import call
from qwen3vl_export.cli.bench import bench
from runtime.errors import UsageError

NAMES = ("ttft_s", "tpot_s", "latency_s", "queue_s")


def run(folder: Path, *options: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(bench)
    return call(app, str(folder), "--threads", "1", "--max-context", "256", "--new-tokens", "3", *options)


def found(folder: Path, *options: str) -> dict[str, Any]:
    code, out, err = run(folder, *options, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def test_clients_at_once(tiny_engine: Path, tmp_path: Path) -> None:
    plot = tmp_path / "load.svg"
    options = ("--concurrency", "3", "--requests", "7", "--image-size", "64x64", "--plot", str(plot))
    result = found(tiny_engine, *options)
    assert [result[name] for name in ("offered", "done", "refused", "failed", "new_tokens")] == [7, 7, 0, 0, 21]
    assert result["concurrency"] == 3 and result["rate"] is None and result["max_sequences"] == 8
    for name in NAMES:
        values = [result[name][q] for q in ("p50", "p90", "p95", "p99")]
        assert values == sorted(values) and values[0] >= 0
    assert 1 <= result["batch_size"] <= 3 and result["cached_images"] == result["cached_tokens"] == 0
    words = "".join(ElementTree.parse(plot).getroot().itertext())
    assert "time to first token" in words and "tokens of answers a second" in words


def test_requests_at_a_rate(tiny_engine: Path) -> None:
    options = ("--rate", "500", "--requests", "20", "--image-size", "none", "--max-sequences", "1", "--max-queue", "2")
    result = found(tiny_engine, *options)
    assert result["offered"] == 20 and result["done"] + result["refused"] == 20 and result["done"] > 0
    assert result["max_sequences"] == 1 and result["batch_size"] == 1.0


def test_a_shared_prefix_is_found_in_the_cache(tiny_engine: Path) -> None:
    options = ("--concurrency", "2", "--requests", "4", "--image-size", "none", "--shared-prefix", "60")
    assert found(tiny_engine, *options)["prefix_hits"] == 4
    assert found(tiny_engine, *options, "--no-prefix-cache")["cached_tokens"] == 0


def test_lines_for_readers(tiny_engine: Path) -> None:
    code, out, _ = run(tiny_engine, "--concurrency", "2", "--duration", "0.2", "--image-size", "none")
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names[:4] == ["device", "engine", "requests", "speed"] and "cache hits" in names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rate", "0"), "--rate 0.0: expected a number above 0"),
        (("--rate", "nan"), "--rate nan"),
        (("--concurrency", "2", "--duration", "-1"), "--duration -1.0"),
        (("--concurrency", "2", "--runs", "9"), "--repeats is of one request at a time"),
        (("--requests", "3"), "--requests needs many requests"),
        (("--plot", "load.svg"), "--plot needs many requests"),
        (("--concurrency", "2", "--plot", "load.pdf"), "a plot is a .png or a .svg file"),
        (("--concurrency", "2", "--vision-cache-bytes", "-1"), "--vision-cache-bytes = -1"),
        (("--concurrency", "2", "--max-delay-ms", "0"), "--max-delay-ms must be in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(tiny_engine: Path, options: tuple[str, ...], said: str) -> None:
    code, _, err = run(tiny_engine, *options)
    assert code == UsageError.exit_code and said in err
