"""Keeps OpenVINO from leaving a thread with an alternate signal stack that is no longer there.

On Linux its CPU plugin gives the thread that loads it an alternate signal stack (``sigaltstack``) and frees that memory
with the plugin. It puts the stack before it back only where its own is the current one: not where the plugins of two
cores go in the order in which they came, nor where one goes in another thread. Python's handlers run on that stack: the
next signal is written over whatever lies there by then (seen with openvino 2026.4.1).

Compiling a model, in float32 too, asks the kernel for AMX. The kernel refuses while any thread has an alternate stack
below ``AT_MINSIGSTKSZ`` (11,952 bytes with AMX; the classic ``SIGSTKSZ`` is 8,192), and OpenVINO asks once per process:
a refusal is final (bfloat16, 1024x2048x2048 on two cores: 41 ms in place of 6.3). So the plugin's own, larger stack
stays until the model is compiled. A small one of another thread still costs AMX: nobody else can change it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SS_DISABLE = 2  # bits/ss_flags.h: signals come on the thread's own stack


class Stack(ctypes.Structure):
    """``stack_t`` of Linux: address, flags, bytes."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """After the block this thread has the alternate signal stack that it had before; elsewhere than on Linux nothing.

    Where the kernel refuses that stack, as too small for registers that are permitted by now (AMX), the thread has
    none: its handlers run on its ordinary stack.
    """
    before = signal_stack()
    try:
        yield
    finally:
        if before is not None and _set(before) != 0:
            _set(Stack(None, SS_DISABLE, 0))


def signal_stack() -> Stack | None:
    """This thread's alternate signal stack, with the flag SS_DISABLE where it has none; None: not on Linux."""
    if sys.platform != "linux":
        return None
    found = Stack()
    return found if ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0 else None


def _set(stack: Stack) -> int:
    return int(ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None))


__all__ = ["kept_signal_stack", "signal_stack"]
