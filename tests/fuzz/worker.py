"""A child process that runs inputs, with limits, one after the other; a new one follows one that died or hung."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import selectors
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzz.children import ChildrenWatch, status_bytes
from fuzz.family import Family, Recipe
from fuzz.outcome import CRASH, HANG, MAX_BYTES, MEMORY, SLOW, TAKEN, USUAL, Bounds, Outcome, of_error

SETUP_S = 600.0
_OWN_FAULT = 70
"""Exit code of a child in which not the project but a family failed (EX_SOFTWARE of sysexits.h)."""
_ADDRESS_SPACE_BYTES = 3 << 30
"""Beyond what is mapped when inputs begin: an input beyond it gets a MemoryError and not the machine's last page."""


class Worker:
    """Runs inputs of one family; close it, or use it as a context.

    Args:
        family: Makes and runs the inputs.
        engine: Of the demo.
        bounds: Beyond which an input is slow or hangs.
    """

    def __init__(self, family: Family, engine: Path, bounds: Bounds = USUAL) -> None:
        self._family = family
        self._engine = engine
        self._bounds = bounds
        self._pid = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, recipe: Recipe) -> Outcome:
        """Run one input and return what became of it."""
        if not self._pid:
            self._start()
        os.write(self._to, (json.dumps(recipe) + "\n").encode())
        line = self._line(self._bounds.max_wall_s)
        if line is None:
            self._kill()
            return Outcome(HANG, "", f"no answer after {self._bounds.max_wall_s:.0f} s")
        if not line:
            status = os.waitstatus_to_exitcode(self._reap())
            if status == _OWN_FAULT:
                raise RuntimeError(f"the family cannot make an input of {json.dumps(recipe)[:1000]}")
            name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            return Outcome(CRASH, name, f"the process ended: {name}")
        return Outcome(**json.loads(line))

    def close(self) -> None:
        """End the child."""
        if self._pid:
            self._kill()

    def _start(self) -> None:
        take, self._to = os.pipe()
        self._from, give = os.pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="qwen3vl-fuzz-")
        self._rest = b""
        self._pid = os.fork()
        if not self._pid:
            status = _OWN_FAULT
            try:
                os.close(self._to)
                os.close(self._from)
                os.setpgid(0, 0)
                _serve(self._family, self._engine, self._bounds, Path(self._folder.name), take, give)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(take)
        os.close(give)
        if self._line(SETUP_S) != b"ready\n":
            self._kill()
            raise RuntimeError("the set-up of the family failed; what it printed is above")

    def _line(self, seconds: float) -> bytes | None:
        """Return the child's next line; None if it does not come, nothing if the child has gone."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                data = os.read(self._from, 1 << 16)
                if not data:
                    return b""
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"

    def _kill(self) -> None:
        """End the child and the children that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        self._reap()

    def _reap(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)  # children that outlived it
        self._pid = 0
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()
        return status


def _serve(family: Family, engine: Path, bounds: Bounds, folder: Path, take: int, give: int) -> None:
    """Run the inputs that come, until there are no more."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    faulthandler.disable()
    context = family.setup(engine, folder)
    gc.freeze()  # what was there before is not looked through at each input
    os.dup2(nothing, 2)  # libraries complain about hostile inputs
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + _ADDRESS_SPACE_BYTES, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.write(give, b"ready\n")
    with os.fdopen(take) as lines:
        for line in lines:
            outcome = measured(family, json.loads(line), context, bounds)
            os.write(give, (json.dumps(outcome.to_dict()) + "\n").encode())


def measured(family: Family, recipe: Recipe, context: Any, bounds: Bounds = USUAL) -> Outcome:
    """Run one input in this process, and compare time and memory with the bounds."""
    gc.collect()
    input_bytes, taken_bytes = family.size(recipe)
    # The peak of resident memory starts anew (proc_pid_clear_refs(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started = status_bytes("VmRSS"), _cpu_s()
    with ChildrenWatch() as children:
        try:
            outcome = Outcome(TAKEN, "", family.run(recipe, context))
        except BaseException as error:
            outcome = of_error(error)
        own_bytes = status_bytes("VmHWM") - before
    cpu_s, grown = _cpu_s() - started - children.cpu_s, max(0, own_bytes, children.grown_bytes)
    values = outcome.to_dict() | {"cpu_s": round(cpu_s, 3), "grown_bytes": grown}
    allowed = MAX_BYTES + input_bytes + (taken_bytes if outcome.kind == TAKEN else 0)
    # Memory first: to fill it takes time as well, and how much depends on the machine.
    if not outcome.is_finding and grown > allowed:
        text = f"{grown / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB; {outcome.text[:300]}"
        values |= {"kind": MEMORY, "place": outcome.kind, "text": text}
    elif not outcome.is_finding and cpu_s > bounds.max_cpu_s:
        values |= {"kind": SLOW, "place": outcome.kind, "text": f"{cpu_s:.1f} s of CPU time; {outcome.text[:300]}"}
    return Outcome(**values)


def _cpu_s() -> float:
    """Return the CPU time of this process and of the children that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
