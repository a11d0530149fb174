"""Train the demo: the stages, the losses, the optimiser's schedule, the state file.

Every batch is a function of (seed, stage, step), so a run that is stopped and resumed sees the same data as one that
was not. The vision tower gets its own labels through throw-away heads on every merged token ("which digit has its
centre in this cell, which place has it in the reading order, which third of the canvas"): end to end from a random
start the model stays at chance.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from demo_training.batches import IGNORE, NO_DIGIT, Batch, Prompter, collate, training_batch
from demo_training.tokenizer import build_tokenizer
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.data import Digits, canvas_at, load_half
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.eager import load
from qwen3vl_export.modeling import MixtureOfExperts, Qwen3VL
from qwen3vl_export.sources import DEMO
from runtime.vision_inputs import position_tables

if TYPE_CHECKING:
    from demo_training.dialogues import DialogueBatch

VALIDATION_SEED = 7


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum.

    Attributes:
        name: For the log.
        steps: Optimiser steps.
        peak: Learning rate after the warm-up.
        final: Learning rate at the end; the way there is linear.
        max_side: Largest canvas side in pixels.
        max_patches: Most patches in a batch.
        max_images: Most canvases in a batch.
        language: Train the language model too.
        vision_rate: Factor on the vision tower's learning rate; 0 leaves the tower as it is.
        free_sides: Sides that are not multiples of 32, resized as the processor does.
        min_distractors: Least number of distractors.
        dense: Weight of the throw-away heads' loss; 0 leaves the heads as they are.
        balance: Weight of the loss that spreads the tokens over the experts.
        conversations: Share of the batches whose questions are turns of one conversation.
    """

    name: str
    steps: int
    peak: float
    final: float
    max_side: int
    max_patches: int
    max_images: int
    language: bool
    vision_rate: float = 1.0
    free_sides: bool = True
    min_distractors: int = 2
    dense: float = 1.0
    balance: float = 0.0
    conversations: float = 0.0


CURRICULUM = [
    Stage("cells", 3000, 5e-3, 2.5e-3, 96, 8192, 64, False, free_sides=False, min_distractors=0),
    Stage("vision", 4000, 4e-3, 2e-3, 256, 4096, 48, False),
    Stage("vision-large", 1500, 2.5e-3, 1.5e-3, 512, 6144, 32, False),
    Stage("language", 1200, 3e-3, 2e-3, 192, 4096, 32, True, vision_rate=0.3),
    Stage("full", 3500, 2.5e-3, 5e-5, 512, 6144, 32, True, conversations=0.15),
]
EXPERTS = [
    Stage(
        "experts", 1500, 2e-3, 5e-5, 512, 6144, 32, True, vision_rate=0.0, dense=0.0, balance=0.01, conversations=0.15
    )
]
SMOKE_EXPERTS = [
    Stage("experts", 2, 1e-3, 1e-4, 160, 512, 4, True, vision_rate=0.0, dense=0.0, balance=0.01, conversations=0.5)
]
SMOKE = [
    Stage("cells", 2, 1e-3, 1e-3, 96, 512, 4, False, free_sides=False, min_distractors=0),
    Stage("vision", 2, 1e-3, 1e-3, 128, 512, 4, False),
    Stage("language", 2, 1e-3, 1e-3, 96, 512, 4, True, vision_rate=0.3),
    Stage("full", 2, 1e-3, 1e-4, 160, 512, 4, True, conversations=0.5),
]


