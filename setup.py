"""What setuptools cannot read from pyproject.toml: the compiled part belongs to no Python.

``ctypes`` loads it, so one file serves every version, and the wheel's tag says so. Where no
compiler is at hand it is left out, and the wheel is for any machine.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "loader.adapters._lowrank"


def library_file(name: str) -> Path:
    """Return where a module of this name lies, without a suffix of one Python's."""
    return Path(*name.split(".")).with_suffix(".so")


class BuildLibrary(build_ext):
    """Builds it under the name that ``loader/adapters/lowrank.py`` looks for."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the same name for every version of Python."""
        return str(library_file(fullname))


class Wheel(bdist_wheel):
    """A wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of what was built."""
        built = Path(self.bdist_dir, library_file(LIBRARY)).is_file()
        self.root_is_pure = not built
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            LIBRARY,
            sources=["loader/adapters/lowrank.c"],
            depends=["loader/adapters/lowrank_tiles.h"],
            extra_compile_args=["-O3", "-ffp-contract=fast"],
            optional=True,  # without it, torch does the same in more time
        )
    ],
)
