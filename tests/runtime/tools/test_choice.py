"""`tool_choice` and `parallel_tool_calls`: answers that are held to calls, whatever is sampled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.answers import TOKENIZER, check_pieces
from helpers.scripted import Scripted
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from runtime.answer import Generation
from runtime.chat import ChatTemplate
from runtime.errors import UsageError
from runtime.model import Qwen3VLModel
from runtime.piece import TOOL_CALL
from runtime.structured.compiler import Compiler
from runtime.structured.constraint import Constraint
from runtime.tokenizer import Tokenizer
from runtime.tools.call import CallFormat
from runtime.tools.choice import ToolChoice, tool_choice
from runtime.tools.formats.hermes import FORMAT as HERMES
from runtime.tools.formats.qwen3_coder import FORMAT as CODER
from runtime.tools.grammar import calls_format, closed, parameters_of
from runtime.tools.reader import ExpectedCalls

pytest.importorskip("llguidance")
pytestmark = pytest.mark.portable

CODER_TEMPLATE = INSTRUCT_TEMPLATE + "{# <function= and <parameter= #}"
HOT: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 400}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"$ref": "#/$defs/Unit"},
            "where": {"$ref": "#/$defs/Place"},
        },
        "required": ["city", "where"],
        "$defs": {
            "Unit": {"enum": ["celsius", "kelvin"]},
            "Place": {"type": "object", "properties": {"x": {"enum": [1, 2]}, "inside": {"type": "boolean"}}},
        },
    },
}
CLOCK = {"name": "clock"}
SEARCH = {"name": 'se"arch', "parameters": {"properties": {"tags": {"type": "array", "items": {"enum": ["a", "b"]}}}}}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
QUESTION = "What is in the picture?"


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Require what the schemas above say, by hand."""
    if name == "clock":
        assert arguments == {}
        return
    assert name == "weather" and {"city", "where"} <= arguments.keys() <= {"city", "days", "unit", "where"}
    assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 6
    assert "days" not in arguments or (type(arguments["days"]) is int and 1 <= arguments["days"] <= 14)
    assert arguments.get("unit", "kelvin") in ("celsius", "kelvin")
    where = arguments["where"]
    assert where.keys() <= {"x", "inside"} and where.get("x", 1) in (1, 2)
    assert type(where.get("inside", True)) is bool


def check(answers: list[Any], names: set[str], most: int | None = None) -> None:
    """Require answers that are calls of these functions and nothing else."""
    for answer in answers:
        assert isinstance(answer, Generation), answer
        assert answer.text == "" and answer.malformed_tool_calls == (), answer.raw_text
        assert answer.tool_calls and (most is None or len(answer.tool_calls) <= most)
        assert answer.finish_reason in ("eos", "stop")
        for call in answer.tool_calls:
            assert call.name in names
            check_arguments(call.name, call.arguments)


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def opened(tiny: Qwen3VLModel) -> Iterator[Callable[[str], Scripted]]:
    """Models on random weights, by their templates."""
    models: dict[str, Scripted] = {}

    def open_(template: str = INSTRUCT_TEMPLATE) -> Scripted:
        if template not in models:
            models[template] = Scripted(tiny, template, max_sequences=8)
        models[template].session.script = []
        return models[template]

    yield open_
    for each in models.values():
        each.model.close(drain=False)


def sampled(model: Qwen3VLModel, num: int, **options: Any) -> list[Any]:
    # The end of an answer is made likely, or a model that knows nothing would call for ever.
    ends = dict.fromkeys(model.defaults.eos_token_ids, 3.0)
    chosen = [model.defaults.replace(**HOT, seed=seed, logit_bias=ends) for seed in range(num)]
    return model.generate_batch([QUESTION] * num, chosen, **options)


@pytest.mark.parametrize("template", [INSTRUCT_TEMPLATE, CODER_TEMPLATE], ids=["hermes", "qwen3_coder"])
def test_120_sampled_answers_are_calls(opened: Callable[..., Scripted], template: str) -> None:
    model = opened(template).model
    answers = sampled(model, 30, tools=TOOLS, tool_choice="required")
    check(answers, {"weather", "clock"})
    assert max(len(each.tool_calls) for each in answers) > 1
    assert {call.name for each in answers for call in each.tool_calls} == {"weather", "clock"}
    one = sampled(model, 30, tools=TOOLS, tool_choice=named("weather"))
    check(one, {"weather"}, most=1)
    assert len({each.raw_text for each in [*answers, *one]}) > 25
    assert all(each.finish_reason == "stop" for each in one)