class Trainee(nn.Module):
    """The model with its throw-away heads."""

    def __init__(self, seed: int, model: Qwen3VL | None = None) -> None:
        """Start from `model`, or from random weights with a low-frequency cosine basis as the patch embedding."""
        super().__init__()
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        if model is None:
            model = Qwen3VL(Checkpoint.open(DEMO).config).initialize()
            kernels = model.visual.patch_embed.proj.weight
            kernels.data.copy_(torch.from_numpy(_cosine_kernels(kernels.shape[0])))
        self.model = model
        self.heads = nn.Linear(model.config.text.hidden_size, NO_DIGIT + 1 + 4 + 9)
        self.router_logits: list[torch.Tensor] = []
        for layer in model.language_model.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp.gate.register_forward_hook(lambda _, __, logits_TE: self.router_logits.append(logits_TE))

    def losses(self, batch: Any, stage: Stage) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss to minimise and its parts."""
        self.router_logits.clear()
        with torch.set_grad_enabled(stage.vision_rate > 0):
            embeds = self.visual_embeds(batch)
        if not stage.dense:
            logits, targets = self.answer_logits(batch, embeds)
            text, balance = F.cross_entropy(logits, targets), self.imbalance()
            return text + stage.balance * balance, {"text": float(text.detach()), "balance": float(balance.detach())}
        classes, ranks, places = self.heads(embeds[0]).split([NO_DIGIT + 1, 4, 9], -1)
        # An empty cell weighs 0.1 of a digit's: there are about twenty of them to a digit.
        weight = torch.full((NO_DIGIT + 1,), 1.0)
        weight[NO_DIGIT] = 0.1
        parts = {
            "class": F.cross_entropy(classes, batch.classes_BV.flatten(), weight),
            "rank": F.cross_entropy(ranks, batch.ranks_BV.flatten(), ignore_index=IGNORE),
            "place": F.cross_entropy(places, batch.places_BV.flatten(), ignore_index=IGNORE),
        }
        loss = stage.dense * (parts["class"] + 0.5 * parts["rank"] + 0.3 * parts["place"])
        if batch.ids_BS is not None:
            logits, targets = self.answer_logits(batch, embeds)
            parts["text"] = F.cross_entropy(logits, targets)
            loss = loss + parts["text"]
        return loss, {k: float(v.detach()) for k, v in parts.items()}

    def imbalance(self) -> torch.Tensor:
        """Return E · Σ_e (share of the tokens that expert e gets) · (mean probability of e), mean over the layers.

        1 if all experts get the same (Fedus et al. 2021, arXiv:2101.03961, equation 4).
        """
        experts = self.model.config.text.experts
        assert experts is not None
        losses = []
        for logits_TE in self.router_logits:
            probabilities_TE = logits_TE.float().softmax(-1)
            chosen_TK = probabilities_TE.topk(experts.top_k).indices
            shares_E = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[1]) / chosen_TK.numel()
            losses.append(logits_TE.shape[1] * (shares_E * probabilities_TE.mean(0)).sum())
        return torch.stack(losses).mean()

    def visual_embeds(self, batch: Batch) -> torch.Tensor:
        """Return the visual tokens of all images, one image after the other, [1+levels, B·V, D]."""
        vision = self.model.config.vision
        merge = vision.spatial_merge_size
        tables = position_tables(batch.rows * merge, batch.cols * merge, vision)
        embeds: torch.Tensor = self.model.visual(batch.patches_BPE, *map(torch.from_numpy, tables))
        return embeds

    def answer_logits(self, batch: Batch, visual_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [n, vocab] of all answer tokens of the batch and the tokens [n] they must predict."""
        assert batch.ids_BS is not None and batch.targets_BS is not None and batch.packing is not None
        (b, s), packing, text = batch.ids_BS.shape, batch.packing, self.model.language_model
        first_rows_B1 = torch.arange(b)[:, None] * (batch.rows * batch.cols)
        rows_BS = torch.where(packing.visual_rows_S >= 0, packing.visual_rows_S + first_rows_B1, -1)
        positions_3BS = packing.positions_3S[:, None].expand(-1, b, s)
        hidden, _ = text(batch.ids_BS, positions_3BS, rows_BS, visual_embeds, visible=packing.mask_SS)
        keep = batch.targets_BS != IGNORE
        return self.model.lm_head(text.norm(hidden[keep])), batch.targets_BS[keep]

    @torch.no_grad()
    def exact_matches(self, batch: Batch) -> np.ndarray:
        """Return [B, tasks] whether each answer is right.

        Predicting every token of the true answer from the tokens before it is the same as greedy decoding the true
        answer, so one pass measures exact match.
        """
        assert batch.ids_BS is not None and batch.targets_BS is not None and batch.segment_S is not None
        logits, targets = self.answer_logits(batch, self.visual_embeds(batch))
        keep = batch.targets_BS != IGNORE
        wrong = torch.zeros_like(batch.targets_BS)
        wrong[keep] = (logits.argmax(-1) != targets).long()
        num_tasks = int(batch.segment_S.max()) + 1
        per_task = [wrong[:, batch.segment_S == t].sum(1) == 0 for t in range(num_tasks)]
        return torch.stack(per_task, 1).numpy()


