"""Compiles the library of CPU operators, kernels/accel_cpu/src, into its package.

It is plain C at its border and knows nothing of Python, so one file serves every Python version. Every instruction set
that it may use is compiled in and chosen at run time: the machine that builds does not matter. Where it cannot be
compiled, everything else is installed all the same, and the package says why it has no library.

    CXX              the compiler (default: the first of c++, g++, clang++; then ziglang, if it is installed)
    ACCEL_CPU_BUILD  0: compile nothing
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ZIG = "ziglang"
COMPILERS = ("c++", "g++", "clang++")
# The language without its library: nothing but the C library is needed, to build and to run.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fno-exceptions", "-fno-rtti", "-fPIC", "-fvisibility=hidden"]
LINK_FLAGS = ["-shared", *(["-s", "-Wl,--as-needed"] if sys.platform == "linux" else [])]
LIBRARY = "accel_cpu.libaccel_cpu"  # as an extension module's name: package and file
FAILURE = "build_failure.txt"


class BuildFailure(Exception):
    """The library cannot be compiled; the message says why and what helps."""


def wanted() -> bool:
    """Whether the library shall be compiled at all."""
    return os.environ.get("ACCEL_CPU_BUILD", "1") != "0"


def find_compiler() -> list[str] | None:
    """The command of the system's C++ compiler."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def compiler_commands() -> tuple[list[str], list[str]]:
    """The commands that compile C++ and that link, ziglang's included.

    Raises:
        BuildFailure: There is none, or none is wanted.
    """
    if not wanted():
        raise BuildFailure("ACCEL_CPU_BUILD=0 was set when the project was installed. Unset it and install again")
    found = find_compiler()
    if found is not None:
        return found, found
    if importlib.util.find_spec(ZIG) is None:
        looked = ", ".join([*COMPILERS, f"the Python package {ZIG}"])
        raise BuildFailure(f"No C++ compiler was found (looked for {looked}). Install one and install again")
    zig = [sys.executable, "-m", ZIG]
    # "c++" would build zig's C++ library before it links, which takes minutes.
    return [*zig, "c++", *_zig_target()], [*zig, "cc", *_zig_target()]


def _zig_target() -> list[str]:
    """zig compiles for the CPU and the C library of the building machine unless it is told otherwise."""
    if sys.platform != "linux":
        return ["-mcpu=baseline"]
    musl = "musl" in (sysconfig.get_config_var("SOABI") or "")
    return ["-target", f"{platform.machine()}-linux-{'musl' if musl else 'gnu.2.28'}", "-mcpu=baseline"]


def compile_library(sources: list[str], folder: Path, library: Path) -> None:
    """Compiles and links.

    Args:
        sources: C++ files.
        folder: For object files.
        library: The shared library to write.

    Raises:
        BuildFailure: There is no compiler, or it failed; the message holds the first lines it printed.
    """
    compiler, linker = compiler_commands()
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / f"{Path(source).stem}.o") for source in sources]
    compiles = [[*compiler, *FLAGS, "-c", source, "-o", target] for source, target in zip(sources, objects)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, compiles))
    _run([*linker, *LINK_FLAGS, *objects, "-o", str(library)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildFailure(f"The compiler {command[0]} cannot be run: {error.strerror}. Check CXX") from error
    if done.returncode != 0:
        printed = "\n".join((done.stderr or done.stdout).splitlines()[:12])
        raise BuildFailure(f"Compiling failed: {shlex.join(command)}\n{printed}\nInstall another compiler, or name it: CXX")


def extension(source: str) -> Extension:
    """The library as setuptools knows it.

    Args:
        source: Folder of the package, relative to setup.py.
    """
    folder = Path(source)
    files = sorted(str(path) for path in (folder / "src").glob("*.cc"))
    headers = [str(path) for part in ("src", "third_party") for path in sorted((folder / part).glob("*.h"))]
    return Extension(LIBRARY, files, depends=headers, optional=True)


class BuildLibrary(build_ext):
    """Compiles with our own command; a failure is written into the package instead of ending the installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version in the name."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        failure = library.parent / FAILURE
        library.unlink(missing_ok=True)  # of older sources
        failure.unlink(missing_ok=True)
        try:
            compile_library(ext.sources, Path(self.build_temp), library)
        except BuildFailure as error:
            self.warn(f"accel_cpu has no library: {error}")
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{error}.\n", encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """For editable installations: the library, or why there is none, beside the sources."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            package = self.get_finalized_command("build_py").get_package_dir("accel_cpu")
            for path in (built, built.parent / FAILURE):
                target = Path(package) / path.name
                target.unlink(missing_ok=True)
                if path.exists():
                    shutil.copy(path, target)


class PlatformWheel(bdist_wheel):
    """For any Python 3, on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
