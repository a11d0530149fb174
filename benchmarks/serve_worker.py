"""The engine in a process that does nothing but what a server is compared with, told on stdin, answering on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Any

from benchmarks.serve_work import FromFiles, Work, do


class Worker:
    """The process, as the one that started it sees it; it ends with the context.

    Args:
        engine: Folder of the engine.
        threads: As of `Qwen3VLModel.from_engine`.
        options: More arguments of it.
    """

    def __init__(self, engine: str, threads: int, **options: Any) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.serve_worker",
            json.dumps([engine, {"threads": threads} | options]),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.do(None)

    def __enter__(self) -> Worker:
        """Return it, with the engine open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """End it."""
        self._process.communicate()

    def do(self, work: Work | None) -> dict[str, Any]:
        """Do work and return what is noted of it; without any, return as soon as the engine is open.

        Raises:
            subprocess.CalledProcessError: The process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(work and asdict(work)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self._process.wait(), self._process.args)
        result: dict[str, Any] = json.loads(line)
        return result


def main() -> None:
    """Open the engine that the command line names, and do what stdin says until it ends."""
    from runtime.model import Qwen3VLModel

    engine, options = json.loads(sys.argv[1])
    with Qwen3VLModel.from_engine(engine, **{"tuned": False, **options}) as model:
        client = FromFiles(model)
        for line in sys.stdin:
            values = json.loads(line)
            print(json.dumps({} if values is None else do(client, Work(**values))), flush=True)


if __name__ == "__main__":
    main()
