"""The model's face: streaming, closing, threads, limits, bad messages."""

from __future__ import annotations

import asyncio
import dis
import itertools
import json
import re
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3vl_export.demo import IMAGES
from runtime.chat import ChatTemplate
from runtime.errors import CapacityError, EngineError, ImageError, UsageError
from runtime.generation import PREFILL_CHUNK
from runtime.generation_config import GenerationOptions
from runtime.manifest import Manifest
from runtime.memory import machine_bytes
from runtime.memory_plan import Planner, Work
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.scheduling.pieces import Pieces
from runtime.scheduling.worker import Worker
from runtime.stream import Stream


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, check=True, threads=2)


def question(index: int = 3) -> tuple[list, str]:
    entry = json.loads((IMAGES / "truth.json").read_text())[index]
    return user_message(entry["question"], [IMAGES / entry["file"]]), entry["answer"]


@pytest.mark.portable
@pytest.mark.parametrize("index", range(8))
def test_held_out_pictures_are_answered(model: Qwen3VLModel, index: int) -> None:
    messages, answer = question(index)
    result = model.generate(messages)
    assert result.text == answer
    assert result.finish_reason == "eos"
    assert result.stats.new_tokens == len(result.token_ids)
    assert result.stats.visual_tokens > 0 and result.stats.peak_cache_bytes > 0


@pytest.mark.portable
def test_max_length_counts_the_prompt(model: Qwen3VLModel) -> None:
    messages, _ = question()
    whole = model.generate(messages)
    most = whole.stats.prompt_tokens + 2
    short = model.generate(messages, GenerationOptions(max_length=most))
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:2], "length")
    with pytest.raises(UsageError, match=f"the prompt has {most - 2} tokens, and max_length = {most - 2} counts them"):
        model.generate(messages, GenerationOptions(max_length=most - 2))
    # The demo's generation_config.json has max_new_tokens, which counts in its place, as in transformers.
    assert model.generate(messages, max_length=most).token_ids == whole.token_ids


