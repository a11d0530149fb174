"""The demo's training: its batched forward is transformers' own, its labels are right, the script runs and resumes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo_training.batches import (
    IGNORE,
    NO_DIGIT,
    Batch,
    Prompter,
    cell_of,
    collate,
    draw_side_in,
    training_batch,
)
from demo_training.evaluate import Outcome, as_markdown, evaluate, summarise
from demo_training.model import save_checkpoint
from demo_training.packing import pack
from demo_training.training import CURRICULUM, SMOKE, Trainee, Trainer, rate_at
from demo_training.upcycle import upcycled
from helpers import ROOT
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import data
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.eager import load


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    return moved(Trainee(0))


@torch.no_grad()
def moved(trainee: Trainee) -> Trainee:
    """Move every weight, so that none is as it began, to a number that bfloat16 holds."""
    for parameter in trainee.parameters():
        parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).bfloat16())
    return trainee.eval()


@pytest.fixture(scope="module", params=["dense", "experts"])
def saved(request: pytest.FixtureRequest, trainee: Trainee, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A trainee, and what transformers makes of the folder that it is saved in."""
    from transformers import AutoProcessor

    from helpers import judge

    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    trainee = trainee if request.param == "dense" else moved(Trainee(0, upcycled(trainee.model)))
    save_checkpoint(trainee.model, folder, "card")
    return Saved(trainee, judge.load(folder), AutoProcessor.from_pretrained(folder))


@dataclass(frozen=True)
class Saved:
    trainee: Trainee
    judge: Any
    processor: Any

    def logits_BSV(self, batch: Batch) -> torch.Tensor:
        """Return the trainee's logits of every position."""
        everywhere = replace(batch, targets_BS=torch.zeros_like(batch.ids_BS))
        logits, _ = self.trainee.answer_logits(everywhere, self.trainee.visual_embeds(batch))
        return logits.unflatten(0, batch.ids_BS.shape)


def canvas_of(width: int, height: int, count: int, seed: int = 1) -> data.Canvas:
    return data.make_canvas(np.random.default_rng(seed), data.load_half("train"), width, height, count=count)


@pytest.mark.judge
@torch.no_grad()
def test_forward_equals_transformers_on_every_question_of_a_batch(saved: Saved) -> None:
    processor = saved.processor
    canvases = [canvas_of(100, 150, 3), canvas_of(90, 170, 2, seed=2)]
    batch = collate(canvases, 5, 3, Prompter(saved.trainee.tokenizer), TASKS)
    assert batch.targets_BS is not None and batch.segment_S is not None
    found_BSV = saved.logits_BSV(batch)
    for i, canvas in enumerate(canvases):
        example = data.example_of(i, canvas)
        for t, (question, answer) in enumerate(example.tasks.values()):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(text=[prompt + answer], images=[canvas.image], return_tensors="pt")
            torch.testing.assert_close(batch.patches_BPE[i], inputs["pixel_values"], atol=1e-6, rtol=0)
            expected = saved.judge(**inputs).logits[0]
            keep = (batch.targets_BS[i] != IGNORE) & (batch.segment_S == t)
            got = found_BSV[i][keep]
            torch.testing.assert_close(got, expected[-len(got) :], atol=1e-4, rtol=0)
            targets = processor.tokenizer.encode(answer + "<|im_end|>")
            assert batch.targets_BS[i][keep].tolist() == targets


