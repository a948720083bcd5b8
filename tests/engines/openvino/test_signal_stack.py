"""A closed session leaves no thread with an alternate signal stack that is gone, and keeping its own costs no AMX."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from accel.engines.openvino import signal_stack as module
from accel.engines.openvino.package import open_core
from accel.engines.openvino.signal_stack import SS_DISABLE, Stack, kept_signal_stack, signal_stack
from accel.variants import add_variant
from tests.engines.openvino.needs import needs_openvino

pytestmark = [needs_openvino, pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO sets it on Linux alone")]

# What OpenVINO gave back is taken by read-only memory, where no handler can run. Two rows take a second core.
SCRIPT = """
import mmap, signal, sys
import accel

came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
with accel.load(sys.argv[1], engine="openvino", threads=2) as encoder:
    encoder.embed(["A man is eating.", "Someone has a meal, and then another one."])
taken = [mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ) for _ in range(20_000)]
signal.raise_signal(signal.SIGTERM)
print(came == [signal.SIGTERM])
"""

# In a thread of its own, where no faulthandler sets a stack either. 158: arch_prctl, 0x1022: ARCH_GET_XCOMP_PERM.
AMX_SCRIPT = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
import accel
from accel.engines.openvino import signal_stack as module

def opened(folder, size):
    memory = ctypes.create_string_buffer(size or 1)
    if size:
        assert module._set(module.Stack(ctypes.addressof(memory), 0, size)) == 0
    with accel.load(folder, engine="openvino", variant="bf16", threads=2) as encoder:
        encoder.embed(["A man is eating.", "Someone has a meal, and then another one."])
        permitted = ctypes.c_ulong()
        assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(permitted)) == 0
    stack = module.signal_stack()
    print(permitted.value, stack.flags, stack.size)
    module._set(module.Stack(None, module.SS_DISABLE, 0))

ThreadPoolExecutor(1).submit(opened, sys.argv[1], int(sys.argv[2])).result()
"""
TILE_DATA = 1 << 18  # of the kernel's features (XFEATURE_XTILEDATA): what AMX needs a permission for


def kernel_has_amx() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    supported = ctypes.c_ulong()
    failed = ctypes.CDLL(None).syscall(158, 0x1021, ctypes.byref(supported))  # ARCH_GET_XCOMP_SUPP
    return not failed and bool(supported.value & TILE_DATA)


def fields(stack: Stack | None) -> tuple[Any, ...]:
    assert stack is not None
    return stack.sp, stack.flags, stack.size


def test_a_signal_after_a_session(minilm_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(minilm_bundle, tmp_path / "bundle")
    add_variant(folder, "fp32", target="openvino", check=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(not kernel_has_amx(), reason="needs Linux on x86-64, and a CPU and kernel with AMX")
def test_a_small_stack_of_its_own_costs_no_amx(minilm_bundle: Path, tmp_path: Path) -> None:
    """The kernel permits AMX to no process with such a stack; then it refuses the stack, and the thread has none."""
    folder = shutil.copytree(minilm_bundle, tmp_path / "bundle")
    add_variant(folder, "bf16", target="openvino", check=False)
    found = {}
    for size in (0, 8192, 1 << 17):
        arguments = [sys.executable, "-c", AMX_SCRIPT, str(folder), str(size)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        permitted, flags, left = map(int, done.stdout.split())
        found[size] = bool(permitted & TILE_DATA), flags, left
    assert found == {0: (True, SS_DISABLE, 0), 8192: (True, SS_DISABLE, 0), 1 << 17: (True, 0, 1 << 17)}


def test_the_stack_of_a_thread_that_opens_a_core() -> None:
    def opened() -> tuple[tuple[Any, ...], ...]:
        before = fields(signal_stack())
        first, second = open_core(), open_core()
        while_open = fields(signal_stack())
        del first
        del second
        return before, while_open, fields(signal_stack())

    for before, *after in (opened(), ThreadPoolExecutor(1).submit(opened).result()):
        assert after == [before, before]


def test_a_stack_of_its_own_comes_back() -> None:
    def set_and_restore() -> None:
        memory = ctypes.create_string_buffer(1 << 17)
        own = Stack(ctypes.addressof(memory), 0, len(memory))
        assert module._set(own) == 0
        with pytest.raises(KeyError), kept_signal_stack():
            assert module._set(Stack(None, SS_DISABLE, 0)) == 0
            raise KeyError
        assert fields(signal_stack()) == fields(own)
        assert module._set(Stack(None, SS_DISABLE, 0)) == 0

    ThreadPoolExecutor(1).submit(set_and_restore).result()


def test_a_stack_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is too small by now: better none than OpenVINO's."""

    def refused() -> int:
        memory = ctypes.create_string_buffer(1 << 17)
        with kept_signal_stack():
            assert module._set(Stack(ctypes.addressof(memory), 0, len(memory))) == 0
        monkeypatch.undo()
        return fields(signal_stack())[1]

    monkeypatch.setattr(module, "signal_stack", lambda: Stack(4096, 0, 16))
    assert ThreadPoolExecutor(1).submit(refused).result() == SS_DISABLE


def test_elsewhere_nothing_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(module.ctypes, "CDLL", None)
    with kept_signal_stack():
        assert signal_stack() is None
