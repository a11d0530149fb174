"""The tables of docs/mixture_of_experts.md."""

from __future__ import annotations

from benchmarks import mixture


def test_tables_of_the_document() -> None:
    points = {"decode-0-b1": 0.02, "decode-512-b1": 0.025, "prefill-512-b1": 1.024}
    side = {
        "points": {name: {"median_s": seconds} for name, seconds in points.items()},
        "decoder_bytes": 300_000_000,
        "cache_token_bytes": 1e5,
        "cache_bytes": 50_000_000,
        "peak_rss_bytes": 3_300_000_000,
        "load_s": 3.5,
        "export": {"size_bytes": 2_850_000_000},
    }
    compared = {
        "settings": {"threads": 2},
        "ceilings": {"memory_bytes_per_s": 30e9},
        "sides": {"ort-cpu-int4": side},
        "config": {"text_config": {"num_hidden_layers": 4}},
    }
    whole = {"checkpoint_bytes": 100, "disk_bytes": 17, "config": {"text_config": {"num_hidden_layers": 48}}}
    run = {"wall_s": 50.0, "cpu_s": 80.0, "peak_rss_bytes": 1_000_000_000}
    export = {"model": "x", "target": "ort-cpu-int4", "runs": [run], "checkpoint_bytes": 5_000_000_000}
    text = mixture.tables(
        {
            "compare-qwen3-vl-30b-a3b-4-layers": compared,
            "compare-qwen3-vl-30b-a3b": compared | whole,
            "export-x-ort-cpu-int4": export | {"no_weights": False},
            "export-x-ort-cpu-int4-no-weights": export | {"no_weights": True},
            "export-y-ort-cpu-int4": export | {"no_weights": False, "disk_bytes": 500_000_000},
            "export-x-ort-cpu-fp32": {"target": "ort-cpu-fp32"},
        }
    )
    for layers in (4, 48):
        cells = f"| {layers} | ort-cpu-int4 | 50.0 (50 %) | 40.0 (47 %) | 500 | 300 | 3.5 | 2.85 | 0.05 | 3.30 | 0.40 |"
        assert cells in text
    assert "Of the checkpoint's bytes 17 % were written" in text and text.count("were written") == 1
    assert "| x | ort-cpu-int4 | yes | 5.0 | 50.0 | 80.0 | 0.100 | 1.00 |" in text
    assert "| x | ort-cpu-int4 | 10 %, else zeros in holes | 5.0 | 50.0 | 80.0 | 0.100 | 1.00 |" in text
    assert "| x | ort-cpu-int4 | no | 5.0 | 50.0 | 80.0 |  | 1.00 |" in text
    assert "fp32" not in text