@pytest.mark.judge
@torch.no_grad()
def test_conversation_equals_transformers(saved: Saved) -> None:
    processor = saved.processor
    canvas = canvas_of(64, 96, 2)
    batch = collate([canvas], 3, 2, Prompter(saved.trainee.tokenizer), ("json", "read"), chained=True)
    assert batch.ids_BS is not None
    tasks = data.example_of(0, canvas).tasks
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tasks["json"][0]}]},
        {"role": "assistant", "content": tasks["json"][1]},
        {"role": "user", "content": tasks["read"][0]},
        {"role": "assistant", "content": tasks["read"][1]},
    ]
    inputs = processor(text=[processor.apply_chat_template(messages)], images=[canvas.image], return_tensors="pt")
    assert inputs["input_ids"][0, :-1].tolist() == batch.ids_BS[0].tolist()
    expected = saved.judge(**inputs).logits[0, :-1]
    torch.testing.assert_close(saved.logits_BSV(batch)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.portable
def test_questions_do_not_see_each_other() -> None:
    packing = pack(2, 2, 4, [1, 3, 2])
    mask = packing.mask_SS
    assert mask.shape == (14, 14)
    first, second = slice(9, 12), slice(12, 14)
    assert not mask[second, first].any()
    assert mask[second, :9].all()
    assert mask[9:12, 9:12].equal(torch.ones(3, 3, dtype=torch.bool).tril())
    assert packing.visual_rows_S.tolist() == [-1] * 4 + [0, 1, 2, 3] + [-1] * 6
    assert packing.positions_3S[:, 9].tolist() == packing.positions_3S[:, 12].tolist() == [7, 7, 7]
    chained = pack(2, 2, 4, [1, 3, 2], chained=True)
    assert chained.mask_SS.equal(torch.ones(14, 14, dtype=torch.bool).tril())
    assert chained.positions_3S[0, 12] == 10


def test_dense_labels_name_the_cell_of_each_centre() -> None:
    canvas = canvas_of(200, 90, 3)
    batch = collate([canvas], 3, 6, None, TASKS)
    cells = cell_of(canvas, 3, 6)
    assert len(set(cells)) == 3
    assert [int(batch.classes_BV[0, c]) for c in cells] == canvas.labels
    assert [int(batch.ranks_BV[0, c]) for c in cells] == [0, 1, 2]
    assert int(batch.places_BV[0, cells[canvas.asked]]) == canvas.place
    assert int((batch.classes_BV == NO_DIGIT).sum()) == 15


@pytest.mark.portable
def test_sides_round_to_the_grid() -> None:
    rng = np.random.default_rng(0)
    for cells in (2, 3, 9, 16):
        sides = {draw_side_in(rng, cells) for _ in range(200)}
        assert {round(s / 32) for s in sides} == {cells}
        assert min(sides) >= 64 and max(sides) <= 512
        assert any(s % 32 for s in sides)


def test_same_step_gives_the_same_batch(trainee: Trainee) -> None:
    def batch() -> torch.Tensor:
        return training_batch(
            np.random.default_rng([0, 3, 11]),
            data.load_half("train"),
            Prompter(trainee.tokenizer),
            max_side=128,
            max_patches=256,
            max_images=4,
            tasks=TASKS,
            free_sides=True,
            min_distractors=2,
        ).patches_BPE

    assert torch.equal(batch(), batch())


def test_exact_match_needs_every_token(trainee: Trainee) -> None:
    batch = collate([canvas_of(64, 96, 2)], 3, 2, Prompter(trainee.tokenizer), TASKS)
    assert batch.targets_BS is not None
    logits, targets = trainee.answer_logits(batch, trainee.visual_embeds(batch))
    assert not trainee.exact_matches(batch).all()
    batch.targets_BS[batch.targets_BS != IGNORE] = logits.argmax(-1)
    assert len(targets) == len(logits)
    assert trainee.exact_matches(batch).all()


@pytest.mark.portable
def test_rate_warms_up_and_falls() -> None:
    stage = CURRICULUM[-1]
    assert rate_at(stage, 0) == pytest.approx(stage.peak / 100)
    assert rate_at(stage, 100) == pytest.approx(stage.peak, rel=0.1)
    assert rate_at(stage, stage.steps) == pytest.approx(stage.final)


def test_vision_stages_move_only_what_their_labels_reach(tmp_path: Path) -> None:
    trainer = Trainer([stage for stage in SMOKE if not stage.language], tmp_path, lambda line: None)
    before = {name: value.clone() for name, value in trainer.trainee.named_parameters()}
    trainer.run(lambda: None, report_every=2, validation_count=1)
    for name, value in trainer.trainee.named_parameters():
        is_left_out = ".language_model." in name or ".deepstack_merger_list." in name
        assert torch.equal(value, before[name]) == is_left_out, name


def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    def run(folder: Path, stop_after: int | None) -> Trainer:
        folder.mkdir(exist_ok=True)
        trainer = Trainer(SMOKE, folder, lambda line: None)
        if trainer.state_file.exists():
            trainer.resume()
        reports = 0

        def on_report() -> None:
            nonlocal reports
            reports += 1
            if reports == stop_after:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            trainer.run(on_report, report_every=1, validation_count=1)
        return trainer

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "broken", 5)
    resumed = run(tmp_path / "broken", None)
    for name, value in whole.average.values.items():
        torch.testing.assert_close(resumed.average.values[name], value, atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run of the script that did every stage for two steps."""
    folder = tmp_path_factory.mktemp("smoke")
    train(folder)
    return folder


def train(folder: Path, *more: str) -> None:
    command = [sys.executable, "-m", "demo_training.train", "--work", str(folder), "--smoke"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    subprocess.run([*command, "--threads", "1", *more], check=True, cwd=ROOT, env=environment, capture_output=True)


def test_smoke_mode_writes_a_loadable_checkpoint(smoke_run: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(smoke_run / "checkpoint"))
    checkpoint.assets()
    load(checkpoint)
    assert {entry.dtype for entry in checkpoint.entries.values()} == {"BF16"}
    log = (smoke_run / "train.log").read_text()
    assert all(stage.name in log for stage in SMOKE)
    train(tmp_path, "--init-from", str(smoke_run / "checkpoint"))
    assert "full 2/2" in (tmp_path / "train.log").read_text()


@pytest.mark.judge
def test_transformers_loads_what_smoke_mode_writes(smoke_run: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder = smoke_run / "checkpoint"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_evaluation_counts_exact_answers() -> None:
    examples = [data.held_out(i) for i in range(6)]
    truth = {e.image.tobytes(): dict(e.tasks.values()) for e in examples}
    right = evaluate(lambda image, questions: [truth[image.tobytes()][q] for q in questions], examples)
    assert {summarise(right)["all"][t] for t in TASKS} == {1.0}
    wrong = evaluate(lambda image, questions: ["3"] * len(questions), examples)
    summary = summarise(wrong)
    counts = [e.num_digits for e in examples]
    assert summary["all"]["count"] == pytest.approx(counts.count(3) / 6, abs=1e-4)
    assert summary["all"]["json"] == 0.0
    assert summary["by_count"]["4"]["canvases"] == counts.count(4)
    assert sum(row["canvases"] for row in summary["by_side"].values()) == 6
    assert "| all | 6 | 0.0 % |" in as_markdown(summary)
    assert Outcome(0, "read", "q", "317", " 317\n", 3, 64).is_right
    assert not Outcome(0, "read", "q", "317", "3177", 3, 64).is_right
