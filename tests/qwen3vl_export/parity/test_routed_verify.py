"""`qwen3vl verify` of engines that share the work: it passes, and fails where the fault between them is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import call
from helpers.wrong_rows import layers_swapped, shifted
from qwen3vl_export.cli.run import app
from runtime.manifest import Manifest
from runtime.routed_session import RoutedCache, RoutedSession

STEPS = 4


@pytest.fixture
def copy(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "copy"))


def verify(engine: Path, checkpoint: Path, *arguments: str) -> tuple[int, str, str]:
    options = ("--checkpoint", str(checkpoint), "--reference", "own", "--max-new-tokens", str(STEPS), "--json")
    return call(app, "verify", str(engine), *options, *arguments)


def route(copy: Path) -> tuple[str, ...]:
    return "--prefill-engine", str(copy), "--vision-engine", str(copy)


def first_failed(printed: str) -> dict[str, Any]:
    return next(check for check in json.loads(printed)["checks"] if check["passed"] is False)


def test_a_route_passes_and_is_named(tiny_engine: Path, tiny_checkpoint: Path, copy: Path) -> None:
    code, printed, _ = verify(tiny_engine, tiny_checkpoint, *route(copy))
    report = json.loads(printed)
    assert code == 0 and report["passed"]
    assert {f"prefill_engine: {copy}", f"vision_engine: {copy}"} <= set(report["notes"])
    assert report["precision"] == "fp32"


@pytest.mark.parametrize("fault", [shifted, layers_swapped])
def test_rows_that_arrive_wrong_fail(
    fault: Callable[..., None], tiny_engine: Path, tiny_checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RoutedCache.take_rows
    monkeypatch.setattr(RoutedCache, "take_rows", lambda *arguments: fault(original, *arguments))
    code, printed, _ = verify(tiny_engine, tiny_checkpoint, *route(copy))
    found = first_failed(printed)
    assert code == 9 and found["name"] in ("keys", "values") and found["layer"] == 0


def test_embeddings_of_another_image_fail(
    tiny_engine: Path, tiny_checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RoutedSession.vision

    def vision(session: RoutedSession, inputs: Any) -> Any:
        return original(session, inputs)[:, ::-1]

    monkeypatch.setattr(RoutedSession, "vision", vision)
    code, printed, _ = verify(tiny_engine, tiny_checkpoint, *route(copy))
    assert code == 9 and first_failed(printed)["name"].startswith("visual_embeds")


def test_options_that_a_route_excludes(tiny_engine: Path, tiny_checkpoint: Path, copy: Path) -> None:
    code, _, errors = call(
        app, "verify", str(tiny_engine), "--checkpoint", str(tiny_checkpoint), "--bisect", *route(copy)
    )
    assert code == 2 and "--prefill-engine" in errors
    lowered = copy.parent / "lowered"
    shutil.copytree(copy, lowered)
    manifest = Manifest.read(lowered)
    (lowered / "engine.json").unlink()
    manifest.write(lowered, "lowered.json")
    code, _, errors = verify(lowered, tiny_checkpoint, *route(copy))
    assert code == 2 and "lowered graphs, which run all parts themselves" in errors
