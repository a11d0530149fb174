"""Records as groups of options: what typer sees of them, and what of them was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.main import get_command

from helpers.command_line import call
from qwen3vl_export.cli import export, run
from qwen3vl_export.cli.options import Answering, Opening, given, grouped


@dataclass(frozen=True)
class Record:
    """Some options.

    Attributes:
        size: How large it is, told in
            two lines.
        is_red: Whether it is red.
        names: Who has it.
    """

    size: Annotated[int, typer.Option(min=2)] = 3
    is_red: bool = False
    names: list[str] | None = None


def app_of(seen: list[object], *, of_few: bool = False) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    def whole(place: str, *, record: Record) -> None:
        seen.append((place, record))

    def part(place: str, *, record: Annotated[Record, ("size",)]) -> None:
        seen.append((place, record))

    app.command()(grouped(part if of_few else whole))
    return app


def test_fields_are_options_and_come_back_as_the_record() -> None:
    seen: list[object] = []
    app = app_of(seen)
    assert call(app, "here")[0] == 0
    assert call(app, "there", "--size", "5", "--is-red", "--names", "a", "--names", "b")[0] == 0
    assert seen == [("here", Record()), ("there", Record(5, True, ["a", "b"]))]
    assert call(app, "here", "--size", "1")[0] == 2
    assert call(app, "here", "--no-is-red")[0] == 2
    assert "How large it is, told in two lines." in " ".join(call(app, "--help")[1].split())


def test_a_command_may_show_some_of_the_fields() -> None:
    seen: list[object] = []
    app = app_of(seen, of_few=True)
    assert call(app, "here", "--size", "4")[0] == 0
    assert seen == [("here", Record(4))]
    assert call(app, "here", "--is-red")[0] == 2


def test_what_has_its_default_was_not_given() -> None:
    assert given(Answering()) == given(Opening()) == given(Record(3, False, [])) == {}
    # 0 is a value where the default is none.
    assert given(Answering(seed=0, do_sample=False)) == {"seed": 0, "do_sample": False}
    assert given(Record(4, True, ["a"])) == {"size": 4, "is_red": True, "names": ("a",)}


@pytest.mark.parametrize("app", [export.app, run.app])
def test_every_option_says_what_it_is_for(app: typer.Typer) -> None:
    command = get_command(app)
    commands = getattr(command, "commands", {"": command})
    assert commands
    for name, each in commands.items():
        for parameter in each.params:
            assert getattr(parameter, "help", None), (name, parameter.name)
