"""What may be asked of a decode plan, and what is said where none can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.decode_plan import build, options
from engines.decode_plan.options import NO_PLAN, PlanOptions, check_plan
from engines.progress import Progress, Stage
from engines.registry import get
from runtime.errors import TargetError, UsageError

TARGET = "ort-cuda-fp16"


class Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def report(self, stage: Stage, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "triton_version", lambda: "")


def test_gpus_are_those_asked_for() -> None:
    assert [gpu.sm for gpu in PlanOptions().gpus] == [80, 86, 89, 90, 100, 120]
    assert [gpu.sm for gpu in PlanOptions(None, ("12.0", "9.0", "9.0")).gpus] == [90, 120]


@pytest.mark.parametrize("capability", ["7.5", "9", "sm_90", "", "9.0a"])
def test_other_gpus_are_refused(capability: str) -> None:
    with pytest.raises(UsageError, match="no decode kernels are made for it"):
        check_plan(PlanOptions(None, (capability,)), TARGET)


@pytest.mark.parametrize("wanted", [PlanOptions(True), PlanOptions(None, ("9.0",)), PlanOptions(True, ("9.0",))])
def test_a_plan_that_is_asked_for_needs_triton(wanted: PlanOptions, no_triton: None) -> None:
    with pytest.raises(TargetError, match="triton, which is not installed"):
        check_plan(wanted, TARGET)


def test_without_triton_an_export_says_that_it_makes_no_plan(
    demo_bundle: Bundle, tmp_path: Path, no_triton: None
) -> None:
    check_plan(PlanOptions(), TARGET)
    notes = Notes()
    model = demo_bundle.graphs["decoder"]
    assert build.add_plan(tmp_path, model, get(TARGET), demo_bundle.config, PlanOptions(), notes) == {}
    assert "without a decode plan" in notes.texts[0] and "triton" in notes.texts[0]
    assert build.add_plan(tmp_path, model, get(TARGET), demo_bundle.config, NO_PLAN, Notes()) == {}


@pytest.mark.parametrize("wanted", [PlanOptions(True, ("9.0",)), PlanOptions(None, ("9.0",))])
def test_a_graph_that_no_kernel_serves_is_an_error_where_a_plan_is_asked_for(
    wanted: PlanOptions, demo_bundle: Bundle, tmp_path: Path
) -> None:
    # The bundle's own decoder, which was not lowered.
    model = demo_bundle.graphs["decoder"]
    with pytest.raises(TargetError, match="no decode plan can be made: a KV cache of FLOAT, expected"):
        build.add_plan(tmp_path, model, get(TARGET), demo_bundle.config, wanted, Notes())
    notes = Notes()
    assert build.add_plan(tmp_path, model, get(TARGET), demo_bundle.config, PlanOptions(), notes) == {}
    assert "a KV cache of FLOAT, expected" in notes.texts[0]
