"""A server as a process of its own: its start until it is ready, its memory and processor time, and its end."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from runtime.errors import UsageError

_HOST = "127.0.0.1"
_POLL_S = 0.01
_LONGEST_START_S = 600.0
_LONGEST_END_S = 30.0


class ServerProcess:
    """A server that runs until the context ends.

    Args:
        command: What starts it; `{port}` in it stands for a port that was free a moment before.
        ready_path: What answers with 200 as soon as requests are taken.
        log: File for its output.

    Attributes:
        url: Where it is.
        pid: Its number.
        ready_s: Seconds from the start of the process to `ready_path`.
    """

    def __init__(self, command: Sequence[str], ready_path: str, log: Path) -> None:
        port = free_port()
        self.url = f"http://{_HOST}:{port}"
        self._log = log
        start = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.pid = self._process.pid
        try:
            while not self._is_ready(port, ready_path):
                if self._process.poll() is not None or time.perf_counter() - start > _LONGEST_START_S:
                    raise UsageError(
                        f"{Path(command[0]).name} did not become ready: {self._last_line()}",
                        remedy="start it by hand to see its whole log",
                    )
                time.sleep(_POLL_S)
        except BaseException:
            self.end()
            raise
        self.ready_s = time.perf_counter() - start

    def __enter__(self) -> ServerProcess:
        """Return it, ready."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """End it."""
        self.end()

    def end(self) -> None:
        """Stop the process: with SIGTERM, and if that does not help with SIGKILL."""
        self._process.terminate()
        try:
            self._process.wait(_LONGEST_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """Return what it has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _last_line(self) -> str:
        return (self.log().strip().splitlines() or ["it wrote nothing"])[-1]

    @staticmethod
    def _is_ready(port: int, path: str) -> bool:
        connection = http.client.HTTPConnection(_HOST, port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@dataclass(frozen=True)
class Memory:
    """Memory of a process in bytes.

    Attributes:
        rss: Resident pages, those of mapped files included (VmRSS).
        anonymous: Resident pages that no file holds.
    """

    rss: int
    anonymous: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Return that of a process, as Linux counts it."""
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
        return cls(_kilobytes(status, "VmRSS") * 1024, _kilobytes(rollup, "Anonymous") * 1024)


def cpu_s(pid: int) -> float:
    """Return the processor time of a process so far, all threads and both modes."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_server(engine: Path, threads: int, *options: str) -> list[str]:
    """Return the command that serves an engine."""
    command = [sys.executable, "-m", "qwen3vl_export.cli.run", "serve", str(engine)]
    return [*command, "--port", "{port}", "--threads", str(threads), *options]


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, f"no {name}"
    return int(found[1])
