"""The short run of the fuzzers, and that they find what they are to find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from fuzz import driver
from fuzz.family import ROOT, SHARES, load
from fuzz.mutation import WHOLE, apply_bytes, apply_json, byte_edits, json_edits
from fuzz.outcome import CRASH, HANG, MEMORY, MESSAGE, RAW, REFUSED, SLOW, TAKEN, Bounds
from fuzz.worker import Worker
from runtime.errors import UsageError

# Inputs of the short run: a few seconds for each family.
_INPUTS = {"configs": 40, "engines": 15, "images": 40, "messages": 40, "safetensors": 40, "templates": 8}
# `make fuzz` judges the time that an input takes. A test must not: the machine may be slow, or busy.
_ANY_MACHINE = Bounds(max_cpu_s=600.0, max_wall_s=600.0)


@pytest.mark.parametrize("name", sorted(SHARES))
def test_inputs_are_taken_or_refused(name: str, demo_engine: Path) -> None:
    tallies = driver.fuzz({name: _INPUTS[name]}, demo_engine, 0, folder=None, max_findings=1, bounds=_ANY_MACHINE)
    assert tallies[name].kinds[TAKEN] + tallies[name].kinds[REFUSED] == _INPUTS[name], driver.table(tallies)
    assert tallies[name].kinds[REFUSED] > 0


@pytest.mark.parametrize("name", sorted(SHARES))
def test_the_same_seed_gives_the_same_inputs(name: str) -> None:
    family = load(name)
    recipes = [[driver.recipe_of(name, family, seed, number) for number in range(20)] for seed in (0, 0, 1)]
    assert repr(recipes[0]) == repr(recipes[1]) and repr(recipes[0]) != repr(recipes[2])


def family_that(does: Callable[[Any], Any]) -> Any:
    return SimpleNamespace(
        setup=lambda engine, folder: None,
        make=lambda random: {"edits": [1, 2, 3]},
        size=lambda recipe: (0, 0),
        run=lambda recipe, context: str(does(recipe)),
    )


def refuse(message: str, remedy: str | None = "do it otherwise") -> None:
    raise UsageError(message, remedy=remedy)


class _AsItIs(UsageError):
    """Neither shortened nor escaped."""

    def __str__(self) -> str:
        return str(self.text)


def say(text: str) -> None:
    error = _AsItIs("a", remedy="b")
    error.text = text  # type: ignore[attr-defined]
    raise error


def work(seconds: float) -> None:
    end = time.thread_time() + seconds  # without that of the thread which watches the children
    while time.thread_time() < end:
        pass


def grow(_: object) -> int:
    return sum(bytearray(b"x" * 400_000_000)[::4096])


def grow_in(command: list[str]) -> int:
    return subprocess.run([sys.executable, *command], check=True, close_fds=True).returncode


def grow_in_a_fork(given: object) -> int:
    child = os.fork()
    if not child:
        grow(given)
        time.sleep(1)  # to be looked at meanwhile
        os._exit(0)
    return os.waitpid(child, 0)[1]


TAKES_400_MB = ["-c", "import time; x = bytearray(b'x' * 400_000_000); time.sleep(1)"]


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (lambda _: "well", TAKEN),
        (lambda _: refuse("a: 1 expected, 2 found"), REFUSED),
        (lambda _: 1 / 0, RAW),
        (lambda _: refuse("a", remedy=None), MESSAGE),
        (lambda _: refuse("a must be 1, got 2", remedy=None), REFUSED),
        (lambda _: say("a" * 501), MESSAGE),
        (lambda _: say("\x1b[2J"), MESSAGE),
        (lambda _: say("\u202e"), MESSAGE),
        (lambda _: say("\ud800"), MESSAGE),
        (lambda _: refuse("internal error"), MESSAGE),
        (grow, MEMORY),
        (lambda _: grow_in(TAKES_400_MB), MEMORY),
        (lambda _: grow_in(["-c", "pass"]), TAKEN),
        (grow_in_a_fork, MEMORY),
        (lambda _: bytes(1 << 40), MEMORY),
        (lambda _: os.kill(os.getpid(), signal.SIGSEGV), CRASH),
        (lambda _: os._exit(3), CRASH),
    ],
)
def test_findings_are_found_and_the_next_input_runs(does: Callable[[Any], Any], kind: str) -> None:
    with Worker(family_that(does), Path(), _ANY_MACHINE) as worker:
        outcomes = [worker.run({"edits": []}) for _ in range(2)]
    assert [outcome.kind for outcome in outcomes] == [kind, kind], outcomes
    assert outcomes[0].is_finding == (kind not in (TAKEN, REFUSED))


def test_an_input_that_takes_more_time_than_it_may_is_slow() -> None:
    with Worker(family_that(lambda _: work(0.3)), Path(), Bounds(max_cpu_s=0.2, max_wall_s=600.0)) as worker:
        assert [worker.run({"edits": []}).kind for _ in range(2)] == [SLOW] * 2


def test_an_input_that_takes_too_much_of_both_is_named_by_its_memory() -> None:
    with Worker(family_that(grow), Path(), Bounds(max_cpu_s=0.0, max_wall_s=600.0)) as worker:
        assert worker.run({"edits": []}).kind == MEMORY


def test_a_fault_of_a_family_is_no_finding() -> None:
    family = family_that(lambda _: "well")
    family.size = lambda recipe: 1 / 0
    with Worker(family, Path()) as worker, pytest.raises(RuntimeError, match="cannot make an input"):
        worker.run({"edits": []})


def test_an_input_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child_file = tmp_path / "child"

    def sleep(_: object) -> None:
        child = os.fork()
        if not child:
            time.sleep(3600)
            os._exit(0)
        child_file.write_text(str(child))
        time.sleep(3600)

    with Worker(family_that(sleep), Path(), Bounds(max_wall_s=3.0)) as worker:
        assert worker.run({"edits": []}).kind == HANG
    child = Path("/proc") / child_file.read_text() / "stat"
    deadline = time.monotonic() + 300
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.01)


def test_a_finding_is_made_smaller_saved_and_counted(tmp_path: Path) -> None:
    family = family_that(lambda recipe: 1 / 0 if 2 in recipe["edits"] else "well")
    tallies = driver.fuzz({"made up": 5}, Path(), 0, tmp_path, family_of=lambda _: family)
    assert tallies["made up"].num_findings == 5
    (example,) = tallies["made up"].examples.values()
    assert example.recipe == {"edits": [2]} and example.file is not None
    assert len(list(tmp_path.iterdir())) == 3  # of one cause, the first few
    text = driver.table(tallies)
    assert "5 x raw exception ZeroDivisionError at a library" in text and str(example.file) in text


def test_an_engine_may_be_named_from_the_working_directory(demo_engine: Path, tmp_path: Path) -> None:
    """Each worker has a folder of its own."""
    command = [sys.executable, "-m", "fuzz", "engines", "--inputs", "1", "--engine", demo_engine.name]
    command += ["--max-cpu-s", "600"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)],
        cwd=demo_engine.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "engines" in done.stdout


def test_inputs_are_divided_by_shares() -> None:
    assert driver.shares(20_000, driver.chosen([])) == driver.shares(20_000, SHARES)
    assert abs(sum(driver.shares(20_000, SHARES).values()) - 20_000) < len(SHARES)
    assert driver.shares(10, driver.chosen(["images"])) == {"images": 10}
    with pytest.raises(SystemExit, match="known: configs"):
        driver.chosen(["nothing"])


@pytest.mark.parametrize("seed", range(20))
def test_edits_can_be_applied_again_and_left_out(seed: int) -> None:
    value = {"a": [1, {"b": "text"}], "c": 2.5, "d": None}
    random = Random(seed)
    edits = json_edits(random, value, ["e"])
    assert repr(apply_json(value, edits)) == repr(apply_json(value, edits))
    assert value == {"a": [1, {"b": "text"}], "c": 2.5, "d": None}
    for index in range(len(edits)):
        apply_json(value, edits[:index] + edits[index + 1 :])
    data = bytes(range(256))
    assert apply_bytes(data, byte_edits(Random(seed), 256)) == apply_bytes(data, byte_edits(Random(seed), 256))
    assert apply_bytes(data, []) == data and apply_bytes(data, [["whole", "null"]]) == WHOLE["null"]
