"""`python -m benchmarks visual-tokens`: what pruned visual tokens cost in right answers, and what they save in time.

Right answers: the demo's tasks on held-out canvases, by the share that stays and by the score that chooses. Time: an
engine of a real shape on images of noise, whole and pruned in turns, the parts of the time to the first token.

Shapes: V visual tokens of a segment, D their elements.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from runtime.contract import DecoderInputs, FloatArray, IntArray, on_host
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.positions import mrope_positions
from runtime.visual_pruning.choice import MIN_TOKENS, choose_visual_tokens
from runtime.visual_pruning.scored import ScoredEmbeds

if TYPE_CHECKING:
    from runtime.preparation import Prepared

NAME = "visual-tokens"
SHARES = (1.0, 0.75, 0.5, 0.25)
_SEED = 20261127
_SIDE = 32  # pixels along a side of a visual token, of all published checkpoints
Choose = Callable[[FloatArray, int, FloatArray], IntArray]
"""Takes level 0 of the visual embeddings of one image, [V, D], how many tokens stay, and scores [V]; returns which."""


def visual_tokens(
    canvases: Annotated[
        int, typer.Option(min=0, help="Held-out canvases whose questions are asked; 0 for none.")
    ] = 300,
    engine: Annotated[Path | None, typer.Option(help="Measure times with this engine.", show_default=False)] = None,
    model: options.Model = "qwen3-vl-2b",
    sides: Annotated[str, typer.Option(help="Sides of its images in pixels.")] = "1024,2048",
    share: Annotated[float, typer.Option(help="Share that stays when times are measured.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1, help="Prefills of each prompt, in turns.")] = 3,
    results: options.Results = RESULTS,
) -> None:
    """Measure right answers and times by the share of visual tokens that stays.

    What is not measured this time stays in the result as it was.
    """
    path = results / f"{NAME}.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result["environment"] = measure.environment()
    if canvases:
        result["accuracy"] = [accuracy("demo", demo_prompts(canvases))]
    if engine is not None:
        result["times"] = times(engine, model, [int(side) for side in sides.split(",")], share, rounds)
    write(NAME, result, table(result), results)


def accuracy(checkpoint: str, prompts: Iterable[tuple[str, list[dict[str, Any]], str]]) -> dict[str, Any]:
    """Ask questions with and without pruning, and return shares of right answers by score, share and task.

    Args:
        checkpoint: What `Checkpoint.open` takes.
        prompts: Name of the task, messages and true answer of each question.
    """
    from engines.build import build_engine
    from engines.registry import get
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    choices: dict[str, Choose] = {
        "embeddings": lambda embeds_VD, num_kept, _: choose_visual_tokens(embeds_VD, num_kept),
        "embeddings and token scores": choose_visual_tokens,
        "random": _random_tokens(),
    }
    right: dict[str, dict[str, list[bool]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine"
        build_engine(make_bundle(Checkpoint.open(checkpoint), token_scores=True), get("ort-cpu-fp32"), engine)
        with Qwen3VLModel.from_engine(engine, threads=1, tuned=False) as model:
            for task, messages, truth in prompts:
                encoded = None
                for share in SHARES:
                    prepared = model.prepare(messages, visual_token_share=share)
                    encoded = _encoded(model, prepared) if encoded is None else encoded
                    for name, choose in choices.items() if share < 1 else [("all tokens", choose_visual_tokens)]:
                        is_right = answer(model, prepared, encoded, choose) == truth
                        right.setdefault(f"{name}, {share:g}", {}).setdefault(task, []).append(is_right)
    counts = {task: len(found) for task, found in next(iter(right.values())).items()}
    shares = {name: {task: sum(found) / len(found) for task, found in each.items()} for name, each in right.items()}
    return {"checkpoint": checkpoint, "questions": counts, "right": shares}


def demo_prompts(canvases: int) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """Yield the questions about the first held-out canvases of the demo."""
    from qwen3vl_export.demo.data import held_out

    for example in map(held_out, range(canvases)):
        for task, (question, truth) in example.tasks.items():
            yield task, user_message(question, [example.image]), truth


def _encoded(model: Qwen3VLModel, prepared: Prepared) -> ScoredEmbeds:
    """Return the embeddings and scores of all images of a prompt."""
    session: Any = model.session
    parts = [session.scored_vision(model.preparation.vision_inputs(image)) for image in prepared.images]
    embeds = np.concatenate([on_host(part.embeds) for part in parts], axis=1)
    return ScoredEmbeds(embeds, np.concatenate([part.scores for part in parts]))


def answer(model: Qwen3VLModel, prepared: Prepared, encoded: ScoredEmbeds, choose: Choose) -> str:
    """Return the greedy answer to a prompt whose tokens are chosen by a function."""
    from qwen3vl_export.demo.tasks import MAX_NEW_TOKENS
    from runtime.generation import decode_steps, prefill

    embeds = on_host(encoded.embeds)
    spans, row = [], 0
    for span in prepared.prompt.spans:
        kept = span.kept
        if isinstance(kept, int):
            rows = slice(row, row + span.num_rows)
            kept = tuple(choose(embeds[0, rows], kept, encoded.scores[rows]).tolist())
        spans.append(replace(span, kept=kept))
        row += span.num_rows
    ids = prepared.prompt.input_ids
    positions = mrope_positions(len(ids), spans)
    cache = model.session.new_cache(len(ids) + MAX_NEW_TOKENS)
    logits = prefill(model.session, cache, DecoderInputs.prompt(ids, positions, embeds))[-1]
    steps = decode_steps(
        model.session, cache, logits, len(ids), positions.delta, embeds[:, :1], lambda logits_V: int(logits_V.argmax())
    )
    tokens: list[int] = []
    while len(tokens) < MAX_NEW_TOKENS and (token := next(steps)) not in model.defaults.eos_token_ids:
        tokens.append(token)
    return model.tokenizer.decode(tokens).strip()


def _random_tokens() -> Choose:
    """Return a choice that knows nothing: what any score has to beat."""
    random = np.random.default_rng(_SEED)
    return lambda embeds_VD, num_kept, _: np.sort(random.permutation(len(embeds_VD))[:num_kept])


def times(engine: Path, shape: str, sides: Sequence[int], share: float, rounds: int) -> dict[str, Any]:
    """Return the parts of the time to the first token, of prompts that keep all tokens and of others that keep a share.

    Prompts take turns; the vision tower runs once for each size.
    """
    largest = max(sides)
    room = (largest // _SIDE) ** 2 + 256
    found = []
    options = {"max_context": room, "max_pixels": largest**2, "prefix_cache": False, "vision_cache_bytes": 0}
    with Qwen3VLModel.from_engine(engine, tuned=False, **options) as model:
        model.generate("Hello.", max_new_tokens=2)  # what only the first call needs
        for side in sides:
            found.append(_times_of(model, side, share, rounds))
        return {"model": shape, "target": model.manifest.target, "share": share, "sizes": found}


def _times_of(model: Qwen3VLModel, side: int, share: float, rounds: int) -> dict[str, Any]:
    def asked(seed: int) -> list[dict[str, Any]]:
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
        return user_message("What is in the picture?", [pixels])

    parts = {"all": 1.0, "kept": share}
    prompts = {name: model.prepare(asked(0), visual_token_share=part) for name, part in parts.items()}
    (image,) = prompts["all"].images
    embeds: list[FloatArray] = []
    vision_s = measure.seconds(lambda: embeds.append(model.encode_images([image])))
    choose_s = [
        measure.seconds(lambda: choose_visual_tokens(embeds[0][0], prompts["kept"].num_visual_tokens))
        for _ in range(rounds)
    ]
    prefill_s: dict[str, list[float]] = {name: [] for name in prompts}
    inputs = {name: each.decoder_inputs(embeds[0]) for name, each in prompts.items()}
    for number in range(rounds):
        for name in [*prompts][:: 1 if number % 2 else -1]:
            (span,) = prompts[name].prompt.spans
            prefill_s[name].append(_prefill_time(model, inputs[name], span.start, span.end))
    # Whole requests, whose vision tower answers at once with what it gave before.
    with _vision_gives(model, embeds[0]):
        ttft_s = {name: [_ttft(model, asked(0), part) for _ in range(rounds)] for name, part in parts.items()}
    return {
        "side": side,
        "visual_tokens": {name: each.num_visual_tokens for name, each in prompts.items()},
        "vision_s": vision_s,
        "choose_s": measure.summarise(choose_s),
        "prefill_s": {name: measure.summarise(values) for name, values in prefill_s.items()},
        "other_ttft_s": {name: measure.summarise(values) for name, values in ttft_s.items()},
    }


@contextmanager
def _vision_gives(model: Qwen3VLModel, embeds: FloatArray) -> Iterator[None]:
    """Let the vision tower of a session return these embeddings."""
    session: Any = model.session
    session.vision = lambda inputs: embeds
    try:
        yield
    finally:
        del session.vision


def _ttft(model: Qwen3VLModel, messages: list[dict[str, Any]], share: float) -> float:
    return model.generate(messages, max_new_tokens=1, visual_token_share=share).stats.ttft_s


def _prefill_time(model: Qwen3VLModel, inputs: DecoderInputs, start: int, stop: int) -> float:
    """Return the seconds that the tokens start … stop - 1 of a prompt take, those before them aside."""
    from runtime.generation import PREFILL_CHUNK

    cache = model.session.new_cache(stop)
    model.session.prefill(inputs.chunk(0, start), cache)

    def run() -> None:
        for first in range(start, stop, PREFILL_CHUNK):
            model.session.prefill(inputs.chunk(first, min(stop, first + PREFILL_CHUNK)), cache)

    return measure.seconds(run)


def table(result: Mapping[str, Any]) -> str:
    """Return right answers by score and share, and times by image size."""
    parts = []
    for found in result.get("accuracy", []):
        tasks = found["questions"]
        rows = [("score, share kept", *tasks)]
        rows += [(name, *(f"{100 * each[task]:.1f} %" for task in tasks)) for name, each in found["right"].items()]
        parts.append(
            f"Right answers of {found['checkpoint']} in float32, of {min(tasks.values())} held-out questions of each "
            f"task. Images of no more than {MIN_TOKENS} tokens stay whole.\n\n{markdown(rows)}"
        )
    if found := result.get("times"):
        rows = [
            (
                "kept",
                "vision",
                "choice",
                "prefill of all",
                "of those kept",
                "ratio",
                "TTFT beyond vision + prefill",
            )
        ]
        for size in found["sizes"]:
            counts, choice = size["visual_tokens"], size["choose_s"]["median_s"]
            whole, kept = (size["prefill_s"][name]["median_s"] for name in ("all", "kept"))
            rows.append(
                (
                    f"{counts['kept']} of {counts['all']}",
                    *(f"{value:.2f} s" for value in (size["vision_s"], choice, whole, kept)),
                    f"{kept / whole:.2f}",
                    f"+{100 * (size['other_ttft_s']['kept']['median_s'] - kept) / (size['vision_s'] + kept):.1f} %",
                )
            )
        runs = len(found["sizes"][0]["prefill_s"]["all"]["all_s"])
        parts.append(
            f"Times of {found['target']}, shape of {found['model']}, images of noise: prefill of the image's tokens, "
            f"medians of {runs} in turns; the vision tower once. The last column is what a request of the kept tokens "
            f"takes to its first token beyond vision and prefill of its image: choice, text and all else.\n\n"
            f"{markdown(rows)}"
        )
    return "\n".join(parts)
