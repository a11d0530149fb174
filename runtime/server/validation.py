"""What is wrong with the fields of a body, in words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from runtime.server.errors import ApiError
from runtime.server.protocol.chat import ChatRequest
from runtime.server.protocol.completions import CompletionRequest
from runtime.server.protocol.fields import UNKNOWN_FIELD
from runtime.shown import one_line, shown

# Fields of OpenAI's API that are not taken, and what to do instead.
_INSTEAD = {
    "functions": "pass tools",
    "function_call": "pass tool_choice",
    "audio": "audio is not supported",
    "modalities": "answers are text: leave it out",
    "prediction": "pass prompt_lookup_num_tokens, which drafts by looking up the prompt",
    "web_search_options": "nothing is searched: leave it out",
    "verbosity": "say in the prompt how long the answer is to be",
    "guided_json": 'pass response_format={"type": "json_schema", …}',
    "guided_regex": 'pass response_format={"type": "regex", "regex": …}',
    "guided_choice": 'pass response_format={"type": "choice", "choices": […]}',
    "guided_grammar": 'pass response_format={"type": "grammar", "grammar": …}',
    "structured_outputs": 'pass response_format={"type": "json_schema", …}',
    "mm_processor_kwargs": "pass max_pixels, fps and the like as fields of their own",
    "do_sample": "pass temperature: 0 is greedy",
    "max_new_tokens": "pass max_completion_tokens",
}
_LONGEST_PLACE = 120
_Body = TypeVar("_Body", bound=BaseModel)


def validation_error(error: RequestValidationError) -> ApiError:
    """Return the first of the errors that pydantic found, as one of the API."""
    found = error.errors()
    first = found[0]
    place = _place([each for each in first["loc"] if each != "body"])
    if first["type"] == UNKNOWN_FIELD:
        name = str(first["ctx"]["name"])
        return _unknown(f"{place}.{name}" if place else name, name)
    if first["type"] == "missing":
        text = f"{place or 'the body'} is missing. Remedy: send an object of JSON that has it"
    else:
        said = one_line(str(first["msg"]), 200)
        text = f"{place or 'the body'}: {said}, found {shown(first.get('input'), 100)}. Remedy: see /openapi.json"
    return ApiError(400, text, param=place or None, code=str(first["type"]))


def checked_chat(values: dict[str, Any]) -> ChatRequest:
    """Return the body of a chat, checked.

    Raises:
        ApiError: A field is missing, unknown or wrong.
    """
    return _checked(ChatRequest, values)


def checked_completion(values: dict[str, Any]) -> CompletionRequest:
    """Return the body of a completion, checked.

    Raises:
        ApiError: A field is missing, unknown or wrong.
    """
    return _checked(CompletionRequest, values)


def _checked(kind: type[_Body], values: dict[str, Any]) -> _Body:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise validation_error(RequestValidationError(error.errors())) from error


def _unknown(place: str, name: str) -> ApiError:
    close = difflib.get_close_matches(name[:60], _fields((ChatRequest, CompletionRequest)), n=1, cutoff=0.75)
    remedy = _INSTEAD.get(name) or (f"did you mean {close[0]!r}?" if close else "leave it out")
    return ApiError(
        400,
        f"unknown field {shown(place, 100)}. Remedy: {remedy}",
        param=one_line(place, _LONGEST_PLACE),
        code=UNKNOWN_FIELD,
    )


def _fields(models: Sequence[type[BaseModel]]) -> list[str]:
    return sorted({name for model in models for name in model.model_fields})


def _place(path: Sequence[Any]) -> str:
    """Return where a value stands: `messages[2].role`; pydantic's names of the kinds of a union are left out."""
    text = ""
    for each in path:
        if isinstance(each, int):
            text += f"[{each}]"
        elif "[" not in each and each not in ("str", "int", "bool", "float"):
            text += f".{each}" if text else str(each)
    return one_line(text, _LONGEST_PLACE)