def _cosine_kernels(count: int) -> np.ndarray:
    """Return [count, 3, 2, 16, 16] kernels: low-frequency 2-D cosines of the luminance, and of single colours last."""
    k, x = np.arange(16)[:, None], np.arange(16)[None]
    basis = np.cos(np.pi * (2 * x + 1) * k / 32)
    basis /= np.sqrt((basis**2).sum(1, keepdims=True))
    order = sorted(((a, b) for a in range(16) for b in range(16)), key=lambda ab: ab[0] + ab[1])
    grey = count - 12
    kernels = np.zeros((count, 3, 2, 16, 16), np.float32)
    for i in range(count):
        a, b = order[i] if i < grey else order[(i - grey) // 3]
        channels = np.ones(3) / 3 if i < grey else np.eye(3)[(i - grey) % 3]
        kernels[i] = channels[:, None, None, None] * np.outer(basis[a], basis[b])[None, None] / 2
    return kernels


def make_optimizer(trainee: Trainee, stage: Stage) -> list[torch.optim.Optimizer]:
    """Return the optimisers: Muon for the matrices inside blocks, AdamW for all else.

    In a trial of 300 steps on 96-pixel canvases (rate 2e-3, one run each, canvases not identical) the dense heads named
    48 % of held-out digits with Muon and 38 % with AdamW alone.
    """
    visual, text = trainee.model.visual, trainee.model.language_model
    matrices: dict[float, list[nn.Parameter]] = {stage.vision_rate: [], 1.0: []}
    rest: dict[float, list[nn.Parameter]] = {stage.vision_rate: [], 1.0: []}
    for module, rate in ((visual, stage.vision_rate), (text, 1.0)):
        if (module is text and not stage.language) or not rate:
            continue
        for name, parameter in module.named_parameters():
            if name.startswith("deepstack") and not stage.language:
                continue  # no loss depends on them: their gradients are zeros, and weight decay would shrink them
            inner = parameter.ndim == 2 and "embed" not in name
            (matrices if inner else rest)[rate].append(parameter)
    if stage.dense:
        rest[1.0] += list(trainee.heads.parameters())
    adam = [{"params": p, "rate": r} for r, p in rest.items() if p]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))]
    groups = [{"params": p, "rate": r} for r, p in matrices.items() if p]
    optimizers.append(
        torch.optim.Muon(groups, lr=1e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    )
    return optimizers


def rate_at(stage: Stage, step: int) -> float:
    """Return the learning rate of a step: 100 steps of warm-up, then linear to `final`."""
    warm = min(1.0, (step + 1) / 100)
    return warm * (stage.peak + (stage.final - stage.peak) * step / max(1, stage.steps))


class Average:
    """Keep the exponential moving average of the parameters; young averages forget faster."""

    def __init__(self, trainee: Trainee, decay: float = 0.998) -> None:
        """Start at the current parameters."""
        self.decay = decay
        self.count = 0
        self.values = {n: p.detach().clone() for n, p in trainee.named_parameters()}

    @torch.no_grad()
    def update(self, trainee: Trainee) -> None:
        """Move the average towards the current parameters, in place."""
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 9))
        for name, parameter in trainee.named_parameters():
            self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def rounded(self, trainee: Trainee) -> dict[str, torch.Tensor]:
        """Put the average, rounded to bfloat16, into the trainee; return what was there."""
        before = {n: p.detach().clone() for n, p in trainee.named_parameters()}
        for name, parameter in trainee.named_parameters():
            parameter.copy_(self.values[name].bfloat16())
        return before

    @torch.no_grad()
    def restore(self, trainee: Trainee, before: dict[str, torch.Tensor]) -> None:
        """Put the parameters that `rounded` returned back."""
        for name, parameter in trainee.named_parameters():
            parameter.copy_(before[name])


def accuracy_on(trainee: Trainee, half: str, seed: int, count: int) -> dict[str, float]:
    """Return the share of right answers per task on canvases 0 to count - 1 of a seed."""
    prompter = Prompter(trainee.tokenizer)
    results = []
    for i in range(count):
        canvas = canvas_at(seed, i, half)
        width, height = canvas.image.size
        results.append(trainee.exact_matches(collate([canvas], round(height / 32), round(width / 32), prompter, TASKS)))
    means = np.concatenate(results).mean(0)
    return {task: float(m) for task, m in zip(TASKS, means, strict=True)}


