"""Turn what goes wrong into one clear message on stderr and an exit code; the same for both command lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer
import typer.main

from engines.disk import full_disk_error
from qwen3vl_export.cli.options import Answering, Opening, Seeing, Serving
from runtime.errors import CapacityError, Qwen3VLError, UsageError
from runtime.installation import EXTRAS, how_to_install
from runtime.shown import escape_controls

DEBUG_HELP = "Anywhere on the command line: --debug adds the Python traceback to an error, --version prints versions."
"""For the epilog of each app: these are taken out before typer sees the arguments, so its help does not list them."""

INTERRUPTED = 130  # 128 + SIGINT, what shells report for Ctrl-C
BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells report for a tool whose reader has gone

# Keyword arguments of the Python API that messages name, and that the command line spells with dashes.
_RECORDS = (Answering, Opening, Serving, Seeing)
_API_OPTIONS = [each.name for kind in _RECORDS for each in dataclasses.fields(kind) if "_" in each.name]
_API_OPTION = re.compile(rf"(?<![\w./-])({'|'.join(_API_OPTIONS)})\b(?:=(\w[\w.]*\b))?(?![\w/])")


@dataclass(frozen=True)
class Flags:
    """What the arguments say of the form of messages: `--debug` and `--version` are taken out, the others stay."""

    is_debug: bool
    is_json: bool
    is_quiet: bool
    wants_version: bool


def run_app(
    app: typer.Typer, args: Sequence[str] | None = None, *, more: Callable[[], Sequence[str]] | None = None
) -> None:
    """Run a command line and end the process; always raises `SystemExit`.

    | ends with | stderr | exit code |
    |---|---|---|
    | success | | 0 |
    | `Qwen3VLError` | `error: …` and `  remedy: …` | the `exit_code` of its class |
    | a wrong option or argument | typer's usage message | 2 |
    | disk full, memory exhausted | as `CapacityError` | 8 |
    | a package of an extra is missing | as `UsageError`, naming the extra | 2 |
    | Ctrl-C | `interrupted` | 130 |
    | the reader of stdout has gone, as with `| head -1` | | 141 |
    | any other exception, our own bug | `error: internal error: …` | 1 |

    With `--json` stderr holds a JSON object on a line instead: `{"error": {"type", "message", "remedy", "exit_code"}}`,
    where `type` is the class, or `InternalError` or `Interrupted`; before it may stand `{"warning": {"message"}}`.

    `--debug` and `--version` may stand anywhere before a bare `--`. They are removed from the arguments: the one prints
    the traceback before the message, the other versions instead of anything else. Commands therefore declare no such
    option and raise errors instead of printing them; an app names both in its help with `epilog=DEBUG_HELP`. Warnings
    that the runtime logs appear on stderr, unless `--quiet` is given. Both they and errors name options as the command
    line does, see `spell_options`.

    Args:
        app: The typer app; made with `pretty_exceptions_enable=False`, so that typer installs no hook of its own.
        args: Arguments without the program's name; `sys.argv[1:]` by default.
        more: Called for more arguments, which stand behind these; what it raises is reported alike.

    Raises:
        SystemExit: Always.
    """
    _open_standard_files()
    arguments, flags = _take_flags(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    notes = _NoteHandler(flags)
    logging.getLogger("runtime").addHandler(notes)
    try:
        code = _call(app, arguments if more is None else [*arguments, *more()], flags)
    except (SystemExit, BrokenPipeError) as end:
        # typer 0.29 turns a broken pipe into exit code 1, and prints nothing.
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        _abandon_stdout()
        raise SystemExit(BROKEN_PIPE) from None
    except KeyboardInterrupt as error:
        _report_interrupt(error, flags)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, OSError):
            _abandon_stdout()  # it may be what failed, and would fail again when Python ends
        known = _as_known_error(error)
        _report(known, error, flags)
        raise SystemExit(known.exit_code) from None
    finally:
        logging.getLogger("runtime").removeHandler(notes)
    raise SystemExit(code)


def spell_options(text: str) -> str:
    """Write the API's options as the command line does: `max_pixels=9` as `--max-pixels 9`."""

    def spelled(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name == "do_sample" and value == "False":
            return "--greedy"
        option = f"--{name.replace('_', '-')}"
        return option if value in (None, "True") else f"{option} {value}"

    return _API_OPTION.sub(spelled, text)


class _NoteHandler(logging.Handler):
    """Show what the runtime logs as a line on stderr."""

    def __init__(self, flags: Flags) -> None:
        super().__init__()
        self._flags = flags

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        text = spell_options(escape_controls(record.getMessage()))
        if not self._flags.is_quiet:
            _print(json.dumps({"warning": {"message": text}}) if self._flags.is_json else text)


def _open_standard_files() -> None:
    """Let files that the caller closed (`>&-`) lead nowhere: else the first files opened would take their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for the rest of the process)


def _call(app: typer.Typer, arguments: list[str], flags: Flags) -> int:
    """Run the app, or print versions; return the exit code, if it does not end with `SystemExit`."""
    try:
        return _run(app, arguments, flags)
    finally:
        sys.stdout.flush()  # here, where a failure still gets a message and an exit code


def _run(app: typer.Typer, arguments: list[str], flags: Flags) -> int:
    if flags.wants_version:
        from qwen3vl_export.cli.versions import print_versions

        print_versions(is_json=flags.is_json)
        return 0
    try:
        code = typer.main.get_command(app)(args=arguments, standalone_mode=False)
    except Exception as error:
        # typer's own errors are of another package in each of its releases; these are what all of them have.
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from error
        if not (hasattr(error, "format_message") and hasattr(error, "show")):
            raise
        if flags.is_json:
            raise UsageError(error.format_message(), remedy="see --help") from error
        usage = io.StringIO()
        error.show(file=usage)
        _print(usage.getvalue().rstrip("\n"))
        return UsageError.exit_code
    if code == INTERRUPTED:  # as typer 0.29 tells of Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _abandon_stdout() -> None:
    """Where stdout cannot be written, let Python's flush of it at exit, which would complain, go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _take_flags(args: Sequence[str]) -> tuple[list[str], Flags]:
    """Return the arguments without `--debug` and `--version`, and what was there; after a bare `--` it is text."""
    end = list(args).index("--") if "--" in args else len(args)
    options = list(args[:end])
    flags = Flags("--debug" in options, "--json" in options, "--quiet" in options, "--version" in options)
    return [*(word for word in options if word not in ("--debug", "--version")), *args[end:]], flags


def _as_known_error(error: Exception) -> Qwen3VLError:
    if isinstance(error, Qwen3VLError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = EXTRAS.get(error.name.partition(".")[0])
        if extra is not None:
            return UsageError(
                f"this command needs the Python package {error.name.partition('.')[0]!r}, which is not installed",
                remedy=how_to_install(extra),
            )
    if isinstance(error, OSError):
        full = full_disk_error(error, str(error.filename or "the output"))
        if full is not None:
            return full
    if isinstance(error, MemoryError):
        return CapacityError("not enough memory", remedy="use a smaller image, context or model")
    return Qwen3VLError(
        f"internal error: {type(error).__name__}: {error}",
        remedy="this is a bug: run the command again with --debug and report what it prints, with that of --version",
    )


def _report(known: Qwen3VLError, error: BaseException, flags: Flags) -> None:
    if flags.is_debug:
        _print("".join(traceback.format_exception(error)).rstrip("\n"))
    if flags.is_json:
        remedy = None if known.remedy is None else spell_options(known.remedy)
        # No code raises the base class itself.
        kind = "InternalError" if type(known) is Qwen3VLError else type(known).__name__
        _print(_json_error(kind, spell_options(known.message), remedy, known.exit_code))
    else:
        _print(spell_options(f"error: {known}"))


def _report_interrupt(error: BaseException, flags: Flags) -> None:
    if flags.is_debug:
        _print("".join(traceback.format_exception(error)).rstrip("\n"))
    _print(_json_error("Interrupted", "interrupted", None, INTERRUPTED) if flags.is_json else "interrupted")


def _json_error(kind: str, message: str, remedy: str | None, exit_code: int) -> str:
    values: dict[str, Any] = {"type": kind, "message": message, "remedy": remedy, "exit_code": exit_code}
    return json.dumps({"error": values})


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr: the exit code remains
        print(escape_controls(text, keeps_layout=True), file=sys.stderr, flush=True)
