"""Train demo-long: the dense demo goes on with pages, several pictures and long conversations.

First the vision tower learns to say in which line of a page a digit stands, and at which place, through throw-away
heads. Then the language model learns the tasks on short prompts, on the tower as it is by then. At last both learn, and
a few prompts are as long as one may be. Arithmetic is bfloat16 in these two stages, and the demo's own batches stay in
the mix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo_training.batches import IGNORE, NO_DIGIT, Batch, Prompter
from demo_training.dialogues import (
    DialogueBatch,
    collate_dialogues,
    draw_canvases,
    training_dialogues,
    vision_batch,
)
from demo_training.training import Stage, Trainee, Trainer
from qwen3vl_export.demo.data import Digits
from qwen3vl_export.demo.long_tasks import CONVERSATION, LONG_TASKS, held_out_dialogues
from qwen3vl_export.demo.pages import MAX_COLUMNS, MAX_LINES, make_page
from qwen3vl_export.modeling import Qwen3VL
from runtime.vision_inputs import position_tables

_HEADS = (NO_DIGIT + 1, 4, 9, MAX_LINES, MAX_COLUMNS)
_WEIGHTS = (1.0, 0.5, 0.3, 0.5, 0.5)


@dataclass(frozen=True)
class LongStage(Stage):
    """A stage with dialogues.

    Attributes:
        dialogues: Share of the batches that are dialogues; the others are the demo's.
        num_tokens: About the tokens of a batch of dialogues.
        lengths: About the tokens of a dialogue, and how often.
    """

    dialogues: float = 0.8
    num_tokens: int = 1280
    lengths: tuple[tuple[int, float], ...] = ((512, 1.0),)


_SHORT = ((256, 0.5), (512, 0.4), (1024, 0.1))
_ALL = ((256, 0.3), (512, 0.3), (1024, 0.22), (2048, 0.1), (4096, 0.08))
LONG = [
    LongStage("pages", 600, 1.5e-3, 5e-4, 384, 4096, 32, False),
    LongStage("several", 2200, 2e-3, 1.5e-3, 384, 3072, 16, True, vision_rate=0.0, dense=0.0, lengths=_SHORT),
    LongStage("long", 1600, 1.5e-3, 5e-5, 512, 3072, 16, True, vision_rate=0.2, dense=0.0, lengths=_ALL),
]
_SMOKE = LongStage("several", 2, 1e-3, 1e-4, 128, 512, 4, True, vision_rate=0.0, dense=0.0, num_tokens=512)
SMOKE_LONG = [
    LongStage("pages", 2, 1e-3, 1e-3, 128, 512, 4, False),
    replace(_SMOKE, lengths=((256, 1.0),)),
    replace(_SMOKE, name="long", vision_rate=0.2, lengths=((256, 1.0),)),
]


class LongTrainee(Trainee):
    """The model with throw-away heads that know pages too."""

    def __init__(self, seed: int, model: Qwen3VL) -> None:
        """Go on from `model`."""
        super().__init__(seed, model)
        self.heads = nn.Linear(model.config.text.hidden_size, sum(_HEADS))

    def losses(self, batch: Batch | DialogueBatch, stage: Stage) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of the answers, or of the heads in a stage of the vision tower alone."""
        if stage.language:
            with torch.autocast("cpu", torch.bfloat16):
                with torch.set_grad_enabled(stage.vision_rate > 0):
                    embeds = self.visual_embeds(batch)
                logits, targets = self.answer_logits(batch, embeds)
            text = F.cross_entropy(logits.float(), targets)
            return text, {"text": float(text.detach())}
        assert isinstance(batch, DialogueBatch)
        dense = batch.dense
        weight = torch.full((NO_DIGIT + 1,), 1.0)
        weight[NO_DIGIT] = 0.1
        found = self.heads(self.visual_embeds(batch)[0]).split(_HEADS, -1)
        labels = {
            "class": dense.classes,
            "rank": dense.ranks,
            "place": dense.places,
            "line": dense.lines,
            "column": dense.columns,
        }
        parts = {
            name: F.cross_entropy(logits, truth, weight if name == "class" else None, ignore_index=IGNORE)
            for logits, (name, truth) in zip(found, labels.items(), strict=True)
        }
        loss = torch.stack([w * part for w, part in zip(_WEIGHTS, parts.values(), strict=True)]).sum()
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    def visual_embeds(self, batch: Batch | DialogueBatch) -> torch.Tensor:
        """Return the visual tokens of all pictures, one picture after the other, [1+levels, V, D]."""
        if isinstance(batch, Batch):
            return super().visual_embeds(batch)
        vision = self.model.config.vision
        merge = vision.spatial_merge_size
        embeds = []
        for patches_IPE, rows, cols in batch.patches:
            tables = position_tables(rows * merge, cols * merge, vision)
            embeds.append(self.model.visual(patches_IPE, *map(torch.from_numpy, tables)))
        return torch.cat(embeds, 1)

    def answer_logits(
        self, batch: Batch | DialogueBatch, visual_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [n, vocab] of all answer tokens of the batch and the tokens [n] they must predict."""
        if isinstance(batch, Batch):
            return super().answer_logits(batch, visual_embeds)
        assert batch.ids_BS is not None and batch.targets_BS is not None
        assert batch.positions_3BS is not None and batch.rows_BS is not None
        text = self.model.language_model
        hidden, _ = text(batch.ids_BS, batch.positions_3BS, batch.rows_BS, visual_embeds, visible=batch.visible_B1SS)
        keep = batch.targets_BS != IGNORE
        return self.model.lm_head(text.norm(hidden[keep])), batch.targets_BS[keep]

    @torch.no_grad()
    def answers_last(self, batch: DialogueBatch) -> bool:
        """Return whether the last answer of a batch of one dialogue is right, given the true ones before it."""
        logits, targets = self.answer_logits(batch, self.visual_embeds(batch))
        assert batch.targets_BS is not None
        last = int((batch.targets_BS[0].flip(0) != IGNORE).long().argmax())
        length = int((batch.targets_BS[0].flip(0)[last:] == IGNORE).long().argmax())
        return bool((logits[-length:].argmax(-1) == targets[-length:]).all())


class LongTrainer(Trainer):
    """Run the stages of demo-long."""

    def make_trainee(self, model: Qwen3VL | None) -> Trainee:
        """Return what is trained: `model`, which must be given."""
        assert model is not None, "demo-long goes on from the demo"
        return LongTrainee(self.seed, model)

    def make_batch(self, stage: Stage, pool: Digits, prompter: Prompter | None) -> Batch | DialogueBatch:
        """Return the batch of this step: dialogues, the demo's tasks, or pictures for the heads."""
        assert isinstance(stage, LongStage)
        rng = np.random.default_rng([self.seed, self.stage, self.step, 1])
        if prompter is None:
            mean = float(rng.uniform(6, (stage.max_side / 32) ** 2 / 2))
            pictures = draw_canvases(rng, pool, min(stage.max_images, int(stage.max_patches / 8 / mean) + 3), mean)
            pages = max(1, min(stage.max_images, stage.max_patches // 512))
            return vision_batch([*pictures, *(make_page(rng, pool, augment=True) for _ in range(pages))])
        if rng.random() >= stage.dialogues:
            return super().make_batch(stage, pool, prompter)
        lengths, shares = zip(*stage.lengths, strict=True)
        length = int(rng.choice(lengths, p=shares))
        dialogues, are_independent = training_dialogues(
            rng, pool, length=length, num_tokens=max(length, stage.num_tokens), prompter=prompter
        )
        return collate_dialogues(dialogues, prompter, are_independent=are_independent)

    def accuracy(self, half: str, count: int) -> dict[str, float]:
        """Return the share of right answers per task; of the further tasks on one prompt in four of each length."""
        shares = super().accuracy(half, count)
        assert isinstance(self.trainee, LongTrainee)
        prompter = Prompter(self.trainee.tokenizer)
        number = max(1, count // 4)
        for task in LONG_TASKS:
            for max_tokens in (1024, 2048, 4096) if task in CONVERSATION else (1024,):
                dialogues = held_out_dialogues(task, number, max_tokens=max_tokens, half=half, seed=7)
                right = [self.trainee.answers_last(collate_dialogues([each], prompter)) for each in dialogues]
                name = f"{task}-{max_tokens}" if task in CONVERSATION else task
                shares[name] = sum(right) / len(right)
        return shares
