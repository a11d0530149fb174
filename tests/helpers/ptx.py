"""Run the machine code of decode kernels on the host: PTX, the assembly of GPUs (NVIDIA, PTX ISA 8.7).

Triton's interpreter runs no inline assembly, and says nothing of the layout in which a compiled kernel spreads a tensor
over threads. Here a program's warps run one after the other from barrier to barrier, the 32 lanes of a warp at once.
Branches have to be the same for all lanes of a warp, as they are where kernels exchange values between lanes. Only what
the kernels of products, experts and candidates use is known; anything else raises.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
LANES = 32
_SHARED_BASE = 1 << 10
_SHARED_BYTES = 1 << 17
_IGNORED = {"griddepcontrol"}
_COMPARISONS = {each: getattr(operator, each) for each in ("eq", "ne", "lt", "le", "gt", "ge")}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


class Memory:
    """Arrays of the host at made-up addresses; what lies outside of them cannot be read or written."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, Array]] = []

    def add(self, array: Array) -> int:
        """Return the address of an array, which is changed in place."""
        address = (len(self._regions) + 1) << 32
        self._regions.append((address, array.reshape(-1).view(np.uint8)))
        return address

    def slots(self, address: int, num_bytes: int) -> Array:
        """Return the bytes at an address."""
        begin, region = self._regions[(address >> 32) - 1]
        assert 0 <= address - begin <= len(region) - num_bytes, f"{num_bytes} bytes at {address - begin}"
        return region[address - begin : address - begin + num_bytes]


class Instruction(NamedTuple):
    """One instruction; `guard` is the predicate that it depends on, `!` before it if it has to be false."""

    guard: str
    opcode: list[str]
    operands: list[str]


