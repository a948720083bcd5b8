"""Where the compiled library lies, and why there is none if there is none."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libaccel_cpu.so"
FAILURE = FOLDER / "build_failure.txt"  # setup.py writes it where compiling failed
INSTRUCTION_SETS = ("avx512bf16", "avx512vnni", "avx2", "portable")


def library_path() -> Path | None:
    """The library for ``SessionOptions.register_custom_ops_library``; None: it was not built, see
    ``unavailable_reason``."""
    return LIBRARY if LIBRARY.is_file() else None


def unavailable_reason() -> str | None:
    """Why there is no library and what to do, one sentence each; None: there is one."""
    if library_path() is not None:
        return None
    if FAILURE.is_file():
        return FAILURE.read_text(encoding="utf-8").strip()
    return (
        "The library of CPU operators was never compiled. Install the project with pip, which compiles it: "
        "pip install --editable ."
    )


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise OSError(unavailable_reason())
    library = ctypes.CDLL(str(path))
    library.accel_cpu_instruction_set.restype = ctypes.c_char_p
    return library


def instruction_set() -> str:
    """The instruction set that kernels made now use: one of ``INSTRUCTION_SETS``.

    Raises:
        OSError: There is no library, or ACCEL_CPU_ISA names what this CPU does not run.
    """
    name: bytes = _library().accel_cpu_instruction_set()
    if name.decode() not in INSTRUCTION_SETS:
        raise OSError(name.decode())
    return name.decode()


__all__ = ["instruction_set", "library_path", "unavailable_reason"]
