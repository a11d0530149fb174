"""The most memory that the children of this process take while something runs, those included that end meanwhile."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_POLL_S = 0.04  # a look at 80 processes takes about 2 ms


class ChildrenWatch:
    """Looks at the children every few milliseconds, as a context, from a thread of its own.

    Of a child that ended nothing can be asked: `getrusage` tells of all together, and counts the memory of the process
    that it was forked from (the peak of resident memory outlives execve).

    Attributes:
        grown_bytes: The largest growth of a child: a program of its own from when it was first seen, a fork from ours.
        largest_bytes: The largest peak of a child that is a program of its own.
        cpu_s: What the watching took, to be taken off what was measured.
    """

    def __init__(self) -> None:
        self.grown_bytes = 0
        self.largest_bytes = 0
        self.cpu_s = 0.0
        self._first: dict[int, int] = {}
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ChildrenWatch:
        self._own = _words(os.getpid())
        self._own_bytes = status_bytes("VmRSS")
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._has_ended.wait(_POLL_S):
            self._look()
        self.cpu_s = time.thread_time()

    def _look(self) -> None:
        for pid in _children():
            try:
                words, peak = _words(pid), status_bytes("VmHWM", pid)
            except (OSError, LookupError):  # it ended
                continue
            if words == self._own:  # between fork and execve, or without the latter
                first = self._own_bytes
            else:
                first = self._first.setdefault(pid, peak)
                self.largest_bytes = max(self.largest_bytes, peak)
            self.grown_bytes = max(self.grown_bytes, peak - first)


def status_bytes(field: str, pid: int | None = None) -> int:
    """Return a size that /proc tells of a process, this one by default.

    Raises:
        OSError: There is no such process.
        LookupError: It has ended, and nobody waited for it.
    """
    path = Path(f"/proc/{'self' if pid is None else pid}/status")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{path} has no {field}")


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _children() -> list[int]:
    """Return the processes whose parent is this one."""
    parent, found = str(os.getpid()).encode(), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_bytes()
            except OSError:  # it ended
                continue
            if stat.rpartition(b")")[2].split()[1] == parent:  # after the name, which may hold anything
                found.append(int(name))
    return found