@dataclass
class Program:
    """A kernel's instructions, where its labels and its own shared memory are, and the end of that."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_end: int = _SHARED_BASE

    @classmethod
    def of(cls, ptx: str) -> Program:
        """Read the only kernel of a text."""
        program = cls()
        text = re.sub(r"//[^\n]*", "", ptx[ptx.index(".entry") :])
        text = text[text.index("{") + 1 : text.rindex("}")]
        scopes: list[dict[str, str]] = []
        num_scopes = 0
        # A brace that begins a statement begins a scope; others hold the parts of a vector.
        for statement in re.findall(r"\s*(\{|\}|\$\w+:|[^;{}:]*(?:\{[^{}]*\}[^;{}]*|:[^;{}]*)*;)", text):
            if statement == "{":
                scopes.append({})
                num_scopes += 1
            elif statement == "}":
                scopes.pop()
            elif statement.endswith(":"):
                program.labels[statement[:-1]] = len(program.instructions)
            else:
                program._add(statement[:-1].strip(), scopes, f"scope{num_scopes}_")
        return program

    def _add(self, statement: str, scopes: list[dict[str, str]], prefix: str) -> None:
        if match := re.match(r"\.reg\s+\.\w+\s+(.*)", statement):
            if scopes:
                scopes[-1] |= {name.strip(): prefix + name.strip() for name in match[1].split(",")}
        elif match := re.match(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]", statement):
            scopes[-1][match[1]] = prefix + match[1]
            self.shared[prefix + match[1]] = self.shared_end
            self.shared_end += int(match[2])
        elif statement and not statement.startswith("."):
            for scope in scopes:
                statement = re.sub(
                    r"(?<![.%$\w])[a-z]\w*", lambda match, of=scope: of.get(match[0], match[0]), statement
                )
            guard, _, rest = statement.partition(" ") if statement.startswith("@") else ("", "", statement)
            opcode, _, operands = rest.strip().replace("\t", " ").partition(" ")
            parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
            self.instructions.append(Instruction(guard[1:].strip(), opcode.split("."), parts))


def run(ptx: str, arguments: Sequence[int], grid: tuple[int, int, int], num_warps: int, memory: Memory) -> None:
    """Run all programs of a launch, one after the other.

    Args:
        ptx: The text of one kernel.
        arguments: Addresses, integers, and the bits of floating-point numbers.
        grid: Programs along x, y, z.
        num_warps: Warps of a program.
        memory: What addresses lead to.
    """
    program = Program.of(ptx)
    for z, y, x in np.ndindex(*grid[::-1]):
        shared = np.zeros(_SHARED_BYTES, np.uint8)
        special = {f"%ctaid.{axis}": at for axis, at in zip("xyz", (x, y, z), strict=True)}
        special |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        warps = [Warp(program, index, arguments, special, memory, shared).run() for index in range(num_warps)]
        while warps:
            waiting = [warp for warp in warps if next(warp, None) is not None]
            assert len(waiting) in (0, len(warps)), "some warps end where others wait"
            warps = waiting


class Warp:
    """32 lanes of a program; registers are the 64 bits of each lane."""

    def __init__(
        self,
        program: Program,
        index: int,
        arguments: Sequence[int],
        special: Mapping[str, int],
        memory: Memory,
        shared: Array,
    ) -> None:
        self._program, self._arguments, self._memory, self._shared = program, arguments, memory, shared
        self._registers: dict[str, Array] = {}
        self._constants = {**special, **program.shared, "global_smem": program.shared_end}
        self._registers["%tid.x"] = np.arange(LANES, dtype=np.uint64) + np.uint64(LANES * index)
        self._mask = np.ones(LANES, bool)

    def run(self) -> Iterator[bool]:
        """Run to the end; yield at each barrier."""
        at = 0
        while True:
            guard, opcode, operands = self._program.instructions[at]
            at += 1
            self._mask = np.ones(LANES, bool)
            if guard:
                self._mask = self._value(guard.removeprefix("!"), "pred") ^ guard.startswith("!")
            if opcode[0] == "ret":
                return
            if opcode[0] == "bar":
                yield True
            elif opcode[0] == "bra":
                assert self._mask.all() or not self._mask.any(), "lanes of a warp part"
                at = self._program.labels[operands[0]] if self._mask.all() else at
            elif opcode[0] not in _IGNORED:
                self._execute(opcode, operands)

    def _execute(self, opcode: list[str], operands: list[str]) -> None:
        name, kind = opcode[0], opcode[-1]
        if name in ("ld", "st"):
            self._access(opcode, operands)
        elif name == "mma":
            self._multiply(*(_parts(each) for each in operands))
        elif name == "mov" and "{" in "".join(operands):
            self._move_parts(operands)
        elif name == "shfl":
            source, lane = self._value(operands[1], "b32"), self._value(operands[2], "b32").astype(int)
            self._set(operands[0], source[np.arange(LANES) ^ lane if opcode[2] == "bfly" else lane % LANES])
        elif name == "setp":
            a, b = (self._value(each, kind) for each in operands[1:3])
            holds = np.isnan(a) | np.isnan(b) if opcode[1] == "nan" else _COMPARISONS[opcode[1]](a, b)
            self._set(operands[0], holds & self._value(operands[3], "pred") if opcode[2] == "and" else holds)
        elif name == "selp":
            a, b = (self._value(each, kind) for each in operands[1:3])
            self._set(operands[0], np.where(self._value(operands[3], "pred"), a, b))
        elif name == "cvt" and "e4m3x2" in opcode:
            self._set(operands[0], _of_e4m3(self._value(operands[1], "b16")))
        elif name == "cvt":
            self._set(operands[0], self._value(operands[1], kind).astype(_dtype(opcode[-2])))
        elif kind == "f16x2":
            halves = [self._value(each, "b32").view(np.float16).reshape(LANES, 2) for each in operands[1:]]
            result = _ARITHMETIC[name](*(each.astype(np.float64) for each in halves))
            self._set(operands[0], result.astype(np.float16).view(np.uint32)[:, 0])
        elif name in ("lop3", "prmt", "bfe"):
            self._set(operands[0], _BITS[name](*(self._value(each, kind) for each in operands[1:])))
        else:
            self._calculate(opcode, operands)

    def _calculate(self, opcode: list[str], operands: list[str]) -> None:
        name, kind = opcode[0], opcode[-1]
        shifts = name in ("shl", "shr")
        a, *others = (self._value(each, "u32" if shifts and index else kind) for index, each in enumerate(operands[1:]))
        if "wide" in opcode:
            wide = f"{kind[0]}64"
            a, others = a.astype(_dtype(wide)), [each.astype(_dtype(wide)) for each in others]
            if name == "mad":
                others[1] = self._value(operands[3], wide)
        elif kind == "f32" and name in ("fma", "rsqrt"):  # rounded once
            a, others = a.astype(np.float64), [each.astype(np.float64) for each in others]
        with np.errstate(all="ignore"):
            result = _ARITHMETIC[name](a, *others)
        self._set(operands[0], result.astype(np.float32) if kind == "f32" else result)

    def _access(self, opcode: list[str], operands: list[str]) -> None:
        loads, kind = opcode[0] == "ld", opcode[-1]
        registers, place = operands if loads else operands[::-1]
        if opcode[1] == "param":
            index = int(re.findall(r"_param_(\d+)", place)[0])
            self._set(registers, np.full(LANES, self._arguments[index] & 2**64 - 1, np.uint64))
            return
        assert "nc" not in opcode, "a kernel reads what others write"
        size, names = np.dtype(_dtype(kind)).itemsize, _parts(registers)
        base, _, offset = place[1:-1].replace(" ", "").partition("+")
        addresses = self._value(base, "u64").astype(np.int64) + int(offset or 0)
        found = np.zeros((LANES, size * len(names)), np.uint8)
        if not loads:
            values = [self._value(each, kind) for each in names]
            found = np.concatenate([each.view(np.uint8).reshape(LANES, size) for each in values], 1)
        is_shared = opcode[1].startswith("shared")
        for lane in np.flatnonzero(self._mask):
            address, width = int(addresses[lane]), found.shape[1]
            slots = self._shared[address:][:width] if is_shared else self._memory.slots(address, width)
            assert address % width == 0, "unaligned"
            if loads:
                found[lane] = slots
            else:
                slots[:] = found[lane]
        if loads:
            for index, name in enumerate(names):
                self._set(name, found[:, index * size :][:, :size].copy().view(f"u{size}")[:, 0])

    def _move_parts(self, operands: list[str]) -> None:
        to, source = (_parts(each) for each in operands)
        bits = 64 // max(len(to), len(source)) if "%rd" in "".join(operands) else 32 // max(len(to), len(source))
        if len(to) > 1:
            whole = self._value(source[0], "u64")
            for index, name in enumerate(to):
                self._set(name, (whole >> np.uint64(index * bits)) & np.uint64((1 << bits) - 1))
        else:
            parts = [self._value(each, f"u{bits}").astype(np.uint64) for each in source]
            self._set(to[0], sum(each << np.uint64(index * bits) for index, each in enumerate(parts)))

    def _multiply(self, to: list[str], left: list[str], right: list[str], added: list[str]) -> None:
        """mma.m16n8k16: lane 4g + t has rows g and g + 8 at k = 2t, 2t + 1 and 8 more, and column g."""
        g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
        a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
        for index, name in enumerate(left):
            halves = self._value(name, "b32").view(np.float16).reshape(LANES, 2)
            for j in range(2):
                a[g + 8 * (index & 1), 2 * t + j + 8 * (index >> 1)] = halves[:, j]
        for index, name in enumerate(right):
            halves = self._value(name, "b32").view(np.float16).reshape(LANES, 2)
            for j in range(2):
                b[2 * t + j + 8 * index, g] = halves[:, j]
        for index, name in enumerate(added):
            c[g + 8 * (index >> 1), 2 * t + (index & 1)] = self._value(name, "f32")
        c += a @ b
        for index, name in enumerate(to):
            self._set(name, c[g + 8 * (index >> 1), 2 * t + (index & 1)])

    def _value(self, name: str, kind: str) -> Array:
        if name in self._registers:
            bits = self._registers[name]
        elif name.startswith("0f"):
            bits = np.full(LANES, int(name[2:], 16), np.uint64)
        else:
            number = self._constants[name] if name in self._constants else int(name, 0)
            bits = np.full(LANES, number & 2**64 - 1, np.uint64)
        if kind == "pred":
            return bits.astype(bool)
        dtype = np.dtype(_dtype(kind))
        return bits.astype(f"u{dtype.itemsize}").view(dtype)

    def _set(self, name: str, value: Array) -> None:
        if value.dtype == bool:
            value = value.astype(np.uint64)
        value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").astype(np.uint64)
        self._registers[name] = np.where(self._mask, value, self._registers.get(name, np.uint64(0)))


def _dtype(kind: str) -> str:
    return f"{_KINDS[kind[0]]}{int(kind[1:]) // 8}"


def _parts(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{}").split(",")]


def _shifted(operation: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A shift by the width of a number or more leaves zeros, or signs."""

    def shift(a: Array, by: Array) -> Array:
        most = 8 * a.dtype.itemsize - 1
        shifted = operation(a, np.minimum(by, most).astype(a.dtype))
        return np.where(by > most, operation(shifted, a.dtype.type(1)), shifted)

    return shift


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    terms = [
        np.where(table >> index & 1, (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c), 0)
        for index in range(8)
    ]
    return np.bitwise_or.reduce(terms).astype(np.uint32)