def test_a_constraint_that_allows_everything_is_found(
    opened: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Constraint, "mask", lambda self, logits_V: logits_V)
    monkeypatch.setattr(Constraint, "accept", lambda self, token_id: None)
    with pytest.raises(AssertionError):
        check(sampled(opened().model, 4, tools=TOOLS, tool_choice="required"), {"weather", "clock"})


def test_a_grammar_that_forgets_the_schema_is_found(
    opened: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.tools.grammar.parameters_of", lambda function: {"type": "object"})
    with pytest.raises(AssertionError):
        check(sampled(opened().model, 8, tools=TOOLS, tool_choice=named("weather")), {"weather"}, most=1)


def test_marks_that_are_no_tokens_are_spelled(demo_engine: Path) -> None:
    """The demo's tokenizer has no tokens for them."""
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=1024, max_sequences=8) as demo:
        assert demo.tokenizer.added_id("<tool_call>") is None
        template = ChatTemplate(INSTRUCT_TEMPLATE)
        preparation = dataclasses.replace(demo.preparation, template=template)
        model = Qwen3VLModel(demo.manifest, demo.session, preparation, 1024, 1 << 40)
        try:
            answers = sampled(model, 12, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
            check(answers, {"weather", "clock"}, most=1)
        finally:
            model.close(drain=False)
        with pytest.raises(UsageError, match="asks for no known format of calls") as caught:
            demo.generate(QUESTION, tools=TOOLS, tool_choice="required")
        assert caught.value.remedy


def test_a_thinking_model_thinks_first(opened: Callable[..., Scripted]) -> None:
    scripted = opened(THINKING_TEMPLATE)
    thought = "which one? <tool_call> {}"
    for gap in ("", "\n", "\n\n"):
        ids = scripted.write(f"{thought}\n</think>{gap}", ends=False)
        answers = [
            scripted.model.generate(QUESTION, tools=TOOLS, tool_choice=named("clock"), **HOT, seed=seed)
            for seed in range(3)
        ]
        check(answers, {"clock"}, most=1)
        assert all(each.reasoning == thought and each.token_ids[: len(ids)] == ids for each in answers)
    scripted.session.script = []
    budget = scripted.model.generate(
        QUESTION, tools=TOOLS, tool_choice=named("weather"), max_thinking_tokens=5, **HOT, seed=1
    )
    check([budget], {"weather"}, most=1)
    assert budget.reasoning.endswith("directly now.")


def test_a_stream_hands_the_call_out(opened: Callable[..., Scripted]) -> None:
    stream = opened().model.stream(QUESTION, tools=TOOLS, tool_choice=named("weather"), **HOT, seed=3)
    pieces = list(stream)
    assert stream.result is not None and [each.kind for each in pieces] == [TOOL_CALL]
    check_pieces(stream.result, pieces)


def test_several_answers_and_prompt_lookup(opened: Callable[..., Scripted]) -> None:
    model = opened().model
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": named("weather"), **HOT, "seed": 5}
    check(list(model.generate(QUESTION, n=3, **options).choices), {"weather"}, most=1)
    plain = model.generate(QUESTION, **options)
    assert model.generate(QUESTION, prompt_lookup_num_tokens=6, **options).token_ids == plain.token_ids


def test_turns_of_a_conversation(opened: Callable[..., Scripted]) -> None:
    chat = opened().model.chat(tools=TOOLS, tool_choice=named("clock"), **HOT, seed=1)
    answers = [chat.ask("What is it?"), chat.ask({"role": "tool", "content": "noon"})]
    check(answers, {"clock"}, most=1)
    assert answers[0].tool_calls[0].id != answers[1].tool_calls[0].id


CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def test_one_call_at_most_where_the_model_may_choose(opened: Callable[..., Scripted]) -> None:
    scripted = opened()
    scripted.write(f"Let me see.\n{CALL}\n{CALL}\nmore")
    both = scripted.model.generate(QUESTION, tools=TOOLS)
    assert (len(both.tool_calls), both.finish_reason) == (2, "eos")
    assert scripted.model.generate(QUESTION, tools=TOOLS, parallel_tool_calls=True).token_ids == both.token_ids
    one = scripted.model.generate(QUESTION, tools=TOOLS, parallel_tool_calls=False)
    assert (one.text, [call.name for call in one.tool_calls], one.finish_reason) == ("Let me see.", ["clock"], "stop")
    assert one.raw_text == f"Let me see.\n{CALL}"
    scripted.write("No call.")
    assert scripted.model.generate(QUESTION, tools=TOOLS, parallel_tool_calls=False).text == "No call."
    scripted.write(f"{CALL.replace('clock', 'watch')}\n{CALL}\n{CALL}")
    late = scripted.model.generate(QUESTION, tools=TOOLS, parallel_tool_calls=False)
    assert len(late.malformed_tool_calls) == len(late.tool_calls) == 1, "what is no call ends nothing"


def test_allowed_tools_leave_the_prompt_as_it_is(opened: Callable[..., Scripted]) -> None:
    model = opened().model
    only = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    answer = model.generate(QUESTION, tools=TOOLS, tool_choice=only, parallel_tool_calls=False, **HOT, seed=1)
    check([answer], {"clock"}, most=1)
    assert answer.stats.prompt_tokens == model.generate(QUESTION, tools=TOOLS, max_new_tokens=1).stats.prompt_tokens
    scripted = opened()
    scripted.write(CALL)
    weather = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    other = scripted.model.generate(QUESTION, tools=TOOLS, tool_choice=weather)
    assert (other.tool_calls, other.malformed_tool_calls) == ((), (CALL,))


def matches(
    written: str, tools: list[dict[str, Any]], choice: Any = "required", call_format: CallFormat = HERMES
) -> bool:
    """Return whether a text is a whole answer that a choice allows."""
    chosen = tool_choice(choice, None, tools)
    wanted = calls_format(chosen, tools, call_format, TOKENIZER.mark_id)
    constraint = Compiler(TOKENIZER, TOKENIZER.num_tokens).compile(wanted, [0])(None)
    ids = TOKENIZER.encode(written)
    if constraint.num_allowed(ids) < len(ids):
        return False
    for token_id in ids:
        constraint.accept(token_id)
    return constraint.is_complete or bool(constraint.allowed()[0])


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WHERE = '"where": {"x": 1}'


@pytest.mark.parametrize(
    ("written", "is_allowed"),
    [
        (hermes("clock", "{}"), True),
        (f"{hermes('clock', '{}')}\n{hermes('clock', '{}')}", True),
        (f"\n\n{hermes('clock', '{}')}", True),
        (hermes("weather", f'{{"city": "Köln", "days": 2, {WHERE}}}'), True),
        (hermes("weather", f'{{"city":"Köln",{WHERE}}}'), False),
        (hermes("weather", f'{{"city": "Köln",\n{WHERE}}}'), False),
        (hermes("weather", f'{{"city": "a\\"b", {WHERE}}}'), True),
        (hermes("clock", "{}") + "\n", False),
        (f"Text.\n{hermes('clock', '{}')}", False),
        (hermes("clock", '{"a": 1}'), False),
        (hermes("watch", "{}"), False),
        (hermes("weather", '{"city": "Köln"}'), False),
        (hermes("weather", f'{{"city": "Köln", "days": 15, {WHERE}}}'), False),
        (hermes("weather", f'{{"city": "Köln", {WHERE}, "more": 1}}'), False),
        (hermes("weather", f'{{"city": "longer than six", {WHERE}}}'), False),
        (hermes("weather", '{"city": "Köln", "where": {"y": 1}}'), False),
        ("", False),
        ("<tool_call>", False),
    ],
)
def test_what_the_grammar_of_json_calls_allows(written: str, is_allowed: bool) -> None:
    assert matches(written, TOOLS) is is_allowed
    if is_allowed:
        assert written.count("<tool_call>") == 1 or not matches(written, TOOLS, named("clock"))


def test_names_are_escaped() -> None:
    assert matches(hermes(r"se\"arch", '{"tags": ["a", "b"]}'), [SEARCH])
    assert not matches(hermes(r"se\"arch", '{"tags": ["c"]}'), [SEARCH])


def coder(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def text_tool(**schema: Any) -> list[dict[str, Any]]:
    return [{"name": "f", "parameters": {"type": "object", "properties": {"t": schema}, "required": ["t"]}}]


@pytest.mark.parametrize(
    ("tools", "written", "arguments"),
    [
        (TOOLS, coder("clock"), {}),
        (
            TOOLS,
            coder("weather", city="Köln", days="3", unit="kelvin", where='{"x": 2}'),
            {"city": "Köln", "days": 3, "unit": "kelvin", "where": {"x": 2}},
        ),
        (TOOLS, coder("weather", city="", where="{}"), {"city": "", "where": {}}),
        (TOOLS, coder("weather", where="{}", city=""), None),
        (TOOLS, coder("weather", city="a"), None),
        (TOOLS, coder("weather", city="a", where="{}", more="1"), None),
        (TOOLS, coder("weather", city="longer than six", where="{}"), None),
        (TOOLS, coder("weather", city="a", unit="newton", where="{}"), None),
        (TOOLS, coder("weather", city="a", days="15", where="{}"), None),
        (text_tool(type="string"), coder("f", t='a\n\n<b> "c" </parameter </function> \\d'), "same"),
        (text_tool(type="string"), coder("f", t="a</parameter>b"), None),
        (text_tool(type="string"), coder("f", t="\n a\n"), "same"),
        (text_tool(), coder("f", t="free"), "same"),
        (text_tool(enum=["a", "b\nc", 5]), coder("f", t="b\nc"), "same"),
        (text_tool(enum=["a", "b\nc", 5]), coder("f", t="5"), None),
        (text_tool(anyOf=[{"const": "yes"}, {"type": "null"}]), coder("f", t="yes"), "same"),
        (text_tool(anyOf=[{"const": "yes"}, {"type": "null"}]), coder("f", t="null"), None),
        (text_tool(type="string", pattern="^[a-z]+/x$"), coder("f", t="ab/x"), "same"),
        (text_tool(type="string", pattern="^[a-z]+/x$"), coder("f", t="ab/xx"), None),
        (text_tool(type="string", pattern="[0-9]"), coder("f", t="a 7 b"), "same"),
        (text_tool(type="string", pattern="[0-9]"), coder("f", t="a b"), None),
        (text_tool(type="string", minLength=2), coder("f", t="日本"), "same"),
        (text_tool(type="string", minLength=2), coder("f", t="日"), None),
        (text_tool(type="boolean"), coder("f", t="true"), {"t": True}),
        (text_tool(type="boolean"), coder("f", t="yes"), None),
    ],
)
def test_what_the_grammar_of_calls_in_tags_allows(tools: list[dict[str, Any]], written: str, arguments: Any) -> None:
    assert matches(written, tools, call_format=CODER) is (arguments is not None)
    if arguments is not None:
        # What is allowed is read, and as what it was meant.
        expected = ExpectedCalls.of(CODER, tools)
        assert expected is not None
        read = CODER.read(written.removeprefix("<tool_call>").removesuffix("</tool_call>"), expected.functions)
        text = re.search(r"<parameter=t>\n(.*)\n</parameter>", written, re.DOTALL)
        assert read.arguments == ({"t": text[1]} if arguments == "same" and text else arguments)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "date"}, "format of"),
        ({"type": "string", "pattern": "^a|b$"}, "an anchor stands beside a choice"),
        ({"type": "string", "pattern": "("}, "tool_choice: the grammar is not valid"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "are no lengths of a text"),
        ({"anyOf": [{"type": "string"}], "maxLength": 3}, "maxLength beside anyOf"),
        ({"allOf": [{"type": "string"}]}, "allOf of"),
        ({"enum": ["a</tool_call>"]}, "holds a mark"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "tool_choice: the grammar is not valid"),
    ],
)
def test_what_cannot_be_followed_in_tags_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        matches("x", text_tool(**schema), call_format=CODER)
    assert caught.value.remedy


