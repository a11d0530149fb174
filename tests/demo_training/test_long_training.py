"""The training of demo-long: its batches are prompts as the runtime prepares them, its labels and losses are right."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from demo_training.batches import IGNORE, NO_DIGIT, Prompter
from demo_training.dialogues import (
    DialogueBatch,
    collate_dialogues,
    dense_labels,
    draw_canvases,
    training_dialogues,
    vision_batch,
)
from demo_training.long import LONG, SMOKE_LONG, LongTrainee, LongTrainer
from demo_training.tokenizer import build_tokenizer
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.data import load_half, make_canvas
from qwen3vl_export.demo.long_tasks import (
    MAX_PICTURES,
    MAX_SEVERAL,
    MAX_TOKENS,
    Dialogue,
    Turn,
    ask,
    grid_of,
    held_out_dialogues,
)
from qwen3vl_export.demo.pages import make_page
from qwen3vl_export.eager import load, open_eager
from runtime.generation import prefill


@pytest.fixture(scope="module")
def trainee() -> LongTrainee:
    return LongTrainee(0, load(Checkpoint.open("demo")).float()).eval()


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter(build_tokenizer())


def drawn(prompter: Prompter, seed: int, length: int = 300) -> tuple[list[Dialogue], bool]:
    return training_dialogues(
        np.random.default_rng(seed), load_half("train"), length=length, num_tokens=2 * length, prompter=prompter
    )


@torch.no_grad()
def test_dialogues_of_a_batch_get_the_logits_of_prompts_of_their_own(trainee: LongTrainee, prompter: Prompter) -> None:
    """Each answer of each dialogue, against the runtime's preparation of the messages up to it."""
    several, lines = (next(held_out_dialogues(task, 1, max_tokens=256)) for task in ("picture", "lines"))
    turns = next(each for seed in range(9) for each in drawn(prompter, seed)[0] if each.turns[1].pictures)
    check_logits(trainee, prompter, [several, turns, lines], are_independent=False)


@torch.no_grad()
def test_independent_questions_get_the_logits_of_prompts_of_their_own(trainee: LongTrainee, prompter: Prompter) -> None:
    found = {}
    for seed in range(9):
        dialogues, are_independent = drawn(prompter, seed)
        if are_independent:
            found[len(dialogues[0].pictures) > 1] = dialogues
    assert len(found) == 2
    check_logits(trainee, prompter, [each for dialogues in found.values() for each in dialogues], are_independent=True)


def check_logits(trainee: LongTrainee, prompter: Prompter, dialogues: list[Dialogue], *, are_independent: bool) -> None:
    asked = open_eager("demo")
    batch = collate_dialogues(dialogues, prompter, are_independent=are_independent)
    logits, targets = trainee.answer_logits(batch, trainee.visual_embeds(batch))
    at = 0
    for dialogue in dialogues:
        for i, turn in enumerate(dialogue.turns):
            before = () if are_independent else dialogue.turns[:i]
            pictures = dialogue.turns[0].pictures if are_independent else turn.pictures
            part = Dialogue((*before, replace(turn, pictures=pictures)))
            truth = [*prompter.encode(turn.answer), *prompter.end]
            logits_of_turn, targets_of_turn = (each[at : at + len(truth)] for each in (logits, targets))
            at += len(truth)
            if len(part.pictures) == 1 < len(dialogue.pictures):
                continue  # alone, its picture would have no number
            prepared = asked.prepare([*part.messages(), {"role": "assistant", "content": turn.answer}])
            ids = prepared.prompt.input_ids
            start = part.num_tokens(lambda text: len(prompter.encode(text)))
            assert list(ids[start : start + len(truth)]) == truth == targets_of_turn.tolist()
            inputs = prepared.decoder_inputs(asked.encode_images(prepared.images), all_logits=True)
            rows = prefill(asked.session, asked.session.new_cache(len(ids)), inputs)
            expected = rows[start - 1 : start - 1 + len(truth)]
            np.testing.assert_allclose(logits_of_turn.numpy(), expected, atol=2e-3)
    assert at == len(logits)


def test_every_answer_is_predicted_and_nothing_else(prompter: Prompter) -> None:
    dialogues, are_independent = drawn(prompter, 5)
    batch = collate_dialogues(dialogues, prompter, are_independent=are_independent)
    assert batch.ids_BS is not None and batch.targets_BS is not None
    for ids, targets, dialogue in zip(batch.ids_BS, batch.targets_BS, dialogues, strict=True):
        at = torch.nonzero(targets != IGNORE)[:, 0]
        assert ids[at + 1].equal(targets[at])
        truth = [token for turn in dialogue.turns for token in prompter.encode(turn.answer) + prompter.end]
        assert targets[at].tolist() == truth


def test_pictures_are_encoded_once_and_found_by_their_rows(trainee: LongTrainee, prompter: Prompter) -> None:
    pool = load_half("train")
    pictures = [make_canvas(np.random.default_rng(i), pool, 64 + 32 * i, 96, count=2) for i in range(3)]
    orders = [pictures, pictures[::-1]]
    turn = Turn((), "each", "How many digits are in each picture?", "2 2 2")
    batch = collate_dialogues([Dialogue((replace(turn, pictures=tuple(order)),)) for order in orders], prompter)
    assert sum(rows * cols * len(patches) for patches, rows, cols in batch.patches) == 6 + 9 + 12
    embeds = trainee.visual_embeds(batch)
    assert embeds.shape[1] == 27 and batch.rows_BS is not None
    for order, rows in zip(orders, batch.rows_BS, strict=True):
        found = rows[rows >= 0].split([np.prod(grid_of(picture)) for picture in order])
        for picture, rows_of_picture in zip(order, found, strict=True):
            alone = trainee.visual_embeds(vision_batch([picture]))
            torch.testing.assert_close(embeds[:, rows_of_picture], alone, atol=1e-4, rtol=1e-4)


