"""Conversations: each turn is answered as a fresh model answers the same messages, and runs only what is new."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime.context_room
import runtime.input_kinds.image
import runtime.preparation
from helpers import PICTURES
from helpers.tokenizer_fixture import THINKING_TEMPLATE
from runtime.answer import Generation
from runtime.chat import ChatTemplate
from runtime.contract import FloatArray
from runtime.conversation import Conversation
from runtime.errors import CapacityError, DeadlineError, ImageError, UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.positions import PromptPositions, mrope_positions
from runtime.preparation import Preparation
from runtime.scheduling.plan import plan_limits
from runtime.serving_options import ServingOptions
from runtime.session import SessionOptions, open_session

pytestmark = pytest.mark.portable

PICTURE, OTHER = str(PICTURES / "held_out_0.png"), str(PICTURES / "held_out_1.png")
READ, COUNT, JSON, WHERE = "Read the digits.", "How many digits are there?", "Answer as JSON.", "Where is the 7?"
NUMBERS = itertools.count()
MAX_GAP = 1e-4
"""Largest difference of logits between a prompt at once and turn by turn; measured 1.4e-5. A delta that is off by one
makes 0.2, and the same tokens."""


class WatchedSession:
    """A session that notes the logits of the last answer, and can be told which tokens are to be the likeliest."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.logits: list[FloatArray] = []
        self.script: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, inputs: Any, cache: Any, slot: int = 0) -> FloatArray:
        self.logits = []
        return self._seen(self._session.prefill(inputs, cache, slot))

    def decode(self, inputs: Any, cache: Any, slot: int = 0) -> FloatArray:
        return self._seen(self._session.decode(inputs, cache, slot))

    def _seen(self, logits_BLV: FloatArray) -> FloatArray:
        self.logits.append(logits_BLV[0, -1].copy())
        if self.script:
            logits_BLV = logits_BLV.copy()
            logits_BLV[0, -1, self.script.pop(0)] = 1e4
        return logits_BLV


@dataclass
class Answered:
    """An answer, and the logits that its tokens were chosen by."""

    generation: Generation
    logits: list[FloatArray]


def differences(found: Answered, expected: Answered) -> list[str]:
    """Return what differs between two answers; nothing if they are the same."""
    ids, expected_ids = found.generation.token_ids, expected.generation.token_ids
    if ids != expected_ids or found.generation.text != expected.generation.text:
        return [f"tokens {ids}, expected {expected_ids}"]
    gap = np.abs(np.stack(found.logits) - np.stack(expected.logits)).max()
    return [f"logits differ by {gap:.2g}"] if gap > MAX_GAP else []


class Watched:
    """A model on a session that is watched."""

    def __init__(self, engine: Path, *, template: str | None = None, **serving: Any) -> None:
        manifest = Manifest.read(engine)
        self.session = WatchedSession(open_session(engine, manifest, SessionOptions(threads=1)))
        preparation = Preparation.from_folder(engine, manifest.model)
        if template is not None:
            preparation = dataclasses.replace(preparation, template=ChatTemplate(template))
        limits = plan_limits(
            manifest, ServingOptions(**({"max_sequences": 2, "kept_sequences": 2} | serving)), 512, None
        )
        self.model = Qwen3VLModel(manifest, self.session, preparation, 512, 1 << 40, limits=limits)  # type: ignore[arg-type]

    def answer(self, ask: Callable[[], Generation], script: list[int] | None = None) -> Answered:
        self.session.script = list(script or [])
        return Answered(ask(), self.session.logits)

    def fresh(self, messages: list[dict[str, Any]], script: list[int] | None = None) -> Answered:
        return self.answer(lambda: self.model.generate(messages), script)