def test_parameters_that_depend_on_each_other_are_refused_in_tags() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}]}}]
    with pytest.raises(UsageError, match="parameters of the function 'f' have 'anyOf'"):
        matches("x", tools, call_format=CODER)
    tools = [{"name": "f", "parameters": {"properties": {"a>": {}}}}]
    with pytest.raises(UsageError, match="a parameter is called 'a>'"):
        matches("x", tools, call_format=CODER)


def test_parameters_that_only_required_lists_are_written_as_text() -> None:
    tools = [{"name": "f", "parameters": {"type": "object", "required": ["q"]}}]
    assert matches(coder("f", q="what"), tools, call_format=CODER)
    assert not matches(coder("f"), tools, call_format=CODER)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "has no value that ends"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "tool_choice: the grammar"),
        ({"type": "object", "properties": {"a": {"enum": ["x" * 300_000]}}}, "characters of schemas"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        matches("x", [{"name": "f", "parameters": schema}])
    assert caught.value.remedy


def test_objects_are_closed_where_that_contradicts_nothing() -> None:
    inner = {"type": "object", "properties": {"x": {}}}
    schema = {"properties": {"a": inner, "b": {"type": "array", "items": inner}}, "$defs": {"P": inner}}
    done = closed(schema)
    assert done["additionalProperties"] is False and done["$defs"]["P"]["additionalProperties"] is False
    assert done["properties"]["a"]["additionalProperties"] is False
    assert done["properties"]["b"]["items"]["additionalProperties"] is False
    assert "additionalProperties" not in schema and "additionalProperties" not in inner
    for kept in (
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "allOf": [inner]},
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}]},
        {"type": "object"},
    ):
        assert closed(kept) == kept
    assert parameters_of({"name": "f", "parameters": None})["additionalProperties"] is False


