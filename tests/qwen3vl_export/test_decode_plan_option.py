"""`--decode-plan` and `--compute-capability` of ort-cuda targets: what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen3vl_export.export import export
from qwen3vl_export.request import ExportRequest
from runtime.errors import UsageError


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("ort-cpu-int4", {"decode_plan": True}, "^--decode-plan: ort-cpu-int4 takes no decode plan"),
        ("ort-cpu-int4", {"decode_plan": False}, "^--no-decode-plan: ort-cpu-int4 takes no decode plan"),
        ("ort-cuda-fp16", {"decode_plan": True, "compile": False}, "^--decode-plan: --no-compile"),
        ("ort-cuda-fp16", {"compute_capability": ["9.0"], "compile": False}, "^--compute-capability: --no-compile"),
        ("ort-cuda-fp16", {"compute_capability": ["9.0"], "decode_plan": False}, "^--compute-capability is for"),
        ("ort-cuda-fp16", {"compute_capability": ["7.5"]}, "^--compute-capability 7.5: no decode kernels"),
    ],
)
def test_an_option_that_has_no_effect_is_refused(
    target: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(ExportRequest("demo", target=target, output=tmp_path / "engine", **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wanted", "option"), [(True, "--decode-plan"), (False, "--no-decode-plan")])
def test_a_bundle_has_no_decode_plan(wanted: bool, option: str) -> None:
    with pytest.raises(UsageError, match=f"^{option} is a target's"):
        ExportRequest("demo", bundle=Path("b"), decode_plan=wanted)
