"""A library with the C functions of the own kernels and no kernels: what loads it can be tested without them."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = """
#include <string.h>
struct OrtApiBase {{ const void* const* (*GetApi)(unsigned); const char* (*GetVersionString)(void); }};
static char used[32] = "{best}";
static int has_refused = 0;
int qwen3vl_cpu_version(void) {{ return {version}; }}
const char* qwen3vl_cpu_isas(void) {{ return has_refused ? "{granted}" : "{isas}"; }}
const char* qwen3vl_cpu_isa(void) {{ return used; }}
int qwen3vl_cpu_use(const char* name) {{
  if ({is_granted}) return strcpy(used, name), 0;
  if (!({is_there})) return -1;
  has_refused = 1;
  return -2;
}}
void* RegisterCustomOps(void* options, const struct OrtApiBase* base) {{
  /* CreateStatus is the first function of the interface; 1 is its code of a failure. */
  void* (*create_status)(int, const char*) = (void* (*)(int, const char*))base->GetApi(17)[0];
  return {refuses} ? create_status(1, "no interface 17") : 0;
}}
"""


_NUMBERS = itertools.count()


def stand_in(
    folder: Path, *, version: int = 1, isas: str = "avx2,portable", granted: str = "", refuses: bool = False
) -> Path:
    """Compile a library, or skip the test where there is no C compiler.

    Args:
        folder: Where it goes.
        version: Of its interface.
        isas: The instruction sets of the processor, the best first.
        granted: Those that the system grants; empty: all.
        refuses: Whether ONNX Runtime is too old for it.
    """
    granted = granted or isas
    text = _SOURCE.format(
        version=version,
        isas=isas,
        granted=granted,
        best=granted.split(",")[0],
        is_there=_is_one_of(isas),
        is_granted=_is_one_of(granted),
        refuses=int(refuses),
    )
    # A process loads a file of one name once, and pytest gives the folder of a test that passed to the next one.
    return compiled(text, folder / f"libstand_in_{next(_NUMBERS)}.so")


def _is_one_of(names: str) -> str:
    return " || ".join(f'strcmp(name, "{each}") == 0' for each in names.split(","))


def compiled(text: str, library: Path) -> Path:
    """Compile a text in C to a library, or skip the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    source = library.with_suffix(".c")
    source.write_text(text, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
