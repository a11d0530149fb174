"""Start, ask and end the process that renders a chat template which is not known to be harmless.

Measured on one core of a server: 0.1 s of processor time to start and to compile a template of Qwen's size, then 0.3 ms
a chat beside jinja2's own time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from runtime.errors import EngineError

MAX_RENDER_MEMORY_BYTES = 256 << 20
"""Most memory that compiling or rendering a template may take, beside 16 bytes for each byte of the messages."""

MAX_RENDER_S = 1.0
"""Most processor time that compiling a template or rendering a chat may take."""

# Where the system counts processor time, this is for a worker that does not come to its turn: a template has nothing
# that it could wait for.
_MAX_WALL_S = 20.0 if hasattr(signal, "setitimer") else MAX_RENDER_S
_MAX_START_S = 60.0
_MAX_ANSWER_BYTES = 1 << 28
_PYTHON_NAME = re.compile(r"(python|pypy)[\w.-]*", re.IGNORECASE)
_WORKER = Path(__file__).with_name("template_worker.py")
_ENGINE = Path(__file__).with_name("template_engine.py")


class _Lent:
    """The worker of one process of ours, and the lock of its threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: subprocess.Popen[bytes] | None = None


class TemplateProcess:
    """One template in a process of its own, started when it is first asked and again after it was stopped.

    Threads take turns. A process that was forked from this one starts a worker of its own: two that read from one pipe
    would take each other's answers.

    Args:
        compile_request: What the worker's `CompiledTemplate` takes.
    """

    def __init__(self, *compile_request: Any) -> None:
        self._compile_request = compile_request
        # By process id. A lock that a fork copied may be held by a thread that the copy does not have.
        self._lent: dict[int, _Lent] = {}
        weakref.finalize(self, _end_all, self._lent)

    def compile(self) -> dict[str, Any]:
        """Return the worker's answer to the source: `variables`, or `kind` and `reason`.

        Raises:
            EngineError: No worker can be started, or the template exceeded a limit.
        """
        return self._ask(None)

    def render(self, special_tokens: Any, variables: Any) -> dict[str, Any]:
        """Return the worker's answer to a chat: `text` and `offsets`, or `kind` and `reason`.

        Raises:
            EngineError: No worker can be started, or the template exceeded a limit.
            ValueError: The variables cannot be written as JSON: a number of thousands of digits.
        """
        return self._ask([special_tokens, variables])

    def _ask(self, request: Any) -> dict[str, Any]:
        payload = None if request is None else _encode(request)
        lent = self._lent.setdefault(os.getpid(), _Lent())
        for pid in [pid for pid in self._lent if pid != os.getpid()]:
            _forget(self._lent.pop(pid, None))
        with lent.lock:
            try:
                if payload is None or lent.worker is None or lent.worker.poll() is not None:
                    _end(lent.worker)
                    lent.worker = _start()
                    answer = _exchange(lent.worker, _encode(self._compile_request))
                    if payload is None or "kind" in answer:
                        return answer
                return _exchange(lent.worker, payload)
            except BaseException:  # Ctrl-C too: what it answers next is not the answer to what it is asked next
                worker, lent.worker = lent.worker, None
                _end(worker)
                raise


def _encode(values: Any) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _python() -> str:
    """Return the interpreter to start.

    Raises:
        EngineError: There is none that can be told from a program with an embedded interpreter, which this would start.
    """
    beside = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    for candidate in (sys.executable, str(beside)):
        if candidate and _PYTHON_NAME.fullmatch(Path(candidate).name) and os.access(candidate, os.X_OK):
            return candidate
    raise EngineError(
        f"the chat template is not one of the known ones, so a Python process with limits has to render it, and "
        f"sys.executable is {sys.executable!r}, no Python interpreter",
        remedy="set sys.executable to the path of a Python interpreter of this version before opening the model",
    )


