"""Calls of functions are read out of answers, in each format and however the text is cut; what is none is text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answers import END, OPENED, PLAIN, TOKENIZER, TOOLS, function, read_answer
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE
from runtime.answer import Generation
from runtime.tools.formats.hermes import FORMAT as HERMES
from runtime.tools.formats.qwen3_coder import FORMAT as CODER
from runtime.tools.reader import ExpectedCalls
from runtime.tools.registry import call_formats, format_of

pytestmark = pytest.mark.portable


def read(text: str, prompt: list[int] = PLAIN, **options: Any) -> Generation:
    return read_answer([*TOKENIZER.encode(text), END], prompt, **{"tools": TOOLS, **options})[0]


def hermes(name: str, arguments: Any) -> str:
    """A call as Qwen3-VL's template writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


COLOGNE, TOKYO, TIME = (
    hermes("weather", {"city": "Köln", "days": 2}),
    hermes("weather", {"city": "東京"}),
    hermes("clock", {}),
)


def test_a_call() -> None:
    answer = read(COLOGNE)
    (call,) = answer.tool_calls
    assert (call.name, call.arguments) == ("weather", {"city": "Köln", "days": 2})
    assert (call.arguments_text, call.text) == ('{"city": "Köln", "days": 2}', COLOGNE)
    assert (answer.text, answer.malformed_tool_calls, answer.finish_reason) == ("", (), "eos")
    assert answer.raw_text == COLOGNE


@pytest.mark.parametrize(
    ("written", "text", "names"),
    [
        (f"{COLOGNE}\n{TIME}", "", ["weather", "clock"]),
        (f"Let me see.\n{COLOGNE}\n{TOKYO}", "Let me see.", ["weather", "weather"]),
        (f"First\n{TIME}\nthen\n{TOKYO}\nlast.\n", "First\n\nthen\n\nlast.\n", ["clock", "weather"]),
        (f"\n\n{TIME}\n\nThat was it.", "That was it.", ["clock"]),
        (f"a{TIME}b", "ab", ["clock"]),
        (f"{TIME}{TIME}", "", ["clock", "clock"]),
        ('<tool_call>{"arguments":{},"name":"clock","id":7}</tool_call>', "", ["clock"]),
        ('<tool_call>\n{"name": "clock"}\n</tool_call>', "", ["clock"]),
        ("no call <tool", "no call <tool", []),
        ("</tool_call> alone\n", "</tool_call> alone\n", []),
    ],
)
def test_text_around_calls_stays_text(written: str, text: str, names: list[str]) -> None:
    answer = read(written)
    assert (answer.text, [call.name for call in answer.tool_calls]) == (text, names)
    assert (answer.malformed_tool_calls, answer.raw_text) == ((), written)


@pytest.mark.parametrize(
    "broken",
    [
        '<tool_call>\n{"name": "clock", "arguments": {}\n</tool_call>',
        "<tool_call>\n</tool_call>",
        "<tool_call>clock()</tool_call>",
        hermes("telephone", {}),
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": ["clock"], "arguments": {}}\n</tool_call>',
        hermes("clock", [1]),
        hermes("clock", '{"a": 1}'),
        hermes("clock", None),
        '<tool_call>\n{"name": "clock", "name": "weather", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "a", "city": "b"}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"days": NaN}}\n</tool_call>',
        '<tool_call>\n[{"name": "clock", "arguments": {}}]\n</tool_call>',
        f"<tool_call>\n{TIME}",
        f"<tool_call>\n{'[' * 3000}\n</tool_call>",
        '<tool_call>\n{"name": "clock", "arguments": {}} and more\n</tool_call>',
    ],
)
def test_a_malformed_call_is_text_and_is_told(broken: str) -> None:
    for before, after in (("", ""), ("See:\n", "\nSo."), (f"{COLOGNE}\n", f"\n{TIME}")):
        answer = read(before + broken + after)
        assert answer.malformed_tool_calls == (broken,)
        assert broken in answer.text
        assert len(answer.tool_calls) == (before + after).count("<tool_call>")
    assert read("See:\n" + broken + "\nSo.").text == "See:\n" + broken + "\nSo."


@pytest.mark.parametrize("unclosed", ["<tool_call>", COLOGNE[:-1], COLOGNE.removesuffix("</tool_call>"), COLOGNE[:30]])
def test_a_call_that_breaks_off_is_text(unclosed: str) -> None:
    answer = read(f"Well.\n{unclosed}")
    assert (answer.text, answer.tool_calls) == (f"Well.\n{unclosed}", ())
    assert answer.malformed_tool_calls == (unclosed,)
    ids = TOKENIZER.encode(COLOGNE)
    cut, _ = read_answer(ids, tools=TOOLS, max_new_tokens=len(ids) - 1)
    assert (cut.finish_reason, cut.text, cut.malformed_tool_calls) == ("length", cut.raw_text, (cut.raw_text,))


