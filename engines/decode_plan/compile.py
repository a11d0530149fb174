"""Compile kernels for GPUs that need not be there, in child processes, and keep what was compiled.

What is kept lies in the user's cache, under a name that is a digest of all that the code comes of: the job, the source
of our kernels, and Triton's version. Without a place for it, everything is compiled each time.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from engines.kernels.launch import Gpu, Launch
from runtime.errors import TargetError
from runtime.machine import available_cores
from runtime.settings import child_environment, user_cache_folder

_KEPT = Path("qwen3vl") / "kernels"
# Constants of a kernel that the GPU decides: inline machine code at all, and programmatic dependent launch.
_OF_GPU = ("ASM", "PDL")
_MODULE = "engines.decode_plan.worker"


@dataclass(frozen=True)
class Job:
    """One kernel for one GPU; see `engines.kernels.launch.Launch`.

    Attributes:
        types: Of the run-time parameters, in the kernel's order.
        sm: Compute capability as a number.
    """

    module: str
    function: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | str], ...]
    num_warps: int
    num_stages: int
    max_registers: int | None
    sm: int

    @classmethod
    def of(cls, launch: Launch, gpu: Gpu) -> Job:
        """Return what has to be compiled for a launch on a GPU."""
        constants = {**launch.constants, "ASM": 1, "PDL": int(gpu.has_dependent_launch)}
        return cls(
            launch.module,
            launch.function,
            tuple((name, argument.type) for name, argument in launch.arguments.items()),
            tuple(constants.items()),
            launch.num_warps,
            launch.num_stages,
            launch.max_registers,
            gpu.sm,
        )

    def for_any_gpu(self) -> Job:
        """Return the kernel alone: the same for all GPUs that it is compiled for."""
        constants = tuple((name, value) for name, value in self.constants if name not in _OF_GPU)
        return replace(self, sm=0, constants=constants)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; without `sm` if it is for any GPU."""
        values = asdict(self) | {"types": dict(self.types), "constants": dict(self.constants)}
        if not self.sm:
            del values["sm"]
        return values


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel for one GPU.

    Attributes:
        entry: Its name in the code.
        shared_bytes: Shared memory that a program takes.
        ptxas: Version of the assembler, whose major version a driver has to have.
        binary: A cubin.
        compile_s: Processor time that it took, that of the assembler included.
    """

    entry: str
    shared_bytes: int
    ptxas: str
    binary: bytes
    compile_s: float = 0.0


def triton_version() -> str:
    """Return the version of Triton; empty if it is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def compile_all(
    jobs: Sequence[Job], advance: Callable[[int, int], None] = lambda done, total: None, cache: Path | None = None
) -> dict[Job, Code]:
    """Return the code of each job.

    Args:
        jobs: What to compile; the same one twice is compiled once.
        advance: Told how many of how many are done.
        cache: Folder for what is compiled; that of the user by default.

    Raises:
        TargetError: A kernel does not compile, or a compiling process dies.
    """
    kept = _Kept(cache)
    wanted = list(dict.fromkeys(jobs))
    done = {job: code for job in wanted if (code := kept.get(job)) is not None}
    missing = [job for job in wanted if job not in done]
    advance(len(done), len(wanted))
    for job, code in _compiled(missing):
        done[job] = code
        kept.put(job, code)
        advance(len(done), len(wanted))
    return done


def _compiled(jobs: Sequence[Job]) -> Iterator[tuple[Job, Code]]:
    """Compile jobs on all cores, in no order."""
    if not jobs:
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    answers: queue.SimpleQueue[tuple[Job, Code] | BaseException] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qwen3vl-triton-"))
        workers = [_start(folder) for _ in range(min(available_cores(), len(jobs)))]
        stack.callback(_end, workers)
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, waiting, answers), daemon=True).start()
        for _ in jobs:
            answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer


def _feed(
    worker: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Job],
    answers: queue.SimpleQueue[tuple[Job, Code] | BaseException],
) -> None:
    """Give a worker jobs until none is left."""
    assert worker.stdin is not None and worker.stdout is not None
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            worker.stdin.write(json.dumps(job.to_dict()) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except (OSError, ValueError):
            line = ""
        answers.put(_answer(job, line))


def _answer(job: Job, line: str) -> tuple[Job, Code] | TargetError:
    where = f"{job.module}.{job.function} for SM {job.sm // 10}.{job.sm % 10}"
    remedy = "leave the decode plan out with --no-decode-plan, and report this with the version of triton"
    if not line.endswith("\n"):  # a part of a line, too
        return TargetError(f"the process that compiles {where} died", remedy=f"see that memory is free, or {remedy}")
    try:
        values = json.loads(line)
        if "error" in values:
            return TargetError(f"{where} does not compile: {values['error']}", remedy=remedy)
        binary = base64.b64decode(values.pop("code"))
        return job, Code(**values, binary=binary)
    except (ValueError, KeyError, TypeError, AttributeError):  # as if it had died: a thread that raises answers nothing
        return TargetError(f"the process that compiles {where} answered {line[:80]!r}", remedy=remedy)


def _start(folder: str) -> subprocess.Popen[str]:
    changes = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": folder,
        "TRITON_DISABLE_LINE_INFO": "1",  # which would be most of the code's bytes
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE],  # -P: the folder that the user is in has no modules for it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(changes),
        text=True,
    )


def _end(workers: Sequence[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Kept:
    """Compiled code in a folder, one file for each job: a digest of the rest, a line of JSON, and the cubin."""

    def __init__(self, folder: Path | None) -> None:
        user = user_cache_folder() if folder is None else None
        self._folder = folder if user is None else user / _KEPT
        self._source = source_digest()

    def get(self, job: Job) -> Code | None:
        """Return the code of a job; None if it is not here whole."""
        if self._folder is None:
            return None
        try:
            digest, _, content = self._path(job).read_bytes().partition(b"\n")
            if hashlib.sha256(content).hexdigest().encode() != digest:
                return None
            head, _, binary = content.partition(b"\n")
            return Code(**json.loads(head), binary=binary)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, job: Job, code: Code) -> None:
        """Keep the code of a job, if there is a place for it."""
        if self._folder is None:
            return
        head = {name: value for name, value in vars(code).items() if name != "binary"}
        content = json.dumps(head).encode() + b"\n" + code.binary
        with contextlib.suppress(OSError):  # a cache that cannot be written makes the next build slower, no more
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                    file.close()
                    os.replace(file.name, self._path(job))
                except BaseException:
                    os.unlink(file.name)
                    raise

    def _path(self, job: Job) -> Path:
        assert self._folder is not None
        text = json.dumps([job.to_dict(), self._source, triton_version()])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"


def source_digest() -> str:
    """Return a digest of the source of all kernels, which call each other."""
    digest = hashlib.sha256()
    folder = resources.files("engines.kernels") / "triton"
    worker = resources.files("engines.decode_plan") / "worker.py"  # which says how they are compiled
    for file in (worker, *sorted(folder.iterdir(), key=lambda each: each.name)):
        if file.name.endswith(".py"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