@pytest.mark.portable
def test_stream_joins_to_the_text(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == answer == stream.result.text


@pytest.mark.portable
def test_closing_a_stream_leaves_the_model_usable(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    next(stream)
    stream.close()
    assert stream.result is None and list(stream) == []
    assert model.generate(messages).text == answer


@pytest.mark.portable
def test_requests_run_beside_a_stream_that_nobody_reads(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    first = next(stream)
    # In the thread that holds the stream, and in another one.
    assert model.generate(messages).text == answer
    assert len(model.logits(messages)) == len(model.prepare(messages).prompt.input_ids)
    assert "".join(model.stream(messages)) == answer
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(model.generate(messages).text))
    thread.start()
    thread.join(60)
    assert answers == [answer]
    assert first + "".join(stream) == answer


@pytest.mark.portable
def test_a_stream_read_by_a_pool_of_threads_holds_up_nobody(model: Qwen3VLModel) -> None:
    """A web framework pulls each piece with whichever worker is free; that worker may have the next request as well."""
    messages, answer = question()
    read, read_answer = question(0)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        stream = model.stream(messages)
        first = one.submit(next, stream).result(60)
        second = one.submit(model.generate, read)
        assert first + two.submit(lambda: "".join(stream)).result(60) == answer
        assert second.result(60).text == read_answer

    async def client(number: int) -> str:
        stream, text = model.stream(messages), ""
        while (piece := await asyncio.to_thread(next, stream, None)) is not None:
            text += piece
        return text

    async def clients() -> list[str]:
        return await asyncio.gather(*map(client, range(6)))

    assert asyncio.run(clients()) == [answer] * 6


@pytest.mark.portable
def test_a_dropped_stream_frees_its_place(demo_engine: Path) -> None:
    messages, answer = question()
    one = Qwen3VLModel.from_engine(demo_engine, max_sequences=1)
    stream = one.stream(messages, max_new_tokens=2000, eos_token_ids=(2,))
    next(stream)
    del stream
    one.stream(messages)  # never begun: takes no place
    assert one.generate(messages).text == answer
    assert one.statistics()["requests"]["cancelled"] == 1


def interruptible(code: types.CodeType) -> set[int]:
    """Return the offsets before which CPython runs signal handlers: at the start, after calls, after jumps back.

    A handler raises inside of a call, and a trace function at the instruction after it, which lies outside of a `with`
    that the call's value is returned from; so that one is left out.
    """
    instructions = list(dis.get_instructions(code))
    pairs = [pair for pair in itertools.pairwise(instructions) if pair[0].opname in ("RESUME", "CALL")]
    after = {later.offset for _, later in pairs if later.opname != "SWAP"}
    back = {each.argval for each in instructions if each.opname.startswith("JUMP_BACKWARD")}
    return after | back


@pytest.mark.portable
def test_an_interrupt_leaves_no_place_behind(model: Qwen3VLModel) -> None:
    """Ctrl-C at each instruction on the way into the queue and out of it where the signal handler may raise it."""
    methods = (Worker.reserve, Worker.submit, Stream.__next__, Pieces.take, threading.Condition.__enter__)
    traced = {each.__code__: interruptible(each.__code__) for each in methods}
    for count in itertools.count(1):
        left = count

        def interrupt(frame: types.FrameType, event: str, _: object) -> object:
            nonlocal left
            if frame.f_code not in traced:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_lasti in traced[frame.f_code]:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return interrupt

        stream = model.stream("Hi", max_new_tokens=1, eos_token_ids=(2,))
        previous = sys.gettrace()
        sys.settrace(interrupt)
        try:
            list(stream)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(previous)
        stream.close()
        if left > 0:
            break  # there were fewer instructions than that
        with ThreadPoolExecutor(1) as other:
            assert other.submit(model.generate, "Hi", max_new_tokens=1).result(60).token_ids, f"instruction {count}"
        del stream
    assert count > 20
    model.generate("Hi", max_new_tokens=1)
    assert (model.statistics()["waiting"], model.statistics()["waiting_tokens"]) == (0, 0)


@pytest.mark.portable
def test_a_stream_may_be_read_and_closed_by_another_thread(
    model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, answer = question()
    entered, leave = threading.Event(), threading.Event()
    decode = model.session.decode

    def slow_decode(*arguments):
        entered.set()
        assert leave.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(model.session, "decode", slow_decode)
    stream = model.stream(messages)
    pieces = [next(stream)]  # that of the prompt's last chunk
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert entered.wait(60)
    stream.close()  # in the middle of a step
    reader.join(60)
    assert not reader.is_alive()
    leave.set()
    assert len(pieces) == 1 and stream.result is None
    assert model.generate(messages).text == answer


@pytest.mark.portable
@pytest.mark.parametrize("method", ["vision", "prefill"])
def test_closing_stops_between_images_and_between_chunks(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1)
    # Of two grids, so that they do not share a call.
    messages = user_message("Hi " * 1200, [np.zeros((64, width, 3), np.uint8) for width in (64, 96)])
    assert len(model.prepare(messages).prompt.input_ids) > 2 * PREFILL_CHUNK
    stream, steps = model.stream(messages, max_new_tokens=1), []
    whole = getattr(model.session, method)

    def close_in_the_second(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            stream.close()  # as another thread would
        return whole(*arguments)

    monkeypatch.setattr(model.session, method, close_in_the_second)
    assert list(stream) == [] and stream.result is None
    model.close()  # answers what is left to answer
    assert len(steps) == 2
    assert model.statistics()["requests"]["cancelled"] == 1


@pytest.mark.portable
def test_stop_strings_and_length(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stopped = model.generate(messages, stop=['],"count'])
    assert stopped.finish_reason == "stop"
    assert stopped.text == answer.split('],"count')[0]
    short = model.generate(messages, max_new_tokens=2)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)


@pytest.mark.portable
def test_sampling_is_reproducible(model: Qwen3VLModel) -> None:
    messages, _ = question()
    hot = {"do_sample": True, "temperature": 5.0, "seed": 7, "top_k": 0, "max_new_tokens": 12}
    assert model.generate(messages, **hot).token_ids == model.generate(messages, **hot).token_ids
    assert model.generate(messages, **hot).token_ids != model.generate(messages, **hot | {"seed": 8}).token_ids


@pytest.mark.portable
def test_text_only_and_typed_image_tokens(model: Qwen3VLModel) -> None:
    typed = "Count <|image_pad|><|vision_start|><|image_pad|>."
    prepared = model.prepare(user_message(typed))
    assert (prepared.positions.visual_rows == -1).all()
    logits = model.logits(user_message(typed))
    assert logits.shape == (len(prepared.prompt.input_ids), model.config.text.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.portable
def test_tools_and_variables_reach_the_template(model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "{% for tool in tools or [] %}{{ tool.name }}:{% endfor %}"
        "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content[0].text }}"
    )
    monkeypatch.setattr(model, "preparation", replace(model.preparation, template=ChatTemplate(source)))
    given = {"tools": [{"name": "search"}], "chat_template_kwargs": {"enable_thinking": True}}
    assert model.prepare("Hi").prompt.text == "Hi"
    prepared = model.prepare("Hi", **given)
    assert prepared.prompt.text == "search:<think>Hi"
    stats = model.generate("Hi", max_new_tokens=1, **given).stats
    assert stats.prompt_tokens == len(prepared.prompt.input_ids)
    with pytest.raises(UsageError, match="no variable 'depth'"):
        model.generate("Hi", chat_template_kwargs={"depth": 3})


@pytest.mark.portable
@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        (user_message("Hi", ["https://example.org/cat.png"]), {}, UsageError),
        (user_message("Hi", ["missing.png"]), {}, ImageError),
        (user_message("Hi", [np.zeros((0, 4, 3), np.uint8)]), {}, ImageError),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], {}, ImageError),
        (user_message("Hi"), {"max_tokens": 3}, UsageError),
        (user_message("Hi " * 5000), {}, CapacityError),
    ],
)
def test_bad_calls(model: Qwen3VLModel, messages: list, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        model.generate(messages, **options)
    assert model.generate(question()[0]).text == question()[1]


@pytest.mark.portable
def test_options_of_the_engine(demo_engine: Path) -> None:
    with pytest.raises(UsageError, match="max_context"):
        Qwen3VLModel.from_engine(demo_engine, max_context=0)
    for threads in (0, 100_000):
        with pytest.raises(UsageError, match=rf"threads = {threads}, expected 1 to \d+"):
            Qwen3VLModel.from_engine(demo_engine, threads=threads)
    for max_pixels in (0, -1):
        with pytest.raises(UsageError, match=rf"^max_pixels = {max_pixels}, expected "):
            Qwen3VLModel.from_engine(demo_engine, max_pixels=max_pixels)
    with pytest.raises(UsageError, match="max_memory"):
        Qwen3VLModel.from_engine(demo_engine, max_memory=0)
    small = Qwen3VLModel.from_engine(demo_engine, max_pixels=4096, max_context=40)
    picture = np.zeros((300, 300, 3), np.uint8)
    assert small.prepare(user_message("Hi", [picture])).images[0].num_visual_tokens <= 4


@pytest.mark.portable
def test_an_engine_that_is_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("https://host/engine", Path("https://host/engine")):
        with pytest.raises(UsageError, match="scheme 'https'; nothing is fetched") as caught:
            Qwen3VLModel.from_engine(engine)
        assert "download the engine" in caught.value.remedy
    monkeypatch.chdir(tmp_path)
    folder = Path("https:/engine")
    folder.mkdir(parents=True)
    with pytest.raises(EngineError, match="not an engine folder"):  # it is there, so its name is no URL
        Qwen3VLModel.from_engine(folder)


@pytest.mark.portable
def test_memory_is_planned_before_work(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner.of(Manifest.read(demo_engine))
    one = planner.plan(Work(512)).total_bytes
    with pytest.raises(CapacityError, match=r"weights 0\.01 GB, .*libraries 0\.09 GB.*limit is 0\.00 GB") as caught:
        Qwen3VLModel.from_engine(demo_engine, max_memory=1000)
    assert caught.value.remedy == "use a smaller model, or raise max_memory if the machine has more"
    with pytest.raises(CapacityError, match="KV cache") as caught:
        Qwen3VLModel.from_engine(demo_engine, max_memory=one, max_context=4096)
    assert caught.value.remedy.startswith("lower max_context or window, or max_sequences, or raise max_memory")
    model = Qwen3VLModel.from_engine(demo_engine, max_memory=one, max_context=512)
    monkeypatch.setattr(model.session, "vision", None)  # would fail if it were reached
    with pytest.raises(CapacityError, match="vision") as caught:
        model.generate(user_message("Hi", [np.zeros((600, 600, 3), np.uint8)]), max_new_tokens=1)
    assert caught.value.remedy.startswith("lower max_pixels, or raise max_memory")
    assert model.generate(user_message("Hi"), max_new_tokens=1).stats.new_tokens == 1


@pytest.mark.portable
def test_the_logits_of_a_long_prompt_count(demo_engine: Path) -> None:
    one = {"max_sequences": 1, "kept_sequences": 0, "vision_cache_bytes": 0, "max_context": 256}
    model = Qwen3VLModel.from_engine(demo_engine, **one)
    num_tokens = len(model.logits("Hi"))
    model.max_memory = Planner.of(model.manifest).plan(Work(256, chunk=512, logits_of=num_tokens)).total_bytes
    assert len(model.logits("Hi")) == num_tokens
    model.max_memory -= 1
    with pytest.raises(CapacityError, match="logits"):
        model.logits("Hi")


@pytest.mark.portable
def test_the_limit_of_a_container_counts() -> None:
    whole = machine_bytes([])
    assert whole > 1 << 28
    assert machine_bytes([1 << 60]) == whole  # what version 1 says where nobody set a limit is larger than any memory
    assert machine_bytes([1000, 2000]) == 1000


@pytest.mark.portable
def test_many_visual_tokens_are_told_with_what_is_faster(
    demo_engine: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.context_room.MANY_VISUAL_TOKENS", 20)
    pictures = [np.zeros((160, 160, 3), np.uint8), np.zeros((128, 160, 3), np.uint8)]
    whole = Qwen3VLModel.from_engine(demo_engine, threads=2)
    whole.generate(user_message("Hi", pictures[1:]), max_new_tokens=1)
    assert caplog.messages == []
    for images, expected in (
        (pictures[:1], "note: the image gives 25 visual tokens, so the answer begins late; max_visual_tokens=20 would"),
        (pictures, "note: the 2 images give 45 visual tokens, so the answer begins late; max_visual_tokens=20 would"),
    ):
        whole.generate(user_message("Hi", images), max_new_tokens=1)
        (note,) = caplog.messages
        caplog.clear()
        assert note.startswith(expected)
        limit = int(note.partition("max_visual_tokens=")[2].split()[0])
        # The advice keeps its promise: no further note.
        reduced = whole.generate(user_message("Hi", images), max_new_tokens=1, max_visual_tokens=limit)
        assert 0 < reduced.stats.visual_tokens <= 20
        assert caplog.messages == []


@pytest.mark.portable
@pytest.mark.parametrize("shapes", [[(480, 640)], [(480, 640), (64, 320), (300, 100)]])
def test_a_prompt_that_is_too_long_says_what_fits(demo_engine: Path, shapes: list[tuple[int, int]]) -> None:
    messages = user_message("What is this?", [np.zeros((*shape, 3), np.uint8) for shape in shapes])
    whole = Qwen3VLModel.from_engine(demo_engine).prepare(messages)
    num_tokens = len(whole.prompt.input_ids)
    visual = sum(image.num_visual_tokens for image in whole.images)
    for max_context in (num_tokens, num_tokens - 1, num_tokens // 2):
        model = Qwen3VLModel.from_engine(demo_engine, max_context=max_context)
        with pytest.raises(CapacityError) as caught:
            model.generate(messages)
        said = f"the prompt has {num_tokens} tokens, {visual} of them visual, .*max_context is {max_context}$"
        assert re.match(said, caught.value.message)
        limit, room = map(
            int, re.match(r"pass max_visual_tokens=(\d+), which leaves (\d+) tokens", caught.value.remedy).groups()
        )
        prepared = model.prepare(messages, max_visual_tokens=limit)
        assert len(prepared.prompt.input_ids) + room <= max_context
        # The value is no smaller than it must be: half the room that images and answer share.
        assert room == min(model.defaults.max_new_tokens, (max_context - num_tokens + visual) // 2)
        assert sum(image.num_visual_tokens for image in prepared.images) > 0
        assert model.generate(messages, max_new_tokens=1, max_visual_tokens=limit).stats.new_tokens == 1


@pytest.mark.portable
def test_a_text_that_is_too_long_names_no_pixels(demo_engine: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    model = Qwen3VLModel.from_engine(demo_engine, max_context=60)
    for images in ([], [picture]):
        with pytest.raises(CapacityError) as caught:
            model.generate(user_message("Hi " * 200, images))
        assert re.fullmatch(r"raise max_context above \d+, or shorten the prompt", caught.value.remedy)