class Trainer:
    """Run the stages; save and resume."""

    def __init__(
        self,
        stages: list[Stage],
        folder: Path,
        log: Callable[[str], None],
        *,
        seed: int = 0,
        model: Qwen3VL | None = None,
    ) -> None:
        """Set up at the first step of the first stage.

        Args:
            stages: The curriculum.
            folder: Where the state file goes.
            log: Takes one line of text.
            seed: Seed of the weights and of every batch.
            model: Where to start, such as `upcycled`; random weights if not given.
        """
        self.stages, self.folder, self.log, self.seed = stages, folder, log, seed
        self.trainee = self.make_trainee(model)
        self.average = Average(self.trainee)
        self.stage, self.step = 0, 0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.seconds = [0.0] * len(stages)

    @property
    def state_file(self) -> Path:
        """The file that `save` writes and `resume` reads."""
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write the state file; the old one stays until the new one is whole."""
        state = {
            "trainee": dict(self.trainee.named_parameters()),
            "average": self.average.values,
            "count": self.average.count,
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    @torch.no_grad()
    def resume(self) -> None:
        """Go on from the state file."""
        state = torch.load(self.state_file, weights_only=True)
        for name, parameter in self.trainee.named_parameters():
            parameter.copy_(state["trainee"][name])
            self.average.values[name].copy_(state["average"][name])
        self.average.count = state["count"]
        self.stage, self.step = state["stage"], state["step"]
        self.seconds = [*state["seconds"], *([0.0] * len(self.stages))][: len(self.stages)]
        if self.stage < len(self.stages) and self.step < self.stages[self.stage].steps:
            self.optimizers = make_optimizer(self.trainee, self.stages[self.stage])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    @torch.no_grad()
    def start_from(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint folder, and start the last stage that trains the language model.

        The throw-away heads start at random: no checkpoint holds them.
        """
        weights = dict(load(Checkpoint.open(str(checkpoint))).named_parameters())
        for name, parameter in self.trainee.model.named_parameters():
            parameter.copy_(weights[name])
        self.average = Average(self.trainee)
        self.stage, self.step = len(self.stages) - 1, 0

    def make_trainee(self, model: Qwen3VL | None) -> Trainee:
        """Return what is trained."""
        return Trainee(self.seed, model)

    def make_batch(self, stage: Stage, pool: Digits, prompter: Prompter | None) -> Batch | DialogueBatch:
        """Return the batch of this step."""
        return training_batch(
            np.random.default_rng([self.seed, self.stage, self.step]),
            pool,
            prompter,
            max_side=stage.max_side,
            max_patches=stage.max_patches,
            max_images=stage.max_images,
            tasks=TASKS,
            free_sides=stage.free_sides,
            min_distractors=stage.min_distractors,
            conversations=stage.conversations,
        )

    def accuracy(self, half: str, count: int) -> dict[str, float]:
        """Return the share of right answers per task."""
        return accuracy_on(self.trainee, half, VALIDATION_SEED, count)

    def train_step(self, stage: Stage, pool: Digits, prompter: Prompter | None) -> dict[str, float]:
        """Do one optimiser step; return the parts of the loss."""
        batch = self.make_batch(stage, pool, prompter)
        rate = rate_at(stage, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.zero_grad()
        loss, parts = self.trainee.losses(batch, stage)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(self.trainee)
        return parts

    def run(self, on_report: Callable[[], None], *, report_every: int, validation_count: int) -> None:
        """Train until the last stage ends.

        Args:
            on_report: Called after each report and at the end, with the averaged, rounded weights in place.
            report_every: Steps between reports; the state is saved with each.
            validation_count: Canvases per half in a report.
        """
        pool = load_half("train")
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            prompter = Prompter(self.trainee.tokenizer) if stage.language else None
            if not self.optimizers:
                self.optimizers = make_optimizer(self.trainee, stage)
            sums: dict[str, float] = {}
            taken = 0
            while self.step < stage.steps:
                started = time.perf_counter()
                for name, value in self.train_step(stage, pool, prompter).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.seconds[self.stage] += time.perf_counter() - started
                self.step += 1
                taken += 1
                if self.step % report_every == 0 or self.step == stage.steps:
                    losses = " ".join(f"{k} {v / taken:.3f}" for k, v in sums.items())
                    self.log(f"{stage.name} {self.step}/{stage.steps} {self.seconds[self.stage]:.0f}s {losses}")
                    sums, taken = {}, 0
                    self.save()
                    self.report(stage, validation_count, on_report)
            self.stage, self.step, self.optimizers = self.stage + 1, 0, []
        self.save()

    def report(self, stage: Stage, count: int, on_report: Callable[[], None]) -> None:
        """Measure the averaged, rounded weights on both halves, log it, and call `on_report`."""
        before = self.average.rounded(self.trainee)
        if stage.language:
            for half in ("train", "held_out"):
                parts = self.accuracy(half, count)
                self.log(f"  {half}: " + " ".join(f"{k} {v:.3f}" for k, v in parts.items()))
        on_report()
        self.average.restore(self.trainee, before)