def test_a_mark_inside_a_string_is_an_argument() -> None:
    (call,) = read(hermes("weather", {"city": "<tool_call>"})).tool_calls
    assert call.arguments == {"city": "<tool_call>"}


def test_without_tools_nothing_is_a_call() -> None:
    for tools in (None, []):
        answer = read(COLOGNE, tools=tools)
        assert (answer.text, answer.tool_calls, answer.malformed_tool_calls) == (COLOGNE, (), ())
    assert ExpectedCalls.of(None, TOOLS) is None


def test_calls_in_thoughts_are_thoughts() -> None:
    answer = read(f"Maybe {TIME}?\n</think>\n\n{COLOGNE}", OPENED)
    assert (answer.reasoning, answer.text) == (f"Maybe {TIME}?", "")
    assert [call.name for call in answer.tool_calls] == ["weather"]


def test_ids_are_the_same_again_and_differ_in_one_conversation() -> None:
    first, again = read(TIME + TIME), read(TIME + TIME)
    later = read(TIME + TIME, [*PLAIN, 1])
    ids = [call.id for call in first.tool_calls]
    assert ids == [call.id for call in again.tool_calls]
    assert len({*ids, *(call.id for call in later.tool_calls)}) == 4
    assert all(len(each) == len("call_") + 24 and int(each[5:], 16) >= 0 for each in ids)


CODER_CALL = """\
<tool_call>
<function=weather>
<parameter=city>
Köln
am Rhein
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>"""


def test_calls_in_tags() -> None:
    (call,) = read(CODER_CALL, call_format=CODER).tool_calls
    assert call.arguments == {"city": "Köln\nam Rhein", "days": 2}
    assert json.loads(call.arguments_text) == call.arguments
    none = read("<tool_call>\n<function=clock>\n</function>\n</tool_call>", call_format=CODER)
    assert [call.arguments for call in none.tool_calls] == [{}]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("string", "2", "2"),
        ("integer", "2", 2),
        ("number", "2.5", 2.5),
        ("boolean", "true", True),
        ("boolean", "True", True),
        ("null", "None", None),
        ("array", '["a", 1]', ["a", 1]),
        ("object", '{"a": {"b": null}}', {"a": {"b": None}}),
        ("string", "", ""),
    ],
)
def test_values_in_tags_have_the_type_of_the_parameter(kind: str, text: str, value: Any) -> None:
    written = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = read(written, tools=[function("f", x=kind)], call_format=CODER).tool_calls
    assert call.arguments == {"x": value} and type(call.arguments["x"]) is type(value)


@pytest.mark.parametrize(
    "broken",
    [
        CODER_CALL.replace("weather", "telephone"),
        CODER_CALL.replace("\n2\n", "\ntwo\n"),
        CODER_CALL.replace("days", "city"),
        CODER_CALL.replace("</function>\n", ""),
        CODER_CALL.replace("<parameter=days>", "days:"),
        COLOGNE,
    ],
)
def test_malformed_calls_in_tags_are_text(broken: str) -> None:
    answer = read(broken, call_format=CODER)
    assert (answer.text, answer.malformed_tool_calls, answer.tool_calls) == (broken, (broken,), ())


def test_the_format_is_found_in_the_template() -> None:
    assert call_formats() == (HERMES, CODER)
    assert format_of(INSTRUCT_TEMPLATE) is HERMES
    assert format_of("{{ '<tool_call>\n<function=f>\n<parameter=x></tool_call>' }}{{ tools }}") is CODER
    assert format_of("{{ messages }}{{ tools }}") is None


WORDS = [
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "</tool_", "\n", "\n\n", "a", " <", "é", "<think>", "</think>"),
    *(COLOGNE, TIME, '{"name": "clock"}', "{", CODER_CALL),
]


@settings(max_examples=250, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=10),
    call_format=st.sampled_from([HERMES, CODER]),
    is_open=st.booleans(),
    data=st.data(),
)
def test_no_cut_between_tokens_changes_an_answer(
    words: list[str], call_format: Any, is_open: bool, data: st.DataObject
) -> None:
    """The marks of thoughts stay tokens; all else is cut into bytes here and there."""
    prompt = OPENED if is_open else PLAIN
    cut: list[int] = []
    for word in words:
        is_whole = "think>" in word or data.draw(st.booleans())
        cut += TOKENIZER.encode(word) if is_whole else [BYTES[bytes([value])] for value in word.encode()]
    ids = [token for word in words for token in TOKENIZER.encode(word)]
    whole, _ = read_answer([*ids, END], prompt, tools=TOOLS, call_format=call_format)
    other, _ = read_answer([*cut, END], prompt, tools=TOOLS, call_format=call_format)
    fields = ("text", "reasoning", "raw_text", "tool_calls", "malformed_tool_calls")
    assert [getattr(whole, name) for name in fields] == [getattr(other, name) for name in fields]


BYTES = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.num_tokens) if len(TOKENIZER.token_bytes(i)) == 1}
