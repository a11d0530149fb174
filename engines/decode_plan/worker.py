"""Compile kernels in a process of its own: jobs as lines of JSON on stdin, one line of JSON for each on stdout.

Triton is imported here alone. Whether it compiles or interprets is decided when it is imported, so a process that
interprets kernels, as tests do, cannot compile them.

A job is what `engines.decode_plan.compile.Job` holds. The answer has `entry`, the kernel's name in the machine code,
`shared_bytes`, the version of `ptxas`, `compile_s` of processor time, and the code in base64; or `error`.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import os
import sys
from typing import Any

_POINTER_ALIGNMENT = 16


def compiled(job: dict[str, Any]) -> Any:
    """Return what Triton makes of one kernel for one GPU, with its text and code in `asm`.

    Raises:
        Exception: Triton raises classes of its own; the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"engines.kernels.triton.{job['module']}"), job["function"])
    names = list(inspect.signature(kernel.fn).parameters)
    types, constants = job["types"], job["constants"]
    if names[: len(types)] != list(types) or set(names[len(types) :]) != set(constants):
        raise TypeError(f"{job['function']} takes {names}, the launch has {[*types, *constants]}")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", _POINTER_ALIGNMENT]]
            for name, kind in types.items()
            if kind.startswith("*")
        },
    )
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    if job["max_registers"] is not None:
        options["maxnreg"] = job["max_registers"]
    if constants.get("PDL"):
        options["launch_pdl"] = True
    code = triton.compile(source, target=GPUTarget("cuda", job["sm"], 32), options=options)
    if code.metadata.global_scratch_size:
        raise ValueError(f"{job['function']} wants {code.metadata.global_scratch_size} bytes of scratch memory")
    return code


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a job.

    Raises:
        Exception: Triton raises classes of its own; the kernel does not compile.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    started = os.times()
    code = compiled(job)
    return {
        "entry": code.metadata.name,
        "shared_bytes": code.metadata.shared,
        "ptxas": get_ptxas(job["sm"]).version,
        # User and system, of this process and of the assembler's.
        "compile_s": sum(now - then for now, then in zip(os.times()[:4], started[:4], strict=True)),
        "code": base64.b64encode(code.asm["cubin"]).decode(),
    }


def main() -> None:
    """Answer jobs until stdin ends."""
    # What Triton prints is no answer, and its C++ parts know the descriptor alone.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            try:
                answer = compile_job(json.loads(line))
            except Exception as error:  # whatever the compiler raises is the answer
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
