"""Build the library of own kernels, native/, where a C++ compiler is, and list packages; the rest is in pyproject.toml.

Without a compiler, or with one that is too old, the package is built all the same, as a wheel for any platform:
`qwen3vl targets` then says that the library is missing, and engines are built with ONNX Runtime's kernels.
"""

from __future__ import annotations

import os
import platform
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError
from setuptools.modified import newer_group

NAME = "runtime.native.libqwen3vl_cpu"
FOLDER = Path("native")
# Nothing of the C++ library is needed, so that the wheel runs wherever its C library does; what is missing is an error.
LINK = ["-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-z,relro,-z,now"]


def sources(build: Mapping[str, Any], machine: str = platform.machine()) -> dict[str, list[str]]:
    """Return the flags of each source that `native/build.toml` lists for a machine, by its path."""
    own_flags = {**build["sources"], **build.get(machine, {})}
    # Python's own flags come before these; they ask for debug information.
    return {str(FOLDER / name): [*build["flags"], *flags, "-g0"] for name, flags in own_flags.items()}


def load_build() -> dict[str, Any]:
    """Return how the library is compiled."""
    return tomllib.loads((FOLDER / "build.toml").read_text(encoding="utf-8"))


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
        """Compile and link if a file is newer than the library, or remove what an earlier build left."""
        library = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group([*ext.sources, *ext.depends], str(library), "newer"):
            return
        library.unlink(missing_ok=True)
        ext.optional = not self.strict  # of an optional one, setuptools ignores what is raised
        flags = sources(load_build())
        try:
            # Each compiler is a process of its own.
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                objects = list(threads.map(lambda source: self._compiled(source, flags[source]), ext.sources))
            self.compiler.link_shared_object(objects, str(library), extra_postargs=LINK, target_lang="c++")
        except (BaseError, CCompilerError, OSError) as error:  # no compiler, too old a one, or no linker
            if self.strict:
                raise
            print(f"note: the library of own kernels was not built: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Put the library into the checkout, or remove the one of other sources that lies there."""
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            if not Path(self.build_lib, name).is_file():
                Path(name).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def _compiled(self, source: str, flags: list[str]) -> str:
        """Compile a source and return the path of its object."""
        (path,) = self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
        return str(path)

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
        if self.root_is_pure:
            self.distribution.ext_modules = None  # else its files would be those of one platform
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return tags of Python, its ABI and the platform."""
        return ("py3", "none", super().get_tag()[2])


def library() -> Extension:
    """Return what is compiled."""
    depends = [*(str(path) for path in sorted(FOLDER.glob("*.h"))), str(FOLDER / "build.toml"), "setup.py"]
    return Extension(NAME, list(sources(load_build())), depends=depends, language="c++", optional=True)


NAMES = ("configs", "engines", "qwen3_vl", "qwen3vl_export", "runtime")
# A folder of optimum's namespace: with an __init__.py it would hide optimum itself, and without one nothing finds it.
REGISTER = "optimum.commands.register"
PACKAGES = [*find_packages(include=[pattern for name in NAMES for pattern in (name, f"{name}.*")]), REGISTER]
# The kernels ask the processor in Linux' ways; other systems take ONNX Runtime's.
is_linux = sys.platform.startswith("linux")
setup(
    packages=PACKAGES,
    ext_modules=[library()] if is_linux else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
