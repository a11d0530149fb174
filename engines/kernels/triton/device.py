"""Functions that kernels call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def device_function(function: Callable[..., Any]) -> Any:
    """Make a function one that kernels can call.

    Compiled it is `triton.jit`. Interpreted it stays as it is: a kernel may call any function of Python then, while for
    each call of a decorated one the interpreter takes the whole of `triton.language` in hand, a fifth of a millisecond
    (Triton 3.8, InterpretedFunction).
    """
    return function if triton.knobs.runtime.interpret else triton.jit(function)
