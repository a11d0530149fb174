"""Prompt lookup on an engine: `python -m benchmarks speculation ENGINE`.

Three questions: what a call of several positions costs; how fast an answer comes if a given share of the drafted
tokens is right; and what share is right in OCR-like texts. The tokens of every answer are given beforehand: `choose`
looks at the logits, as greedy decoding does, and returns the given token. So random weights will do, and rounding
decides nothing.

Contenders take turns token by token, in an order drawn anew each turn: what else the machine does meets all alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import measure, ocr_texts, report
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.generation import Drafter, decode_steps
from runtime.manifest import Manifest
from runtime.prompt_lookup import DRAFT_COST, PromptLookup
from runtime.sampling import greedy
from runtime.session import Session, SessionOptions, open_session

POSITIONS = (1, 2, 3, 4, 6, 8, 11, 16)
RATES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
SIZES = ((3, 2), (2,), (3, 2, 1), (4, 3, 2), (4, 3, 2, 1))
NUM_SETS = 6
PLAIN = "plain"


class _Script:
    """Stands where the n-gram index does: the given next tokens, each right with probability `rate`."""

    def __init__(self, tokens: list[int], rate: float, rng: random.Random) -> None:
        self._tokens, self._rate, self._rng = tokens, rate, rng
        self._next = 0

    def append(self, token_id: int) -> None:
        self._next += 1

    def following(self, num_tokens: int) -> list[int]:
        tokens = self._tokens[self._next : self._next + num_tokens]
        return [token if self._rng.random() < self._rate else token ^ 1 for token in tokens]


class ForcedDrafts(PromptLookup):
    """Drafts of a forced acceptance rate, as long as those of prompt lookup would be."""

    def __init__(self, tokens: list[int], max_tokens: int, rate: float, rng: random.Random) -> None:
        super().__init__((), max_tokens)
        self._index = _Script(tokens, rate, rng)


@dataclass
class Contender:
    """One answer on its way."""

    steps: Iterator[int]
    seconds: float = 0.0

    def step(self) -> None:
        """Take the next token and add its time."""
        start = time.perf_counter()
        next(self.steps)
        self.seconds += time.perf_counter() - start


class Engine:
    """A session, and a cache for each contender that is filled to `num_cached` positions with zeros."""

    def __init__(self, folder: Path, threads: int, num_cached: int) -> None:
        manifest = Manifest.read(folder)
        self.target, self.config = manifest.target, manifest.model
        self.session: Session = open_session(folder, manifest, SessionOptions(threads))
        self.num_cached = num_cached
        self._embeds = no_visual_embeds(self.config)

    def contender(self, tokens: list[int], drafter: Drafter | None) -> Contender:
        """Begin the answer `tokens`; the first of them comes from the prompt and is not timed."""
        script = iter(tokens)

        def choose(logits_V: np.ndarray) -> int:
            greedy(logits_V)
            return next(script)

        cache = self.session.new_cache(self.num_cached + len(tokens))
        logits = np.zeros(self.config.text.vocab_size, np.float32)
        steps = decode_steps(self.session, cache, logits, self.num_cached, 0, self._embeds, choose, drafter)
        next(steps)
        return Contender(steps)

    def call_costs(self, repeats: int) -> list[dict[str, float]]:
        """Time calls of several positions, all of which get logits."""
        cache = self.session.new_cache(self.num_cached + max(POSITIONS))
        seconds: dict[int, list[float]] = {num_new: [] for num_new in POSITIONS}
        for turn in range(repeats + 1):
            for num_new in POSITIONS:
                places = np.arange(self.num_cached, self.num_cached + num_new)
                start = time.perf_counter()
                self.session.decode(DecoderInputs.text(places[None], np.array([self.num_cached]), self._embeds), cache)
                if turn:
                    seconds[num_new].append(time.perf_counter() - start)
        medians = {num_new: statistics.median(times) for num_new, times in seconds.items()}
        ratios = {n: statistics.median(np.divide(seconds[n], seconds[1]).tolist()) for n in POSITIONS}
        return [
            {"positions": n, "median_s": medians[n], "min_s": min(seconds[n]), "cost": ratios[n]} for n in POSITIONS
        ]


def race(engine: Engine, tokens: list[int], drafters: Mapping[str, PromptLookup], seed: int) -> dict[str, Any]:
    """Let plain decoding and each drafter give the same tokens, side by side."""
    names = [PLAIN, *drafters]
    contenders = {name: engine.contender(tokens, drafters.get(name)) for name in names}
    rng = random.Random(seed)
    for _ in range(len(tokens) - 1):
        rng.shuffle(names)
        for name in names:
            contenders[name].step()
    plain = contenders[PLAIN].seconds
    result = {}
    for name, contender in contenders.items():
        drafter = drafters.get(name)
        result[name] = {
            "tokens": len(tokens) - 1,
            "seconds": contender.seconds,
            "speed": plain / contender.seconds,
            "drafted": drafter.num_drafted if drafter else 0,
            "accepted": drafter.num_accepted if drafter else 0,
        }
    return result


def forced(engine: Engine, num_tokens: int, max_drafts: int, seed: int) -> dict[str, Any]:
    """Race plain decoding against drafts of each rate."""
    rng = random.Random(seed)
    tokens = [rng.randrange(engine.config.text.vocab_size - 1) for _ in range(num_tokens + 1)]
    drafters = {f"{rate:.0%}": ForcedDrafts(tokens, max_drafts, rate, random.Random(seed)) for rate in RATES}
    return race(engine, tokens, drafters, seed)


def natural(engine: Engine, text: ocr_texts.Text, max_drafts: int) -> dict[str, Any]:
    """Race plain decoding of a text against prompt lookup."""
    drafters = {"lookup": PromptLookup(text.prompt_ids, max_drafts)}
    return race(engine, text.answer_ids, drafters, seed=0)


def expected_speed(text: ocr_texts.Text, sizes: tuple[int, ...], max_drafts: int) -> float:
    """Return the speed of prompt lookup over plain decoding, were a drafted token to cost DRAFT_COST of a call."""
    lookup, ids = PromptLookup(text.prompt_ids, max_drafts, sizes=sizes), text.answer_ids
    lookup.append(ids[0])
    place, num_calls = 1, 0
    while place < len(ids):
        drafts = lookup.draft(len(ids) - place - 1)
        num_calls += 1
        for draft in [*drafts, None]:
            lookup.append(ids[place])
            place += 1
            if draft != ids[place - 1]:
                break
    return (len(ids) - 1) / (num_calls + DRAFT_COST * lookup.num_drafted)


def summary(passes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each contender's medians over the passes, and the extremes of its speed."""
    result = {}
    for name in passes[0]:
        values = [one[name] for one in passes]
        speeds = [value["speed"] for value in values]
        result[name] = {key: statistics.median(value[key] for value in values) for key in values[0]}
        result[name] |= {"min_speed": min(speeds), "max_speed": max(speeds)}
    return result


