"""`python -m benchmarks kv-policies`: what answers to long prompts lose by a smaller KV cache, and how small it is.

Every policy gets the same prompts and is compared with the exact cache, in float32. An answer counts as right if each
of its tokens is the likeliest one after the true ones before it, which is when the greedy answer is the true one.
Caches of few bits are engines of their own, which read their codes while the prompt runs; the other policies change the
rows once the prompt has run, and so leave the first token of an answer as it is.

Shapes: K kv heads, T rows, H head dim, M rows that are kept, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks import options
from benchmarks.low_rank import Basis, Rotation
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from demo_training.prompts import training_prompts
from engines.quantize.cache_ranges import scales_of
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo.long_tasks import LongPrompt, held_out_prompts
from qwen3vl_export.parity.metrics import log_softmax
from runtime.cache_eviction import choose_rows, pool_scores, window_scores
from runtime.cache_types import cache_types
from runtime.contract import DecoderInputs, FloatArray, IntArray
from runtime.generation import prefill_chunks

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel
    from runtime.positions import VisualSpan
    from runtime.preparation import Prepared
    from runtime.sessions.ort_cpu import OrtKVCache

TASKS = ("latest", "earlier", "picture")
LENGTHS = (1024, 2048, 4096)
SHARES = (2, 4, 8)
"""Rows that are kept: one of so many."""
EXACT = "exact"
_CACHES = ("int8", "int4", "mixed")
_CALIBRATION_CANVASES, _CALIBRATION_LONG, _FIRST_CALIBRATION = 32, 8, 100_000
_ROOM = 64
_CONTROL_SINKS = 4


def kv_policies(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint that answers the tasks of demo-long.")] = "demo-long",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 40,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engines.")] = 2,
    results: options.Results = RESULTS,
) -> None:
    """Ask long prompts of engines with smaller KV caches, and count right answers."""
    machine = environment()
    with tempfile.TemporaryDirectory() as folder:
        models = _engines(checkpoint, Path(folder), threads)
        study, found = _Study(models), []
        for length in LENGTHS:
            for task in TASKS:
                for prompt in held_out_prompts(task, prompts, max_tokens=length):
                    found += study.ask(prompt, length)
                typer.echo(f"{task}, {length} tokens", err=True)
            result = {
                "checkpoint": Checkpoint.open(checkpoint).short_name,
                "prompts": prompts,
                "layer_bits": {name: _bits(model) for name, model in models.items()},
                "errors": study.errors(),
                "answers": found,
                "environment": machine,
            }
            # After each length, since the last takes longest.
            write("kv-policies", result, table(result), results, shown=length == LENGTHS[-1])


def _engines(checkpoint: str, folder: Path, threads: int) -> dict[str, Qwen3VLModel]:
    """Build and open the exact engine, and those of few bits."""
    from engines.build import build_engine
    from engines.quantize.cache_ranges import CACHE_BITS, CacheQuantization
    from engines.quantize.calibration_data import CalibrationPrompt
    from engines.registry import get
    from qwen3vl_export.export import make_bundle
    from runtime.model import Qwen3VLModel

    bundle, target = make_bundle(Checkpoint.open(checkpoint)), get("ort-cpu-fp32")
    calibration = training_prompts(_CALIBRATION_CANVASES) + [
        CalibrationPrompt(f"long prompt {each.index}", [*each.messages, {"role": "assistant", "content": each.answer}])
        for each in _calibration_prompts()
    ]
    build_engine(bundle, target, folder / EXACT, kv_scores=True)
    for name in _CACHES:
        build_engine(bundle, target, folder / name, cache=CacheQuantization(CACHE_BITS.get(name), calibration))
    return {name: Qwen3VLModel.from_engine(folder / name, threads=threads, tuned=False) for name in (EXACT, *_CACHES)}


def _calibration_prompts() -> Iterator[LongPrompt]:
    """Yield long prompts that nobody is asked: of held-out digits too, but drawn with other numbers."""
    for task in ("latest", "picture"):
        yield from held_out_prompts(task, _CALIBRATION_LONG // 2, max_tokens=2048, start=_FIRST_CALIBRATION)


def _bits(model: Qwen3VLModel) -> list[int]:
    return [each.bits for each in cache_types(model.manifest.capabilities, model.config.text.num_layers)]


@dataclass
class _Run:
    """A prompt that has run.

    Attributes:
        embeds: Visual embeddings of its pictures.
        layers: Keys and values [K, T, H] of each layer.
        queries_WLNH: Of its last tokens.
        first_V: Logits after it.
    """

    prepared: Prepared
    embeds: FloatArray
    cache: OrtKVCache
    layers: list[tuple[FloatArray, FloatArray]]
    queries_WLNH: FloatArray
    first_V: FloatArray

    @property
    def num_rows(self) -> int:
        return len(self.prepared.prompt.input_ids)

    @property
    def spans(self) -> Sequence[VisualSpan]:
        return self.prepared.prompt.spans


class _Study:
    """Asks prompts of all policies."""

    def __init__(self, models: Mapping[str, Qwen3VLModel]) -> None:
        self._models, self._exact = models, models[EXACT]
        text = self._exact.config.text
        self._scale = text.head_dim**-0.5
        self._rng = np.random.default_rng(0)
        self._squares: dict[str, dict[str, NDArray[np.float64]]] = {}
        calibration = [self._run(each.messages) for each in (*training_prompts(8), *_calibration_prompts())]
        layers = range(text.num_layers)
        of_layers = [[[run.layers[i][kind] for run in calibration] for kind in (0, 1)] for i in layers]
        before = [[self._rotation(run).undo(run.layers[i][0]) for run in calibration] for i in layers]
        self._bases = {
            bits: [(*(Basis.of(rows, bits) for rows in of_layers[i]), Basis.of(before[i], bits)) for i in layers]
            for bits in (16, 8)
        }
        ranges = [[np.max([np.abs(each).max(1) for each in rows], axis=0) for rows in pair] for pair in of_layers]
        self._scales = scales_of(np.asarray(ranges, np.float32), 4)

    def ask(self, prompt: LongPrompt, length: int) -> list[dict[str, Any]]:
        """Return what each policy makes of a prompt."""
        run = self._run(prompt.messages)
        truth = [*self._exact.tokenizer.encode(prompt.answer), self._exact.defaults.eos_token_ids[0]]
        expected = self._answers(self._exact, run, truth, run.num_rows)
        found = {EXACT: (expected, run.num_rows)}
        for name, rows_of in self._evictions():
            kept = self._keep(run, rows_of)
            found[name] = self._answers(self._exact, run, truth, kept), kept
            self._restore(run)
        for name, layers in self._low_rank(run):
            self._write(run, layers)
            found[name] = self._answers(self._exact, run, truth, run.num_rows), run.num_rows
            self._restore(run)
        for name in _CACHES:
            other = self._prefilled(self._models[name], run)
            found[name] = self._answers(self._models[name], other, truth, run.num_rows), run.num_rows
        return [
            {
                "policy": name,
                "task": prompt.task,
                "length": length,
                "index": prompt.index,
                "rows": run.num_rows,
                "kept": kept,
                "right": bool((logits_TV.argmax(-1) == truth).all()),
                "kl": _kl(logits_TV, expected),
            }
            for name, (logits_TV, kept) in found.items()
        ]

    def errors(self) -> dict[str, dict[str, list[float]]]:
        """Return the error of each layer's keys and values over their norm, by way of rounding."""
        return {
            name: {kind: np.sqrt(parts[0] / parts[1]).tolist() for kind, parts in kinds.items()}
            for name, kinds in self._squares.items()
        }

    def _run(self, messages: list[dict[str, Any]]) -> _Run:
        model = self._exact
        prepared = model.prepare(messages)
        embeds = model.encode_images(prepared.images)
        inputs = prepared.decoder_inputs(embeds)
        num_rows = inputs.num_cache_rows
        cache = model.session.new_cache(num_rows + _ROOM)
        queries, logits = [], inputs
        for start in range(0, num_rows, 512):
            chunk = inputs.chunk(start, min(start + 512, num_rows))
            logits, found = model.session.prefill_with_queries(chunk, cache)
            queries.append(found)
        layers = [
            (keys[0, :, :num_rows], values[0, :, :num_rows])
            for keys, values in map(cache.layer, range(model.config.text.num_layers))
        ]
        window = int(model.manifest.capabilities["kv_scores"])
        return _Run(prepared, embeds, cache, layers, np.concatenate(queries)[-window:], logits[0, -1])

    def _prefilled(self, model: Qwen3VLModel, run: _Run) -> _Run:
        """Return the same prompt as another engine runs it; their vision towers are the same."""
        inputs = run.prepared.decoder_inputs(run.embeds)
        cache = model.session.new_cache(run.num_rows + _ROOM)
        *_, last_LV = prefill_chunks(model.session, cache, inputs)
        return replace(run, cache=cache, layers=[], first_V=last_LV[-1])

    def _answers(self, model: Qwen3VLModel, run: _Run, truth: Sequence[int], num_rows: int) -> FloatArray:
        """Return the logits before each true token, [T, V]; the tokens follow `num_rows` rows of the cache."""
        delta = run.prepared.positions.delta + run.num_rows - num_rows
        inputs = DecoderInputs.text(np.array([truth[:-1]]), np.array([num_rows]), run.embeds[:, :1], delta=delta)
        return np.concatenate([run.first_V[None], model.session.prefill(inputs, run.cache)[0]])

    def _evictions(self) -> Iterator[tuple[str, Callable[[_Run, int, int], IntArray]]]:
        """Yield policies that keep some rows: a function of run, layer and rows to keep, which returns [K, M]."""

        def scores(run: _Run, layer: int) -> FloatArray:
            return window_scores(run.queries_WLNH[:, layer], run.layers[layer][0], self._scale)

        def by_attention(run: _Run, layer: int, budget: int) -> IntArray:
            return choose_rows(scores(run, layer), budget, len(run.queries_WLNH), run.spans)

        def together(run: _Run, layer: int, budget: int) -> IntArray:
            return choose_rows(scores(run, layer), budget, len(run.queries_WLNH))

        def pooled_apart(run: _Run, layer: int, budget: int) -> IntArray:
            window = len(run.queries_WLNH)
            votes_KT = pool_scores(scores(run, layer), run.spans)
            votes_KT[:, -window:] = np.inf
            return np.sort(np.argsort(-votes_KT, axis=1, kind="stable")[:, :budget], axis=1)

        def at_random(run: _Run, layer: int, budget: int) -> IntArray:
            window, (num_heads, num_rows, _) = len(run.queries_WLNH), run.layers[layer][0].shape
            last = np.arange(num_rows - window, num_rows)
            drawn = [self._rng.choice(num_rows - window, budget - window, replace=False) for _ in range(num_heads)]
            return np.sort([np.concatenate([each, last]) for each in drawn], axis=1)

        def newest(run: _Run, layer: int, budget: int) -> IntArray:
            num_heads, num_rows, _ = run.layers[layer][0].shape
            first, last = np.arange(_CONTROL_SINKS), np.arange(num_rows - budget + _CONTROL_SINKS, num_rows)
            return np.tile(np.concatenate([first, last]), (num_heads, 1))

        kinds = {
            "by attention": by_attention,
            "by attention, visual rows not apart": together,
            "by attention, pooled apart alone": pooled_apart,
            "at random": at_random,
            "first 4 and newest": newest,
        }
        for name, choose in kinds.items():
            for share in SHARES:
                yield (
                    f"1/{share} {name}",
                    lambda run, layer, _, choose=choose, share=share: choose(run, layer, run.num_rows // share),
                )

    def _keep(self, run: _Run, rows_of: Callable[[_Run, int, int], IntArray]) -> int:
        for layer in range(len(run.layers)):
            rows_KM = rows_of(run, layer, 0)
            run.cache.keep_rows(layer, 0, rows_KM)
        return rows_KM.shape[1]

    def _low_rank(self, run: _Run) -> Iterator[tuple[str, list[tuple[FloatArray, FloatArray]]]]:
        """Yield what caches of the bytes of int4 keep, and count their errors."""
        rotation, ways = self._rotation(run), {}
        int4 = [
            tuple(_rounded(part, scales) for part, scales in zip(pair, self._scales[i], strict=True))
            for i, pair in enumerate(run.layers)
        ]
        ways["int4 after the prompt"] = int4
        for bits, bases in self._bases.items():
            name = f"rank {bases[0][0].directions_KHR.shape[-1]} in {'float16' if bits == 16 else 'int8'}"
            pairs = list(zip(run.layers, bases, strict=True))
            values = [of_values.kept(pair[1]) for pair, (_, of_values, _) in pairs]
            cached = [of_keys.kept(pair[0]) for pair, (of_keys, _, _) in pairs]
            turned = [rotation.apply(of_keys.kept(rotation.undo(pair[0]))) for pair, (_, _, of_keys) in pairs]
            ways[f"{name}, keys as cached"] = list(zip(cached, values, strict=True))
            ways[f"{name}, keys before rotation"] = list(zip(turned, values, strict=True))
            ways[f"{name}, values alone, keys int4"] = list(zip([keys for keys, _ in int4], values, strict=True))
        for name, layers in ways.items():
            kinds = self._squares.setdefault(name, {})
            for place, kind in enumerate(("keys", "values")):
                sums = [
                    (((low[place] - exact[place]) ** 2).sum(), (exact[place] ** 2).sum())
                    for low, exact in zip(layers, run.layers, strict=True)
                ]
                kinds[kind] = kinds.get(kind, np.zeros(())) + np.array(sums, np.float64).T
            yield name, layers

    def _rotation(self, run: _Run) -> Rotation:
        return Rotation(self._exact.config.text, run.prepared.positions.position_ids)

    def _restore(self, run: _Run) -> None:
        self._write(run, run.layers)

    def _write(self, run: _Run, layers: Sequence[tuple[FloatArray, FloatArray]]) -> None:
        room = ((0, 0), (0, _ROOM), (0, 0))
        for layer, pair in enumerate(layers):
            run.cache.write_layer(layer, *(np.pad(part, room)[None] for part in pair))


def _rounded(rows_KTH: FloatArray, scales_KH: FloatArray) -> FloatArray:
    from engines.quantize.cache_sensitivity import rounded

    return rounded(rows_KTH[None], 4, scales_KH)[0]


def _kl(found_TV: FloatArray, expected_TV: FloatArray) -> float:
    expected, found = log_softmax(expected_TV), log_softmax(found_TV)
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


def table(result: Mapping[str, Any]) -> str:
    """Return right answers by policy and length, bytes, and the errors of low rank beside those of int4."""
    answers = result["answers"]
    policies = list(dict.fromkeys(each["policy"] for each in answers))
    exact = {_key(each): each["right"] for each in answers if each["policy"] == EXACT}
    head = ["policy", "of float16's bytes", *(f"right at {length}" for length in LENGTHS), "lost", "gained", "mean KL"]
    rows: list[list[str]] = [head]
    half = 16 * len(result["layer_bits"][EXACT])
    for policy in policies:
        mine = [each for each in answers if each["policy"] == policy]
        cells = []
        for length in LENGTHS:
            right = [each["right"] for each in mine if each["length"] == length]
            cells.append(f"{100 * np.mean(right):.1f} %" if right else "")
        lost = sum(exact[_key(each)] and not each["right"] for each in mine)
        gained = sum(each["right"] and not exact[_key(each)] for each in mine)
        share = _share_of_half(policy, mine, result["layer_bits"], half)
        kl = np.mean([each["kl"] for each in mine])
        rows.append([policy, f"{share:.3f}", *cells, str(lost), str(gained), f"{kl:.2g}"])
    per_cell = result["prompts"]
    errors = [["kept as", "of", *(f"layer {i}" for i in range(len(result["layer_bits"][EXACT])))]]
    for name, kinds in result["errors"].items():
        errors += [[name, kind, *(f"{100 * each:.1f} %" for each in values)] for kind, values in kinds.items()]
    return (
        f"{result['checkpoint']}, {per_cell} prompts of each of {', '.join(TASKS)} at each length; prompts of up to so "
        "many tokens. Rows that are kept count in float16. Lost and gained: right with the exact cache alone, and with "
        f"the policy alone, of {len(exact)}.\n\n{markdown(rows)}\nError over norm, by layer:\n\n{markdown(errors)}"
    )


def _share_of_half(
    policy: str, mine: Sequence[Mapping[str, Any]], layer_bits: Mapping[str, Sequence[int]], half: int
) -> float:
    if policy in layer_bits:
        return sum(layer_bits[policy]) / half
    if policy.startswith(("rank", "int4")):
        return 0.25
    return float(np.mean([each["kept"] / each["rows"] for each in mine]))


def _key(answer: Mapping[str, Any]) -> tuple[Any, ...]:
    return answer["task"], answer["length"], answer["index"]
