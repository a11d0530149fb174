"""Turn what goes wrong into one clear message on stderr and an exit code; the same for both command lines."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence

import typer
import typer.main

from runtime.errors import CapacityError, Qwen3VLError, UsageError
from runtime.installation import how_to_install

DEBUG_HELP = "--debug, anywhere on the command line, adds the Python traceback to an error."
"""For the epilog of each app: `--debug` is taken out before typer sees the arguments, so its help does not list it."""

INTERRUPTED = 130  # 128 + SIGINT, what shells report for Ctrl-C
BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells report for a tool whose reader has gone

# Extra of pyproject.toml that installs a module.
_EXTRAS = {
    "huggingface_hub": "export",
    "matplotlib": "plot",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "safetensors": "export",
    "sklearn": "test",
    "torch": "export",
    "torchvision": "verify",
    "transformers": "verify",
}

# Keyword arguments of the Python API that messages name, and that the command line spells with dashes.
_API_OPTIONS = (
    "do_sample",
    "frequency_penalty",
    "huge_pages",
    "max_context",
    "max_memory",
    "max_new_tokens",
    "max_pixels",
    "min_p",
    "min_pixels",
    "presence_penalty",
    "prompt_lookup_num_tokens",
    "repetition_penalty",
    "top_k",
    "top_p",
)
_API_OPTION = re.compile(rf"(?<![\w./-])({'|'.join(_API_OPTIONS)})\b(?:=(\w[\w.]*\b))?(?![\w/])")


def run_app(app: typer.Typer, args: Sequence[str] | None = None) -> None:
    """Run a command line and end the process; always raises `SystemExit`.

    | ends with | stderr | exit code |
    |---|---|---|
    | success | | 0 |
    | `Qwen3VLError` | `error: …` and `  remedy: …` | the `exit_code` of its class |
    | a wrong option or argument | typer's usage message | 2 |
    | disk full, memory exhausted | as `CapacityError` | 8 |
    | a package of an extra is missing | as `UsageError`, naming the extra | 2 |
    | Ctrl-C | `interrupted` | 130 |
    | the reader of stdout has gone, as behind `| head -1` | | 141 |
    | any other exception, our own bug | `error: internal error: …` | 1 |

    `--debug` may stand anywhere before a bare `--`. It is removed from the arguments and prints the traceback before
    the message. Commands therefore declare no such option and raise errors instead of printing them; an app names the
    flag in its help with `epilog=DEBUG_HELP`. Warnings that the runtime logs appear on stderr. Both they and errors
    name options as the command line does, see `spell_options`.

    Args:
        app: The typer app; made with `pretty_exceptions_enable=False`, so that typer installs no hook of its own.
        args: Arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: Always.
    """
    arguments, is_debug = _take_debug(sys.argv[1:] if args is None else args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An answer may hold characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="replace")
    notes = _NoteHandler()
    logging.getLogger("runtime").addHandler(notes)
    try:
        try:
            typer.main.get_command(app)(args=arguments)
        finally:
            sys.stdout.flush()  # here, where a failure still gets a message and an exit code
    except SystemExit as end:
        # typer 0.29 turns Ctrl-C into this exit code and a broken pipe into 1, and prints nothing.
        if end.code == INTERRUPTED:
            _report("interrupted", end, is_debug)
        if isinstance(end.__context__, BrokenPipeError):
            raise SystemExit(_broken_pipe()) from None
        raise
    except BrokenPipeError:
        raise SystemExit(_broken_pipe()) from None
    except KeyboardInterrupt as error:
        _report("interrupted", error, is_debug)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        known = _as_known_error(error)
        _report(spell_options(f"error: {known}"), error, is_debug)
        raise SystemExit(known.exit_code) from None
    finally:
        logging.getLogger("runtime").removeHandler(notes)
    raise SystemExit(0)


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

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(spell_options(record.getMessage()), file=sys.stderr, flush=True)


def _broken_pipe() -> int:
    """Let Python's flush of stdout at exit, which would complain, go nowhere; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return BROKEN_PIPE


def _take_debug(args: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without `--debug`, and whether it was there; after a bare `--` it is text."""
    end = list(args).index("--") if "--" in args else len(args)
    options = [argument for argument in args[:end] if argument != "--debug"]
    return [*options, *args[end:]], len(options) < end


def _as_known_error(error: Exception) -> Qwen3VLError:
    if isinstance(error, Qwen3VLError):
        return error
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = _EXTRAS.get(error.name.partition(".")[0])
        if extra is not None:
            return UsageError(
                f"this command needs the Python package {error.name.partition('.')[0]!r}, which is not installed",
                remedy=how_to_install(extra),
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return CapacityError(f"{where}no space left on the disk", remedy="free some space or choose another folder")
    if isinstance(error, MemoryError):
        return CapacityError("not enough memory", remedy="use a smaller image, context or model")
    return Qwen3VLError(
        f"internal error: {type(error).__name__}: {error}",
        remedy="this is a bug: run the command again with --debug and report what it prints",
    )


def _report(message: str, error: BaseException, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exception(error, file=sys.stderr)
    print(message, file=sys.stderr, flush=True)