CHOICES: list[tuple[Any, Any, ToolChoice]] = [
    ("auto", None, ToolChoice("auto")),
    ("none", None, ToolChoice("none")),
    ("auto", False, ToolChoice("auto", is_single=True)),
    ("required", True, ToolChoice("required")),
    ("required", False, ToolChoice("required", is_single=True)),
    (named("clock"), None, ToolChoice("required", ("clock",), is_single=True)),
    ({"type": "function", "name": "clock"}, True, ToolChoice("required", ("clock",), is_single=True)),
    (
        {"type": "allowed_tools", "mode": "auto", "tools": [named("clock"), named("clock")]},
        None,
        ToolChoice("auto", ("clock",)),
    ),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("clock")]}},
        None,
        ToolChoice("required", ("clock",)),
    ),
]


@pytest.mark.parametrize(("value", "parallel", "expected"), CHOICES)
def test_every_form_of_a_choice(value: Any, parallel: Any, expected: ToolChoice) -> None:
    assert tool_choice(value, parallel, TOOLS) == expected


@pytest.mark.parametrize(
    ("value", "parallel", "tools", "message"),
    [
        ("required", None, None, "there are no tools"),
        ("required", None, [], "there are no tools"),
        (named("clock"), None, None, "names 'clock', which is none of the tools"),
        (named("watch"), None, TOOLS, "names 'watch', which is none of the tools"),
        ("any", None, TOOLS, "tool_choice = 'any', expected"),
        (None, None, TOOLS, "tool_choice = None, expected"),
        (5, None, TOOLS, "tool_choice = 5, expected"),
        ({}, None, TOOLS, "expected 'auto', 'none', 'required'"),
        ({"type": "function"}, None, TOOLS, "expected 'auto', 'none', 'required'"),
        ({"type": "function", "function": "clock"}, None, TOOLS, "expected 'auto', 'none', 'required'"),
        ({"type": "function", "function": {"name": 5}}, None, TOOLS, "expected 'auto', 'none', 'required'"),
        ({"type": "custom", "custom": {"name": "clock"}}, None, TOOLS, "expected 'auto', 'none', 'required'"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, None, TOOLS, "a list of tools that is not empty"),
        ({"type": "allowed_tools", "mode": "none", "tools": [named("clock")]}, None, TOOLS, "must hold a mode"),
        ({"type": "allowed_tools", "mode": [], "tools": [named("clock")]}, None, TOOLS, "must hold a mode"),
        ({"type": "allowed_tools", "allowed_tools": 5}, None, TOOLS, "must hold a mode"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["clock"]}, None, TOOLS, "expected 'auto'"),
        ("auto", "no", TOOLS, "parallel_tool_calls = 'no', expected true or false"),
        ("auto", 0, TOOLS, "parallel_tool_calls = 0, expected true or false"),
    ],
)
def test_what_is_no_choice_is_refused(value: Any, parallel: Any, tools: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tool_choice(value, parallel, tools)
    assert caught.value.remedy


def test_a_format_beside_a_call_is_refused(opened: Callable[..., Scripted]) -> None:
    model = opened().model
    with pytest.raises(UsageError, match="tool_choice asks for a call, and response_format for an answer of another"):
        model.generate(QUESTION, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"})
    answer = model.generate(QUESTION, tools=TOOLS, response_format={"type": "choice", "choices": ["a"]})
    assert answer.text == "a"


def test_a_mark_that_answers_leave_out_is_spelled() -> None:
    special = Tokenizer(TOKENIZER.to_json().replace('"special":false', '"special":true').encode())
    assert special.added_id("<tool_call>") is not None and special.mark_id("<tool_call>") is None
    assert TOKENIZER.mark_id("<tool_call>") == TOKENIZER.added_id("<tool_call>")
    assert TOKENIZER.mark_id("no mark") is None
    text = calls_format(ToolChoice("required"), TOOLS, HERMES, special.mark_id).text
    assert 'call: "<tool_call>" (call_0 | call_1) "</tool_call>"' in text
