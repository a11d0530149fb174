"""`CompletionRequest`: the body of `/v1/completions`, which continues a text without a chat template."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from runtime.errors import UsageError
from runtime.raw_prompt import RawPrompt
from runtime.server.engines import Served
from runtime.server.protocol.asked import Asked
from runtime.server.protocol.fields import AnswerBody, ListOf


class CompletionRequest(AnswerBody):
    """Texts to be continued."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]] = Field(
        description="A text, token ids, or several of either."
    )
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: Annotated[int, Field(ge=0)] | None = Field(None, description="Log probabilities of so many tokens.")
    suffix: Any = Field(None, description="Not supported: refused unless it is null or empty.")

    def asked(self, served: Served) -> Asked:
        """Return what it asks of an engine.

        Raises:
            UsageError: A value is out of range, or fields contradict each other.
        """
        if self.suffix not in (None, ""):
            raise UsageError("suffix is not supported", remedy="put the text into the prompt")
        if self.echo and self.logprobs is not None:
            raise UsageError("echo with logprobs is not supported", remedy="leave one of them out")
        options = self.options(served)
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        if self.best_of is not None:
            if self.stream:
                raise UsageError("best_of ranks whole answers, which a stream cannot wait for", remedy="leave one out")
            options["best_of"] = self.best_of
        return Asked.checked(served, [RawPrompt(each) for each in self.prompts()], options, self.n or 1)

    def prompts(self) -> list[Any]:
        """Return the prompts, texts or lists of token ids.

        Raises:
            UsageError: There is none.
        """
        if not self.prompt:
            raise UsageError("prompt is empty", remedy="pass a text")
        is_list = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if is_list else [self.prompt]
