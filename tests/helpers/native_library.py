"""A library with the C functions of the own kernels and no kernels: what loads it can be tested without them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = """
#include <string.h>
struct OrtApiBase {{ const void* const* (*GetApi)(unsigned); const char* (*GetVersionString)(void); }};
static char used[32] = "{best}";
int qwen3vl_cpu_version(void) {{ return {version}; }}
const char* qwen3vl_cpu_isas(void) {{ return "{isas}"; }}
const char* qwen3vl_cpu_isa(void) {{ return used; }}
int qwen3vl_cpu_use(const char* name) {{ return strstr("{isas}", name) ? (strcpy(used, name), 0) : -1; }}
void* RegisterCustomOps(void* options, const struct OrtApiBase* base) {{
  /* CreateStatus is the first function of the interface; 1 is its code of a failure. */
  void* (*create_status)(int, const char*) = (void* (*)(int, const char*))base->GetApi(17)[0];
  return {refuses} ? create_status(1, "no interface 17") : 0;
}}
"""


def stand_in(folder: Path, *, version: int = 1, isas: str = "avx2,portable", refuses: bool = False) -> Path:
    """Compile a library, or skip the test where there is no C compiler."""
    best = isas.split(",")[0]
    return compiled(
        _SOURCE.format(version=version, isas=isas, best=best, refuses=int(refuses)), folder / "libstand_in.so"
    )


def compiled(text: str, library: Path) -> Path:
    """Compile a text in C to a library, or skip the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    source = library.with_suffix(".c")
    source.write_text(text, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
