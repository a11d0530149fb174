"""Fields that bodies of chats and of completions have in common, and the options of the runtime that they are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from runtime.errors import UsageError
from runtime.generation_config import GenerationOptions
from runtime.server.engines import Served
from runtime.shown import one_line

WITHOUT_EFFECT = "Accepted from OpenAI's clients; changes no answer."


UNKNOWN_FIELD = "unknown_field"
_T = TypeVar("_T")
# pydantic notes each wrong entry of a list, copies and all: a long list of them took seconds and half a gigabyte.
ListOf = Annotated[list[_T], Field(fail_fast=True)]
_MOST_BIASES = 1024
_LONGEST_NAME = 100


class Body(BaseModel):
    """A body of JSON, without conversions: "1" is no number, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Stop at the first field that is not known, for the same reason."""
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError(UNKNOWN_FIELD, "{name} is not known", {"name": one_line(name, _LONGEST_NAME)})
        return values


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = Field(None, description="Send the numbers of tokens in a last chunk.")
    include_obfuscation: Any = Field(None, description=WITHOUT_EFFECT)


class AnswerBody(Body):
    """What chats and completions share: OpenAI's fields, then those of this runtime."""

    model: str | None = Field(None, description="Name of an engine, as /v1/models lists them.")
    stream: bool | None = Field(None, description="Send the answer piece by piece, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="Most tokens of the answer.")
    temperature: float | None = Field(None, description="0 takes the likeliest token; above, tokens are drawn.")
    top_p: float | None = None
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="How many answers.")
    stop: str | ListOf[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=_MOST_BIASES)
    user: Any = Field(None, description=WITHOUT_EFFECT)
    # Of this runtime, most under the names that vLLM has, too.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = Field(None, description="Go on until the limit of tokens; for measurements.")
    max_repetitions: int | None = Field(None, description="End an answer that says the same so many times.")
    prompt_lookup_num_tokens: int | None = None
    priority: int | None = Field(None, description="Requests of a higher one leave the queue first.")
    timings: bool | None = Field(None, description="Add times and numbers of tokens and of cache hits, as `timings`.")

    # Fields that the runtime has under the same name.
    _same: ClassVar[tuple[str, ...]] = (
        *("stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "repetition_penalty"),
        *("max_repetitions", "prompt_lookup_num_tokens", "priority"),
    )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of numbers."""
        return bool(self.timings or (self.stream_options is not None and self.stream_options.include_usage))

    def token_limit(self) -> int | None:
        """Return the most tokens of the answer that the client asks for."""
        return self.max_tokens

    def options(self, served: Served) -> dict[str, Any]:
        """Return what it asks for as arguments of `Qwen3VLModel.stream`, but the number of answers.

        Raises:
            UsageError: The limit of tokens is above the server's.
        """
        options = {name: getattr(self, name) for name in self._same if getattr(self, name) is not None}
        options |= self._sampling(served.model.defaults)
        if self.ignore_eos:
            options["eos_token_ids"] = []
        limit, most = self.token_limit(), served.settings.max_answer_tokens
        if limit is not None and most is not None and limit > most:
            raise UsageError(
                f"an answer of {limit} tokens is asked for, this server gives {most}", remedy="ask for less"
            )
        limit = limit or most
        if limit is not None:
            options["max_new_tokens"] = limit
        elif served.model.defaults.max_new_tokens == GenerationOptions.max_new_tokens:
            # Nothing says how long answers are: they may fill the context, as OpenAI's do. With a window, where no chat
            # ends, they are as long as that.
            window = served.model.limits.window
            if window is None:
                options["max_length"] = served.model.max_context
            else:
                options["max_new_tokens"] = window.tokens
        options["timeout_s"] = served.settings.request_timeout_s
        return options

    def _sampling(self, defaults: GenerationOptions) -> dict[str, Any]:
        """Return how tokens are chosen: OpenAI's clients know no `do_sample`."""
        if self.temperature == 0:
            return {"temperature": 0}
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        given = {name: value for name, value in given.items() if value is not None}
        is_asked = any(value != off for name, value in given.items() for off in [_OFF[name]])
        if is_asked or defaults.do_sample:
            return {**given, "do_sample": True}
        return {}


# Values with which an option filters nothing; a temperature is always a wish to draw.
_OFF = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
