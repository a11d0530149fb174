"""Let a model call functions, and answer from what they return: `python examples/tools.py ENGINE "What time is it?"`.

Any engine may be given. A template that knows no tools is told so; a model that calls nothing just answers.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

from qwen3_vl import Conversation, Generation, Qwen3VLModel, UsageError

MAX_ROUNDS = 5
"""Most times that results are handed back for one question."""


def time_in_utc() -> str:
    """Return the time."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def add(a: float, b: float) -> float:
    """Return a sum."""
    return a + b


FUNCTIONS: dict[str, Callable[..., Any]] = {"time_in_utc": time_in_utc, "add": add}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "time_in_utc",
            "description": "Date and time in UTC",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Sum of two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    },
]


def result_of(name: str, arguments: dict[str, Any]) -> str:
    """Call a function; what goes wrong is its result, so that the model can try again."""
    try:
        return json.dumps(FUNCTIONS[name](**arguments), ensure_ascii=False)
    except Exception as error:
        return f"error: {error}"


def answer(chat: Conversation, question: str, on_call: Callable[[str], object] = print) -> Generation:
    """Ask, and hand results back until the model answers without calling anything.

    Args:
        chat: A conversation with `TOOLS`.
        question: What the user says.
        on_call: Told of each call and its result.
    """
    found = chat.ask(question)
    for _ in range(MAX_ROUNDS):
        if not found.tool_calls:
            break
        results = []
        for call in found.tool_calls:
            result = result_of(call.name, call.arguments)
            on_call(f"{call.name}({call.arguments_text}) = {result}")
            results.append({"role": "tool", "tool_call_id": call.id, "content": result})
        found = chat.ask(results)
    return found


def main() -> None:
    """Answer one question."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} ENGINE QUESTION")
    with Qwen3VLModel.from_engine(sys.argv[1]) as model:
        try:
            print(answer(model.chat(tools=TOOLS), sys.argv[2]).text)
        except UsageError as error:
            print(f"note: answered without tools: {error.message}", file=sys.stderr)
            print(model.generate(sys.argv[2]).text)


if __name__ == "__main__":
    main()
