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


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel for one GPU.

    Raises:
        Exception: Triton raises classes of its own; the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
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
    started = os.times()
    compiled = triton.compile(source, target=GPUTarget("cuda", job["sm"], 32), options=options)
    if compiled.metadata.global_scratch_size:
        raise ValueError(f"{job['function']} wants {compiled.metadata.global_scratch_size} bytes of scratch memory")
    return {
        "entry": compiled.metadata.name,
        "shared_bytes": compiled.metadata.shared,
        "ptxas": get_ptxas(job["sm"]).version,
        # User and system, of this process and of the assembler's.
        "compile_s": sum(now - then for now, then in zip(os.times()[:4], started[:4], strict=True)),
        "code": base64.b64encode(compiled.asm["cubin"]).decode(),
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
