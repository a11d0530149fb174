"""Run a command line in this process."""

from __future__ import annotations

import contextlib
import io

import pytest
import typer

from qwen3vl_export.cli.errors import run_app


def call(app: typer.Typer, *args: str) -> tuple[int, str, str]:
    """Return the exit code, what went to stdout and what went to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_app(app, args)
    return int(end.value.code or 0), out.getvalue(), err.getvalue()