@dataclass
class Checked:
    """A conversation, the messages that its reader would write down, and a model that knows neither of earlier turns.

    Each turn has to find `num_rows` in the cache: those of the last prompt and of its answer, but for the last token,
    which was never run.
    """

    chat: Conversation
    watched: Watched
    fresh: Watched
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int = 0

    def differences(self, prompt: str, images: tuple[Any, ...] = (), script: list[int] | None = None) -> list[str]:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        self.messages.append({"role": "user", "content": parts})
        found = self.watched.answer(lambda: self.chat.ask(prompt, images=images), script)
        expected = self.fresh.fresh(self.messages, script)
        parts = [part for each in self.chat.messages for part in each["content"] if isinstance(part, dict)]
        shown = [part["image"].digest for part in parts if part["type"] == "image"]
        stats = expected.generation.stats
        assert (stats.cached_tokens, stats.cached_images) == (0, len(shown) - len(set(shown))), "it knows nothing else"
        assert found.generation.stats.prompt_tokens == expected.generation.stats.prompt_tokens
        self.messages.append({"role": "assistant", "content": found.generation.text})
        self.found = found.generation
        return differences(found, expected)

    def ask(self, prompt: str, *images: Any, script: list[int] | None = None) -> Generation:
        """Ask both, and require the same answer and the expected rows."""
        assert self.differences(prompt, images, script) == []
        stats = self.found.stats
        assert stats.cached_tokens == self.num_rows
        self.num_rows = stats.prompt_tokens + stats.new_tokens - 1
        return self.found


def opening(watched: Watched) -> int:
    """Tokens between an answer and the next question: what two turns that ask different things have in common."""
    return len(watched.model.tokenizer.encode("<|im_end|>\n<|im_start|>user\n"))


@pytest.fixture(scope="module")
def watched(demo_engine: Path) -> Watched:
    return Watched(demo_engine)


@pytest.fixture(scope="module")
def fresh(demo_engine: Path) -> Watched:
    return Watched(demo_engine, prefix_cache=False, vision_cache_bytes=0)


@pytest.fixture
def new(watched: Watched, fresh: Watched) -> Callable[..., Checked]:
    """Begin conversations of which the cache holds nothing yet: the system message of each is another one."""

    def begin(system: str | None = None) -> Checked:
        system = f"{next(NUMBERS)} is the number of this conversation." if system is None else system
        return Checked(watched.model.chat(system), watched, fresh, [{"role": "system", "content": system}])

    return begin


def test_a_turn_is_answered_as_the_whole_conversation_is(new: Callable[..., Checked]) -> None:
    talk = new()
    assert talk.ask(READ, PICTURE).text == "1654"
    assert talk.ask(COUNT).text == "4"
    assert talk.found.stats.cached_images == 1 and talk.found.stats.vision_s < talk.found.stats.prefill_s
    assert talk.ask(READ, OTHER).text == "8654"  # a new image in a later turn
    assert talk.ask("And the first?").stats.cached_images == 2
    assert talk.ask(JSON, PICTURE, OTHER).stats.cached_images == 4  # two from rows, two embeddings
    assert [turn.answer.text for turn in talk.chat.turns][:3] == ["1654", "4", "8654"]
    assert [message["role"] for message in talk.chat.messages] == ["system", *["user", "assistant"] * 5]


def test_a_conversation_may_begin_without_image_and_system(watched: Watched, fresh: Watched) -> None:
    talk = Checked(watched.model.chat(), watched, fresh)
    talk.ask("What can you read, in all the pictures that you will see from now on?")
    talk.ask(COUNT, OTHER)
    assert [turn.messages[0]["role"] for turn in talk.chat.turns] == ["user", "user"]


def test_a_turn_that_is_taken_back_leaves_rows_of_those_before(new: Callable[..., Checked]) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    num_messages, num_rows = len(talk.messages), talk.num_rows
    talk.ask(READ, OTHER)
    talk.ask(COUNT)
    talk.chat.rewind(1)
    del talk.messages[num_messages:]
    talk.num_rows = num_rows + opening(talk.watched)
    talk.ask(JSON)  # a question that was not asked before
    assert len(talk.chat.turns) == 2
    talk.chat.rewind(-1)
    assert len(talk.chat.turns) == 1
    talk.chat.reset()
    assert talk.chat.turns == () and [each["role"] for each in talk.chat.messages] == ["system"]
    del talk.messages[1:]
    assert talk.differences(COUNT, (PICTURE,)) == []
    assert 0 < talk.found.stats.cached_tokens < num_rows


