"""Results of a sweep that nobody measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen3vl_export.bench.measure import PHASES
from qwen3vl_export.bench.points import Point
from qwen3vl_export.bench.results import EngineFacts, Result, Times
from qwen3vl_export.reports.environment import Environment

ENVIRONMENT = Environment(
    cpu="Abacus",
    cpu_features=("avx2",),
    isa="avx2",
    cores=2,
    threads=2,
    memory_bytes=24_000_000_000,
    gpus=(),
    system="Linux 6.1",
    versions={"qwen3vl-export": "0.1.0", "onnxruntime": "1.32.0"},
    load_average=0.1,
)
ENGINE = EngineFacts(
    engine="demo",
    target="ort-cpu-fp32",
    model="demo",
    files_sha256="ab" * 32,
    device="Abacus",
    threads=2,
    load_s=0.5,
    decode_recorded=None,
    decode_kernels=None,
    memory_bytes={"weights": 13_000_000, "KV cache": 200_000_000, "vision": 2_000_000},
)
SHORT = Point(128, 32)
LONG = Point(512, 32, 4, (448, 448), 2)
SAMPLES = (0.010, 0.011, 0.012, 0.013, 0.014)


def result(
    point: Point = SHORT,
    samples: Sequence[float] = SAMPLES,
    *,
    environment: Environment = ENVIRONMENT,
    **engine: Any,
) -> Result:
    """A point whose times to the first token are the samples; later tokens take a tenth."""
    return Result(
        engine=replace(ENGINE, **engine),
        point=point,
        prompt_tokens=point.text_tokens + 8,
        visual_tokens=196 * point.images,
        cached_tokens=0,
        warmup_s=2.0,
        ttft_s=Times(tuple(samples)),
        tpot_s=Times(tuple(each / 10 for each in samples)),
        latency_s=Times(tuple(4 * each for each in samples)),
        phases_s=dict.fromkeys(PHASES, 0.0025),
        rss_peak_bytes=150_000_000,
        environment=environment,
    )
