"""Compare an engine with untouched transformers: pixels, graph outputs, layers, logits, greedy tokens."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_export.parity.cases import Case, make_cases
from qwen3vl_export.parity.metrics import agreement, difference, kl_divergence
from qwen3vl_export.parity.reference import Floats, Reference, ReferenceOutput, processor_inputs

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Check:
    """One comparison: `value` must be at most `limit`, or at least it where `is_minimum`; no limit is only reported."""

    case: str
    name: str
    value: float
    limit: float | None = None
    is_minimum: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_minimum else self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """All comparisons of one engine."""

    target: str
    checkpoint: str
    precision: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether there are comparisons and all are within their limits."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "passed": self.passed,
            "target": self.target,
            "checkpoint": self.checkpoint,
            "precision": self.precision,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }

    def render(self) -> str:
        """Return a table in plain text."""
        rows = [("case", "comparison", "value", "limit", "", "more")]
        for check in self.checks:
            sign = "≥" if check.is_minimum else "≤"
            limit = "" if check.limit is None else f"{sign} {check.limit:g}"
            more = ", ".join(f"{key} {_short(value)}" for key, value in check.detail.items())
            verdict = "" if check.limit is None else "ok" if check.passed else "FAILED"
            rows.append((check.case, check.name, f"{check.value:.3g}", limit, verdict, more))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]).rstrip() for row in rows
        ]
        verdict = "passed" if self.passed else "FAILED"
        return "\n".join([*lines, f"{self.target} against {self.checkpoint} ({self.precision}): {verdict}"])


def verify(
    engine: Path, checkpoint: str, *, max_new_tokens: int = DEFAULT_NEW_TOKENS, engine_model: Any = None
) -> Report:
    """Compare an engine with the checkpoint it was built from.

    Args:
        engine: The engine folder.
        checkpoint: What `Checkpoint.open` takes.
        max_new_tokens: Greedy tokens of each case, teacher-forced on the reference's, at least 1.
        engine_model: An opened `Qwen3VLModel` to use instead of opening `engine`.

    Raises:
        CheckpointError, EngineError: One of the two does not open.
        ParityError: There are no tolerances for the engine's precision.
    """
    import configs
    from qwen3vl_export.checkpoint import Checkpoint
    from runtime.errors import ParityError
    from runtime.model import Qwen3VLModel

    source = Checkpoint.open(checkpoint)
    model = Qwen3VLModel.from_engine(engine) if engine_model is None else engine_model
    # A target is named <file>-<precision>.
    precision = model.manifest.target.rpartition("-")[2]
    tolerances = configs.load("tolerances")
    if precision not in tolerances:
        raise ParityError(f"configs/tolerances.toml has no table [{precision}]", remedy="add it, with its reasons")
    reference = Reference(source.folder)
    try:
        with tempfile.TemporaryDirectory() as folder:
            checks: list[Check] = []
            for case in make_cases(Path(folder)):
                checks += _Comparison(case, tolerances[precision]).run(model, reference, source.folder, max_new_tokens)
    finally:
        reference.close()
    return Report(model.manifest.target, checkpoint, precision, tuple(checks))


class _Comparison:
    """The checks of one case."""

    def __init__(self, case: Case, limits: dict[str, float]) -> None:
        self._case = case
        self._limits = limits
        self._checks: list[Check] = []

    def run(self, model: Any, reference: Reference, folder: Path, num_steps: int) -> list[Check]:
        from runtime.image_processor import process_image

        prepared = model.prepare(self._case.messages)
        ids, spans = prepared.prompt.input_ids, prepared.prompt.spans
        # The reference's images are read here, in the case's order: a runtime that mixes them up must not go unseen.
        images = [process_image(path, model.image_config) for path in self._case.images]
        fits = [length for _, length in spans] == [image.num_visual_tokens for image in images]
        self._add("image spans wrong", float(not fits), 0)
        if not fits:
            return self._checks
        self._compare_processor(processor_inputs(folder, self._case.messages), ids, images, model.image_config)
        expected = reference.run(
            ids,
            [i for start, length in spans for i in range(start, start + length)],
            [image.pixel_values for image in images],
            [image.grid_thw for image in images],
            num_steps,
        )
        self._compare_engine(model, prepared, expected)
        return self._checks

    def _add(
        self, name: str, value: float, limit: float | None = None, *, is_minimum: bool = False, **detail: Any
    ) -> None:
        self._checks.append(Check(self._case.name, name, float(value), limit, is_minimum, detail))

    def _add_difference(self, name: str, found: Floats, expected: Floats, limit: float, **detail: Any) -> None:
        if found.shape != expected.shape:
            self._add(name, float("inf"), limit, found=list(found.shape), expected=list(expected.shape))
            return
        diff = difference(found, expected)
        self._add(name, diff.scaled, limit, max_abs=diff.max_abs, relative=diff.relative, cosine=diff.cosine, **detail)

    def _compare_processor(self, inputs: dict[str, Any] | None, ids: list[int], images: list[Any], config: Any) -> None:
        if inputs is None:
            return
        self._add("token ids differ from processor", float(inputs["input_ids"][0].tolist() != list(ids)), 0)
        if not images:
            return
        grids = [list(image.grid_thw) for image in images]
        same_grids = inputs["image_grid_thw"].tolist() == grids
        self._add("grid_thw differs from processor", float(not same_grids), 0)
        if same_grids:
            ours = np.concatenate([image.pixel_values for image in images])
            # A grey level is 1 / 255 before it is divided by the channel's standard deviation.
            levels = float(np.abs(ours - inputs["pixel_values"]).max()) * 255 * max(config.image_std)
            self._add("pixels, grey levels", levels, self._limits["pixel_levels"])

    def _compare_engine(self, model: Any, prepared: Any, expected: ReferenceOutput) -> None:
        from runtime import generation

        ids, positions, limits = prepared.prompt.input_ids, prepared.positions, self._limits
        embeds = model.encode_images(prepared.images)
        if expected.visual_embeds is not None:
            for level, reference_level in enumerate(expected.visual_embeds):
                name = f"visual_embeds level {level}"
                self._add_difference(name, embeds[level], reference_level, limits["visual_embeds_relative"])
        num_steps = len(expected.tokens)
        cache = model.session.new_cache(len(ids) + num_steps)
        logits = generation.prefill(model.session, cache, ids, positions, embeds, all_logits=True)
        kinds = ("keys", "values")
        for i, pair in enumerate(expected.layers):
            for kind, found, wanted in zip(kinds, cache.layer(i), pair, strict=True):
                rows = found[:, :, : len(ids)].astype(np.float32)
                self._add_difference(f"layer {i} {kind}", rows, wanted, limits["cache_relative"])
        self._compare_logits("prompt", "top1_agreement", logits, expected.logits)
        # The engine sees the reference's tokens, so that a near-tie does not make all later steps differ.
        taken: list[Floats] = []

        def choose(step_logits: Floats) -> int:
            taken.append(np.array(step_logits))
            return expected.tokens[len(taken) - 1]

        steps = generation.decode_steps(
            model.session, cache, logits[-1], len(ids), positions.delta, embeds[:, :1], choose
        )
        for _ in range(num_steps):
            next(steps)
        self._compare_logits("greedy", "greedy_agreement", np.stack(taken), expected.step_logits)

    def _compare_logits(self, name: str, agreement_limit: str, found: Floats, expected: Floats) -> None:
        self._add_difference(f"{name} logits", found, expected, self._limits["logits_relative"])
        kl = kl_divergence(found, expected)
        self._add(f"{name} KL, nats", float(kl.max()), mean=float(kl.mean()))
        same = agreement(found, expected, self._limits["near_tie_gap"])
        self._add(
            f"{name} tokens agree",
            same.share,
            self._limits[agreement_limit],
            is_minimum=True,
            tokens=same.total,
            differing=list(same.differing),
            near_ties=list(same.near_ties),
        )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