@pytest.mark.parametrize("turn", [2, -3, "1", True, 10**50, None])
def test_a_turn_that_is_not_there_cannot_be_taken_back(turn: Any, new: Callable[..., Checked]) -> None:
    chat = new().chat
    with pytest.raises(UsageError, match=r"turn = .*, expected nothing: there are no turns"):
        chat.rewind(turn)
    chat.ask("a", max_new_tokens=1)
    chat.ask("b", max_new_tokens=1)
    with pytest.raises(UsageError, match=r"turn = .*, expected -2 to 1: there are 2 turns"):
        chat.rewind(turn)
    assert len(chat.turns) == 2


def test_a_fork_goes_its_own_way(new: Callable[..., Checked]) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    other = dataclasses.replace(talk, chat=talk.chat.fork(), messages=list(talk.messages))
    talk.ask(COUNT)
    other.num_rows += opening(talk.watched)
    other.ask(JSON)
    talk.ask(READ, OTHER)
    other.ask(READ)
    assert [len(each.chat.turns) for each in (talk, other)] == [3, 3]
    assert talk.chat.messages[:3][0] == other.chat.messages[:3][0] and len(talk.chat.messages) == 7
    other.chat.reset()
    assert len(talk.chat.turns) == 3


def test_forks_are_answered_side_by_side(new: Callable[..., Checked], fresh: Watched) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    questions = (COUNT, JSON, READ, WHERE)
    chats = [talk.chat.fork() for _ in questions]
    threads = [
        threading.Thread(target=chat.ask, args=(question,), daemon=True)
        for chat, question in zip(chats, questions, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for chat, question in zip(chats, questions, strict=True):
        expected = fresh.fresh([*talk.messages, {"role": "user", "content": question}])
        assert chat.turns[1].answer.token_ids == expected.generation.token_ids


def test_another_system_message_shares_nothing(new: Callable[..., Checked]) -> None:
    talk = new("You read digits.")
    talk.ask(READ, PICTURE)
    other = new("Thou read digits.")
    other.ask(READ, PICTURE)
    assert other.found.stats.cached_tokens == 0
    assert other.found.stats.cached_images == 1 and other.found.stats.vision_s < other.found.stats.prefill_s


@pytest.mark.parametrize("keeps_embeds", [True, False])
def test_without_prefix_cache_answers_are_the_same(demo_engine: Path, fresh: Watched, keeps_embeds: bool) -> None:
    watched = Watched(demo_engine, prefix_cache=False, vision_cache_bytes=1 << 20 if keeps_embeds else 0)
    talk = Checked(watched.model.chat(), watched, fresh)
    for question, images in ((READ, [PICTURE]), (COUNT, []), (READ, [OTHER]), (JSON, [])):
        talk.ask(question, *images)
        talk.num_rows = 0
    assert talk.found.stats.cached_images == (2 if keeps_embeds else 0)


def test_rows_that_others_drove_out_are_run_again(demo_engine: Path, fresh: Watched) -> None:
    watched = Watched(demo_engine, max_sequences=1, kept_sequences=0)
    talk = Checked(watched.model.chat("One slot."), watched, fresh, [{"role": "system", "content": "One slot."}])
    talk.ask(READ, PICTURE)
    watched.model.generate("Somebody else asks something else. " * 8, max_new_tokens=4)
    talk.num_rows = 0
    talk.ask(COUNT)
    talk.ask(JSON)


THOUGHT = "There are four of them.\n</think>\n\n4"


def test_a_template_that_drops_thoughts_costs_a_second_run_and_no_wrong_answer(demo_engine: Path) -> None:
    watched = Watched(demo_engine, template=THINKING_TEMPLATE)
    fresh = Watched(demo_engine, template=THINKING_TEMPLATE, prefix_cache=False, vision_cache_bytes=0)
    talk = Checked(watched.model.chat(), watched, fresh)
    script = [*watched.model.tokenizer.encode(THOUGHT), watched.model.defaults.eos_token_ids[0]]
    first = talk.ask("How many digits are there in this picture?", PICTURE, script=script)
    assert first.text == THOUGHT
    # The thought and its opening, with which the prompt ended, are gone: what follows is new.
    opening = len(watched.model.tokenizer.encode("<think>\n"))
    talk.num_rows = first.stats.prompt_tokens - opening
    talk.ask(READ, script=script)
    # While tools are asked thoughts stay; then all rows are found.
    talk.messages.append({"role": "tool", "content": "seen"})
    found = watched.answer(lambda: talk.chat.ask(talk.messages[-1]), script)
    assert differences(found, fresh.fresh(talk.messages, script)) == []
    assert found.generation.stats.cached_tokens == talk.num_rows


def test_an_answer_that_is_tokenised_otherwise_shares_rows_up_to_there(
    watched: Watched, new: Callable[..., Checked]
) -> None:
    tokenizer = watched.model.tokenizer
    (whole,) = tokenizer.encode('{"digits":[')[:1] or [0]
    text = tokenizer.decode([whole])
    letters = [token for letter in text for token in tokenizer.encode(letter)]
    assert len(letters) > 1 and tokenizer.encode("1" + text)[:2] == [*tokenizer.encode("1"), whole]
    talk = new()
    first = talk.ask(READ, PICTURE, script=[*tokenizer.encode("1"), *letters, watched.model.defaults.eos_token_ids[0]])
    assert first.token_ids[:-1] == [*tokenizer.encode("1"), *letters] and first.text == "1" + text
    talk.num_rows = first.stats.prompt_tokens + 1
    talk.ask(COUNT)


def test_an_answer_that_was_cut_off_is_followed_too(new: Callable[..., Checked]) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    talk.chat.rewind(0)
    del talk.messages[1:]
    cut = talk.chat.ask(READ, images=[PICTURE], max_new_tokens=2)
    assert (cut.text, cut.finish_reason) == ("16", "length")
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": READ}]
    talk.messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": "16"}]
    talk.num_rows = cut.stats.prompt_tokens + 1
    talk.ask(COUNT)


def wrong_delta(num_tokens: int, spans: Any) -> PromptPositions:
    """Positions whose answer continues one too far behind what a first turn can have."""
    right = mrope_positions(num_tokens, spans)
    return dataclasses.replace(right, delta=right.delta + (num_tokens > FIRST_TURN))


def positions_from_zero(num_tokens: int, spans: Any) -> PromptPositions:
    """Positions that begin again where a second turn does."""
    right = mrope_positions(num_tokens, spans)
    ids = right.position_ids.copy()
    if num_tokens > FIRST_TURN:
        ids[..., FIRST_TURN:] -= ids[..., FIRST_TURN, None]
    return dataclasses.replace(right, position_ids=ids)


FIRST_TURN = 60


@pytest.mark.parametrize("sabotage", [None, wrong_delta, positions_from_zero])
def test_the_comparison_finds_wrong_positions_of_a_second_turn(
    sabotage: Callable[..., PromptPositions] | None, new: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage changes both models alike, so the fresh one gets its positions before."""
    talk = new()
    assert talk.differences(READ, (PICTURE,)) == []
    assert 50 < talk.found.stats.prompt_tokens <= FIRST_TURN
    right = runtime.preparation.mrope_positions
    if sabotage is not None:
        monkeypatch.setattr(runtime.preparation, "mrope_positions", sabotage)
    found = talk.watched.answer(lambda: talk.chat.ask(JSON))
    assert found.generation.stats.prompt_tokens > FIRST_TURN and found.generation.stats.cached_tokens > 50
    monkeypatch.setattr(runtime.preparation, "mrope_positions", right)
    expected = talk.fresh.fresh([*talk.messages, {"role": "user", "content": JSON}])
    assert bool(differences(found, expected)) == (sabotage is not None)


def test_what_was_shown_stays_shown(
    new: Callable[..., Checked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may change or go, an array be written to; images are read once."""
    path = tmp_path / "shown.png"
    path.write_bytes(Path(PICTURE).read_bytes())
    array = np.asarray(Image.open(OTHER).convert("RGB")).copy()
    talk = new()
    talk.ask(READ, str(path))
    talk.ask(READ, array)
    talk.messages[1]["content"][0]["image"] = PICTURE  # for the model that reads all messages each time
    talk.messages[3]["content"][0]["image"] = OTHER
    path.write_bytes(Path(OTHER).read_bytes())
    array[:] = 0
    read: list[Any] = []

    def reading(source: Any, *arguments: Any, **options: Any) -> Any:
        read.append(source)
        return process(source, *arguments, **options)

    process = runtime.input_kinds.image.process_image
    monkeypatch.setattr(runtime.input_kinds.image, "process_image", reading)
    talk.ask(COUNT)
    path.unlink()
    talk.ask(JSON)
    assert read == [PICTURE, OTHER] * 2  # of the fresh model
    with pytest.raises(ImageError, match="no such file"):
        talk.chat.ask(READ, images=[str(path)])
    assert len(talk.chat.turns) == 4


def test_many_visual_tokens_are_noted_once(
    new: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime.context_room, "MANY_VISUAL_TOKENS", 5)
    chat, notes = new().chat, []
    for images in ([PICTURE], [], [OTHER], []):
        caplog.clear()
        chat.ask(READ, images=images, max_new_tokens=1)
        notes.append([record.getMessage().partition(" visual tokens")[0] for record in caplog.records])
    assert notes == [["note: the image gives 6"], [], ["note: the 2 images give 26"], []]


def test_messages_and_turns_are_copies_that_can_be_asked_again(new: Callable[..., Checked]) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    messages = talk.chat.messages
    asked = [*messages, {"role": "user", "content": COUNT}]
    answer = talk.ask(COUNT)
    again = talk.watched.model.generate(asked)
    assert again.token_ids == answer.token_ids
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1 == answer.stats.prompt_tokens - 1
    messages[1]["content"].clear()
    messages.clear()
    talk.chat.turns[0].messages[0]["content"].clear()
    talk.ask(JSON)
    other = talk.watched.model.chat()
    other.ask([*talk.chat.messages, {"role": "user", "content": READ}])
    assert len(other.messages) == len(talk.messages) + 2 and len(other.turns) == 1


def test_a_turn_is_text_parts_or_messages(new: Callable[..., Checked]) -> None:
    image, words = {"type": "image", "image": PICTURE}, {"type": "text", "text": READ}
    talk = new()
    answers = [
        talk.chat.fork().ask(*arguments, **keywords).token_ids
        for arguments, keywords in (
            ((READ,), {"images": [PICTURE]}),
            (([image, words],), {}),
            (([words],), {"images": (PICTURE,)}),
            ((words,), {"images": [PICTURE]}),
            (({"role": "user", "content": [image, words]},), {}),
            (([{"role": "user", "content": [image, words]}],), {}),
            (({"type": "human", "content": [image, words]},), {}),
        )
    ]
    assert answers == answers[:1] * len(answers)
    calls = [{"role": "tool", "content": "a"}, {"type": "function_call_output", "call_id": "x", "output": "b"}]
    talk.chat.ask(READ, images=[PICTURE])
    talk.chat.ask(calls)
    assert [message["role"] for message in talk.chat.turns[1].messages] == ["tool", "tool"]
    # An item that would be part of the answer before it is a message of its own.
    call = {"type": "function_call", "call_id": "y", "name": "f", "arguments": "{}"}
    talk.chat.ask([call, {"type": "function_call_output", "call_id": "y", "output": "c"}])
    assert [message["role"] for message in talk.chat.messages[-3:]] == ["assistant", "tool", "assistant"]
    assert talk.chat.messages[-4]["role"] == "assistant" and "tool_calls" not in talk.chat.messages[-4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": 5}, "a prompt must be text, parts or messages, got int"),
        ({"prompt": None}, "got NoneType"),
        ({"prompt": []}, "messages is empty"),
        ({"prompt": [5]}, r"messages\[0\] must be a dict, got int"),
        ({"prompt": {"type": "vidoe"}}, "has no 'role'"),
        ({"prompt": {"type": "image"}}, r"messages\[0\].content\[0\] must hold its image under one key, found none"),
        (
            {"prompt": {"role": "user", "content": "x"}, "images": [PICTURE]},
            "images or videos were given beside whole messages",
        ),
        ({"prompt": "x", "images": PICTURE}, "images must be a list, got str"),
        ({"prompt": "x", "images": [5]}, "expected a path, bytes, a data URL, a PIL image"),
        ({"prompt": "x", "max_new_token": 5}, "unknown generation option 'max_new_token'"),
        ({"prompt": "x", "priority": "high"}, "priority = 'high'"),
        ({"prompt": "x", "timeout_s": "soon"}, "timeout_s = 'soon'"),
    ],
)
def test_a_turn_that_is_none_is_refused(arguments: dict[str, Any], words: str, watched: Watched) -> None:
    chat = watched.model.chat()
    with pytest.raises(UsageError, match=words):
        chat.ask(**arguments)
    assert chat.messages == []
    assert chat.ask("x", max_new_tokens=1).stats.new_tokens == 1


def test_a_conversation_has_options_and_a_system_message(watched: Watched) -> None:
    chat = watched.model.chat("Short.", max_new_tokens=2)
    assert chat.ask(JSON).stats.new_tokens == 2
    assert chat.ask(JSON, max_new_tokens=3).stats.new_tokens == 3
    assert chat.fork().ask(JSON).stats.new_tokens == 2
    assert repr(chat) == "Conversation(turns=2)"
    own = watched.model.chat(options=watched.model.defaults.replace(max_new_tokens=1))
    assert own.ask(JSON).stats.new_tokens == 1
    for wrong in (5, ["x"], b"x"):
        with pytest.raises(UsageError, match="system must be a string"):
            watched.model.chat(wrong)  # type: ignore[arg-type]
    for wrong in ({"tools": "x"}, {"chat_template_kwargs": 5}, {"top_q": 1}, {"options": 5}):
        with pytest.raises(UsageError):
            watched.model.chat(**wrong)
    with pytest.raises(UsageError, match="the chat template has no variable 'y'"):
        watched.model.chat(chat_template_kwargs={"y": 1}).ask("x")
    with pytest.raises(UsageError, match="the chat template knows no tools"):
        watched.model.chat(tools=[{"name": "f"}]).ask("x")


def closed(chat: Conversation) -> None:
    with chat.stream(JSON) as stream:
        assert next(stream)


def dropped(chat: Conversation) -> None:
    stream = chat.stream(JSON)
    assert next(stream)
    del stream


def closed_before_it_began(chat: Conversation) -> None:
    chat.stream(JSON).close()


def too_long(chat: Conversation) -> None:
    with pytest.raises(CapacityError):
        chat.ask("long " * 1000)


def raised_in(chat: Conversation) -> None:
    with pytest.raises(ZeroDivisionError):
        chat.ask(JSON, on_piece=lambda piece: 1 / 0)


def cancelled(chat: Conversation) -> None:
    async def run() -> None:
        # So many tokens take seconds: the answer has not ended when it is cancelled, wherever it is by then.
        task = asyncio.create_task(chat.aask(JSON, max_new_tokens=100_000, eos_token_ids=[]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


@pytest.mark.parametrize("way", [closed, dropped, closed_before_it_began, too_long, raised_in, cancelled])
def test_a_turn_that_fails_or_is_stopped_leaves_no_trace(
    way: Callable[[Conversation], None], new: Callable[..., Checked]
) -> None:
    talk = new()
    way(talk.chat)
    assert len(talk.chat.messages) == 1 and talk.chat.turns == ()
    assert talk.differences(READ, (PICTURE,)) == []
    before = len(talk.chat.messages)
    way(talk.chat)
    assert len(talk.chat.messages) == before
    assert talk.differences(COUNT) == []
    assert len(talk.chat.turns) == 2


def test_a_stream_that_failed_is_over_while_somebody_holds_it(new: Callable[..., Checked]) -> None:
    chat = new().chat

    async def read(stream: Any) -> None:
        await anext(stream)

    for wait in (next, lambda stream: stream.wait(), lambda stream: asyncio.run(read(stream))):
        for stream in (chat.stream("long " * 1000), chat.stream(JSON, timeout_s=0)):
            assert stream.is_open
            with pytest.raises((CapacityError, DeadlineError)):
                wait(stream)
            assert not stream.is_open and list(stream) == []
            assert chat.fork().turns == chat.turns == ()
    assert chat.ask(COUNT, max_new_tokens=1) and len(chat.turns) == 1


def test_one_turn_at_a_time_and_forks_beside_it(new: Callable[..., Checked], fresh: Watched) -> None:
    talk = new()
    talk.ask(READ, PICTURE)
    later, stream = talk.chat.stream(COUNT), talk.chat.stream(JSON)
    first = next(stream)
    for refused in (
        lambda: talk.chat.ask(READ),
        lambda: next(later),
        lambda: asyncio.run(talk.chat.aask(READ)),
        lambda: talk.chat.rewind(0),
        talk.chat.reset,
    ):
        with pytest.raises(UsageError, match="a turn of this conversation is being answered") as caught:
            refused()
        assert "close it" in str(caught.value) and "fork()" in str(caught.value)
    assert len(talk.chat.turns) == 1  # the answer is not complete, whoever made it how far
    fork = talk.chat.fork()
    expected = fresh.fresh([*talk.messages, {"role": "user", "content": WHERE}]).generation
    assert fork.ask(WHERE).token_ids == expected.token_ids
    text = first + "".join(stream)
    assert len(talk.chat.turns) == 2 and talk.chat.messages[-1] == {"role": "assistant", "content": text}
    assert list(stream) == [] and len(talk.chat.turns) == 2  # an end that is found twice
    # A stream takes the turns that are complete when its first piece is asked for.
    late = talk.chat.stream(COUNT)
    talk.chat.rewind(1)
    "".join(late)
    assert [turn.answer.text for turn in talk.chat.turns] == ["1654", late.result.text]  # type: ignore[union-attr]


def test_an_answer_counts_when_its_end_was_read_in_whatever_way(new: Callable[..., Checked]) -> None:
    chat = new().chat
    pieces: list[str] = []
    assert chat.ask(JSON, on_piece=pieces.append).text == "".join(pieces)
    stream = chat.stream(JSON)
    assert stream.wait() is stream.result and not stream.is_open
    assert len(chat.turns) == 2

    async def run() -> str:
        answer = await chat.aask(JSON)
        assert answer.text
        return "".join([piece async for piece in chat.stream(JSON)])

    assert asyncio.run(run()) == chat.turns[-1].answer.text
    assert len(chat.turns) == 4


def test_a_stream_that_is_closed_is_not_counted_later(watched: Watched) -> None:
    chat = watched.model.chat()
    stream = chat.stream(JSON)
    next(stream)
    stream.close()
    assert chat.ask(COUNT) and list(stream) == [] and stream.wait() is None
    assert [turn.messages[0]["content"][0]["text"] for turn in chat.turns] == [COUNT]


def test_a_conversation_keeps_its_model(demo_engine: Path) -> None:
    chat = Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=256).chat()
    gc.collect()
    assert chat.ask(COUNT, images=[PICTURE]).text == "4"


@pytest.fixture
def image(watched: Watched) -> Iterator[Any]:
    yield watched.model.prepare([{"role": "user", "content": [{"type": "image", "image": PICTURE}]}]).images[0]


def test_a_processed_image_that_does_not_fit_is_refused(image: Any, watched: Watched) -> None:
    assert watched.model.chat().ask(READ, images=[image]).text == "1654"
    pixels = image.pixel_values
    for wrong in (
        {"merge_size": 1},
        {"digest": b"short"},
        {"digest": None},
        {"grid_thw": (2, 6, 2)},
        {"grid_thw": (1, 3, 8)},
        {"grid_thw": None},
        {"patches": pixels[:-1]},
        {"patches": pixels.astype(np.float64)},
        {"patches": pixels.tolist()},
    ):
        broken = dataclasses.replace(image, **wrong)
        with pytest.raises(UsageError, match="processed input"):
            watched.model.chat().ask(READ, images=[broken])
