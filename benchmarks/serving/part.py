"""One part of the measurement as a process of its own: its name, the workload as JSON, and the file for the result."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.serving.workload import Workload

PARTS: Mapping[str, str] = {
    "scaling": "decode steps of several sequences, straight on the session",
    "company": "requests at once against one after the other",
    "alone": "one request against direct calls of the session",
    "scheduler": "what is around a step of 32 sequences",
    "fairness": "a long prompt with an image beside others that decode",
    "conversation": "the second turn behind a long prompt with an image, and that image in another prompt",
    "overload": "ten times more requests than the engine can answer",
}
"""What each part measures, in the order in which they run."""
_MODULES = {"scheduler": "full_house"}


def measure(name: str, work: Workload) -> dict[str, Any]:
    """Measure one part in this process."""
    module = importlib.import_module(f"benchmarks.serving.{_MODULES.get(name, name)}")
    result: dict[str, Any] = module.measure(work)
    return result


def command(name: str, work: Workload) -> list[str]:
    """Return the command line of a part, to which the file for the result is added."""
    return [sys.executable, "-m", "benchmarks.serving.part", name, json.dumps(asdict(work))]


def main() -> None:
    """Measure the part that the command line names, and write the result as JSON."""
    name, values, result = sys.argv[1:]
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(values).items()}
    Path(result).write_text(json.dumps(measure(name, Workload(**given))), encoding="utf-8")


if __name__ == "__main__":
    main()
