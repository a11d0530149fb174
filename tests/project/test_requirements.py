"""Ranges of pyproject.toml: a lower bound for each, and an upper one only with its reason beside it."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import ROOT
from runtime.installation import EXTRAS

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LOWER, UPPER = {">=", ">", "==", "~="}, {"<", "<=", "==", "~=", "!="}


def faults(text: str) -> list[str]:
    """What is wrong with the ranges of a pyproject.toml, one line each."""
    parsed = tomllib.loads(text)
    project = parsed["project"]
    found = [*parsed["build-system"]["requires"], *project["dependencies"]]
    found += [each for extra in project["optional-dependencies"].values() for each in extra]
    wrong = []
    for each in found:
        if Requirement(each).name == project["name"]:
            continue  # an extra that holds another one
        operators = {part.operator for part in Requirement(each).specifier}
        if not operators & LOWER:
            wrong.append(f"{each}: no lower bound")
        lines = [line for line in text.splitlines() if f'"{each}"' in line]
        assert lines, f"{each} is not written as one string"
        if operators & UPPER and not all("#" in line for line in lines):
            wrong.append(f"{each}: an upper bound without a reason")
    return wrong


def test_every_range_has_a_lower_bound_and_reasons_for_upper_ones() -> None:
    assert faults(PROJECT) == []


def test_those_of_the_peers_have_one_too() -> None:
    files = sorted((ROOT / "benchmarks" / "compare").glob("requirements-*.txt"))
    lines = [
        line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
    ]
    assert len(files) == 2 and len(lines) > 8
    assert [line for line in lines if not {part.operator for part in Requirement(line).specifier} & LOWER] == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"numpy>=2.0",', '"numpy",', ["numpy: no lower bound"]),
        ('"numpy>=2.0",', '"numpy<3",  # why', ["numpy<3: no lower bound"]),
        ('"numpy>=2.0",', '"numpy>=2.0,<3",', ["numpy>=2.0,<3: an upper bound without a reason"]),
        ('"numpy>=2.0",', '"numpy==2.4.6",', ["numpy==2.4.6: an upper bound without a reason"]),
        ('"numpy>=2.0",', '"numpy>=2.0,<3",  # why', []),
        ('"setuptools>=77"', '"setuptools"', ["setuptools: no lower bound"]),
    ],
)
def test_the_rule_sees_what_it_forbids(old: str, new: str, expected: list[str]) -> None:
    assert PROJECT.count(old) == 1
    assert faults(PROJECT.replace(old, new)) == expected


def test_errors_name_the_extra_that_installs_a_module() -> None:
    extras = tomllib.loads(PROJECT)["project"]["optional-dependencies"]
    held = {name: {canonicalize_name(Requirement(each).name) for each in extra} for name, extra in extras.items()}
    for module, extra in EXTRAS.items():
        assert canonicalize_name({"sklearn": "scikit-learn"}.get(module, module)) in held[extra], module
    assert {EXTRAS["transformers"], EXTRAS["torchvision"]} == {"verify"}
