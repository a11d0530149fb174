"""What a decode plan says of one kernel: what is compiled, for which arguments, and how it is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

HALF, INT4, INT8, FP8 = "half", "int4", "int8", "fp8"
"""How a weight is stored: unquantised, in blocks of codes as MatMulNBits reads them, in float8 e4m3 blocks."""

STORE: Final = 0
ADD: Final = 1
GLU: Final = 2
LOGITS: Final = 3
"""What a product does with its result: store it; add it to what is there, in place; SiLU(gate) · up; store float32."""


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel at run time.

    Attributes:
        type: As Triton writes types: `*fp16`, `*i64`, `i32`, `fp32`, …
        source: Where a pointer leads to: `buffer:NAME` (memory of the plan), `weight:NAME` (an initializer of
            decoder.onnx), `constant:NAME` (a small one that the plan brings), `key:LAYER`, `value:LAYER` (the KV
            cache), `step:NAME` (what a step reads and writes), `null`. For an integer `capacity` (rows of a cache's
            slot), or a number itself.
    """

    type: str
    source: str | int | float


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        module: File of `engines.kernels`.
        function: The kernel in it, whose run-time parameters come first and whose constants last.
        arguments: By parameter name, in the kernel's order.
        constants: Values of its constexpr parameters, by name; without PDL, which the builder adds.
        grid: Programs along x, y, z.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline that Triton makes of loops.
        max_registers: Most registers of a thread; None for the compiler's choice.
    """

    module: str
    function: str
    arguments: Mapping[str, Argument]
    constants: Mapping[str, int | float | str] = field(default_factory=dict)
    grid: tuple[int, int, int] = (1, 1, 1)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] of a product, or those of all experts, [E, N, K], as decoder.onnx stores them.

    Attributes:
        kind: `half`, `int4`, `int8` or `fp8`.
        rows: N.
        columns: K, without the columns that fill up its last block.
        data: Initializer: halves [N, K]; codes [N, blocks, block · bits / 8], low bits first; e4m3 bytes [N, K].
        block: Codes with one scale.
        scales: Initializer: float16 [N, blocks], for `fp8` float32 [N, blocks]; None for `half`.
        zero_points: Initializer: uint8 [N, ceil(blocks · bits / 8)], low bits first; None for 2^(bits - 1).
    """

    kind: str
    rows: int
    columns: int
    data: str
    block: int = 0
    scales: str | None = None
    zero_points: str | None = None


@dataclass(frozen=True)
class Gpu:
    """What the tiles of a kernel depend on.

    Attributes:
        sm: Compute capability as a number, such as 90 for 9.0.
        shared_bytes: Shared memory that one program may take (CUDA C++ Programming Guide, technical specifications).
        num_sms: Multiprocessors of the largest GPU of that kind, for the number of programs; never a limit.
    """

    sm: int
    shared_bytes: int
    num_sms: int

    @property
    def has_dependent_launch(self) -> bool:
        """Whether kernels may be launched before those they depend on have ended (programmatic dependent launch)."""
        return self.sm >= 90


GPUS = {
    gpu.sm: gpu
    for gpu in (
        Gpu(80, 163 << 10, 108),
        Gpu(86, 99 << 10, 84),
        Gpu(89, 99 << 10, 142),
        Gpu(90, 227 << 10, 132),
        Gpu(100, 227 << 10, 148),
        Gpu(120, 99 << 10, 188),
    )
}


class Unserved(ValueError):
    """No kernel serves a shape or format; the message says which and why."""
