"""From a `ResponseFormat` to constraints of answers, by the library llguidance (an extra of the distribution).

The library's view of a vocabulary is built once for a model, when the first format is used, and compiled formats are
kept: a request whose format was used before costs a copy.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from runtime.errors import UsageError
from runtime.installation import how_to_install
from runtime.panics import is_panic
from runtime.shown import one_line
from runtime.structured.constraint import Constraint, MakeConstraint, Matcher
from runtime.structured.response_format import ResponseFormat
from runtime.tokenizer import Tokenizer

_LONGEST_REASON = 260
# Between the parts of a value. The library's own allows spaces without end, and a model that is unsure then writes
# nothing else until its room is used up. This is enough for values on one line and for lines that are indented.
_WHITESPACE = r"( |\n[ \t]{0,16})?"
# Bytes that no UTF-8 text holds.
_NO_TEXT = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


class Compiler:
    """Compile formats for one vocabulary; any thread may call it.

    Args:
        tokenizer: The checkpoint's.
        num_logits: Width of a row of logits, which may exceed the tokenizer's ids; those are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, num_logits: int) -> None:
        self._tokenizer = tokenizer
        self._num_logits = num_logits
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._text_tokens_V: npt.NDArray[np.bool_] | None = None

    def compile(self, wanted: ResponseFormat, eos_token_ids: Sequence[int]) -> MakeConstraint:
        """Return what makes the constraint of one answer; to be called once.

        Args:
            wanted: The format.
            eos_token_ids: Tokens that end the answer.

        Raises:
            UsageError: llguidance is not installed, the format does not compile, no text follows it, or the tokenizer
                cannot write it.
        """
        library = _library(wanted.option)
        with self._lock:
            text_tokens_V = self._prepared(library, wanted.option).copy()
        text_tokens_V[[i for i in eos_token_ids if i < self._num_logits]] = False
        matcher = self._compiled(library, wanted)
        try:
            Constraint(matcher, text_tokens_V, eos_token_ids, option=wanted.option).allowed()
        except UsageError as error:
            raise _refused(wanted, error.message) from error
        return partial(Constraint, matcher, text_tokens_V, tuple(eos_token_ids), option=wanted.option)

    def _prepared(self, library: Any, option: str) -> npt.NDArray[np.bool_]:
        """Make the library's vocabulary, if it is not there yet, and return which tokens are text; under the lock."""
        if self._vocabulary is None:
            self._text_tokens_V = self._text_tokens(option)
            special = min(self._tokenizer.special_ids, default=self._num_logits - 1)
            # Which tokens end an answer differs by request, so the constraint adds them; one has to be named here.
            self._vocabulary = library.LLTokenizer(
                self._tokenizer.to_json(), n_vocab=self._num_logits, eos_token=special
            )
        assert self._text_tokens_V is not None
        return self._text_tokens_V

    def _compiled(self, library: Any, wanted: ResponseFormat) -> Matcher:
        """Return a matcher at its start, of one answer alone.

        Copies of one share its lexer, which may fail for all of them when it fails for one, and grows with each.
        """
        try:
            matcher = library.LLMatcher(self._vocabulary, _grammar(library, wanted), log_level=0)
        except BaseException as error:  # it raises ValueError, and may panic
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise _refused(wanted, str(error)) from error
        if matcher.is_error():
            raise _refused(wanted, matcher.get_error())
        return cast(Matcher, matcher)

    def _text_tokens(self, option: str) -> npt.NDArray[np.bool_]:
        """Return which tokens are text, bool [V].

        Raises:
            UsageError: A byte of UTF-8 text is no token, so that an answer might come to where it cannot go on.
        """
        is_text_V = np.zeros(self._num_logits, np.bool_)
        single: set[int] = set()
        for token_id in range(min(self._tokenizer.largest_id + 1, self._num_logits)):
            spelled = self._tokenizer.token_bytes(token_id)
            is_text_V[token_id] = bool(spelled) and token_id not in self._tokenizer.special_ids
            if len(spelled) == 1 and is_text_V[token_id]:
                single.add(spelled[0])
        missing = sorted(set(range(256)) - single - _NO_TEXT)
        if missing:
            raise UsageError(
                f"{option}: the tokenizer has no token for the byte {missing[0]:#04x}",
                remedy="use a checkpoint whose tokenizer can write every byte, as Qwen's can",
            )
        return is_text_V


def _library(option: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            f"{option} needs the library llguidance, which is not installed",
            remedy=how_to_install("structured"),
        ) from error
    return llguidance


def _grammar(library: Any, wanted: ResponseFormat) -> str:
    """Return a format as the library's grammar."""
    make = library.LLMatcher
    if wanted.kind == "json_schema":
        text = make.grammar_from_json_schema(wanted.text, defaults={"whitespace_pattern": _WHITESPACE})
    elif wanted.kind == "regex":
        text = make.grammar_from_regex(wanted.text)
    elif wanted.kind == "choice":
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(wanted.text))
        text = make.grammar_from_lark(f"start: {choices}")
    else:
        text = make.grammar_from_lark(wanted.text)
    return str(text)


def _refused(wanted: ResponseFormat, reason: str) -> UsageError:
    first = reason.partition("<state>")[0]
    return UsageError(
        f"{wanted.option}: the {wanted.kind} is not valid: {one_line(' '.join(first.split()), _LONGEST_REASON)}",
        remedy="change that part; llguidance's documentation lists the keywords and the syntax that it knows",
    )
