"""Ask an engine and the float32 engine of its checkpoint the held-out questions, on the same pixels.

The reference is an ort-cpu-fp32 engine built from the checkpoint for the occasion: `qwen3vl verify` holds that one to
PyTorch, and it answers several times faster. Both engines get the same prepared prompt, so what differs is the engine.

Each question runs once: the prompt, then the true answer token by token. The logits in front of each true token give
divergence, agreement and perplexity; while the most likely token is the true one, they are also those of greedy
decoding, and from the first other one on the engine goes on alone. Nothing is batched, and the true answer is not
joined to the prompt: kernels that quantise activations round otherwise for other numbers of tokens.

Shapes: T tokens of a true answer, its end included; V vocab.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.demo.data import HELD_OUT_COUNT, Example, held_out
from qwen3vl_export.demo.tasks import MAX_NEW_TOKENS
from qwen3vl_export.parity.layers import LayerErrors, LayerSums
from qwen3vl_export.parity.lowered import CPU_NOTE, is_lowered, manifests_of, open_model_of, route_notes
from qwen3vl_export.parity.metrics import FloatArray, kl_divergence, log_softmax
from qwen3vl_export.parity.task_report import Question, TaskReport

if TYPE_CHECKING:
    from qwen3vl_export.checkpoint import Checkpoint
    from runtime.manifest import Manifest
    from runtime.model import Qwen3VLModel
    from runtime.preparation import Prepared
    from runtime.session import KVCache

REFERENCE_TARGET = "ort-cpu-fp32"
# The demo is so small that two threads wait for each other: on two busy cores, 270 ms a canvas against 60 ms with one.
_THREADS = 1


def run_tasks(
    engine: Path,
    checkpoint: str,
    *,
    limit: int | None = None,
    route: Mapping[str, Path] | None = None,
    on_canvas: Callable[[int, int], None] | None = None,
) -> TaskReport:
    """Compare an engine's answers with those of float32.

    Args:
        engine: The engine folder, or one of lowered graphs.
        checkpoint: What `Checkpoint.open` takes: what the engine was built from.
        limit: Only the first canvases; by default all.
        route: Engines that run a part in its place, by option (`runtime.route.RouteKeywords`).
        on_canvas: Called with the number of canvases that are done, and of all.

    Raises:
        CheckpointError, EngineError: One of the two does not open.
        ParityError: The two are of different shapes, there is no limit for the engine's precision, or lowered graphs do
            not run on the CPU.
    """
    from qwen3vl_export.checkpoint import Checkpoint

    source = Checkpoint.open(checkpoint)
    model = open_model_of(source, engine, threads=_THREADS, route=route)
    most_points = max(map(_most_points, manifests_of(model)))
    count = HELD_OUT_COUNT if limit is None else min(limit, HELD_OUT_COUNT)

    def finished(done: int) -> None:
        if on_canvas:
            on_canvas(done, count)

    finished(0)
    with tempfile.TemporaryDirectory() as folder:
        reference = build_reference(source, Path(folder) / "engine")
        questions, layers = ask_all(model, reference, map(held_out, range(count)), finished)
    notes = (CPU_NOTE,) if is_lowered(engine) else tuple(route_notes(model))
    return TaskReport.of(model.manifest, checkpoint, questions, most_points, layers, notes)


def _most_points(manifest: Manifest) -> float:
    """Return the points that an engine may lose."""
    import configs
    from runtime.errors import ParityError

    precision = str(manifest.capabilities["precision"])
    limits = configs.load("tolerances").get(precision, {})
    if "task_loss_points" not in limits:
        raise ParityError(
            f"configs/tolerances.toml has no task_loss_points in [{precision}]", remedy="add it, with its reason"
        )
    return float(limits["task_loss_points"])


def ask_all(
    model: Qwen3VLModel, reference: Qwen3VLModel, examples: Iterable[Example], finished: Callable[[int], None]
) -> tuple[list[Question], LayerErrors]:
    """Ask both engines every question of the examples, and compare their layers on the first question of each."""
    questions: list[Question] = []
    sums = LayerSums()
    for done, example in enumerate(examples, 1):
        first, *others = _prepare(reference, example)
        embeds, expected_embeds = (side.encode_images(first.images) for side in (model, reference))
        for prepared, (task, (question, truth)) in zip((first, *others), example.tasks.items(), strict=True):
            # Whoever ends an answer chooses among the ends of the sequence; the first one is the chat template's.
            truth_ids = [*model.tokenizer.encode(truth), model.defaults.eos_token_ids[0]]
            ids, logits_TV, cache = ask(model, prepared, embeds, truth_ids)
            expected_ids, expected_TV, expected_cache = ask(reference, prepared, expected_embeds, truth_ids)
            questions.append(
                Question(
                    index=example.index,
                    task=task,
                    question=question,
                    truth=truth,
                    expected=model.tokenizer.decode(expected_ids),
                    answer=model.tokenizer.decode(ids),
                    kl=float(kl_divergence(logits_TV, expected_TV).sum()),
                    same_top1=int((logits_TV.argmax(-1) == expected_TV.argmax(-1)).sum()),
                    expected_nll=_nll(expected_TV, truth_ids),
                    nll=_nll(logits_TV, truth_ids),
                    tokens=len(truth_ids),
                )
            )
            if prepared is first:
                num_rows = len(first.prompt.input_ids)
                sums.add_levels(embeds, expected_embeds)
                for layer in range(model.config.text.num_layers):
                    sums.add_layer(layer, cache.layer(layer), expected_cache.layer(layer), num_rows)
        finished(done)
    return questions, sums.errors()


def ask(
    model: Qwen3VLModel, prepared: Prepared, embeds: FloatArray, truth_ids: Sequence[int]
) -> tuple[list[int], FloatArray, KVCache]:
    """Return the engine's greedy answer, the logits [T, V] in front of each true token, and the cache."""
    from runtime.generation import chunk_limit, decode_steps, prefill

    session, ids, positions = model.session, prepared.prompt.input_ids, prepared.positions
    cache = session.new_cache(len(ids) + max(len(truth_ids), MAX_NEW_TOKENS))
    chunk = chunk_limit(model.manifest.capabilities)
    behind_prompt = prefill(session, cache, prepared.decoder_inputs(embeds), chunk=chunk)[-1]
    seen: list[FloatArray] = []

    def take_true(logits_V: FloatArray) -> int:
        seen.append(logits_V.copy())
        return truth_ids[len(seen) - 1]

    def take_likeliest(logits_V: FloatArray) -> int:
        return int(logits_V.argmax())

    steps = decode_steps(session, cache, behind_prompt, len(ids), positions.delta, embeds[:, :1], take_true)
    for _ in truth_ids:
        next(steps)
    logits_TV = np.stack(seen)
    differs = np.flatnonzero(logits_TV.argmax(-1) != truth_ids)
    if not differs.size:
        return list(truth_ids), logits_TV, cache
    # Goes back to the first difference: the rows of the true tokens after it are overwritten before they are read.
    start = int(differs[0])
    answer = list(truth_ids[:start])
    steps = decode_steps(
        session, cache, logits_TV[start], len(ids) + start, positions.delta, embeds[:, :1], take_likeliest
    )
    while len(answer) < MAX_NEW_TOKENS and (not answer or answer[-1] not in model.defaults.eos_token_ids):
        answer.append(next(steps))
    return answer, logits_TV, cache


def _prepare(model: Qwen3VLModel, example: Example) -> list[Prepared]:
    from runtime.messages import user_message

    return [model.prepare(user_message(question, [example.image])) for question, _ in example.tasks.values()]


def _nll(logits_TV: FloatArray, tokens: Sequence[int]) -> float:
    values: NDArray[np.float64] = log_softmax(logits_TV)[np.arange(len(tokens)), tokens]
    return -float(values.sum())


def build_reference(source: Checkpoint, folder: Path) -> Qwen3VLModel:
    """Build and open the float32 engine that answers are compared with."""
    from qwen3vl_export.export import ExportRequest, export
    from runtime.model import Qwen3VLModel

    export(ExportRequest(source.name, target=REFERENCE_TARGET, output=folder))
    return Qwen3VLModel.from_engine(folder, threads=_THREADS, tuned=False)