def _start() -> subprocess.Popen[bytes]:
    import jinja2
    import markupsafe

    # Isolated and without site: nothing of the user's environment runs, and it starts in half the time.
    paths = dict.fromkeys(str(Path(str(module.__file__)).parent.parent) for module in (jinja2, markupsafe))
    limits = (str(MAX_RENDER_MEMORY_BYTES), str(MAX_RENDER_S))
    command = [_python(), "-I", "-S", str(_WORKER), str(_ENGINE), *limits, *paths]
    try:
        # Unbuffered: what a buffer holds, a forked process would write once more.
        worker = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise EngineError(
            f"cannot start {command[0]} to render the chat template: {error.strerror}",
            remedy="let this process start others, or use a checkpoint with a known template",
        ) from error
    try:
        if _answer_of(worker, b"", _MAX_START_S) is None:
            raise EngineError(
                f"the process that renders the chat template did not start: {_last_words(worker)}",
                remedy=f"run it to see what it prints: {' '.join(command)}",
            )
    except BaseException:
        _end(worker)
        raise
    return worker


def _exchange(worker: subprocess.Popen[bytes], payload: bytes) -> dict[str, Any]:
    answer = _answer_of(worker, len(payload).to_bytes(8, "big") + payload, _MAX_WALL_S)
    if answer is None:
        worker.wait()
        raise EngineError(
            f"the chat template was stopped: {_why(worker)}, given {len(payload)} bytes",
            remedy="shorten the messages; if they are short, do not trust this checkpoint",
        )
    return answer


def _answer_of(worker: subprocess.Popen[bytes], request: bytes, seconds: float) -> dict[str, Any] | None:
    """Send a frame and return the next answer, or None if the worker ends, or is ended because time is over."""
    assert worker.stdin is not None and worker.stdout is not None
    clock = threading.Timer(seconds, worker.kill)
    clock.daemon = True
    clock.start()
    try:
        left = memoryview(request)
        while left:
            left = left[os.write(worker.stdin.fileno(), left) :]
        length = int.from_bytes(_read(worker.stdout.fileno(), 8), "big")
        payload = _read(worker.stdout.fileno(), length) if 0 < length <= _MAX_ANSWER_BYTES else b""
    except BrokenPipeError:
        payload = b""
    finally:
        clock.cancel()
    if not payload or len(payload) < length:
        worker.kill()
        return None
    answer: dict[str, Any] = json.loads(payload.decode("utf-8", "surrogatepass"))
    return answer


def _read(descriptor: int, num_bytes: int) -> bytes:
    """Read so many bytes, or fewer if the stream ends."""
    blocks: list[bytes] = []
    while num_bytes > 0 and (block := os.read(descriptor, min(num_bytes, 1 << 20))):
        blocks.append(block)
        num_bytes -= len(block)
    return b"".join(blocks)


def _why(worker: subprocess.Popen[bytes]) -> str:
    """Say which limit ended a worker."""
    number = -(worker.returncode or 0)
    if number == getattr(signal, "SIGPROF", None):
        return f"it took more than {MAX_RENDER_S} s of processor time"
    if number == signal.SIGSEGV:
        return "it is nested too deeply (its process ended with SIGSEGV)"
    if number == getattr(signal, "SIGKILL", None):
        return f"its process was killed, by the system or after {_MAX_WALL_S:g} s"
    return f"its process ended: {_last_words(worker)}"


def _last_words(worker: subprocess.Popen[bytes]) -> str:
    worker.kill()
    worker.wait()
    assert worker.stderr is not None
    lines = worker.stderr.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {worker.returncode}"


def _end(worker: subprocess.Popen[bytes] | None) -> None:
    """Stop a worker of this process and close its pipes."""
    if worker is not None:
        worker.kill()
        worker.wait()
        _close(worker)


def _close(worker: subprocess.Popen[bytes]) -> None:
    for pipe in (worker.stdin, worker.stdout, worker.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _forget(lent: _Lent | None) -> None:
    """Let go of the worker of the process that this one was forked from, which goes on using it."""
    if lent is not None and lent.worker is not None:
        lent.worker.returncode = 0  # not a child of this process: nothing to wait for
        _close(lent.worker)


def _end_all(lent_by_pid: dict[int, _Lent]) -> None:
    for pid, lent in list(lent_by_pid.items()):
        if pid == os.getpid():
            _end(lent.worker)
        else:
            _forget(lent)
