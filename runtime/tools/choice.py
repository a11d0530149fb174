"""`tool_choice`: whether the model may, must or must not call a function, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.arguments import AUTO, NO_CALLS, reading
from runtime.errors import UsageError
from runtime.shown import shown

REQUIRED = "required"
_MODES = (AUTO, NO_CALLS, REQUIRED)
_ALLOWED = "allowed_tools"
_REMEDY = (
    f"pass {AUTO!r}, {NO_CALLS!r}, {REQUIRED!r} or "
    '{"type": "function", "function": {"name": …}} with the name of one of the tools'
)


@dataclass(frozen=True)
class ToolChoice:
    """What an answer may call.

    Attributes:
        mode: "auto": calls or text; "none": the prompt shows no functions; "required": nothing but calls.
        names: The functions that may be called; None for all.
        is_single: At most one call, with which the answer ends.
    """

    mode: str = AUTO
    names: tuple[str, ...] | None = None
    is_single: bool = False

    @property
    def is_forced(self) -> bool:
        """Whether the answer is held to calls."""
        return self.mode == REQUIRED

    def chosen(self, tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
        """Return the definitions, `name` and `parameters`, of those tools that may be called."""
        definitions = [tool.get("function", tool) for tool in tools or ()]
        return [each for each in definitions if self.names is None or each["name"] in self.names]


def tool_choice(value: Any, parallel: Any, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """Return a `tool_choice` from any of its forms, which are those of OpenAI's two interfaces.

    Args:
        value: "auto", "none" or "required"; `{"type": "function", "function": {"name": …}}` or `{"type": "function",
            "name": …}`; `{"type": "allowed_tools", "mode": …, "tools": […]}`, also with the last two in an object of
            their own under "allowed_tools".
        parallel: `parallel_tool_calls`: whether an answer may hold several calls; None for yes.
        tools: What `runtime.arguments.tool_schemas` returned.

    Raises:
        UsageError: It has none of the forms, or names what is not among the tools.
    """
    if parallel is not None and not isinstance(parallel, bool):
        raise UsageError(
            f"parallel_tool_calls = {shown(parallel)}, expected true or false", remedy="leave parallel_tool_calls out"
        )
    with reading("tool_choice", _REMEDY):
        choice = _of_mapping(value) if isinstance(value, Mapping) else _of_word(value)
    known = [tool.get("function", tool)["name"] for tool in tools or ()]
    for name in choice.names or ():
        if name not in known:
            names = f"the tools are {', '.join(known)}" if known else "pass tools"
            raise UsageError(f"tool_choice names {shown(name)}, which is none of the tools", remedy=names)
    if choice.is_forced and not known:
        raise UsageError("tool_choice = 'required', and there are no tools", remedy="pass tools, or leave it out")
    return ToolChoice(choice.mode, choice.names, choice.is_single or parallel is False)


def _of_word(value: Any) -> ToolChoice:
    if not isinstance(value, str) or value not in _MODES:
        raise _unknown(value)
    return ToolChoice(str.__str__(value))


def _of_mapping(value: Mapping[Any, Any]) -> ToolChoice:
    if value.get("type") == "function":
        return ToolChoice(REQUIRED, (_name(value),), is_single=True)
    if value.get("type") != _ALLOWED:
        raise _unknown(value)
    inner = value.get(_ALLOWED, value)
    mode, tools = (inner.get("mode", AUTO), inner.get("tools")) if isinstance(inner, Mapping) else (None, None)
    if mode not in (AUTO, REQUIRED) or not isinstance(tools, (list, tuple)) or not tools:
        raise UsageError(
            "tool_choice of type 'allowed_tools' must hold a mode and a list of tools that is not empty",
            remedy='pass {"type": "allowed_tools", "mode": "auto" or "required", "tools": [{"type": "function", '
            '"name": …}]}',
        )
    return ToolChoice(str.__str__(mode), _without_repeats(_name(each) for each in tools))


def _name(value: Any) -> str:
    """Return the name of a function in `{"type": "function", "function": {"name"}}` or `{"type", "name"}`."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not isinstance(value, Mapping) or value.get("type", "function") != "function":
        raise _unknown(value)
    return str.__str__(name)


def _without_repeats(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _unknown(value: Any) -> UsageError:
    return UsageError(
        f"tool_choice = {shown(value)}, expected 'auto', 'none', 'required' or the name of a function in a dict",
        remedy=_REMEDY,
    )
