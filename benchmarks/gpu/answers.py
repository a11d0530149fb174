"""What a model makes of the questions: its answers, the logits of its prompts, and those of its decode steps.

The CPU's float32 engine writes them for a pack; on the GPU each engine is held against them. Decode steps get the
tokens of the CPU's answers, so that one that differs does not make all later logits differ: of each question alone, in
a batch of one, and of all questions together, in a batch of as many.

Shapes: L positions, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.questions import NUM_POSITIONS, NUM_TOKENS, questions
from runtime.contract import DecoderInputs, FloatArray, join_embeds, no_visual_embeds
from runtime.generation import chunk_limit
from runtime.preparation import Prepared

Ids = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class References:
    """What the CPU found, by the question's name.

    Attributes:
        ids: Tokens of its greedy answer.
        prompts: Logits of the last positions of the prompt, float32 [L, V].
        steps: Logits after each token of the answer, float32 [T, V].
    """

    ids: dict[str, list[int]]
    prompts: dict[str, FloatArray]
    steps: dict[str, FloatArray]

    @classmethod
    def read(cls, folder: Path, checkpoint: str) -> References:
        """Read what `write` has written."""
        ids = json.loads((folder / f"{checkpoint}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{checkpoint}.npz") as stored:
            prompts, steps = ({name: stored[f"{kind}/{name}"] for name in ids} for kind in ("prompt", "steps"))
        return cls(ids, prompts, steps)

    @classmethod
    def of(cls, model: Any) -> References:
        """Ask a model."""
        ids = answer_ids(model)
        return cls(ids, prompt_logits(model), step_logits(model, ids, together=False))

    def write(self, folder: Path, checkpoint: str) -> None:
        """Write `checkpoint.json` and `checkpoint.npz`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{checkpoint}.json").write_text(json.dumps(self.ids), encoding="utf-8")
        arrays = {f"prompt/{name}": logits for name, logits in self.prompts.items()}
        arrays |= {f"steps/{name}": logits for name, logits in self.steps.items()}
        np.savez_compressed(folder / f"{checkpoint}.npz", **arrays)


def answer_ids(model: Any) -> dict[str, list[int]]:
    """Return the tokens of the greedy answer to each question."""
    return {
        name: [int(each) for each in model.generate(messages, max_new_tokens=NUM_TOKENS, do_sample=False).token_ids]
        for name, messages in questions().items()
    }


def prompt_logits(model: Any) -> dict[str, FloatArray]:
    """Return the logits of the last positions of each prompt, float32 [L, V]."""
    return {
        name: np.asarray(model.logits(messages)[-NUM_POSITIONS:], np.float32) for name, messages in questions().items()
    }


def step_logits(model: Any, ids: Ids, *, together: bool) -> dict[str, FloatArray]:
    """Return the logits after each token of the given answers, float32 [T, V], one decode step for each.

    Args:
        model: An opened model that nobody else asks meanwhile.
        ids: Tokens to be taken, by question.
        together: All questions step in one batch, and not one after the other.
    """
    prompts = {name: model.prepare(messages) for name, messages in questions().items()}
    groups = [list(ids)] if together else [[name] for name in ids]
    found: dict[str, FloatArray] = {}
    for names in groups:
        logits = _forced(model, [prompts[name] for name in names], [ids[name] for name in names])
        found |= dict(zip(names, logits, strict=True))
    return found


def _forced(model: Any, prompts: Sequence[Prepared], ids: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Run prompts in a slot each, then steps of all; a sequence whose tokens are over repeats its last one."""
    session, none = model.session, no_visual_embeds(model.config)
    lengths = np.array([len(each.prompt.input_ids) for each in prompts])
    num_steps = max(map(len, ids))
    cache = session.new_cache(int(lengths.max()) + num_steps, len(prompts))
    for slot, prompt in enumerate(prompts):
        _prefill(model, prompt, cache, slot)
    deltas, rows = np.array([each.positions.delta for each in prompts]), []
    for step in range(num_steps):
        tokens = np.array([[each[min(step, len(each) - 1)]] for each in ids])
        inputs = DecoderInputs.text(tokens, lengths + step, none, delta=deltas)
        rows.append(np.asarray(session.decode(inputs, cache)[:, 0], np.float32))
    return [np.stack([row[b] for row in rows[: len(each)]]) for b, each in enumerate(ids)]


def _prefill(model: Any, prompt: Prepared, cache: Any, slot: int) -> None:
    session = model.session
    images = [session.vision(model.preparation.vision_inputs(image)) for image in prompt.images]
    inputs = prompt.decoder_inputs(join_embeds(images) if images else no_visual_embeds(model.config))
    length, chunk = inputs.input_ids.shape[1], chunk_limit(model.manifest.capabilities)
    for start in range(0, length, chunk):
        session.prefill(inputs.chunk(start, min(start + chunk, length)), cache, slot)