def _prmt(a: Array, b: Array, chosen: Array) -> Array:
    both = np.concatenate([each.copy().view(np.uint8).reshape(LANES, 4) for each in (a, b)], 1)
    picked = [both[np.arange(LANES), chosen >> np.uint32(4 * index) & np.uint32(7)] for index in range(4)]
    return np.stack(picked, 1).copy().view(np.uint32)[:, 0]


def _bfe(a: Array, begin: Array, length: Array) -> Array:
    top = 8 * a.dtype.itemsize - length
    return _ARITHMETIC["shr"](_ARITHMETIC["shl"](a, top - begin), top)


def _of_e4m3(pairs: Array) -> Array:
    """Return two numbers of float8 e4m3 as two of float16, in 32 bits."""
    import ml_dtypes

    numbers = pairs.copy().view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    return numbers.reshape(LANES, 2).copy().view(np.uint32)[:, 0]


_BITS: dict[str, Callable[..., Array]] = {"lop3": _lop3, "prmt": _prmt, "bfe": _bfe}
_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: a * b + c,
    "neg": operator.neg,
    "not": operator.invert,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": np.minimum,
    "max": np.maximum,
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "ex2": np.exp2,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "shl": _shifted(operator.lshift),
    "shr": _shifted(operator.rshift),
}
