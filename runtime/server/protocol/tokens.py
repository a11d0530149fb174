"""Bodies of `/tokenize` and `/detokenize`, in the form that vLLM has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from runtime.server.protocol.fields import WITHOUT_EFFECT, Body, ListOf


class TokenizeRequest(Body):
    """A text, or a chat with its images, to be turned into token ids."""

    model: str | None = None
    prompt: str | None = Field(None, description="A text; special tokens that it spells out are taken as such.")
    messages: ListOf[dict[str, Any]] | None = Field(None, description="A chat, in place of a text.")
    tools: ListOf[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: Any = Field(None, description=WITHOUT_EFFECT)
    add_generation_prompt: Literal[True] | None = Field(None, description="Always done.")
    return_token_strs: bool | None = Field(None, description="Add the text of each token.")


class DetokenizeRequest(Body):
    """Token ids to be turned into text."""

    model: str | None = None
    tokens: ListOf[int]
