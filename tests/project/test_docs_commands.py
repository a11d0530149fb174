"""Commands that docs/*.md and the pages of targets show: those of `sh` blocks are run, and the options of all exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command

from helpers import ROOT
from qwen3vl_export.cli import export, run
from scripts import target_pages

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {"serving.md": "servers run until they are stopped, and one of their checkpoints is on the Hub"}
"""Pages with `sh` blocks that are not run, and why; their options are compared all the same."""
OURS = ("qwen3vl", "qwen3vl-export")
_SPAN = re.compile(r"`((?:qwen3vl|qwen3vl-export) [^`]+)`")
_LINE = re.compile(r"^ *((?:qwen3vl|qwen3vl-export) .+)$", re.M)


def shell_lines(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def commands(text: str) -> Iterator[list[str]]:
    """Our commands in a text: in `code`, and on lines of code."""
    for shown in (*_SPAN.findall(text), *_LINE.findall(text)):
        shown = shown.replace("\\|", "|").replace("…", "...")
        try:
            yield shlex.split(shown, comments=True)
        except ValueError:  # an apostrophe of the prose that a line of it goes on with
            yield shown.split()


def options(command: click.Command) -> set[str]:
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return found | {"--help", "--debug", "--version"}


def command_of(words: list[str]) -> click.Command | None:
    """The command that words begin with; None for one that only a placeholder names, such as `qwen3vl COMMAND`."""
    if words[0] == "qwen3vl-export":
        return get_command(export.app)
    found: click.Command = get_command(run.app)
    for word in words[1:3]:
        if hasattr(found, "commands") and word in found.commands:
            found = found.commands[word]
    return found if found is not get_command(run.app) else None


def unknown(words: list[str]) -> list[str]:
    """Options of a shown command that it does not have; `--a|--b` are two, `[--a]...` is one."""
    command = command_of(words)
    assert command is not None
    named = {name for word in words[1:] for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", word.split("=")[0])}
    return sorted(named - options(command))


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_options_of_commands_exist(page: str) -> None:
    text = README if page == "README.md" else PAGES[page]
    shown = list(commands(text))
    wrong = [(" ".join(words), bad) for words in shown if (bad := unknown(words))]
    assert wrong == []


def test_commands_are_found() -> None:
    assert sum(len(list(commands(text))) for text in PAGES.values()) > 80
    assert unknown(["qwen3vl", "run", "ENGINE", "--no-such", "--stats"]) == ["--no-such"]
    assert unknown(["qwen3vl-export", "MODEL", "[--taget", "auto]"]) == ["--taget"]


@pytest.mark.parametrize(("name", "text"), target_pages.target_pages().items())
def test_commands_of_the_pages_of_targets(name: str, text: str) -> None:
    install, build, ask = shell_lines(text)
    assert install[:2] == ["pip", "install"] and unknown(build) == unknown(ask) == []
    assert build[build.index("--target") + 1] == Path(name).stem


def test_options_that_the_page_for_newcomers_names_are_ours() -> None:
    known = options(get_command(export.app))
    for command in get_command(run.app).commands.values():  # type: ignore[attr-defined]
        known |= options(command)
    known |= {"--weight-format", "--qwen3vl"}  # of optimum-cli and of polygraphy, where ours adds to them
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", PAGES["coming_from.md"], re.M)
    named = {name for _, here in rows for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", here)}
    assert len(named) > 25 and named - known == set()


def pages_with_commands() -> list[str]:
    return [name for name, text in PAGES.items() if shell_lines(text)]


def test_every_page_with_commands_is_run_or_says_why_not() -> None:
    assert NOT_RUN.keys() < set(pages_with_commands())


@pytest.mark.parametrize("page", [name for name in pages_with_commands() if name not in NOT_RUN])
def test_commands_of_pages_run(page: str, tmp_path: Path) -> None:
    (tmp_path / "qwen3vl_export").symlink_to(ROOT / "qwen3vl_export")
    binaries = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for line in shell_lines(PAGES[page]):
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(line)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        if line[1] == "run":
            assert done.stdout.strip() == ("1654" if "Read the digits." in line else "4")
    assert any((tmp_path / "out").iterdir())
