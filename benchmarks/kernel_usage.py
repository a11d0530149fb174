"""What a compiled kernel takes of a GPU, as `cuobjdump` reads it out of the machine code; triton brings the tool."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import resources

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SM = re.compile(r"\bsm=(\d+)")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes.

    Attributes:
        entry: Its name.
        sm: Compute capability that the code is for, as a number.
        registers: Of a thread.
        stack_bytes: Of a thread, where registers are spilled to.
        shared_bytes: Of a program, as the code declares it; what is asked for at launch comes on top.
    """

    entry: str
    sm: int
    registers: int
    stack_bytes: int
    shared_bytes: int


def usage_of(cubin: bytes) -> Usage:
    """Return what the one kernel of a cubin takes.

    Raises:
        ValueError: There is not one, or `cuobjdump` says it in other words.
    """
    tool = str(resources.files("triton") / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, elf = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("-res-usage", "-elf")
        )
    kernels, sm = _USAGE.findall(text), _SM.search(elf)
    if len(kernels) != 1 or sm is None:
        raise ValueError(f"cuobjdump: {len(kernels)} kernels: {text[:200]}")
    entry, registers, stack, shared, local = kernels[0]
    return Usage(entry, int(sm[1]), int(registers), int(stack) + int(local), int(shared))
