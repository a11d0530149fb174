"""Compare an engine, or lowered graphs, with a reference in PyTorch on the same pixels, prompt by prompt.

The reference is untouched transformers, or on request our own definition of the model (reference.py).

Compared are prompt and pixels with those of the Hugging Face processor; every level of the vision graph; the decoder
layer by layer; the logits of every prompt token and of greedy steps after the reference's tokens; and the tokens of
`generate`, each after the engine's own.

A decoder layer is compared by the keys and values that it writes into the cache: of all that happens in a layer, only
they are outputs of every target's graph. Those of layer i are its input after one norm, one product and the rotary
embedding. What else goes wrong in layer i (q-norm, attention, MLP, the DeepStack level added after it) shows first in
layer i + 1, and in the logits if i is the last. So do values that are not finite; a note names where they show first.
The blocks of the vision tower have no output but the levels: level 0 depends on all blocks, a DeepStack level on those
up to its own.

Where the engine chose another expert, the reference follows it (routes.py); that has limits of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.parity.cache_codes import CodeRanges
from qwen3vl_export.parity.cases import Case, make_cases
from qwen3vl_export.parity.details import CaseDetails, Compared, details_of
from qwen3vl_export.parity.limits import limits_of
from qwen3vl_export.parity.lowered import CPU_NOTE, is_lowered, manifests_of, open_model_of, route_notes
from qwen3vl_export.parity.metrics import Agreement, agreement, difference, kl_divergence, relative_by_position
from qwen3vl_export.parity.own_reference import OwnReference
from qwen3vl_export.parity.pruned import kept_tokens, token_scores
from qwen3vl_export.parity.reference import OWN, TRANSFORMERS, Reference, ReferenceOutput, segments_by_kind
from qwen3vl_export.parity.report import Check, Report
from qwen3vl_export.parity.routes import Followed, follow
from qwen3vl_export.parity.transformers_reference import FOLLOWED_NOTE, TransformersReference, check_installed
from qwen3vl_export.routing import Assignment, RouterStatistics
from runtime.contract import FloatArray
from runtime.errors import EngineError, UsageError
from runtime.image_processor import ProcessedImage
from runtime.input_limits import token_share
from runtime.video.processor import ProcessedVideo

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Prepared
    from runtime.session import KVCache

DEFAULT_NEW_TOKENS = 64
_ROUTES = "widest gap of routes"
# Laid over the checkpoint's own defaults: the most likely token each time, the end of the sequence like any other.
PLAIN_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": (),
    "eos_token_ids": (),
}


def verify(
    engine: Path,
    checkpoint: str,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    reference: str = TRANSFORMERS,
    route: Mapping[str, Path] | None = None,
    visual_token_share: float = 1.0,
    on_case: Callable[[str], None] | None = None,
    on_details: Callable[[CaseDetails], None] | None = None,
) -> Report:
    """Compare an engine with the checkpoint it was built from.

    Args:
        engine: The engine folder, or one of lowered graphs.
        checkpoint: What `Checkpoint.open` takes.
        max_new_tokens: Greedy tokens of each case, at least 1.
        reference: `transformers`, or `own` where that is not installed.
        route: Engines that run a part in its place, by option (`runtime.route.RouteKeywords`).
        visual_token_share: Of the visual tokens, how many stay in the prompts. Below 1, the reference is `own`, which
            runs the whole prompt's tokens that the engine chose, with their positions in the whole prompt.
        on_case: Told the name of each case before it is compared.
        on_details: Given what was seen of each case beyond its checks, for a report with pictures.

    Raises:
        CheckpointError, EngineError: One of the two does not open.
        ParityError: The two are of different shapes, there are no tolerances for the engine's precision, or lowered
            graphs do not run on the CPU.
        UsageError: transformers or torchvision is not installed, but the reference needs it; or the share is not above
            0 and at most 1, is given for transformers, or is so high that every token stays.
    """
    share = _checked_share(visual_token_share, reference)
    if reference == TRANSFORMERS:
        check_installed()  # before the engine is opened
    source = Checkpoint.open(checkpoint)
    source.entries  # noqa: B018  (transformers' own messages about damaged files help nobody)
    source.assets()
    model = open_model_of(source, engine, route=route)
    precision, limits = limits_of(*manifests_of(model))
    codes = CodeRanges.of(engine, model.manifest)
    torch_model, routers = _open_reference(reference, source), RouterStatistics()
    model.preparation = replace(model.preparation, keeps_markers=torch_model.keeps_markers)
    checks: list[Check] = []
    notes: list[str] = []
    num_pruned = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in make_cases(Path(folder), with_large=share < 1):
            if on_case is not None:
                on_case(case.name)
            comparison = _Comparison(case, model, torch_model, limits, codes, on_details, share)
            checks += comparison.run(max_new_tokens)
            notes += comparison.notes
            num_pruned += comparison.num_pruned
            routers.merge(comparison.routers)
    if share < 1:
        notes.append(_pruning_note(share, num_pruned))
    notes = [*([CPU_NOTE] if is_lowered(engine) else route_notes(model)), *notes, *dict.fromkeys(torch_model.notes)]
    if reference == TRANSFORMERS and any(check.name == _ROUTES for check in checks):
        notes.append(FOLLOWED_NOTE)
    return Report(model.manifest.target, checkpoint, precision, tuple(checks), tuple(notes), routers, torch_model.name)


def _pruning_note(share: float, num_pruned: int) -> str:
    if not num_pruned:
        raise UsageError(f"visual_token_share={share} keeps every token of the prompts", remedy="pass a lower share")
    return f"visual_token_share {share:g}: {num_pruned} visual tokens did not stay in the prompts"


def _checked_share(visual_token_share: float, reference: str) -> float:
    share = token_share("visual_token_share", visual_token_share)
    if share < 1 and reference != OWN:
        raise UsageError(
            f"visual_token_share: {reference} does not prune, so it cannot judge",
            remedy="compare with this package's own definition: reference='own' (--reference own)",
        )
    return share


def _open_reference(kind: str, checkpoint: Checkpoint) -> Reference:
    if kind == OWN:
        return OwnReference(load(checkpoint))
    if kind == TRANSFORMERS:
        return TransformersReference(checkpoint)
    raise UsageError(f"unknown reference {kind!r}", remedy=f"give one of {TRANSFORMERS}, {OWN}")


@dataclass(frozen=True)
class _Decoded:
    """What the engine's decoder gives for a prompt of S tokens and N tokens after it, all but the last of them given.

    Attributes:
        layers: Keys and values of each layer, [1, K, S+N-1, H].
        logits: [S, vocab] of the prompt.
        step_logits: [N, vocab], the first of them the prompt's last.
    """

    layers: list[tuple[FloatArray, FloatArray]]
    logits: FloatArray
    step_logits: FloatArray


class _Comparison:
    """The checks of one case, a note on where its values stop being finite, and what the reference's routers did."""

    def __init__(
        self,
        case: Case,
        model: Qwen3VLModel,
        reference: Reference,
        limits: dict[str, float],
        codes: CodeRanges | None,
        on_details: Callable[[CaseDetails], None] | None,
        share: float = 1.0,
    ) -> None:
        self._case = case
        self._share = share
        self._model = model
        self._reference = reference
        self._limits = limits
        self._codes = codes
        self._on_details = on_details
        self._checks: list[Check] = []
        self._last_finite, self._is_finite = "", True
        self._scores: FloatArray | None = None
        self.notes: list[str] = []
        self.routers = RouterStatistics()
        self.num_pruned = 0

    def run(self, num_steps: int) -> list[Check]:
        prepared = self._model.prepare(self._case.messages, visual_token_share=self._share)
        if not self._compare_inputs(prepared):
            self._tell(prepared, None)
            return self._checks  # of another prompt, nothing else can be compared
        embeds = self._model.encode_images(prepared.images)
        self._scores = token_scores(self._model, prepared)
        self.num_pruned = prepared.num_pruned_tokens
        followed, found = self._run_both(prepared, embeds, num_steps)
        expected = followed.output
        self.routers = expected.routers
        self._compare_vision(embeds, expected)
        self._compare_decoder(len(prepared.prompt.input_ids), found, expected)
        self._compare_routes(followed)
        self._compare_answer(expected)
        visual = None if expected.visual_embeds is None else (embeds, expected.visual_embeds)
        logits = _all_logits(found), _all_logits(expected)
        self._tell(prepared, Compared(visual, (found.layers, expected.layers), logits, expected.tokens))
        return self._checks

    def _tell(self, prepared: Prepared, compared: Compared | None) -> None:
        """Hand on what a report with pictures shows, if one was asked for."""
        if self._on_details is not None:
            tokenizer, settings = self._model.tokenizer, self._model.preparation.inputs
            self._on_details(
                details_of(self._case.name, prepared, compared, self._limits, tokenizer=tokenizer, settings=settings)
            )

    def _add(self, name: str, value: float, limit: float | None = None, **fields: Any) -> None:
        self._checks.append(Check(self._case.name, name, float(value), limit, **fields))

    def _add_tensor(
        self, name: str, found: FloatArray, expected: FloatArray, limit: float, layer: int | None = None
    ) -> None:
        diff = difference(found, expected)
        detail = {"max_abs": diff.max_abs, "cosine": diff.cosine}
        self._add(name, diff.relative, limit, layer=layer, detail=detail)

    def _find_not_finite(self, place: str, values: FloatArray) -> None:
        """Note the first place where a value of the engine is not finite; called in the order of computation."""
        if not self._is_finite:
            return
        bad = np.argwhere(~np.isfinite(values))
        if not len(bad):
            self._last_finite = place
            return
        self._is_finite = False
        since = f"; those before it, up to {self._last_finite}, are finite" if self._last_finite else ""
        where = ", ".join(map(str, bad[0]))
        self.notes.append(
            f"{self._case.name}: {len(bad)} of {values.size} values are not finite in {place}, the first at [{where}] "
            f"of {list(values.shape)}{since}"
        )

    def _compare_inputs(self, prepared: Prepared) -> bool:
        """Compare with the processor and return whether the prompts are the same, pixels aside."""
        expected = self._reference.inputs(self._case.messages)
        if expected is None:
            return True
        same_ids = expected["input_ids"][0].tolist() == list(prepared.prompt.input_ids)
        self._add("token ids differ from processor", not same_ids, 0)
        if not prepared.images:
            return same_ids
        grids = {
            "image_grid_thw": [list(each.grid_thw) for each in prepared.inputs if isinstance(each, ProcessedImage)],
            "video_grid_thw": [list(each.grid_thw) for each in prepared.inputs if isinstance(each, ProcessedVideo)],
        }
        same_grids = all(expected[name].tolist() == found for name, found in grids.items() if found)
        self._add("grid_thw differs from processor", not same_grids, 0)
        if same_grids:
            pixels = segments_by_kind(prepared)
            # A grey level is 1 / 255 before it is divided by the channel's standard deviation.
            scale = 255 * max(self._model.image_config.image_std)
            levels = max(float(np.abs(found - expected[name]).max()) for name, found in pixels.items()) * scale
            self._add("pixels, grey levels", levels, self._limits["pixel_levels"])
        return same_ids and same_grids

    def _run_both(self, prepared: Prepared, embeds: FloatArray, num_steps: int) -> tuple[Followed, _Decoded]:
        """Run reference and engine, the reference with the experts that the engine chose."""
        decoded: dict[tuple[int, ...], _Decoded] = {}
        tokens: list[int] = []
        reference, judged = self._reference, prepared
        if prepared.num_pruned_tokens:
            assert isinstance(reference, OwnReference), "no other one prunes"
            judged = self._model.prepare(self._case.messages, visual_token_share=1)
            reference = reference.keeping(kept_tokens(judged, prepared, embeds, self._scores))

        def run(swapped: frozenset[Assignment]) -> ReferenceOutput:
            nonlocal tokens
            output = reference.run(judged, num_steps, swapped=swapped, likely_tokens=tokens)
            tokens = output.tokens
            return output

        def decode(tokens: tuple[int, ...]) -> _Decoded:
            if tokens not in decoded:
                decoded.clear()
                decoded[tokens] = self._decode(prepared, embeds, tokens)
            return decoded[tokens]

        followed = follow(run, lambda output: self._errors(decode(tuple(output.tokens)), output))
        return followed, decode(tuple(followed.output.tokens))

    def _compare_routes(self, followed: Followed) -> None:
        for layer, routing in followed.output.routers.layers.items():
            gaps = [gap for place, gap in followed.gaps.items() if place[0] == layer]
            if not gaps:
                continue
            detail = {"assignments": len(gaps), "share": len(gaps) / routing.num_tokens}
            self._add(_ROUTES, max(gaps), self._limits["router_gap"], layer=layer, detail=detail)
        if not followed.is_complete:
            self.notes.append(
                f"{self._case.name}: after {followed.num_runs} runs of PyTorch, no more assignments were followed"
            )

    def _decode(self, prepared: Prepared, embeds: FloatArray, tokens: tuple[int, ...]) -> _Decoded:
        """Run the engine. It sees the reference's tokens, so that a near-tie does not make all later steps differ."""
        from runtime import generation

        session, ids, positions = self._model.session, prepared.prompt.input_ids, prepared.positions
        cache = session.new_cache(len(ids) + len(tokens))
        chunk = min(self._case.chunk, generation.chunk_limit(self._model.manifest.capabilities, all_logits=True))
        prompt = prepared.decoder_inputs(embeds, all_logits=True, token_scores=self._scores)
        logits = generation.prefill(session, cache, prompt, chunk=chunk)
        # Before any step, which may write over what the prompt wrote.
        prompt_layers = self._rows(cache, 0, len(ids))
        taken: list[FloatArray] = []

        def choose(step_logits: FloatArray) -> int:
            taken.append(np.array(step_logits))
            return tokens[len(taken) - 1]

        steps = generation.decode_steps(session, cache, logits[-1], len(ids), positions.delta, embeds[:, :1], choose)
        for _ in tokens:
            next(steps)
        step_layers = self._rows(cache, len(ids), len(ids) + len(tokens) - 1)
        layers = [
            (np.concatenate([keys, more_keys], axis=2), np.concatenate([values, more_values], axis=2))
            for (keys, values), (more_keys, more_values) in zip(prompt_layers, step_layers, strict=True)
        ]
        return _Decoded(layers, logits, np.stack(taken))

    def _rows(self, cache: KVCache, start: int, end: int) -> list[tuple[FloatArray, FloatArray]]:
        """Return a copy of some rows of every layer's keys and values."""
        return [
            (keys[:, :, start:end].astype(np.float32), values[:, :, start:end].astype(np.float32))
            for keys, values in map(cache.layer, range(self._model.config.text.num_layers))
        ]

    def _errors(self, found: _Decoded, expected: ReferenceOutput) -> list[NDArray[np.float64]]:
        """Return the errors of each position, in units of their limits: of each layer, and of the logits."""
        errors = [
            np.maximum(*map(relative_by_position, ours, theirs)) / self._limits["cache_relative"]
            for ours, theirs in zip(found.layers, expected.layers, strict=True)
        ]
        ours, theirs = _all_logits(found), _all_logits(expected)
        scale = max(1.0, float(np.std(theirs))) * self._limits["logits_scaled"]
        return [*errors, np.abs(ours - theirs).max(-1).astype(np.float64) / scale]

    def _compare_vision(self, embeds: FloatArray, expected: ReferenceOutput) -> None:
        if expected.visual_embeds is not None:
            limit = self._limits["visual_embeds_relative"]
            for level in (*range(1, len(embeds)), 0):  # level 0 is that of the last block
                self._find_not_finite(f"visual_embeds level {level}", embeds[level])
                self._add_tensor(f"visual_embeds level {level}", embeds[level], expected.visual_embeds[level], limit)

        if expected.token_scores is not None and self._scores is not None:
            limit = self._limits["visual_embeds_relative"]
            self._add_tensor("token_scores", self._scores, expected.token_scores, limit)

    def _compare_decoder(self, prompt_length: int, found: _Decoded, expected: ReferenceOutput) -> None:
        for layer, pairs in enumerate(zip(found.layers, expected.layers, strict=True)):
            for name, ours, theirs in zip(("keys", "values"), *pairs, strict=True):
                rows, wanted = ours[:, :, :prompt_length], theirs[:, :, :prompt_length]
                self._find_not_finite(f"the {name} of layer {layer}", rows)
                self._add_tensor(name, rows, wanted, self._limits["cache_relative"], layer)
            # Of the prompt alone: greedy text behind an answer may be like nothing that calibration saw.
            wanted = tuple(part[:, :, :prompt_length] for part in pairs[1])
            beyond = None if self._codes is None else self._codes.share_beyond(layer, *wanted)
            if beyond is not None:
                self._add("keys beyond the codes", beyond[0], self._limits["cache_beyond"], layer=layer)
                self._add("values beyond the codes", beyond[1], self._limits["cache_beyond"], layer=layer)
        self._find_not_finite("the logits of the prompt", found.logits)
        self._compare_logits("prompt", "top1_agreement", found.logits, expected.logits)
        self._find_not_finite("the logits of greedy steps", found.step_logits)
        self._compare_logits("greedy", "greedy_agreement", found.step_logits, expected.step_logits)

    def _compare_logits(self, name: str, agreement_limit: str, found: FloatArray, expected: FloatArray) -> None:
        diff = difference(found, expected)
        detail = {"max_abs": diff.max_abs, "relative": diff.relative, "cosine": diff.cosine}
        self._add(f"{name} logits", diff.scaled, self._limits["logits_scaled"], detail=detail)
        if (least := self._limits.get("logits_cosine")) is not None:
            self._add(f"{name} logits cosine", diff.cosine, least, is_minimum=True)
        kl = kl_divergence(found, expected)
        self._add(f"{name} KL, nats", float(kl.max()), detail={"mean": float(kl.mean())})
        same = agreement(found.argmax(-1), expected, self._limits["near_tie_gap"])
        detail = {"tokens": same.total, "differing": list(same.differing), "near_ties": _near_ties(same)}
        self._add(f"{name} tokens agree", same.share, self._limits[agreement_limit], is_minimum=True, detail=detail)

    def _compare_answer(self, expected: ReferenceOutput) -> None:
        """Compare the tokens of `generate` up to the first that differs; if that is a near-tie, all agree."""
        total = len(expected.tokens)
        try:
            asked = {"max_new_tokens": total, "visual_token_share": self._share, **PLAIN_GREEDY}
            found = self._model.generate(self._case.messages, **asked).token_ids
        except EngineError as error:  # it gives logits that are not finite
            detail = {"tokens": total, "error": error.message}
            self._add("answer agrees", 0.0, self._limits["greedy_agreement"], is_minimum=True, detail=detail)
            return
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, expected.tokens, strict=True)))
        compared = slice(num_same + 1)
        same = agreement(np.array(found[compared]), expected.step_logits[compared], self._limits["near_tie_gap"])
        share = 1.0 if same.near_ties else num_same / total
        detail = {"tokens": total, "near_ties": _near_ties(same)}
        self._add("answer agrees", share, self._limits["greedy_agreement"], is_minimum=True, detail=detail)


def _all_logits(output: _Decoded | ReferenceOutput) -> FloatArray:
    """Return the logits of prompt and steps, [S+N-1, vocab]; the first step's are the prompt's last."""
    return np.concatenate([output.logits, output.step_logits[1:]])


def _near_ties(same: Agreement) -> list[dict[str, Any]]:
    return [{"position": position, "gap": gap} for position, gap in same.near_ties]
