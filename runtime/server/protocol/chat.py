"""`ChatRequest`: the body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from runtime.errors import UsageError
from runtime.input_limits import INPUT_KEYWORDS
from runtime.server.engines import Served
from runtime.server.inputs import Fetch, check_frames, client_messages
from runtime.server.protocol.asked import Asked
from runtime.server.protocol.fields import WITHOUT_EFFECT, AnswerBody, ListOf


class ChatRequest(AnswerBody):
    """A chat to be continued."""

    messages: ListOf[dict[str, Any]] = Field(description="OpenAI's messages; images and videos as data URLs.")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: ListOf[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = Field(None, description='"none" leaves thoughts out; other values change nothing.')
    # Of OpenAI, without effect here.
    metadata: Any = Field(None, description=WITHOUT_EFFECT)
    store: Any = Field(None, description=WITHOUT_EFFECT)
    service_tier: Any = Field(None, description=WITHOUT_EFFECT)
    safety_identifier: Any = Field(None, description=WITHOUT_EFFECT)
    prompt_cache_key: Any = Field(None, description=WITHOUT_EFFECT)
    prompt_cache_retention: Any = Field(None, description=WITHOUT_EFFECT)
    # Of this runtime.
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    max_visual_tokens: int | None = Field(None, description="Shrink the largest images and videos to this sum.")
    visual_token_share: float | None = Field(None, description="Keep this share of the visual tokens: approximate.")
    max_thinking_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    boxes: bool | None = Field(None, description="Add boxes and points of the answer in pixels of the pictures.")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of numbers."""
        return bool(super().wants_usage or self.boxes)

    def token_limit(self) -> int | None:
        """Return the most tokens of the answer that the client asks for.

        Raises:
            UsageError: It gives two limits.
        """
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise UsageError("max_tokens and max_completion_tokens differ", remedy="give max_completion_tokens alone")
        return self.max_completion_tokens or self.max_tokens

    def asked(self, served: Served, fetch: Fetch) -> Asked:
        """Return what it asks of an engine. Reads images and may fetch them, so not for the event loop's thread.

        Raises:
            UsageError: A value is out of range.
            ApiError: An image may not or cannot be fetched.
        """
        options = self.options(served)
        for name in ("num_frames", "min_frames", "max_frames"):
            check_frames(name, getattr(self, name), served.settings)
        for name in (
            *("tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs", "top_logprobs"),
            *("max_thinking_tokens", "chat_template_kwargs", *sorted(INPUT_KEYWORDS)),
        ):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.reasoning_effort == "none":
            options.setdefault("max_thinking_tokens", 0)
        if options.get("parallel_tool_calls") is True:
            del options["parallel_tool_calls"]  # what is done anyway
        return Asked.checked(served, [client_messages(self.messages, served.settings, fetch)], options, self.n or 1)
