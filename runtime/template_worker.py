"""Render one untrusted chat template in a process with limits; started by `runtime/template_process.py`, by its path.

It imports the standard library, jinja2 and the file beside it, and nothing of this project's packages, so that it
starts in tens of milliseconds. Requests come on stdin, answers go to stdout, as frames: 8 bytes of length, then JSON in
UTF-8 (lone surrogates allowed). The first request compiles, later ones render. At the end of stdin, which is the end of
the process that started it, it ends.

Limits, where the system has them (`resource` and `setitimer`; not on Windows): memory by the size of the address space,
above what the process had at its start; processor time by a timer whose signal ends the process, also inside of one
call of C; no core dumps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from typing import Any, BinaryIO

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Beside a request stand its parsed form, the pieces of the text, the text, and the same once more for the markers.
_BYTES_PER_BYTE_OF_INPUT = 16


def read_frame(stream: BinaryIO) -> bytes | None:
    """Return the next frame, or None at the end of the stream."""
    header = stream.read(8)
    if len(header) < 8:
        return None
    length = int.from_bytes(header, "big")
    payload = stream.read(length)
    return payload if len(payload) == length else None


def write_frame(stream: BinaryIO, values: Any) -> None:
    """Write a value as one frame."""
    payload = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(payload).to_bytes(8, "big") + payload)
    stream.flush()


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # no Linux: a guess, above what an interpreter takes
        return 1 << 30


def _limit_memory(num_bytes: int | None) -> None:
    """Limit the address space, to what the system allows if that is less or `num_bytes` is None."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = hard if num_bytes is None else num_bytes
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _limit_time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(engine_path: str, memory_bytes: int, seconds: float) -> None:
    """Answer requests until stdin ends.

    Args:
        engine_path: The file of `runtime.template_engine`.
        memory_bytes: Most memory above that of the start.
        seconds: Most processor time of one request.
    """
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    if hasattr(signal, "SIGPROF"):  # a process that ignores or blocks it hands this on
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = importlib.util.spec_from_file_location("template_engine", engine_path)
    assert spec is not None and spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    write_frame(answers, {})  # ready
    start_bytes = _address_space_bytes()
    template = None
    while (payload := read_frame(requests)) is not None:
        _limit_memory(start_bytes + memory_bytes + _BYTES_PER_BYTE_OF_INPUT * len(payload))
        _limit_time(seconds)
        answer: dict[str, Any]
        try:
            request = json.loads(payload.decode("utf-8", "surrogatepass"))
            if template is None:
                template = engine.CompiledTemplate(*request)
                answer = {"variables": sorted(template.variables)}
            else:
                text, places = template.render(*request)
                answer = {"text": text, "places": places}
        except engine.TemplateFailure as failure:
            answer = {"kind": failure.kind, "reason": failure.reason[:1000]}
        except MemoryError:
            answer = {"kind": engine.MEMORY, "reason": ""}
        except RecursionError as error:
            answer = {"kind": engine.REFUSED, "reason": str(error)}
        _limit_time(0)
        _limit_memory(None)
        write_frame(answers, answer)


if __name__ == "__main__":
    sys.path += sys.argv[4:]  # where the starting process found jinja2
    serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
