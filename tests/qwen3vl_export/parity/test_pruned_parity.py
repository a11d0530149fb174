"""`verify --visual-token-share`: an engine that prunes agrees with PyTorch on the same tokens; a broken one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.preparation
from qwen3vl_export.parity.reference import OWN
from qwen3vl_export.parity.report import Report
from qwen3vl_export.parity.verify import verify
from runtime.contract import DecoderInputs
from runtime.errors import UsageError
from runtime.positions import PromptPositions, VisualSpan
from runtime.sessions.ort_cpu import OrtCpuSession

SHARE, STEPS = 0.5, 4


def compared(engine: Path, checkpoint: Path, share: float = SHARE) -> Report:
    return verify(engine, str(checkpoint), max_new_tokens=STEPS, reference=OWN, visual_token_share=share)


def break_positions(
    patch: pytest.MonkeyPatch, change: Callable[[PromptPositions, VisualSpan], PromptPositions]
) -> None:
    """Change the positions of prompts whose kept tokens are known."""
    original = runtime.preparation.mrope_positions

    def changed(num_tokens: int, spans: Sequence[VisualSpan]) -> PromptPositions:
        found = original(num_tokens, spans)
        pruned = [span for span in spans if isinstance(span.kept, tuple)]
        return change(found, pruned[0]) if pruned else found

    patch.setattr(runtime.preparation, "mrope_positions", changed)


def positions_renumbered(patch: pytest.MonkeyPatch) -> None:
    """The kept tokens stand side by side, as the first ones of the grid do."""

    def change(found: PromptPositions, span: VisualSpan) -> PromptPositions:
        position_ids = found.position_ids.copy()
        places = np.indices(span.merged_grid_thw).reshape(3, -1)[:, : span.num_tokens]
        position_ids[:, 0, span.start : span.end] = position_ids[:, 0, span.start - 1 : span.start] + 1 + places
        return replace(found, position_ids=position_ids)

    break_positions(patch, change)


def rows_of_other_tokens(patch: pytest.MonkeyPatch) -> None:
    """The first rows of the segment, in place of those of the kept tokens."""

    def change(found: PromptPositions, span: VisualSpan) -> PromptPositions:
        rows = found.visual_rows.copy()
        first = int(rows[0, span.start]) - span.kept[0]  # type: ignore[index]
        rows[0, span.start : span.end] = first + np.arange(span.num_tokens)
        return replace(found, visual_rows=rows)

    break_positions(patch, change)


def text_follows_the_kept_tokens(patch: pytest.MonkeyPatch) -> None:
    """The text after an image goes on as if the image were smaller."""

    def change(found: PromptPositions, span: VisualSpan) -> PromptPositions:
        position_ids = found.position_ids.copy()
        position_ids[:, :, span.end :] -= 1
        return replace(found, position_ids=position_ids)

    break_positions(patch, change)


def delta_of_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    """The answer's positions are counted from the pruned prompt's length with the whole one's difference."""
    original = runtime.preparation.mrope_positions

    def changed(num_tokens: int, spans: Sequence[VisualSpan]) -> PromptPositions:
        found = original(num_tokens, spans)
        num_pruned = sum(span.num_rows - span.num_tokens for span in spans)
        return replace(found, delta=found.delta - num_pruned)

    patch.setattr(runtime.preparation, "mrope_positions", changed)


def deepstack_rows_of_other_tokens(patch: pytest.MonkeyPatch) -> None:
    """Of the levels behind the first, each token takes the row before its own."""
    original = OrtCpuSession.prefill

    def changed(session: OrtCpuSession, inputs: DecoderInputs, cache: Any, slot: int = 0) -> Any:
        assert isinstance(inputs.visual_embeds, np.ndarray)
        embeds = inputs.visual_embeds.copy()
        embeds[1:] = np.roll(embeds[1:], 1, axis=1)
        return original(session, replace(inputs, visual_embeds=embeds), cache, slot)

    patch.setattr(OrtCpuSession, "prefill", changed)


def test_a_pruned_engine_agrees(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    report = compared(tiny_engine, tiny_checkpoint)
    assert report.passed
    cases = {check.case for check in report.checks}
    assert {"text", "large images", "video", "small chunks"} <= cases
    assert any("visual tokens did not stay" in note for note in report.notes)


@pytest.mark.parametrize(
    ("sabotage", "noticed_by"),
    [
        (positions_renumbered, ("large images", "keys", 0)),
        (rows_of_other_tokens, ("large images", "keys", 0)),
        (text_follows_the_kept_tokens, ("large images", "keys", 0)),
        (deepstack_rows_of_other_tokens, ("large images", "keys", 1)),
        (delta_of_the_whole_prompt, ("large images", "greedy logits", None)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_notices_what_pruning_breaks(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    noticed_by: tuple[str, str, int | None],
    tiny_engine: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    report = compared(tiny_engine, tiny_checkpoint)
    first = next(check for check in report.checks if not check.passed)
    print(first)  # pytest -rP shows the margin
    assert (first.case, first.name, first.layer) == noticed_by
    assert first.limit is not None and first.value > 5 * first.limit


def test_what_cannot_be_compared_is_refused(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="transformers does not prune"):
        verify(tiny_engine, str(tiny_checkpoint), visual_token_share=SHARE)
    with pytest.raises(UsageError, match="keeps every token"):
        compared(tiny_engine, tiny_checkpoint, share=0.999)
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        compared(tiny_engine, tiny_checkpoint, share=0)
