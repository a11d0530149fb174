"""The own kernels for processors: find their library, load it, choose its instruction set, give it to ONNX Runtime.

The library is built of `native/` where a compiler is, and lies beside this file. It holds the same kernels for several
instruction sets and reads one layout of weights with all of them, so an engine is built for none in particular: the
best that the processor has and the system grants is taken, or the one that `QWEN3VL_CPU_ISA` names. The choice counts
for the process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import EngineError, Qwen3VLError, UsageError
from runtime.settings import CPU_ISA_VARIABLE, cpu_isa

if TYPE_CHECKING:
    import onnxruntime as ort

DOMAIN = "qwen3vl.cpu"
"""Of the operators, and what `custom_ops` says in the manifest of an engine that uses them."""

VERSION = 1
"""Of the interface between this file and the library: functions, layout of weights, operators."""

OPERATORS = (
    *("MatMulInt4", "MatMulInt8", "LookUpInt4", "LookUpInt8"),
    *("DecodeAttention", "DecodeAttentionFloat16", "DecodeAttentionInt8", "DecodeAttentionInt4"),
)

LIBRARY = Path(__file__).with_name("libqwen3vl_cpu.so")

PORTABLE = "portable"
ISAS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", PORTABLE)
"""Names of all instruction sets that kernels are written for, the best first."""

_FUNCTIONS = {
    "qwen3vl_cpu_version": ([], ctypes.c_int),
    "qwen3vl_cpu_isas": ([], ctypes.c_char_p),
    "qwen3vl_cpu_isa": ([], ctypes.c_char_p),
    "qwen3vl_cpu_use": ([ctypes.c_char_p], ctypes.c_int),
}
# What qwen3vl_cpu_use returns where the processor has the instruction set and the system does not grant it.
_REFUSED = -2
# What every error of loading ends with, since it is met where an engine is opened.
_OTHERWISE = "or build the engine again with qwen3vl-export --kernels ort"
_BUILD = "build it: `make setup` in a checkout, or install the package from there with g++ 12 or later"
_LOGGER = logging.getLogger(__name__)


def problem(path: Path = LIBRARY) -> str:
    """Return why the library cannot be used here; empty if it can."""
    error = failure(path)
    return "" if error is None else error.message


def failure(path: Path = LIBRARY) -> Qwen3VLError | None:
    """Return the error that using the library would raise here, its remedy included; None if it can be used.

    Where ONNX Runtime is not installed, it is not asked.
    """
    try:
        load(path)
        if importlib.util.find_spec("onnxruntime") is not None:
            import onnxruntime as ort

            _register(ort.SessionOptions(), path)
    except Qwen3VLError as error:
        return error
    return None


def isas(path: Path = LIBRARY) -> tuple[str, ...]:
    """Return the instruction sets that this process can use and the library has kernels for, the best first.

    Raises:
        EngineError, UsageError: As `load`.
    """
    library = load(path)
    library.qwen3vl_cpu_isa()  # chooses where nothing is chosen, and so finds what the system refuses
    return _isas(library)


def isa(path: Path = LIBRARY) -> str:
    """Return the instruction set in use.

    Raises:
        EngineError, UsageError: As `load`.
    """
    return _text(load(path).qwen3vl_cpu_isa())


def use(name: str, path: Path = LIBRARY) -> None:
    """Choose an instruction set for the whole process, opened engines included.

    Raises:
        UsageError: There is none of that name, the processor does not run it, or the system refuses it to this process.
        EngineError: As `load`.
    """
    _use(load(path), name)


def register(options: ort.SessionOptions, path: Path = LIBRARY) -> None:
    """Add the operators of the library to the options of a session.

    Raises:
        EngineError: The library cannot be loaded, is of another version, or ONNX Runtime refuses it.
        UsageError: `QWEN3VL_CPU_ISA` is wrong.
    """
    load(path)
    _register(options, path)


def warn_of_portable_code(path: Path = LIBRARY) -> None:
    """Log a warning if the kernels for no processor in particular are in use.

    Raises:
        EngineError, UsageError: As `load`.
    """
    library = load(path)
    if _text(library.qwen3vl_cpu_isa()) == PORTABLE:
        _LOGGER.warning(
            "note: the own kernels run portable code, many times slower than with AVX2, which this processor %s",
            "has" if len(_isas(library)) > 1 else "lacks",
        )


@functools.cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library, check its version, and take the instruction set that `QWEN3VL_CPU_ISA` names.

    Raises:
        EngineError: There is no library, it is none, or it is of another version.
        UsageError: `QWEN3VL_CPU_ISA` names no instruction set that this process can use.
    """
    if not path.is_file():
        raise EngineError(f"{path}: the library of own kernels is missing", remedy=f"{_BUILD}; {_OTHERWISE}")
    try:
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise EngineError(
            f"{path}: it does not load as the library of own kernels ({error})", remedy=f"{_BUILD}; {_OTHERWISE}"
        ) from error
    version = library.qwen3vl_cpu_version()
    if version != VERSION:
        raise EngineError(
            f"{path}: the library of own kernels is of version {version}, expected {VERSION}",
            remedy=f"{_BUILD} again; {_OTHERWISE}",
        )
    asked = cpu_isa()
    if asked is not None:
        _use(library, asked)
    return library


def _register(options: ort.SessionOptions, path: Path) -> None:
    import onnxruntime as ort

    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} refuses the library of own kernels ({str(error).splitlines()[0]})",
            remedy=f"install the onnxruntime that the extra `cpu` asks for, {_OTHERWISE}",
        ) from error


def _use(library: ctypes.CDLL, name: str) -> None:
    result = library.qwen3vl_cpu_use(name.encode())
    if result == 0:
        return
    if result == _REFUSED:
        reason = "the system refuses it to this process"
    elif name in ISAS:
        reason = "this processor does not run it"
    else:
        reason = "there is no instruction set of that name"
    runs = _isas(library)
    raise UsageError(
        f"{CPU_ISA_VARIABLE}: {name!r:.40}: {reason}; it runs {', '.join(runs)}",
        remedy=f"choose one of those, or leave {CPU_ISA_VARIABLE} out for {runs[0]}",
    )


def _isas(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(_text(library.qwen3vl_cpu_isas()).split(","))


def _text(value: bytes) -> str:
    return value.decode("ascii")