def test_dense_labels_say_line_and_column_of_pages_and_rank_and_place_of_canvases() -> None:
    rng, pool = np.random.default_rng(0), load_half("train")
    page, canvas = make_page(rng, pool), make_canvas(rng, pool, 160, 128, count=3)
    dense = dense_labels([page, canvas])
    of_page = int(np.prod(grid_of(page)))
    assert dense.classes.shape == (of_page + 20,)
    for number, line in enumerate(page.lines):
        here = torch.nonzero(dense.lines == number)[:, 0]
        in_order = here[dense.columns[here].argsort()]
        assert dense.classes[in_order].tolist() == [digit.label for digit in line]
    assert (dense.ranks[:of_page] == IGNORE).all() and (dense.lines[of_page:] == IGNORE).all()
    ranked = torch.nonzero(dense.ranks >= 0)[:, 0]
    assert dense.classes[ranked[dense.ranks[ranked].argsort()]].tolist() == canvas.labels
    assert int((dense.classes != NO_DIGIT).sum()) == len(page.digits) + 3


def test_dialogues_of_all_kinds_fit_their_length_and_ask_all_tasks(prompter: Prompter) -> None:
    asked: set[str] = set()
    for seed in range(24):
        length = (256, 1024, MAX_TOKENS)[seed % 3]
        for dialogue in drawn(prompter, seed, length)[0]:
            assert dialogue.num_tokens(lambda text: len(prompter.encode(text))) <= 1.4 * length + 100
            asked |= {turn.task for turn in dialogue.turns}
            assert len(dialogue.pictures) <= MAX_PICTURES
            assert len(dialogue.turns[0].pictures) <= MAX_SEVERAL
    assert asked == {"read", "count", "where", "json", "picture", "which", "each", "lines", "line"}


def test_a_batch_is_a_function_of_its_step(tmp_path: Path) -> None:
    def batch(step: int) -> DialogueBatch:
        trainer = LongTrainer(SMOKE_LONG, tmp_path, lambda line: None, model=load(Checkpoint.open("demo")).float())
        trainer.stage, trainer.step = 1, step
        stage = replace(SMOKE_LONG[1], dialogues=1.0)
        found = trainer.make_batch(stage, load_half("train"), Prompter(trainer.trainee.tokenizer))
        assert isinstance(found, DialogueBatch) and found.ids_BS is not None
        return found

    first, again, other = batch(1), batch(1), batch(2)
    assert torch.equal(first.ids_BS, again.ids_BS)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.patches, again.patches, strict=True))
    assert first.ids_BS.shape != other.ids_BS.shape or not torch.equal(first.ids_BS, other.ids_BS)


def test_canvases_of_a_batch_have_few_grids() -> None:
    canvases = draw_canvases(np.random.default_rng(1), load_half("train"), 12, 20)
    assert len(canvases) == 12
    assert len({grid_of(canvas) for canvas in canvases}) <= 3


@torch.no_grad()
def test_the_last_answer_alone_is_judged(trainee: LongTrainee, prompter: Prompter) -> None:
    pool = load_half("train")
    rng = np.random.default_rng(8)
    seen = [make_canvas(rng, pool, 128, 96) for _ in range(2)]
    turns = [replace(turn, pictures=(seen[i],)) for i in (0, 1) if (turn := ask(rng, "count", seen[: i + 1]))]
    batch = collate_dialogues([Dialogue(tuple(turns))], prompter)
    logits, targets = trainee.answer_logits(batch, trainee.visual_embeds(batch))
    assert batch.targets_BS is not None and len(targets) == 4
    at = torch.nonzero(batch.targets_BS[0] != IGNORE)[:, 0]
    batch.targets_BS[0, at[2:]] = logits.argmax(-1)[2:]  # the last answer becomes what is predicted
    batch.targets_BS[0, at[0]] = (logits[0].argmax() + 1) % logits.shape[1]
    assert trainee.answers_last(batch)
    batch.targets_BS[0, at[2]] = (batch.targets_BS[0, at[2]] + 1) % logits.shape[1]
    assert not trainee.answers_last(batch)


def test_stages_train_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongTrainer, "accuracy", lambda self, half, count: {})
    trainer = LongTrainer(SMOKE_LONG, tmp_path, lambda line: None, model=load(Checkpoint.open("demo")).float())
    states = [{name: value.clone() for name, value in trainer.trainee.named_parameters()}]
    trainer.run(lambda: states.append(saved_weights(tmp_path)), report_every=2, validation_count=1)
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in itertools.pairwise(states)]
    # DeepStack's mergers get no gradient where no answer is asked for.
    parts = "model.model.visual.", "model.model.language_model."
    assert moved == [
        {n for n in states[0] if n.startswith((parts[0], "heads.")) and "deepstack" not in n},
        {n for n in states[0] if n.startswith(parts[1])},
        {n for n in states[0] if n.startswith(parts)},
    ]
    resumed = LongTrainer(SMOKE_LONG, tmp_path, lambda line: None, model=load(Checkpoint.open("demo")).float())
    resumed.resume()
    assert (resumed.stage, resumed.step) == (3, 0)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["trainee"]


def test_the_longest_prompts_are_trained() -> None:
    lengths, shares = zip(*LONG[-1].lengths, strict=True)
    assert max(lengths) == MAX_TOKENS and sum(shares) == pytest.approx(1)
