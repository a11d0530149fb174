"""Engines that share the work of one: the bits of one alone, or of the same calls by hand, whatever runs beside."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from helpers.engines import build, requantized
from helpers.serving import alone, asked, held_until_submitted, serving, watched_logits
from helpers.wrong_rows import layers_swapped, shifted
from runtime import generation, moved_rows
from runtime.cache_types import CacheType
from runtime.contract import FloatArray, no_visual_embeds, on_host
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.routed_session import RoutedCache, RoutedSession
from runtime.session import VISION, Session, SessionOptions, open_session
from runtime.sessions.ort_cpu import OrtKVCache

NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_ids": ()}
LONG = "Say where each of the digits is. " * 12
QUESTIONS = [
    asked("Read the digits.", 0),
    asked("What is the sum of the digits?", 1, 2),
    asked(LONG + "Which is the largest?", 3),
    asked("Hello."),
    asked(LONG + "Which is the smallest?", 3),  # shares rows with one before
]
Engines = Callable[[str], Path]


@pytest.fixture(scope="module")
def engines(demo_bundle: Bundle, demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    made = {"fp32": demo_engine}

    def engine(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("routed") / name
            if name == "copy":
                made[name] = Path(shutil.copytree(demo_engine, folder))
            elif name == "codes":
                from demo_training.prompts import training_prompts

                made[name] = requantized(demo_engine, folder, 8, training_prompts(2))
            elif name == "codes-copy":
                made[name] = Path(shutil.copytree(engine("codes"), folder))
            else:
                made[name] = build(demo_bundle, f"ort-cpu-{name}", folder)
        return made[name]

    return engine


@pytest.fixture
def opened(engines: Engines) -> Iterator[Callable[..., Qwen3VLModel]]:
    models: list[Qwen3VLModel] = []

    def open_model(name: str, **route: str) -> Qwen3VLModel:
        others: dict[str, Any] = {option: engines(other) for option, other in route.items()}
        models.append(Qwen3VLModel.from_engine(engines(name), threads=1, max_context=1024, **others))
        return models[-1]

    yield open_model
    for model in models:
        model.close(drain=False)


def answers_of(model: Qwen3VLModel, questions: list[Any]) -> tuple[list[list[int]], list[list[FloatArray]]]:
    """Ask one question after the other: tokens, and the logits that each was chosen from."""
    with watched_logits() as found:
        token_ids = [model.generate(each, **GREEDY).token_ids for each in questions]
    return token_ids, list(found.values())


def check_same_bits(found: Qwen3VLModel, expected: Qwen3VLModel, questions: list[Any] = QUESTIONS) -> None:
    token_ids, logits = answers_of(found, questions)
    expected_ids, expected_logits = answers_of(expected, questions)
    assert token_ids == expected_ids
    for ours, theirs in zip(logits, expected_logits, strict=True):
        np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))


# An engine and a copy of it: what it gives alone, to the bit

ROUTES = [
    {"prefill_engine": "copy"},
    {"vision_engine": "copy"},
    {"vision_engine": "copy", "prefill_engine": "copy"},
]


@pytest.mark.parametrize("chunk", [512, 24])
@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_an_engine_routed_to_its_copy_gives_the_same_bits(
    route: dict[str, str], chunk: int, opened: Callable[..., Qwen3VLModel]
) -> None:
    routed, plain = (
        serving(model, prefill_chunk=chunk, last_chunk=chunk) for model in (opened("fp32", **route), opened("fp32"))
    )
    check_same_bits(routed, plain)
    found, expected = routed.statistics(), plain.statistics()
    for name in ("prefill_chunks", "cached_tokens", "prefix_hits", "vision_calls"):
        assert found[name] == expected[name], name
    assert expected["cached_tokens"] > 100, "rows were shared"
    np.testing.assert_array_equal(routed.logits(QUESTIONS[1]), plain.logits(QUESTIONS[1]))


def test_codes_move_as_they_are(opened: Callable[..., Qwen3VLModel]) -> None:
    check_same_bits(opened("codes", prefill_engine="codes-copy"), opened("codes"))


def test_a_conversation_gets_the_answers_that_it_gets_without(opened: Callable[..., Qwen3VLModel]) -> None:
    """Rows of an answer are those of the engine that decodes, so the next turn runs its tokens as a prompt."""
    routed, plain = (model.chat(**GREEDY) for model in (opened("fp32", prefill_engine="copy"), opened("fp32")))
    for text in (LONG, "Again, please.", "And once more."):
        found, expected = routed.ask(text), plain.ask(text)
        assert found.token_ids == expected.token_ids
        if len(routed.turns) > 1:
            assert 0 < found.stats.cached_tokens < expected.stats.cached_tokens


# Different engines: what the same calls give by hand


def by_hand(
    decode: Session, prefill: Session, vision: Session, model: Qwen3VLModel, question: Any, chunk: int
) -> tuple[list[int], list[tuple[FloatArray, FloatArray]]]:
    """Encode and prefill on one engine, copy the rows as float32, decode greedily on another."""
    prepared = model.prepare(question)
    ids, positions = prepared.prompt.input_ids, prepared.positions
    images = [on_host(vision.vision(model.preparation.vision_inputs(image))) for image in prepared.images]
    embeds = np.concatenate(images, axis=1) if images else no_visual_embeds(model.config)
    source = prefill.new_cache(len(ids) + NEW_TOKENS)
    logits = generation.prefill(prefill, source, prepared.decoder_inputs(embeds), chunk=chunk)[-1]
    cache: Any = decode.new_cache(len(ids) + NEW_TOKENS)
    layers = [source.layer(index) for index in range(model.config.text.num_layers)]
    cache.write_rows(0, 0, [array[0, :, : len(ids)] for pair in layers for array in pair])
    steps = generation.decode_steps(
        decode,
        cache,
        logits,
        len(ids),
        positions.delta,
        no_visual_embeds(model.config),
        lambda each: int(each.argmax()),
    )
    return [next(steps) for _ in range(NEW_TOKENS)], [
        (keys[:, :, : len(ids)], values[:, :, : len(ids)]) for keys, values in layers
    ]


@pytest.mark.parametrize(
    ("decode", "prefill", "vision"), [("int4", "fp32", "int8"), ("fp32", "int4", "int4"), ("int8", "fp32", "int8")]
)
def test_a_mixed_route_is_the_same_calls_made_by_hand(
    decode: str, prefill: str, vision: str, opened: Callable[..., Qwen3VLModel], engines: Engines
) -> None:
    route = {"prefill_engine": prefill} | ({"vision_engine": vision} if vision != decode else {})
    model = opened(decode, **route)
    single = alone(model)
    sessions = {
        name: open_session(engines(name), Manifest.read(engines(name)), SessionOptions(threads=1))
        for name in {decode, prefill, vision}
    }
    others = []
    for question in QUESTIONS[:4]:
        expected, layers = by_hand(
            sessions[decode], sessions[prefill], sessions[vision], single, question, single.limits.prefill_chunk
        )
        assert single.generate(question, **GREEDY).token_ids == expected
        cache = rows_after_prefill(single, question)
        for found, right in zip(cache, layers, strict=True):
            np.testing.assert_array_equal(found[0], right[0])
            np.testing.assert_array_equal(found[1], right[1])
        others.append(rows_after_prefill(alone(opened(decode)), question))
        assert not np.array_equal(others[-1][1][0], layers[1][0]), "the engine alone computes something else"


def rows_after_prefill(model: Qwen3VLModel, question: Any) -> list[tuple[FloatArray, FloatArray]]:
    """Return keys and values of a prompt in the cache that decodes."""
    prepared = model.prepare(question)
    cache = model.session.new_cache(len(prepared.prompt.input_ids))
    inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
    generation.prefill(model.session, cache, inputs, chunk=model.limits.prefill_chunk)
    return [cache.layer(index) for index in range(model.config.text.num_layers)]


# Beside each other


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_prompts_that_take_turns_get_the_answers_that_they_get_alone(
    route: dict[str, str], opened: Callable[..., Qwen3VLModel]
) -> None:
    expected, _ = answers_of(alone(opened("fp32")), QUESTIONS)
    model = serving(opened("fp32", **route), max_sequences=3, kept_sequences=1, prefill_chunk=24, last_chunk=24)
    with held_until_submitted(model, 3):
        together = model.generate_batch([*QUESTIONS, *QUESTIONS], **GREEDY)
    assert [each.token_ids for each in together] == [*expected, *expected]
    assert model.statistics()["batch_size"]["sum"] > model.statistics()["batch_size"]["count"]


def test_staging_is_filled_again_only_when_prompts_take_turns(opened: Callable[..., Qwen3VLModel]) -> None:
    model = serving(opened("fp32", prefill_engine="copy"), prefix_cache=False, prefill_chunk=24, last_chunk=24)
    caches: list[RoutedCache] = []
    new_cache = model.session.new_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoutedSession, "new_cache", lambda *sizes: caches.append(new_cache(*sizes[1:])) or caches[-1])
        watched = serving(model, prefix_cache=False, prefill_chunk=24, last_chunk=24)
    (cache,) = caches
    stats = [watched.generate(each, **GREEDY).stats for each in QUESTIONS[:3]]
    assert cache.moved_rows == sum(each.prompt_tokens for each in stats), "each row moves once"
    assert cache.restored_rows == 0
    with held_until_submitted(watched, 3):
        watched.generate_batch(QUESTIONS[2::-1], **GREEDY)  # the longest first, and others between its chunks
    assert cache.restored_rows > 0
    assert cache.moved_rows == 2 * sum(each.prompt_tokens for each in stats)


def test_a_prompt_that_is_cancelled_leaves_the_others_right(opened: Callable[..., Qwen3VLModel]) -> None:
    expected, _ = answers_of(alone(opened("fp32")), QUESTIONS)
    model = serving(
        opened("fp32", prefill_engine="copy", vision_engine="copy"), prefill_chunk=16, last_chunk=16, max_sequences=2
    )
    started, prefill = threading.Event(), model.session.prefill
    chunks: list[int] = []

    def watched(*arguments: Any) -> FloatArray:
        chunks.append(1)
        if len(chunks) == 3:
            started.set()
        return prefill(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.session, "prefill", watched)
        stream = model.stream(QUESTIONS[2], **GREEDY)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        assert started.wait(60)
        stream.close()
        reader.join(60)
    assert [model.generate(each, **GREEDY).token_ids for each in QUESTIONS] == expected


def test_the_vision_tower_of_another_engine_runs_beside_steps(engines: Engines) -> None:
    class Gpu:
        """A session that lets nothing run beside it."""

    cpu = open_session(engines("fp32"), Manifest.read(engines("fp32")), SessionOptions(parts=frozenset({VISION})))
    gpu, other, first = (Gpu() for _ in range(3))

    def beside(*sessions: Any, on_gpu: Any = ()) -> bool:
        return RoutedSession(*sessions, on_gpu=on_gpu).runs_vision_beside

    assert beside(first, first, cpu) and beside(gpu, gpu, cpu, on_gpu=[gpu])
    assert beside(first, other, gpu, on_gpu=[gpu]), "the only session on the GPU"
    assert not beside(gpu, gpu, gpu, on_gpu=[gpu]) and not beside(first, gpu, gpu, on_gpu=[gpu])
    assert not beside(first, other, gpu, on_gpu=[gpu, other]) and not beside(other, first, gpu, on_gpu=[gpu, other])


def test_a_session_says_what_the_session_of_the_part_says() -> None:
    class Part:
        def __init__(self, **values: Any) -> None:
            self.__dict__ |= values

    session = RoutedSession(
        Part(free_bytes=7, chunk_sizes=(1,), max_segments=1),  # type: ignore[arg-type]
        Part(chunk_sizes=(16, 32), free_bytes=8),  # type: ignore[arg-type]
        Part(max_segments=3),  # type: ignore[arg-type]
    )
    assert (session.free_bytes, session.chunk_sizes, session.max_segments) == (7, (16, 32), 3)
    assert not hasattr(session, "decode_kernels") and not hasattr(session, "anything_else")
    assert session.decodes_anywhere(1) is False


# The two caches

SHAPE = (4, 2, 12, 3)  # B, K, T, H
LAYERS = 2
TYPES = {"float32": CacheType("float32", 32), "float16": CacheType("float16", 16)}


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32"), ("float32", "float16")], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_a_chunk_finds_the_rows_of_its_slot_in_staging(seed: int, dtypes: tuple[str, str]) -> None:
    """Slots are filled, shared, exchanged and written to at random; each holds the numbers of its own rows."""
    generator = np.random.default_rng(seed)
    cache = OrtKVCache([TYPES[dtypes[0]]] * LAYERS, SHAPE)
    staging = OrtKVCache([TYPES[dtypes[1]]] * LAYERS, (1, *SHAPE[1:]))
    routed = RoutedCache(cache, staging)
    truth: list[list[float]] = [[] for _ in range(SHAPE[0])]  # the number that all elements of a row are
    num_chunks = num_past = 0

    def numbers(count: int) -> list[float]:
        return [float(np.float16(each)) for each in generator.uniform(1, 2, count)]

    def rows(values: list[float]) -> list[FloatArray]:
        _, heads, _, width = SHAPE
        return [np.broadcast_to(np.array(values, np.float32)[None, :, None], (heads, len(values), width))] * 2 * LAYERS

    def stored(which: OrtKVCache, slot: int, count: int) -> list[float]:
        arrays = which.read_rows(slot, 0, count)
        assert all((array == arrays[0]).all() and (array == array[:1, :, :1]).all() for array in arrays)
        return [float(each) for each in arrays[0][0, :, 0]]

    for _ in range(300):
        slot, other = (int(each) for each in generator.choice(SHAPE[0], 2, replace=False))
        match generator.choice(["chunk", "chunk", "chunk", "copy", "swap", "forget", "step"]):
            case "chunk":
                past = len(truth[slot]) if generator.random() < 0.7 else int(generator.integers(len(truth[slot]) + 1))
                new = numbers(int(generator.integers(1, 5)))
                if past + len(new) > SHAPE[2]:
                    continue
                routed.fill_staging(slot, past)
                assert stored(staging, 0, past) == truth[slot][:past]
                staging.write_rows(0, past, rows(new))
                routed.take_rows(slot, past, past + len(new))
                truth[slot] = truth[slot][:past] + new
                num_chunks, num_past = num_chunks + 1, num_past + past
            case "copy":
                count = int(generator.integers(len(truth[slot]) + 1))
                routed.copy_rows(slot, other, count)
                truth[other] = truth[slot][:count]
            case "swap":
                routed.swap_rows(slot, other, max(len(truth[slot]), len(truth[other])))
                truth[slot], truth[other] = truth[other], truth[slot]
            case "forget":
                truth[slot] = truth[slot][: int(generator.integers(len(truth[slot]) + 1))]
            case "step":
                past = len(truth[slot])
                if past < SHAPE[2]:
                    cache.write_rows(slot, past, rows(new := numbers(1)))
                    routed.is_written(slot, [past])
                    truth[slot] = truth[slot] + new
        for each in range(SHAPE[0]):
            assert stored(cache, each, len(truth[each])) == truth[each]
    assert num_chunks > 50 and 0 < routed.restored_rows < num_past, "some chunks went on where staging ended"


def test_a_chunk_sees_its_past_as_it_is_in_the_cache() -> None:
    """A past that was rounded on its way is rounded for the next chunk too, whatever prompts came between."""
    cache, staging = OrtKVCache([TYPES["float16"]], (2, 1, 8, 2)), OrtKVCache([TYPES["float32"]], (1, 1, 8, 2))
    routed = RoutedCache(cache, staging)
    values = np.full((1, 4, 2), 1 / 3, np.float32)
    routed.fill_staging(0, 0)
    staging.write_rows(0, 0, [values, values])
    routed.take_rows(0, 0, 4)
    routed.fill_staging(0, 4)
    np.testing.assert_array_equal(staging.read_rows(0, 0, 4)[0], values.astype(np.float16).astype(np.float32))
    assert routed.restored_rows == 0


# Sabotage: the same comparisons must fail


def last_row_lost(original: Any, self: RoutedCache, slot: int, start: int, stop: int) -> None:
    original(self, slot, start, stop)
    self.cache.write_rows(slot, stop - 1, [each[:, :1] * 0 for each in self.cache.read_rows(slot, start, stop)])


@pytest.mark.parametrize("fault", [shifted, layers_swapped, last_row_lost])
def test_rows_that_arrive_wrong_are_noticed(
    fault: Callable[..., None], opened: Callable[..., Qwen3VLModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RoutedCache.take_rows
    monkeypatch.setattr(RoutedCache, "take_rows", lambda *arguments: fault(original, *arguments))
    with pytest.raises(AssertionError):
        check_same_bits(opened("fp32", prefill_engine="copy"), opened("fp32"))


def test_staging_that_is_not_filled_again_is_noticed(
    opened: Callable[..., Qwen3VLModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were found in the cache, and are not in staging."""
    original = moved_rows.converted
    monkeypatch.setattr(
        "runtime.routed_session.converted",
        lambda rows, source, target: [each * (each.shape[1] < 100) for each in original(rows, source, target)],
    )
    with pytest.raises(AssertionError):
        check_same_bits(opened("fp32", prefill_engine="copy"), opened("fp32"))


def test_embeddings_of_another_image_are_noticed(
    opened: Callable[..., Qwen3VLModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, kept = RoutedSession.vision, []

    def vision(session: RoutedSession, inputs: Any) -> Any:
        kept.append(original(session, inputs))
        return kept[0]

    monkeypatch.setattr(RoutedSession, "vision", vision)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), np.uint8)
    questions = [asked("Read the digits.", each) for each in pixels]
    with pytest.raises(AssertionError):
        check_same_bits(opened("fp32", vision_engine="copy"), opened("fp32"), questions)
