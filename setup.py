"""Build the library of own kernels, native/, where a C++ compiler is; everything else is in pyproject.toml.

Without a compiler, or with one that is too old, the package is built all the same, as a wheel for any platform:
`qwen3vl targets` then says that the library is missing, and engines are built with ONNX Runtime's kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

NAME = "runtime.native.libqwen3vl_cpu"
# One set of flags for all files, and none for the machine at hand: each file of an instruction set asks for it itself.
COMPILE = [
    *("-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"),
    # Needs nothing of the C++ library, so that the wheel runs wherever its C library does.
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    # Every rounding is written down, so that instruction sets give the same bits.
    *("-ffp-contract=off", "-fno-math-errno"),
]
LINK = ["-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-z,relro,-z,now"]


class BuildLibrary(build_ext):
    """Build the library; what does not compile is left out, unless `--strict` is given."""

    user_options: ClassVar = [*build_ext.user_options, ("strict", None, "fail where a source does not compile")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "strict"]

    def initialize_options(self) -> None:
        """Set the default of the option."""
        super().initialize_options()
        self.strict = False

    def get_ext_filename(self, fullname: str) -> str:
        """Return the library's path: no Python loads it, so its name says none."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or remove what an earlier build left."""
        try:
            super().build_extension(ext)
        except BaseError as error:  # no compiler, too old a one, or no linker
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if self.strict:
                raise
            print(f"note: the library of own kernels was not built: {error}", file=sys.stderr)

    @property
    def has_built(self) -> bool:
        """Whether there is anything that only one platform runs."""
        return any(Path(self.get_ext_fullpath(each.name)).is_file() for each in self.extensions)


class BuildWheel(bdist_wheel):
    """Name the wheel after what is in it: any Python 3, and the platform if the library is there."""

    def run(self) -> None:
        """Compile first, since the name depends on it."""
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_ext").has_built
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return tags of Python, its ABI and the platform."""
        return ("py3", "none", super().get_tag()[2])


def library() -> list[Extension]:
    """Return what is to be compiled; on Linux alone."""
    sources = sorted(str(path) for path in Path("native").glob("*.cpp"))
    headers = sorted(str(path) for path in Path("native").glob("*.h"))
    if not sys.platform.startswith("linux") or not sources:
        return []
    return [
        Extension(
            NAME,
            sources,
            depends=headers,
            language="c++",
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            optional=True,
        )
    ]


setup(ext_modules=library(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel})