def table(result: Mapping[str, Any]) -> str:
    """Return the body of the result's page."""
    costs = [("positions", "s", "calls of one position")]
    costs += [(f"{c['positions']}", f"{c['median_s']:.4f}", f"{c['cost']:.2f}") for c in result["costs"]]
    head = ("× plain", "least", "most", "tokens/s", "drafted", "accepted")
    races = [("right drafts", *head), *((name, *_cells(values)) for name, values in result["forced"].items())]
    texts = [("text", *head), *((name, *_cells(values["lookup"])) for name, values in result["natural"].items())]
    sizes = [("n-grams", *result["natural"])]
    sizes += [(name, *(f"{speed:.2f}" for speed in speeds.values())) for name, speeds in result["sizes"].items()]
    return f"""{result["target"]}, {result["threads"]} threads, {result["num_cached"]} positions in the cache, drafts of
at most {result["max_drafts"]} tokens. The tokens of all answers are given; the contenders of a race take turns token by
token.

Cost of a call, all positions of which get logits (prompt lookup reckons with 1 + {DRAFT_COST} a drafted token):

{report.table(costs)}
{result["tokens"]} tokens with drafts of which a forced share is right, median of {result["passes"]} races:

{report.table(races)}
Texts in pieces of Qwen's pre-tokenizer, looked up in prompt and answer, one race:

{report.table(texts)}
Expected speed by the n-grams that are looked up, from the cost above, mean of {result["sets"]} sets of texts:

{report.table(sizes)}"""


def _cells(values: Mapping[str, float]) -> tuple[str, ...]:
    speeds = (f"{values[key]:.3f}" for key in ("speed", "min_speed", "max_speed"))
    rate = f"{values['tokens'] / values['seconds']:.1f}"
    return (*speeds, rate, f"{values['drafted']:.0f}", f"{values['accepted']:.0f}")


def speculation(
    engine: Annotated[Path, typer.Argument(help="Engine folder; random weights will do.")],
    name: Annotated[str, typer.Option(help="Names the result: speculation-NAME.")] = "",
    threads: int = 2,
    tokens: Annotated[int, typer.Option(help="Length of the answers with forced drafts.")] = 256,
    num_cached: Annotated[int, typer.Option(help="Positions in the cache before the answer.")] = 512,
    max_drafts: Annotated[int, typer.Option(help="What prompt_lookup_num_tokens would be.")] = 10,
    passes: int = 3,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")] = report.RESULTS,
) -> None:
    """Measure prompt lookup: cost of a call, speed against acceptance, acceptance on OCR-like texts."""
    environment = measure.environment()
    opened = Engine(engine, threads, num_cached)
    sets = [ocr_texts.texts(seed) for seed in range(NUM_SETS)]
    result = {
        "target": opened.target,
        "threads": threads,
        "num_cached": num_cached,
        "max_drafts": max_drafts,
        "tokens": tokens,
        "passes": passes,
        "sets": NUM_SETS,
        "costs": opened.call_costs(5 * passes),
        "forced": summary([forced(opened, tokens, max_drafts, seed) for seed in range(passes)]),
        "natural": {text.name: summary([natural(opened, text, max_drafts)]) for text in sets[0]},
        "sizes": {
            ", ".join(map(str, sizes)): {
                kind[0].name: statistics.mean(expected_speed(text, sizes, max_drafts) for text in kind)
                for kind in zip(*sets, strict=True)
            }
            for sizes in SIZES
        },
        "environment": environment,
    }
    path = report.write(f"speculation-{name or engine.resolve().name}", result, results)
    typer.echo(path.read_text(encoding="utf-8"))
